"""Forward mode, vmap and per-sample gradients (and, by name, gradients of gradients).

Each of them is right, or raises; what a function claims in its contract it must do, what it disclaims it must refuse. A result
that is silently wrong, or cut off from what it depends on, is a failure.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bptoolkit.verify.properties.asking import (
    Refused,
    asked,
    asked_or_wrong,
    claimed,
    connected,
    first_line,
    fresh_leaf,
    hold_alike,
    native_of,
    nodes,
    plain,
    runs,
    through,
)
from bptoolkit.verify.properties.second_order import double_backward as double_backward
from bptoolkit.verify.trial import NotApplicable, Outputs, Trial, Wrong, pull

SAMPLES = (1.0, 0.5, 0.75)  # a batch is an input times these: it stays positive, or a probability, where the input is


def forward_mode(trial: Trial) -> None:
    """J u by dual numbers and by `torch.func.jvp`, for a tangent on all inputs and on each input alone, equals what reverse
    mode gives: J u of the reference, or without one <J u, v> = <u, J'v>.

    Catches a wrong jvp, tangents that are dropped (zero without a word), a jvp that forgets some inputs.
    """
    if trial.point.layout == "expanded":
        raise NotApplicable("torch takes no tangent for an expanded tensor")
    xs, outputs = plain(trial)
    ys = [x.detach() for x in xs]
    tangents = trial.directions(xs)
    groups: list[tuple[str, list[Tensor | None]]] = [("", list(tangents))]
    if len(ys) > 1:
        groups += [
            (f" by {name}", [t if j == k else None for j, t in enumerate(tangents)]) for k, name in enumerate(trial.names)
        ]
    claim, refusal, worked = trial.contract.forward_mode, None, False
    for way, push in (("torch.func.jvp", _by_jvp), ("a dual number", _by_dual)):
        for label, us in groups:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    pushed = push(trial, ys, us)
            except Exception as error:
                if claim is True and way == "torch.func.jvp":
                    raise Wrong(f"{way}{label} raises, though the contract claims forward mode: {first_line(error)}") from None
                refusal = refusal or f"{way} raises {first_line(error)}"
                continue
            worked = True
            if claim is False:
                raise Wrong(f"{way} does not raise, though the contract says that there is no forward mode")
            try:
                _hold_pushed(trial, f"{way}{label}", pushed, ys, us)
            except Wrong:
                if claim is None and _generated(outputs):
                    raise NotApplicable(
                        "torch drops the tangents of torch.library operators, which cannot have a jvp"
                    ) from None
                raise
    if not worked and claim is None:
        raise NotApplicable(refusal or "nothing to push forward")


def _by_jvp(trial: Trial, ys: Sequence[Tensor], us: Sequence[Tensor | None]) -> list[Tensor | None]:
    moved = [k for k, u in enumerate(us) if u is not None]

    def call(*some: Tensor) -> Outputs:
        filled = list(ys)
        for k, y in zip(moved, some):
            filled[k] = y
        return trial.run(filled)

    return list(torch.func.jvp(call, tuple(ys[k] for k in moved), tuple(us[k] for k in moved))[1])


def _by_dual(trial: Trial, ys: Sequence[Tensor], us: Sequence[Tensor | None]) -> list[Tensor | None]:
    with forward_ad.dual_level():
        outputs = trial.run([y if u is None else forward_ad.make_dual(y, u) for y, u in zip(ys, us)])
        return [forward_ad.unpack_dual(o).tangent for o in outputs]


def _generated(outputs: Sequence[Tensor]) -> bool:
    """Whether an operator of `torch.library.register_autograd` is behind the outputs."""
    return any(type(node).__name__.startswith("GeneratedBackwardFor_") for node in nodes(outputs))


def _hold_pushed(
    trial: Trial, way: str, pushed: Sequence[Tensor | None], ys: Sequence[Tensor], us: Sequence[Tensor | None]
) -> None:
    """Hold J u to the reference's, output by output, or to reverse mode by one number."""
    n, moved = len(ys), [k for k, u in enumerate(us) if u is not None]
    inputs = [*ys, *(u for u in us if u is not None)]

    def truth(tensors: Sequence[Tensor]) -> list[Tensor]:
        given = dict(zip(moved, tensors[n:]))
        return _push(trial, trial.oracle, tensors[:n], [given.get(k) for k in range(n)])

    outputs = trial.run(ys)
    got = [torch.zeros_like(o) if p is None else p for o, p in zip(outputs, pushed)]
    if trial.reference is not None and runs(truth, inputs):
        what = [f"J u with {way}" if len(got) == 1 else f"J u with {way}, output {k}" for k in range(len(got))]
        trial.judge(what, got, truth, inputs, _native_push(trial, ys, us) or native_of(truth, inputs, trial))
        return
    if trial.point.dtype != ("float64" if trial.wide else "float32"):
        raise NotApplicable("no J u of a reference, and the adjoint identity is judged in the widest dtype")
    if trial.point.values in ("kinks", "zero"):
        raise NotApplicable("no J u of a reference, and at a kink forward and reverse mode may each take another side")
    cotangents = trial.cotangents(outputs, salt=3, kind="random")
    leaves = [fresh_leaf(y, u is not None) for y, u in zip(ys, us)]
    pulled = pull(trial.run(leaves), leaves, cotangents)
    left = [p.double() * c.double() for p, c in zip(got, cotangents)]
    right = [g.double() * u.double() for g, u in zip(pulled, us) if g is not None and u is not None]
    a, b = (sum(float(t.sum()) for t in side) for side in (left, right))
    size = sum(float(t.abs().sum()) for t in (*left, *right))

    def inner(tensors: Sequence[Tensor]) -> list[Tensor]:  # <u, J'v>, for its rounding error: both sides may cancel to nothing
        moving = iter(tensors[n:])
        given = [next(moving) if u is not None else None for u in us]
        ts = [fresh_leaf(t, u is not None) for t, u in zip(tensors, us)]
        back = pull(trial.run(ts, trial.oracle), ts, list(moving))
        return [torch.stack([(g * u).sum() for g, u in zip(back, given) if g is not None and u is not None]).sum()]

    (scale,) = trial.noise(inner, [*inputs, *cotangents], trial.point.torch_dtype)
    noise = 0.0 if scale is None else 100 * float(scale.sigma)
    if not math.isfinite(b + noise):
        raise NotApplicable("a gradient is not finite")
    if not abs(a - b) <= (1e-9 if trial.wide else 1e-4) * size + noise:
        raise Wrong(
            f"forward mode disagrees with backward: <J u, v> = {a:.9g} with {way}, <u, J'v> = {b:.9g}", gross=False, what="J u"
        )


def _native_push(trial: Trial, ys: Sequence[Tensor], us: Sequence[Tensor | None]) -> list[Tensor | None] | None:
    """J u by the reference's own forward mode in the dtype of the trial: it overflows elsewhere than reverse mode."""
    if trial.reference is None or trial.point.dtype == "float64":
        return None
    try:
        return _by_jvp(replace(trial, call=trial.reference), ys, us)
    except Exception:
        return None


def _push(trial: Trial, fn: Callable[..., Outputs], ys: Sequence[Tensor], us: Sequence[Tensor | None]) -> list[Tensor]:
    """J u by reverse mode alone: J'c is linear in c, and the gradient of <J'c, u> by c is J u.

    Raises:
        RuntimeError: the function refuses that, or its gradients are cut off from the cotangent.
    """
    leaves = [fresh_leaf(y, u is not None) for y, u in zip(ys, us)]
    outputs = trial.run(leaves, fn)
    cs = [torch.ones_like(o).requires_grad_() for o in outputs]
    grads = pull(outputs, leaves, cs, create_graph=True)
    connected(grads)
    live = [(g, u) for g, u in zip(grads, us) if g is not None and u is not None and g.requires_grad]
    found = through([g for g, _ in live], cs, [u for _, u in live]) if live else [None] * len(cs)
    return [torch.zeros_like(o.detach()) if f is None else f for o, f in zip(outputs, found)]


def vmap(trial: Trial) -> None:
    """vmap over each input alone, over all of them, and with the batch as the last dimension: outputs and gradients equal those
    of a loop; and so does vmap over the cotangents of one backward.

    Catches a rule that mixes samples, ignores `in_dims`, returns the batch in another place, or cuts off the gradients.
    """
    if trial.contract.random:
        raise NotApplicable("draws random numbers, which vmap refuses or draws otherwise")
    xs, _ = plain(trial)
    n = len(xs)
    cases = [(tuple(0 if j == k else None for j in range(n)), f" over {trial.names[k]}") for k in range(n)] if n > 1 else []
    cases.append(((0,) * n, " over all inputs"))
    cases.append(((-1,) * n, " over the last dimension of all inputs"))
    claim, refusal, worked = trial.contract.vmap, None, False
    ways: list[tuple[str, Callable[[], None]]] = [
        (f"vmap{label}", lambda dims=dims, label=label: _vmap_case(trial, xs, dims, label))  # type: ignore[misc]
        for dims, label in cases
    ]
    ways += [("vmap over cotangents", lambda: _vmap_pull(trial, xs))]
    for way, judge in ways:
        try:
            judge()
        except Refused as error:
            if claim is True:
                raise Wrong(f"{way} raises, though the contract claims vmap: {error}") from None
            refusal = refusal or f"{way} raises {error}"
            continue
        worked = True
        if claim is False and way != "vmap over cotangents":  # that is a matter of the backward alone
            raise Wrong(f"{way} does not raise, though the contract says that there is no vmap")
    if not worked and claim is None:
        raise NotApplicable(refusal or "nothing to map over")


def _vmap_case(trial: Trial, xs: Sequence[Tensor], dims: Sequence[int | None], label: str) -> None:
    """Outputs and gradients of one vmap against a loop."""
    args = [
        (x.detach() if d is None else torch.stack([x.detach() * s for s in SAMPLES], d)).requires_grad_(x.requires_grad)
        for x, d in zip(xs, dims)
    ]

    def loop(fn: Callable[..., Outputs], args: Sequence[Tensor]) -> Outputs:
        rows = (
            trial.run([a if d is None else a.select(d, b).contiguous() for a, d in zip(args, dims)], fn)
            for b in range(len(SAMPLES))
        )
        return tuple(torch.stack(o) for o in zip(*rows))

    def results(outputs: Outputs, args: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor | None]:
        return [*(o.detach() for o in outputs), *pull(outputs, args, cotangents)]

    want_outputs = loop(trial.call, args)
    cotangents = trial.cotangents(want_outputs, kind="random")
    want = results(want_outputs, args, cotangents)

    def mapped() -> list[Tensor | None]:
        outputs = torch.func.vmap(trial.call, tuple(dims))(*args)
        for k, (o, w) in enumerate(zip(outputs, want_outputs)):
            if o.shape != w.shape:
                raise Wrong(
                    f"output {k} of vmap{label} has shape {tuple(o.shape)}, that of a loop {tuple(w.shape)}", what=f"output {k}"
                )
        return results(outputs, args, cotangents)

    got = asked_or_wrong(mapped)

    def truth(tensors: Sequence[Tensor]) -> list[Tensor | None]:
        ys = [fresh_leaf(t, x.requires_grad) for t, x in zip(tensors, xs)]
        return results(loop(trial.oracle, ys), ys, tensors[len(xs) :])

    what = [f"output {k} of vmap{label}" for k in range(len(want_outputs))] + [
        f"gradient of {n} through vmap{label}" for n in trial.names
    ]
    hold_alike(trial, what, got, want, truth, [*(a.detach() for a in args), *cotangents], "a loop")


def _vmap_pull(trial: Trial, xs: Sequence[Tensor]) -> None:
    """A backward over a batch of cotangents against a loop, both by `torch.func.vjp` and by `is_grads_batched`."""
    leaves = [fresh_leaf(x, x.requires_grad) for x in xs]
    outputs = trial.run(leaves)
    batches = [trial.cotangents(outputs, salt=k, kind="random") for k in range(len(SAMPLES))]
    stacked = tuple(torch.stack(c) for c in zip(*batches))
    wanted = [k for k, x in enumerate(xs) if x.requires_grad]
    live = [k for k, o in enumerate(outputs) if o.requires_grad]

    def loop(fn: Callable[..., Outputs], ys: Sequence[Tensor], stacked: Sequence[Tensor]) -> list[Tensor]:
        outputs = trial.run(ys, fn)
        rows = [pull(outputs, ys, [c[b] for c in stacked], retain_graph=True) for b in range(len(SAMPLES))]
        return [torch.stack([row[k] for row in rows]) for k in wanted]

    def by_vjp() -> list[Tensor]:
        def call(*some: Tensor) -> Outputs:
            filled = [x.detach() for x in xs]
            for k, y in zip(wanted, some):
                filled[k] = y
            return trial.run(filled)

        pulled = torch.func.vjp(call, *(xs[k].detach() for k in wanted))[1]
        return list(torch.func.vmap(pulled)(stacked))

    def by_engine() -> list[Tensor]:
        ys = [fresh_leaf(x, x.requires_grad) for x in xs]
        outs = trial.run(ys)
        asked = [ys[k] for k in wanted]
        cots = [stacked[k] for k in live]
        found = torch.autograd.grad([outs[k] for k in live], asked, cots, allow_unused=True, is_grads_batched=True)
        return [y.new_zeros((len(SAMPLES), *y.shape)) if f is None else f for y, f in zip(asked, found)]

    def truth(tensors: Sequence[Tensor]) -> list[Tensor]:
        return loop(trial.oracle, [fresh_leaf(t, x.requires_grad) for t, x in zip(tensors, xs)], tensors[len(xs) :])

    want = loop(trial.call, leaves, stacked)
    inputs = [*(x.detach() for x in xs), *stacked]
    refused: Refused | None = None
    for way, run in (("vmap of torch.func.vjp", by_vjp), ("autograd.grad(is_grads_batched=True)", by_engine)):
        try:
            got = asked(run)
        except Refused as error:
            refused = refused or error
            continue
        what = [f"gradient of {trial.names[k]} with {way}" for k in wanted]
        hold_alike(trial, what, got, want, truth, inputs, "a loop")
    if refused is not None:
        raise refused


def per_sample_gradients(trial: Trial) -> None:
    """vmap of grad over a batch of the first input, the others shared, equals a loop.

    Catches a backward that, under vmap, sums over samples or mixes them, and rules that differ when one input alone is batched.
    """
    if trial.contract.random:
        raise NotApplicable("draws random numbers, which vmap refuses or draws otherwise")
    xs, outputs = plain(trial)
    cotangents = trial.cotangents(outputs)
    wanted = tuple(k for k, x in enumerate(xs) if x.requires_grad)
    n = len(xs)
    args = [torch.stack([xs[0].detach() * s for s in SAMPLES]), *(x.detach() for x in xs[1:])]

    def loss(*ys: Tensor) -> Tensor:
        return torch.stack([(o * c).sum() for o, c in zip(trial.run(ys), cotangents)]).sum()

    def loop(fn: Callable[..., Outputs], args: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
        rows = []
        for first in args[0]:
            ys = [fresh_leaf(y, x.requires_grad) for y, x in zip((first, *args[1:]), xs)]
            grads = pull(trial.run(ys, fn), ys, cotangents)
            rows.append([grads[k] for k in wanted])
        return [torch.stack(g) for g in zip(*rows)]

    dims = (0, *[None] * (n - 1))
    got = claimed(trial.contract.vmap, "vmap of grad", lambda: torch.func.vmap(torch.func.grad(loss, wanted), dims)(*args))
    if got is None:
        return
    want = loop(trial.call, args, cotangents)
    what = [f"per-sample gradient of {trial.names[k]}" for k in wanted]
    hold_alike(
        trial, what, got, want, lambda tensors: loop(trial.oracle, tensors[:n], tensors[n:]), [*args, *cotangents], "a loop"
    )
