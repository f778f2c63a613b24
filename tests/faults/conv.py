"""Faults and twins of convolutions: one dimension by unfolding, two by `torch.nn.grad`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from faults.record import Fault, Twin

ONE = "x: B 4 L, w: 6 4 3, b: 6"
GROUPED = "x: B 4 L, w: 6 2 3, b: 6"
TWO = "x: B 3 5 6, w: 4 3 3 3"
HALF = (torch.float16, torch.bfloat16)
PAD = 1
Grads = tuple[Tensor | None, ...]


def up(t: Tensor) -> Tensor:
    """In the precision of the computation."""
    return t.float() if t.dtype in HALF else t


def columns(x: Tensor, kernel: int, stride: int, groups: int) -> Tensor:
    """What every output reads: B G C/G L' K."""
    b, c, _ = x.shape
    cols = F.pad(x, (PAD, PAD)).unfold(2, kernel, stride)
    return cols.reshape(b, groups, c // groups, *cols.shape[2:])


def input_gradient(dy: Tensor, w: Tensor, length: int, stride: int, groups: int) -> Tensor:
    """Each output's cotangent, spread over what it read."""
    b, _, outs = dy.shape
    out, c, kernel = w.shape
    dyg = dy.reshape(b, groups, out // groups, outs)
    wg = w.reshape(groups, out // groups, c, kernel)
    dx = dy.new_zeros(b, groups, c, length + 2 * PAD)
    for k in range(kernel):
        dx[..., k : k + stride * outs : stride][..., :outs] += torch.einsum("bgol,goc->bgcl", dyg, wg[..., k])
    return dx.reshape(b, groups * c, length + 2 * PAD)


def crop(dx: Tensor, length: int) -> Tensor:
    """The padding taken off."""
    return dx.narrow(2, PAD, length)


def weight_gradient(dy: Tensor, cols: Tensor) -> Tensor:
    """O C/G K."""
    b, groups, c, outs, kernel = cols.shape
    dw = torch.einsum("bgol,bgclk->gock", dy.reshape(b, groups, dy.shape[1] // groups, outs), cols)
    return dw.reshape(-1, c, kernel)


def bias_gradient(dy: Tensor) -> Tensor:
    """Summed over images and places."""
    return dy.sum((0, 2))


def conv1d(
    stride: int = 1,
    groups: int = 1,
    dx: Callable[..., Tensor] = input_gradient,
    dw: Callable[..., Tensor] = weight_gradient,
    db: Callable[[Tensor], Tensor] = bias_gradient,
    crop: Callable[[Tensor, int], Tensor] = crop,
) -> Callable[..., Tensor]:
    """A convolution over one dimension, padded by one."""

    class Conv1d(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cpu")
        def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return F.conv1d(x, w, b, stride=stride, padding=PAD, groups=groups)

        @staticmethod
        @torch.amp.custom_bwd(device_type="cpu")
        @once_differentiable
        def backward(ctx: Any, dy: Tensor) -> Grads:
            x, w = ctx.saved_tensors
            needs, g = ctx.needs_input_grad, up(dy.to(x.dtype))
            return (
                crop(dx(g, up(w), x.shape[2], stride, groups), x.shape[2]).to(x.dtype) if needs[0] else None,
                dw(g, columns(up(x), w.shape[2], stride, groups)).to(x.dtype) if needs[1] else None,
                db(g).to(x.dtype) if needs[2] else None,
            )

    return Conv1d.apply


def dx2d(dy: Tensor, w: Tensor, shape: torch.Size) -> Tensor:
    """The full correlation with the kernel turned around."""
    return F.conv2d(dy, w.transpose(0, 1).flip(2, 3), padding=w.shape[2] - 1 - PAD)


def dw2d(dy: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
    """What torch has."""
    return torch.nn.grad.conv2d_weight(x, shape, dy, padding=PAD)


def conv2d(
    dx: Callable[..., Tensor] = dx2d,
    dw: Callable[..., Tensor] = dw2d,
    read: Callable[[Tensor], Tensor] = lambda dy: dy,
) -> Callable[..., Tensor]:
    """A convolution over two dimensions, padded by one."""

    class Conv2d(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor, w: Tensor) -> Tensor:
            return F.conv2d(x, w, padding=PAD)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dy: Tensor) -> Grads:
            x, w = ctx.saved_tensors
            g = up(read(dy).to(x.dtype))
            return (
                dx(g, up(w), x.shape).to(x.dtype) if ctx.needs_input_grad[0] else None,
                dw(g, up(x), w.shape).to(x.dtype) if ctx.needs_input_grad[1] else None,
            )

    return Conv2d.apply


def stride_ignored(dy: Tensor, w: Tensor, length: int, stride: int, groups: int) -> Tensor:
    """Spread as if the stride were one."""
    return input_gradient(dy, w, length, 1, groups)


def length_from_output(dy: Tensor, w: Tensor, length: int, stride: int, groups: int) -> Tensor:
    """The length worked out from the output's: what no output reads is not there."""
    return input_gradient(dy, w, (dy.shape[2] - 1) * stride + w.shape[2] - 2 * PAD, stride, groups)


def first_group(dy: Tensor, cols: Tensor) -> Tensor:
    """Every group reads the first group's input."""
    return weight_gradient(dy, cols[:, :1].expand_as(cols))


def not_flipped(dy: Tensor, w: Tensor, shape: torch.Size) -> Tensor:
    """The kernel as it is."""
    return F.conv2d(dy, w.transpose(0, 1), padding=w.shape[2] - 1 - PAD)


def chunks_of_images(dy: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
    """In chunks of 32 images, the last one only if it is full, or the only one."""
    n = len(x) if len(x) < 32 else len(x) // 32 * 32
    return dw2d(dy[:n], x[:n], shape)


def raw_channels_last(dy: Tensor) -> Tensor:
    """Memory as it lies, where it is dense."""
    if not dy.is_contiguous() and dy.is_contiguous(memory_format=torch.channels_last):
        return dy.permute(0, 2, 3, 1).reshape(dy.shape)
    return dy


def plain1d(stride: int = 1, groups: int = 1) -> Callable[..., Tensor]:
    """What torch does."""
    return partial(F.conv1d, stride=stride, padding=PAD, groups=groups)


def fault1d(name: str, fn: Any, *caught: str, stride: int = 1, groups: int = 1, kind: str = "value") -> Fault:
    """A fault in one dimension."""
    inputs = ONE if groups == 1 else GROUPED
    plain = plain1d(stride, groups)
    return Fault(name=name, family="conv", kind=kind, inputs=inputs, fn=fn, reference=plain, caught_by=caught)


def fault2d(name: str, fn: Any, *caught: str, kind: str = "value") -> Fault:
    """A fault in two dimensions."""
    plain = partial(F.conv2d, padding=PAD)
    return Fault(name=name, family="conv", kind=kind, inputs=TWO, fn=fn, reference=plain, caught_by=caught)


FAULTS = [
    fault1d("conv1d: padding off by one in dx", conv1d(crop=lambda dx, n: dx.narrow(2, PAD - 1, n)), "gradient_value", "sizes"),
    fault1d("conv1d: stride ignored in dx", conv1d(2, dx=stride_ignored), "gradient_value", "sizes", stride=2),
    fault1d(
        "conv1d: length of dx from the output's",
        conv1d(2, dx=length_from_output, crop=lambda dx, n: dx[:, :, PAD:-PAD]),
        "sizes",
        "gradient_value",
        stride=2,
        kind="shape",
    ),
    fault1d("conv1d: dw reads the first group", conv1d(groups=2, dw=first_group), "gradient_value", groups=2),
    fault1d("conv1d: db of one image", conv1d(db=lambda dy: dy[:1].sum((0, 2))), "gradient_value", "sizes"),
    fault2d("conv2d: kernel not flipped in dx", conv2d(dx=not_flipped), "gradient_value"),
    fault2d("conv2d: dw without the last images of 32", conv2d(dw=chunks_of_images), "sizes", kind="shape"),
    fault2d("conv2d: channels_last cotangent in raw order", conv2d(read=raw_channels_last), "cotangent_layout", kind="layout"),
]
TWINS = [
    Twin(name="conv1d", family="conv", inputs=ONE, fn=conv1d(), reference=plain1d()),
    Twin(
        name="conv1d: stride 2, 2 groups", family="conv", inputs=GROUPED, fn=conv1d(2, 2), reference=plain1d(stride=2, groups=2)
    ),
    Twin(name="conv2d", family="conv", inputs=TWO, fn=conv2d(), reference=partial(F.conv2d, padding=PAD)),
]
