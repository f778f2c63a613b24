"""Losses of probabilities: nll_loss, kl_div, binary_cross_entropy, binary_cross_entropy_with_logits.

Maths     nll     ℓ_n = − w_k x_nk, k = k_n; where k is the ignored index, w_k counts as 0; the mean divides by W = Σ_n w_k
                  dx_nk = − dℓ_n w_k, 0 elsewhere      dw_c = Σ_{n: k_n = c} (− dℓ_n x_nc) and, of the mean, − dl l / W
          kl_div  ℓ = t log t − t x                    dx = − dℓ t        dt = dℓ (log t + 1 − x)
                  ℓ = eᵗ (t − x), log_target           dx = − dℓ eᵗ       dt = dℓ eᵗ (t − x + 1)
          bce     ℓ = − w (t log x + (1 − t) log(1 − x))
                  dx = dℓ w (x − t) / (x (1 − x))      dt = dℓ w (log(1 − x) − log x)        dw = dℓ ℓ/w
          bce of logits, with s = log(1 + e⁻ˣ) = − log σ(x) and q = 1 + (p − 1) t
                  ℓ = w ((1 − t) x + q s)              dx = dℓ w (1 − t − q (1 − σ(x)))      dw = dℓ ℓ/w
                  dt = dℓ w ((p − 1) s − x)            dp = dℓ w t s
Letters   x input: log-probabilities N C *D (nll) or *B (kl_div), probabilities (bce), logits; t target, k class indices N *D;
          w weight, p weight of the positives; l the reduced loss, ℓ that of an element or of a sample and position
Numerics  half tensors are computed in float32; bce has torch's clamps: log ≥ −100 (in dt too, where
          torch's is ±inf at 0 and 1), and x (1 − x) ≥ 10⁻¹² in dx; t log t is 0
          at t = 0; nll keeps no x
Source    Kullback & Leibler 1951, eq. 2.4 (kl_div); Cox 1958, "The regression analysis of binary sequences" (bce)
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule, unwatched
from bptoolkit.op import FLOAT32, Op
from bptoolkit.ops.cross_entropy import at_index, check_classes
from bptoolkit.ops.reduction import REDUCTIONS, broadcast, chain, floating, reduce, reduced, resolve, share
from bptoolkit.precision import wide

EPS = 1e-12

# --- against classes: nll ---------------------------------------------------------------------------------------------------


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

# --- against a distribution: kl_div -----------------------------------------------------------------------------------------


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

# --- against yes and no: bce ------------------------------------------------------------------------------------------------


def times(w, t):
    return t if w is None else wide(w) * t


def clamped_logs(x):
    """The log of x and of 1 − x, from −100 on."""
    return x.log().clamp(min=-100), (-x).log1p().clamp(min=-100)


def bce_forward(x, t, w, reduction):
    w = w if w is None else wide(w)
    return torch.ops.aten.binary_cross_entropy(wide(x), wide(t), w, REDUCTIONS.index(reduction)).to(x.dtype)


def bce_backward(dl, x, t, w, reduction, need):
    dx = dt = dw = None
    if need.x:

        def slope(x, t, w):
            x = wide(x)
            return times(w, (x - wide(t)) / ((1 - x) * x).clamp(min=EPS))

        dx = chain(slope, dl, reduction, x, t, w)
    if need.t:

        def by_target(x, w):
            yes, no = clamped_logs(wide(x))
            return times(w, no - yes)

        dt = chain(by_target, dl, reduction, x, w)
    if need.w:

        def by_weight(w, x, t):
            (yes, no), t = clamped_logs(wide(x)), wide(t)
            return (t - 1) * no - t * yes

        dw = chain(by_weight, dl, reduction, w, x, t)
    return dx, dt, dw


def of_logits(x, t, p):
    s = F.logsigmoid(x)  # −s in the letters above
    return (1 - t) * x - (s if p is None else (1 + (wide(p) - 1) * t) * s)


def logits_forward(x, t, w, p, reduction):
    def loss(x, t, w, p):
        x, t = wide(x), wide(t)
        return times(w, of_logits(x, t, p))

    return reduced(loss, reduction, x, t, w, p).to(x.dtype)


def logits_backward(dl, x, t, w, p, reduction, need):
    dx = dt = dw = dp = None
    if need.x:

        def slope(x, t, w, p):
            y, t = torch.sigmoid(wide(x)), wide(t)  # with p: y − t + (p − 1) t (y − 1), the form above
            return times(w, y - t if p is None else y - t + (wide(p) - 1) * t * (y - 1))

        dx = chain(slope, dl, reduction, x, t, w, p)
    if need.t:

        def by_target(x, w, p):
            x = wide(x)
            return times(w, -x if p is None else (1 - wide(p)) * F.logsigmoid(x) - x)

        dt = chain(by_target, dl, reduction, x, w, p)
    if need.w:

        def by_weight(w, x, t, p):
            return of_logits(wide(x), wide(t), p)

        dw = chain(by_weight, dl, reduction, w, x, t, p)
    if need.p:
        dp = chain(lambda p, x, t, w: times(w, -wide(t) * F.logsigmoid(wide(x))), dl, reduction, p, x, t, w)
    return dx, dt, dw, dp


BCE_RULE = Rule(
    "binary_cross_entropy",
    bce_forward,
    bce_backward,
    inputs="x t w",
    outputs="l",
    uses={"t": "x w"},
)
LOGITS_RULE = Rule(
    "binary_cross_entropy_with_logits",
    logits_forward,
    logits_backward,
    inputs="x t w p",
    outputs="l",
    uses={"t": "x w p"},
)

# --- the public functions ---------------------------------------------------------------------------------------------------


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
    if reduction == "mean" and size_average is None and reduce is None:
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


def weight_like(op: str, name: str, input: Tensor, w: Tensor | None) -> Tensor | None:
    """A weight, in input's shape."""
    if w is None or w.shape == input.shape:
        return w
    try:
        return w.expand(input.shape)
    except RuntimeError:
        raise ValueError(
            f"{op}: {name} has shape {tuple(w.shape)}, which does not broadcast to input's {tuple(input.shape)}"
        ) from None


def same_shape(op: str, input: Tensor, target: Tensor) -> None:
    if target.shape != input.shape:
        raise ValueError(f"{op}: target has shape {tuple(target.shape)} but input {tuple(input.shape)}; they must be equal")


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    backend: str = "auto",
) -> Tensor:
    """Binary cross entropy of probabilities, as `torch.nn.functional.binary_cross_entropy`.

    Args:
        input: (*B), probabilities in [0, 1].
        target: (*B), of input's dtype; differentiable.
        weight: broadcastable to (*B); differentiable.
        size_average: deprecated, see reduction.
        reduce: deprecated, see reduction.
        reduction: "none", "mean" or "sum".
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B) for "none", else a scalar.

    Raises:
        ValueError: shapes that disagree, or a reduction that does not exist.
        TypeError: the tensors are not of one floating-point dtype.
        RuntimeError: an input outside [0, 1], from torch's kernel; autocast on a GPU, as in torch.
    """
    reduction = resolve("binary_cross_entropy", reduction, size_average, reduce)
    if isinstance(input, Tensor) and input.is_cuda and torch.is_autocast_enabled("cuda"):
        raise RuntimeError(
            "binary_cross_entropy: not under autocast on a GPU, where probabilities in float16 would be lost; "
            "use binary_cross_entropy_with_logits"
        )
    x, t, w = BCE_OP.cast(input, target, weight)
    BCE_OP.check(x, t, w)
    same_shape("binary_cross_entropy", x, t)
    w = weight_like("binary_cross_entropy", "weight", x, w)
    return BCE_RULE(x, t, w, reduction, backend=BCE_OP.pick(BCE_RULE, backend, x, t, w))


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Binary cross entropy of logits, as `torch.nn.functional.binary_cross_entropy_with_logits`.

    Args:
        input: (*B), logits.
        target: (*B), of input's dtype, integers or booleans.
        weight: broadcastable to (*B); differentiable.
        size_average: deprecated, see reduction.
        reduce: deprecated, see reduction.
        reduction: "none", "mean" or "sum".
        pos_weight: broadcastable to (*B): the weight of the positives; differentiable.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B) for "none", else a scalar.

    Raises:
        ValueError: shapes that disagree, or a reduction that does not exist.
        TypeError: the tensors are not of one floating-point dtype.
    """
    op = "binary_cross_entropy_with_logits"
    reduction = resolve(op, reduction, size_average, reduce)
    x, t, w, p = LOGITS_OP.cast(input, floating(op, input, "target", target), weight, pos_weight)
    LOGITS_OP.check(x, t, w, p)
    same_shape(op, x, t)
    w, p = weight_like(op, "weight", x, w), weight_like(op, "pos_weight", x, p)
    return LOGITS_RULE(x, t, w, p, reduction, backend=LOGITS_OP.pick(LOGITS_RULE, backend, x, t, w, p))


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


class BCELoss(nn.BCELoss):
    """`torch.nn.BCELoss` with the backward above; same buffer and arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return binary_cross_entropy(input, target, self.weight, reduction=self.reduction, backend=self.backend)


class BCEWithLogitsLoss(nn.BCEWithLogitsLoss):
    """`torch.nn.BCEWithLogitsLoss` with the backward above; same buffers and arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        kw: Any = {"reduction": self.reduction, "pos_weight": self.pos_weight}
        return binary_cross_entropy_with_logits(input, target, self.weight, **kw, backend=self.backend)


# --- the ops ----------------------------------------------------------------------------------------------------------------


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


def bce_case(draw: Draw) -> Case:
    shape = (*draw.batch(), draw.size())
    x = draw.tensor(*shape).detach().sigmoid().mul(0.9).add(0.05).requires_grad_()
    t = draw.tensor(*shape).detach().sigmoid().requires_grad_()
    kwargs: dict[str, Any] = {"reduction": draw.choice(REDUCTIONS)}
    if draw.flag():
        kwargs["weight"] = draw.tensor(*draw.choice((shape, shape[-1:], (1,)))).detach().abs().add(0.1).requires_grad_()
    return Case((x, t), kwargs)


def logits_case(draw: Draw) -> Case:
    shape = (*draw.batch(), draw.size())
    x, t = draw.tensor(*shape, scale=2.0), draw.tensor(*shape).detach().sigmoid().requires_grad_()
    kwargs: dict[str, Any] = {"reduction": draw.choice(REDUCTIONS)}
    for name in ("weight", "pos_weight"):
        if draw.flag():
            kwargs[name] = draw.tensor(*draw.choice((shape, shape[-1:]))).detach().abs().add(0.1).requires_grad_()
    return Case((x, t), kwargs)


def bce_reference(input, target, weight=None, size_average=None, reduce=None, reduction="mean"):
    """In plain torch: torch's own adds 10⁻¹² to a denominator of its second derivative, and has no gradient of the weight."""
    x, t = wide(input), wide(target)
    l = -(t * x.log() + (1 - t) * (1 - x).log())
    l = l if weight is None else l * wide(weight)
    return (l if reduction == "none" else getattr(l, reduction)()).to(input.dtype)


def logits_reference(input, target, weight=None, size_average=None, reduce=None, reduction="mean", pos_weight=None):
    """In plain torch: by its weights, torch's own cannot be differentiated."""
    x, t = wide(input), wide(target)
    yes, no = torch.log_softmax(torch.stack((x, torch.zeros_like(x))), 0)  # log σ(x), log σ(−x)
    l = t * yes * (1 if pos_weight is None else wide(pos_weight)) + (1 - t) * no
    l = -l if weight is None else -l * wide(weight)
    return (l if reduction == "none" else getattr(l, reduction)()).to(input.dtype)


def bench_nll(draw: Draw) -> Case:
    return Case((draw.tensor(8192, 1000), draw.integers(0, 1000, 8192)), {})


def bench_pixels(draw: Draw) -> Case:
    return Case((draw.tensor(8, 21, 128, 128), draw.integers(0, 21, 8, 128, 128)), {})


def bench_kl(draw: Draw) -> Case:
    x, t = draw.tensor(2048, 1024), draw.tensor(2048, 1024, grad=False).softmax(1)
    return Case((x, t), {"reduction": "batchmean"})


def bench_bce(draw: Draw) -> Case:
    x = draw.tensor(2048, 1024).detach().sigmoid().requires_grad_()
    return Case((x, draw.tensor(2048, 1024, grad=False).sigmoid()), {})


def bench_logits(draw: Draw) -> Case:
    return Case((draw.tensor(2048, 1024), draw.tensor(2048, 1024, grad=False).sigmoid()), {})


def bench_weighted(draw: Draw) -> Case:
    x, t = bench_logits(draw).args
    return Case((x, t), {"pos_weight": draw.tensor(1024, grad=False).abs()})


def _op(call: Any, reference: Any, rule: Rule, module: Any, shapes: str, source: str, **kw: Any) -> Op:
    return Op(
        name=call.__name__,
        call=call,
        reference=reference,
        rules=(rule,),
        module=(module,),
        replaces=(module.__base__,),
        shapes=shapes,
        source=source,
        **{"autocast": FLOAT32, **kw},
    )


NLL_OP = _op(
    nll_loss,
    F.nll_loss,
    NLL_RULE,
    NLLLoss,
    "input: N C, target: N -> N",
    "Bridle 1990, eq. 12",
    case=nll_case,
    bench={"1000 classes": bench_nll, "pixels": bench_pixels},
)
KL_OP = _op(
    kl_div,
    F.kl_div,
    KL_RULE,
    KLDivLoss,
    "input: *B, target: *T -> *B",
    "Kullback & Leibler 1951, eq. 2.4",
    case=kl_case,
    bench=bench_kl,
)
BCE_OP = _op(
    binary_cross_entropy,
    bce_reference,
    BCE_RULE,
    BCELoss,
    "input: *B, target: *T, weight: *W -> *B",
    "Cox 1958",
    case=bce_case,
    bench=bench_bce,
    peer=F.binary_cross_entropy,
    autocast={"cpu": "float32"},
)
LOGITS_OP = _op(
    binary_cross_entropy_with_logits,
    logits_reference,
    LOGITS_RULE,
    BCEWithLogitsLoss,
    "input: *B, target: *T, weight: *W, pos_weight: *P -> *B",
    "Cox 1958",
    case=logits_case,
    bench={"": bench_logits, "pos_weight": bench_weighted},
    peer=F.binary_cross_entropy_with_logits,
)
OPS = (NLL_OP, KL_OP, BCE_OP, LOGITS_OP)
