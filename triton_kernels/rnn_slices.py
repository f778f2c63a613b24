"""The simple recurrence by slices of its units; see `recurrent_slices`.

Letters   as in `rnn_loops`
"""

import triton
import triton.language as tl

from bptoolkit.triton_kernels.linear_recurrence import row_ends
from bptoolkit.triton_kernels.recurrent import kept, put, step_of
from bptoolkit.triton_kernels.recurrent_slices import arrive, blocks, factors
from bptoolkit.triton_kernels.rnn_loops import phi, slope


@triton.jit(do_not_specialize=["T", "B", "first", "last", "base"])
def slices_kernel(
    pre, wh, lengths, S, y, T, B, counters, first, last, base,
    H: tl.constexpr, REVERSE: tl.constexpr, TANH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    row = (base + tl.program_id(1)).to(tl.int64) * BM
    m, n = row + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    mask = (m < B)[:, None] & (n < H)[None, :]
    ends, here, size = row_ends(lengths, m, B, T), m[:, None] * H + n[None, :], (tl.full((), 0, tl.int64) + B) * H  # BM BN
    W = blocks(wh, n, 1, H, BK, True, UPCAST)
    for k in range(first, last):
        t = step_of(k, T, REVERSE)
        now, then = S + (k % 2) * size, S + (1 - k % 2) * size
        a = tl.load(pre + t * B * H + here, mask, other=0.0).to(tl.float32)
        for chunk in tl.static_range((H + BK - 1) // BK):
            x = factors(now + row * H, chunk, B - row, H, H, BM, BK, UPCAST)
            a = tl.dot(x, W[chunk], a, input_precision=PRECISION)
        h = tl.load(now + here, mask, other=0.0, cache_modifier=".cg").to(tl.float32)
        out = phi(a, TANH)
        put(y + t * B * H + here, out, lengths, t, ends, mask)
        tl.store(then + here, kept(lengths, t, ends, out, h).to(S.dtype.element_ty), mask)
        if counters is not None:
            arrive(counters + base + tl.program_id(1), (k + 1) * tl.num_programs(0))


@triton.jit(do_not_specialize=["T", "B", "first", "last", "base"])
def slices_back_kernel(
    dy, y, wh, lengths, da, T, B, yt, yb, counters, first, last, base,
    H: tl.constexpr, REVERSE: tl.constexpr, TANH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    row = (base + tl.program_id(1)).to(tl.int64) * BM
    m, n = row + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    mask = (m < B)[:, None] & (n < H)[None, :]
    ends, here = row_ends(lengths, m, B, T), m[:, None] * H + n[None, :]  # BM BN
    W = blocks(wh, n, 1, H, BK, False, UPCAST)
    for k in range(first, last):
        t = step_of(k, T, not REVERSE)
        s = tl.load(y + t * B * H + here, mask, other=0.0)
        dh = tl.load(dy + t * yt + m[:, None] * yb + n[None, :], mask, other=0.0).to(tl.float32)
        sent = da + (step_of(tl.maximum(k - 1, 0), T, not REVERSE) * B + row) * H
        there = tl.where(k > 0, B - row, 0)  # nothing was made before the first step
        for chunk in tl.static_range((H + BK - 1) // BK):
            x = factors(sent, chunk, there, H, H, BM, BK, UPCAST)
            dh = tl.dot(x, W[chunk], dh, input_precision=PRECISION)
        put(da + t * B * H + here, dh * slope(s, TANH), lengths, t, ends, mask)
        if counters is not None:
            arrive(counters + base + tl.program_id(1), (k + 1) * tl.num_programs(0))
