"""The GRU by slices of its units; see `recurrent_slices`.

Letters   as in `gru_loops`
"""

import triton
import triton.language as tl

from bptoolkit.triton_kernels.gru_loops import biases, cell_back, gates_of, made, put_four, read_gates, three
from bptoolkit.triton_kernels.linear_recurrence import row_ends
from bptoolkit.triton_kernels.recurrent import kept, put, state_before, step_of
from bptoolkit.triton_kernels.recurrent_slices import arrive, blocks, factors


@triton.jit(do_not_specialize=["T", "B", "first", "last", "base"])
def slices_kernel(
    pre, wh, bh, lengths, S, y, G, T, B, counters, first, last, base,
    H: tl.constexpr, REVERSE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    row = (base + tl.program_id(1)).to(tl.int64) * BM
    m, n = row + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    mask = (m < B)[:, None] & (n < H)[None, :]
    ends, here, size = row_ends(lengths, m, B, T), m[:, None] * H + n[None, :], (tl.full((), 0, tl.int64) + B) * H  # BM BN
    W = blocks(wh, n, 3, H, BK, True, UPCAST)
    br, bz, bq = biases(bh, n, H)
    for k in range(first, last):
        t = step_of(k, T, REVERSE)
        now, then = S + (k % 2) * size, S + (1 - k % 2) * size
        r, z, an = three(pre + t * B * (3 * H) + (m[:, None] * (3 * H) + n[None, :]), H, mask)
        r, z, q = r.to(tl.float32) + br, z.to(tl.float32) + bz, tl.zeros((BM, BN), tl.float32) + bq
        for chunk in tl.static_range((H + BK - 1) // BK):
            x = factors(now + row * H, chunk, B - row, H, H, BM, BK, UPCAST)
            r = tl.dot(x, W[3 * chunk], r, input_precision=PRECISION)
            z = tl.dot(x, W[3 * chunk + 1], z, input_precision=PRECISION)
            q = tl.dot(x, W[3 * chunk + 2], q, input_precision=PRECISION)
        h = tl.load(now + here, mask, other=0.0, cache_modifier=".cg").to(tl.float32)
        r, z, new = gates_of(r, z, an.to(tl.float32), q)
        out = new + z * (h - new)
        put(y + t * B * H + here, out, lengths, t, ends, mask)
        tl.store(then + here, kept(lengths, t, ends, out, h).to(S.dtype.element_ty), mask)
        if G is not None:
            put_four(G + t * B * (4 * H) + (m[:, None] * (4 * H) + n[None, :]), r, z, q, new, lengths, t, ends, H, mask)
        if counters is not None:
            arrive(counters + base + tl.program_id(1), (k + 1) * tl.num_programs(0))


@triton.jit(do_not_specialize=["T", "B", "first", "last", "base"])
def slices_back_kernel(
    dy, G, U, y, h0, wh, lengths, da, carried, T, B, yt, yb, counters, first, last, base,
    H: tl.constexpr, REVERSE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    row = (base + tl.program_id(1)).to(tl.int64) * BM
    m, n = row + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    mask = (m < B)[:, None] & (n < H)[None, :]
    ends, here = row_ends(lengths, m, B, T), m[:, None] * H + n[None, :]  # BM BN
    W = blocks(wh, n, 3, H, BK, False, UPCAST)
    start = tl.load(h0 + here, mask, other=0.0).to(tl.float32)
    for k in range(first, last):
        t = step_of(k, T, not REVERSE)
        r, z, q, new, ur, uz = read_gates(G, U, t, B, m, n, H, mask)
        hp = state_before(y, start, t, T, ends, here, B, H, mask, REVERSE)
        old = tl.load(carried + here, mask, other=0.0)
        dh = old + tl.load(dy + t * yt + m[:, None] * yb + n[None, :], mask, other=0.0).to(tl.float32)
        sent = da + (step_of(tl.maximum(k - 1, 0), T, not REVERSE) * B + row) * (4 * H) + H  # da_r da_z dq of the step after
        there = tl.where(k > 0, B - row, 0)  # nothing was made before the first step
        for chunk in tl.static_range((H + BK - 1) // BK):
            for gate in tl.static_range(3):
                x = factors(sent + gate * H, chunk, there, H, 4 * H, BM, BK, UPCAST)
                dh = tl.dot(x, W[3 * chunk + gate], dh, input_precision=PRECISION)
        r, z, q, new = made(r, z, q, new, ur, uz, U)
        dn, dr, dz, dq, straight = cell_back(r, z, q, new, hp, dh)
        put_four(da + t * B * (4 * H) + (m[:, None] * (4 * H) + n[None, :]), dn, dr, dz, dq, lengths, t, ends, H, mask)
        tl.store(carried + here, kept(lengths, t, ends, straight, old), mask)
        if counters is not None:
            arrive(counters + base + tl.program_id(1), (k + 1) * tl.num_programs(0))
