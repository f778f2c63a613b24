"""The LSTM by slices of its units; see `recurrent_slices`.

Letters   as in `lstm_loops`
"""

import triton
import triton.language as tl

from bptoolkit.triton_kernels.linear_recurrence import row_ends
from bptoolkit.triton_kernels.lstm_loops import cell, cell_back, four, put_four
from bptoolkit.triton_kernels.recurrent import kept, put, state_before, step_of
from bptoolkit.triton_kernels.recurrent_slices import arrive, blocks, factors


@triton.jit(do_not_specialize=["T", "B", "first", "last", "base"])
def slices_kernel(
    pre, c0, wh, lengths, S, y, c, G, T, B, counters, first, last, base,
    H: tl.constexpr, REVERSE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    row = (base + tl.program_id(1)).to(tl.int64) * BM
    m, n = row + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    mask = (m < B)[:, None] & (n < H)[None, :]
    ends, here, gates = row_ends(lengths, m, B, T), m[:, None] * H + n[None, :], m[:, None] * (4 * H) + n[None, :]  # BM BN
    W = blocks(wh, n, 4, H, BK, True, UPCAST)
    s0 = tl.load(c0 + here, mask, other=0.0).to(tl.float32)
    size = (tl.full((), 0, tl.int64) + B) * H
    for k in range(first, last):
        t = step_of(k, T, REVERSE)
        now, then = S + (k % 2) * size, S + (1 - k % 2) * size
        i, f, g, o = four(pre + t * B * (4 * H) + gates, H, mask)
        i, f, g, o = i.to(tl.float32), f.to(tl.float32), g.to(tl.float32), o.to(tl.float32)
        s = state_before(c, s0, t, T, ends, here, B, H, mask, REVERSE)
        for chunk in tl.static_range((H + BK - 1) // BK):
            q = chunk * BK + tl.arange(0, BK)
            x = tl.load(
                now + (m[:, None] * H + q[None, :]), (m < B)[:, None] & (q < H)[None, :], other=0.0, cache_modifier=".cg"
            )
            x = x.to(tl.float32) if UPCAST else x  # BM BK
            i = tl.dot(x, W[4 * chunk], i, input_precision=PRECISION)
            f = tl.dot(x, W[4 * chunk + 1], f, input_precision=PRECISION)
            g = tl.dot(x, W[4 * chunk + 2], g, input_precision=PRECISION)
            o = tl.dot(x, W[4 * chunk + 3], o, input_precision=PRECISION)
        i, f, g, o, new, out = cell(i, f, g, o, s)
        put(y + t * B * H + here, out, lengths, t, ends, mask)
        put(c + t * B * H + here, new, lengths, t, ends, mask)
        old = tl.load(now + here, mask, other=0.0, cache_modifier=".cg").to(tl.float32)
        tl.store(then + here, kept(lengths, t, ends, out, old).to(S.dtype.element_ty), mask)
        if G is not None:
            put_four(G + t * B * (4 * H) + gates, i, f, g, o, lengths, t, ends, H, mask)
        if counters is not None:
            arrive(counters + base + tl.program_id(1), (k + 1) * tl.num_programs(0))


@triton.jit(do_not_specialize=["T", "B", "first", "last", "base"])
def slices_back_kernel(
    dy, dc, G, c, c0, wh, lengths, da, carried, T, B, yt, yb, ct, cb, counters, first, last, base,
    H: tl.constexpr, REVERSE: tl.constexpr, RAW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    row = (base + tl.program_id(1)).to(tl.int64) * BM
    m, n = row + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    mask = (m < B)[:, None] & (n < H)[None, :]
    ends, here, gates = row_ends(lengths, m, B, T), m[:, None] * H + n[None, :], m[:, None] * (4 * H) + n[None, :]  # BM BN
    W = blocks(wh, n, 4, H, BK, False, UPCAST)
    s0 = tl.load(c0 + here, mask, other=0.0).to(tl.float32)
    for k in range(first, last):
        t = step_of(k, T, not REVERSE)
        i, f, g, o = four(G + t * B * (4 * H) + gates, H, mask)
        s = tl.load(c + t * B * H + here, mask, other=0.0).to(tl.float32)
        sp = state_before(c, s0, t, T, ends, here, B, H, mask, REVERSE)
        old = tl.load(carried + here, mask, other=0.0)
        dh, ds = tl.zeros((BM, BN), tl.float32), old
        if dy is not None:
            dh = tl.load(dy + t * yt + m[:, None] * yb + n[None, :], mask, other=0.0).to(tl.float32)
        if dc is not None:
            ds += tl.load(dc + t * ct + m[:, None] * cb + n[None, :], mask, other=0.0).to(tl.float32)
        made = da + (step_of(tl.maximum(k - 1, 0), T, not REVERSE) * B + row) * (4 * H)
        there = tl.where(k > 0, B - row, 0)  # nothing was made before the first step
        for chunk in tl.static_range((H + BK - 1) // BK):
            for gate in tl.static_range(4):
                x = factors(made + gate * H, chunk, there, H, 4 * H, BM, BK, UPCAST)
                dh = tl.dot(x, W[4 * chunk + gate], dh, input_precision=PRECISION)
        i, f, g, o, ds = cell_back(i, f, g, o, s, sp, dh, ds, RAW)
        put_four(da + t * B * (4 * H) + gates, i, f, g, o, lengths, t, ends, H, mask)
        tl.store(carried + here, kept(lengths, t, ends, ds, old), mask)
        if counters is not None:
            arrive(counters + base + tl.program_id(1), (k + 1) * tl.num_programs(0))
