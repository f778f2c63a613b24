"""Mean squared error.

Maths     e = x − t
          none   ℓ = w ∘ e²          dx = 2 dy ∘ w ∘ e            dw = dy ∘ e²
          sum    ℓ = Σ w ∘ e²        dx = 2 dy w ∘ e              dw = dy e²
          mean   ℓ = Σ w ∘ e² / W    dx = 2 dy w ∘ e / W          dw = dy (e² − ℓ) / W     (W = Σ w)
          dt = −dx in each; without weights w = 1, and W is the number of elements N
Letters   x input, t target, of one shape after broadcasting; w weight, of x's shape before it; dy has ℓ's shape
Numerics  everything in x's dtype; the mean over nothing is NaN, as in torch
Source    Gauss, "Theoria combinationis observationum", 1821; the derivative is (e²)' = 2e
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule, unwatched
from bptoolkit.op import FLOAT32, Op
from bptoolkit.ops.reduction import REDUCTIONS, broadcast, resolve


def forward(x, t, w, reduction):
    if w is None:
        return torch.ops.aten.mse_loss(x, t, REDUCTIONS.index(reduction))
    l = w * (x - t) ** 2  # *B
    return l if reduction == "none" else l.sum() if reduction == "sum" else l.sum() / w.sum()


def backward(dy, x, t, w, reduction, need):
    e = x - t  # *B
    if reduction == "mean":
        dy = dy / (e.numel() if w is None else w.sum())
    dx = dw = None
    if need.w:
        dw = (dy * e * e).sum_to_size(w.shape)
        if reduction == "mean":
            dw = dw - dy * ((w * e * e).sum() / w.sum())
    if need.x or need.t:
        dx = e.mul_(2 * dy) if unwatched(dy, x, t, w) else 2 * dy * e  # *B
        dx = dx if w is None else w * dx
    return dx if need.x else None, -dx if need.t else None, dw


RULE = Rule("mse_loss", forward, backward, inputs="x t w", outputs="y")


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Mean squared error, as `torch.nn.functional.mse_loss`.

    Args:
        input: (*B), floating point.
        target: (*B), or broadcastable with input, with a warning.
        size_average: deprecated, see reduction.
        reduce: deprecated, see reduction.
        reduction: "none", "mean" or "sum".
        weight: (*B), the shape of input; each element's weight; differentiable.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B) for "none", else a scalar.

    Raises:
        ValueError: shapes that cannot be broadcast, a weight of another shape, or a reduction that does not exist.
        TypeError: the tensors are not of one floating-point dtype.
    """
    reduction = resolve("mse_loss", reduction, size_average, reduce)
    if weight is None or not weight.is_cpu:  # the CPU's autocast leaves the weighted form alone, as it is not one op in torch
        input, target, weight = OP.cast(input, target, weight)
    OP.check(input, target, weight)
    if weight is not None and weight.shape != input.shape:
        raise ValueError(f"mse_loss: weight has shape {tuple(weight.shape)} but input {tuple(input.shape)}; they must be equal")
    input, target = broadcast("mse_loss", input, target)
    return RULE(input, target, weight, reduction, backend=OP.pick(RULE, backend, input, target, weight))


class MSELoss(nn.MSELoss):
    """`torch.nn.MSELoss` with the backward above."""

    backend = "auto"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return mse_loss(input, target, reduction=self.reduction, backend=self.backend)


def case(draw: Draw) -> Case:
    shape = (*draw.batch(), draw.size())
    kwargs: dict[str, object] = {"reduction": draw.choice(REDUCTIONS)}
    x, t = draw.tensor(*shape), draw.tensor(*shape)
    if draw.flag():
        kwargs["weight"] = draw.tensor(*shape).detach().abs().add(0.5).requires_grad_()
    return Case((x, t), kwargs)


def bench(draw: Draw) -> Case:
    return Case((draw.tensor(2048, 1024), draw.tensor(2048, 1024, grad=False)), {})


OP = Op(
    name="mse_loss",
    call=mse_loss,
    reference=F.mse_loss,
    rules=(RULE,),
    module=(MSELoss,),
    replaces=(nn.MSELoss,),
    shapes="input: *B, target: *T, weight: *W -> *B",
    source="Gauss 1821",
    autocast=FLOAT32,
    case=case,
    bench=bench,
)
OPS = (OP,)
