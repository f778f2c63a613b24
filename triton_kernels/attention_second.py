"""The kernels of attention's second order. For the maths see `bptoolkit.ops.attention_rule`, for launches `attention_double`.

As in `attention_loops`: a program has a tile of rows I, or of columns J, and passes over what that sees. P is made again from
S, T and l. a, b, c and f are the cotangents of dQ, dK, dV and dh, the directions in which Q, K, V and h move; what is not given
is None, in the tile as in the call. b and c are shared by a group as k and v are. N is the number of packed sequences.

What `sums_kernel` finds of a row are five numbers, T, 1/l, u, D and w − u dlse, each of them for BR rows, its BM, at a time.
"""

import triton
import triton.language as tl

from bptoolkit.triton_kernels.attention_loops import LOG2E, exponential, mask_at, put, scores, seen_by, wide
from bptoolkit.triton_kernels.attention_second_tiles import (
    change,
    from_sample,
    kept,
    products,
    products_by_parts,
    rows_at,
    second,
    tile_of,
)
from bptoolkit.triton_kernels.attention_sequences import blocks_of, others, sequence_at
from bptoolkit.triton_kernels.randomness import hashed


@triton.jit(do_not_specialize=["MH", "MG", "H", "G", "L", "S", "N", "shift", "threshold"])
def sums_kernel(
    a, b, c, f, do, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, dlse, o, top, l, numbers, gdo, gdlse,
    ab, ah, ag, al, bb, bh, bs, cb, ch, cs, ob, oh, og, ol, qb, qh, qg, ql, kb, kh, ks, vb, vh, vs,
    mb, mh, mg, ml, ms, MH, MG, yb, yh, yg, yl,
    H, G, L, S, N, left, right, shift, scale, cap, threshold, inverse,
    E: tl.constexpr, EV: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    NATURAL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, PART: tl.constexpr,
    WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Of rows I: u, with WEIGHTS w − u dlse, and the other numbers that the next kernels want of them; g_dO and g_dlse.

    ab ... are the steps of a, ob ... those of do, yb ... those of o. Rows past the end get T = ∞, hence P = 0.
    """
    blocks = blocks_of(L, N, cu_q, BM)
    pid = tl.program_id(0)
    block, n = blocks - 1 - pid % blocks, pid // blocks
    i0, _, i_, j_, height, width, shift = rows_at(block, cu_q, cu_k, N, L, S, shift, BM)
    at, here = wide(n) * L + (i_ + i0) + tl.arange(0, BM), tl.arange(0, BM) < height - i0
    to = (wide(n) * blocks + block) * (5 * BM) + tl.arange(0, BM)
    T = tl.load(top + at, here, other=float("inf"))
    T = T if NATURAL else T * LOG2E
    r = 1 / tl.load(l + at, here, other=1.0)
    MOVES: tl.constexpr = a is not None or b is not None or f is not None
    q, k = from_sample(q, n, H, G, qb, qh, qg, i_, ql), from_sample(k, n, H, G, kb, kh, 0, j_, ks)
    do, a = from_sample(do, n, H, G, ob, oh, og, i_, ol), from_sample(a, n, H, G, ab, ah, ag, i_, al)
    b, c = from_sample(b, n, H, G, bb, bh, 0, j_, bs), from_sample(c, n, H, G, cb, ch, 0, j_, cs)
    v = from_sample(v, n, H, G, vb, vh, 0, j_, vs)
    slope, f_, keys, length = None, None, None, width
    if m is not None:
        m += mask_at(n, mb, mh, mg, MH, MG)
    if slopes is not None:
        slope = tl.load(slopes + n)
    if f is not None:
        f_ = tl.load(f + n)
    if lengths is not None:
        length = tl.maximum(tl.minimum(tl.load(lengths + n), width), 0)
    if seed is not None:
        keys = hashed(at, seed)[:, None]
    o = from_sample(o, n, H, G, yb, yh, yg, i_, yl)
    if WEIGHTS and MOVES:
        O = tile_of(o, yl, i0, height, EV, BM, BV, False).to(tl.float32)  # BM BV
        d = tl.sum(tile_of(do, ol, i0, height, EV, BM, BV, False).to(tl.float32) * O, 1)
        if dlse is not None:
            d -= tl.load(dlse + at, here, other=0.0).to(tl.float32)
        tl.store(numbers + (to + 3 * BM), d)
    if numbers is not None:
        tl.store(numbers + to, T)
        tl.store(numbers + (to + BM), r)
    if not PART:
        Q = tile_of(q, ql, i0, height, E, BM, BE, UPCAST)  # BM BE
        A = tile_of(a, al, i0, height, E, BM, BE, UPCAST)  # BM BE
        if WEIGHTS:
            dO = tile_of(do, ol, i0, height, EV, BM, BV, UPCAST)  # BM BV
    i, j = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    u, w = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    if gdo is not None:
        A_do = tl.zeros((BM, BV), tl.float32)
    begin, _, _, end = seen_by(i0, BM, BN, length, left, right, shift)
    for j0 in range(begin, end, BN):
        apart, GV, GC = None, None, None
        if PART:
            x, y = products_by_parts(q, ql, a, al, i0, height, k, ks, b, bs, j0, width, E, BM, BN, BE, PART, PRECISION)
            if WEIGHTS:
                GV, GC = products_by_parts(
                    do, ol, None, 0, i0, height, v, vs, c, cs, j0, width, EV, BM, BN, BV, PART, PRECISION
                )  # fmt: skip
        else:
            K = tile_of(k, ks, j0, width, E, BN, BE, UPCAST)  # BN BE
            x = tl.dot(Q, tl.trans(K), input_precision=PRECISION)  # BM BN
        s, t = scores(x, i, j, i0, j0, m, ml, ms, height, slope, left, right, shift, length, scale, cap, NATURAL, True)
        p = exponential(s - T[:, None], NATURAL) * r[:, None]
        z = kept(j_ + j0 + j, keys, threshold, inverse)
        if c is not None:
            pz = p
            if z is not None:
                pz = p * z
            C = tile_of(c, cs, j0, width, EV, BN, BV, UPCAST)  # BN BV
            if WEIGHTS:
                if not PART:
                    GC = tl.dot(dO, tl.trans(C), input_precision=PRECISION)
                w += tl.sum(pz * GC, 1)
            if gdo is not None:
                A_do = tl.dot(pz.to(C.dtype), C, A_do, input_precision=PRECISION)
        if MOVES:
            if not PART:
                y = products(Q, A, K, tile_of(b, bs, j0, width, E, BN, BE, UPCAST), PRECISION)  # BM BN
            if f is not None:
                apart = tl.abs(i - j + (i0 + shift - j0)).to(tl.float32)
            U, _y = change(y, t, f_, apart, scale, cap)
            p *= U
            u += tl.sum(p, 1)
            if WEIGHTS or gdo is not None:
                V = tile_of(v, vs, j0, width, EV, BN, BV, UPCAST)  # BN BV
                if WEIGHTS:
                    if not PART:
                        GV = tl.dot(dO, tl.trans(V), input_precision=PRECISION)
                    if z is not None:
                        GV *= z
                    w += tl.sum(p * (GV - d[:, None]), 1)
                if gdo is not None:
                    if z is not None:
                        p *= z
                    A_do = tl.dot(p.to(V.dtype), V, A_do, input_precision=PRECISION)
    if gdlse is not None:
        tl.store(gdlse + at, u, here)
    if WEIGHTS:
        if dlse is not None:
            w -= u * tl.load(dlse + at, here, other=0.0).to(tl.float32)
        tl.store(numbers + (to + 4 * BM), w)
    if numbers is not None:
        tl.store(numbers + (to + 2 * BM), u)
    if gdo is not None:
        if MOVES:
            O = tile_of(o, yl, i0, height, EV, BM, BV, False).to(tl.float32)  # BM BV
            A_do -= u[:, None] * O
        put(gdo + (wide(n) * L + i_ + i0) * EV, A_do, height - i0, EV, BM, BV)


@triton.jit(do_not_specialize=["MH", "MG", "H", "G", "L", "S", "N", "shift", "threshold"])
def second_rows_kernel(
    a, b, c, f, do, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, numbers, gq, gslopes,
    ab, ah, ag, al, bb, bh, bs, cb, ch, cs, ob, oh, og, ol, qb, qh, qg, ql, kb, kh, ks, vb, vh, vs,
    mb, mh, mg, ml, ms, MH, MG,
    H, G, L, S, N, left, right, shift, scale, cap, threshold, inverse,
    E: tl.constexpr, EV: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    NATURAL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, PART: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """gQ of rows I, and what they give to the gradient of their slope."""
    blocks = blocks_of(L, N, cu_q, BM)
    pid = tl.program_id(0)
    block, n = blocks - 1 - pid % blocks, pid // blocks
    i0, sequence, i_, j_, height, width, shift = rows_at(block, cu_q, cu_k, N, L, S, shift, BM)
    at, here = wide(n) * L + (i_ + i0) + tl.arange(0, BM), tl.arange(0, BM) < height - i0
    at_block = wide(n) * blocks_of(L, N, cu_q, BR) + (i_ // BR + sequence + i0 // BR)
    to = numbers + (at_block * (5 * BR) + i0 % BR + tl.arange(0, BM))
    T, r = tl.load(to, here, other=float("inf")), tl.load(to + BR, here, other=0.0)
    w = tl.load(to + 4 * BR, here, other=0.0)[:, None]
    MOVES: tl.constexpr = a is not None or b is not None or f is not None
    q, k = from_sample(q, n, H, G, qb, qh, qg, i_, ql), from_sample(k, n, H, G, kb, kh, 0, j_, ks)
    do, a = from_sample(do, n, H, G, ob, oh, og, i_, ol), from_sample(a, n, H, G, ab, ah, ag, i_, al)
    b, c = from_sample(b, n, H, G, bb, bh, 0, j_, bs), from_sample(c, n, H, G, cb, ch, 0, j_, cs)
    v = from_sample(v, n, H, G, vb, vh, 0, j_, vs)
    slope, f_, keys, length = None, None, None, width
    if m is not None:
        m += mask_at(n, mb, mh, mg, MH, MG)
    if slopes is not None:
        slope = tl.load(slopes + n)
    if f is not None:
        f_ = tl.load(f + n)
    if lengths is not None:
        length = tl.maximum(tl.minimum(tl.load(lengths + n), width), 0)
    if seed is not None:
        keys = hashed(at, seed)[:, None]
    u, d = None, None
    if MOVES:
        u, d = tl.load(to + 2 * BR, here, other=0.0)[:, None], tl.load(to + 3 * BR, here, other=0.0)[:, None]
    if not PART:
        Q = tile_of(q, ql, i0, height, E, BM, BE, UPCAST)  # BM BE
        A = tile_of(a, al, i0, height, E, BM, BE, UPCAST)  # BM BE
        dO = tile_of(do, ol, i0, height, EV, BM, BV, UPCAST)  # BM BV
    i, j = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    A_q, F = tl.zeros((BM, BE), tl.float32), tl.zeros((BM,), tl.float32)
    begin, _, _, end = seen_by(i0, BM, BN, length, left, right, shift)
    for j0 in range(begin, end, BN):
        GV, GC, apart = None, None, None
        if PART:
            x, y = products_by_parts(q, ql, a, al, i0, height, k, ks, b, bs, j0, width, E, BM, BN, BE, PART, PRECISION)
            GV, GC = products_by_parts(
                do, ol, None, 0, i0, height, v, vs, c, cs, j0, width, EV, BM, BN, BV, PART, PRECISION
            )  # fmt: skip
        else:
            K = tile_of(k, ks, j0, width, E, BN, BE, UPCAST)  # BN BE
            B = tile_of(b, bs, j0, width, E, BN, BE, UPCAST)  # BN BE
            x = tl.dot(Q, tl.trans(K), input_precision=PRECISION)  # BM BN
        s, t = scores(x, i, j, i0, j0, m, ml, ms, height, slope, left, right, shift, length, scale, cap, NATURAL, True)
        p = exponential(s - T[:, None], NATURAL) * r[:, None]
        if not PART:
            if c is not None:
                GC = tl.dot(dO, tl.trans(tile_of(c, cs, j0, width, EV, BN, BV, UPCAST)), input_precision=PRECISION)
            if MOVES:
                GV = tl.dot(dO, tl.trans(tile_of(v, vs, j0, width, EV, BN, BV, UPCAST)), input_precision=PRECISION)
            y = products(Q, A, K, B, PRECISION)  # BM BN
        if f is not None or gslopes is not None:
            apart = tl.abs(i - j + (i0 + shift - j0)).to(tl.float32)
        U, y = change(y, t, f_, apart, scale, cap)
        W, WR, dS = second(p, u, w, d, U, y, GV, GC, kept(j_ + j0 + j, keys, threshold, inverse), t, cap)
        if gslopes is not None:
            F -= tl.sum(W * apart, 1)
        if gq is not None:
            if PART:
                K = tile_of(k, ks, j0, width, E, BN, BE, UPCAST)  # BN BE
                B = tile_of(b, bs, j0, width, E, BN, BE, UPCAST)  # BN BE
            A_q = tl.dot(WR.to(K.dtype), K, A_q, input_precision=PRECISION)
            if b is not None:
                A_q = tl.dot(dS.to(B.dtype), B, A_q, input_precision=PRECISION)
    if gq is not None:
        put(gq + (wide(n) * L + i_ + i0) * E, A_q * scale, height - i0, E, BM, BE)
    if gslopes is not None:
        tl.store(gslopes + (n * blocks + block), tl.sum(F, 0))


@triton.jit(
    do_not_specialize=["MH", "MG", "H", "L", "S", "N", "shift", "threshold"]
)  # G = 1 is compiled apart, without its loop
def second_columns_kernel(
    a, b, c, f, do, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, numbers, gk, gv,
    ab, ah, ag, al, bb, bh, bs, cb, ch, cs, ob, oh, og, ol, qb, qh, qg, ql, kb, kh, ks, vb, vh, vs,
    mb, mh, mg, ml, ms, MH, MG,
    H, G, L, S, N, left, right, shift, scale, cap, threshold, inverse,
    E: tl.constexpr, EV: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    NATURAL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, PART: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """gK or gV of columns J, or both, summed over the group. All tiles are transposed.

    Columns past the end have rows of their own, which are not written, and rows past the end have P = 0: neither needs a mask.
    """
    blocks = blocks_of(S, N, cu_k, BN)
    pid = tl.program_id(0)
    block, n0 = pid % blocks, pid // blocks  # n0: (b, h)
    j0, j_, i_, width, height, start = block * BN, 0, 0, S, L, 0
    if cu_k is not None:
        number, j_, width, j0 = sequence_at(block, cu_k, N, S, BN)
        i_, height = others(number, cu_q, N, L)
        shift *= width - height
        height = tl.where(j0 < width, height, 0)
        start = i_ // BR + number + 1
    MOVES: tl.constexpr = a is not None or b is not None or f is not None
    k, b = from_sample(k, n0 * G, H, G, kb, kh, 0, j_, ks), from_sample(b, n0 * G, H, G, bb, bh, 0, j_, bs)
    if gk is not None:
        c, v = from_sample(c, n0 * G, H, G, cb, ch, 0, j_, cs), from_sample(v, n0 * G, H, G, vb, vh, 0, j_, vs)
        A_k = tl.zeros((BN, BE), tl.float32)
    if gv is not None:
        A_v = tl.zeros((BN, BV), tl.float32)
    if not PART:
        K = tile_of(k, ks, j0, width, E, BN, BE, UPCAST)  # BN BE
        B = tile_of(b, bs, j0, width, E, BN, BE, UPCAST)  # BN BE
        if gk is not None:
            C = tile_of(c, cs, j0, width, EV, BN, BV, UPCAST)  # BN BV
            V = tile_of(v, vs, j0, width, EV, BN, BV, UPCAST)  # BN BV
    EDGE: tl.constexpr = left is not None or right is not None or lengths is not None
    j, i = tl.arange(0, BN)[:, None], tl.arange(0, BM)[None, :]
    stretch = blocks_of(L, N, cu_q, BR)
    begin, _, _, end = seen_by(j0, BN, BM, height, right, left, -shift)
    for g in range(0, G):
        n = n0 * G + g
        slope, f_, length, mask = None, None, width, None
        q1, do1 = from_sample(q, n, H, G, qb, qh, qg, i_, ql), from_sample(do, n, H, G, ob, oh, og, i_, ol)
        a1 = from_sample(a, n, H, G, ab, ah, ag, i_, al)
        if m is not None:
            mask = m + mask_at(n, mb, mh, mg, MH, MG)
        if slopes is not None:
            slope = tl.load(slopes + n)
        if f is not None:
            f_ = tl.load(f + n)
        last = end
        if lengths is not None:
            length = tl.load(lengths + n)
            last = tl.where(length > j0, end, begin)
        for i0 in range(begin, last, BM):
            to = numbers + ((wide(n) * stretch + (start + i0 // BR)) * (5 * BR) + i0 % BR + tl.arange(0, BM))
            if PART:
                x, y = products_by_parts(
                    k, ks, b, bs, j0, width, q1, ql, a1, al, i0, height, E, BN, BM, BE, PART, PRECISION
                )  # fmt: skip
            else:
                Q = tile_of(q1, ql, i0, height, E, BM, BE, UPCAST)  # BM BE
                A = tile_of(a1, al, i0, height, E, BM, BE, UPCAST)  # BM BE
                x = tl.dot(K, tl.trans(Q), input_precision=PRECISION)  # BN BM
            s, t = scores(
                x, i, j, i0, j0, mask, ml, ms, height, slope, left, right, shift, length, scale, cap, NATURAL, EDGE
            )  # fmt: skip
            p = exponential(s - tl.load(to)[None, :], NATURAL) * tl.load(to + BR)[None, :]
            GV, GC, d, u, apart, keys = None, None, None, None, None, None
            if seed is not None:
                keys = hashed(wide(n) * L + (i_ + i0) + tl.arange(0, BM), seed)[None, :]
            z = kept(j_ + j0 + j, keys, threshold, inverse)
            if not PART:
                y = products(K, B, Q, A, PRECISION)  # BN BM
            if f is not None:
                apart = tl.abs(i - j + (i0 + shift - j0)).to(tl.float32)
            U, y = change(y, t, f_, apart, scale, cap)
            if MOVES:
                u = tl.load(to + 2 * BR)[None, :]
            if not PART or gv is not None:
                dO = tile_of(do1, ol, i0, height, EV, BM, BV, UPCAST)  # BM BV
            if gv is not None:
                pv = p * (U - u)
                if z is not None:
                    pv *= z
                A_v = tl.dot(pv.to(dO.dtype), dO, A_v, input_precision=PRECISION)
            if gk is not None:
                if PART:
                    GV, GC = products_by_parts(
                        v, vs, c, cs, j0, width, do1, ol, None, 0, i0, height, EV, BN, BM, BV, PART, PRECISION
                    )  # fmt: skip
                    Q = tile_of(q1, ql, i0, height, E, BM, BE, UPCAST)  # BM BE
                    A = tile_of(a1, al, i0, height, E, BM, BE, UPCAST)  # BM BE
                else:
                    if c is not None:
                        GC = tl.dot(C, tl.trans(dO), input_precision=PRECISION)
                    if MOVES:
                        GV = tl.dot(V, tl.trans(dO), input_precision=PRECISION)
                if MOVES:
                    d = tl.load(to + 3 * BR)[None, :]
                _W, WR, dS = second(p, u, tl.load(to + 4 * BR)[None, :], d, U, y, GV, GC, z, t, cap)
                A_k = tl.dot(WR.to(Q.dtype), Q, A_k, input_precision=PRECISION)
                if a is not None:
                    A_k = tl.dot(dS.to(A.dtype), A, A_k, input_precision=PRECISION)
    if gk is not None:
        put(gk + (wide(n0) * S + j_ + j0) * E, A_k * scale, width - j0, E, BN, BE)
    if gv is not None:
        put(gv + (wide(n0) * S + j_ + j0) * EV, A_v, width - j0, EV, BN, BV)
