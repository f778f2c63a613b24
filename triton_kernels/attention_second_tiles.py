"""Tiles of attention's second order, for `attention_second`. For the maths see `bptoolkit.ops.attention_rule`."""

import triton
import triton.language as tl

from bptoolkit.triton_kernels.attention_loops import rows, wide


@triton.jit
def of_sample(p, n, H, G, pb, ph, pg):
    """Where sample n = (b, h, g) begins."""
    return p + (n // (H * G) * pb + n // G % H * ph + n % G * pg)


@triton.jit
def tile_of(p, step, first, count, E: tl.constexpr, R: tl.constexpr, BE: tl.constexpr, UPCAST: tl.constexpr):
    """R rows from `first` on, or None."""
    if p is None:
        x = None
    else:
        x = rows(p + wide(first) * step, step, count - first, E, R, BE, UPCAST)  # R BE
    return x


@triton.jit
def products(Q, A, K, B, PRECISION: tl.constexpr):
    """Q Kᵀ, and A Kᵀ + Q Bᵀ of what is given. Of K, B, Q, A they are transposed."""
    x, y = tl.dot(Q, tl.trans(K), input_precision=PRECISION), None
    if A is not None:
        y = tl.dot(A, tl.trans(K), input_precision=PRECISION)
        if B is not None:
            y = tl.dot(Q, tl.trans(B), y, input_precision=PRECISION)
    elif B is not None:
        y = tl.dot(Q, tl.trans(B), input_precision=PRECISION)
    return x, y


@triton.jit
def products_by_parts(
    q, qs, a, as_, i0, L, k, ks, b, bs, j0, S,
    E: tl.constexpr, R: tl.constexpr, C: tl.constexpr, BE: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same from memory, PART features at a time."""
    x, y = tl.zeros((R, C), tl.float32), None
    if a is not None or b is not None:
        y = tl.zeros((R, C), tl.float32)
    e = tl.arange(0, PART)[None, :]
    i, j = tl.arange(0, R)[:, None], tl.arange(0, C)[:, None]
    for e0 in range(0, BE, PART):
        here, there = (i < L - i0) & (e < E - e0), (j < S - j0) & (e < E - e0)
        Q = tl.load(q + wide(i0) * qs + (i * qs + (e + e0)), here, other=0.0)  # R PART
        K = tl.load(k + wide(j0) * ks + (j * ks + (e + e0)), there, other=0.0)  # C PART
        x = tl.dot(Q, tl.trans(K), x, input_precision=PRECISION)
        if a is not None:
            A = tl.load(a + wide(i0) * as_ + (i * as_ + (e + e0)), here, other=0.0)
            y = tl.dot(A, tl.trans(K), y, input_precision=PRECISION)
        if b is not None:
            B = tl.load(b + wide(j0) * bs + (j * bs + (e + e0)), there, other=0.0)
            y = tl.dot(Q, tl.trans(B), y, input_precision=PRECISION)
    return x, y


@triton.jit
def change(y, t, f, apart, scale, cap):
    """U of a tile from A Kᵀ + Q Bᵀ, and of it what Q and K give, with a cap A∘(1 − τ²)."""
    x, u = None, None
    if y is not None:
        x = y
        x *= scale
        if cap is not None:
            x *= 1 - t * t
        u = x
    if f is not None:
        if u is None:
            u = -f * apart
        else:
            u = u - f * apart
    return u, x


@triton.jit
def second(p, u_, w_, D, U, x, G, C, t, cap):
    """W and dS of a tile, by S; and by R = σ Q Kᵀ. G is dO Vᵀ, C dO cᵀ; U, and with it G, or C may be None."""
    ds = None
    if U is None:
        w = p * (C - w_)
    else:
        X = G - D
        ds = p * X
        w = (U - u_) * X - w_
        if C is not None:
            w += C
        w *= p
    wr = w
    if cap is not None:
        slope = 1 - t * t
        wr = w * slope
        if ds is not None:
            if x is not None:
                wr -= (2 / cap) * ds * x * t
            ds *= slope
    return w, wr, ds
