"""What follows a convolution, fused: bias and activation in one pass, and in backward dz and the sums of db in one.

The convolution and its two gradients are matrix products, the vendor's. A tile is BC channels × BP positions, its last axis the
one that is dense in memory: channels in channels_last, else positions of an image.

forward    one program a tile
backward   a program walks over tiles of its channels and keeps its sums of db in registers; the partial sums, in float32, are
           added up afterwards: no atomics, the same bits every time
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bptoolkit.ops import conv
from bptoolkit.ops.conv_activation import convolution_gradients
from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.functions import activate, chain
from bptoolkit.triton_kernels.kernel import WARP, Kernel, computed_in_float32, dense, programs
from bptoolkit.triton_kernels.operator import operator

TILE = 2048  # elements
PER_THREAD = 8  # elements of a tile


@triton.jit
def along(n, LAST: tl.constexpr, POSITIONS: tl.constexpr):
    """A vector of channels or of positions as an axis of the tile: the last axis is the one that is dense in memory."""
    return n[:, None] if POSITIONS == LAST else n[None, :]


@triton.jit(do_not_specialize=["N"])
def forward_kernel(u, b, y, N, C, P, ACTIVATION: tl.constexpr, LAST: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    """u and y: (N, C, P), or (N, P, C) if LAST; dense."""
    i = tl.program_id(0).to(tl.int64)
    channels, tiles = tl.cdiv(C, BC), tl.cdiv(P, BP)
    c = along(i % channels * BC + tl.arange(0, BC), LAST, False)
    p = along(i // channels % tiles * BP + tl.arange(0, BP), LAST, True)
    at = i // channels // tiles * C * P + (p * C + c if LAST else c * P + p)
    mask = (c < C) & (p < P)
    Z = tl.load(u + at, mask, other=0.0).to(tl.float32)
    if b is not None:
        Z += tl.load(b + c, c < C, other=0.0).to(tl.float32)
    tl.store(y + at, activate(Z, ACTIVATION).to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["N"])
def backward_kernel(
    dy, t, b, dz, sums, N, C, P, ACTIVATION: tl.constexpr, LAST: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr
):
    """t is y for relu, u for the others, laid out as dy and dz. sums: (programs of axis 1, C)."""
    channels = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)  # BC
    c = along(channels, LAST, False)
    if b is not None:
        bias = tl.load(b + c, c < C, other=0.0).to(tl.float32)
    total = tl.zeros((BP, BC) if LAST else (BC, BP), tl.float32)
    tiles = tl.cdiv(P, BP)
    for i in range(tl.program_id(1), N * tiles, tl.num_programs(1)):
        n = (tl.zeros((), tl.int64) + i) // tiles
        p = along((tl.zeros((), tl.int64) + i) % tiles * BP + tl.arange(0, BP), LAST, True)
        at = n * C * P + (p * C + c if LAST else c * P + p)
        mask = (c < C) & (p < P)
        Z = tl.load(t + at, mask, other=0.0).to(tl.float32)
        if b is not None:
            Z += bias
        DZ = chain(tl.load(dy + at, mask, other=0.0).to(tl.float32), Z, ACTIVATION)
        if dz is not None:
            tl.store(dz + at, DZ.to(dz.dtype.element_ty), mask)
        if sums is not None:
            total += tl.where(mask, DZ, 0.0)  # an infinite bias would make a NaN of the 0 past the end
    if sums is not None:
        tl.store(sums + tl.program_id(1).to(tl.int64) * C + channels, tl.sum(total, 0 if LAST else 1), channels < C)


def is_last(t: Tensor) -> bool:
    """Whether channels, not positions, lie side by side."""
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def tile(C: int, P: int, last: bool, warp: int) -> tuple[dict[str, int], int]:
    """BP, BC and the number of warps, of `warp` threads each, for C channels and P positions that lie together."""
    row = min(triton.next_power_of_2(C if last else P), 512 if last else 1024)
    most = triton.next_power_of_2(P if last else C)
    column = min(TILE // row, most)
    sizes = {"BP": column, "BC": row} if last else {"BP": row, "BC": column}
    return sizes | {"LAST": last}, max(row * column // (PER_THREAD * warp), 1)


def _shape(t: Tensor, last: bool) -> tuple[int, int, int]:
    """N, C and P: in channels_last all samples are one row of positions."""
    N, C, H, W = t.shape
    return (1, C, N * H * W) if last else (N, C, H * W)


def _like(t: Tensor) -> Tensor:
    N, C, H, W = t.shape
    if is_last(t):
        return torch.empty(N, H, W, C, dtype=t.dtype, device=t.device).permute(0, 3, 1, 2)
    return torch.empty(N, C, H, W, dtype=t.dtype, device=t.device)


def _laid_out(t: Tensor, last: bool) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _launch_forward(u: Tensor, b: Tensor | None, activation: str) -> Tensor:
    y = _like(u)
    if u.numel():
        last = is_last(u)
        N, C, P = _shape(u, last)
        sizes, warps = tile(C, P, last, WARP)
        grid = (N * triton.cdiv(C, sizes["BC"]) * triton.cdiv(P, sizes["BP"]),)
        args = (_laid_out(u, last), dense(b), y, N, C, P)
        forward_kernel[grid](*args, activation, **sizes, num_warps=warps, enable_fp_fusion=True)
    return y


def _fake_forward(u, b, activation):
    return _like(u)


def _launch_backward(dy: Tensor, t: Tensor, b: Tensor | None, activation: str, need: list[bool]) -> tuple[Tensor, Tensor]:
    dz, db = _fake_backward(dy, t, b, activation, need)
    if not t.numel():
        return dz, db.zero_()
    last = is_last(t)
    N, C, P = _shape(t, last)
    sizes, warps = tile(C, P, last, WARP)
    channels, tiles = triton.cdiv(C, sizes["BC"]), triton.cdiv(P, sizes["BP"])
    Q = min(N * tiles, max(programs(t.device, warps) // channels, 1))
    sums = torch.empty(Q, C, dtype=torch.float32, device=t.device) if need[1] else None
    args = (_laid_out(dy, last), _laid_out(t, last), dense(b), dz if need[0] else None, sums, N, C, P)
    backward_kernel[(channels, Q)](*args, activation, **sizes, num_warps=warps, enable_fp_fusion=True)
    if need[1]:
        torch.sum(sums, 0, out=db)
    return dz, db


def _fake_backward(dy, t, b, activation, need):
    dz = _like(t) if need[0] else torch.empty(0, dtype=t.dtype, device=t.device)
    return dz, torch.empty(t.shape[1] if need[1] else 0, dtype=torch.float32, device=t.device)


FORWARD = operator("triton_conv_activation", _launch_forward, _fake_forward)
BACKWARD = operator("triton_conv_activation_backward", _launch_backward, _fake_backward)


def relu_forward(x, w, b, stride, padding, dilation, tail, groups):
    return forward(x, w, b, stride, padding, dilation, tail, groups, "relu")[0]


def relu_backward(dy, x, w, y, stride, padding, dilation, tail, groups, need):
    return backward(dy, None, x, w, None, y, stride, padding, dilation, tail, groups, "relu", need)


def forward(x, w, b, stride, padding, dilation, tail, groups, activation):
    u = conv.forward(x, w, None, stride, padding, dilation, tail, groups)
    return FORWARD(u, b, activation), u


def backward(dy, du, x, w, b, u, stride, padding, dilation, tail, groups, activation, need):
    dz = db = None
    if dy is not None:
        through = need.x or need.w
        dz, db = BACKWARD(dy, u, b, activation, [through, need.b])
        dz, db = dz if through else None, db.to(dy.dtype) if need.b else None
    return *convolution_gradients(dz, du, x, w, stride, padding, dilation, tail, groups, need), db


def unsupported(x: Tensor, *_) -> str | None:
    """Why the kernel cannot take the call, or None."""
    return computed_in_float32(x)


KERNEL = Kernel(forward, backward, unsupported)
RELU = Kernel(relu_forward, relu_backward, unsupported)


def specs(warp: int) -> list[Spec]:
    """The kernels at the shipped configurations: both layouts, rows of positions or channels that are long and short."""
    every = []
    for t in ("bf16", "fp32"):
        for last, C, P in ((False, 64, 56 * 56), (False, 512, 64), (True, 64, 56 * 56), (True, 2048, 64)):
            sizes, warps = tile(C, P, last, warp)
            for activation in ("relu", "gelu"):
                name = f"{activation} {t} {f'{P}×{C}' if last else f'{C}×{P}'}"
                pointers = dict.fromkeys(("u", "b", "y"), f"*{t}")
                types = pointers | dict.fromkeys(("N", "C", "P"), "i32")
                constants = sizes | {"ACTIVATION": activation}
                aligned = (*pointers, "C", "P")
                every.append(Spec(f"conv_activation {name}", forward_kernel, types, constants, aligned, warps))
                pointers = dict.fromkeys(("dy", "t", "dz"), f"*{t}") | {"sums": "*fp32"}
                pointers |= {} if activation == "relu" else {"b": f"*{t}"}
                types = pointers | dict.fromkeys(("N", "C", "P"), "i32")
                constants |= {"b": None} if activation == "relu" else {}
                aligned = (*pointers, "C", "P")
                every.append(Spec(f"conv_activation backward {name}", backward_kernel, types, constants, aligned, warps))
    return every
