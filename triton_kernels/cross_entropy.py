"""Cross entropy against class indices, fused: the logits are read once each way. For the maths see the op of this name.

The logits are A C I, I the positions of a sample; a line is the C classes of one (a, i).

forward    the C classes of BM lines pass by in tiles of BC; each place of a tile has its own largest logit and sum
backward   the largest logit and the logarithm of the sum are residuals, so that every tile stands alone: there are no sums
"""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from bptoolkit.ops.class_indices import at_index
from bptoolkit.ops.cross_entropy import by_weight
from bptoolkit.ops.reduction import reduce
from bptoolkit.precision import wide
from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.elementary import expm1, log1p, tanh, tanh_slope
from bptoolkit.triton_kernels.kernel import WARP, Kernel, computed_in_float32, dense
from bptoolkit.triton_kernels.lines import gather, join, lines, place, programs
from bptoolkit.triton_kernels.operator import operator

TILE = 2048  # elements, for lines that are shorter than that
PASSING = 4096  # elements of a tile of longer lines
ALONG = 32  # neighbours in I that a tile has where it can: the bytes of one access to memory
LINES = 128  # of a tile at most, one a thread: what is known of each takes registers
PER_THREAD, STRIDED = 16, 8  # elements of a tile; of one along I, where more spill on sm_100 with every option


@triton.jit
def logits(x, at, mask, cap, CAP: tl.constexpr):
    X = tl.load(x + at, mask, other=0.0).to(tl.float32)
    if CAP:
        X = cap * tanh(X / cap)
    return X


@triton.jit
def at_target(x, row, xc, k, w, r, rows, C, ignore, cap, CAP: tl.constexpr):
    """Of each line: its index, whether it counts, the logit there, the class's weight; NaN for an index that is no class."""
    K = tl.load(k + r, rows, other=0)  # BM
    counts = rows & (ignore != K)
    known = counts & (K >= 0) & (K < C)
    XK = tl.where(known, logits(x, row + K * xc, known, cap, CAP), float("nan"))
    WK = tl.where(known, 1.0, float("nan"))
    if w is not None:
        WK *= tl.load(w + K, known, other=0.0).to(tl.float32)
    return K, counts, XK, tl.where(counts, WK, 0.0)


@triton.jit(do_not_specialize=["A", "ignore"])
def forward_kernel(
    x, k, w, w1, l, m, s, wk, xa, xc, xi, A, C, I, ignore, hard, soft, z_loss, cap,
    SMOOTH: tl.constexpr, Z: tl.constexpr, CAP: tl.constexpr, DENSE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    a, i, rows = place(tl.program_id(0), A, I, DENSE, BM)  # BM
    row, r = a * xa + i * xi, a * I + i  # BM
    _, counts, XK, WK = at_target(x, row, xc, k, w, r, rows, C, ignore, cap, CAP)  # BM
    near = tl.where(tl.abs(XK) < float("inf"), XK, 0.0)  # BM: Σ w x is of differences from it, which ℓ is as large as
    M = tl.full((BM, BC), float("-inf"), tl.float32)
    S = tl.zeros((BM, BC), tl.float32)
    T = tl.zeros((BM, BC), tl.float32)
    for j in range(0, C, BC):
        c = j + tl.arange(0, BC)  # BC
        mask = rows[:, None] & (c < C)[None, :]
        X = logits(x, row[:, None] + c.to(tl.int64)[None, :] * xc, mask, cap, CAP)  # BM BC
        M, S = join(M, S, tl.where(mask, X, float("-inf")))
        if SMOOTH:
            X -= near[:, None]
            if w is not None:
                X *= tl.load(w + c, c < C, other=0.0).to(tl.float32)[None, :]
            T += tl.where(mask, X, 0.0)
    top, rest = gather(M, S)  # BM
    log = log1p(rest)  # BM
    L = -hard * WK * (XK - top - log)  # BM
    if SMOOTH:
        all_ = C * 1.0  # C is a constant where it is 1
        if w1 is not None:
            all_ = tl.load(w1)
        L -= soft * (tl.sum(T, 1) - all_ * (top - near + log))
    if Z:
        L += z_loss * WK * (top + log) * (top + log)
    tl.store(l + r, tl.where(counts, L, 0.0), rows)
    tl.store(m + r, top, rows)
    tl.store(s + r, log, rows)
    tl.store(wk + r, WK, rows)


@triton.jit(do_not_specialize=["A", "ignore"])
def backward_kernel(
    d, x, k, w, w1, m, s, dx, dn, xa, xc, xi, A, C, I, ignore, hard, soft, z_loss, cap,
    SMOOTH: tl.constexpr, Z: tl.constexpr, CAP: tl.constexpr, DENSE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(C, BC)
    a, i, rows = place(tl.program_id(0) // tiles, A, I, DENSE, BM)  # BM
    row, r = a * xa + i * xi, a * I + i  # BM
    K, counts, XK, WK = at_target(x, row, xc, k, w, r, rows, C, ignore, cap, CAP)  # BM
    top = tl.load(m + r, rows, other=0.0)  # BM
    log = tl.load(s + r, rows, other=0.0)  # BM
    D = tl.load(d + r * dn, counts, other=0.0).to(tl.float32)  # BM: dℓ
    hit = hard * D * WK
    rest = tl.zeros((BM,), tl.float32)  # p's factor but for hit
    if SMOOTH:
        all_ = C * 1.0  # C is a constant where it is 1
        if w1 is not None:
            all_ = tl.load(w1)
        rest += soft * D * all_
    if Z:
        rest += 2 * z_loss * D * WK * (top + log)
    XK = XK - top - log  # log p there
    at = hit * expm1(XK) + rest * tl.exp(XK)  # BM
    c = tl.program_id(0) % tiles * BC + tl.arange(0, BC)  # BC
    mask = rows[:, None] & (c < C)[None, :]
    place_ = row[:, None] + c.to(tl.int64)[None, :] * xc  # BM BC
    read = mask
    if DENSE:  # a line that is ignored is not read; along I such a mask would make the loads narrow
        read = mask & counts[:, None]
    X = tl.load(x + place_, read, other=0.0).to(tl.float32)  # BM BC
    if CAP:
        X = X / cap
        P = tl.exp(cap * tanh(X) - top[:, None] - log[:, None])
    else:
        P = tl.exp(X - top[:, None] - log[:, None])
    DX = (hit + rest)[:, None] * P
    DX = tl.where(c[None, :] == K[:, None], at[:, None], DX)
    if SMOOTH:
        F = (soft * D)[:, None]
        if w is not None:
            F = F * tl.load(w + c, c < C, other=0.0).to(tl.float32)[None, :]
        DX -= F
    if CAP:
        DX *= tanh_slope(X)
    DX = tl.where(counts[:, None], DX, (0 * log)[:, None])  # 0 · p, NaN in a line of NaN
    tl.store(dx + (a * C * I + i)[:, None] + c.to(tl.int64)[None, :] * I, DX.to(dx.dtype.element_ty), mask)


def tile(C: int, I: int, warp: int) -> tuple[int, int, int]:
    """BM, BC and the number of warps, of `warp` threads each."""
    BC = min(triton.next_power_of_2(C), PASSING)
    BM = min(TILE // BC, LINES) or 1
    BM = BM if I == 1 else min(triton.next_power_of_2(I), max(ALONG, BM))
    BC = min(BC, PASSING // BM)
    threads = max(BM * BC // (PER_THREAD if I == 1 else STRIDED), BM)
    return BM, BC, min(max(threads // warp, 1), 1024 // warp)


def _options(C: int, ignore: int, smoothing: float, z_loss: float, softcap: float | None) -> tuple:
    numbers = (float(1 - smoothing), float(smoothing / C), float(z_loss), float(softcap or 1))
    return (ignore, *numbers, smoothing != 0, z_loss != 0, softcap is not None)


def _launch_forward(
    x: Tensor, w: Tensor | None, k: Tensor, ignore: int, smoothing: float, z_loss: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    A, C, I = lines(x.shape, 1)
    l, m, s, wk = _fake_forward(x, w, k, ignore, smoothing, z_loss, softcap)
    if x.numel():
        (BM, BC, warps), x3 = tile(C, I, WARP), x.reshape(A, C, I)
        tensors = (x3, dense(k), dense(w), None if w is None or not smoothing else wide(w).sum(), l, m, s, wk)
        sizes = (*x3.stride(), A, C, I, *_options(C, ignore, smoothing, z_loss, softcap), I == 1, BM, BC)
        forward_kernel[(programs(A, I, BM),)](*tensors, *sizes, num_warps=warps, enable_fp_fusion=True)
    return l, m, s, wk


def _fake_forward(x, w, k, ignore, smoothing, z_loss, softcap):
    l, m, s, wk = (torch.empty(k.shape, dtype=torch.float32, device=x.device) for _ in range(4))
    return l, m, s, wk


def _launch_backward(
    d: Tensor,
    x: Tensor,
    w: Tensor | None,
    k: Tensor,
    m: Tensor,
    s: Tensor,
    ignore: int,
    smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> Tensor:
    A, C, I = lines(x.shape, 1)
    dx = _fake_backward(d, x, w, k, m, s, ignore, smoothing, z_loss, softcap)
    if x.numel():
        (BM, BC, warps), x3 = tile(C, I, WARP), x.reshape(A, C, I)
        w1 = None if w is None or not smoothing else wide(w).sum()
        tensors = (dense(d), x3, *map(dense, (k, w)), w1, *map(dense, (m, s)), dx)
        strides = (int(d.dim() > 0), *x3.stride())
        sizes = (*strides, A, C, I, *_options(C, ignore, smoothing, z_loss, softcap), I == 1, BM, BC)
        grid = (programs(A, I, BM) * triton.cdiv(C, BC),)
        backward_kernel[grid](*tensors, *sizes, num_warps=warps, enable_fp_fusion=True)
    return dx


def _fake_backward(d, x, w, k, m, s, ignore, smoothing, z_loss, softcap):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


FORWARD = operator("triton_cross_entropy", _launch_forward, _fake_forward)
BACKWARD = operator("triton_cross_entropy_backward", _launch_backward, _fake_backward)


def forward(x, w, k, ignore, reduction, smoothing, z_loss, softcap):
    l, m, s, wk = FORWARD(x, w, k, ignore, smoothing, z_loss, softcap)
    return reduce(l, wk.sum() if reduction == "mean" else None, reduction).to(x.dtype), m, s


def backward(dl, x, w, k, l, m, s, ignore, reduction, smoothing, z_loss, softcap, need):
    dx = None
    if need.x:
        d = wide(dl) / at_index(x, w, k, ignore)[2].sum() if reduction == "mean" else dl
        dx = BACKWARD(d, x, w, k, m, s, ignore, smoothing, z_loss, softcap)
    return dx, by_weight(dl, x, w, k, l, ignore, reduction, smoothing, z_loss, softcap) if need.w else None, None


def unsupported(x: Tensor, *_: object) -> str | None:
    """Why the kernel cannot take the call, or None."""
    return computed_in_float32(x)


KERNEL = Kernel(forward, backward, unsupported)


def specs(warp: int) -> list[Spec]:
    """The kernels at the shipped configurations: one class, few, common, a vocabulary; pixels; every option."""
    every = []
    plain = {"SMOOTH": False, "Z": False, "CAP": False, "w": None, "w1": None}
    shapes = ((1, 1, 1), (16, 1, 0), (1008, 1, 0), (131072, 1, 0), (131072, 1, 1), (16, 4096, 1), (4096, 4096, 0))
    for t, (C, I, all_) in product(("bf16", "fp32"), shapes):
        BM, BC, warps = tile(C, I, warp)
        tensors = {"x": f"*{t}", "k": "*i64", "m": "*fp32", "s": "*fp32"}
        constants = {"DENSE": I == 1, "BM": BM, "BC": BC} | ({"I": 1, "xc": 1} if I == 1 else {"xi": 1})
        constants |= {"C": 1} if C == 1 else {}
        constants |= {"SMOOTH": True, "Z": True, "CAP": True} if all_ else plain
        tensors |= {"w": f"*{t}", "w1": "*fp32"} if all_ else {}
        narrow = "Triton makes a constant of a 1: there is nothing to read along" if C == 1 else ""
        for name, kernel, more in (
            ("", forward_kernel, {"l": "*fp32", "wk": "*fp32"}),
            (" backward", backward_kernel, {"d": "*fp32", "dx": f"*{t}"}),
        ):
            pointers = {n: p for n, p in (tensors | more).items() if n in kernel.arg_names}
            sizes = [n for n in kernel.arg_names if n not in constants and n in ("xa", "xc", "xi", "C", "I")]
            types = pointers | dict.fromkeys((*sizes, "A", "ignore", "dn"), "i32")
            types |= dict.fromkeys(("hard", "soft", "z_loss", "cap"), "fp32")
            label = f"cross_entropy{name} {t} {C}" + (f"x{I}" if I > 1 else "") + (" every option" if all_ else "")
            every.append(Spec(label, kernel, types, constants, (*pointers, *sizes), warps, narrow=narrow))
    return every
