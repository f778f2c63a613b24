"""Losses with a margin between classes: multi_margin_loss, multilabel_margin_loss, multilabel_soft_margin_loss.

Maths     h⁺ = max(h, 0), on = [h > 0]
          multi_margin      ℓ = (w_k/C) Σ_{c ≠ k} (h_c⁺)^p    h_c = m − x_k + x_c; g_c = dℓ (w_k/C) p (h_c⁺)^(p−1) on
                            dx_c = g_c, dx_k = − Σ_{c ≠ k} g_c, dw_c = Σ_{n: k_n = c} dℓ_n ℓ_n / w_c
          multilabel_margin ℓ = (1/C) Σ_j Σ_i h_ij⁺           h_ij = 1 − x_j + x_i, j a label, i none;
                            dx_i = (dℓ/C) Σ_j on_ij, dx_j = − (dℓ/C) Σ_i on_ij
Letters   all per row n of N; C classes, k the class of a row; m the margin; multilabel_soft_margin is
          binary_cross_entropy_with_logits, whose rule it runs, averaged over the classes
Numerics  half tensors are computed in float32; multilabel_margin makes N J C comparisons, of every class with every label,
          J the largest number of labels of a sample; where values cannot be read (compiled, under vmap) J is C. None is kept
Source    Crammer & Singer 2001 (multi_margin); Crammer & Singer 2003 (multilabel_margin); Cox 1958 (multilabel_soft_margin)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.blocks import by_rows
from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.op import FLOAT32_CUDA
from bptoolkit.ops.binary_cross_entropy import LOGITS_RULE, same_shape, weight_like
from bptoolkit.ops.class_indices import check_classes
from bptoolkit.ops.loss_hinge import total
from bptoolkit.ops.reduction import REDUCTIONS, floating, loss_op, reduce, resolve, share, values_readable
from bptoolkit.precision import wide

# --- the rules ----------------------------------------------------------------------------------------------------------------


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
    """The labels, 0 where there is none, and where there is one, before the first −1: N J each; which classes are labels: N C.

    J is the largest number of labels of a row where it can be read, else C.
    """
    valid = (k >= 0).to(torch.int64).cumprod(1)
    if values_readable(k) and k.numel():
        J = int(valid.sum(1).max())
        at, valid = k[:, :J].clamp(min=0), valid[:, :J]
    else:
        at = k.clamp(min=0)
    return at, valid.bool(), torch.zeros_like(k).scatter_add(1, at, valid) > 0


def excesses(x, at, valid, among):
    """h_ij, for each label j of a sample and class i, and where they count: N J C."""
    x = wide(x)
    return 1 - x.gather(1, at).unsqueeze(2) + x.unsqueeze(1), valid.unsqueeze(2) & ~among.unsqueeze(1)


def multilabel_forward(x, k, reduction):
    def rule(x, k):
        h, counts = excesses(x, *labels(k))
        return torch.where(counts, h.clamp(min=0), 0).sum((1, 2)) / x.shape[1]

    l = by_rows(rule, x, k)  # N
    return reduce(l, l.numel(), reduction).to(x.dtype)


def multilabel_backward(dl, x, k, reduction):
    d = share(dl, x.shape[0], reduction).expand(x.shape[:1]) / x.shape[1]  # N

    def rule(x, k, d):
        at, valid, among = labels(k)
        h, counts = excesses(x, at, valid, among)
        on = (counts & (h > 0)).to(h.dtype) * d.reshape(-1, 1, 1)
        return on.sum(1).scatter_add(1, at, -on.sum(2)).to(x.dtype)

    return by_rows(rule, x, k, d), None


MULTI_RULE = Rule("multi_margin_loss", multi_forward, multi_backward, inputs="x w k", outputs="l")
MULTILABEL_RULE = Rule("multilabel_margin_loss", multilabel_forward, multilabel_backward, inputs="x k", outputs="l")


# --- the public functions -----------------------------------------------------------------------------------------------------


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


# --- the ops ------------------------------------------------------------------------------------------------------------------


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


def bench_labels(draw: Draw) -> Case:
    return Case((draw.tensor(2048, 1024), draw.integers(0, 2, 2048, 1024).to(draw.dtype)), {})


def bench_classes(draw: Draw) -> Case:
    return Case((draw.tensor(2048, 1000), draw.integers(0, 1000, 2048)), {})


def bench_multilabel(draw: Draw) -> Case:
    k = draw.integers(0, 100, 2048, 100)
    k[:, 5:] = -1
    return Case((draw.tensor(2048, 100), k), {})


MULTILABEL_SOFT_OP = loss_op(
    multilabel_soft_margin_loss,
    F.multilabel_soft_margin_loss,
    (LOGITS_RULE,),
    MultiLabelSoftMarginLoss,
    "input: *B C, target: *T C, weight: *W -> *B",
    "Cox 1958",
    case=soft_labels_case,
    bench=bench_labels,
    autocast=FLOAT32_CUDA,
)
MULTI_OP = loss_op(
    multi_margin_loss,
    multi_reference,
    (MULTI_RULE,),
    MultiMarginLoss,
    "input: N C, target: N -> N",
    "Crammer & Singer 2001",
    peer=F.multi_margin_loss,
    case=multi_case,
    bench=bench_classes,
)
MULTILABEL_OP = loss_op(
    multilabel_margin_loss,
    multilabel_reference,
    (MULTILABEL_RULE,),
    MultiLabelMarginLoss,
    "input: *B, target: *T -> *B",
    "Crammer & Singer 2003",
    peer=F.multilabel_margin_loss,
    case=multilabel_case,
    bench=bench_multilabel,
)
OPS = (MULTILABEL_SOFT_OP, MULTI_OP, MULTILABEL_OP)
