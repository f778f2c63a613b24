"""Losses that are likelihoods of a distribution: poisson_nll_loss, gaussian_nll_loss.

Maths     per element
          poisson    ℓ = eˣ − t x             dx = dℓ (eˣ − t)             dt = − dℓ x
                     ℓ = x − t log(x + ε)     dx = dℓ (1 − t / (x + ε))    dt = − dℓ log(x + ε)        (log_input=False)
                     full: where t > 1, ℓ also has t log t − t + ½ log(2πt), and dt  + dℓ (log t + 1/(2t))
          gaussian   e = x − t,  v = max(σ², ε),  dσ² = dv, also where it is clamped, as in torch
                     ℓ = ½ (log v + e²/v) [+ ½ log 2π, full]
                     dx = dℓ e/v,  dt = −dx,  dv = ½ dℓ (1/v − (e/v)²)
Letters   x input, t target, σ² variance, of one shape *B after broadcasting; ℓ the loss of an element
Numerics  half tensors are computed in float32; Stirling's term has no gradient where t ≤ 1 (torch's is NaN at 0); nothing is
          kept but the inputs
Source    Nelder & Wedderburn 1972 (poisson); Nix & Weigend 1994, eq. 5 (gaussian)
"""

from __future__ import annotations

from math import log, pi

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.op import FLOAT32_CUDA
from bptoolkit.ops.loss_regression import bench, case, error
from bptoolkit.ops.reduction import broadcast, chain, check_reduction, floating, loss_op, reduced, resolve, values_readable
from bptoolkit.precision import wide
from bptoolkit.shapes import check_floating

# --- the rules ----------------------------------------------------------------------------------------------------------------


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


# --- the public functions -----------------------------------------------------------------------------------------------------


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


# --- the ops ------------------------------------------------------------------------------------------------------------------


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


def bench_gaussian(draw: Draw) -> Case:
    var = draw.tensor(2048, 1024).detach().square().add(0.1).requires_grad_()
    return Case((*bench(draw).args, var), {})


POISSON_OP = loss_op(
    poisson_nll_loss,
    poisson_reference,
    (POISSON_RULE,),
    PoissonNLLLoss,
    "input: *B, target: *T -> *B",
    "Nelder & Wedderburn 1972",
    case=poisson_case,
    peer=F.poisson_nll_loss,
    bench=bench,
)
GAUSSIAN_OP = loss_op(
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
OPS = (POISSON_OP, GAUSSIAN_OP)
