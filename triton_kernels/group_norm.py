"""Group normalization, fused: one program per sample and group. For the maths see the op of this name.

A group is a matrix of K channels × I positions; a program holds it whole (WHOLE), or else walks over it twice, BK × BI elements
at a time: for the sums, then to write. The sums of dw and db are per sample and channel, which one program has to itself; torch
adds them up over the samples: no atomics, the same bits every time.

The variance of a long group is mean((x − c)²) − mean(x − c)², c being the mean of its first tile. Of T tiles that one has about
(c − m)²/T as its share of the variance, so what cancels is at most T times the variance, however large the mean.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bptoolkit.ops.group_norm import RULE
from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.kernel import WARP, Kernel, computed_in_float32, dense
from bptoolkit.triton_kernels.operator import operator

HELD = 8192  # elements of a group that a program holds whole
LONGEST = 1 << 22  # elements of a group: its program works on it alone
TILE = 4096  # elements, of longer groups than HELD
PER_THREAD = 16  # elements of a tile; of longer groups half as many


@triton.jit
def read(t, k, i, tc, ti, mask):
    """The elements of channels k and positions i; t points to the group."""
    return tl.load(t + k.to(tl.int64)[:, None] * tc + i.to(tl.int64)[None, :] * ti, mask, other=0.0).to(tl.float32)


@triton.jit
def write(t, k, i, I, V, mask):
    """The same of a dense tensor."""
    tl.store(t + k.to(tl.int64)[:, None] * I + i[None, :], V.to(t.dtype.element_ty), mask)


@triton.jit
def parameter(w, k, channels, default):
    """A parameter of channels k, or what it is without one."""
    W = tl.zeros(k.shape, tl.float32) + default
    if w is not None:
        W = tl.load(w + k, channels, other=0.0).to(tl.float32)
    return W


@triton.jit
def forward_kernel(
    x, w, b, y, mean, rstd, xn, xc, xi, G, K, I, eps, BK: tl.constexpr, BI: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    q = tl.program_id(0).to(tl.int64)  # of N G
    n, c0 = q // G, q % G * K
    x += n * xn + c0 * xc
    y += q * K * I
    M = K * I
    k, i = tl.arange(0, BK), tl.arange(0, BI)  # BK, BI
    mask = (k < K)[:, None] & (i < I)[None, :]
    X = read(x, k, i, xc, xi, mask)  # BK BI
    if WHOLE:
        mu = tl.sum(X) / M
        t = tl.where(mask, X - mu, 0.0)
        r = 1 / tl.sqrt(tl.sum(t * t) / M + eps)
        W, B = parameter(w, c0 + k, k < K, 1.0), parameter(b, c0 + k, k < K, 0.0)  # BK
        write(y, k, i, I, t * r * W[:, None] + B[:, None], mask)
    else:
        c = tl.sum(X) / (tl.minimum(K, BK) * tl.minimum(I, BI))
        sum1 = tl.zeros((BK, BI), tl.float32)
        sum2 = tl.zeros((BK, BI), tl.float32)
        for k0 in range(0, K, BK):
            for i0 in range(0, I, BI):
                k, i = k0 + tl.arange(0, BK), i0 + tl.arange(0, BI)
                mask = (k < K)[:, None] & (i < I)[None, :]
                t = tl.where(mask, read(x, k, i, xc, xi, mask) - c, 0.0)  # BK BI
                sum1 += t
                sum2 += t * t
        e = tl.sum(sum1) / M
        mu = c + e
        v = tl.sum(sum2) / M - e * e
        r = 1 / tl.sqrt(tl.where(v < 0, 0.0, v) + eps)
        for k0 in range(0, K, BK):
            k = k0 + tl.arange(0, BK)
            W, B = parameter(w, c0 + k, k < K, 1.0), parameter(b, c0 + k, k < K, 0.0)
            for i0 in range(0, I, BI):
                i = i0 + tl.arange(0, BI)
                mask = (k < K)[:, None] & (i < I)[None, :]
                t = read(x, k, i, xc, xi, mask) - mu
                write(y, k, i, I, t * r * W[:, None] + B[:, None], mask)
    tl.store(mean + q, mu)
    tl.store(rstd + q, r)


@triton.jit
def sums_of_channels(dw, db, k, channels, sum1, sum2, W):
    """Store Σ dy and Σ dy x̂ per channel; return their sums over channels, times w."""
    s1, s2 = tl.sum(sum1, 1), tl.sum(sum2, 1)  # BK
    if dw is not None:
        tl.store(dw + k, s2, channels)
    if db is not None:
        tl.store(db + k, s1, channels)
    return tl.sum(s1 * W), tl.sum(s2 * W)


@triton.jit
def slope(G, xh, c1, c2, r, dm, dr, q, M):
    """The gradient of x from that of x̂, G, with c1 = Σ G and c2 = Σ G x̂; dm and dr are what flows into m and r."""
    if dr is not None:
        c2 += tl.load(dr + q) * r
    D = (G - c1 / M - xh * (c2 / M)) * r
    if dm is not None:
        D += tl.load(dm + q) / M
    return D


@triton.jit
def backward_kernel(
    dy, dm, dr, x, w, mean, rstd, dx, dw, db, dyn, dyc, dyi, xn, xc, xi, G, K, I,
    BK: tl.constexpr, BI: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    q = tl.program_id(0).to(tl.int64)  # of N G
    n, c0 = q // G, q % G * K
    dy += n * dyn + c0 * dyc
    x += n * xn + c0 * xc
    if dx is not None:
        dx += q * K * I
    if dw is not None:
        dw += q * K
    if db is not None:
        db += q * K
    M = K * I
    mu, r = tl.load(mean + q), tl.load(rstd + q)
    if WHOLE:
        k, i = tl.arange(0, BK), tl.arange(0, BI)  # BK, BI
        mask = (k < K)[:, None] & (i < I)[None, :]
        DY = read(dy, k, i, dyc, dyi, mask)  # BK BI
        xh = (read(x, k, i, xc, xi, mask) - mu) * r  # BK BI; where it is not of the group, DY is 0
        W = parameter(w, c0 + k, k < K, 1.0)  # BK
        c1, c2 = sums_of_channels(dw, db, k, k < K, DY, DY * xh, W)
        if dx is not None:
            write(dx, k, i, I, slope(DY * W[:, None], xh, c1, c2, r, dm, dr, q, M), mask)
    else:
        c1, c2 = 0.0, 0.0
        for k0 in range(0, K, BK):
            k = k0 + tl.arange(0, BK)
            sum1 = tl.zeros((BK, BI), tl.float32)
            sum2 = tl.zeros((BK, BI), tl.float32)
            for i0 in range(0, I, BI):
                i = i0 + tl.arange(0, BI)
                mask = (k < K)[:, None] & (i < I)[None, :]
                DY = read(dy, k, i, dyc, dyi, mask)
                sum1 += DY
                sum2 += DY * ((read(x, k, i, xc, xi, mask) - mu) * r)
            W = parameter(w, c0 + k, k < K, 1.0)
            d1, d2 = sums_of_channels(dw, db, k, k < K, sum1, sum2, W)
            c1 += d1
            c2 += d2
        if dx is not None:
            for k0 in range(0, K, BK):
                k = k0 + tl.arange(0, BK)
                W = parameter(w, c0 + k, k < K, 1.0)
                for i0 in range(0, I, BI):
                    i = i0 + tl.arange(0, BI)
                    mask = (k < K)[:, None] & (i < I)[None, :]
                    DY = read(dy, k, i, dyc, dyi, mask)
                    xh = (read(x, k, i, xc, xi, mask) - mu) * r
                    write(dx, k, i, I, slope(DY * W[:, None], xh, c1, c2, r, dm, dr, q, M), mask)


def tile(K: int, I: int, warp: int) -> tuple[int, int, bool, int]:
    """BK, BI, whether that is the whole group, and the number of warps, of `warp` threads each."""
    BK, BI = triton.next_power_of_2(K), triton.next_power_of_2(I)
    whole = BK * BI <= HELD
    if not whole:
        BI = min(BI, TILE)
        BK = min(BK, TILE // BI)
    per_thread = PER_THREAD if whole else PER_THREAD // 2
    return BK, BI, whole, max(BK * BI // (per_thread * warp), 1)


def sizes(x: Tensor, G: int) -> tuple[int, int, int, int]:
    """N, C, I and K of N C *I."""
    N, C = x.shape[:2]
    return N, C, prod(x.shape[2:]), C // G


def _launch_forward(x: Tensor, w: Tensor | None, b: Tensor | None, G: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    N, C, I, K = sizes(x, G)
    y, mean, rstd = _fake_forward(x, w, b, G, eps)
    if not x.numel():
        return y, mean.zero_(), rstd.zero_()
    x3, (BK, BI, whole, warps) = x.reshape(N, C, I), tile(K, I, WARP)
    shape = (*x3.stride(), G, K, I, eps, BK, BI, whole)
    forward_kernel[(N * G,)](x3, dense(w), dense(b), y, mean, rstd, *shape, num_warps=warps, enable_fp_fusion=True)
    return y, mean, rstd


def _fake_forward(x, w, b, G, eps):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(x.shape[0], G, dtype=torch.float32, device=x.device) for _ in range(2))
    return y, mean, rstd


def _launch_backward(
    dy: Tensor | None,
    dm: Tensor | None,
    dr: Tensor | None,
    x: Tensor,
    w: Tensor | None,
    m: Tensor,
    r: Tensor,
    G: int,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    N, C, I, K = sizes(x, G)
    dx, dw, db = _fake_backward(dy, dm, dr, x, w, m, r, G, need)
    if not x.numel():
        return dx, dw.zero_(), db.zero_()
    BK, BI, whole, warps = tile(K, I, WARP)
    partial = torch.empty(int(need[1]) + int(need[2]), N, C, dtype=torch.float32, device=x.device)
    dw_ = partial[0] if need[1] else None
    db_ = partial[-1] if need[2] else None
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    dy3, x3 = (zero.expand(x.shape) if dy is None else dy).reshape(N, C, I), x.reshape(N, C, I)
    pointers = (dy3, *map(dense, (dm, dr)), x3, *map(dense, (w, m, r)), dx if need[0] else None, dw_, db_)
    shape = (*dy3.stride(), *x3.stride(), G, K, I, BK, BI, whole)
    backward_kernel[(N * G,)](*pointers, *shape, num_warps=warps, enable_fp_fusion=True)
    if dw_ is not None:
        torch.sum(dw_, 0, out=dw)
    if db_ is not None:
        torch.sum(db_, 0, out=db)
    return dx, dw, db


def _fake_backward(dy, dm, dr, x, w, m, r, G, need):
    dx = torch.empty(x.shape if need[0] else (0,), dtype=x.dtype, device=x.device)
    dw, db = (torch.empty(x.shape[1] if n else 0, dtype=torch.float32, device=x.device) for n in need[1:])
    return dx, dw, db


FORWARD = operator("triton_group_norm", _launch_forward, _fake_forward)
BACKWARD = operator("triton_group_norm_backward", _launch_backward, _fake_backward)


def forward(x, w, b, G, eps):
    return FORWARD(x, w, b, G, eps)


def backward(dy, dm, dr, x, w, b, m, r, G, need):
    if not (need.x or need.w):
        return RULE.backward(dy, dm, dr, x, w, b, m, r, G, need)  # x has not been kept
    dx, dw, db = BACKWARD(dy, dm, dr, x, w, m, r, G, list(need))
    return dx if need.x else None, dw.to(w.dtype) if need.w else None, db.to(b.dtype) if need.b else None


def unsupported(x: Tensor, w: Tensor | None, b: Tensor | None, G: int, eps: float) -> str | None:
    """Why the kernel cannot take the call, or None."""
    _, _, I, K = sizes(x, G)
    if LONGEST < K * I:
        return (
            f"a group of {K * I} elements is too long for the fused kernel, in which one program works on it: at most {LONGEST}"
        )
    return computed_in_float32(x)


KERNEL = Kernel(forward, backward, unsupported)


def specs(warp: int) -> list[Spec]:
    """The kernels at the shipped configurations: small groups, the largest held, many channels or few of many positions."""
    every = []
    for t in ("bf16", "fp32"):
        for K, I in ((8, 64), (2, 4096), (64, 128), (40, 256), (8, 4096)):
            BK, BI, whole, warps = tile(K, I, warp)
            tiles: dict[str, Any] = {"BK": BK, "BI": BI, "WHOLE": whole, "xi": 1}
            statistics = {"mean": "*fp32", "rstd": "*fp32"}
            pointers = dict.fromkeys(("x", "w", "b", "y"), f"*{t}") | statistics
            types = pointers | dict.fromkeys(("xn", "xc", "G", "K", "I"), "i32") | {"eps": "fp32"}
            aligned = ("xn", "xc", "I")
            every.append(Spec(f"group_norm {t} {K}×{I}", forward_kernel, types, tiles, (*pointers, *aligned), warps))
            pointers = dict.fromkeys(("dy", "x", "w", "dx"), f"*{t}") | statistics | {"dw": "*fp32", "db": "*fp32"}
            for order, residuals in (("", {}), (" second order", {"dm": "*fp32", "dr": "*fp32"})):
                types = pointers | residuals | dict.fromkeys(("dyn", "dyc", "xn", "xc", "G", "K", "I"), "i32")
                constants = tiles | {"dyi": 1, "dm": None, "dr": None}
                label = f"group_norm backward{order} {t} {K}×{I}"
                near = (*pointers, *residuals, "dyn", "dyc", *aligned)
                every.append(Spec(label, backward_kernel, types, constants, near, warps))
    return every
