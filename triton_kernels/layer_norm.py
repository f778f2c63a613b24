"""Layer normalization, fused: each direction reads every tensor once and writes once. For the maths see the op of this name.

forward    one program per tile of BM rows × BN ≥ N columns
backward   a program walks over tiles p, p + P, p + 2P, … and keeps its sums of dw and db in registers; the P partial sums, in
           float32, are added up afterwards: no atomics, the same bits every time
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bptoolkit.ops.layer_norm import RULE, rows
from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.kernel import WARP, Kernel, computed_in_float32, dense, programs
from bptoolkit.triton_kernels.operator import operator

LONGEST = 8192  # elements of a row: more would spill registers in backward, with its two sums; the gate in aot.py says so
TILE = 2048  # elements, for rows that are shorter than that
PER_THREAD = 16  # elements of a tile


@triton.jit(do_not_specialize=["M"])
def forward_kernel(x, w, b, y, mean, rstd, xm, xn, M, N, eps, BM: tl.constexpr, BN: tl.constexpr):
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # BM
    n = tl.arange(0, BN)  # BN
    rows, columns = m < M, n < N
    mask = rows[:, None] & columns[None, :]
    X = tl.load(x + m[:, None] * xm + n.to(tl.int64)[None, :] * xn, mask, other=0.0).to(tl.float32)  # BM BN
    mu = tl.sum(X, 1) / N  # BM
    xc = tl.where(mask, X - mu[:, None], 0.0)  # BM BN
    r = 1 / tl.sqrt(tl.sum(xc * xc, 1) / N + eps)  # BM
    Y = xc * r[:, None]  # BM BN
    if w is not None:
        Y *= tl.load(w + n, columns, other=0.0).to(tl.float32)[None, :]
    if b is not None:
        Y += tl.load(b + n, columns, other=0.0).to(tl.float32)[None, :]
    tl.store(y + m[:, None] * N + n[None, :], Y.to(y.dtype.element_ty), mask)
    tl.store(mean + m, mu, rows)
    tl.store(rstd + m, r, rows)


@triton.jit(do_not_specialize=["M"])
def backward_kernel(dy, dm, dr, x, w, mean, rstd, dx, dw, db, dym, dyn, xm, xn, M, N, BM: tl.constexpr, BN: tl.constexpr):
    p = tl.program_id(0)
    n = tl.arange(0, BN)  # BN
    columns = n < N
    if w is not None:
        W = tl.load(w + n, columns, other=0.0).to(tl.float32)
    dW = tl.zeros((BM, BN), tl.float32)
    dB = tl.zeros((BM, BN), tl.float32)
    for k in range(p, tl.cdiv(M, BM), tl.num_programs(0)):
        m = (tl.zeros((BM,), tl.int64) + k) * BM + tl.arange(0, BM)  # BM
        rows = m < M
        mask = rows[:, None] & columns[None, :]
        DY = tl.load(dy + m[:, None] * dym + n.to(tl.int64)[None, :] * dyn, mask, other=0.0).to(tl.float32)  # BM BN
        X = tl.load(x + m[:, None] * xm + n.to(tl.int64)[None, :] * xn, mask, other=0.0).to(tl.float32)  # BM BN
        mu = tl.load(mean + m, rows, other=0.0)  # BM
        r = tl.load(rstd + m, rows, other=0.0)  # BM
        xh = (X - mu[:, None]) * r[:, None]  # BM BN; past the last column it is not 0, but DY is
        if dx is not None:
            g = DY
            if w is not None:
                g *= W[None, :]
            c1 = tl.sum(g, 1) / N  # BM
            c2 = tl.sum(g * xh, 1) / N  # BM
            if dr is not None:
                c2 += tl.load(dr + m, rows, other=0.0) * r / N
            DX = (g - c1[:, None] - xh * c2[:, None]) * r[:, None]  # BM BN
            if dm is not None:
                DX += tl.load(dm + m, rows, other=0.0)[:, None] / N
            tl.store(dx + m[:, None] * N + n[None, :], DX.to(dx.dtype.element_ty), mask)
        if dw is not None:
            dW += DY * xh
        if db is not None:
            dB += DY
    if dw is not None:
        tl.store(dw + p.to(tl.int64) * N + n, tl.sum(dW, 0), columns)
    if db is not None:
        tl.store(db + p.to(tl.int64) * N + n, tl.sum(dB, 0), columns)


def tile(N: int, warp: int) -> tuple[int, int, int]:
    """BM, BN and the number of warps, of `warp` threads each, for rows of N elements."""
    BN = triton.next_power_of_2(N)
    BM = max(1, TILE // BN)
    return BM, BN, min(max(BM * BN // (PER_THREAD * warp), 1), 1024 // warp)


def _launch_forward(x: Tensor, w: Tensor | None, b: Tensor | None, D: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    M, N = rows(x, D)
    y, mean, rstd = _fake_forward(x, w, b, D, eps)
    if not x.numel():
        return y, mean.zero_(), rstd.fill_(torch.nan)
    x2, (BM, BN, warps) = x.reshape(M, N), tile(N, WARP)
    shape = (*x2.stride(), M, N, eps, BM, BN)
    forward_kernel[(triton.cdiv(M, BM),)](x2, dense(w), dense(b), y, mean, rstd, *shape, num_warps=warps, enable_fp_fusion=True)
    return y, mean, rstd


def _fake_forward(x, w, b, D, eps):
    statistics = (*x.shape[: x.dim() - D], *(1,) * D)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(statistics, dtype=torch.float32, device=x.device) for _ in range(2))
    return y, mean, rstd


def _launch_backward(
    dy: Tensor | None,
    dm: Tensor | None,
    dr: Tensor | None,
    x: Tensor,
    w: Tensor | None,
    m: Tensor,
    r: Tensor,
    D: int,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    M, N = rows(x, D)
    dx, dw, db = _fake_backward(dy, dm, dr, x, w, m, r, D, need)
    if not x.numel():
        return dx, dw.zero_(), db.zero_()
    BM, BN, warps = tile(N, WARP)
    P = min(triton.cdiv(M, BM), programs(x.device, warps))
    partial = torch.empty(int(need[1]) + int(need[2]), P, N, dtype=torch.float32, device=x.device)
    dw_ = partial[0] if need[1] else None
    db_ = partial[-1] if need[2] else None
    x2, dy2 = x.reshape(M, N), (x.new_zeros(()).expand(x.shape) if dy is None else dy).reshape(M, N)
    read = (dy2, *map(dense, (dm, dr)), x2, *map(dense, (w, m, r)))
    write = (dx if need[0] else None, dw_, db_)
    shape = (*dy2.stride(), *x2.stride(), M, N, BM, BN)
    backward_kernel[(P,)](*read, *write, *shape, num_warps=warps, enable_fp_fusion=True)
    if dw_ is not None:
        torch.sum(dw_, 0, out=dw)
    if db_ is not None:
        torch.sum(db_, 0, out=db)
    return dx, dw, db


def _fake_backward(dy, dm, dr, x, w, m, r, D, need):
    _, N = rows(x, D)
    dx = torch.empty(x.shape if need[0] else (0,), dtype=x.dtype, device=x.device)
    dw, db = (torch.empty(N if n else 0, dtype=torch.float32, device=x.device) for n in need[1:])
    return dx, dw, db


FORWARD = operator("triton_layer_norm", _launch_forward, _fake_forward)
BACKWARD = operator("triton_layer_norm_backward", _launch_backward, _fake_backward)


def forward(x, w, b, D, eps):
    return FORWARD(x, w, b, D, eps)


def backward(dy, dm, dr, x, w, b, m, r, D, need):
    if not (need.x or need.w):
        return RULE.backward(dy, dm, dr, x, w, b, m, r, D, need)  # x has not been kept
    dx, dw, db = BACKWARD(dy, dm, dr, x, w, m, r, D, list(need))
    dw = dw.reshape(w.shape).to(w.dtype) if need.w else None
    db = db.reshape(b.shape).to(b.dtype) if need.b else None
    return dx if need.x else None, dw, db


def unsupported(x: Tensor, w: Tensor | None, b: Tensor | None, D: int, eps: float) -> str | None:
    """Why the kernel cannot take the call, or None."""
    _, N = rows(x, D)
    if N > LONGEST:
        return f"a row of {N} elements is too long for the fused kernel, which holds a row in registers: at most {LONGEST}"
    return computed_in_float32(x)


KERNEL = Kernel(forward, backward, unsupported)


def specs(warp: int) -> list[Spec]:
    """The kernels at the shipped configurations: short rows, several to a tile; common rows; the longest; second order."""
    every = []
    for t in ("bf16", "fp32"):
        for N in (64, 1024, LONGEST):
            BM, BN, warps = tile(N, warp)
            tiles = {"xn": 1, "BM": BM, "BN": BN}
            statistics = {"mean": "*fp32", "rstd": "*fp32"}
            pointers = dict.fromkeys(("x", "w", "b", "y"), f"*{t}") | statistics
            types = pointers | {"xm": "i32", "M": "i32", "N": "i32", "eps": "fp32"}
            every.append(Spec(f"layer_norm {t} {N}", forward_kernel, types, tiles, (*pointers, "xm", "N"), warps))
            pointers = dict.fromkeys(("dy", "x", "w", "dx"), f"*{t}") | statistics | {"dw": "*fp32", "db": "*fp32"}
            for order, residuals in (("", {}), (" second order", {"dm": "*fp32", "dr": "*fp32"})):
                types = pointers | residuals | dict.fromkeys(("dym", "xm", "M", "N"), "i32")
                constants = tiles | {"dyn": 1, "dm": None, "dr": None}
                aligned = (*pointers, *residuals, "dym", "xm", "N")
                label = f"layer_norm backward{order} {t} {N}"
                every.append(Spec(label, backward_kernel, types, constants, aligned, warps))
    return every
