"""What must hold of a differentiable function, one property a function.

A property takes a `Trial` and returns None, or raises `Wrong` with what differs and by how much. Each docstring says which
mistakes it catches. `reference` is plain torch differentiated by autograd; a property that needs one says so by its name in
`NEEDS_REFERENCE`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]


class Wrong(AssertionError):
    """A property does not hold."""


class Trial(NamedTuple):
    """One call to judge, in float64."""

    ours: Callable[..., Outputs]
    reference: Callable[..., Outputs] | None
    tensors: tuple[Tensor, ...]  # the inputs to differentiate by
    need: tuple[bool, ...]  # which of them require grad in this trial
    generator: torch.Generator


def leaves(tensors: Sequence[Tensor], need: Sequence[bool]) -> tuple[Tensor, ...]:
    """Fresh copies, with the strides they had, of which some require grad."""
    return tuple(t.detach().clone(memory_format=torch.preserve_format).requires_grad_(n) for t, n in zip(tensors, need))


def random_like(outputs: Sequence[Tensor], generator: torch.Generator) -> Outputs:
    """Cotangents of normal values."""
    return tuple(torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs)


def gradients(fn: Callable[..., Outputs], xs: Sequence[Tensor], cotangents: Sequence[Tensor], **kw: Any) -> list[Any]:
    """The gradients of the leaves that require grad, zeros where nothing flowed; None for the others."""
    out = [(o, c) for o, c in zip(fn(*xs), cotangents) if o.requires_grad]
    wanted = [x for x in xs if x.requires_grad]
    if not out:
        return [torch.zeros_like(x) if x.requires_grad else None for x in xs]
    outs, cots = zip(*out)
    got = iter(torch.autograd.grad(outs, wanted, cots, allow_unused=True, materialize_grads=True, **kw))
    return [next(got) if x.requires_grad else None for x in xs]


def same(what: str, got: Any, want: Any, context: Sequence[Tensor] = ()) -> None:
    """Raise unless got equals want up to float64 rounding: 1e-9 of want's own size, and 1e-12 of anything in the context."""
    if not isinstance(got, Tensor) or got.shape != want.shape:
        raise Wrong(f"{what}: got {getattr(got, 'shape', got)}, want a tensor of shape {tuple(want.shape)}")
    if got.numel() == 0:
        return
    if bool((got.isnan() != want.isnan()).any()) or bool((got.isinf() != want.isinf()).any()):
        raise Wrong(f"{what}: NaN or infinity where the expected value has none, or the other way round")
    finite = want.isfinite()
    got, want = got.detach(), want.detach()
    size = max((float(t.detach().abs().max()) for t in context if t.numel() and t.is_floating_point()), default=0.0)
    error = (got - want)[finite].abs()
    bound = 1e-9 * float(want[finite].abs().max() if error.numel() else 0) + 1e-12 * size
    if error.numel() and float(error.max()) > bound:
        worst = int((got - want).abs().masked_fill(~finite, 0).argmax())
        at = tuple(int(k) for k in torch.unravel_index(torch.tensor(worst), want.shape))
        ratio = float(got[at] / want[at]) if float(want[at]) else float("inf")
        raise Wrong(
            f"{what}: largest error {float(error.max()):.3g} (bound {bound:.1g}) at {at}: "
            f"got {float(got[at]):.6g}, want {float(want[at]):.6g}, ratio {ratio:.6g}"
        )


def _compare(trial: Trial, xs: Sequence[Tensor], cotangents: Sequence[Tensor], got: Sequence[Any]) -> None:
    assert trial.reference is not None
    ys = leaves(trial.tensors, trial.need)
    want = gradients(trial.reference, ys, cotangents)
    context = [*xs, *cotangents, *[g for g in want if g is not None]]
    for k, (g, w) in enumerate(zip(got, want)):
        if w is not None:
            same(f"gradient of input {k}", g, w, context)


def forward_value(trial: Trial) -> None:
    """The outputs equal the reference's. Catches a wrong forward with a consistent backward."""
    assert trial.reference is not None
    got, want = trial.ours(*trial.tensors), trial.reference(*trial.tensors)
    if len(got) != len(want):
        raise Wrong(f"{len(got)} outputs, want {len(want)}")
    for k, (g, w) in enumerate(zip(got, want)):
        same(f"output {k}", g, w, trial.tensors)


def gradient_value(trial: Trial) -> None:
    """Every needed gradient equals autograd of the reference, for a random cotangent.

    Catches wrong factors, terms, transposes.
    """
    xs = leaves(trial.tensors, trial.need)
    cotangents = random_like(trial.ours(*trial.tensors), trial.generator)
    _compare(trial, xs, cotangents, gradients(trial.ours, xs, cotangents))


def grad_subsets(trial: Trial) -> None:
    """What requires grad decides what gets one, and the others' values do not change. Catches wrong `need` indices."""
    cotangents = random_like(trial.ours(*trial.tensors), trial.generator)
    for k in range(len(trial.tensors)):
        need = tuple(j == k for j in range(len(trial.tensors)))
        alone = trial._replace(need=need)
        xs = leaves(trial.tensors, need)
        _compare(alone, xs, cotangents, gradients(trial.ours, xs, cotangents))


def cotangent_layout(trial: Trial) -> None:
    """Transposed, sliced, expanded and zero cotangents. Catches raw-stride reads, which contiguous cotangents never show."""
    outputs = trial.ours(*trial.tensors)
    dense = random_like(outputs, trial.generator)
    for name, layout in LAYOUTS.items():
        cotangents = tuple(layout(c) for c in dense)
        xs = leaves(trial.tensors, trial.need)
        try:
            _compare(trial, xs, cotangents, gradients(trial.ours, xs, cotangents))
        except Wrong as wrong:
            raise Wrong(f"with a cotangent that is {name}: {wrong}") from None


def input_layout(trial: Trial) -> None:
    """Transposed, sliced and offset inputs. Catches kernels that assume contiguous inputs."""
    for name, layout in LAYOUTS.items():
        if name in ("expanded", "zero"):  # they change the values
            continue
        strided = trial._replace(tensors=tuple(layout(t) for t in trial.tensors))
        try:
            gradient_value(strided)
        except Wrong as wrong:
            raise Wrong(f"with inputs that are {name}: {wrong}") from None


def some_outputs_unused(trial: Trial) -> None:
    """Only one of several outputs takes part in the loss. Catches undefined cotangents mistaken for tensors."""
    outputs = trial.ours(*trial.tensors)
    for k in range(len(outputs) if len(outputs) > 1 else 0):
        one = trial._replace(ours=_output(trial.ours, k), reference=trial.reference and _output(trial.reference, k))
        gradient_value(one)


def nothing_changed(trial: Trial) -> None:
    """Inputs and cotangents are bit for bit what they were. Catches kernels that write over what they were given."""
    xs = leaves(trial.tensors, trial.need)
    cotangents = random_like(trial.ours(*trial.tensors), trial.generator)
    before = [t.detach().clone() for t in (*xs, *cotangents)]
    gradients(trial.ours, xs, cotangents)
    for k, (now, was) in enumerate(zip((*xs, *cotangents), before)):
        if not torch.equal(now.detach().nan_to_num(), was.nan_to_num()):
            raise Wrong(f"{'input' if k < len(xs) else 'cotangent'} {k % len(xs)} was written to")


def backward_twice(trial: Trial) -> None:
    """A second backward over the same graph, after another call in between, gives the same bits. Catches overwritten or
    shared saved tensors and state kept on the class.
    """
    xs = leaves(trial.tensors, trial.need)
    outputs = trial.ours(*xs)
    cotangents = random_like(outputs, trial.generator)
    live = [(o, c) for o, c in zip(outputs, cotangents) if o.requires_grad]
    if not live:
        return
    outs, cots = zip(*live)
    wanted = [x for x in xs if x.requires_grad]
    kw: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    first = torch.autograd.grad(outs, wanted, cots, retain_graph=True, **kw)
    kept = [g.clone() for g in first]
    others = leaves(tuple(t * 0.5 + 0.25 for t in trial.tensors), trial.need)
    gradients(trial.ours, others, cotangents)
    for k, (was, now) in enumerate(zip(kept, first)):
        if not torch.equal(was.nan_to_num(), now.nan_to_num()):
            raise Wrong(f"gradient {k} was overwritten by a later call")
    second = torch.autograd.grad(outs, wanted, cots, **kw)
    for k, (was, now) in enumerate(zip(kept, second)):
        if not torch.equal(was.nan_to_num(), now.nan_to_num()):
            raise Wrong(f"gradient {k} of the second backward differs from the first by {float((was - now).abs().max()):.3g}")


def finite_differences(trial: Trial) -> None:
    """The directional derivative by Richardson extrapolation. Needs no reference; catches a forward and a backward that
    disagree.
    """
    xs = leaves(trial.tensors, trial.need)
    outputs = trial.ours(*trial.tensors)
    if not all(bool(o.isfinite().all()) for o in outputs):
        return
    cotangents = random_like(outputs, trial.generator)
    directions = [torch.randn(x.shape, generator=trial.generator, dtype=torch.float64).to(x) for x in xs]

    def along(step: float) -> float:
        moved = [x.detach() + step * d if n else x.detach() for x, d, n in zip(xs, directions, trial.need)]
        return sum(float((o * c).sum().detach()) for o, c in zip(trial.ours(*moved), cotangents))

    grads = gradients(trial.ours, xs, cotangents)
    got = sum(float((g * d).sum()) for g, d in zip(grads, directions) if g is not None)
    h = 1e-3
    d1, d2, d4 = ((along(s) - along(-s)) / (2 * s) for s in (h, h / 2, h / 4))
    r2, r4 = (4 * d2 - d1) / 3, (4 * d4 - d2) / 3
    want = (16 * r4 - r2) / 15
    uncertain = 10 * abs(want - r4) + 1e-8 * (1 + abs(want))
    if uncertain < 1e-3 * (1 + abs(want)) and abs(got - want) > uncertain:
        raise Wrong(f"directional derivative: got {got:.9g}, finite differences give {want:.9g} ± {uncertain:.1g}")


def double_backward(trial: Trial) -> None:
    """The gradient of a function of the gradients. Catches detached or saved intermediates, right to first order only."""
    assert trial.reference is not None
    results = []
    outputs = trial.ours(*trial.tensors)
    if not all(bool(o.isfinite().all()) for o in outputs):  # the mean over nothing has no derivative
        return
    cotangents = random_like(outputs, trial.generator)
    weights = [torch.randn(t.shape, generator=trial.generator, dtype=torch.float64).to(t) for t in trial.tensors]
    for fn in (trial.ours, trial.reference):
        xs = leaves(trial.tensors, trial.need)
        cs = [c.clone().requires_grad_() for c in cotangents]
        first = gradients(fn, xs, cs, create_graph=True)
        inner = sum((g * w).sum() for g, w in zip(first, weights) if g is not None)
        wanted = [x for x in (*xs, *cs) if x.requires_grad]
        if not isinstance(inner, Tensor) or not inner.requires_grad:
            raise (
                Wrong("the gradients do not depend on anything: create_graph=True gave disconnected gradients")
                if (fn is trial.ours and trial.tensors and any(trial.need))
                else Wrong("the reference cannot be differentiated twice")
            )
        results.append(torch.autograd.grad(inner, wanted, allow_unused=True, materialize_grads=True))
    for k, (g, w) in enumerate(zip(*results)):
        same(f"second-order gradient {k}", g, w, [*trial.tensors, *cotangents, *weights, *results[1]])


def forward_mode(trial: Trial) -> None:
    """⟨J u, v⟩ = ⟨u, Jᵀ v⟩. Needs no reference; catches forward and reverse mode that disagree."""
    xs = leaves(trial.tensors, trial.need)
    tangents = tuple(torch.randn(x.shape, generator=trial.generator, dtype=torch.float64).to(x) for x in xs)
    outputs, pushed, *_ = torch.func.jvp(trial.ours, trial.tensors, tangents)
    if not all(bool(o.isfinite().all()) for o in outputs):  # the mean over nothing has no derivative
        return
    cotangents = random_like(outputs, trial.generator)
    full = leaves(trial.tensors, (True,) * len(xs))
    pulled = gradients(trial.ours, full, cotangents)
    left = sum((p * c).sum() for p, c in zip(pushed, cotangents))
    right = sum((g * t).sum() for g, t in zip(pulled, tangents))
    terms = [p * c for p, c in zip(pushed, cotangents)] + [g * t for g, t in zip(pulled, tangents)]
    size = [torch.stack([t.abs().sum() for t in (*terms, *tangents, *cotangents)]).sum() * 100] if terms else []
    same("⟨J u, v⟩ against ⟨u, Jᵀ v⟩", left, right, size)


def vmap_equals_loop(trial: Trial) -> None:
    """The gradient under vmap equals that of a loop. Catches rules that mix samples."""
    if not trial.tensors:
        return
    cotangents = random_like(trial.ours(*trial.tensors), trial.generator)

    def pull(x: Tensor) -> Any:
        return torch.func.vjp(trial.ours, x, *trial.tensors[1:])[1](cotangents)

    x = trial.tensors[0]
    batch = torch.stack([x, x * 0.5])
    got = torch.func.vmap(pull)(batch)
    want = [pull(b) for b in batch]
    for k, g in enumerate(got):
        same(f"gradient of input {k} under vmap", g, torch.stack([w[k] for w in want]), [*trial.tensors, *cotangents])


def _output(fn: Callable[..., Outputs], k: int) -> Callable[..., Outputs]:
    return lambda *xs: (fn(*xs)[k],)


def _sliced(t: Tensor) -> Tensor:
    """Every second element of a wider tensor, at an offset."""
    if t.dim() == 0:
        return torch.stack([t, t])[1]
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), float("nan"))
    wide[..., 1::2] = t
    return wide[..., 1::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "sliced from a wider tensor": _sliced,
    "expanded": lambda t: t.sum().expand(t.shape) if t.numel() else t,
    "zero": torch.zeros_like,
}

PROPERTIES: dict[str, Callable[[Trial], None]] = {
    f.__name__: f
    for f in (
        forward_value,
        gradient_value,
        grad_subsets,
        cotangent_layout,
        input_layout,
        some_outputs_unused,
        nothing_changed,
        backward_twice,
        finite_differences,
        double_backward,
        forward_mode,
        vmap_equals_loop,
    )
}
NEEDS_REFERENCE = frozenset(
    (
        "forward_value",
        "gradient_value",
        "grad_subsets",
        "cotangent_layout",
        "input_layout",
        "some_outputs_unused",
        "double_backward",
    )
)
