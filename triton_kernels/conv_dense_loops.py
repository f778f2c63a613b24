"""The two loops of dense convolution by implicit matrix products: places × channels, and channels × (taps, channels).

No matrix of patches is written: the products' rows are gathered from x as they are needed. All images have three axes, the
first one or two of size 1 where there are fewer, and their channels side by side: (N, D, H, W, C).

gather     a place u of y meets x at u·STEP + BASE + t·REACH in its tap t < TAPS, which is the kernel's element FIRST + t·EVERY,
           and lies at TO + u·APART of y. That is forward, and it is dx, one class of residues by the stride at a time
weight     dw over a share of the places; the shares, in float32, are added up afterwards
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def places(start, UD, UH, UW, B: tl.constexpr):
    """Sample (int64) and place on three axes of the B places from start (int64). Axes of size 1 fold away by the remainder."""
    U = UD * UH * UW
    first = start // U
    u = (start - first * U).to(tl.int32) + tl.arange(0, B)  # B
    return first + u // U, u % U // (UH * UW) % UD, u // UW % UH, u % UW


@triton.jit
def taps(k0, k, I, TAPS: tl.constexpr, WHOLE: tl.constexpr):
    """Of columns k, which are (tap, channel), from k0: the tap on three axes, and the channel. WHOLE: they lie in one tap."""
    if WHOLE:
        t = k0 // I
    else:
        t = k // I
    return t // (TAPS[1] * TAPS[2]) % TAPS[0], t // TAPS[2] % TAPS[1], t % TAPS[2], k - t * I


@triton.jit
def inside(d, h, w, D, H, W):
    return (d >= 0) & (d < D) & (h >= 0) & (h < H) & (w >= 0) & (w < W)


@triton.jit(do_not_specialize=["N"])
def gather_kernel(
    x, w, b, y, N, D, H, W, UD, UH, UW, YH, YW, I, O, G, yn, yp, yc,
    STEP: tl.constexpr, BASE: tl.constexpr, REACH: tl.constexpr, TAPS: tl.constexpr, FIRST: tl.constexpr,
    EVERY: tl.constexpr, TO: tl.constexpr, APART: tl.constexpr, K: tl.constexpr, EI: tl.constexpr, EO: tl.constexpr,
    TRANSPOSED: tl.constexpr, WHOLE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """From x (N, D, H, W, G I EI) to the places U of y, of G O EO channels. w: (G O EO, K, I EI); (G I EI, K, O EO) transposed.

    yn, yp, yc: from one sample, place and channel of y to the next.
    """
    I *= EI  # a multiple of EI, which the compiler now knows
    O *= EO
    C, T, KT = G * I, TAPS[0] * TAPS[1] * TAPS[2] * I, K[0] * K[1] * K[2]
    across = tl.cdiv(O, BN)
    i = tl.program_id(0)
    g, o = i // across % G, (i % across * BN + tl.arange(0, BN))[None, :]  # 1 BN
    n, ud, uh, uw = places((i // across // G).to(tl.int64) * BM, UD, UH, UW, BM)  # BM
    d, h, v = ud * STEP[0] + BASE[0], uh * STEP[1] + BASE[1], uw * STEP[2] + BASE[2]
    at = ((d * H + h) * W + v) * C + g * I
    n, d, h, v, at = n[:, None], d[:, None], h[:, None], v[:, None], at[:, None]  # BM 1
    x += n * (D * H * W * C)
    Y = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, T, BK):
        k = k0 + tl.arange(0, BK)
        q, r, s, c = taps(k0, k[None, :], I, TAPS, WHOLE)  # 1 BK, or one number
        mask = (n < N) & inside(d + q * REACH[0], h + r * REACH[1], v + s * REACH[2], D, H, W)
        if not WHOLE:
            mask &= (k < T)[None, :]
        X = tl.load(x + (at + ((q * REACH[0] * H + r * REACH[1]) * W + s * REACH[2]) * C + c), mask, other=0.0)  # BM BK
        q, r, s, c = taps(k0, k[:, None], I, TAPS, WHOLE)
        t = ((FIRST[0] + q * EVERY[0]) * K[1] + FIRST[1] + r * EVERY[1]) * K[2] + FIRST[2] + s * EVERY[2]
        if TRANSPOSED:
            to = ((g * I + c) * KT + t) * O + o  # BK BN
        else:
            to = ((g * O + o) * KT + t) * I + c
        F = tl.load(w + to, (o < O) if WHOLE else (k < T)[:, None] & (o < O), other=0.0)
        if UPCAST:
            X, F = X.to(tl.float32), F.to(tl.float32)
        Y = tl.dot(X, F, Y, input_precision=PRECISION)
    if b is not None:
        Y += tl.load(b + g * O + o, o < O, other=0.0).to(tl.float32)
    d, h, v = ud * APART[0] + TO[0], uh * APART[1] + TO[1], uw * APART[2] + TO[2]
    to = y + n * yn + (((d * YH + h) * YW + v) * yp)[:, None] + (g * O + o) * yc
    tl.store(to, Y.to(y.dtype.element_ty), (n < N) & (o < O))


@triton.jit(do_not_specialize=["N", "blocks"])
def weight_kernel(
    dy, x, sums, N, D, H, W, OD, OH, OW, I, O, G, blocks,
    STEP: tl.constexpr, BASE: tl.constexpr, REACH: tl.constexpr, TAPS: tl.constexpr, EI: tl.constexpr, EO: tl.constexpr,
    WHOLE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """From dy (N, OD, OH, OW, G O EO) and x (N, D, H, W, G I EI) to sums (programs of axis 1, G O EO, TAPS, I EI)."""
    I *= EI
    O *= EO
    C, T = G * I, TAPS[0] * TAPS[1] * TAPS[2] * I
    across, down = tl.cdiv(T, BN), tl.cdiv(O, BM)
    i = tl.program_id(0)
    o = (i // across % down * BM + tl.arange(0, BM))[:, None]  # BM 1
    g, k0 = i // across // down, i % across * BN
    k = (k0 + tl.arange(0, BN))[None, :]  # 1 BN
    q, r, s, c = taps(k0, k, I, TAPS, WHOLE)
    q, r, s = q * REACH[0], r * REACH[1], s * REACH[2]
    x += ((q * H + r) * W + s) * C + g * I + c
    dy += g * O + o
    DW = tl.zeros((BM, BN), tl.float32)
    for j in range(tl.program_id(1), blocks, tl.num_programs(1)):
        n, d, h, v = places((tl.zeros((), tl.int64) + j) * BK, OD, OH, OW, BK)  # BK
        at = n * (OD * OH * OW * G * O) + ((d * OH + h) * OW + v) * (G * O)
        DY = tl.load(dy + at[None, :], (o < O) & (n < N)[None, :], other=0.0)  # BM BK
        d, h, v = d * STEP[0] + BASE[0], h * STEP[1] + BASE[1], v * STEP[2] + BASE[2]
        at = n * (D * H * W * C) + ((d * H + h) * W + v) * C
        mask = (n < N)[:, None] & inside(d[:, None] + q, h[:, None] + r, v[:, None] + s, D, H, W) & (k < T)
        X = tl.load(x + at[:, None], mask, other=0.0)  # BK BN
        if UPCAST:
            DY, X = DY.to(tl.float32), X.to(tl.float32)
        DW = tl.dot(DY, X, DW, input_precision=PRECISION)
    to = sums + ((tl.program_id(1).to(tl.int64) * G + g) * O + o) * T + k
    tl.store(to, DW, (o < O) & (k < T))
