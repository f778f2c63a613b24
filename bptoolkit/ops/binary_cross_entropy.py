"""Losses against yes and no: binary_cross_entropy, binary_cross_entropy_with_logits.

Maths     bce     ℓ = − w (t log x + (1 − t) log(1 − x))
                  dx = dℓ w (x − t) / (x (1 − x))      dt = dℓ w (log(1 − x) − log x)        dw = dℓ ℓ/w
          bce of logits, with s = log(1 + e⁻ˣ) = − log σ(x) and q = 1 + (p − 1) t
                  ℓ = w ((1 − t) x + q s)              dx = dℓ w (1 − t − q (1 − σ(x)))      dw = dℓ ℓ/w
                  dt = dℓ w ((p − 1) s − x)            dp = dℓ w t s
Letters   x input, *B: probabilities, or logits; t target; w weight, p weight of the positives; ℓ the loss of an element
Numerics  half tensors are computed in float32; bce has torch's clamps: log ≥ −100 (in dt too, where torch's is ±inf at 0 and
          1), and x (1 − x) ≥ 10⁻¹² in dx
Source    Cox 1958, "The regression analysis of binary sequences"
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.ops.reduction import REDUCTIONS, chain, floating, loss_op, reduced, resolve
from bptoolkit.precision import wide

EPS = 1e-12

# --- the rules ----------------------------------------------------------------------------------------------------------------


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


# --- the public functions -----------------------------------------------------------------------------------------------------


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


# --- the ops ------------------------------------------------------------------------------------------------------------------


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


def bench_bce(draw: Draw) -> Case:
    x = draw.tensor(2048, 1024).detach().sigmoid().requires_grad_()
    return Case((x, draw.tensor(2048, 1024, grad=False).sigmoid()), {})


def bench_logits(draw: Draw) -> Case:
    return Case((draw.tensor(2048, 1024), draw.tensor(2048, 1024, grad=False).sigmoid()), {})


def bench_weighted(draw: Draw) -> Case:
    x, t = bench_logits(draw).args
    return Case((x, t), {"pos_weight": draw.tensor(1024, grad=False).abs()})


BCE_OP = loss_op(
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
LOGITS_OP = loss_op(
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
OPS = (BCE_OP, LOGITS_OP)
