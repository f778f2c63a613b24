"""Gradients of gradients: right, refused aloud, or a failure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bptoolkit.verify.properties.asking import claimed, connected, fresh_leaf, native_of, plain, runs, through
from bptoolkit.verify.trial import NotApplicable, Outputs, Trial, Wrong, pull


def double_backward(trial: Trial) -> None:
    """The gradient of a weighted sum of the gradients, by the inputs and by the cotangents; then by the inputs alone, as a
    gradient penalty asks for it.

    Catches saved intermediates that are cut off from the inputs, gradients that do not require grad (a penalty is then dropped
    without a word), a second-order formula that is wrong, a function that is said to refuse and returns zeros.
    """
    xs, outputs = plain(trial)
    cotangents = [c.detach() for c in trial.cotangents(outputs)]
    weights = trial.directions(xs)
    claim = trial.contract.double_backward
    for free in (True, False):  # whether the cotangents require grad as well
        cs = [c.detach().requires_grad_(free) for c in cotangents]
        got = claimed(
            claim if free or claim is True else None,
            "a second backward",
            lambda cs=cs: _second(trial, trial.call, trial.leaves(), cs, weights),  # type: ignore[misc]
        )
        if got is None:
            return
        names = [*trial.names, *(_cotangent(k, len(cs)) for k in range(len(cs)))]
        _hold_second(trial, xs, cs, weights, got, names)


def _cotangent(k: int, n: int) -> str:
    return "the cotangent" if n == 1 else f"cotangent {k}"


def _second(
    trial: Trial,
    fn: Callable[..., Outputs],
    xs: Sequence[Tensor],
    cs: Sequence[Tensor],
    weights: Sequence[Tensor],
    whole: bool = False,
) -> list[Tensor | None]:
    """The gradient of the weighted sum of the first gradients, by (*xs, *cs); None where it is disconnected.

    Raises:
        RuntimeError: the function refuses; or `whole`, and its gradients are cut off from the cotangents.
    """
    grads = pull(trial.run(xs, fn), xs, cs, create_graph=True)
    if whole:
        connected(grads)
    live = [(g, w) for g, w in zip(grads, weights) if g is not None and g.requires_grad]
    if not live:
        return [None] * (len(xs) + len(cs))
    return through([g for g, _ in live], [*xs, *cs], [w for _, w in live])


def _hold_second(
    trial: Trial,
    xs: Sequence[Tensor],
    cs: Sequence[Tensor],
    weights: Sequence[Tensor],
    got: Sequence[Tensor | None],
    names: Sequence[str],
) -> None:
    """Hold second derivatives to the reference's, or to finite differences of the first ones."""
    n, m = len(xs), len(cs)
    leaves = [*xs, *cs]

    def truth(tensors: Sequence[Tensor]) -> list[Tensor | None]:
        # the cotangents always require grad: without that @once_differentiable is silent
        ys = [fresh_leaf(t, k >= n or x.requires_grad) for k, (t, x) in enumerate(zip(tensors, leaves))]
        second = _second(trial, trial.oracle, ys[:n], ys[n:], tensors[n + m :], whole=True)
        return [torch.zeros_like(y) if y.requires_grad and s is None else s for y, s in zip(ys, second)]

    inputs = [t.detach() for t in (*leaves, *weights)]
    if trial.reference is None or not runs(truth, inputs):
        _by_differences(trial, xs, cs, weights, got, names)
        return
    dtype = trial.point.torch_dtype
    scales = trial.noise(truth, inputs, dtype)
    native = native_of(truth, inputs, trial) or [None] * len(leaves)
    for name, leaf, g, scale, own in zip(names, leaves, got, scales, native):
        if not leaf.requires_grad:
            continue
        try:
            trial.hold(f"second derivative by {name}", torch.zeros_like(leaf) if g is None else g, scale, dtype, own)
        except Wrong as wrong:
            raise _cut_off(wrong, name) if g is None else wrong from None


def _cut_off(wrong: Wrong, name: str) -> Wrong:
    wrong.args = (
        f"the gradients are cut off from {name}: with create_graph=True they do not depend on it, so that a gradient penalty "
        f"is dropped without a word, where @once_differentiable would raise ({wrong})",
    )
    wrong.gross = True
    return wrong


def _by_differences(
    trial: Trial,
    xs: Sequence[Tensor],
    cs: Sequence[Tensor],
    weights: Sequence[Tensor],
    got: Sequence[Tensor | None],
    names: Sequence[str],
) -> None:
    """Hold second derivatives to Richardson's differences of the first ones, along a random direction for each tensor."""
    if trial.point.dtype != "float64":
        raise NotApplicable("no reference, and finite differences need float64")
    leaves = [*xs, *cs]
    n, tried, conclusive = len(xs), 0, 0

    def weighted(tensors: Sequence[Tensor]) -> list[Tensor]:
        ys = [fresh_leaf(t, x.requires_grad) for t, x in zip(tensors, xs)]
        grads = pull(trial.run(ys), ys, tensors[n:])
        return [torch.stack([(g * w).sum() for g, w in zip(grads, weights) if g is not None]).sum()]

    (scale,) = trial.noise(weighted, [t.detach() for t in leaves], torch.float64)
    noise = 0.0 if scale is None else float(scale.sigma)
    for k, (name, leaf, g) in enumerate(zip(names, leaves, got)):
        if not leaf.requires_grad or leaf.numel() == 0:
            continue
        (direction,) = trial.directions([leaf], salt=k + 1)
        direction = direction * (min(float(leaf.detach().square().mean().sqrt()), 1.0) or 1.0)

        def along(step: float, k: int = k, direction: Tensor = direction) -> tuple[float, float]:
            moved = [t.detach() + step * direction if j == k else t.detach() for j, t in enumerate(leaves)]
            ys = [fresh_leaf(t, x.requires_grad) for t, x in zip(moved[:n], xs)]
            terms = [w * g for w, g in zip(weights, pull(trial.run(ys), ys, moved[n:])) if g is not None]
            return sum(float(t.sum()) for t in terms), sum(float(t.abs().sum()) for t in terms)

        want, uncertain, size = richardson(along, noise)
        mine = 0.0 if g is None else float((g * direction).sum())
        tried += 1
        conclusive += uncertain < 1e-3 * max(abs(want), abs(mine), size) or size == 0
        if uncertain < 1e-3 * max(abs(want), abs(mine)) and abs(mine - want) > uncertain:
            what = f"second derivative by {name}"
            text = f"{mine:.9g} along a random direction, finite differences of the gradient give {want:.9g} ± {uncertain:.1g}"
            wrong = Wrong(f"{what}: {text}", gross=False, what=what)
            raise _cut_off(wrong, name) if g is None else wrong
    if tried and not conclusive:
        raise NotApplicable("no reference, and finite differences of the gradients are inconclusive")


def richardson(along: Callable[[float], tuple[float, float]], noise: float = 0.0) -> tuple[float, float, float]:
    """The derivative at 0 of what gives (value, sum of its terms' magnitudes); how uncertain it is; that sum at 0.

    `noise` is the rounding error of a value.
    """
    h = 1e-3
    (middle, size), steps = along(0.0), (h, h / 2, h / 4)
    ahead, back = [along(s)[0] for s in steps], [along(-s)[0] for s in steps]
    d1, d2, d4 = ((a - b) / (2 * s) for a, b, s in zip(ahead, back, steps))
    bend1, bend2 = ((a - 2 * middle + b) / s for a, b, s in zip(ahead[1:], back[1:], steps[1:]))
    r2, r4 = (4 * d2 - d1) / 3, (4 * d4 - d2) / 3
    want = (16 * r4 - r2) / 15
    kink = abs(2 * bend2 - bend1)  # the jump of the slope: what stays of a second difference as the step goes to zero
    return want, 10 * abs(want - r4) + kink + (1e-14 * size + 10 * noise) / steps[-1] + 1e-9 * abs(want), size
