"""What the properties of transforms and tools share: asking for what may be refused, and comparing a function with itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from bptoolkit.verify.trial import NotApplicable, Outputs, Trial, Wrong, same_bits

T = TypeVar("T")


class Refused(Exception):
    """The transform raised."""


def asked(run: Callable[[], T]) -> T:
    """What a transform gives; raises `Refused` if it raises."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "there is a performance drop because ..."
            return run()
    except Exception as error:
        raise Refused(first_line(error)) from None


def asked_or_wrong(run: Callable[[], T]) -> T:
    """`asked`, letting `Wrong` through."""
    found: list[Wrong] = []

    def guarded() -> Any:
        try:
            return run()
        except Wrong as wrong:
            found.append(wrong)
            return None

    got = asked(guarded)
    if found:
        raise found[0]
    return got


def plain(trial: Trial) -> tuple[list[Tensor], Outputs]:
    """The inputs and outputs of a plain call, finite and to be differentiated.

    Raises:
        NotApplicable: the call raises, no output requires grad, or one is not finite.
    """
    xs = trial.leaves()
    try:
        outputs = trial.run(xs)
    except Exception as error:
        raise NotApplicable(f"the call itself raises {first_line(error)}") from None
    if not any(o.requires_grad for o in outputs):
        raise NotApplicable("no output requires grad")
    if not all(bool(o.isfinite().all()) for o in outputs):
        raise NotApplicable("an output is not finite")
    return xs, outputs


def claimed(claim: bool | None, what: str, run: Callable[[], T]) -> T | None:
    """What `run` gives; None where it raises, as the contract says that it does.

    Raises:
        NotApplicable: it raises, and nothing was claimed.
        Wrong: it raises though it was claimed, or does not although it was disclaimed.
    """
    try:
        got = asked_or_wrong(run)
    except Refused as error:
        if claim is True:
            raise Wrong(f"{what} raises, though the contract claims it: {error}") from None
        if claim is False:
            return None
        raise NotApplicable(f"{what} raises {error}") from None
    if claim is False:
        raise Wrong(f"{what} does not raise, though the contract says that it is not there")
    return got


def hold_alike(
    trial: Trial,
    what: Sequence[str],
    got: Sequence[Tensor | None],
    want: Sequence[Tensor | None],
    truth: Callable[[list[Tensor]], Sequence[Tensor | None]],
    inputs: Sequence[Tensor],
    other: str,
) -> None:
    """Hold results to other results of the same function: the same bits, or apart by no more than the rounding errors of both.

    Args:
        what: what each result is.
        got, want: the results, and what they are to be.
        truth: computes them in float64, for the size of rounding errors.
        inputs: of `truth`.
        other: where `want` comes from, for the message.
    """
    pairs = [(k, g, w) for k, (g, w) in enumerate(zip(got, want)) if w is not None]
    for k, g, w in pairs:
        if g is None or g.shape != w.shape or g.dtype != w.dtype:
            found = "None" if g is None else f"{g.dtype} {tuple(g.shape)}"
            raise Wrong(f"{what[k]} is {found}, {other} gives {w.dtype} {tuple(w.shape)}", what=what[k])
    pairs = [(k, g, w) for k, g, w in pairs if g is not None and not same_bits(g, w)]
    if not pairs:
        return
    scales = trial.noise(truth, inputs, trial.point.torch_dtype)
    for k, g, w in pairs:
        scale = scales[k]
        if scale is None or g is None:
            continue
        both = replace(scale, exact=w.detach().double(), sigma=1.5 * scale.sigma)  # more than sqrt(2): both have errors
        try:
            trial.hold(f"{what[k]}, against {other}", g, both, trial.point.torch_dtype)
        except Wrong as wrong:
            wrong.what = what[k]
            raise


def first_line(error: BaseException) -> str:
    """The type and the first line of what an exception says."""
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line[:160]}"


def through(tensors: Sequence[Tensor], by: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of tensors by leaves, running every node behind them.

    `autograd.grad(inputs=...)` runs only the nodes on a path to the inputs: the node of `@once_differentiable` that raises is
    passed by, and None comes back. Asked for all leaves there are, the engine gets to it.
    """
    behind = leaves_behind(tensors)
    asked = [*behind, *(b for b in by if b.requires_grad and all(b is not v for v in behind))]
    found = torch.autograd.grad(tensors, asked, weights, allow_unused=True)
    got = {id(v): g for v, g in zip(asked, found)}
    return [got.get(id(b)) for b in by]


def connected(grads: Sequence[Tensor | None]) -> None:
    """Raise unless gradients depend on their cotangents, as all do that are not zero."""
    given = [g for g in grads if g is not None]
    if not any(g.requires_grad for g in given) and any(bool(g.any()) for g in given):
        raise RuntimeError("the gradients are cut off from the cotangents")


def leaves_behind(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Every leaf that the graph of these tensors ends in."""
    found = {id(t): t for t in tensors if t.grad_fn is None and t.requires_grad}
    for node in nodes(tensors):
        if type(node).__name__ == "AccumulateGrad":
            found[id(node.variable)] = node.variable
    return list(found.values())


def nodes(tensors: Sequence[Tensor]) -> Iterator[Any]:
    """The nodes of the graph behind these tensors."""
    seen: set[Any] = set()
    stack = [t.grad_fn for t in tensors if t.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        stack += [n for n, _ in node.next_functions if n is not None]


def fresh_leaf(t: Tensor, needed: bool) -> Tensor:
    """A contiguous leaf of the same values."""
    return t.detach().contiguous().clone().requires_grad_(needed)


def native_of(
    truth: Callable[[list[Tensor]], Sequence[Tensor | None]], inputs: Sequence[Tensor], trial: Trial
) -> list[Tensor | None] | None:
    """What the reference gives in the dtype of the trial, where it has kernels for it: its errors bound what is asked."""
    if trial.reference is None or trial.point.dtype == "float64":
        return None
    try:
        return list(truth([t.detach() for t in inputs]))
    except Exception:
        return None


def runs(truth: Callable[[list[Tensor]], Any], inputs: Sequence[Tensor]) -> bool:
    """Whether the reference can give what it is asked for."""
    try:
        truth([t.detach().double() for t in inputs])
    except Exception:
        return False
    return True
