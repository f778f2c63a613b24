"""The kernels of layer_norm, rms_norm, add_norm and dropout_add_norm. For the maths see the ops of these names.

A matrix x of M rows and N columns; s is what is normalized: x, or x + a, or x under a mask plus a. A pointer that is None, and
all that hangs on it, is left out of the compiled kernel: without `mean` the rows are not centred, without `a` nothing is added,
without `seed` nothing is masked, without `w`, `b`, `ds` and so on there is none.

forward         one program per tile of BM rows × BN ≥ N columns
backward        a program walks over tiles p, p + P, p + 2P, … and keeps its sums of dw and db in registers; the P partial sums,
                in float32, are added up afterwards: no atomics, the same bits every time. Without dx and da it takes a tile of
                columns too, for the dw and db of longer rows
long forward    one program per row, which it reads twice, BN columns at a time: for the statistics, then to normalize
long backward   the same: for the two sums, then for dx
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.randomness import keep

HELD = 8192  # elements of a row: more would spill registers in backward, with its two sums; the gate in aot.py says so
HELD_MASKED = 4096  # elements, in backward with dropout
LONGEST = 1 << 18  # elements of a row: its program works on it alone, and there may be no other
TILE = 2048  # elements, for rows that are shorter than that
LONG_TILE = 4096  # elements, of longer rows than HELD
COLUMNS = 1024  # of a tile of LONG_TILE elements, for dw and db
PER_THREAD = 16  # elements of a tile; of longer rows than HELD half as many
OTHER_TYPES = {"seed": "i32"} | dict.fromkeys(("mean", "rstd", "dm", "dr", "dw", "db"), "fp32")


@triton.jit
def read(t, m, n, tm, tn, mask):
    """The elements (m, n) of a matrix with strides tm and tn."""
    return tl.load(t + m[:, None] * tm + n.to(tl.int64)[None, :] * tn, mask, other=0.0).to(tl.float32)


@triton.jit
def write(t, m, n, N, V, mask):
    """The elements (m, n) of a dense matrix with rows of N."""
    tl.store(t + m[:, None] * N + n[None, :], V.to(t.dtype.element_ty), mask)


@triton.jit
def masked(V, m, n, N, seed, threshold, scale):
    """V with dropout: the elements that are kept times scale, the others times 0, which leaves a NaN of infinities."""
    return V * tl.where(keep(m[:, None] * N + n[None, :], seed, threshold), scale, 0.0)


@triton.jit
def summed(x, a, seed, m, n, xm, xn, am, an, N, threshold, scale, mask):
    """The elements (m, n) of s, rounded as they are stored."""
    S = read(x, m, n, xm, xn, mask)
    if seed is not None:
        S = masked(S, m, n, N, seed, threshold, scale)
    if a is not None:
        S += read(a, m, n, am, an, mask)
        S = S.to(x.dtype.element_ty).to(tl.float32)
    return S


@triton.jit
def scaled(S, w, b, n, columns):
    """S w + b."""
    if w is not None:
        S *= tl.load(w + n, columns, other=0.0).to(tl.float32)[None, :]
    if b is not None:
        S += tl.load(b + n, columns, other=0.0).to(tl.float32)[None, :]
    return S


@triton.jit
def normalized(s, m, n, sm, sn, mean, r, rows, mask):
    """The elements (m, n) of x̂; past the last column they are not 0."""
    S = read(s, m, n, sm, sn, mask)
    if mean is not None:
        S -= tl.load(mean + m, rows, other=0.0)[:, None]
    return S * r[:, None]


@triton.jit
def slope(G, xh, c1, c2, r, ds, dm, m, n, dsm, dsn, N, rows, mask):
    """The gradient of s from that of x̂, G, with c1 the mean of G, c2 the mean of G x̂; ds and dm are what flows into s and m."""
    D = G - xh * c2[:, None]
    if c1 is not None:
        D -= c1[:, None]
    D *= r[:, None]
    if dm is not None:
        D += tl.load(dm + m, rows, other=0.0)[:, None] / N
    if ds is not None:
        D += read(ds, m, n, dsm, dsn, mask)
    return D


@triton.jit
def write_slopes(D, dx, da, seed, m, n, N, threshold, scale, mask):
    if da is not None:
        write(da, m, n, N, D, mask)
    if dx is not None:
        if seed is not None:
            D = masked(D, m, n, N, seed, threshold, scale)
        write(dx, m, n, N, D, mask)


@triton.jit(do_not_specialize=["M", "threshold"])
def forward_kernel(
    x, a, seed, w, b, y, s, mean, rstd, xm, xn, am, an, M, N, eps, threshold, scale, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # BM
    n = tl.arange(0, BN)  # BN
    rows, columns = m < M, n < N
    mask = rows[:, None] & columns[None, :]
    S = summed(x, a, seed, m, n, xm, xn, am, an, N, threshold, scale, mask)  # BM BN
    if s is not None:
        write(s, m, n, N, S, mask)
    if mean is not None:
        mu = tl.sum(S, 1) / N  # BM
        S = tl.where(mask, S - mu[:, None], 0.0)  # BM BN
        tl.store(mean + m, mu, rows)
    r = 1 / tl.sqrt(tl.sum(S * S, 1) / N + eps)  # BM
    tl.store(rstd + m, r, rows)
    write(y, m, n, N, scaled(S * r[:, None], w, b, n, columns), mask)


@triton.jit(do_not_specialize=["threshold"])
def long_forward_kernel(
    x, a, seed, w, b, y, s, mean, rstd, xm, xn, am, an, N, eps, threshold, scale, BN: tl.constexpr
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)  # 1
    total = tl.zeros((1, BN), tl.float32)
    squares = tl.zeros((1, BN), tl.float32)
    for k in range(0, N, BN):
        n = k + tl.arange(0, BN)  # BN
        mask = (n < N)[None, :]
        S = summed(x, a, seed, m, n, xm, xn, am, an, N, threshold, scale, mask)  # 1 BN
        if s is not None:
            write(s, m, n, N, S, mask)
        if mean is not None:  # Welford: `squares` are about the mean of the t elements before, `total` their sum
            t = tl.zeros((1, 1), tl.float32) + k // BN
            c = tl.where(mask, S - total * (1 / tl.maximum(t, 1)), 0.0)
            squares += c * c * (t / (t + 1))
            total += S
        else:
            squares += S * S
    if mean is not None:
        count = ((N - 1 - tl.arange(0, BN)) // BN + 1).to(tl.float32)[None, :]  # 1 BN
        mu = tl.sum(total, 1) / N  # 1
        c = total / count - mu[:, None]
        squares += count * c * c
        tl.store(mean + m, mu)
    r = 1 / tl.sqrt(tl.sum(squares, 1) / N + eps)  # 1
    tl.store(rstd + m, r)
    for k in range(0, N, BN):
        n = k + tl.arange(0, BN)
        columns = n < N
        mask = columns[None, :]
        S = summed(x, a, seed, m, n, xm, xn, am, an, N, threshold, scale, mask)
        if mean is not None:
            S -= mu[:, None]
        write(y, m, n, N, scaled(S * r[:, None], w, b, n, columns), mask)


@triton.jit(do_not_specialize=["M", "threshold"])
def backward_kernel(
    dy, ds, dm, dr, s, w, mean, rstd, seed, dx, da, dw, db, dym, dyn, dsm, dsn, sm, sn, M, N, threshold, scale,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)  # BN
    columns = n < N
    if w is not None:
        W = tl.load(w + n, columns, other=0.0).to(tl.float32)
    dW = tl.zeros((BM, BN), tl.float32)
    dB = tl.zeros((BM, BN), tl.float32)
    for k in range(p, tl.cdiv(M, BM), tl.num_programs(0)):
        m = (tl.zeros((BM,), tl.int64) + k) * BM + tl.arange(0, BM)  # BM
        rows = m < M
        mask = rows[:, None] & columns[None, :]
        DY = read(dy, m, n, dym, dyn, mask)  # BM BN
        r = tl.load(rstd + m, rows, other=0.0)  # BM
        xh = normalized(s, m, n, sm, sn, mean, r, rows, mask)  # BM BN; where it is not of s, DY is 0
        if dw is not None:
            dW += DY * xh
        if db is not None:
            dB += DY
        if dx is not None or da is not None:
            G = DY
            if w is not None:
                G *= W[None, :]
            c1 = None
            if mean is not None:
                c1 = tl.sum(G, 1) / N  # BM
            c2 = tl.sum(G * xh, 1) / N  # BM
            if dr is not None:
                c2 += tl.load(dr + m, rows, other=0.0) * r / N
            D = slope(G, xh, c1, c2, r, ds, dm, m, n, dsm, dsn, N, rows, mask)  # BM BN
            write_slopes(D, dx, da, seed, m, n, N, threshold, scale, mask)
    if dw is not None:
        tl.store(dw + p.to(tl.int64) * N + n, tl.sum(dW, 0), columns)
    if db is not None:
        tl.store(db + p.to(tl.int64) * N + n, tl.sum(dB, 0), columns)


@triton.jit(do_not_specialize=["threshold"])
def long_backward_kernel(
    dy, ds, dm, dr, s, w, mean, rstd, seed, dx, da, dym, dyn, dsm, dsn, sm, sn, N, threshold, scale, BN: tl.constexpr
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)  # 1
    rows = m >= 0  # the one
    r = tl.load(rstd + m)  # 1
    sum1 = tl.zeros((1, BN), tl.float32)
    sum2 = tl.zeros((1, BN), tl.float32)
    for k in range(0, N, BN):
        n = k + tl.arange(0, BN)  # BN
        columns = n < N
        mask = columns[None, :]
        G = scaled(read(dy, m, n, dym, dyn, mask), w, None, n, columns)  # 1 BN
        if mean is not None:
            sum1 += G
        sum2 += G * normalized(s, m, n, sm, sn, mean, r, rows, mask)
    c1 = None
    if mean is not None:
        c1 = tl.sum(sum1, 1) / N  # 1
    c2 = tl.sum(sum2, 1) / N  # 1
    if dr is not None:
        c2 += tl.load(dr + m) * r / N
    for k in range(0, N, BN):
        n = k + tl.arange(0, BN)
        columns = n < N
        mask = columns[None, :]
        G = scaled(read(dy, m, n, dym, dyn, mask), w, None, n, columns)
        xh = normalized(s, m, n, sm, sn, mean, r, rows, mask)
        D = slope(G, xh, c1, c2, r, ds, dm, m, n, dsm, dsn, N, rows, mask)
        write_slopes(D, dx, da, seed, m, n, N, threshold, scale, mask)


def tile(N: int, warp: int, held: int = HELD) -> tuple[int, int, int]:
    """BM, BN and how many warps, of `warp` threads each, for rows of N elements; for longer ones than held, of dw and db."""
    if held < N:
        return LONG_TILE // COLUMNS, COLUMNS, 2 * LONG_TILE // (PER_THREAD * warp)
    BN = triton.next_power_of_2(N)
    BM = max(1, TILE // BN)
    return BM, BN, min(max(BM * BN // (PER_THREAD * warp), 1), 1024 // warp)


def compilations(name: str, warp: int, *, centred: bool, added: bool = False, dropout: bool = False) -> list[Spec]:
    """The kernels at an op's shipped configurations: short rows, several to a tile; common ones; the longest held; the longest.

    With second order where it takes the most registers.
    """
    x, both = ["x", "a", "s"] if added else ["x"], ["mean", "rstd"] if centred else ["rstd"]
    seed, ds, second = ["seed"] * dropout, ["ds"] * added, ["dm", "dr"] if centred else ["dr"]
    forward = [*x, *seed, "w", "b", "y", *both] if centred else [*x, *seed, "w", "y", *both]
    slopes = ["dy", *ds, "s", "w", *both, *seed, "dx", *["da"] * dropout]
    sums = ["dw", "db"] if centred else ["dw"]
    held = HELD_MASKED if dropout else HELD
    long = {"BN": LONG_TILE}
    every = []
    for t in ("bf16", "fp32"):

        def add(label, kernel, pointers, N, tiles, warps, t=t):
            every.append(_spec(f"{name}{label} {t} {N}", kernel, pointers, t, tiles, warps))

        for N in (64, 1024, HELD):
            BM, BN, warps = tile(N, warp)
            add("", forward_kernel, forward, N, {"BM": BM, "BN": BN}, warps)
        for N in (64, 1024, held):
            BM, BN, warps = tile(N, warp, held)
            add(" backward", backward_kernel, slopes + sums, N, {"BM": BM, "BN": BN}, warps)
        add(" backward second order", backward_kernel, slopes + sums + second, held, {"BM": BM, "BN": BN}, warps)
        BM, BN, warps = tile(LONGEST, warp)
        add("", long_forward_kernel, forward, LONGEST, long, warps)
        add(" backward", long_backward_kernel, slopes, LONGEST, long, warps)
        add(" backward second order", long_backward_kernel, slopes + second, LONGEST, long, warps)
        if not added:  # the others have the same
            add(" backward of w", backward_kernel, ["dy", "s", *both, *sums], LONGEST, {"BM": BM, "BN": BN}, warps)
    return every


def _spec(label: str, kernel: Any, pointers: list[str], t: str, tiles: dict[str, int], warps: int) -> Spec:
    """A compilation with these pointers and no others, rows dense."""
    types = {p: f"*{OTHER_TYPES.get(p, t)}" for p in pointers}
    aligned = [*pointers, *(p + "m" for p in pointers if p + "m" in kernel.arg_names), "N"]
    scalars = {"M": "i32", "eps": "fp32"} | ({"threshold": "i32", "scale": "fp32"} if "seed" in pointers else {})
    types |= {p: "i32" for p in aligned if p not in pointers} | {p: s for p, s in scalars.items() if p in kernel.arg_names}
    steps = dict.fromkeys(("xn", "an", "dyn", "dsn", "sn"), 1)
    constants = {p: steps.get(p) for p in kernel.arg_names if p not in types} | tiles
    return Spec(label, kernel, types, constants, tuple(aligned), warps)
