"""Tiles of attention's second order, for `attention_second`. For the maths see `bptoolkit.ops.attention_rule`."""

import triton
import triton.language as tl

from bptoolkit.triton_kernels.attention_loops import rows, sample_at, wide
from bptoolkit.triton_kernels.attention_sequences import others, sequence_at
from bptoolkit.triton_kernels.randomness import keep_in_row


@triton.jit
def rows_at(block, cu_q, cu_k, N, L, S, shift, B: tl.constexpr):
    """Block `block` of B rows: its first row in its sequence; the sequence's number from 1, first row and column, rows, columns
    and shift; where sequences are not packed, of the one that there is, of number 0."""
    i0, sequence, i_, j_, height, width = block * B, 0, 0, 0, L, S
    if cu_q is not None:
        number, i_, height, i0 = sequence_at(block, cu_q, N, L, B)
        j_, width = others(number, cu_k, N, S)
        sequence = number + 1
        shift *= width - height
        width = tl.where(i0 < height, width, 0)
    return i0, sequence, i_, j_, height, width, shift


@triton.jit
def from_sample(p, n, H, G, pb, ph, pg, first, step):
    """Where row `first` of sample n = (b, h, g) begins, or None."""
    if p is None:
        at = None
    else:
        b, h, g = sample_at(n, H, G)
        at = p + (b * pb + h * ph + g * pg + wide(first) * step)
    return at


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
    """A Kᵀ + Q Bᵀ of what is given, or None. Of K, B, Q, A it is transposed."""
    y = None
    if A is not None:
        y = tl.dot(A, tl.trans(K), input_precision=PRECISION)
        if B is not None:
            y = tl.dot(Q, tl.trans(B), y, input_precision=PRECISION)
    elif B is not None:
        y = tl.dot(Q, tl.trans(B), input_precision=PRECISION)
    return y


@triton.jit
def products_by_parts(
    q, qs, a, as_, i0, L, k, ks, b, bs, j0, S,
    E: tl.constexpr, R: tl.constexpr, C: tl.constexpr, BE: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Q Kᵀ, and A Kᵀ + Q Bᵀ, of what is given, from memory, PART features at a time. Of k, b, q, a they are transposed."""
    x, y = None, None
    if q is not None and k is not None:
        x = tl.zeros((R, C), tl.float32)
    if a is not None or b is not None:
        y = tl.zeros((R, C), tl.float32)
    e = tl.arange(0, PART)[None, :]
    i, j = tl.arange(0, R)[:, None], tl.arange(0, C)[:, None]
    for e0 in range(0, BE, PART):
        here, there = (i < L - i0) & (e < E - e0), (j < S - j0) & (e < E - e0)
        if q is not None:
            Q = tl.load(q + wide(i0) * qs + (i * qs + (e + e0)), here, other=0.0)  # R PART
        if k is not None:
            K = tl.load(k + wide(j0) * ks + (j * ks + (e + e0)), there, other=0.0)  # C PART
        if q is not None and k is not None:
            x = tl.dot(Q, tl.trans(K), x, input_precision=PRECISION)
        if a is not None:
            A = tl.load(a + wide(i0) * as_ + (i * as_ + (e + e0)), here, other=0.0)
            y = tl.dot(A, tl.trans(K), y, input_precision=PRECISION)
        if b is not None:
            B = tl.load(b + wide(j0) * bs + (j * bs + (e + e0)), there, other=0.0)
            y = tl.dot(Q, tl.trans(B), y, input_precision=PRECISION)
    return x, y


@triton.jit
def kept(columns, keys, threshold, inverse):
    """Z of a tile, or None without dropout."""
    if keys is None:
        z = None
    else:
        z = tl.where(keep_in_row(columns, keys, threshold), inverse, 0.0)
    return z


@triton.jit
def change(y, t, f, apart, scale, cap):
    """U of a tile from A Kᵀ + Q Bᵀ, and of it what Q and K give, with a cap A∘(1 − τ²)."""
    x, u = None, None
    if y is not None:
        x = y * scale
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
def second(p, u_, w_, D, U, x, G, C, z, t, cap):
    """W of a tile, by S; and W and dS by R = σ Q Kᵀ. G is dO Vᵀ, C dO cᵀ; U, and with it G, or C may be None."""
    ds = None
    if z is not None:
        if C is not None:
            C *= z
        if U is not None:
            G *= z
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
