"""The gradient of an additive mask: dS, summed over what the mask was broadcast over. Letters as in `attention_loops`.

A program has a tile of the mask, rows I and columns J of one of its samples, and passes over the samples of q that share it: P and
dS of each are made again. Where few tiles exist the samples are split into parts; parts, and the blocks of a mask of one row or
column, are added up by torch. No atomics: the same bits every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bptoolkit.triton_kernels.attention_layout import Batch, Mask, Tile
from bptoolkit.triton_kernels.attention_loops import exponential, mask_at, rows, scores, seen_by, wide
from bptoolkit.triton_kernels.randomness import hashed, keep_in_row

PROGRAMS = 512  # enough for the widest part; the sums of parts so take at most this many tiles


@triton.jit(
    do_not_specialize=["MH", "MG", "H", "G", "L", "S", "C", "shift", "threshold", "O1", "O2", "N1", "N2", "count", "parts"]
)
def mask_kernel(
    do, q, k, v, m, slopes, lengths, seed, T_, r_, D, dm,
    ob, oh, og, ol, qb, qh, qg, ql, kb, kh, ks, vb, vh, vs, mb, mh, mg, ml, ms, MH, MG, O1, O2, N1, N2, count, parts,
    H, G, L, S, C, left, right, shift, scale, cap, threshold, inverse,
    E: tl.constexpr, EV: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    NATURAL: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    ROW: tl.constexpr, COLUMN: tl.constexpr,
):  # fmt: skip
    """dM of a tile, of a part of the samples.

    Each of the mask's three dimensions of samples, of sizes (., MH, MG), is the mask's own, of O samples, or shared by N of them;
    the other number is 1. ROW: the mask has one row, COLUMN: one column.
    """
    down, across = tl.cdiv(L, BM), tl.cdiv(S, BN)
    pid = tl.program_id(0)
    i0, j0 = pid // across % down * BM, pid % across * BN
    c = (pid // (across * down)).to(tl.int64)
    part, c = c % parts, c // parts
    i, j = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    F = tl.zeros((BM, BN), tl.float32)
    begin, _, _, end = seen_by(i0, BM, BN, S, left, right, shift)
    last = tl.where((j0 >= begin) & (j0 < end), count, 0)
    stretch = tl.cdiv(L, BR) * BR
    for s in range(part, last, parts):
        x0, x1, x2 = c // (O1 * O2) + s // (N1 * N2), c // O2 % O1 + s // N2 % N1, c % O2 + s % N2
        n = (x0 * MH + x1) * MG + x2
        b, h, g = n // (H * G), n // G % H, n % G
        slope, length = None, S
        if slopes is not None:
            slope = tl.load(slopes + n)
        if lengths is not None:
            length = tl.load(lengths + n)
        Q = rows(q + (b * qb + h * qh + g * qg + wide(i0) * ql), ql, L - i0, E, BM, BE, UPCAST)  # BM BE
        K = rows(k + (b * kb + h * kh + wide(j0) * ks), ks, S - j0, E, BN, BE, UPCAST)  # BN BE
        x = tl.dot(Q, tl.trans(K), input_precision=PRECISION)  # BM BN
        mask = m + mask_at(n, mb, mh, mg, MH, MG)
        y, _ = scores(x, i, j, i0, j0, mask, ml, ms, L, slope, left, right, shift, length, scale, cap, NATURAL, True)
        at = n * stretch + i0 + tl.arange(0, BM)
        p = exponential(y - tl.load(T_ + at)[:, None], NATURAL) * tl.load(r_ + at)[:, None]
        dO = rows(do + (b * ob + h * oh + g * og + wide(i0) * ol), ol, L - i0, EV, BM, BV, UPCAST)  # BM BV
        V = rows(v + (b * vb + h * vh + wide(j0) * vs), vs, S - j0, EV, BN, BV, UPCAST)  # BN BV
        dp = tl.dot(dO, tl.trans(V), input_precision=PRECISION)  # BM BN
        if seed is not None:
            keys = hashed(n * L + i0 + tl.arange(0, BM), seed)[:, None]
            dp = tl.where(keep_in_row(j0 + j, keys, threshold), dp * inverse, 0.0)
        F += p * (dp - tl.load(D + at)[:, None])
    c = c * parts + part
    R, C = down if ROW else L, across if COLUMN else S
    r, e = tl.arange(0, BM), tl.arange(0, BN)
    if ROW and COLUMN:
        F = tl.where((i < L - i0) & (j < S - j0), F, 0.0)
        tl.store(dm + (c * R + i0 // BM) * C + j0 // BN, tl.sum(F))
    elif ROW:
        F = tl.sum(tl.where(i < L - i0, F, 0.0), 0)
        tl.store(dm + ((c * R + i0 // BM) * C + j0 + e), F, e < S - j0)
    elif COLUMN:
        F = tl.sum(tl.where(j < S - j0, F, 0.0), 1)
        tl.store(dm + ((c * R + i0 + r) * C + j0 // BN), F, r < L - i0)
    else:
        at = dm + ((c * R + i0) * C + j0) + (r[:, None].to(tl.int64) * C + e[None, :])
        tl.store(at, F.to(dm.dtype.element_ty), (r < L - i0)[:, None] & (e < S - j0)[None, :])


def mask_gradient(
    m: Tensor,
    mask: Mask,
    n: Batch,
    given: Sequence[Any],
    steps: Sequence[int],
    launch: Sequence[Any],
    constants: tuple[tuple[Any, ...], dict[str, Any], Tile],
) -> Tensor:
    """dM, of m's shape and dtype. given: the tensors before dm; steps: up to MG; launch and constants: as of the others."""
    fixed, options, t = constants
    down, across = triton.cdiv(n.L, t.BM), triton.cdiv(n.S, t.BN)
    own = [size if step else 1 for size, step in zip(mask.sizes, mask.own)]
    shared = [1 if step else size for size, step in zip(mask.sizes, mask.own)]
    ROW, COLUMN = m.shape[-2] == 1, m.shape[-1] == 1
    tiles, count = prod(own) * down * across, prod(shared)
    parts = max(1, min(count, PROGRAMS // max(tiles, 1)))
    sums = parts > 1 or (ROW and down != 1) or (COLUMN and across != 1)
    shape = prod(own), parts, down if ROW else n.L, across if COLUMN else n.S
    dm = torch.empty(shape, dtype=torch.float32 if sums else m.dtype, device=m.device)
    if dm.numel():
        sizes = *own[1:], *shared[1:], count, parts
        mask_kernel[(tiles * parts,)](*given, dm, *steps, *sizes, *launch, *fixed, ROW, COLUMN, **options)
    if sums:
        dm = dm.sum([1, *[2] * ROW, *[3] * COLUMN])
    return dm.view(*mask.batch, *m.shape[-2:]).sum_to_size(m.shape).to(m.dtype)
