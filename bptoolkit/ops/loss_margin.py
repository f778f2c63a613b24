"""Losses with a margin: of pairs, of labels ±1, of classes, of cosines and of triplets.

Maths     h⁺ = max(h, 0), on = [h ≥ 0] as torch's clamp has it, or [h > 0] in the two losses over classes
          margin_ranking    ℓ = h⁺, h = m − y (a − b)         da = − dℓ on y, db = − da, dy = − dℓ on (a − b)
          hinge_embedding   ℓ = [y ≠ −1] x + [y ≠ 1] h⁺       h = m − x, dx = dℓ ([y ≠ −1] − [y ≠ 1] on)
          soft_margin       ℓ = log(1 + e^(−y x))             dx = − dℓ y σ(−y x), dy = − dℓ x σ(−y x)
          multi_margin      ℓ = (w_k/C) Σ_{c ≠ k} (h_c⁺)^p    h_c = m − x_k + x_c; g_c = dℓ (w_k/C) p (h_c⁺)^(p−1) on
                            dx_c = g_c, dx_k = − Σ_{c ≠ k} g_c, dw_c = Σ_{n: k_n = c} dℓ_n ℓ_n / w_c
          multilabel_margin ℓ = (1/C) Σ_j Σ_i h_ij⁺           h_ij = 1 − x_j + x_i, j a label, i none;
                            dx_i = (dℓ/C) Σ_j on_ij, dx_j = − (dℓ/C) Σ_i on_ij
          cosine_embedding  c = a·b / √(A B), A = |a|² + 10⁻¹², B = |b|² + 10⁻¹²
                            ℓ = 1 − c where y = 1, (c − m)⁺ where y = −1, else 0
                            dc = dℓ (− [y = 1] + [y = −1] on), da = dc (b/√(A B) − c a/A), db = dc (a/√(A B) − c b/B)
          triplet_margin    ℓ = (m + |a − p + ε| − |a − n + ε|)⁺, margin_ranking of two distances; with swap the smaller of
                            |a − n + ε| and |p − n + ε|
          distance          n = (Σ |e|^q)^(1/q), e = x − y + ε    de = dn sign(e) |e|^(q−1) / n^(q−1), 0 at n = 0;
                            q = ∞: dn sign(e) [|e| = n], shared by ties
Letters   all per element, or per row n of N; m the margin; multilabel_soft_margin is binary_cross_entropy_with_logits, whose
          rule it runs, averaged over the classes
Numerics  half tensors are computed in float32; soft_margin does not overflow, where torch's is inf from y x < −88 on;
          multilabel_margin makes the N C C comparisons of every class with every place for a label, so it is slow for many
          classes with few labels each; nothing of that size is kept
Source    Hadsell et al. 2006, eq. 4 (hinge_embedding); Crammer & Singer 2001 (multi_margin); Schroff et al. 2015, eq. 2 and
          Balntas et al. 2016, section 3.2 (triplet)
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.blocks import by_rows
from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.op import FLOAT32, FLOAT32_CUDA, Op
from bptoolkit.ops.binary_cross_entropy import LOGITS_RULE, same_shape, weight_like
from bptoolkit.ops.cross_entropy import check_classes
from bptoolkit.ops.reduction import (
    REDUCTIONS,
    broadcast,
    chain,
    floating,
    reduce,
    reduced,
    resolve,
    share,
    values_readable,
)
from bptoolkit.precision import wide

EPS = 1e-12

# --- of elements ------------------------------------------------------------------------------------------------------------


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

# --- of classes -------------------------------------------------------------------------------------------------------------


def excess(x, k, m):
    """h, and −1 at the class itself: N C."""
    x = wide(x)
    return (m - x.gather(1, k.unsqueeze(1)) + x).scatter(1, k.unsqueeze(1), -1.0)


def multi_forward(x, w, k, p, m, reduction):
    l = by_rows(lambda x, k: excess(x, k, m).clamp(min=0).pow(p).sum(1) / x.shape[1], x, k)  # N
    l = l if w is None else l * wide(w)[k]
    return reduce(l, l.numel(), reduction).to(x.dtype)


def multi_backward(dl, x, w, k, p, m, reduction, need):
    d = share(dl, x.shape[0], reduction).expand(k.shape)  # N
    dx = dw = None
    if need.x:
        row = (d if w is None else d * wide(w)[k]) / x.shape[1]

        def rule(x, k, row):
            h = excess(x, k, m)
            g = row.unsqueeze(1) * ((h > 0).to(h.dtype) if p == 1 else 2 * h.clamp(min=0))  # N C, 0 at k
            return g.scatter(1, k.unsqueeze(1), -g.sum(1, keepdim=True)).to(x.dtype)

        dx = by_rows(rule, x, k, row)
    if need.w:
        l = excess(x, k, m).clamp(min=0).pow(p).sum(1) / x.shape[1]
        dw = torch.zeros_like(wide(w)).index_add(0, k, d * l).to(w.dtype)
    return dx, dw, None


def labels(k):
    """The labels, 0 where there is none; where there is one, before the first −1; and which classes are labels: N C each."""
    valid = (k >= 0).to(torch.int64).cumprod(1)
    at = k.clamp(min=0)
    return at, valid.bool(), torch.zeros_like(k).scatter_add(1, at, valid) > 0


def excesses(x, k):
    """h_ij, for each label j of a sample and class i, and where they count: N C C."""
    at, valid, among = labels(k)
    x = wide(x)
    return 1 - x.gather(1, at).unsqueeze(2) + x.unsqueeze(1), valid.unsqueeze(2) & ~among.unsqueeze(1)


def multilabel_forward(x, k, reduction):
    def rule(x, k):
        h, counts = excesses(x, k)
        return torch.where(counts, h.clamp(min=0), 0).sum((1, 2)) / x.shape[1]

    l = by_rows(rule, x, k)  # N
    return reduce(l, l.numel(), reduction).to(x.dtype)


def multilabel_backward(dl, x, k, reduction):
    d = share(dl, x.shape[0], reduction).expand(x.shape[:1]) / x.shape[1]  # N

    def rule(x, k, d):
        h, counts = excesses(x, k)
        on = (counts & (h > 0)).to(h.dtype) * d.reshape(-1, 1, 1)
        return on.sum(1).scatter_add(1, labels(k)[0], -on.sum(2)).to(x.dtype)

    return by_rows(rule, x, k, d), None


MULTI_RULE = Rule("multi_margin_loss", multi_forward, multi_backward, inputs="x w k", outputs="l")
MULTILABEL_RULE = Rule("multilabel_margin_loss", multilabel_forward, multilabel_backward, inputs="x k", outputs="l")

# --- of vectors -------------------------------------------------------------------------------------------------------------


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
    d = share(dl, shape.numel(), reduction)
    dc = (d.unsqueeze(-1) if reduction == "none" else d) * sign
    r = (A * B).rsqrt()
    da = (dc * (b2 * r - c / A * a2)).sum_to_size(a.shape).to(a.dtype) if need.a else None
    db = (dc * (a2 * r - c / B * b2)).sum_to_size(b.shape).to(b.dtype) if need.b else None
    return da, db, torch.zeros_like(y.squeeze(-1)) if need.y else None


def distance_forward(x, y, q, eps):
    return torch.linalg.vector_norm(wide(x) - wide(y) + eps, q, -1)  # wide: backward divides by it


def distance_backward(dn, x, y, n, q, eps, need):
    e, n, dn = wide(x) - wide(y) + eps, wide(n).unsqueeze(-1), wide(dn).unsqueeze(-1)
    if q == inf:
        at = (e.abs() == e.abs().amax(-1, keepdim=True)).to(e.dtype)
        de = dn * e.sign() * at / at.sum(-1, keepdim=True)
    elif q == 1:
        de = dn * e.sign()
    else:
        zero = n == 0
        n = torch.where(zero, 1.0, n)
        de = torch.where(zero, 0.0, dn * (e / n if q == 2 else e.sign() * (e.abs() / n).pow(q - 1)))
    de = de.to(x.dtype)
    return de if need.x else None, -de if need.y else None


COSINE_RULE = Rule("cosine_embedding_loss", cosine_forward, cosine_backward, inputs="a b y", outputs="l")
DISTANCE_RULE = Rule("margin_distance", distance_forward, distance_backward, inputs="x y", outputs="n")

# --- the public functions ---------------------------------------------------------------------------------------------------


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


def multilabel_soft_margin_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    backend: str = "auto",
) -> Tensor:
    """Binary cross entropy of logits, averaged over classes, as `torch.nn.functional.multilabel_soft_margin_loss`.

    Args:
        input: (*B, C), logits.
        target: (*B, C), of input's dtype or integers; differentiable.
        weight: broadcastable to (*B, C), commonly (C,); differentiable.
        size_average: deprecated, see reduction.
        reduce: deprecated, see reduction.
        reduction: "none", "mean" or "sum".
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B) for "none", else a scalar.

    Raises:
        ValueError: shapes that disagree, or a reduction that does not exist.
        TypeError: the tensors are not of one floating-point dtype.
    """
    op = "multilabel_soft_margin_loss"
    reduction = resolve(op, reduction, size_average, reduce)
    x, t, w = MULTILABEL_SOFT_OP.cast(input, floating(op, input, "target", target), weight)
    MULTILABEL_SOFT_OP.check(x, t, w)
    same_shape(op, x, t)
    if not x.dim():
        raise ValueError(f"{op}: input has no dimensions; it needs (*B, C)")
    w = weight_like(op, "weight", x, w)
    l = LOGITS_RULE(x, t, w, None, reduction, backend=MULTILABEL_SOFT_OP.pick(LOGITS_RULE, backend, x, t, w))
    return l if reduction == "mean" else (l.sum(-1) if reduction == "none" else l) / x.shape[-1]


def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    backend: str = "auto",
) -> Tensor:
    """By how much other classes come within a margin of the target's, as `torch.nn.functional.multi_margin_loss`.

    Args:
        input: (N, C) or (C,), floating point.
        target: class indices (N,) or (), int64.
        p: 1 or 2, the power of the differences.
        margin: the difference that suffices.
        weight: (C,), per class; differentiable.
        size_average: deprecated, see reduction.
        reduce: deprecated, see reduction.
        reduction: "none", "mean" or "sum".
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        target's shape for "none", else a scalar.

    Raises:
        ValueError: shapes that disagree, another p, an index out of range (checked on the CPU, outside transforms), or a
            reduction that does not exist.
        TypeError: a target that is not int64, or tensors of several dtypes.
    """
    op = "multi_margin_loss"
    reduction = resolve(op, reduction, size_average, reduce)
    if p != 1 and p != 2:
        raise ValueError(f"{op}: p={p} is not known; choose 1 or 2")
    shape = None
    if isinstance(input, Tensor) and isinstance(target, Tensor) and input.dim() < 2 and target.numel() == 1:
        shape, input, target = target.shape, input.reshape(-1), target.reshape(())  # as torch: one sample, of 1 class if ()
    x, w = MULTI_OP.cast(input, weight)
    if isinstance(target, Tensor) and target.dtype != torch.int64:
        raise TypeError(f"{op}: target is {target.dtype}; class indices must be int64")
    if isinstance(x, Tensor) and x.dim() > 2:
        raise ValueError(f"{op}: input has shape {tuple(x.shape)}; it needs (N, C) or (C,)")
    check_classes(op, x, target, w, None)
    x, k = (x, target) if x.dim() == 2 else (x.unsqueeze(0), target.unsqueeze(0))
    l = MULTI_RULE(x, w, k, int(p), float(margin), reduction, backend=MULTI_OP.pick(MULTI_RULE, backend, x, w))
    return l.reshape(shape) if reduction == "none" and shape is not None else l


def multilabel_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    backend: str = "auto",
) -> Tensor:
    """By how much other classes come within 1 of each label's, as `torch.nn.functional.multilabel_margin_loss`.

    Args:
        input: (N, C) or (C,), floating point.
        target: of input's shape, int64: a sample's labels, then −1; what follows the first −1 is not read.
        size_average: deprecated, see reduction.
        reduce: deprecated, see reduction.
        reduction: "none", "mean" or "sum".
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (N,) or () for "none", else a scalar.

    Raises:
        ValueError: shapes that disagree, a label out of range (checked on the CPU, outside transforms), or a reduction that
            does not exist.
        TypeError: a target that is not int64, or an input that is not of floating point.
    """
    op = "multilabel_margin_loss"
    reduction = resolve(op, reduction, size_average, reduce)
    (x,) = MULTILABEL_OP.cast(input)
    MULTILABEL_OP.check(x)
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        found = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"{op}: target must be a tensor of int64, not {found}")
    same_shape(op, x, target)
    if not x.dim():  # as torch: a scalar is the one class there is
        input, x, target = input.reshape(1), x.reshape(1), target.reshape(1)
    if not 1 <= x.dim() <= 2:
        raise ValueError(f"{op}: input has shape {tuple(x.shape)}; it needs (N, C) or (C,)")
    C = x.shape[-1]
    if not C:
        raise ValueError(f"{op}: input has shape {tuple(x.shape)}, which has no classes")
    if values_readable(target) and target.numel() and not -1 <= int(target.min()) <= int(target.max()) < C:
        raise ValueError(f"{op}: target has labels from {int(target.min())} to {int(target.max())}; they must be −1..{C - 1}")
    x, k = (x, target) if x.dim() == 2 else (x.unsqueeze(0), target.unsqueeze(0))
    l = MULTILABEL_RULE(x, k, reduction, backend=MULTILABEL_OP.pick(MULTILABEL_RULE, backend, x, k))
    return l.squeeze(0) if reduction == "none" and input.dim() == 1 else l


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
        return DISTANCE_RULE(x, y, float(p), float(eps), backend=backend)

    near, far = distance(a, b), distance(a, c)
    far = torch.minimum(far, distance(b, c)) if swap else far
    return RANKING_RULE(far, near, None, float(margin), reduction, backend=backend).to(a.dtype)


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


class MultiLabelSoftMarginLoss(nn.MultiLabelSoftMarginLoss):
    """`torch.nn.MultiLabelSoftMarginLoss` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return multilabel_soft_margin_loss(input, target, weight=self.weight, reduction=self.reduction, backend=self.backend)


class MultiMarginLoss(nn.MultiMarginLoss):
    """`torch.nn.MultiMarginLoss` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return multi_margin_loss(
            input, target, p=self.p, margin=self.margin, weight=self.weight, reduction=self.reduction, backend=self.backend
        )


class MultiLabelMarginLoss(nn.MultiLabelMarginLoss):
    """`torch.nn.MultiLabelMarginLoss` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return multilabel_margin_loss(input, target, reduction=self.reduction, backend=self.backend)


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


# --- the ops ----------------------------------------------------------------------------------------------------------------


def total(l: Tensor, reduction: str) -> Tensor:
    return l if reduction == "none" else l.mean() if reduction == "mean" else l.sum()


def soft_reference(input, target, size_average=None, reduce=None, reduction="mean"):
    """In plain torch: torch's own overflows, and has no gradient of the target."""
    z = -wide(input) * wide(target)
    return total(torch.logaddexp(z, torch.zeros_like(z)), reduction).to(input.dtype)


def multi_reference(input, target, p=1, margin=1.0, weight=None, size_average=None, reduce=None, reduction="mean"):
    """In plain torch: torch's own has no second derivative, and no gradient of the weight."""
    x = wide(input)
    own = x.gather(-1, target.unsqueeze(-1))
    others = 1 - F.one_hot(target, x.shape[-1]).to(x.dtype)
    l = (torch.relu(margin - own + x) ** p * others).mean(-1)
    return total(l if weight is None else l * wide(weight)[target], reduction).to(input.dtype)


def multilabel_reference(input, target, size_average=None, reduce=None, reduction="mean"):
    """In plain torch, label by label: torch's own has no second derivative."""
    x, k = (wide(t) if t.dim() == 2 else wide(t).unsqueeze(0) for t in (input, target))
    rows = []
    for row, ks in zip(x, k.tolist()):
        own = ks[: ks.index(-1)] if -1 in ks else ks
        terms = [torch.relu(1 - row[j] + row[i]) for j in own for i in range(len(row)) if i not in own]
        rows.append((torch.stack(terms).sum() if terms else row.sum() * 0) / len(row))
    l = torch.stack(rows) if rows else x.sum(1)
    return total(l if input.dim() == 2 else l.squeeze(0), reduction).to(input.dtype)


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


def soft_labels_case(draw: Draw) -> Case:
    shape = (*draw.batch(), draw.size(least=1))
    kwargs: dict[str, Any] = {"reduction": draw.choice(REDUCTIONS)}
    if draw.flag():
        kwargs["weight"] = draw.tensor(shape[-1]).detach().abs().add(0.1).requires_grad_()
    return Case((draw.tensor(*shape), draw.tensor(*shape).detach().sigmoid().requires_grad_()), kwargs)


def multi_case(draw: Draw) -> Case:
    N, C = draw.size(), draw.size(least=1)
    rows = () if draw.random.random() < 0.15 else (N,)
    kwargs = {"p": draw.choice((1, 2)), "margin": draw.choice((1.0, 0.3)), "reduction": draw.choice(REDUCTIONS)}
    if draw.flag():
        kwargs["weight"] = draw.tensor(C).detach().abs().add(0.1).requires_grad_()
    return Case((draw.tensor(*rows, C), draw.integers(0, C, *rows)), kwargs)


def multilabel_case(draw: Draw) -> Case:
    N, C = draw.size(most=5), draw.size(least=1, most=8)
    rows = () if draw.random.random() < 0.15 else (N,)
    k = draw.integers(-1, C, *rows, C)
    return Case((draw.tensor(*rows, C), k), {"reduction": draw.choice(REDUCTIONS)})


def cosine_case(draw: Draw) -> Case:
    N, D = draw.size(), draw.size(least=1)
    rows = () if draw.random.random() < 0.15 else (N,)
    kwargs = {"reduction": draw.choice(REDUCTIONS), "margin": draw.choice((0, 0.2))}
    return Case((draw.tensor(*rows, D), draw.tensor(*rows, D), signs(draw, *rows)), kwargs)


def triplet_case(draw: Draw) -> Case:
    shape = (*draw.batch(), draw.size(least=1))
    kwargs = {"reduction": draw.choice(REDUCTIONS), "margin": draw.choice((1.0, 0.3)), "swap": draw.flag()}
    return Case(tuple(draw.tensor(*shape) for _ in range(3)), {**kwargs, "p": draw.choice((2, 2, 1, 3.5))})


def bench_pair(draw: Draw) -> Case:
    return Case((draw.tensor(2048, 1024), draw.tensor(2048, 1024), signs(draw, 2048, 1024)), {})


def bench_one(draw: Draw) -> Case:
    return Case((draw.tensor(2048, 1024), signs(draw, 2048, 1024)), {})


def bench_labels(draw: Draw) -> Case:
    return Case((draw.tensor(2048, 1024), draw.integers(0, 2, 2048, 1024).to(draw.dtype)), {})


def bench_classes(draw: Draw) -> Case:
    return Case((draw.tensor(2048, 1000), draw.integers(0, 1000, 2048)), {})


def bench_multilabel(draw: Draw) -> Case:
    k = draw.integers(0, 100, 2048, 100)
    k[:, 5:] = -1
    return Case((draw.tensor(2048, 100), k), {})


def bench_cosine(draw: Draw) -> Case:
    return Case((draw.tensor(8192, 256), draw.tensor(8192, 256), signs(draw, 8192)), {})


def bench_triplet(draw: Draw) -> Case:
    return Case(tuple(draw.tensor(8192, 256) for _ in range(3)), {})


def _op(call: Callable[..., Tensor], rules: tuple[Rule, ...], module: Any, shapes: str, source: str, **kw: Any) -> Op:
    return Op(
        name=call.__name__,
        call=call,
        rules=rules,
        module=(module,),
        replaces=(module.__base__,),
        shapes=shapes,
        source=source,
        **{"autocast": FLOAT32, "reference": getattr(F, call.__name__), **kw},
    )


_PAIR = "input1: *A, input2: *B, target: *T -> *B"
RANKING_OP = _op(
    margin_ranking_loss, (RANKING_RULE,), MarginRankingLoss, _PAIR, "Herbrich et al. 1999", case=pair_case, bench=bench_pair
)
HINGE_OP = _op(
    hinge_embedding_loss,
    (HINGE_RULE,),
    HingeEmbeddingLoss,
    "input: *B, target: *T -> *B",
    "Hadsell et al. 2006, eq. 4",
    case=hinge_case,
    bench=bench_one,
)
SOFT_OP = _op(
    soft_margin_loss,
    (SOFT_RULE,),
    SoftMarginLoss,
    "input: *B, target: *T -> *B",
    "Friedman et al. 2000, eq. 18",
    reference=soft_reference,
    peer=F.soft_margin_loss,
    case=soft_case,
    bench=bench_one,
)
MULTILABEL_SOFT_OP = _op(
    multilabel_soft_margin_loss,
    (LOGITS_RULE,),
    MultiLabelSoftMarginLoss,
    "input: *B C, target: *T C, weight: *W -> *B",
    "Cox 1958",
    case=soft_labels_case,
    bench=bench_labels,
    autocast=FLOAT32_CUDA,
)
MULTI_OP = _op(
    multi_margin_loss,
    (MULTI_RULE,),
    MultiMarginLoss,
    "input: N C, target: N -> N",
    "Crammer & Singer 2001",
    reference=multi_reference,
    peer=F.multi_margin_loss,
    case=multi_case,
    bench=bench_classes,
)
MULTILABEL_OP = _op(
    multilabel_margin_loss,
    (MULTILABEL_RULE,),
    MultiLabelMarginLoss,
    "input: *B, target: *T -> *B",
    "Crammer & Singer 2003",
    reference=multilabel_reference,
    peer=F.multilabel_margin_loss,
    case=multilabel_case,
    bench=bench_multilabel,
)
COSINE_OP = _op(
    cosine_embedding_loss,
    (COSINE_RULE,),
    CosineEmbeddingLoss,
    "input1: *A, input2: *B, target: *T -> *T",
    "Bromley et al. 1993",
    case=cosine_case,
    bench=bench_cosine,
)
TRIPLET_OP = _op(
    triplet_margin_loss,
    (DISTANCE_RULE, RANKING_RULE),
    TripletMarginLoss,
    "anchor: *A D, positive: *P D, negative: *N D -> *A",
    "Schroff et al. 2015, eq. 2",
    case=triplet_case,
    bench=bench_triplet,
)
OPS = (RANKING_OP, HINGE_OP, SOFT_OP, MULTILABEL_SOFT_OP, MULTI_OP, MULTILABEL_OP, COSINE_OP, TRIPLET_OP)
