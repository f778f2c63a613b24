"""Losses with a margin for pairs and for labels ±1: margin_ranking_loss, hinge_embedding_loss, soft_margin_loss.

Maths     h⁺ = max(h, 0), on = [h ≥ 0] as torch's clamp has it
          margin_ranking    ℓ = h⁺, h = m − y (a − b)         da = − dℓ on y, db = − da, dy = − dℓ on (a − b)
          hinge_embedding   ℓ = [y ≠ −1] x + [y ≠ 1] h⁺       h = m − x, dx = dℓ ([y ≠ −1] − [y ≠ 1] on)
          soft_margin       ℓ = log(1 + e^(−y x))             dx = − dℓ y σ(−y x), dy = − dℓ x σ(−y x)
Letters   all per element; m the margin, y the label
Numerics  half tensors are computed in float32; soft_margin does not overflow, where torch's is inf from y x < −88 on
Source    Herbrich et al. 1999 (margin_ranking); Hadsell et al. 2006, eq. 4 (hinge_embedding); Friedman et al. 2000, eq. 18
          (soft_margin)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.ops.reduction import REDUCTIONS, broadcast, chain, floating, loss_op, reduced, resolve
from bptoolkit.precision import wide

# --- the rules ----------------------------------------------------------------------------------------------------------------


def gap(a, b, y, m):
    e = wide(a) - wide(b)
    return m - (e if y is None else wide(y) * e)


def ranking_forward(a, b, y, m, reduction):
    return reduced(lambda a, b, y: gap(a, b, y, m).clamp(min=0), reduction, a, b, y).to(a.dtype)


def ranking_backward(dl, a, b, y, m, reduction, need):
    da = dy = None

    def on(a, b, y):
        return (gap(a, b, y, m) >= 0).to(wide(a).dtype)

    if need.a or need.b:
        da = chain(lambda a, b, y: -on(a, b, y) if y is None else -wide(y) * on(a, b, y), dl, reduction, a, b, y)
    if need.y:
        dy = chain(lambda y, a, b: (wide(b) - wide(a)) * on(a, b, y), dl, reduction, y, a, b)
    return da if need.a else None, -da if need.b else None, dy


def hinge_forward(x, y, m, reduction):
    def loss(x, y):
        x = wide(x)
        return torch.where(y != 1, (m - x).clamp(min=0), 0) + torch.where(y != -1, x, 0)

    return reduced(loss, reduction, x, y).to(x.dtype)


def hinge_backward(dl, x, y, m, reduction, need):
    def slope(x, y):
        x = wide(x)
        return (y != -1).to(x.dtype) - ((y != 1) & (m - x >= 0)).to(x.dtype)

    return chain(slope, dl, reduction, x, y) if need.x else None, torch.zeros_like(y) if need.y else None


def soft_forward(x, y, reduction):
    return reduced(lambda x, y: -F.logsigmoid(wide(x) * wide(y)), reduction, x, y).to(x.dtype)


def soft_backward(dl, x, y, reduction, need):
    def slope(x, y):  # by x; by y it is the same with the two exchanged
        return -wide(y) * torch.sigmoid(-wide(x) * wide(y))

    return chain(slope, dl, reduction, x, y) if need.x else None, chain(slope, dl, reduction, y, x) if need.y else None


RANKING_RULE = Rule("margin_ranking_loss", ranking_forward, ranking_backward, inputs="a b y", outputs="l")
HINGE_RULE = Rule("hinge_embedding_loss", hinge_forward, hinge_backward, inputs="x y", outputs="l")
SOFT_RULE = Rule("soft_margin_loss", soft_forward, soft_backward, inputs="x y", outputs="l")


# --- the public functions -----------------------------------------------------------------------------------------------------


def margin_ranking_loss(
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
    """max(0, margin − target (input1 − input2)), as `torch.nn.functional.margin_ranking_loss`.

    Args:
        input1: (*B), floating point.
        input2: (*B), as input1.
        target: (*B): 1 where input1 should be the larger, −1 where input2; of input1's dtype or integers.
        margin: the difference that suffices.
        size_average: deprecated, see reduction.
        reduce: deprecated, see reduction.
        reduction: "none", "mean" or "sum".
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B) for "none", else a scalar; the three are broadcast.

    Raises:
        ValueError: ranks that differ, shapes that cannot be broadcast, or a reduction that does not exist.
        TypeError: the tensors are not of one floating-point dtype.
    """
    op = "margin_ranking_loss"
    reduction = resolve(op, reduction, size_average, reduce)
    a, b, y = RANKING_OP.cast(input1, input2, floating(op, input1, "target", target))
    RANKING_OP.check(a, b, y)
    if not a.dim() == b.dim() == y.dim():
        found = f"input1 {tuple(a.shape)}, input2 {tuple(b.shape)}, target {tuple(y.shape)}"
        raise ValueError(f"{op}: the tensors must have one number of dimensions, not {found}")
    a, b, y = broadcast(op, a, b, y, warn=False)
    return RANKING_RULE(a, b, y, float(margin), reduction, backend=RANKING_OP.pick(RANKING_RULE, backend, a, b, y))


def hinge_embedding_loss(
    input: Tensor,
    target: Tensor,
    margin: float = 1.0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    backend: str = "auto",
) -> Tensor:
    """The input where target is 1, max(0, margin − input) where it is −1, as `torch.nn.functional.hinge_embedding_loss`.

    Args:
        input: (*B), floating point: distances.
        target: (*B), 1 or −1, of input's dtype or integers; whose gradient is 0.
        margin: the distance that suffices.
        size_average: deprecated, see reduction.
        reduce: deprecated, see reduction.
        reduction: "none", "mean" or "sum".
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B) for "none", else a scalar.

    Raises:
        ValueError: shapes that cannot be broadcast, or a reduction that does not exist.
        TypeError: the tensors are not of one floating-point dtype.
    """
    op = "hinge_embedding_loss"
    reduction = resolve(op, reduction, size_average, reduce)
    x, y = HINGE_OP.cast(input, floating(op, input, "target", target))
    HINGE_OP.check(x, y)
    x, y = broadcast(op, x, y, warn=False)
    return HINGE_RULE(x, y, float(margin), reduction, backend=HINGE_OP.pick(HINGE_RULE, backend, x, y))


def soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    backend: str = "auto",
) -> Tensor:
    """log(1 + exp(−target · input)), as `torch.nn.functional.soft_margin_loss`.

    Args:
        input: (*B), floating point.
        target: (*B), 1 or −1, of input's dtype or integers; differentiable.
        size_average: deprecated, see reduction.
        reduce: deprecated, see reduction.
        reduction: "none", "mean" or "sum".
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B) for "none", else a scalar.

    Raises:
        ValueError: shapes that cannot be broadcast, or a reduction that does not exist.
        TypeError: the tensors are not of one floating-point dtype.
    """
    op = "soft_margin_loss"
    reduction = resolve(op, reduction, size_average, reduce)
    x, y = SOFT_OP.cast(input, floating(op, input, "target", target))
    SOFT_OP.check(x, y)
    x, y = broadcast(op, x, y, warn=False)
    return SOFT_RULE(x, y, reduction, backend=SOFT_OP.pick(SOFT_RULE, backend, x, y))


class MarginRankingLoss(nn.MarginRankingLoss):
    """`torch.nn.MarginRankingLoss` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input1: Tensor, input2: Tensor, target: Tensor) -> Tensor:
        return margin_ranking_loss(input1, input2, target, margin=self.margin, reduction=self.reduction, backend=self.backend)


class HingeEmbeddingLoss(nn.HingeEmbeddingLoss):
    """`torch.nn.HingeEmbeddingLoss` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return hinge_embedding_loss(input, target, margin=self.margin, reduction=self.reduction, backend=self.backend)


class SoftMarginLoss(nn.SoftMarginLoss):
    """`torch.nn.SoftMarginLoss` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return soft_margin_loss(input, target, reduction=self.reduction, backend=self.backend)


# --- the ops ------------------------------------------------------------------------------------------------------------------


def total(l: Tensor, reduction: str) -> Tensor:
    return l if reduction == "none" else l.mean() if reduction == "mean" else l.sum()


def soft_reference(input, target, size_average=None, reduce=None, reduction="mean"):
    """In plain torch: torch's own overflows, and has no gradient of the target."""
    z = -wide(input) * wide(target)
    return total(torch.logaddexp(z, torch.zeros_like(z)), reduction).to(input.dtype)


def signs(draw: Draw, *shape: int) -> Tensor:
    return (draw.integers(0, 2, *shape) * 2 - 1).to(draw.dtype)


def pair_case(draw: Draw) -> Case:
    shape = (*draw.batch(), draw.size())
    kwargs = {"reduction": draw.choice(REDUCTIONS), "margin": draw.choice((0, 0.5))}
    return Case((draw.tensor(*shape), draw.tensor(*shape), signs(draw, *shape)), kwargs)


def hinge_case(draw: Draw) -> Case:
    (x, _, y), kwargs = pair_case(draw)
    return Case((x, y), kwargs)


def soft_case(draw: Draw) -> Case:
    shape = (*draw.batch(), draw.size())
    return Case((draw.tensor(*shape, scale=2.0), draw.tensor(*shape)), {"reduction": draw.choice(REDUCTIONS)})


def bench_pair(draw: Draw) -> Case:
    return Case((draw.tensor(2048, 1024), draw.tensor(2048, 1024), signs(draw, 2048, 1024)), {})


def bench_one(draw: Draw) -> Case:
    return Case((draw.tensor(2048, 1024), signs(draw, 2048, 1024)), {})


RANKING_OP = loss_op(
    margin_ranking_loss,
    F.margin_ranking_loss,
    (RANKING_RULE,),
    MarginRankingLoss,
    "input1: *A, input2: *B, target: *T -> *B",
    "Herbrich et al. 1999",
    case=pair_case,
    bench=bench_pair,
)
HINGE_OP = loss_op(
    hinge_embedding_loss,
    F.hinge_embedding_loss,
    (HINGE_RULE,),
    HingeEmbeddingLoss,
    "input: *B, target: *T -> *B",
    "Hadsell et al. 2006, eq. 4",
    case=hinge_case,
    bench=bench_one,
)
SOFT_OP = loss_op(
    soft_margin_loss,
    soft_reference,
    (SOFT_RULE,),
    SoftMarginLoss,
    "input: *B, target: *T -> *B",
    "Friedman et al. 2000, eq. 18",
    peer=F.soft_margin_loss,
    case=soft_case,
    bench=bench_one,
)
OPS = (RANKING_OP, HINGE_OP, SOFT_OP)
