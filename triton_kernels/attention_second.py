"""The kernels of attention's second order. For the maths see `bptoolkit.ops.attention_rule`, for launches `attention_double`.

As in `attention_loops`: a program has a tile of rows I, or of columns J, and passes over what that sees. P is made again from
S, T and l. a, b, c and f are the cotangents of dQ, dK, dV and dh, the directions in which Q, K, V and h move; what is not given
is None, in the tile as in the call. b and c are shared by a group as k and v are.

What `sums_kernel` finds of a row are five numbers, T, 1/l, u, D and w − u dlse, each of them for BR rows, its BM, at a time.
"""

import triton
import triton.language as tl

from bptoolkit.triton_kernels.attention_loops import LOG2E, exponential, put, scores, seen_by
from bptoolkit.triton_kernels.attention_second_tiles import change, of_sample, products, products_by_parts, second, tile_of


@triton.jit(do_not_specialize=["H", "G", "L", "S", "shift"])
def sums_kernel(
    a, b, c, f, do, q, k, v, m, slopes, lengths, dlse, o, top, l, numbers, gdo, gdlse,
    ab, ah, ag, al, bb, bh, bs, cb, ch, cs, ob, oh, og, ol, qb, qh, qg, ql, kb, kh, ks, vb, vh, vs,
    mb, mh, mg, ml, ms, yb, yh, yg, yl,
    H, G, L, S, left, right, shift, scale, cap,
    E: tl.constexpr, EV: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    NATURAL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, PART: tl.constexpr,
    WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Of rows I: u, w − u dlse and the other numbers that the next kernels want of them; g_dO and g_dlse.

    ab ... are the steps of a, ob ... those of do, yb ... those of o. Rows past the end get T = ∞, hence P = 0.
    """
    blocks = tl.cdiv(L, BM)
    pid = tl.program_id(0)
    i0 = (blocks - 1 - pid % blocks) * BM
    n = (pid // blocks).to(tl.int64)
    at, here = n * L + i0 + tl.arange(0, BM), tl.arange(0, BM) < L - i0
    to = (n * blocks * BM + i0) * 5 + tl.arange(0, BM)
    T = tl.load(top + at, here, other=float("inf"))
    T = T if NATURAL else T * LOG2E
    r = 1 / tl.load(l + at, here, other=1.0)
    MOVES: tl.constexpr = a is not None or b is not None or f is not None
    slope, f_, length = None, None, S
    q, k = of_sample(q, n, H, G, qb, qh, qg), of_sample(k, n, H, G, kb, kh, 0)
    do, a1, b1, c1 = of_sample(do, n, H, G, ob, oh, og), None, None, None
    if a is not None:
        a1 = of_sample(a, n, H, G, ab, ah, ag)
    if not PART:
        Q = tile_of(q, ql, i0, L, E, BM, BE, UPCAST)  # BM BE
        A = tile_of(a1, al, i0, L, E, BM, BE, UPCAST)  # BM BE
        if WEIGHTS:
            dO = tile_of(do, ol, i0, L, EV, BM, BV, UPCAST)  # BM BV
    if b is not None:
        b1 = of_sample(b, n, H, G, bb, bh, 0)
    if c is not None:
        c1 = of_sample(c, n, H, G, cb, ch, 0)
    if m is not None:
        m = of_sample(m, n, H, G, mb, mh, mg)
    if slopes is not None:
        slope = tl.load(slopes + n)
    if f is not None:
        f_ = tl.load(f + n)
    if lengths is not None:
        length = tl.maximum(tl.minimum(tl.load(lengths + n), S), 0)
    if WEIGHTS and MOVES:
        O = tile_of(of_sample(o, n, H, G, yb, yh, yg), yl, i0, L, EV, BM, BV, False).to(tl.float32)  # BM BV
        d = tl.sum(tile_of(do, ol, i0, L, EV, BM, BV, False).to(tl.float32) * O, 1)
        if dlse is not None:
            d -= tl.load(dlse + at, here, other=0.0).to(tl.float32)
        tl.store(numbers + (to + 3 * BM), d)
    if numbers is not None:
        tl.store(numbers + to, T)
        tl.store(numbers + (to + BM), r)
    if MOVES:
        v = of_sample(v, n, H, G, vb, vh, 0)
    i, j = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    u, w = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    if gdo is not None:
        A_do = tl.zeros((BM, BV), tl.float32)
    begin, _, _, end = seen_by(i0, BM, BN, length, left, right, shift)
    for j0 in range(begin, end, BN):
        if PART:
            x, y = products_by_parts(q, ql, a1, al, i0, L, k, ks, b1, bs, j0, S, E, BM, BN, BE, PART, PRECISION)  # BM BN
        else:
            K = tile_of(k, ks, j0, S, E, BN, BE, UPCAST)  # BN BE
            B = tile_of(b1, bs, j0, S, E, BN, BE, UPCAST)  # BN BE
            x, y = products(Q, A, K, B, PRECISION)  # BM BN
        s, t = scores(x, i, j, i0, j0, m, ml, ms, L, slope, left, right, shift, length, scale, cap, NATURAL, True)
        p = exponential(s - T[:, None], NATURAL) * r[:, None]
        apart, GV, GC = None, None, None
        if f is not None:
            apart = tl.abs(i - j + (i0 + shift - j0)).to(tl.float32)
        U, _x = change(y, t, f_, apart, scale, cap)
        if PART:
            if WEIGHTS and MOVES:
                GV, GC = products_by_parts(do, ol, None, 0, i0, L, v, vs, c1, cs, j0, S, EV, BM, BN, BV, PART, PRECISION)
            elif WEIGHTS:
                GC, _y = products_by_parts(do, ol, None, 0, i0, L, c1, cs, None, 0, j0, S, EV, BM, BN, BV, PART, PRECISION)
        C = tile_of(c1, cs, j0, S, EV, BN, BV, UPCAST)  # BN BV
        if c is not None:
            if WEIGHTS:
                if not PART:
                    GC = tl.dot(dO, tl.trans(C), input_precision=PRECISION)
                w += tl.sum(p * GC, 1)
            if gdo is not None:
                A_do = tl.dot(p.to(C.dtype), C, A_do, input_precision=PRECISION)
        if MOVES:
            p *= U
            u += tl.sum(p, 1)
            if WEIGHTS or gdo is not None:
                V = tile_of(v, vs, j0, S, EV, BN, BV, UPCAST)  # BN BV
                if WEIGHTS:
                    if not PART:
                        GV = tl.dot(dO, tl.trans(V), input_precision=PRECISION)
                    w += tl.sum(p * (GV - d[:, None]), 1)
                if gdo is not None:
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
            O = tile_of(of_sample(o, n, H, G, yb, yh, yg), yl, i0, L, EV, BM, BV, False).to(tl.float32)  # BM BV
            A_do -= u[:, None] * O
        put(gdo + (n * L + i0) * EV, A_do, L - i0, EV, BM, BV)


@triton.jit(do_not_specialize=["H", "G", "L", "S", "shift"])
def second_rows_kernel(
    a, b, c, f, do, q, k, v, m, slopes, lengths, numbers, gq, gslopes,
    ab, ah, ag, al, bb, bh, bs, cb, ch, cs, ob, oh, og, ol, qb, qh, qg, ql, kb, kh, ks, vb, vh, vs,
    mb, mh, mg, ml, ms,
    H, G, L, S, left, right, shift, scale, cap,
    E: tl.constexpr, EV: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    NATURAL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, PART: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """gQ of rows I, and what they give to the gradient of their slope."""
    blocks = tl.cdiv(L, BM)
    pid = tl.program_id(0)
    i0 = (blocks - 1 - pid % blocks) * BM
    n = (pid // blocks).to(tl.int64)
    to = (n * tl.cdiv(L, BR) + i0 // BR) * (5 * BR) + i0 % BR + tl.arange(0, BM)
    T, r, w = tl.load(numbers + to), tl.load(numbers + (to + BR)), tl.load(numbers + (to + 4 * BR))[:, None]
    MOVES: tl.constexpr = a is not None or b is not None or f is not None
    d, u, slope, f_, length = None, None, None, None, S
    q, k = of_sample(q, n, H, G, qb, qh, qg), of_sample(k, n, H, G, kb, kh, 0)
    do, a1, b1, c1 = of_sample(do, n, H, G, ob, oh, og), None, None, None
    if a is not None:
        a1 = of_sample(a, n, H, G, ab, ah, ag)
    if not PART:
        Q = tile_of(q, ql, i0, L, E, BM, BE, UPCAST)  # BM BE
        A = tile_of(a1, al, i0, L, E, BM, BE, UPCAST)  # BM BE
        dO = tile_of(do, ol, i0, L, EV, BM, BV, UPCAST)  # BM BV
    if b is not None:
        b1 = of_sample(b, n, H, G, bb, bh, 0)
    if c is not None:
        c1 = of_sample(c, n, H, G, cb, ch, 0)
    if m is not None:
        m = of_sample(m, n, H, G, mb, mh, mg)
    if slopes is not None:
        slope = tl.load(slopes + n)
    if f is not None:
        f_ = tl.load(f + n)
    if lengths is not None:
        length = tl.maximum(tl.minimum(tl.load(lengths + n), S), 0)
    if MOVES:
        v = of_sample(v, n, H, G, vb, vh, 0)
        u, d = tl.load(numbers + (to + 2 * BR))[:, None], tl.load(numbers + (to + 3 * BR))[:, None]
    i, j = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    A_q, F = tl.zeros((BM, BE), tl.float32), tl.zeros((BM,), tl.float32)
    begin, _, _, end = seen_by(i0, BM, BN, length, left, right, shift)
    for j0 in range(begin, end, BN):
        if PART:
            x, y = products_by_parts(q, ql, a1, al, i0, L, k, ks, b1, bs, j0, S, E, BM, BN, BE, PART, PRECISION)  # BM BN
        else:
            K = tile_of(k, ks, j0, S, E, BN, BE, UPCAST)  # BN BE
            B = tile_of(b1, bs, j0, S, E, BN, BE, UPCAST)  # BN BE
            x, y = products(Q, A, K, B, PRECISION)  # BM BN
        s, t = scores(x, i, j, i0, j0, m, ml, ms, L, slope, left, right, shift, length, scale, cap, NATURAL, True)
        p = exponential(s - T[:, None], NATURAL) * r[:, None]
        GV, GC, apart = None, None, None
        if PART:
            if MOVES:
                GV, GC = products_by_parts(do, ol, None, 0, i0, L, v, vs, c1, cs, j0, S, EV, BM, BN, BV, PART, PRECISION)
            else:
                GC, _y = products_by_parts(do, ol, None, 0, i0, L, c1, cs, None, 0, j0, S, EV, BM, BN, BV, PART, PRECISION)
        else:
            if c is not None:
                GC = tl.dot(dO, tl.trans(tile_of(c1, cs, j0, S, EV, BN, BV, UPCAST)), input_precision=PRECISION)
            if MOVES:
                GV = tl.dot(dO, tl.trans(tile_of(v, vs, j0, S, EV, BN, BV, UPCAST)), input_precision=PRECISION)
        if f is not None or gslopes is not None:
            apart = tl.abs(i - j + (i0 + shift - j0)).to(tl.float32)
        U, x = change(y, t, f_, apart, scale, cap)
        W, WR, dS = second(p, u, w, d, U, x, GV, GC, t, cap)
        if gslopes is not None:
            F -= tl.sum(W * apart, 1)
        if gq is not None:
            if PART:
                K = tile_of(k, ks, j0, S, E, BN, BE, UPCAST)  # BN BE
                B = tile_of(b1, bs, j0, S, E, BN, BE, UPCAST)  # BN BE
            A_q = tl.dot(WR.to(K.dtype), K, A_q, input_precision=PRECISION)
            if b is not None:
                A_q = tl.dot(dS.to(B.dtype), B, A_q, input_precision=PRECISION)
    if gq is not None:
        put(gq + (n * L + i0) * E, A_q * scale, L - i0, E, BM, BE)
    if gslopes is not None:
        tl.store(gslopes + pid, tl.sum(F, 0))


@triton.jit(do_not_specialize=["H", "L", "S", "shift"])  # G = 1 is compiled apart, without a loop over the group
def second_columns_kernel(
    a, b, c, f, do, q, k, v, m, slopes, lengths, numbers, gk, gv,
    ab, ah, ag, al, bb, bh, bs, cb, ch, cs, ob, oh, og, ol, qb, qh, qg, ql, kb, kh, ks, vb, vh, vs,
    mb, mh, mg, ml, ms,
    H, G, L, S, left, right, shift, scale, cap,
    E: tl.constexpr, EV: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    NATURAL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, PART: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """gK or gV of columns J, or both, summed over the group. All tiles are transposed.

    Columns past the end have rows of their own, which are not written, and rows past the end have P = 0: neither needs a mask.
    """
    blocks = tl.cdiv(S, BN)
    pid = tl.program_id(0)
    j0 = pid % blocks * BN
    group = (pid // blocks).to(tl.int64)  # (b, h)
    first = group * G
    MOVES: tl.constexpr = a is not None or b is not None or f is not None
    b1, c1, v1 = None, None, None
    k = of_sample(k, first, H, G, kb, kh, 0)
    if b is not None:
        b1 = of_sample(b, first, H, G, bb, bh, 0)
    if gk is not None:
        if c is not None:
            c1 = of_sample(c, first, H, G, cb, ch, 0)
        if MOVES:
            v1 = of_sample(v, first, H, G, vb, vh, 0)
        A_k = tl.zeros((BN, BE), tl.float32)
    if not PART:
        K = tile_of(k, ks, j0, S, E, BN, BE, UPCAST)  # BN BE
        B = tile_of(b1, bs, j0, S, E, BN, BE, UPCAST)  # BN BE
        C = tile_of(c1, cs, j0, S, EV, BN, BV, UPCAST)  # BN BV
        V = tile_of(v1, vs, j0, S, EV, BN, BV, UPCAST)  # BN BV
    if gv is not None:
        A_v = tl.zeros((BN, BV), tl.float32)
    EDGE: tl.constexpr = left is not None or right is not None or lengths is not None
    j, i = tl.arange(0, BN)[:, None], tl.arange(0, BM)[None, :]
    stretch = tl.cdiv(L, BR)
    begin, _, _, end = seen_by(j0, BN, BM, L, right, left, -shift)
    for g in range(0, G):
        n = first + g
        a1, slope, f_, length, mask = None, None, None, S, None
        q1, do1 = of_sample(q, n, H, G, qb, qh, qg), of_sample(do, n, H, G, ob, oh, og)
        if a is not None:
            a1 = of_sample(a, n, H, G, ab, ah, ag)
        if m is not None:
            mask = of_sample(m, n, H, G, mb, mh, mg)
        if slopes is not None:
            slope = tl.load(slopes + n)
        if f is not None:
            f_ = tl.load(f + n)
        last = end
        if lengths is not None:
            length = tl.load(lengths + n)
            last = tl.where(length > j0, end, begin)
        for i0 in range(begin, last, BM):
            to = (n * stretch + i0 // BR) * (5 * BR) + i0 % BR + tl.arange(0, BM)
            if PART:
                x, y = products_by_parts(k, ks, b1, bs, j0, S, q1, ql, a1, al, i0, L, E, BN, BM, BE, PART, PRECISION)  # BN BM
            else:
                Q = tile_of(q1, ql, i0, L, E, BM, BE, UPCAST)  # BM BE
                A = tile_of(a1, al, i0, L, E, BM, BE, UPCAST)  # BM BE
                x, y = products(K, B, Q, A, PRECISION)  # BN BM
            s, t = scores(
                x, i, j, i0, j0, mask, ml, ms, L, slope, left, right, shift, length, scale, cap, NATURAL, EDGE
            )  # fmt: skip
            p = exponential(s - tl.load(numbers + to)[None, :], NATURAL) * tl.load(numbers + (to + BR))[None, :]
            GV, GC, d, u, apart = None, None, None, None, None
            if f is not None:
                apart = tl.abs(i - j + (i0 + shift - j0)).to(tl.float32)
            U, x = change(y, t, f_, apart, scale, cap)
            if MOVES:
                u = tl.load(numbers + (to + 2 * BR))[None, :]
            if not PART or gv is not None:
                dO = tile_of(do1, ol, i0, L, EV, BM, BV, UPCAST)  # BM BV
            if gv is not None:
                A_v = tl.dot((p * (U - u)).to(dO.dtype), dO, A_v, input_precision=PRECISION)
            if gk is not None:
                if PART:
                    if MOVES:
                        GV, GC = products_by_parts(
                            v1, vs, c1, cs, j0, S, do1, ol, None, 0, i0, L, EV, BN, BM, BV, PART, PRECISION
                        )  # fmt: skip
                    else:
                        GC, _y = products_by_parts(
                            c1, cs, None, 0, j0, S, do1, ol, None, 0, i0, L, EV, BN, BM, BV, PART, PRECISION
                        )  # fmt: skip
                    Q = tile_of(q1, ql, i0, L, E, BM, BE, UPCAST)  # BM BE
                    A = tile_of(a1, al, i0, L, E, BM, BE, UPCAST)  # BM BE
                else:
                    if c is not None:
                        GC = tl.dot(C, tl.trans(dO), input_precision=PRECISION)
                    if MOVES:
                        GV = tl.dot(V, tl.trans(dO), input_precision=PRECISION)
                if MOVES:
                    d = tl.load(numbers + (to + 3 * BR))[None, :]
                _W, WR, dS = second(p, u, tl.load(numbers + (to + 4 * BR))[None, :], d, U, x, GV, GC, t, cap)
                A_k = tl.dot(WR.to(Q.dtype), Q, A_k, input_precision=PRECISION)
                if a is not None:
                    A_k = tl.dot(dS.to(A.dtype), A, A_k, input_precision=PRECISION)
    if gk is not None:
        put(gk + (group * S + j0) * E, A_k * scale, S - j0, E, BN, BE)
    if gv is not None:
        put(gv + (group * S + j0) * EV, A_v, S - j0, EV, BN, BV)
