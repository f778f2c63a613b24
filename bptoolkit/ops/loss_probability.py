"""Losses of log-probabilities, against classes and against a distribution: nll_loss, kl_div.

Maths     nll     ℓ_n = − w_k x_nk, k = k_n; where k is the ignored index, w_k counts as 0; the mean divides by W = Σ_n w_k
                  dx_nk = − dℓ_n w_k, 0 elsewhere      dw_c = Σ_{n: k_n = c} (− dℓ_n x_nc) and, of the mean, − dl l / W
          kl_div  ℓ = t log t − t x                    dx = − dℓ t        dt = dℓ (log t + 1 − x)
                  ℓ = eᵗ (t − x), log_target           dx = − dℓ eᵗ       dt = dℓ eᵗ (t − x + 1)
Letters   x input: log-probabilities N C *D (nll) or *B (kl_div); t target, k class indices N *D; w weight of the classes; l the
          reduced loss, ℓ that of an element or of a sample and position
Numerics  half tensors are computed in float32; t log t is 0 at t = 0; nll keeps no x
Source    Bridle 1990, eq. 12 (nll); Kullback & Leibler 1951, eq. 2.4 (kl_div)
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule, unwatched
from bptoolkit.ops.class_indices import at_index, check_classes
from bptoolkit.ops.reduction import REDUCTIONS, broadcast, chain, loss_op, reduce, reduced, resolve, share
from bptoolkit.precision import wide

# --- against classes: nll -----------------------------------------------------------------------------------------------------


def nll_forward(x, w, k, C, ignore, reduction):
    if wide(x) is x:
        return F.nll_loss(x, k, w, ignore_index=ignore, reduction=reduction)
    k, counts, wk = at_index(x, w, k, ignore)  # N *D numbers in float32, not N C *D
    l = torch.where(counts, -wk * wide(x.gather(1, k.unsqueeze(1)).squeeze(1)), 0)  # N *D
    return reduce(l, wk.sum(), reduction).to(x.dtype)


def nll_backward(dl, x, w, k, l, C, ignore, reduction, need):
    k, counts, wk = at_index(dl, w, k, ignore)
    W = wk.sum()
    d = torch.where(counts, share(dl, W, reduction), 0)  # N *D
    dx = dw = None
    if need.x:
        hit = (-d * wk).to(dl.dtype).unsqueeze(1)  # N 1 *D
        zeros = dl.new_zeros(k.shape[0], C, *k.shape[1:])
        scatter = zeros.scatter_ if unwatched(dl, w, k) else zeros.scatter
        dx = scatter(1, k.unsqueeze(1), hit)  # N C *D
    if need.w:
        at = -d * x.gather(1, k.unsqueeze(1)).squeeze(1)  # N *D
        if reduction == "mean":
            at = at - torch.where(counts, wide(dl) * l / W, 0)
        dw = torch.zeros_like(wide(w)).index_add(0, k.reshape(-1), at.reshape(-1)).to(w.dtype)  # C
    return dx, dw, None


NLL_RULE = Rule("nll_loss", nll_forward, nll_backward, inputs="x w k", outputs="l", uses={"x": "w k", "w": "x w k l"})


# --- against a distribution: kl_div -------------------------------------------------------------------------------------------


def kl_forward(x, t, log_target, reduction):
    def loss(x, t):
        x, t = wide(x), wide(t)
        return t.exp() * (t - x) if log_target else torch.xlogy(t, t) - t * x

    return reduced(loss, reduction, x, t).to(x.dtype)


def kl_backward(dl, x, t, log_target, reduction, need):
    dx = dt = None
    if need.x:
        dx = chain(lambda t: -wide(t).exp() if log_target else -wide(t), dl, reduction, t)
    if need.t:

        def slope(t, x):
            x, t = wide(x), wide(t)
            return t.exp() * (t - x + 1) if log_target else t.log() + 1 - x

        dt = chain(slope, dl, reduction, t, x)
    return dx, dt


KL_RULE = Rule("kl_div", kl_forward, kl_backward, inputs="x t", outputs="l", uses={"x": "t", "t": "x t"})


# --- the public functions -----------------------------------------------------------------------------------------------------


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    backend: str = "auto",
) -> Tensor:
    """Negative log-likelihood of classes, given log-probabilities, as `torch.nn.functional.nll_loss`.

    Args:
        input: log-probabilities (C,), (N, C) or (N, C, *D), floating point.
        target: class indices (), (N,) or (N, *D), int64 or uint8.
        weight: (C,), per class; differentiable.
        size_average: deprecated, see reduction.
        ignore_index: the index that contributes nothing.
        reduce: deprecated, see reduction.
        reduction: "none", "mean" or "sum"; the mean is weighted by the classes' weights.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        target's shape for "none", else a scalar.

    Raises:
        ValueError: shapes that disagree, an index out of range (checked on the CPU, outside transforms), no classes, or a
            reduction that does not exist.
        TypeError: a target that is neither int64 nor uint8, or tensors of several dtypes.
    """
    reduction = resolve("nll_loss", reduction, size_average, reduce)
    input, weight = NLL_OP.cast(input, weight)
    if isinstance(target, Tensor) and target.is_floating_point():
        raise TypeError(f"nll_loss: target is {target.dtype}; class indices must be int64 or uint8")
    check_classes("nll_loss", input, target, weight, ignore_index)
    target = target.long()
    x, k = (input.unsqueeze(0), target.unsqueeze(0)) if input.dim() == 1 else (input, target)
    backend = NLL_OP.pick(NLL_RULE, backend, x, weight)
    l = NLL_RULE(x, weight, k, x.shape[1], ignore_index, reduction, backend=backend)
    return l.squeeze(0) if reduction == "none" and input.dim() == 1 else l


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:
    """Kullback-Leibler divergence of the target from the input, as `torch.nn.functional.kl_div`.

    Args:
        input: (*B), log-probabilities.
        target: (*B) or broadcastable with input: probabilities, or log-probabilities.
        size_average: deprecated, see reduction.
        reduce: deprecated, see reduction.
        reduction: "none", "batchmean" (the divergence: the sum over input's first size), "sum", or "mean" over all elements,
            which warns.
        log_target: the target is of log-probabilities.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B) for "none", else a scalar.

    Raises:
        ValueError: shapes that cannot be broadcast, or a reduction that does not exist.
        TypeError: the tensors are not of one floating-point dtype.
    """
    if reduction == "mean" and size_average is None and reduce is None and not torch.compiler.is_compiling():
        warnings.warn(
            "kl_div: reduction='mean' divides by the number of elements; 'batchmean' divides by the batch size, as the "
            "divergence is defined",
            stacklevel=2,
        )
    reduction = resolve("kl_div", reduction, size_average, reduce, (*REDUCTIONS, "batchmean"))
    x, t = KL_OP.cast(input, target)
    KL_OP.check(x, t)
    x, t = broadcast("kl_div", x, t, warn=False)
    backend = KL_OP.pick(KL_RULE, backend, x, t)
    if reduction != "batchmean":
        return KL_RULE(x, t, bool(log_target), reduction, backend=backend)
    total = KL_RULE(x, t, bool(log_target), "sum", backend=backend)
    return total / input.shape[0] if input.dim() else total


class NLLLoss(nn.NLLLoss):
    """`torch.nn.NLLLoss` with the backward above; same buffer and arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        kw: Any = {"ignore_index": self.ignore_index, "reduction": self.reduction}
        return nll_loss(input, target, self.weight, **kw, backend=self.backend)


class KLDivLoss(nn.KLDivLoss):
    """`torch.nn.KLDivLoss` with the backward above."""

    backend: str = "auto"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return kl_div(input, target, reduction=self.reduction, log_target=self.log_target, backend=self.backend)


# --- the ops ------------------------------------------------------------------------------------------------------------------


def nll_case(draw: Draw) -> Case:
    N, C = draw.size(), draw.size(least=1)
    D = draw.batch() if draw.flag() else ()
    shape, at = ((C,), ()) if draw.random.random() < 0.15 else ((N, C, *D), (N, *D))
    k = draw.integers(0, C, *at)
    kwargs: dict[str, Any] = {"reduction": draw.choice(REDUCTIONS)}
    if draw.flag():
        kwargs["weight"] = draw.tensor(C).detach().abs() + 0.1  # by its weight, torch's cannot be differentiated
    if draw.flag() and k.device.type != "meta" and bool((k != 0).any()):
        kwargs["ignore_index"] = 0
    return Case((draw.tensor(*shape), k), kwargs)


def kl_case(draw: Draw) -> Case:
    shape = (*draw.batch(), draw.size())
    x, t, log_target = draw.tensor(*shape), draw.tensor(*shape), draw.flag()
    t = t if log_target else t.detach().abs().add(0.1).requires_grad_()
    return Case((x, t), {"reduction": draw.choice(("none", "batchmean", "sum")), "log_target": log_target})


def bench_nll(draw: Draw) -> Case:
    return Case((draw.tensor(8192, 1000), draw.integers(0, 1000, 8192)), {})


def bench_pixels(draw: Draw) -> Case:
    return Case((draw.tensor(8, 21, 128, 128), draw.integers(0, 21, 8, 128, 128)), {})


def bench_kl(draw: Draw) -> Case:
    x, t = draw.tensor(2048, 1024), draw.tensor(2048, 1024, grad=False).softmax(1)
    return Case((x, t), {"reduction": "batchmean"})


NLL_OP = loss_op(
    nll_loss,
    F.nll_loss,
    NLL_RULE,
    NLLLoss,
    "input: N C, target: N -> N",
    "Bridle 1990, eq. 12",
    case=nll_case,
    bench={"1000 classes": bench_nll, "pixels": bench_pixels},
)
KL_OP = loss_op(
    kl_div,
    F.kl_div,
    KL_RULE,
    KLDivLoss,
    "input: *B, target: *T -> *B",
    "Kullback & Leibler 1951, eq. 2.4",
    case=kl_case,
    bench=bench_kl,
)
OPS = (NLL_OP, KL_OP)
