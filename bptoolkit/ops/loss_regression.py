"""Losses of a difference: l1_loss, smooth_l1_loss, huber_loss.

Maths     e = x − t, and per element
          l1         ℓ = |e|                                   ℓ' = sign e
          smooth l1  ℓ = e²/(2β) where |e| < β, else |e| − β/2 ℓ' = clamp(e/β, −1, 1)
          huber      ℓ = e²/2 where |e| ≤ δ, else δ|e| − δ²/2  ℓ' = clamp(e, −δ, δ)
          of which   dx = dℓ ∘ ℓ',  dt = −dx;  with weights ℓ = w ∘ ℓ(e):  dx = dℓ ∘ w ∘ ℓ',  dw = dℓ ∘ ℓ(e)
                     l1's weighted mean is Σ w ℓ / Σ w, whence dw = dl (ℓ − l) / Σ w;  huber's is Σ w ℓ / N
Letters   x input, t target, w weight, of one shape *B after broadcasting; l the reduced loss, ℓ that of an element
Numerics  half tensors are computed in float32; sign 0 = 0; nothing is kept but the inputs
Source    Laplace 1774 (l1); Girshick, "Fast R-CNN", 2015, eq. 3 (smooth l1); Huber 1964, "Robust estimation of a location
          parameter" (huber)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule, unwatched
from bptoolkit.ops.reduction import REDUCTIONS, broadcast, check_reduction, loss_op, reduce, reduced, resolve, share
from bptoolkit.precision import wide

# --- the rules ----------------------------------------------------------------------------------------------------------------


def error(x, t):
    return wide(x) - wide(t)


def of_error(d, x, t, f, *bounds):
    """d ∘ f(x − t), for an f that tensors have as a method and in place."""
    if unwatched(d, x, t):
        return getattr(error(x, t), f + "_")(*bounds).mul_(d).to(x.dtype)
    return (d * getattr(error(x, t), f)(*bounds)).to(x.dtype)


def l1_forward(x, t, w, reduction):
    if w is None:
        return reduced(lambda x, t: error(x, t).abs(), reduction, x, t).to(x.dtype)
    l = wide(w) * error(x, t).abs()  # *B
    return reduce(l, wide(w).sum(), reduction).to(x.dtype)


def l1_backward(dl, x, t, w, l, reduction, need):
    dx = dw = None
    if w is None:
        dx = of_error(share(dl, x.numel(), reduction), x, t, "sign")
        return dx if need.x else None, -dx if need.t else None, None
    d = share(dl, wide(w).sum(), reduction)
    e = error(x, t)  # *B
    if need.w:
        dw = (d * e.abs()).sum_to_size(w.shape)
        dw = (dw - d * wide(l) if reduction == "mean" else dw).to(w.dtype)
    if need.x or need.t:
        dx = (d * wide(w) * e.sign()).to(x.dtype)
    return dx if need.x else None, -dx if need.t else None, dw


def smooth_l1_forward(x, t, beta, reduction):
    return torch.ops.aten.smooth_l1_loss(wide(x), wide(t), REDUCTIONS.index(reduction), beta).to(x.dtype)


def smooth_l1_backward(dl, x, t, beta, reduction, need):
    dx = of_error(share(dl, x.numel(), reduction) / beta, x, t, "clamp", -beta, beta)
    return dx if need.x else None, -dx if need.t else None


def huber_forward(x, t, w, delta, reduction):
    if w is None:
        return torch.ops.aten.huber_loss(wide(x), wide(t), REDUCTIONS.index(reduction), delta).to(x.dtype)
    l = wide(w) * torch.ops.aten.huber_loss(wide(x), wide(t), 0, delta)  # *B
    return reduce(l, l.numel(), reduction).to(x.dtype)


def huber_backward(dl, x, t, w, delta, reduction, need):
    dx = dw = None
    d = share(dl, x.numel(), reduction)
    if need.x or need.t:
        dx = of_error(d if w is None else d * wide(w), x, t, "clamp", -delta, delta)
    if need.w:
        e = error(x, t)
        c = e.clamp(-delta, delta)
        dw = (d * c * (e - 0.5 * c)).to(w.dtype)  # c (e − c/2) is ℓ in both branches
    return dx if need.x else None, -dx if need.t else None, dw


L1_RULE = Rule("l1_loss", l1_forward, l1_backward, inputs="x t w", outputs="l", uses={"x": "x t w", "t": "x t w"})
SMOOTH_L1_RULE = Rule("smooth_l1_loss", smooth_l1_forward, smooth_l1_backward, inputs="x t", outputs="l")
HUBER_RULE = Rule("huber_loss", huber_forward, huber_backward, inputs="x t w", outputs="l", uses={"w": "x t w"})


# --- the public functions -----------------------------------------------------------------------------------------------------


def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Mean absolute error, as `torch.nn.functional.l1_loss`.

    Args:
        input: (*B), floating point.
        target: (*B), or broadcastable with input, with a warning.
        size_average: deprecated, see reduction.
        reduce: deprecated, see reduction.
        reduction: "none", "mean" or "sum".
        weight: (*B), the shape of input; the mean divides by its sum; differentiable.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B) for "none", else a scalar.

    Raises:
        ValueError: shapes that cannot be broadcast, a weight of another shape, or a reduction that does not exist.
        TypeError: the tensors are not of one floating-point dtype.
    """
    reduction = resolve("l1_loss", reduction, size_average, reduce)
    if weight is None or not weight.is_cpu:  # the CPU's autocast leaves the weighted form alone, as it is not one op in torch
        input, target, weight = L1_OP.cast(input, target, weight)
    L1_OP.check(input, target, weight)
    _check_weight("l1_loss", input, weight)
    input, target = broadcast("l1_loss", input, target)
    return L1_RULE(input, target, weight, reduction, backend=L1_OP.pick(L1_RULE, backend, input, target, weight))


def _check_weight(op: str, input: Tensor, weight: Tensor | None) -> None:
    if weight is not None and weight.shape != input.shape:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)} but input {tuple(input.shape)}; they must be equal")


def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
    *,
    backend: str = "auto",
) -> Tensor:
    """e²/(2β) where |e| < β, |e| − β/2 elsewhere, as `torch.nn.functional.smooth_l1_loss`.

    Args:
        input: (*B), floating point.
        target: (*B), or broadcastable with input, with a warning.
        size_average: deprecated, see reduction.
        reduce: deprecated, see reduction.
        reduction: "none", "mean" or "sum".
        beta: β ≥ 0; with 0 it is `l1_loss`.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B) for "none", else a scalar.

    Raises:
        ValueError: shapes that cannot be broadcast, a negative beta, or a reduction that does not exist.
        TypeError: the tensors are not of one floating-point dtype.
    """
    reduction = resolve("smooth_l1_loss", reduction, size_average, reduce)
    if beta < 0:
        raise ValueError(f"smooth_l1_loss: beta={beta} is negative")
    input, target = SMOOTH_L1_OP.cast(input, target)
    SMOOTH_L1_OP.check(input, target)
    input, target = broadcast("smooth_l1_loss", input, target)
    if beta == 0:
        return L1_RULE(input, target, None, reduction, backend=SMOOTH_L1_OP.pick(L1_RULE, backend, input, target, None))
    backend = SMOOTH_L1_OP.pick(SMOOTH_L1_RULE, backend, input, target)
    return SMOOTH_L1_RULE(input, target, float(beta), reduction, backend=backend)


def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """e²/2 where |e| ≤ δ, δ|e| − δ²/2 elsewhere, as `torch.nn.functional.huber_loss`.

    Args:
        input: (*B), floating point.
        target: (*B), or broadcastable with input, with a warning.
        reduction: "none", "mean" or "sum"; the mean divides by the number of elements, with weights too.
        delta: δ > 0.
        weight: (*B), the shape of input; each element's weight; differentiable.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B) for "none", else a scalar.

    Raises:
        ValueError: shapes that cannot be broadcast, a weight of another shape, a delta that is not positive, or a reduction
            that does not exist.
        TypeError: the tensors are not of one floating-point dtype.
    """
    check_reduction("huber_loss", reduction)
    if delta <= 0:
        raise ValueError(f"huber_loss: delta={delta} must be positive")
    if weight is None or not weight.is_cpu:
        input, target, weight = HUBER_OP.cast(input, target, weight)
    HUBER_OP.check(input, target, weight)
    _check_weight("huber_loss", input, weight)
    if weight is None:
        input, target = broadcast("huber_loss", input, target)
    else:
        input, target, weight = broadcast("huber_loss", input, target, weight)
    backend = HUBER_OP.pick(HUBER_RULE, backend, input, target, weight)
    return HUBER_RULE(input, target, weight, float(delta), reduction, backend=backend)


class L1Loss(nn.L1Loss):
    """`torch.nn.L1Loss` with the backward above."""

    backend: str = "auto"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return l1_loss(input, target, reduction=self.reduction, backend=self.backend)


class SmoothL1Loss(nn.SmoothL1Loss):
    """`torch.nn.SmoothL1Loss` with the backward above."""

    backend: str = "auto"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta, backend=self.backend)


class HuberLoss(nn.HuberLoss):
    """`torch.nn.HuberLoss` with the backward above."""

    backend: str = "auto"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return huber_loss(input, target, reduction=self.reduction, delta=self.delta, backend=self.backend)


# --- the ops ------------------------------------------------------------------------------------------------------------------


def case(draw: Draw) -> Case:
    shape = (*draw.batch(), draw.size())
    return Case((draw.tensor(*shape, scale=2.0), draw.tensor(*shape)), {"reduction": draw.choice(REDUCTIONS)})


def weighted_case(draw: Draw) -> Case:
    (x, t), kwargs = case(draw)
    if draw.flag():
        kwargs["weight"] = draw.tensor(*x.shape).detach().abs().add(0.5).requires_grad_()
    return Case((x, t), kwargs)


def smooth_l1_case(draw: Draw) -> Case:
    args, kwargs = case(draw)
    return Case(args, {**kwargs, "beta": draw.choice((1.0, 0.3, 2, 0.0))})


def huber_case(draw: Draw) -> Case:
    args, kwargs = weighted_case(draw)
    return Case(args, {**kwargs, "delta": draw.choice((1.0, 0.3, 2))})


def bench(draw: Draw) -> Case:
    return Case((draw.tensor(2048, 1024), draw.tensor(2048, 1024, grad=False)), {})


_TWO, _THREE = "input: *B, target: *T -> *B", "input: *B, target: *T, weight: *W -> *B"
L1_OP = loss_op(l1_loss, F.l1_loss, (L1_RULE,), L1Loss, _THREE, "Laplace 1774", case=weighted_case, bench=bench)
SMOOTH_L1_OP = loss_op(
    smooth_l1_loss,
    F.smooth_l1_loss,
    (SMOOTH_L1_RULE, L1_RULE),
    SmoothL1Loss,
    _TWO,
    "Girshick 2015, eq. 3",
    case=smooth_l1_case,
    bench=bench,
)
HUBER_OP = loss_op(huber_loss, F.huber_loss, (HUBER_RULE,), HuberLoss, _THREE, "Huber 1964", case=huber_case, bench=bench)
OPS = (L1_OP, SMOOTH_L1_OP, HUBER_OP)
