"""The kernels of attention. For the maths see `bptoolkit.ops.attention_rule`, for the launches `attention`.

A program has a tile of rows I, or of columns J, of one sample and passes over what that sees: tiles that an edge cuts (of the
window, the lengths, the matrix) with a mask of places, those between without. S is in base 2, S log₂e, so that its exponential
is one instruction; with an additive mask, whose lowest numbers would overflow there, it is as it is (NATURAL).

Letters as in the rule; a sample of the batch is (b, h, g): k and v have no g where a group of heads shares them. x is Q Kᵀ. An
option that is not given is None. do, q, k and v are pointers or tensor descriptors, and SPECIAL shares a loop's work out among
warps: see `attention_descriptors`.
"""

import triton
import triton.language as tl

from bptoolkit.triton_kernels.attention_rows import moved, put, rows, tile_of, wide
from bptoolkit.triton_kernels.attention_sequences import blocks_of, others, sequence_at
from bptoolkit.triton_kernels.functions import tanh
from bptoolkit.triton_kernels.randomness import hashed, keep_in_row

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # a finite top: exp(−inf − top) is 0


@triton.jit
def exponential(s, NATURAL: tl.constexpr):
    return tl.exp(s) if NATURAL else tl.exp2(s)


@triton.jit
def seen_by(first, B: tl.constexpr, C: tl.constexpr, length, before, after, shift):
    """The columns that rows first ... first + B see, by tiles of C: begin, the full ones' begin and end, end."""
    begin, full, full_end, end = 0, 0, length, length
    if before is not None:
        begin = tl.maximum(first + shift - before, 0) // C * C
        full = tl.cdiv(tl.maximum(first + B - 1 + shift - before, 0), C) * C
    if after is not None:
        end = tl.minimum(length, first + B + shift + after)
        full_end = first + shift + after + 1
    full = tl.maximum(tl.minimum(full, end), begin)
    full_end = tl.maximum(tl.minimum(full_end, length), 0) // C * C
    return begin, full, tl.maximum(full_end, full), end


@triton.jit
def scores(
    x, i, j, i0, j0, m, ml, ms, L, slope, left, right, shift, length, scale, cap, NATURAL: tl.constexpr, EDGE: tl.constexpr
):  # fmt: skip
    """S of a tile, −inf where it is hidden; and tanh(x σ/c). i and j: from i0 and j0, one of them as a column.

    The mask can be read past column S; a row past the last is read as the last.
    """
    unit = 1.0 if NATURAL else LOG2E
    if cap is None:
        t, s = x, x * (scale * unit)
    else:
        t = tanh(x * (scale / cap))
        s = t * (cap * unit)
    if slope is not None:
        s -= (slope * unit) * tl.abs(i - j + (i0 + shift - j0)).to(tl.float32)
    if m is not None:
        at = m + (wide(i0) * ml + wide(j0) * ms)
        y = tl.load(at + (tl.minimum(i, L - i0 - 1) * ml + j * ms))
        s = s + y.to(tl.float32) if NATURAL else tl.where(y != 0, s, float("-inf"))
    if EDGE:
        if length is not None:
            s = tl.where(j < length - j0, s, float("-inf"))
        if left is not None:
            s = tl.where(j - i >= i0 + shift - left - j0, s, float("-inf"))
        if right is not None:
            s = tl.where(j - i <= i0 + shift + right - j0, s, float("-inf"))
    return s, t


@triton.jit
def sample_at(n, H, G):
    """b, h, g of sample n, of 64 bits; divisions are of 32."""
    c = n // G
    b = c // H
    return wide(b), wide(c - b * H), wide(n - c * G)


@triton.jit
def mask_at(n, mb, mh, mg, MH, MG):
    """Where the mask of sample n begins: a place in dimensions of its own, (n / MH MG, MH, MG)."""
    b, h, g = sample_at(n, MH, MG)
    return b * mb + h * mh + g * mg


@triton.jit
def columns_of(part: tl.constexpr, begin, full, full_end, end, SPLIT: tl.constexpr):
    """Where a part's loop begins and ends: an edge, what no edge cuts, the other edge; or all of it."""
    if not SPLIT:
        j1, j2 = begin, end
    elif part == 0:
        j1, j2 = begin, full
    elif part == 1:
        j1, j2 = full, full_end
    else:
        j1, j2 = full_end, end
    return j1, j2


@triton.jit(do_not_specialize=["MH", "MG", "H", "G", "L", "S", "C", "shift", "threshold"])
def forward_kernel(
    q, k, v, m, slopes, lengths, seed, cu_q, cu_k, o, lse, top, l,
    qb, qh, qg, ql, kb, kh, ks, vb, vh, vs, mb, mh, mg, ml, ms, MH, MG,
    H, G, L, S, C, left, right, shift, scale, cap, threshold, inverse,
    E: tl.constexpr, EV: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    NATURAL: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, SPECIAL: tl.constexpr,
):  # fmt: skip
    """O, lse, top and l of rows I."""
    blocks = blocks_of(L, C, cu_q, BM)
    pid = tl.program_id(0)
    block = blocks - 1 - pid % blocks  # those that see most first
    n = pid // blocks
    b, h, g = sample_at(n, H, G)
    i0, i_, j_, height, width = block * BM, 0, 0, L, S  # of packed sequences: the first row and column, the rows and columns
    if cu_q is not None:
        c, i_, height, i0 = sequence_at(block, cu_q, C, L, BM)
        j_, width = others(c, cu_k, C, S)
        shift *= width - height
        width = tl.where(i0 < height, width, 0)
    q = moved(q, b * qb + h * qh + wide(i_) * ql)
    k = moved(k, b * kb + h * kh + wide(j_) * ks)
    v = moved(v, b * vb + h * vh + wide(j_) * vs)
    if m is not None:
        m += mask_at(n, mb, mh, mg, MH, MG)
    slope, length = None, width
    if slopes is not None:
        slope = tl.load(slopes + n)
    if lengths is not None:
        length = tl.maximum(tl.minimum(tl.load(lengths + n), width), 0)
    i, j = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    at, here = wide(n) * L + (i_ + i0) + tl.arange(0, BM), tl.arange(0, BM) < height - i0
    if seed is not None:
        keys = hashed(at, seed)[:, None]
    Q = tile_of(q, b, h, g, i0, qg, ql, height - i0, E, BM, BE, UPCAST)  # BM BE
    O = tl.zeros((BM, BV), tl.float32)
    T = tl.full((BM,), LOWEST, tl.float32)
    Z = tl.zeros((BM,), tl.float32)
    begin, full, full_end, end = seen_by(i0, BM, BN, length, left, right, shift)
    for part in tl.static_range(3 if SPLIT else 1):
        j1, j2 = columns_of(part, begin, full, full_end, end, SPLIT)
        if part > 0 or left is not None or not SPLIT:
            for j0 in tl.range(j1, j2, BN, warp_specialize=SPECIAL):
                K = tile_of(k, b, h, 0, j0, 0, ks, width - j0, E, BN, BE, UPCAST, not SPLIT or part != 1)  # BN BE
                x = tl.dot(Q, tl.trans(K), input_precision=PRECISION)  # BM BN
                s, _ = scores(
                    x, i, j, i0, j0, m, ml, ms, height, slope, left, right, shift, length, scale, cap, NATURAL,
                    not SPLIT or part != 1,
                )  # fmt: skip
                T1 = tl.maximum(T, tl.max(s, 1))
                p = exponential(s - T1[:, None], NATURAL)
                shrink = exponential(T - T1, NATURAL)
                Z = Z * shrink + tl.sum(p, 1)
                if seed is not None:
                    p = tl.where(keep_in_row(j_ + j0 + j, keys, threshold), p, 0.0)
                V = tile_of(v, b, h, 0, j0, 0, vs, width - j0, EV, BN, BV, UPCAST, not SPLIT or part != 1)  # BN BV
                O = tl.dot(p.to(V.dtype), V, O * shrink[:, None], input_precision=PRECISION)
                T = T1
    nothing = Z == 0
    Z = tl.where(nothing, 1.0, Z)
    T = tl.where(nothing, 0.0, tl.where(Z != Z, Z, T))
    O /= Z[:, None]
    if seed is not None:
        O *= inverse
    put(o + (wide(n) * L + i_ + i0) * EV, O, height - i0, EV, BM, BV)
    if not NATURAL:
        T1 = T
        T *= LN2
        rounded = tl.where(nothing, 0.0, T * LOG2E)  # as backward will have it; a choice keeps the product out of an fma
        Z *= tl.exp2(T1 - rounded)  # else P would not sum to 1 there where T is large
    tl.store(lse + at, tl.where(nothing, float("-inf"), T + tl.log(Z)), here)
    tl.store(top + at, T, here)
    tl.store(l + at, Z, here)


@triton.jit(do_not_specialize=["MH", "MG", "H", "G", "L", "S", "C", "shift", "threshold"])
def rows_kernel(
    do, dlse, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, o, top, l, T_, r_, D, dq, dslopes,
    ob, oh, og, ol, qb, qh, qg, ql, kb, kh, ks, vb, vh, vs, mb, mh, mg, ml, ms, MH, MG, yb, yh, yg, yl,
    H, G, L, S, C, left, right, shift, scale, cap, threshold, inverse,
    E: tl.constexpr, EV: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    NATURAL: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, SPECIAL: tl.constexpr,
):  # fmt: skip
    """Of rows I: what `columns_kernel` wants of them, dQ, and what they give to the gradient of their slope.

    ob ... are the steps of do, yb ... those of o. Rows past the end get T = ∞, hence P = 0.
    """
    blocks = blocks_of(L, C, cu_q, BM)
    pid = tl.program_id(0)
    block = blocks - 1 - pid % blocks
    n = pid // blocks
    b, h, g = sample_at(n, H, G)
    i0, i_, j_, height, width = block * BM, 0, 0, L, S
    if cu_q is not None:
        c, i_, height, i0 = sequence_at(block, cu_q, C, L, BM)
        j_, width = others(c, cu_k, C, S)
        shift *= width - height
        width = tl.where(i0 < height, width, 0)
    at, here = wide(n) * L + (i_ + i0) + tl.arange(0, BM), tl.arange(0, BM) < height - i0
    to = (wide(n) * blocks + block) * BM + tl.arange(0, BM)
    T = tl.load(top + at, here, other=float("inf"))
    T = T if NATURAL else T * LOG2E
    r = 1 / tl.load(l + at, here, other=1.0)
    tl.store(T_ + to, T)
    tl.store(r_ + to, r)
    if o is not None:
        do = moved(do, b * ob + h * oh + wide(i_) * ol)
        o += b * yb + h * yh + g * yg + wide(i_ + i0) * yl
        dO = tile_of(do, b, h, g, i0, og, ol, height - i0, EV, BM, BV, UPCAST)  # BM BV
        d = tl.sum(dO.to(tl.float32) * rows(o, yl, height - i0, EV, BM, BV, False).to(tl.float32), 1)  # BM
        if dlse is not None:
            d -= tl.load(dlse + at, here, other=0.0).to(tl.float32)
        tl.store(D + to, d)
    if dq is not None or dslopes is not None:
        q = moved(q, b * qb + h * qh + wide(i_) * ql)
        k = moved(k, b * kb + h * kh + wide(j_) * ks)
        v = moved(v, b * vb + h * vh + wide(j_) * vs)
        if m is not None:
            m += mask_at(n, mb, mh, mg, MH, MG)
        slope, length = None, width
        if slopes is not None:
            slope = tl.load(slopes + n)
        if lengths is not None:
            length = tl.maximum(tl.minimum(tl.load(lengths + n), width), 0)
        i, j = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
        if seed is not None:
            keys = hashed(at, seed)[:, None]
        Q = tile_of(q, b, h, g, i0, qg, ql, height - i0, E, BM, BE, UPCAST)  # BM BE
        A = tl.zeros((BM, BE), tl.float32)
        F = tl.zeros((BM,), tl.float32)
        begin, full, full_end, end = seen_by(i0, BM, BN, length, left, right, shift)
        for part in tl.static_range(3 if SPLIT else 1):
            j1, j2 = columns_of(part, begin, full, full_end, end, SPLIT)
            if part > 0 or left is not None or not SPLIT:
                for j0 in tl.range(j1, j2, BN, warp_specialize=SPECIAL):
                    K = tile_of(k, b, h, 0, j0, 0, ks, width - j0, E, BN, BE, UPCAST, not SPLIT or part != 1)  # BN BE
                    V = tile_of(v, b, h, 0, j0, 0, vs, width - j0, EV, BN, BV, UPCAST, not SPLIT or part != 1)  # BN BV
                    x = tl.dot(Q, tl.trans(K), input_precision=PRECISION)  # BM BN
                    s, t = scores(
                        x, i, j, i0, j0, m, ml, ms, height, slope, left, right, shift, length, scale, cap, NATURAL,
                        not SPLIT or part != 1,
                    )  # fmt: skip
                    p = exponential(s - T[:, None], NATURAL) * r[:, None]
                    dp = tl.dot(dO, tl.trans(V), input_precision=PRECISION)  # BM BN
                    if seed is not None:
                        dp = tl.where(keep_in_row(j_ + j0 + j, keys, threshold), dp * inverse, 0.0)
                    ds = p * (dp - d[:, None])
                    if dslopes is not None:
                        F -= tl.sum(ds * tl.abs(i - j + (i0 + shift - j0)).to(tl.float32), 1)
                    if cap is not None:
                        ds *= 1 - t * t
                    if dq is not None:
                        A = tl.dot(ds.to(K.dtype), K, A, input_precision=PRECISION)
        if dq is not None:
            put(dq + (wide(n) * L + i_ + i0) * E, A * scale, height - i0, E, BM, BE)
        if dslopes is not None:
            tl.store(dslopes + (n * blocks + block), tl.sum(tl.where(here, F, 0.0), 0))


@triton.jit(do_not_specialize=["MH", "MG", "H", "G", "L", "S", "C", "shift", "threshold"])
def columns_kernel(
    do, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, T_, r_, D, dk, dv,
    ob, oh, og, ol, qb, qh, qg, ql, kb, kh, ks, vb, vh, vs, mb, mh, mg, ml, ms, MH, MG,
    H, G, L, S, C, left, right, shift, scale, cap, threshold, inverse,
    E: tl.constexpr, EV: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    NATURAL: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, SPECIAL: tl.constexpr,
):  # fmt: skip
    """dK and dV of columns J, summed over the group. All tiles are transposed.

    Columns past the end have rows of dK and dV of their own, which are not written, and rows past the end have P = 0: neither
    needs a mask. BR is BM of `rows_kernel`.
    """
    blocks = blocks_of(S, C, cu_k, BN)
    pid = tl.program_id(0)
    block, stretch = pid % blocks, blocks_of(L, C, cu_q, BR) * BR
    n0 = pid // blocks  # B H
    j0, j_, i_, width, height, start = block * BN, 0, 0, S, L, 0
    if cu_k is not None:
        c, j_, width, j0 = sequence_at(block, cu_k, C, S, BN)
        i_, height = others(c, cu_q, C, L)
        shift *= width - height
        height = tl.where(j0 < width, height, 0)
        start = (i_ // BR + c + 1) * BR
    b, h, first = wide(n0 // H), wide(n0 % H), wide(n0) * S + (j_ + j0)
    do = moved(do, b * ob + h * oh + wide(i_) * ol)
    q = moved(q, b * qb + h * qh + wide(i_) * ql)
    k = moved(k, b * kb + h * kh + wide(j_) * ks)
    K = tile_of(k, b, h, 0, j0, 0, ks, width - j0, E, BN, BE, UPCAST)  # BN BE
    if dk is not None:
        v = moved(v, b * vb + h * vh + wide(j_) * vs)
        V = tile_of(v, b, h, 0, j0, 0, vs, width - j0, EV, BN, BV, UPCAST)  # BN BV
        dK = tl.zeros((BN, BE), tl.float32)
    if dv is not None:
        dV = tl.zeros((BN, BV), tl.float32)
    EDGE: tl.constexpr = left is not None or right is not None or lengths is not None
    j, i = tl.arange(0, BN)[:, None], tl.arange(0, BM)[None, :]
    begin, _, _, end = seen_by(j0, BN, BM, height, right, left, -shift)
    for g in range(0, G):
        n = n0 * G + g
        slope, length, mask = None, None, None
        if m is not None:
            mask = m + mask_at(n, mb, mh, mg, MH, MG)
        if slopes is not None:
            slope = tl.load(slopes + n)
        last = end
        if lengths is not None:
            length = tl.load(lengths + n)
            last = tl.where(length > j0, end, begin)
        for i0 in tl.range(begin, last, BM, warp_specialize=SPECIAL):
            at = wide(n) * stretch + (start + i0) + tl.arange(0, BM)
            Q = tile_of(q, b, h, g, i0, qg, ql, height - i0, E, BM, BE, UPCAST)  # BM BE
            dO = tile_of(do, b, h, g, i0, og, ol, height - i0, EV, BM, BV, UPCAST)  # BM BV
            x = tl.dot(K, tl.trans(Q), input_precision=PRECISION)  # BN BM
            s, t = scores(
                x, i, j, i0, j0, mask, ml, ms, height, slope, left, right, shift, length, scale, cap, NATURAL, EDGE
            )  # fmt: skip
            p = exponential(s - tl.load(T_ + at)[None, :], NATURAL) * tl.load(r_ + at)[None, :]
            if seed is not None:
                keys = hashed(wide(n) * L + (i_ + i0) + tl.arange(0, BM), seed)[None, :]
                z = tl.where(keep_in_row(j_ + j0 + j, keys, threshold), inverse, 0.0)  # BN BM
            if dv is not None:
                pz = p
                if seed is not None:
                    pz = p * z
                dV = tl.dot(pz.to(dO.dtype), dO, dV, input_precision=PRECISION)
            if dk is not None:
                dp = tl.dot(V, tl.trans(dO), input_precision=PRECISION)  # BN BM
                if seed is not None:
                    dp *= z
                ds = p * (dp - tl.load(D + at)[None, :])
                if cap is not None:
                    ds *= 1 - t * t
                dK = tl.dot(ds.to(Q.dtype), Q, dK, input_precision=PRECISION)
    if dk is not None:
        put(dk + first * E, dK * scale, width - j0, E, BN, BE)
    if dv is not None:
        put(dv + first * EV, dV, width - j0, EV, BN, BV)
