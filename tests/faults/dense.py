"""Faults and twins of a linear layer, written as a kernel is: opaque to autograd, with its own backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from faults.record import Fault, Twin

INPUTS = "x: B N, w: M N, b: M -> B M"
PLAIN = "x: B N, w: M N -> B M"
HALF = (torch.float16, torch.bfloat16)
Grads = tuple[Tensor | None, ...]


def right(ctx: Any, dy: Tensor, x: Tensor, w: Tensor) -> Grads:
    """Every gradient that is needed."""
    needs = ctx.needs_input_grad
    return (
        dy @ w if needs[0] else None,
        dy.t() @ x if needs[1] else None,
        dy.sum(0) if needs[2] else None,
    )


def linear(backward: Callable[..., Grads] = right, forward: Callable[..., Tensor] = F.linear) -> Callable[..., Tensor]:
    """A linear layer, autocast taken care of by `custom_fwd` and `custom_bwd`."""

    class Linear(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cpu")
        def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return forward(x, w, b)

        @staticmethod
        @torch.amp.custom_bwd(device_type="cpu")
        @once_differentiable
        def backward(ctx: Any, dy: Tensor) -> Grads:
            return backward(ctx, dy, *ctx.saved_tensors)

    return Linear.apply


def with_setup(backward: Callable[..., Grads] = right, cast: bool = True) -> Callable[..., Tensor]:
    """A linear layer in the new style, the cotangent cast to the dtype of the weights."""

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return F.linear(x, w, b)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            ctx.save_for_backward(inputs[0], inputs[1])

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dy: Tensor) -> Grads:
            x, w = ctx.saved_tensors
            return backward(ctx, dy.to(x.dtype) if cast else dy, x, w)

    return Linear.apply


def tied(both: bool = True) -> Callable[..., Tensor]:
    """`x w^T w`, an auto-encoder with tied weights: the weights are used twice."""

    class Tied(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cpu")
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            h = x @ w.t()
            ctx.save_for_backward(x, w, h)
            return h @ w

        @staticmethod
        @torch.amp.custom_bwd(device_type="cpu")
        @once_differentiable
        def backward(ctx: Any, dy: Tensor) -> Grads:
            x, w, h = ctx.saved_tensors
            dh = dy @ w.t()
            dw = dh.t() @ x
            return dh @ w, dw + h.t() @ dy if both else dw

    return Tied.apply


def changed(which: int, by: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A linear layer, one of whose gradients (0 x, 1 w, 2 b) is `by(dy, x, w)`."""

    def backward(ctx: Any, dy: Tensor, x: Tensor, w: Tensor) -> Grads:
        grads = list(right(ctx, dy, x, w))
        if ctx.needs_input_grad[which]:
            grads[which] = by(dy, x, w)
        return tuple(grads)

    return linear(backward)


def full_blocks(t: Tensor, dim: int, block: int) -> Tensor:
    """What a loop over full blocks reads, when it is right up to one block."""
    size = t.shape[dim]
    return t.narrow(dim, 0, size // block * block) if size > block else t


def right_in_blocks(dy: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """dw, in blocks of 16 rows, accumulated in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    dw = torch.zeros(w.shape, dtype=wide)
    for i in range(0, x.shape[0], 16):
        dw += dy[i : i + 16].to(wide).t() @ x[i : i + 16].to(wide)
    return dw.to(w.dtype)


def in_io_dtype(dy: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """dw, row by row, the sum kept in the dtype of the input."""
    dw = torch.zeros(w.shape, dtype=x.dtype)
    for i in range(x.shape[0]):
        dw += torch.outer(dy[i], x[i]).to(x.dtype)
    return dw


def tail_of_columns(dy: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """dx, whose columns behind the last full block of 64 are never written."""
    dx = torch.zeros_like(x)
    part = full_blocks(w, 1, 64)
    dx[:, : part.shape[1]] = dy @ part
    return dx


def guessed(dy: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """dx by weights whose orientation is read off their shape: either fits a square."""
    return dy @ (w.t() if w.shape[1] == dy.shape[1] else w)


def by_list_of_blocks(dy: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """dx, concatenated from blocks of 64 rows: there are none in an empty batch."""
    return torch.cat([dy[i : i + 64] @ w for i in range(0, dy.shape[0], 64)])


def off_by_one(ctx: Any, dy: Tensor, x: Tensor, w: Tensor) -> Grads:
    """The gradient of the weights is asked for by the flag of the bias."""
    needs = ctx.needs_input_grad
    return (
        dy @ w if needs[0] else None,
        dy.t() @ x if needs[2] else None,
        dy.sum(0) if needs[2] else None,
    )


def early_out(ctx: Any, dy: Tensor, x: Tensor, w: Tensor) -> Grads:
    """Nothing to do where the input needs no gradient."""
    return right(ctx, dy, x, w) if ctx.needs_input_grad[0] else (None, None, None)


def bias_with_weights(ctx: Any, dy: Tensor, x: Tensor, w: Tensor) -> Grads:
    """The gradient of the bias comes out of the kernel of the weights, which runs only for them."""
    dx, dw, db = right(ctx, dy, x, w)
    return dx, dw, db if ctx.needs_input_grad[1] else None


def by_shape(found: bool) -> Callable[..., Tensor]:
    """A linear layer without bias; at fault, its gradients are found by the shape of what they are for."""

    class Linear(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cpu")
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return F.linear(x, w)

        @staticmethod
        @torch.amp.custom_bwd(device_type="cpu")
        @once_differentiable
        def backward(ctx: Any, dy: Tensor) -> Grads:
            x, w = ctx.saved_tensors
            grads = (dy @ w, dy.t() @ x)
            if found:
                table = {g.shape: g for g in grads}
                return table[x.shape], table[w.shape]
            return grads

    return Linear.apply


def scaled(factor: float) -> Callable[..., Tensor]:
    """A layer whose weights are scaled in forward and, consistently, in backward."""

    def backward(ctx: Any, dy: Tensor, x: Tensor, w: Tensor) -> Grads:
        return (dy @ w) * factor, (dy.t() @ x) * factor, dy.sum(0)

    return linear(backward, lambda x, w, b: F.linear(x, w * factor, b))


def fault(name: str, kind: str, fn: Callable[..., Tensor], *caught_by: str) -> Fault:
    """A fault of a linear layer with bias."""
    return Fault(name=name, family="linear", kind=kind, inputs=INPUTS, fn=fn, reference=F.linear, caught_by=caught_by)


FAULTS = [
    fault("linear dw twice", "value", changed(1, lambda dy, x, w: 2 * (dy.t() @ x)), "gradient_value"),
    fault("linear db negative", "value", changed(2, lambda dy, x, w: -dy.sum(0)), "gradient_value"),
    fault("linear dw from 256 rows at most", "shape", changed(1, lambda dy, x, w: dy[:256].t() @ x[:256]), "sizes"),
    fault("linear dx from 1024 columns at most", "shape", changed(0, lambda dy, x, w: dy[:, :1024] @ w[:1024]), "sizes"),
    fault("linear db mean for sum", "value", changed(2, lambda dy, x, w: dy.mean(0)), "gradient_value"),
    fault("linear dw off by 1e-6", "value", changed(1, lambda dy, x, w: (dy.t() @ x) * (1 + 1e-6)), "gradient_value"),
    Fault(
        name="tied weights without their second use",
        family="linear",
        kind="value",
        inputs="x: B N, w: M N -> B N",
        fn=tied(both=False),
        reference=lambda x, w: x @ w.t() @ w,
        caught_by=("gradient_value",),
    ),
    fault("linear db missing", "contract", linear(lambda c, dy, x, w: (dy @ w, dy.t() @ x, None)), "gradient_value"),
    fault("linear dx transposed when square", "shape", changed(0, guessed), "sizes", "gradient_value"),
    fault(
        "linear dw without the tail of 16 rows",
        "shape",
        changed(1, lambda dy, x, w: full_blocks(dy, 0, 16).t() @ full_blocks(x, 0, 16)),
        "sizes",
    ),
    fault(
        "linear db without the tail of 32 rows", "shape", changed(2, lambda dy, x, w: full_blocks(dy, 0, 32).sum(0)), "sizes"
    ),
    fault("linear dx without the tail of 64 columns", "shape", changed(0, tail_of_columns), "sizes"),
    fault("linear dx of the first 128 outputs", "shape", changed(0, lambda dy, x, w: dy[:, :128] @ w[:128]), "sizes"),
    fault(
        "linear db of a squeezed batch of one",
        "shape",
        changed(2, lambda dy, x, w: dy.squeeze(0).sum(0).expand(w.shape[0])),
        "sizes",
    ),
    fault("linear dx of an empty batch raises", "shape", changed(0, by_list_of_blocks), "sizes"),
    Fault(
        name="linear gradients found by shape",
        family="linear",
        kind="shape",
        inputs=PLAIN,
        fn=by_shape(True),
        reference=F.linear,
        caught_by=("sizes", "gradient_value"),
    ),
    fault("linear needs_input_grad off by one", "contract", linear(off_by_one), "grad_subsets"),
    fault("linear returns early without dx", "contract", linear(early_out), "grad_subsets"),
    fault("linear db only with dw", "contract", with_setup(bias_with_weights), "grad_subsets"),
    fault("linear dw summed in the input dtype", "precision", changed(1, in_io_dtype), "dtypes"),
    fault(
        "linear cotangent rounded to bfloat16 in float32",
        "precision",
        changed(0, lambda dy, x, w: (dy.bfloat16().float() if dy.dtype == torch.float32 else dy) @ w),
        "dtypes",
    ),
    fault(
        "linear dw 1 % off in half dtypes",
        "precision",
        changed(1, lambda dy, x, w: (dy.t() @ x) * (1.01 if x.dtype in HALF else 1)),
        "dtypes",
    ),
    fault("linear backward raises under autocast", "autocast", with_setup(cast=False), "autocast"),
    fault("linear forward 0.1 % off, gradient consistent", "forward", scaled(1.001), "forward_value"),
]


def twin(name: str, fn: Callable[..., Tensor]) -> Twin:
    """A right linear layer with bias."""
    return Twin(name=name, family="linear", inputs=INPUTS, fn=fn, reference=F.linear)


TWINS = [
    twin("linear", linear()),
    twin("linear with setup_context", with_setup()),
    twin("linear dw in blocks of 16 rows", changed(1, right_in_blocks)),
    Twin(
        name="tied weights",
        family="linear",
        inputs="x: B N, w: M N -> B N",
        fn=tied(),
        reference=lambda x, w: x @ w.t() @ w,
    ),
    Twin(name="linear without bias", family="linear", inputs=PLAIN, fn=by_shape(False), reference=F.linear),
]
