"""Causal depthwise convolution, fused with its activation, both directions. For the maths see the op of this name.

A thread walks along the sequence with the last K values of x, and in backward of dz, in registers: every element is read
once and every z computed once. The tile is one column of BD channels, a step W positions:

channels last      a column of one position lies dense in memory, and the threads of a warp are channels that are neighbours
otherwise          a thread reads V neighbouring positions of its channel at once, 16 bytes, and splits them into columns

forward    one program for BD channels × C positions of a sample, after K − 1 positions read again
backward   a program walks over pieces of C positions of BD channels, and then over K − 1 more, whose dz reaches back into the
           piece; its sums of dw and dc, in float32, are added up afterwards: no atomics, the same bits every time
"""

# ruff: noqa: RUF005 (Triton's language knows no stars)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bptoolkit.ops.causal_conv1d import RULE
from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.functions import activate, chain
from bptoolkit.triton_kernels.kernel import WARP, Kernel, computed_in_float32, dense, programs
from bptoolkit.triton_kernels.operator import operator

LONGEST = 8  # elements of a kernel, a register each for x, dz, dw
PIECE = 64  # positions that a thread walks at a time


@triton.jit
def columns(t, BD: tl.constexpr, V: tl.constexpr):
    """The V columns, 4 or 8, of a tile (BD, V), as a tuple."""
    even, odd = tl.split(tl.reshape(t, (BD, V // 2, 2)))  # BD V/2: columns 0 2 …, 1 3 …
    e0, e2 = tl.split(tl.reshape(even, (BD, V // 4, 2)))  # BD V/4: columns 0 4, 2 6
    o1, o3 = tl.split(tl.reshape(odd, (BD, V // 4, 2)))  # columns 1 5, 3 7
    if V == 4:
        found = (tl.reshape(e0, (BD,)), tl.reshape(o1, (BD,)), tl.reshape(e2, (BD,)), tl.reshape(o3, (BD,)))
    else:
        c0, c4 = tl.split(e0)
        c1, c5 = tl.split(o1)
        c2, c6 = tl.split(e2)
        c3, c7 = tl.split(o3)
        found = (c0, c1, c2, c3, c4, c5, c6, c7)
    return found


@triton.jit
def tile_of(c, BD: tl.constexpr, V: tl.constexpr):
    """The opposite."""
    if V == 4:
        even, odd = tl.join(c[0], c[2]), tl.join(c[1], c[3])  # BD 2
    else:
        even = tl.reshape(tl.join(tl.join(c[0], c[4]), tl.join(c[2], c[6])), (BD, 4))
        odd = tl.reshape(tl.join(tl.join(c[1], c[5]), tl.join(c[3], c[7])), (BD, 4))
    return tl.reshape(tl.join(even, odd), (BD, V))


@triton.jit
def each(position, channels):
    """The position, for each channel; the interpreter cannot put a scalar condition beside a block of them."""
    return tl.zeros(channels.shape, tl.int64) + position


@triton.jit
def load(t, channels, l, tl_, L, BD: tl.constexpr, V: tl.constexpr, S: tl.constexpr):
    """The S columns from position l on, in float32; t points to BD channels."""
    found = ()
    if V == 1:
        for s in tl.static_range(S):
            found = found + (tl.load(t + (l + s) * tl_, channels & (each(l + s, channels) < L), other=0.0).to(tl.float32),)
    else:
        for s in tl.static_range(0, S, V):
            v = l + s + tl.arange(0, V)  # V
            T = tl.load(t[:, None] + (v * tl_)[None, :], channels[:, None] & (v < L)[None, :], other=0.0)  # BD V
            found = found + columns(T.to(tl.float32), BD, V)
    return found


@triton.jit
def store(t, c, channels, l, least, L, tl_, BD: tl.constexpr, V: tl.constexpr, S: tl.constexpr):
    """The first S of the columns c, from position l on, where it is between `least` and L."""
    if V == 1:
        for s in tl.static_range(S):
            i = each(l + s, channels)
            tl.store(t + (l + s) * tl_, c[s].to(t.dtype.element_ty), channels & (i >= least) & (i < L))
    else:
        for s in tl.static_range(0, S, V):
            v = l + s + tl.arange(0, V)  # V
            T = tile_of(c[s : s + V], BD, V).to(t.dtype.element_ty)  # BD V
            tl.store(t[:, None] + (v * tl_)[None, :], T, channels[:, None] & ((v >= least) & (v < L))[None, :])


@triton.jit
def before(x, channels, l, xl, K: tl.constexpr):
    """The K − 1 columns before position l: 0 before the beginning."""
    found = ()
    for k in tl.static_range(K - 1):
        i = l - (K - 1) + k
        found = found + (tl.load(x + i * xl, channels & (each(i, channels) >= 0), other=0.0).to(tl.float32),)
    return found


@triton.jit
def preactivation(xs, ws, bias, K: tl.constexpr):
    """z from the last K columns of x."""
    z = bias
    for k in tl.static_range(K):
        z += ws[k] * xs[k]
    return z


@triton.jit
def weights(w, c, d, channels, D, K: tl.constexpr):
    """The K columns of w, dense (D, K), and c."""
    ws = ()
    for k in tl.static_range(K):
        ws = ws + (tl.load(w + d * K + k, channels, other=0.0).to(tl.float32),)
    bias = tl.zeros(d.shape, tl.float32)
    if c is not None:
        bias = tl.load(c + d, channels, other=0.0).to(tl.float32)
    return ws, bias


@triton.jit(do_not_specialize=["B"])
def forward_kernel(
    x, w, c, y, xb, xd, xl, yb, yd, yl, B, D, L,
    ACTIVATION: tl.constexpr, K: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, W: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    p, tiles = tl.program_id(0).to(tl.int64), tl.cdiv(D, BD)
    piece = p // tiles
    b, l0 = piece // tl.cdiv(L, C), piece % tl.cdiv(L, C) * C
    d = p % tiles * BD + tl.arange(0, BD)  # BD
    channels = d < D
    ws, bias = weights(w, c, d, channels, D, K)
    x += b * xb + d * xd
    y += b * yb + d * yd
    xs = before(x, channels, l0, xl, K)
    for l in range(l0, min(l0 + C, L), W):
        new = load(x, channels, l, xl, L, BD, V, W)
        ys = ()
        for s in tl.static_range(W):
            xs = xs + (new[s],)
            ys = ys + (activate(preactivation(xs, ws, bias, K), ACTIVATION),)
            xs = xs[1:]
        store(y, ys, channels, l, 0, L, yl, BD, V, W)


@triton.jit
def advance(x, dy, xs, dzs, ws, bias, ACTIVATION: tl.constexpr, K: tl.constexpr):
    """One position further: the last K columns of x and of dz, and dx K − 1 positions back."""
    xs = xs + (x,)
    dzs = dzs + (chain(dy, preactivation(xs, ws, bias, K), ACTIVATION),)
    dx = dzs[0] * ws[K - 1]
    for k in tl.static_range(1, K):
        dx += dzs[k] * ws[K - 1 - k]
    return xs, dzs, dx


@triton.jit(do_not_specialize=["B"])
def backward_kernel(
    dy, x, w, c, dx, sums, dyb, dyd, dyl, xb, xd, xl, dxb, dxd, dxl, B, D, L,
    ACTIVATION: tl.constexpr, K: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, W: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(0).to(tl.int64) * BD + tl.arange(0, BD)  # BD
    channels = d < D
    ws, bias = weights(w, c, d, channels, D, K)
    total = ()  # K + 1 sums: of dw and of dc
    for _ in tl.static_range(K + 1):
        total = total + (tl.zeros((BD,), tl.float32),)
    pieces = tl.cdiv(L, C)
    LAG: tl.constexpr = K - 1 if V == 1 else W  # dx is K − 1 positions behind, and is written V at a time
    for piece in range(tl.program_id(1), B * pieces, tl.num_programs(1)):
        b = (tl.zeros((), tl.int64) + piece) // pieces
        l0 = ((tl.zeros((), tl.int64) + piece) % pieces) * C
        from_x, from_dy = x + b * xb + d * xd, dy + b * dyb + d * dyd
        end = l0 + tl.cdiv(min(C, L - l0), W) * W
        xs = before(from_x, channels, l0, xl, K)
        dzs, dxs = (), ()
        for _ in tl.static_range(K - 1):
            dzs = dzs + (tl.zeros((BD,), tl.float32),)
        for _ in tl.static_range(LAG - K + 1):
            dxs = dxs + (tl.zeros((BD,), tl.float32),)
        for l in range(l0, end, W):
            new_x = load(from_x, channels, l, xl, L, BD, V, W)
            new_dy = load(from_dy, channels, l, dyl, L, BD, V, W)
            for s in tl.static_range(W):
                xs, dzs, new_dx = advance(new_x[s], new_dy[s], xs, dzs, ws, bias, ACTIVATION, K)
                dxs = dxs + (new_dx,)
                if sums is not None:
                    total = summed(total, dzs[K - 1], xs, K)
                xs, dzs = xs[1:], dzs[1:]
            if dx is not None:
                store(dx + b * dxb + d * dxd, dxs, channels, l - LAG, l0, L, dxl, BD, V, W)
            dxs = dxs[W:]
        if dx is not None:  # the K − 1 positions that see the last ones; they are another piece's to sum up
            new_x = load(from_x, channels, end, xl, L, BD, 1, K - 1)
            new_dy = load(from_dy, channels, end, dyl, L, BD, 1, K - 1)
            for s in tl.static_range(K - 1):
                xs, dzs, new_dx = advance(new_x[s], new_dy[s], xs, dzs, ws, bias, ACTIVATION, K)
                dxs = dxs + (new_dx,)
                xs, dzs = xs[1:], dzs[1:]
            store(dx + b * dxb + d * dxd, dxs, channels, end - LAG, l0, L, dxl, BD, V, LAG)
    if sums is not None:
        for k in tl.static_range(K + 1):
            tl.store(sums + (tl.program_id(1).to(tl.int64) * (K + 1) + k) * D + d, total[k], channels)


@triton.jit
def summed(total, dz, xs, K: tl.constexpr):
    new = ()
    for k in tl.static_range(K):
        new = new + (total[k] + dz * xs[k],)
    return new + (total[K] + dz,)


def is_last(x: Tensor) -> bool:
    """Whether channels, not positions, lie side by side."""
    return x.stride(1) == 1 and x.stride(2) != 1


def tile(D: int, K: int, last: bool, size: int, warp: int) -> tuple[dict[str, int], int]:
    """BD, C, W, V and the number of warps, of `warp` threads each, for elements of `size` bytes."""
    V, W, per_thread, most = (1, 4, 4 if K <= 4 else 2, 256) if last else (16 // size, 32 // size, 1, 128)
    BD = min(max(triton.next_power_of_2(D), per_thread * warp), most)
    return {"BD": BD, "C": PIECE, "W": W, "V": V}, BD // (per_thread * warp)


def _like(x: Tensor) -> Tensor:
    B, D, L = x.shape
    if is_last(x):
        return torch.empty(B, L, D, dtype=x.dtype, device=x.device).transpose(1, 2)
    return torch.empty(B, D, L, dtype=x.dtype, device=x.device)


def _laid_out(t: Tensor, last: bool) -> Tensor:
    """t, or a copy, whose channels or positions lie side by side: addresses of any strides make registers spill."""
    if t.stride(1 if last else 2) == 1:
        return t
    return t.transpose(1, 2).contiguous().transpose(1, 2) if last else t.contiguous()


def _launch_forward(x: Tensor, w: Tensor, c: Tensor | None, activation: str) -> Tensor:
    (B, D, L), K, y = x.shape, w.shape[1], _like(x)
    if x.numel():
        last = is_last(x)
        x, (sizes, warps) = _laid_out(x, last), tile(D, K, last, x.element_size(), WARP)
        grid = (B * triton.cdiv(D, sizes["BD"]) * triton.cdiv(L, PIECE),)
        args = (x, w.contiguous(), dense(c), y, *x.stride(), *y.stride(), B, D, L)
        forward_kernel[grid](*args, activation, K, **sizes, num_warps=warps, enable_fp_fusion=True)
    return y


def _fake_forward(x, w, c, activation):
    return _like(x)


def _launch_backward(
    dy: Tensor, x: Tensor, w: Tensor, c: Tensor | None, activation: str, need: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    (B, D, L), K = x.shape, w.shape[1]
    dx, dw, dc = _fake_backward(dy, x, w, c, activation, need)
    if not x.numel():
        return dx, dw.zero_(), dc.zero_()
    last = is_last(x)
    dy, x, (sizes, warps) = _laid_out(dy, last), _laid_out(x, last), tile(D, K, last, x.element_size(), WARP)
    tiles = triton.cdiv(D, sizes["BD"])
    P = min(B * triton.cdiv(L, PIECE), max(programs(x.device, warps) // tiles, 1))
    sums = torch.empty(P, K + 1, D, dtype=torch.float32, device=x.device) if need[1] or need[2] else None
    strides = (*dy.stride(), *x.stride(), *(dx.stride() if need[0] else (0, 0, 0)))
    args = (dy, x, w.contiguous(), dense(c), dx if need[0] else None, sums, *strides, B, D, L)
    backward_kernel[(tiles, P)](*args, activation, K, **sizes, num_warps=warps, enable_fp_fusion=True)
    if need[1]:
        torch.sum(sums[:, :K], 0, out=dw)
    if need[2]:
        torch.sum(sums[:, K], 0, out=dc)
    return dx, dw, dc


def _fake_backward(dy, x, w, c, activation, need):
    D, K = w.shape
    dx = _like(x) if need[0] else torch.empty(0, dtype=x.dtype, device=x.device)
    dw = torch.empty((K, D) if need[1] else (0,), dtype=torch.float32, device=x.device)
    dc = torch.empty(D if need[2] else 0, dtype=torch.float32, device=x.device)
    return dx, dw, dc


def _forward_flops(x, w, c, activation, *, out_shape=None, **_) -> int:
    return 2 * w[1] * x[0] * x[1] * x[2]


def _backward_flops(dy, x, w, c, activation, need, *, out_shape=None, **_) -> int:
    return (need[0] + need[1] + (activation != "identity")) * _forward_flops(x, w, c, activation)


FORWARD = operator("triton_causal_conv1d", _launch_forward, _fake_forward, flops=_forward_flops)
BACKWARD = operator("triton_causal_conv1d_backward", _launch_backward, _fake_backward, flops=_backward_flops)


def forward(x, w, c):
    return FORWARD(x, w, c, "identity")


def silu_forward(x, w, c):
    return FORWARD(x, w, c, "silu")


def backward(dy, x, w, need):
    if not need.w:
        if not need.x:
            return None, None, RULE.backward(dy, x, w, need)[2]  # neither x nor w has been kept
        x = dy  # x has not been kept, and dx is not a function of it
    return _gradients(dy, x, w, None, "identity", need)


def silu_backward(dy, x, w, c, need):
    return _gradients(dy, x, w, c, "silu", need)


def _gradients(dy, x, w, c, activation, need):
    dx, dw, dc = BACKWARD(dy, x, w, c, activation, list(need))
    dw = dw.t().contiguous().to(w.dtype) if need.w else None
    return dx if need.x else None, dw, dc.to(dy.dtype) if need.c else None


def unsupported(x: Tensor, w: Tensor, c: Tensor | None) -> str | None:
    """Why the kernel cannot take the call, or None."""
    K = w.shape[1]
    if not 2 <= K <= LONGEST:
        return f"the fused kernel takes kernels of 2 to {LONGEST} elements, which it holds in registers, not {K}"
    return computed_in_float32(x)


KERNEL = Kernel(forward, backward, unsupported)
SILU = Kernel(silu_forward, silu_backward, unsupported)


def specs(warp: int) -> list[Spec]:
    """The kernels at the shipped configurations: both layouts, the usual kernel and the longest, few channels."""
    every = []
    for t, size in (("bf16", 2), ("fp32", 4)):
        for last, K, D in ((False, 4, 1024), (False, LONGEST, 1024), (False, 4, 8), (True, 4, 1024), (True, LONGEST, 1024)):
            sizes, warps = tile(D, K, last, size, warp)
            one, other = ("d", "l") if last else ("l", "d")
            narrow = "a thread holds K columns of each channel: 4 or 2 channels, or registers spill" if last else ""
            name = f"{t} {'channels last ' if last else ''}K={K} D={D}"
            for label, kernel, read, write in (
                (f"causal_conv1d {name}", forward_kernel, ("x",), ("y",)),
                (f"causal_conv1d backward {name}", backward_kernel, ("dy", "x"), ("dx",)),
            ):
                pointers = dict.fromkeys((*read, "w", "c", *write), f"*{t}")
                pointers |= {"sums": "*fp32"} if kernel is backward_kernel else {}
                strides = [s for tensor in (*read, *write) for s in (f"{tensor}b", f"{tensor}{other}")]
                types = pointers | dict.fromkeys((*strides, "B", "D", "L"), "i32")
                constants = {f"{tensor}{one}": 1 for tensor in (*read, *write)} | sizes | {"K": K, "ACTIVATION": "silu"}
                aligned = (*pointers, *strides, "D", "L") if D % 16 == 0 else (*pointers, *strides, "L")
                every.append(Spec(label, kernel, types, constants, aligned, warps, narrow=narrow))
    return every
