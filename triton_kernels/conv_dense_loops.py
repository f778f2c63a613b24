"""The two loops of dense convolution by implicit matrix products: places × channels, and channels × (taps, channels).

No matrix of patches is written: the products' rows are gathered from x as they are needed. All images have three axes, the
first of size 1 unless DEEP, and their channels side by side: (N, D, H, W, C). What a convolution is like are numbers, not
constants: one compilation serves every kernel, stride, padding and dilation.

gather     a place u of y meets x at u·s + a + t·r on each axis, in its tap t of Q × R × S. Tap (q, r, s) is the kernel's
           element t0 + q·tq + r·tr + s·ts. That is forward, and it is dx, one class of residues by the stride at a time
weight     dw over a share of the places; the shares, in float32, are added up afterwards
"""

from __future__ import annotations

import triton
import triton.language as tl

OF_IMAGES = ["N", "D", "H", "W", "UD", "UH", "UW"]
OF_TAPS = ["TAPS", "R", "S", "sd", "sh", "sw", "ad", "ah", "aw", "rd", "rh", "rw"]
OF_GATHER = [*OF_IMAGES, *OF_TAPS, "KT", "t0", "tq", "tr", "ts"]  # what a compilation need not know
OF_WEIGHT = [*OF_IMAGES, *OF_TAPS, "blocks"]


@triton.jit
def places(start, UD, UH, UW, DEEP: tl.constexpr, B: tl.constexpr):
    """Sample (int64) and place on three axes of the B places from start (int64)."""
    U = UD * UH * UW
    first = start // U
    u = (start - first * U).to(tl.int32) + tl.arange(0, B)  # B
    n = first + u // U
    if DEEP:
        return n, u // (UH * UW) % UD, u // UW % UH, u % UW
    else:
        return n, tl.zeros_like(u), u // UW % UH, u % UW


@triton.jit
def taps(k0, k, I, R, S, DEEP: tl.constexpr, WHOLE: tl.constexpr):
    """Of columns k, which are (tap, channel), from k0: the tap on three axes, and the channel. WHOLE: they lie in one tap."""
    if WHOLE:
        t = k0 // I
    else:
        t = k // I
    if DEEP:
        return t // (R * S), t // S % R, t % S, k - t * I
    else:
        return 0, t // S, t % S, k - t * I


@triton.jit
def inside(d, h, w, D, H, W, DEEP: tl.constexpr):
    mask = (h >= 0) & (h < H) & (w >= 0) & (w < W)
    return mask & (d >= 0) & (d < D) if DEEP else mask


@triton.jit(do_not_specialize=OF_GATHER)
def gather_kernel(
    x, w, b, y, N, D, H, W, UD, UH, UW, TAPS, R, S, sd, sh, sw, ad, ah, aw, rd, rh, rw, KT, t0, tq, tr, ts,
    I, O, G, yn, yd, yh, yw, yc, EI: tl.constexpr, EO: tl.constexpr, DEEP: tl.constexpr, TRANSPOSED: tl.constexpr,
    WHOLE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """From x (N, D, H, W, G I EI) to y (N, UD, UH, UW, G O EO), which has strides. KT elements of the kernel: w is
    (G O EO, KT, I EI), or (G I EI, KT, O EO) if TRANSPOSED."""
    I *= EI  # a multiple of EI, which the compiler now knows
    O *= EO
    C, T = G * I, TAPS * I
    across = tl.cdiv(O, BN)
    i = tl.program_id(0)
    g, o = i // across % G, (i % across * BN + tl.arange(0, BN))[None, :]  # 1 BN
    n, ud, uh, uw = places((i // across // G).to(tl.int64) * BM, UD, UH, UW, DEEP, BM)  # BM
    n, ud, uh, uw = n[:, None], ud[:, None], uh[:, None], uw[:, None]  # BM 1
    d, h, v = ud * sd + ad, uh * sh + ah, uw * sw + aw
    at = ((d * H + h) * W + v) * C + g * I
    x += n * (D * H * W * C)
    Y = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, T, BK):
        k = k0 + tl.arange(0, BK)
        q, r, s, c = taps(k0, k[None, :], I, R, S, DEEP, WHOLE)  # 1 BK, or one number
        q, r, s = q * rd, r * rh, s * rw
        mask = (n < N) & inside(d + q, h + r, v + s, D, H, W, DEEP)
        if not WHOLE:
            mask &= (k < T)[None, :]
        X = tl.load(x + (at + ((q * H + r) * W + s) * C + c), mask, other=0.0)  # BM BK
        q, r, s, c = taps(k0, k[:, None], I, R, S, DEEP, WHOLE)
        t = t0 + q * tq + r * tr + s * ts
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
    to = y + n * yn + (ud * yd + uh * yh + uw * yw) + (g * O + o) * yc
    tl.store(to, Y.to(y.dtype.element_ty), (n < N) & (o < O))


@triton.jit(do_not_specialize=OF_WEIGHT)
def weight_kernel(
    dy, x, sums, N, D, H, W, UD, UH, UW, TAPS, R, S, sd, sh, sw, ad, ah, aw, rd, rh, rw, blocks, I, O, G,
    EI: tl.constexpr, EO: tl.constexpr, DEEP: tl.constexpr, WHOLE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """From dy (N, UD, UH, UW, G O EO) and x (N, D, H, W, G I EI) to sums (programs of axis 1, G O EO, TAPS, I EI)."""
    I *= EI
    O *= EO
    C, T = G * I, TAPS * I
    across, down = tl.cdiv(T, BN), tl.cdiv(O, BM)
    i = tl.program_id(0)
    o = (i // across % down * BM + tl.arange(0, BM))[:, None]  # BM 1
    g, k0 = i // across // down, i % across * BN
    k = (k0 + tl.arange(0, BN))[None, :]  # 1 BN
    q, r, s, c = taps(k0, k, I, R, S, DEEP, WHOLE)
    q, r, s = q * rd, r * rh, s * rw
    x += ((q * H + r) * W + s) * C + g * I + c
    dy += g * O + o
    DW = tl.zeros((BM, BN), tl.float32)
    for j in range(tl.program_id(1), blocks, tl.num_programs(1)):
        n, d, h, v = places((tl.zeros((), tl.int64) + j) * BK, UD, UH, UW, DEEP, BK)  # BK
        at = n * (UD * UH * UW * G * O) + ((d * UH + h) * UW + v) * (G * O)
        DY = tl.load(dy + at[None, :], (o < O) & (n < N)[None, :], other=0.0)  # BM BK
        d, h, v = d * sd + ad, h * sh + ah, v * sw + aw
        at = n * (D * H * W * C) + ((d * H + h) * W + v) * C
        mask = (n < N)[:, None] & inside(d[:, None] + q, h[:, None] + r, v[:, None] + s, D, H, W, DEEP) & (k < T)
        X = tl.load(x + at[:, None], mask, other=0.0)  # BK BN
        if UPCAST:
            DY, X = DY.to(tl.float32), X.to(tl.float32)
        DW = tl.dot(DY, X, DW, input_precision=PRECISION)
    to = sums + ((tl.program_id(1).to(tl.int64) * G + g) * O + o) * T + k
    tl.store(to, DW, (o < O) & (k < T))
