"""Shuffles: pixel_shuffle (channels to space), pixel_unshuffle (space to channels) and channel_shuffle.

Maths     pixel_shuffle     y[…,c,hr + a,wr + b]  = x[…,(c,a,b),h,w]      dx = pixel_unshuffle(dy, r)
          pixel_unshuffle   y[…,(c,a,b),h,w]      = x[…,c,hr + a,wr + b]  dx = pixel_shuffle(dy, r)
          channel_shuffle   y[n,(k,i),…]          = x[n,(i,k),…]          dx = channel_shuffle(dy, C / g)

          Each is y = P x with a permutation P. The gradient is Pᵀ dy, and Pᵀ = P⁻¹: the shuffle that undoes this one.
Letters   c, h, w channel, row and column; a, b in 0 … r − 1, r the factor; i runs over g groups, k over the C / g channels
          of each; (c,a,b) is the number c r² + a r + b, and (i,k) is i C/g + k
Numerics  elements are moved, none is changed; nothing is kept for backward
Source    Shi et al., arXiv 1609.05158, eq. 4 (pixel_shuffle); Zhang et al., arXiv 1707.01083, §3.1 (channel_shuffle)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.op import Op


def shuffle(x, r):
    return F.pixel_shuffle(x, r)


def unshuffle(x, r):
    if x.numel() == 0:  # torch returns x as it is, with the wrong shape
        *B, C, H, W = x.shape
        return x.reshape(*B, C * r * r, H // r, W // r)
    return F.pixel_unshuffle(x, r)


def shuffle_backward(dy, r):
    return unshuffle(dy, r)


def unshuffle_backward(dy, r):
    return shuffle(dy, r)


def channel_forward(x, groups):
    return F.channel_shuffle(x, groups)


def channel_backward(dy, groups):
    return F.channel_shuffle(dy, max(dy.shape[1] // groups, 1))


PIXEL_SHUFFLE_RULE = Rule("pixel_shuffle", shuffle, shuffle_backward, inputs="x", outputs="y")
PIXEL_UNSHUFFLE_RULE = Rule("pixel_unshuffle", unshuffle, unshuffle_backward, inputs="x", outputs="y")
CHANNEL_SHUFFLE_RULE = Rule("channel_shuffle", channel_forward, channel_backward, inputs="x", outputs="y")


def _check(op: Op, input: Tensor, name: str, value: Any) -> None:
    """Raise unless input is an image and the option a positive int."""
    op.check(input)
    if input.dim() < 3:
        raise ValueError(f"{op.name}: input has shape {tuple(input.shape)}; it needs at least 3 dimensions")
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{op.name}: {name}={value!r} must be an int of at least 1")


def pixel_shuffle(input: Tensor, upscale_factor: int, *, backend: str = "auto") -> Tensor:
    """Channels to space, as `torch.nn.functional.pixel_shuffle`: (C r², H, W) to (C, H r, W r).

    Args:
        input: (*B, C r², H, W), floating point.
        upscale_factor: r.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B, C, H r, W r).

    Raises:
        ValueError: the channels are not divisible by r², or the named backend cannot run the call.
        TypeError: the input is not a tensor of floating point.
    """
    _check(PIXEL_SHUFFLE, input, "upscale_factor", upscale_factor)
    if input.shape[-3] % upscale_factor**2:
        raise ValueError(
            f"pixel_shuffle: input {tuple(input.shape)} has {input.shape[-3]} channels; they must be divisible by the square "
            f"of upscale_factor={upscale_factor}"
        )
    return PIXEL_SHUFFLE_RULE(input, upscale_factor, backend=PIXEL_SHUFFLE.pick(PIXEL_SHUFFLE_RULE, backend, input))


def pixel_unshuffle(input: Tensor, downscale_factor: int, *, backend: str = "auto") -> Tensor:
    """Space to channels, as `torch.nn.functional.pixel_unshuffle`: (C, H r, W r) to (C r², H, W).

    Args:
        input: (*B, C, H r, W r), floating point.
        downscale_factor: r.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B, C r², H, W).

    Raises:
        ValueError: height or width is not divisible by r, or the named backend cannot run the call.
        TypeError: the input is not a tensor of floating point.
    """
    _check(PIXEL_UNSHUFFLE, input, "downscale_factor", downscale_factor)
    if input.shape[-2] % downscale_factor or input.shape[-1] % downscale_factor:
        raise ValueError(
            f"pixel_unshuffle: input {tuple(input.shape)} has height {input.shape[-2]} and width {input.shape[-1]}; they must "
            f"be divisible by downscale_factor={downscale_factor}"
        )
    return PIXEL_UNSHUFFLE_RULE(input, downscale_factor, backend=PIXEL_UNSHUFFLE.pick(PIXEL_UNSHUFFLE_RULE, backend, input))


def channel_shuffle(input: Tensor, groups: int, *, backend: str = "auto") -> Tensor:
    """Interleave the channels of the groups, as `torch.nn.functional.channel_shuffle`.

    Args:
        input: (N, C, …) with at least 3 dimensions, floating point.
        groups: the number of groups that the channels are in.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (N, C, …): the first channel of every group, then the second of every group, and so on.

    Raises:
        ValueError: the channels are not divisible by `groups`, or the named backend cannot run the call.
        TypeError: the input is not a tensor of floating point.
    """
    _check(CHANNEL_SHUFFLE, input, "groups", groups)
    if input.shape[1] % groups:
        raise ValueError(
            f"channel_shuffle: input {tuple(input.shape)} has {input.shape[1]} channels; they must be divisible by "
            f"groups={groups}"
        )
    return CHANNEL_SHUFFLE_RULE(input, groups, backend=CHANNEL_SHUFFLE.pick(CHANNEL_SHUFFLE_RULE, backend, input))


class PixelShuffle(nn.PixelShuffle):
    """`torch.nn.PixelShuffle` with the backward above; same arguments."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`

    def forward(self, input: Tensor) -> Tensor:
        return pixel_shuffle(input, self.upscale_factor, backend=self.backend)


class PixelUnshuffle(nn.PixelUnshuffle):
    """`torch.nn.PixelUnshuffle` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return pixel_unshuffle(input, self.downscale_factor, backend=self.backend)


class ChannelShuffle(nn.ChannelShuffle):
    """`torch.nn.ChannelShuffle` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return channel_shuffle(input, self.groups, backend=self.backend)


def shuffle_case(draw: Draw) -> Case:
    r = draw.choice((1, 2, 3))
    return Case((draw.tensor(*draw.batch(1), draw.size(most=2) * r * r, draw.size(most=3), draw.size(most=3)), r), {})


def unshuffle_case(draw: Draw) -> Case:
    r = draw.choice((1, 2, 3))
    return Case((draw.tensor(*draw.batch(1), draw.size(most=2), draw.size(most=3) * r, draw.size(most=3) * r), r), {})


def channel_case(draw: Draw) -> Case:
    groups = draw.choice((1, 2, 3))
    return Case((draw.tensor(draw.size(most=3), groups * draw.size(most=3), draw.size(most=4), *draw.batch(1)), groups), {})


def shuffle_reference(input: Tensor, upscale_factor: int) -> Tensor:
    r, (*B, C, H, W) = upscale_factor, input.shape
    x = input.reshape(*B, C // (r * r), r, r, H, W)  # … c a b h w
    return torch.einsum("...cabhw->...chawb", x).reshape(*B, C // (r * r), H * r, W * r)


def unshuffle_reference(input: Tensor, downscale_factor: int) -> Tensor:
    r, (*B, C, H, W) = downscale_factor, input.shape
    x = input.reshape(*B, C, H // r, r, W // r, r)  # … c h a w b
    return torch.einsum("...chawb->...cabhw", x).reshape(*B, C * r * r, H // r, W // r)


def channel_reference(input: Tensor, groups: int) -> Tensor:
    N, C, *X = input.shape
    return input.reshape(N, groups, C // groups, *X).transpose(1, 2).reshape(N, C, *X)


def shuffle_bench(draw: Draw) -> Case:
    return Case((draw.tensor(16, 256, 48, 48), 2), {})


def unshuffle_bench(draw: Draw) -> Case:
    return Case((draw.tensor(16, 64, 96, 96), 2), {})


def channel_bench(draw: Draw) -> Case:
    return Case((draw.tensor(32, 240, 28, 28), 3), {})


def _op(call: Any, reference: Any, peer: Any, rule: Rule, module: Any, **kw: Any) -> Op:
    return Op(
        name=rule.name,
        call=call,
        reference=reference,
        peer=peer,
        rules=(rule,),
        module=(module,),
        replaces=(module.__base__,),
        **kw,
    )


PIXEL_SHUFFLE = _op(
    pixel_shuffle,
    shuffle_reference,
    F.pixel_shuffle,
    PIXEL_SHUFFLE_RULE,
    PixelShuffle,
    shapes="input: *B Crr H W -> *B C Hr Wr",
    source="Shi et al. 2016, eq. 4",
    case=shuffle_case,
    bench=shuffle_bench,
)
PIXEL_UNSHUFFLE = _op(
    pixel_unshuffle,
    unshuffle_reference,
    F.pixel_unshuffle,
    PIXEL_UNSHUFFLE_RULE,
    PixelUnshuffle,
    shapes="input: *B C Hr Wr -> *B Crr H W",
    source="Shi et al. 2016, eq. 4",
    case=unshuffle_case,
    bench=unshuffle_bench,
)
CHANNEL_SHUFFLE = _op(
    channel_shuffle,
    channel_reference,
    F.channel_shuffle,
    CHANNEL_SHUFFLE_RULE,
    ChannelShuffle,
    shapes="input: *B -> *B",
    source="Zhang et al. 2018, §3.1",
    case=channel_case,
    bench=channel_bench,
)
OPS = (PIXEL_SHUFFLE, PIXEL_UNSHUFFLE, CHANNEL_SHUFFLE)
