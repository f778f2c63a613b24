"""What the losses share: reductions, their cotangents, deprecated arguments, broadcasting with a warning, the Op of a loss.

Letters   ℓ the loss of one element or row; l the reduced loss; W what the mean divides by
          l = ℓ              dℓ = dl
          l = Σ ℓ            dℓ = dl, to every ℓ
          l = Σ ℓ / W        dℓ = dl / W, to every ℓ; where W depends on an input, dW = − dl l / W
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction

from bptoolkit.blocks import BLOCK, by_elements
from bptoolkit.function import Rule, unwatched
from bptoolkit.op import FLOAT32, Op
from bptoolkit.precision import wide
from bptoolkit.shapes import check_floating

REDUCTIONS = ("none", "mean", "sum")


def check_reduction(op: str, reduction: str, known: Sequence[str] = REDUCTIONS) -> None:
    """Raise ValueError for a reduction that does not exist."""
    if reduction not in known:
        raise ValueError(f"{op}: reduction={reduction!r} is not known; choose from {', '.join(map(repr, known))}")


def resolve(op: str, reduction: str, size_average: bool | None, reduce: bool | None, known: Sequence[str] = REDUCTIONS) -> str:
    """The reduction, which the deprecated arguments override; ValueError if it does not exist."""
    if size_average is not None or reduce is not None:
        return _Reduction.legacy_get_string(size_average, reduce)
    check_reduction(op, reduction, known)
    return reduction


def reduce(l, W, reduction):
    return l if reduction == "none" else l.sum() if reduction == "sum" else l.sum() / W


def present(formula: Callable[..., Tensor], args: Sequence[Tensor | None]) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The formula as one of the arguments that are not None, and those."""
    tensors = [t for t in args if t is not None]
    if len(tensors) == len(args):
        return formula, tensors

    def of_present(*tensors: Tensor) -> Tensor:
        it = iter(tensors)
        return formula(*(None if t is None else next(it) for t in args))

    return of_present, tensors


def reduced(formula: Callable[..., Tensor], reduction: str, *args: Tensor | None) -> Tensor:
    """The reduction of an elementwise formula; the mean is over all elements. In blocks, only their sums are held."""
    formula, tensors = present(formula, args)
    first = tensors[0]
    if reduction == "none":
        return by_elements(formula, *tensors)
    if unwatched(*tensors) and first.is_cpu and first.numel() > BLOCK:
        if all(t.is_contiguous() for t in tensors):
            tensors = [t.view(-1) for t in tensors]
        n = max(BLOCK * len(tensors[0]) // first.numel(), 1)
        l = torch.stack([formula(*parts).sum() for parts in zip(*(t.split(n) for t in tensors))])
    else:
        l = formula(*tensors)
    return reduce(l, first.numel(), reduction)


def share(dl, W, reduction):
    """The cotangent of an ℓ: dl, or for the mean its share; a scalar, unless there is no reduction."""
    return wide(dl) / W if reduction == "mean" else wide(dl)


def chain(slope: Callable[..., Tensor], dl: Tensor, reduction: str, *args: Tensor | None) -> Tensor:
    """dℓ ∘ slope(*args), in the first tensor's dtype: the gradient of an elementwise loss, reduced as by `reduced`."""
    slope, tensors = present(slope, args)
    first, alone = tensors[0], unwatched(dl, *tensors)  # slope returns a new tensor

    def times(s: Tensor, d: Tensor) -> Tensor:
        return (s.mul_(d) if alone else s * d).to(first.dtype)

    if reduction == "none":
        return by_elements(lambda *a: times(slope(*a[:-1]), wide(a[-1])), *tensors, dl)
    d = share(dl, first.numel(), reduction)
    return by_elements(lambda *a: times(slope(*a), d), *tensors)


def broadcast(op: str, input: Tensor, target: Tensor, *others: Tensor, warn: bool = True) -> tuple[Tensor, ...]:
    """Input, target and others in one shape; with a warning where target and input differ.

    Raises:
        ValueError: shapes that cannot be broadcast.
    """
    if all(t.shape == input.shape for t in (target, *others)):
        return (input, target, *others)
    try:
        shape = torch.broadcast_shapes(*(t.shape for t in (input, target, *others)))
    except RuntimeError:
        found = " and ".join(str(tuple(t.shape)) for t in (target, *others))
        name = "target has shape" if not others else "target and the others have shapes"
        raise ValueError(f"{op}: {name} {found}, which cannot be broadcast with input {tuple(input.shape)}") from None
    if warn and input.shape != target.shape:
        warnings.warn(
            f"{op}: target {tuple(target.shape)} and input {tuple(input.shape)} differ in shape and are broadcast; "
            "this is rarely what is wanted",
            stacklevel=3,
        )
    return tuple(t.expand(shape) for t in (input, target, *others))


def floating(op: str, input: Tensor, name: str, t: Tensor) -> Tensor:
    """An argument that torch takes in integers or booleans too: those in input's dtype, which has to be floating."""
    check_floating(op, "input", input)
    if isinstance(t, Tensor) and not t.is_floating_point() and not t.is_complex():
        return t.to(input.dtype)
    return t


def values_readable(t: Tensor) -> bool:
    """Whether a check may look at values: on the CPU, and nothing transforms or traces."""
    if type(t) not in (Tensor, torch.nn.Parameter) or not t.is_cpu or torch.compiler.is_compiling():
        return False
    return not (torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack())


def loss_op(
    call: Callable[..., Tensor],
    reference: Any,
    rules: Rule | tuple[Rule, ...],
    module: Any,
    shapes: str,
    source: str,
    **kw: Any,
) -> Op:
    """The Op of a loss, named as the function; in float32 under autocast, unless `kw` says otherwise."""
    return Op(
        name=call.__name__,
        call=call,
        reference=reference,
        rules=rules if isinstance(rules, tuple) else (rules,),
        module=(module,),
        replaces=(module.__base__,),
        shapes=shapes,
        source=source,
        **{"autocast": FLOAT32, **kw},
    )
