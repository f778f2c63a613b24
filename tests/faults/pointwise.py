"""Faults and twins of activations: a derivative that is right in most places, read from memory that is mostly contiguous."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from faults.record import Fault, Twin


def up(t: Tensor) -> Tensor:
    """To the dtype to compute in."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def multiplied(dy: Tensor, x: Tensor, slope: Callable[[Tensor], Tensor]) -> Tensor:
    """The right gradient of an elementwise function."""
    return (up(dy) * slope(up(x))).to(x.dtype)


def activation(
    reference: Callable[[Tensor], Tensor],
    slope: Callable[[Tensor], Tensor],
    gradient: Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor] = multiplied,
) -> Callable[[Tensor], Tensor]:
    """An opaque elementwise function: the forward of torch, and its own derivative."""

    class Activation(Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return reference(x)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
            ctx.save_for_backward(inputs[0])

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return gradient(dy, ctx.saved_tensors[0], slope)

    return Activation.apply


def from_mask(reference: Callable[[Tensor], Tensor], mask: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A piecewise linear function in the old style, which keeps only where it passes."""

    class Masked(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(mask(x))
            return reference(x)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return torch.where(ctx.saved_tensors[0], dy, torch.zeros_like(dy))

    return Masked.apply


def silu_slope(x: Tensor) -> Tensor:
    """Of SiLU."""
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def silu_slope_by_exp(x: Tensor) -> Tensor:
    """Of SiLU, by a logistic function whose exponential overflows."""
    e = torch.exp(x)
    s = e / (1 + e)
    return s * (1 + x * (1 - s))


def silu_slope_by_table(x: Tensor) -> Tensor:
    """Of SiLU, by a logistic function with 8 bits: 0.3 % off."""
    s = torch.sigmoid(x).bfloat16().to(x.dtype)
    return s * (1 + x * (1 - s))


def silu_slope_saturated(x: Tensor) -> Tensor:
    """Of SiLU, as if there were no input beyond 8."""
    return silu_slope(x.clamp(-8, 8))


def gelu_slope(x: Tensor) -> Tensor:
    """Of GELU by the error function."""
    cdf = 0.5 * torch.special.erfc(-x * math.sqrt(0.5))
    return cdf + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def gelu_tanh_slope(x: Tensor) -> Tensor:
    """Of GELU by tanh."""
    k = math.sqrt(2 / math.pi)
    t = torch.tanh(k * (x + 0.044715 * x * x * x))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * k * (1 + 3 * 0.044715 * x * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by tanh."""
    return F.gelu(x, approximate="tanh")


def relu2(x: Tensor) -> Tensor:
    """ReLU, squared."""
    return torch.relu(x).square()


def relu2_slope(x: Tensor) -> Tensor:
    """Of the squared ReLU."""
    return 2 * torch.relu(x)


def in_memory_order(t: Tensor) -> Tensor:
    """What a kernel reads that takes a tensor to be contiguous; NaN behind the end of its storage."""
    there = t.untyped_storage().nbytes() // t.element_size() - t.storage_offset()
    n = max(min(there, t.numel()), 0)
    read = t.new_full((t.numel(),), float("nan"))
    read[:n] = t.as_strided((n,), (1,))
    return read.view(t.shape)


def into_memory_order(dy: Tensor, x: Tensor, slope: Callable[[Tensor], Tensor]) -> Tensor:
    """The gradient, written row by row to memory that has the strides of the input."""
    dx = torch.empty_like(x)
    dx.as_strided((dx.numel(),), (1,)).copy_(multiplied(dy, x, slope).flatten())
    return dx


def in_io_dtype(dy: Tensor, x: Tensor, slope: Callable[[Tensor], Tensor]) -> Tensor:
    """The gradient, computed in the dtype of the input."""
    return dy * slope(x)


def fault(
    name: str, kind: str, reference: Callable[[Tensor], Tensor], fn: Callable[[Tensor], Tensor], *caught_by: str
) -> Fault:
    """A fault of an elementwise function."""
    return Fault(name=name, family="activation", kind=kind, inputs="x: B N", fn=fn, reference=reference, caught_by=caught_by)


FAULTS = [
    fault("relu passes at 0", "range", torch.relu, from_mask(torch.relu, lambda x: x >= 0), "values"),
    fault("hardtanh passes at its ends", "range", F.hardtanh, from_mask(F.hardtanh, lambda x: x.abs() <= 1), "values"),
    fault(
        "abs falls at 0",
        "range",
        torch.abs,
        activation(torch.abs, lambda x: torch.where(x > 0, 1.0, -1.0).to(x.dtype)),
        "values",
    ),
    fault("silu gradient overflows", "range", F.silu, activation(F.silu, silu_slope_by_exp), "values"),
    fault(
        "softplus gradient cut beyond 20",
        "range",
        F.softplus,
        activation(F.softplus, lambda x: torch.sigmoid(x) * (x <= 20)),
        "values",
    ),
    fault("silu gradient saturates at 8", "range", F.silu, activation(F.silu, silu_slope_saturated), "values"),
    fault(
        "squared relu gradient flushes tiny values",
        "range",
        relu2,
        activation(relu2, lambda x: torch.where(x.abs() < 1e-4, torch.zeros_like(x), relu2_slope(x))),
        "values",
    ),
    fault("gelu with the gradient of its tanh form", "value", F.gelu, activation(F.gelu, gelu_tanh_slope), "gradient_value"),
    fault("silu gradient 0.3 % off", "value", F.silu, activation(F.silu, silu_slope_by_table), "gradient_value"),
    fault(
        "elu gradient negative below 0",
        "value",
        F.elu,
        activation(F.elu, lambda x: torch.where(x > 0, torch.ones_like(x), -torch.exp(x))),
        "gradient_value",
    ),
    fault(
        "silu takes the cotangent to be constant",
        "value",
        F.silu,
        activation(F.silu, silu_slope, lambda dy, x, s: multiplied(dy[:1, :1].expand(dy.shape), x, s)),
        "gradient_value",
    ),
    fault(
        "gelu tanh gradient overflows in float16",
        "precision",
        gelu_tanh,
        activation(gelu_tanh, gelu_tanh_slope, in_io_dtype),
        "dtypes",
        "values",
    ),
    fault(
        "silu takes the cotangent to be contiguous",
        "layout",
        F.silu,
        activation(F.silu, silu_slope, lambda dy, x, s: multiplied(in_memory_order(dy), x, s)),
        "cotangent_layout",
    ),
    fault(
        "silu takes the saved input to be contiguous",
        "layout",
        F.silu,
        activation(F.silu, silu_slope, lambda dy, x, s: multiplied(dy, in_memory_order(x), s)),
        "input_layout",
    ),
    fault(
        "silu gradient written in memory order",
        "layout",
        F.silu,
        activation(F.silu, silu_slope, into_memory_order),
        "input_layout",
    ),
]


def twin(name: str, reference: Callable[[Tensor], Tensor], fn: Callable[[Tensor], Tensor]) -> Twin:
    """A right elementwise function."""
    return Twin(name=name, family="activation", inputs="x: B N", fn=fn, reference=reference)


TWINS = [
    twin("silu", F.silu, activation(F.silu, silu_slope)),
    twin("gelu", F.gelu, activation(F.gelu, gelu_slope)),
    twin("gelu tanh", gelu_tanh, activation(gelu_tanh, gelu_tanh_slope)),
    twin("hardtanh from a mask", F.hardtanh, from_mask(F.hardtanh, lambda x: x.abs() < 1)),
    twin(
        "silu in memory order of contiguous copies",
        F.silu,
        activation(
            F.silu,
            silu_slope,
            lambda dy, x, s: multiplied(in_memory_order(dy.contiguous()), in_memory_order(x.contiguous()), s),
        ),
    ),
]
