"""Losses of regression: l1_loss, smooth_l1_loss, huber_loss, poisson_nll_loss, gaussian_nll_loss.

Maths     e = x − t, and per element
          l1         ℓ = |e|                                   ℓ' = sign e
          smooth l1  ℓ = e²/(2β) where |e| < β, else |e| − β/2 ℓ' = clamp(e/β, −1, 1)
          huber      ℓ = e²/2 where |e| ≤ δ, else δ|e| − δ²/2  ℓ' = clamp(e, −δ, δ)
          of which   dx = dℓ ∘ ℓ',  dt = −dx;  with weights ℓ = w ∘ ℓ(e):  dx = dℓ ∘ w ∘ ℓ',  dw = dℓ ∘ ℓ(e)
                     l1's weighted mean is Σ w ℓ / Σ w, whence dw = dl (ℓ − l) / Σ w;  huber's is Σ w ℓ / N
          poisson    ℓ = eˣ − t x             dx = dℓ (eˣ − t)             dt = − dℓ x
                     ℓ = x − t log(x + ε)     dx = dℓ (1 − t / (x + ε))    dt = − dℓ log(x + ε)        (log_input=False)
                     full: where t > 1, ℓ also has t log t − t + ½ log(2πt), and dt  + dℓ (log t + 1/(2t))
          gaussian   v = max(σ², ε),  dσ² = dv, also where it is clamped, as in torch
                     ℓ = ½ (log v + e²/v) [+ ½ log 2π, full]
                     dx = dℓ e/v,  dt = −dx,  dv = ½ dℓ (1/v − (e/v)²)
Letters   x input, t target, w weight, σ² variance, of one shape *B after broadcasting; l the reduced loss, ℓ that of an element
Numerics  half tensors are computed in float32; sign 0 = 0; Stirling's term has no gradient where t ≤ 1
          (torch's is NaN at 0); nothing is kept but the inputs
Source    Laplace 1774 (l1); Girshick, "Fast R-CNN", 2015, eq. 3 (smooth l1); Huber 1964, "Robust estimation of a location
          parameter" (huber); Nelder & Wedderburn 1972 (poisson); Nix & Weigend 1994, eq. 5 (gaussian)
"""

from __future__ import annotations

from math import log, pi

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule, unwatched
from bptoolkit.op import FLOAT32, FLOAT32_CUDA, Op
from bptoolkit.ops.reduction import (
    REDUCTIONS,
    broadcast,
    chain,
    check_reduction,
    floating,
    reduce,
    reduced,
    resolve,
    share,
    values_readable,
)
from bptoolkit.precision import wide
from bptoolkit.shapes import check_floating

# --- of a difference: l1, smooth l1, huber ---------------------------------------------------------------------------------


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

# --- of a distribution: poisson, gaussian ----------------------------------------------------------------------------------


def poisson_forward(x, t, log_input, full, eps, reduction):
    def loss(x, t):
        x, t = wide(x), wide(t)
        l = x.exp() - t * x if log_input else x - t * (x + eps).log()
        if full:
            stirling = t * t.log() - t + 0.5 * (2 * pi * t).log()
            l = l + stirling.masked_fill(t <= 1, 0)
        return l

    return reduced(loss, reduction, x, t).to(x.dtype)


def poisson_backward(dl, x, t, log_input, full, eps, reduction, need):
    dx = dt = None
    if need.x:
        if log_input:
            dx = chain(lambda x, t: wide(x).exp() - wide(t), dl, reduction, x, t)
        else:
            dx = chain(lambda x, t: 1 - wide(t) / (wide(x) + eps), dl, reduction, x, t)
    if need.t:

        def slope(t, x):
            x, t = wide(x), wide(t)
            s = -x if log_input else -(x + eps).log()
            if not full:
                return s
            counts = t > 1
            t = torch.where(counts, t, 1.0)  # before log and division, whose derivatives are not finite at 0
            return s + torch.where(counts, t.log() + 0.5 / t, 0.0)

        dt = chain(slope, dl, reduction, t, x)
    return dx, dt


def floor_forward(x, eps):
    return x.clamp(min=eps)


def floor_backward(dy):
    return dy


def gaussian_forward(x, t, v, full, reduction):
    constant = 0.5 * log(2 * pi) if full else 0.0

    def loss(x, t, v):
        v = wide(v)
        l = 0.5 * (v.log() + error(x, t).square() / v)
        return l + constant if full else l

    return reduced(loss, reduction, x, t, v).to(x.dtype)


def gaussian_backward(dl, x, t, v, reduction, need):
    dx = dv = None
    if need.x or need.t:
        dx = chain(lambda x, t, v: error(x, t) / wide(v), dl, reduction, x, t, v)
    if need.v:

        def slope(v, x, t):
            v = wide(v)
            return 0.5 * (1 / v - (error(x, t) / v).square())

        dv = chain(slope, dl, reduction, v, x, t)
    return dx if need.x else None, -dx if need.t else None, dv


POISSON_RULE = Rule("poisson_nll_loss", poisson_forward, poisson_backward, inputs="x t", outputs="l")
FLOOR_RULE = Rule("variance_floor", floor_forward, floor_backward, inputs="x", outputs="y")
GAUSSIAN_RULE = Rule("gaussian_nll_loss", gaussian_forward, gaussian_backward, inputs="x t v", outputs="l")

# --- the public functions --------------------------------------------------------------------------------------------------


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


def poisson_nll_loss(
    input: Tensor,
    target: Tensor,
    log_input: bool = True,
    full: bool = False,
    size_average: bool | None = None,
    eps: float = 1e-8,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    backend: str = "auto",
) -> Tensor:
    """Negative log-likelihood of counts under Poisson distributions, as `torch.nn.functional.poisson_nll_loss`.

    Args:
        input: (*B), floating point: the rates, or their logarithms.
        target: (*B) or broadcastable with input: the counts, of input's dtype or integers.
        log_input: input is the logarithm of the rate.
        full: add Stirling's approximation of log t!, where t > 1.
        size_average: deprecated, see reduction.
        eps: added to the rate before its logarithm, with log_input=False.
        reduce: deprecated, see reduction.
        reduction: "none", "mean" or "sum".
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B) for "none", else a scalar.

    Raises:
        ValueError: shapes that cannot be broadcast, or a reduction that does not exist.
        TypeError: input is not of floating point, or target of another floating-point dtype.
    """
    reduction = resolve("poisson_nll_loss", reduction, size_average, reduce)
    input, target = POISSON_OP.cast(input, floating("poisson_nll_loss", input, "target", target))
    POISSON_OP.check(input, target)
    input, target = broadcast("poisson_nll_loss", input, target, warn=False)
    backend = POISSON_OP.pick(POISSON_RULE, backend, input, target)
    return POISSON_RULE(input, target, bool(log_input), bool(full), float(eps), reduction, backend=backend)


def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
    *,
    backend: str = "auto",
) -> Tensor:
    """Negative log-likelihood under normal distributions, as `torch.nn.functional.gaussian_nll_loss`.

    Args:
        input: (*B), floating point: the means.
        target: (*B), or broadcastable with input.
        var: the variances: a number, of input's shape, of its shape without the last dimension, or of its shape with one
            dimension of size 1. Not negative (looked at on the CPU, outside transforms); differentiable.
        full: add ½ log 2π.
        eps: variances are clamped from below to it; gradients pass the clamp.
        reduction: "none", "mean" or "sum".
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B) for "none", else a scalar.

    Raises:
        ValueError: shapes that do not go together, a negative variance, or a reduction that does not exist.
        TypeError: the tensors are not of one floating-point dtype.
    """
    check_reduction("gaussian_nll_loss", reduction)
    check_floating("gaussian_nll_loss", "input", input)
    if not isinstance(var, Tensor):
        if var < 0:
            raise ValueError(f"gaussian_nll_loss: var={var} is negative")
        var = torch.full_like(input, var)
    x, t, v = GAUSSIAN_OP.cast(input, target, var)
    GAUSSIAN_OP.check(x, t, v)
    v = FLOOR_RULE(_check_var(x, v), float(eps))
    x, t, v = broadcast("gaussian_nll_loss", x, t, v, warn=False)
    return GAUSSIAN_RULE(x, t, v, bool(full), reduction, backend=GAUSSIAN_OP.pick(GAUSSIAN_RULE, backend, x, t, v))


def _check_var(input: Tensor, var: Tensor) -> Tensor:
    """The variances in a shape that broadcasts with input."""
    if values_readable(var) and var.numel() and bool((var < 0).any()):
        raise ValueError(f"gaussian_nll_loss: var has a negative entry, {float(var.detach().min())}")
    if var.shape == input.shape:
        return var
    if var.shape == input.shape[:-1]:
        return var.unsqueeze(-1)
    if input.dim() == var.dim() and sum(v for i, v in zip(input.shape, var.shape) if i != v) == 1:
        return var
    raise ValueError(
        f"gaussian_nll_loss: var has shape {tuple(var.shape)}; input {tuple(input.shape)} needs its shape, its shape without "
        "the last dimension, or with one dimension of size 1"
    )


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


class PoissonNLLLoss(nn.PoissonNLLLoss):
    """`torch.nn.PoissonNLLLoss` with the backward above."""

    backend: str = "auto"

    def forward(self, log_input: Tensor, target: Tensor) -> Tensor:
        return poisson_nll_loss(
            log_input,
            target,
            log_input=self.log_input,
            full=self.full,
            eps=self.eps,
            reduction=self.reduction,
            backend=self.backend,
        )


class GaussianNLLLoss(nn.GaussianNLLLoss):
    """`torch.nn.GaussianNLLLoss` with the backward above."""

    backend: str = "auto"

    def forward(self, input: Tensor, target: Tensor, var: Tensor | float) -> Tensor:
        return gaussian_nll_loss(
            input, target, var, full=self.full, eps=self.eps, reduction=self.reduction, backend=self.backend
        )


# --- the ops ---------------------------------------------------------------------------------------------------------------


def poisson_reference(input, target, log_input=True, full=False, size_average=None, eps=1e-8, reduce=None, reduction="mean"):
    """In plain torch: the target's gradient in torch's own is NaN at 0, though Stirling's term is masked there."""
    x, t = torch.broadcast_tensors(wide(input), wide(target.to(input.dtype)))
    l = torch.exp(x) - x * t if log_input else x - t * torch.log(x + eps)
    if full:
        safe = torch.where(t > 1, t, torch.full_like(t, 2.0))
        stirling = torch.special.xlogy(safe, safe) - safe + torch.log(2 * pi * safe) / 2
        l = torch.where(t > 1, l + stirling, l)
    l = {"none": lambda: l, "mean": l.mean, "sum": l.sum}[reduction]()
    return l.to(input.dtype)


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


def poisson_case(draw: Draw) -> Case:
    (x, t), kwargs = case(draw)
    log_input = draw.flag()
    x = x if log_input else x.detach().sigmoid().requires_grad_()
    t = t.detach().abs().mul(2).requires_grad_()
    kwargs |= {"log_input": log_input, "full": draw.flag(), "eps": draw.choice((1e-8, 0.1))}
    return Case((x, t), kwargs)


def gaussian_case(draw: Draw) -> Case:
    (x, t), kwargs = case(draw)
    shape = draw.choice((x.shape, x.shape[:-1], (*x.shape[:-1], 1)))
    var = draw.tensor(*shape).detach().abs().add(0.1).requires_grad_() if draw.random.random() < 0.85 else 0.7
    return Case((x, t, var), {**kwargs, "full": draw.flag(), "eps": draw.choice((1e-6, 0.5))})


def bench(draw: Draw) -> Case:
    return Case((draw.tensor(2048, 1024), draw.tensor(2048, 1024, grad=False)), {})


def bench_gaussian(draw: Draw) -> Case:
    var = draw.tensor(2048, 1024).detach().square().add(0.1).requires_grad_()
    return Case((*bench(draw).args, var), {})


def _op(call, reference, rules, module, shapes, source, **kw) -> Op:
    return Op(
        name=call.__name__,
        call=call,
        reference=reference,
        rules=rules,
        module=(module,),
        replaces=(module.__base__,),
        shapes=shapes,
        source=source,
        **{"autocast": FLOAT32, "bench": bench, **kw},
    )


_TWO, _THREE = "input: *B, target: *T -> *B", "input: *B, target: *T, weight: *W -> *B"
L1_OP = _op(l1_loss, F.l1_loss, (L1_RULE,), L1Loss, _THREE, "Laplace 1774", case=weighted_case)
SMOOTH_L1_OP = _op(
    smooth_l1_loss,
    F.smooth_l1_loss,
    (SMOOTH_L1_RULE, L1_RULE),
    SmoothL1Loss,
    _TWO,
    "Girshick 2015, eq. 3",
    case=smooth_l1_case,
)
HUBER_OP = _op(huber_loss, F.huber_loss, (HUBER_RULE,), HuberLoss, _THREE, "Huber 1964", case=huber_case)
POISSON_OP = _op(
    poisson_nll_loss,
    poisson_reference,
    (POISSON_RULE,),
    PoissonNLLLoss,
    _TWO,
    "Nelder & Wedderburn 1972",
    case=poisson_case,
    peer=F.poisson_nll_loss,
)
GAUSSIAN_OP = _op(
    gaussian_nll_loss,
    F.gaussian_nll_loss,
    (GAUSSIAN_RULE, FLOOR_RULE),
    GaussianNLLLoss,
    "input: *B, target: *T, var: *V -> *B",
    "Nix & Weigend 1994, eq. 5",
    case=gaussian_case,
    bench=bench_gaussian,
    autocast=FLOAT32_CUDA,
)
OPS = (L1_OP, SMOOTH_L1_OP, HUBER_OP, POISSON_OP, GAUSSIAN_OP)
