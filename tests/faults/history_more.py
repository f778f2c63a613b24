"""Replicas of public bugs in losses, fused layers, cells and convolutions.

A scalar for a row's cotangent, a branch without gradient, gates that are written over, a gradient at another tensor's strides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from faults.record import Fault, Twin

HALF = (torch.float16, torch.bfloat16)
CPU = {"device_type": "cpu"}
EPS = 1e-5


def wide(t: Tensor) -> Tensor:
    """In float32, if it is narrower."""
    return t.float() if t.dtype in HALF else t


def op(forward: Callable[..., Any], backward: Callable[..., Sequence[Tensor | None]]) -> Callable[..., Any]:
    """A kernel: `forward(*inputs)`, and `backward(saved inputs as given, cotangents, *inputs)` on wide tensors."""

    class Kernel(Function):
        @staticmethod
        @torch.amp.custom_fwd(**CPU)
        def forward(ctx: Any, *xs: Tensor) -> Any:
            ctx.save_for_backward(*xs)
            out = forward(*map(wide, xs))
            return tuple(o.to(xs[0].dtype) for o in out) if isinstance(out, tuple) else out.to(xs[0].dtype)

        @staticmethod
        @once_differentiable
        @torch.amp.custom_bwd(**CPU)
        def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
            xs = ctx.saved_tensors
            grads = backward(xs, [wide(dy) for dy in dys], *map(wide, xs))
            return tuple(None if g is None else g.to(x.dtype) for g, x in zip(grads, xs, strict=True))

    return Kernel.apply


def entropy(x: Tensor) -> Tensor:
    """Cross entropy of every row with class 0, not reduced."""
    return -x.log_softmax(-1)[..., 0]


def entropy_backward(scale: Callable[[Tensor], Tensor]) -> Callable[..., Sequence[Tensor]]:
    def backward(xs: Sequence[Tensor], dys: Sequence[Tensor], x: Tensor) -> Sequence[Tensor]:
        g = x.softmax(-1)
        g[:, 0] -= 1
        return [g * scale(dys[0])]

    return backward


def prenorm(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of a layer and its residual, normalised, and the sum itself, which goes on."""
    s = x + r
    return s * (s.square().mean(-1, keepdim=True) + EPS).rsqrt(), s


def prenorm_backward(carried: float = 1.0) -> Callable[..., Sequence[Tensor]]:
    def backward(xs: Sequence[Tensor], dys: Sequence[Tensor], x: Tensor, r: Tensor) -> Sequence[Tensor]:
        s, (dy, dsum) = x + r, dys
        k = (s.square().mean(-1, keepdim=True) + EPS).rsqrt()
        ds = k * dy - s * k**3 * (dy * s).mean(-1, keepdim=True)
        return [ds + dsum, ds + carried * dsum]

    return backward


def biased_attention(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    return (q @ k.mT + b).softmax(-1) @ v


def biased_attention_backward(bias: bool) -> Callable[..., Sequence[Tensor | None]]:
    def backward(xs: Any, dys: Sequence[Tensor], q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Sequence[Tensor | None]:
        p, dy = (q @ k.mT + b).softmax(-1), dys[0]
        dp = dy @ v.mT
        ds = p * (dp - (dp * p).sum(-1, keepdim=True))
        return [ds @ k, ds.mT @ q, p.mT @ dy, ds if bias else None]

    return backward


def conv(x: Tensor, w: Tensor) -> Tensor:
    return F.conv2d(x, w)


def conv_backward(place: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Sequence[Tensor]]:
    """`place(dw, weight as given)` writes the gradient where it goes."""

    def backward(xs: Sequence[Tensor], dys: Sequence[Tensor], x: Tensor, w: Tensor) -> Sequence[Tensor]:
        dx, dw, (h, n) = torch.zeros(x.shape).to(x), torch.zeros(w.shape).to(w), dys[0].shape[2:]
        for i in range(w.shape[2]):
            for j in range(w.shape[3]):
                dx[:, :, i : i + h, j : j + n] += torch.einsum("bohn,oc->bchn", dys[0], w[:, :, i, j])
                dw[:, :, i, j] = torch.einsum("bohn,bchn->oc", dys[0], x[:, :, i : i + h, j : j + n])
        return [dx, place(dw, xs[1])]

    return backward


def at_weight_strides(dw: Tensor, w: Tensor) -> Tensor:
    """Into a fresh contiguous buffer, at the strides of the weight, where these fill it."""
    dense = sorted(w.stride()) == sorted(w.mT.contiguous().stride()) or w.is_contiguous(memory_format=torch.channels_last)
    buffer = torch.zeros_like(dw, memory_format=torch.contiguous_format)
    if not dense or 0 in w.shape:
        return buffer.copy_(dw)
    buffer.as_strided(w.shape, w.stride()).copy_(dw)
    return buffer


def gated(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """One step of a cell: the candidate enters through a gate."""
    return c + torch.sigmoid(a) * (torch.tanh(b) - c)


def cell(over: bool) -> Callable[..., Tensor]:
    """The step keeps its activated gates in one buffer; `over`: backward writes the gates' gradients into it."""

    class Cell(Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
            z, n = torch.sigmoid(wide(a)), torch.tanh(wide(b))
            ctx.save_for_backward(torch.stack([z, n]), c)
            return (wide(c) + z * (n - wide(c))).to(a.dtype)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            gates, c = ctx.saved_tensors
            z, n = gates.clone()
            dy = wide(dy)
            grads = torch.stack([dy * (n - wide(c)) * z * (1 - z), dy * z * (1 - n * n)])
            if over:
                gates.data.copy_(grads)  # the version counter does not see it
            da, db = grads.to(c.dtype)
            return da, db, (dy * (1 - z)).to(c.dtype)

    return Cell.apply


ENTROPY = {"family": "softmax", "inputs": "x: B C -> B", "reference": entropy}
PRENORM = {"family": "norm", "inputs": "x: B N, r: B N -> B N, B N", "reference": prenorm}
BIASED = {"family": "attention", "inputs": "q: T D, k: S D, v: S D, b: T S -> T D", "reference": biased_attention}
CONV = {"family": "conv", "inputs": "x: B 3 5 6, w: O 3 3 2 -> B O 3 5", "reference": conv}
CELL = {"family": "recurrent", "inputs": "a: B H, b: B H, c: B H -> B H", "reference": gated}

_scalar = op(entropy, entropy_backward(lambda dy: dy[:1, None]))
_dropped = op(prenorm, prenorm_backward(0.0))
_no_bias = op(biased_attention, biased_attention_backward(False))
_strides = op(conv, conv_backward(at_weight_strides))

FAULTS = [
    Fault(
        name="first row's cotangent for all rows",
        kind="value",
        fn=_scalar,
        caught_by=("gradient_value",),
        history="Liger#968",
        **ENTROPY,
    ),
    Fault(
        name="gradient of the residual that goes on dropped",
        kind="value",
        fn=_dropped,
        caught_by=("gradient_value",),
        history="quack#53",
        **PRENORM,
    ),
    Fault(
        name="attention without the gradient of its bias",
        kind="contract",
        fn=_no_bias,
        caught_by=("gradient_value",),
        history="flash-attention#307",
        **BIASED,
    ),
    Fault(
        name="weight gradient at the weight's strides",
        kind="layout",
        fn=_strides,
        caught_by=("input_layout",),
        history="FlagGems conv2d",
        **CONV,
    ),
    Fault(
        name="gates written over by their gradients",
        kind="mutation",
        fn=cell(True),
        caught_by=("backward_twice",),
        history="haste LSTM",
        **CELL,
    ),
]

TWINS = [
    Twin(name="history: entropy of rows", fn=op(entropy, entropy_backward(lambda dy: dy[:, None])), **ENTROPY),
    Twin(name="history: prenorm", fn=op(prenorm, prenorm_backward()), **PRENORM),
    Twin(name="history: attention with bias", fn=op(biased_attention, biased_attention_backward(True)), **BIASED),
    Twin(name="history: conv2d", fn=op(conv, conv_backward(lambda dw, w: dw)), **CONV),
    Twin(name="history: gated step", fn=cell(False), **CELL),
]
