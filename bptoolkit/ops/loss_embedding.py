"""Losses with a margin between vectors: cosine_embedding_loss, triplet_margin_loss, triplet_margin_with_distance_loss.

Maths     h⁺ = max(h, 0), on = [h ≥ 0] as torch's clamp has it
          cosine_embedding  c = a·b / √(A B), A = |a|² + 10⁻¹², B = |b|² + 10⁻¹²
                            ℓ = 1 − c where y = 1, (c − m)⁺ where y = −1, else 0
                            dc = dℓ (− [y = 1] + [y = −1] on), da = dc (b/√(A B) − c a/A), db = dc (a/√(A B) − c b/B)
          triplet_margin    ℓ = (m + |a − p + ε| − |a − n + ε|)⁺, margin_ranking of two distances; with swap the smaller of
                            |a − n + ε| and |p − n + ε|; _with_distance takes any distance instead, differentiated as it is
                            distances by pairwise_distance's rule, see `similarity`
Letters   all per row; m the margin, y the label ±1 of cosine_embedding
Numerics  half tensors are computed in float32
Source    Bromley et al. 1993 (cosine_embedding); Schroff et al. 2015, eq. 2 and Balntas et al. 2016, section 3.2 (triplet)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.ops.loss_hinge import RANKING_RULE, signs
from bptoolkit.ops.reduction import REDUCTIONS, broadcast, check_reduction, floating, loss_op, reduce, resolve, share
from bptoolkit.ops.similarity import DISTANCE_RULE, pairwise_distance
from bptoolkit.precision import wide

EPS = 1e-12

# --- the rules ----------------------------------------------------------------------------------------------------------------


def cosine(a, b):
    """The cosine, and A and B: *N 1 each."""
    A, B = (t.square().sum(-1, keepdim=True) + EPS for t in (a, b))
    return (a * b).sum(-1, keepdim=True) / (A * B).sqrt(), A, B


def cosine_forward(a, b, y, m, reduction):
    c = cosine(wide(a), wide(b))[0].squeeze(-1)
    l = torch.where(y == 1, 1 - c, 0) + torch.where(y == -1, (c - m).clamp(min=0), 0)
    return reduce(l, l.numel(), reduction).to(a.dtype)


def cosine_backward(dl, a, b, y, m, reduction, need):
    a2, b2 = wide(a), wide(b)
    c, A, B = cosine(a2, b2)
    y = y.unsqueeze(-1)
    sign = ((y == -1) & (c - m >= 0)).to(c.dtype) - (y == 1).to(c.dtype)
    shape = torch.broadcast_shapes(c.shape, y.shape)
    d = share(dl, prod(shape), reduction)
    dc = (d.unsqueeze(-1) if reduction == "none" else d) * sign
    r = (A * B).rsqrt()
    da = (dc * (b2 * r - c / A * a2)).sum_to_size(a.shape).to(a.dtype) if need.a else None
    db = (dc * (a2 * r - c / B * b2)).sum_to_size(b.shape).to(b.dtype) if need.b else None
    return da, db, torch.zeros_like(y.squeeze(-1)) if need.y else None


COSINE_RULE = Rule("cosine_embedding_loss", cosine_forward, cosine_backward, inputs="a b y", outputs="l")


# --- the public functions -----------------------------------------------------------------------------------------------------


def cosine_embedding_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    backend: str = "auto",
) -> Tensor:
    """1 − cos where target is 1, max(0, cos − margin) where it is −1, as `torch.nn.functional.cosine_embedding_loss`.

    Args:
        input1: (N, D) or (D,), floating point.
        input2: as input1.
        target: (N,) or (), 1 or −1, of any dtype; whose gradient is 0.
        margin: the cosine that is small enough.
        size_average: deprecated, see reduction.
        reduce: deprecated, see reduction.
        reduction: "none", "mean" or "sum".
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        target's shape for "none", else a scalar.

    Raises:
        ValueError: shapes that disagree, or a reduction that does not exist.
        TypeError: the inputs are not of one floating-point dtype.
    """
    op = "cosine_embedding_loss"
    reduction = resolve(op, reduction, size_average, reduce)
    a, b, y = COSINE_OP.cast(input1, input2, floating(op, input1, "target", target))
    COSINE_OP.check(a, b)
    if not a.dim() == b.dim() == y.dim() + 1 <= 2:
        found = f"input1 {tuple(a.shape)}, input2 {tuple(b.shape)}, target {tuple(y.shape)}"
        raise ValueError(f"{op}: the shapes must be (N, D), (N, D), (N,) or (D,), (D,), (), not {found}")
    try:
        torch.broadcast_shapes(a.shape, b.shape, (*y.shape, 1))
    except RuntimeError:
        found = f"input1 {tuple(a.shape)}, input2 {tuple(b.shape)}, target {tuple(y.shape)}"
        raise ValueError(f"{op}: the shapes do not go together: {found}") from None
    return COSINE_RULE(a, b, y, float(margin), reduction, backend=COSINE_OP.pick(COSINE_RULE, backend, a, b, y))


def triplet_margin_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    p: float = 2,
    eps: float = 1e-6,
    swap: bool = False,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    backend: str = "auto",
) -> Tensor:
    """max(0, margin + |anchor − positive| − |anchor − negative|), as `torch.nn.functional.triplet_margin_loss`.

    Args:
        anchor: (*B, D), floating point.
        positive: (*B, D), which should be near it.
        negative: (*B, D), which should not.
        margin: the difference that suffices, positive.
        p: of the norm, at least 1.
        eps: added to the differences.
        swap: take the distance from positive to negative where it is the smaller.
        size_average: deprecated, see reduction.
        reduce: deprecated, see reduction.
        reduction: "none", "mean" or "sum".
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B) for "none", else a scalar.

    Raises:
        ValueError: ranks that differ, shapes that cannot be broadcast, a margin that is not positive, a p below 1, or a
            reduction that does not exist.
        TypeError: the tensors are not of one floating-point dtype.
    """
    op = "triplet_margin_loss"
    reduction = resolve(op, reduction, size_average, reduce)
    if margin <= 0:
        raise ValueError(f"{op}: margin={margin} must be positive")
    if p < 1:
        raise ValueError(f"{op}: p={p} is no norm; it must be at least 1")
    a, b, c = TRIPLET_OP.cast(anchor, positive, negative)
    TRIPLET_OP.check(a, b, c)
    if not a.dim() == b.dim() == c.dim() > 0:
        found = f"anchor {tuple(a.shape)}, positive {tuple(b.shape)}, negative {tuple(c.shape)}"
        raise ValueError(f"{op}: the tensors must have one number of dimensions, at least 1, not {found}")
    a, b, c = broadcast(op, a, b, c, warn=False)
    backend = TRIPLET_OP.pick(DISTANCE_RULE, backend, a, b)

    def distance(x: Tensor, y: Tensor) -> Tensor:
        return DISTANCE_RULE(x, y, float(p), float(eps), False, backend=backend)

    near, far = distance(a, b), distance(a, c)
    far = torch.minimum(far, distance(b, c)) if swap else far
    return RANKING_RULE(far, near, None, float(margin), reduction, backend=backend).to(a.dtype)


def triplet_margin_with_distance_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    distance_function: Callable[[Tensor, Tensor], Tensor] | None = None,
    margin: float = 1.0,
    swap: bool = False,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """max(0, margin + d(anchor, positive) − d(anchor, negative)), as torch.nn.functional's function of this name.

    Args:
        anchor: floating point, of any shape that the distance takes.
        positive: likewise, which should be near it.
        negative: likewise, which should not.
        distance_function: d, of two such tensors; None is `pairwise_distance`.
        margin: the difference that suffices, positive.
        swap: take the distance from positive to negative where it is the smaller.
        reduction: "none", "mean" or "sum".
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        The distances' shape for "none", else a scalar.

    Raises:
        ValueError: ranks that differ, distances that cannot be broadcast, a margin that is not positive, or a reduction that
            does not exist.
        TypeError: the tensors are not of one floating-point dtype.
    """
    op = "triplet_margin_with_distance_loss"
    check_reduction(op, reduction)
    if margin <= 0:
        raise ValueError(f"{op}: margin={margin} must be positive")
    ANY_TRIPLET_OP.check(anchor, positive, negative)
    if not anchor.dim() == positive.dim() == negative.dim():
        found = f"anchor {tuple(anchor.shape)}, positive {tuple(positive.shape)}, negative {tuple(negative.shape)}"
        raise ValueError(f"{op}: the tensors must have one number of dimensions, not {found}")
    if distance_function is None:
        distance_function = partial(pairwise_distance, backend=backend)
    near, far = distance_function(anchor, positive), distance_function(anchor, negative)
    far = torch.minimum(far, distance_function(positive, negative)) if swap else far
    far, near = broadcast(op, far, near, warn=False)
    backend = ANY_TRIPLET_OP.pick(RANKING_RULE, backend, far, near)
    return RANKING_RULE(far, near, None, float(margin), reduction, backend=backend)


class CosineEmbeddingLoss(nn.CosineEmbeddingLoss):
    """`torch.nn.CosineEmbeddingLoss` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input1: Tensor, input2: Tensor, target: Tensor) -> Tensor:
        return cosine_embedding_loss(input1, input2, target, margin=self.margin, reduction=self.reduction, backend=self.backend)


class TripletMarginLoss(nn.TripletMarginLoss):
    """`torch.nn.TripletMarginLoss` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return triplet_margin_loss(
            anchor,
            positive,
            negative,
            margin=self.margin,
            p=self.p,
            eps=self.eps,
            swap=self.swap,
            reduction=self.reduction,
            backend=self.backend,
        )


class TripletMarginWithDistanceLoss(nn.TripletMarginWithDistanceLoss):
    """`torch.nn.TripletMarginWithDistanceLoss` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return triplet_margin_with_distance_loss(
            anchor,
            positive,
            negative,
            distance_function=self.distance_function,
            margin=self.margin,
            swap=self.swap,
            reduction=self.reduction,
            backend=self.backend,
        )


# --- the ops ------------------------------------------------------------------------------------------------------------------


def cosine_case(draw: Draw) -> Case:
    N, D = draw.size(), draw.size(least=1)
    rows = () if draw.random.random() < 0.15 else (N,)
    kwargs = {"reduction": draw.choice(REDUCTIONS), "margin": draw.choice((0, 0.2))}
    return Case((draw.tensor(*rows, D), draw.tensor(*rows, D), signs(draw, *rows)), kwargs)


def triplet_case(draw: Draw) -> Case:
    shape = (*draw.batch(), draw.size(least=1))
    kwargs = {"reduction": draw.choice(REDUCTIONS), "margin": draw.choice((1.0, 0.3)), "swap": draw.flag()}
    return Case(tuple(draw.tensor(*shape) for _ in range(3)), {**kwargs, "p": draw.choice((2, 2, 1, 3.5))})


def squared(x, y):
    """A distance that is no norm, for checks."""
    return (x - y).square().sum(-1)


def any_triplet_case(draw: Draw) -> Case:
    shape = (*draw.batch(), draw.size(least=1))
    kwargs = {"reduction": draw.choice(REDUCTIONS), "margin": draw.choice((1.0, 0.3)), "swap": draw.flag()}
    return Case(tuple(draw.tensor(*shape) for _ in range(3)), {**kwargs, "distance_function": draw.choice((None, squared))})


def bench_cosine(draw: Draw) -> Case:
    return Case((draw.tensor(8192, 256), draw.tensor(8192, 256), signs(draw, 8192)), {})


def bench_triplet(draw: Draw) -> Case:
    return Case(tuple(draw.tensor(8192, 256) for _ in range(3)), {})


COSINE_OP = loss_op(
    cosine_embedding_loss,
    F.cosine_embedding_loss,
    (COSINE_RULE,),
    CosineEmbeddingLoss,
    "input1: *A, input2: *B, target: *T -> *T",
    "Bromley et al. 1993",
    case=cosine_case,
    bench=bench_cosine,
)
TRIPLET_OP = loss_op(
    triplet_margin_loss,
    F.triplet_margin_loss,
    (DISTANCE_RULE, RANKING_RULE),
    TripletMarginLoss,
    "anchor: *A D, positive: *P D, negative: *N D -> *A",
    "Schroff et al. 2015, eq. 2",
    case=triplet_case,
    bench=bench_triplet,
)
ANY_TRIPLET_OP = loss_op(
    triplet_margin_with_distance_loss,
    F.triplet_margin_with_distance_loss,
    (DISTANCE_RULE, RANKING_RULE),
    TripletMarginWithDistanceLoss,
    "anchor: *A, positive: *P, negative: *N -> *A",
    "Schroff et al. 2015, eq. 2",
    autocast={},
    case=any_triplet_case,
    bench=bench_triplet,
)
OPS = (COSINE_OP, TRIPLET_OP, ANY_TRIPLET_OP)
