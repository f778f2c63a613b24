"""Softmax, log-softmax and softmin along one dimension, fused. For the maths see the op of this name.

A tensor is A C I, with the dimension in the middle; a line is the C elements of one (a, i). Where I is 1 the lines of a tile
follow one another in A, else in I, along which memory is read then.

held     a tile of BM lines × BC ≥ C elements in registers: every tensor is read once
looped   longer lines pass by in tiles, twice: once for their sums, once for the result
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.elementary import log1p
from bptoolkit.triton_kernels.kernel import WARP, Kernel, computed_in_float32
from bptoolkit.triton_kernels.lines import gather, join, lines, place, programs
from bptoolkit.triton_kernels.operator import operator

HELD = 16384  # elements of a tile that is held: 16 a thread; twice as many would spill in backward
TILE = 2048  # elements, for lines that are shorter than that
PASSING = 4096  # elements of a tile that passes by
ALONG = 32  # neighbours in I that a tile has where it can: the bytes of one access to memory
PER_THREAD = 16  # elements of a tile


@triton.jit
def finite(X, mask, KIND: tl.constexpr):
    """The elements that softmax is of, −∞ outside the tensor."""
    X = X.to(tl.float32)
    if KIND == "softmin":
        X = -X
    return tl.where(mask, X, float("-inf"))


@triton.jit(do_not_specialize=["A"])
def forward_kernel(x, y, xa, xc, xi, A, C, I, KIND: tl.constexpr, DENSE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    a, i, rows = place(tl.program_id(0), A, I, DENSE, BM)  # BM
    c = tl.arange(0, BC)  # BC
    mask = rows[:, None] & (c < C)[None, :]
    c = c.to(tl.int64)
    X = finite(tl.load(x + (a * xa + i * xi)[:, None] + c[None, :] * xc, mask, other=0.0), mask, KIND)  # BM BC
    X -= tl.max(X, 1)[:, None]
    E = tl.exp(X)  # BM BC
    s = tl.sum(E, 1)  # BM
    if KIND == "log_softmax":
        Y = X - tl.log(s)[:, None]
    else:
        Y = E * (1 / s)[:, None]
    tl.store(y + (a * C * I + i)[:, None] + c[None, :] * I, Y.to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["A"])
def long_forward_kernel(x, y, xa, xc, xi, A, C, I, KIND: tl.constexpr, DENSE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    a, i, rows = place(tl.program_id(0), A, I, DENSE, BM)  # BM
    M = tl.full((BM, BC), float("-inf"), tl.float32)
    S = tl.zeros((BM, BC), tl.float32)
    for j in range(0, C, BC):
        c = j + tl.arange(0, BC)  # BC
        mask = rows[:, None] & (c < C)[None, :]
        c = c.to(tl.int64)
        X = finite(tl.load(x + (a * xa + i * xi)[:, None] + c[None, :] * xc, mask, other=0.0), mask, KIND)  # BM BC
        M, S = join(M, S, X)
    m, s = gather(M, S)  # BM
    if KIND == "log_softmax":
        s = log1p(s)
    else:
        s = 1 / (1 + s)
    for j in range(0, C, BC):
        c = j + tl.arange(0, BC)
        mask = rows[:, None] & (c < C)[None, :]
        c = c.to(tl.int64)
        X = finite(tl.load(x + (a * xa + i * xi)[:, None] + c[None, :] * xc, mask, other=0.0), mask, KIND) - m[:, None]
        if KIND == "log_softmax":
            Y = X - s[:, None]
        else:
            Y = tl.exp(X) * s[:, None]
        tl.store(y + (a * C * I + i)[:, None] + c[None, :] * I, Y.to(y.dtype.element_ty), mask)


@triton.jit
def slope(Y, DY, t, KIND: tl.constexpr):
    """dx from y and dy, t = Σ y dy; or of log-softmax Σ dy."""
    if KIND == "log_softmax":
        DX = DY - tl.exp(Y) * t[:, None]
    elif KIND == "softmax":
        DX = Y * (DY - t[:, None])
    else:
        DX = Y * (t[:, None] - DY)
    return DX


@triton.jit(do_not_specialize=["A"])
def backward_kernel(
    dy, y, dx, da, dc, di, ya, yc, yi, A, C, I, KIND: tl.constexpr, DENSE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr
):
    a, i, rows = place(tl.program_id(0), A, I, DENSE, BM)  # BM
    c = tl.arange(0, BC)  # BC
    mask = rows[:, None] & (c < C)[None, :]
    c = c.to(tl.int64)
    DY = tl.load(dy + (a * da + i * di)[:, None] + c[None, :] * dc, mask, other=0.0).to(tl.float32)  # BM BC
    Y = tl.load(y + (a * ya + i * yi)[:, None] + c[None, :] * yc, mask, other=0.0).to(tl.float32)  # BM BC
    if KIND == "log_softmax":
        t = tl.sum(DY, 1)  # BM
    else:
        t = tl.sum(Y * DY, 1)
    DX = slope(Y, DY, t, KIND)
    tl.store(dx + (a * C * I + i)[:, None] + c[None, :] * I, DX.to(dx.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["A"])
def long_backward_kernel(
    dy, y, dx, da, dc, di, ya, yc, yi, A, C, I, KIND: tl.constexpr, DENSE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr
):
    a, i, rows = place(tl.program_id(0), A, I, DENSE, BM)  # BM
    T = tl.zeros((BM, BC), tl.float32)
    for j in range(0, C, BC):
        c = j + tl.arange(0, BC)  # BC
        mask = rows[:, None] & (c < C)[None, :]
        c = c.to(tl.int64)
        DY = tl.load(dy + (a * da + i * di)[:, None] + c[None, :] * dc, mask, other=0.0).to(tl.float32)  # BM BC
        if KIND == "log_softmax":
            T += DY
        else:
            T += DY * tl.load(y + (a * ya + i * yi)[:, None] + c[None, :] * yc, mask, other=0.0).to(tl.float32)
    t = tl.sum(T, 1)  # BM
    for j in range(0, C, BC):
        c = j + tl.arange(0, BC)
        mask = rows[:, None] & (c < C)[None, :]
        c = c.to(tl.int64)
        DY = tl.load(dy + (a * da + i * di)[:, None] + c[None, :] * dc, mask, other=0.0).to(tl.float32)
        Y = tl.load(y + (a * ya + i * yi)[:, None] + c[None, :] * yc, mask, other=0.0).to(tl.float32)
        DX = slope(Y, DY, t, KIND)
        tl.store(dx + (a * C * I + i)[:, None] + c[None, :] * I, DX.to(dx.dtype.element_ty), mask)


def tile(C: int, I: int, warp: int) -> tuple[bool, int, int, int]:
    """Whether lines are held, BM, BC, and the number of warps of `warp` threads each."""
    BC = triton.next_power_of_2(C)
    BM = max(1, TILE // BC) if I == 1 else min(triton.next_power_of_2(I), max(ALONG, TILE // BC))
    held = BM * BC <= HELD
    if not held:
        BM = min(BM, ALONG)
        BC = PASSING // BM
    return held, BM, BC, min(max(BM * BC // (PER_THREAD * warp), 1), 1024 // warp)


def _launch_forward(x: Tensor, dim: int, kind: str) -> Tensor:
    A, C, I = lines(x.shape, dim)
    y = _fake_forward(x, dim, kind)
    if x.numel():
        held, BM, BC, warps = tile(C, I, WARP)
        kernel, x3 = forward_kernel if held else long_forward_kernel, x.reshape(A, C, I)
        sizes = (*x3.stride(), A, C, I, kind, I == 1, BM, BC)
        kernel[(programs(A, I, BM),)](x3, y, *sizes, num_warps=warps, enable_fp_fusion=True)
    return y


def _fake_forward(x, dim, kind):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _launch_backward(dy: Tensor, y: Tensor, dim: int, kind: str) -> Tensor:
    A, C, I = lines(y.shape, dim)
    dx = _fake_backward(dy, y, dim, kind)
    if y.numel():
        held, BM, BC, warps = tile(C, I, WARP)
        kernel, dy3, y3 = backward_kernel if held else long_backward_kernel, dy.reshape(A, C, I), y.reshape(A, C, I)
        sizes = (*dy3.stride(), *y3.stride(), A, C, I, kind, I == 1, BM, BC)
        kernel[(programs(A, I, BM),)](dy3, y3, dx, *sizes, num_warps=warps, enable_fp_fusion=True)
    return dx


def _fake_backward(dy, y, dim, kind):
    return torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)


FORWARD = operator("triton_softmax", _launch_forward, _fake_forward)
BACKWARD = operator("triton_softmax_backward", _launch_backward, _fake_backward)


def unsupported(x: Tensor, dim: int) -> str | None:
    """Why the kernel cannot take the call, or None."""
    return computed_in_float32(x)


def _of(kind: str) -> Kernel:
    def forward(x, dim):
        return FORWARD(x, dim, kind)

    def backward(dy, y, dim):
        return BACKWARD(dy, y, dim, kind)

    return Kernel(forward, backward, unsupported)


SOFTMAX, LOG_SOFTMAX, SOFTMIN = map(_of, ("softmax", "log_softmax", "softmin"))


def specs(warp: int) -> list[Spec]:
    """The kernels at the shipped configurations: several lines to a tile, common, the longest held, looped; and strided."""
    every = []
    for t in ("bf16", "fp32"):
        for kind, C, I in (
            *(("softmax", C, 1) for C in (64, 1024, HELD, HELD + 16)),
            *(("softmax", C, 4096) for C in (16, HELD // ALONG, HELD)),
            *((kind, C, 1) for kind in ("log_softmax", "softmin") for C in (1024, HELD + 16)),
        ):
            held, BM, BC, warps = tile(C, I, warp)
            constants = {"KIND": kind, "DENSE": I == 1, "BM": BM, "BC": BC} | ({"I": 1} if I == 1 else {})
            for name, kernel, tensors, last in (
                ("", forward_kernel if held else long_forward_kernel, ("x", "y"), "x"),
                (" backward", backward_kernel if held else long_backward_kernel, ("dy", "y", "dx"), "dy"),
            ):
                strided = {"x": ("xa", "xc", "xi"), "dy": ("da", "dc", "di", "ya", "yc", "yi")}[last]
                ones = {s: 1 for s in strided if s[1] == ("c" if I == 1 else "i")}
                sizes = [s for s in (*strided, "A", "C", "I") if s not in ones and s not in constants]
                aligned = (*tensors, *(s for s in sizes if s != "A"))
                types = dict.fromkeys(tensors, f"*{t}") | dict.fromkeys(sizes, "i32")
                label = f"{kind}{name} {t} {C}" + (f"x{I}" if I > 1 else "")
                every.append(Spec(label, kernel, types, constants | ones, aligned, warps))
    return every
