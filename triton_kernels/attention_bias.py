"""The gradient of attention's mask: dS, summed over what the mask was broadcast over. Letters as in `attention_loops`.

A program has a tile of the mask, rows I and columns J of one of its samples, and passes over the samples of q that share it: P
and dS of each are made again. Where few tiles exist the samples are split into parts; parts, and the blocks of a mask of one
row or column, are added up by torch. No atomics: the same bits every time.
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
from bptoolkit.triton_kernels.attention_loops import exponential, mask_at, rows, sample_at, scores, seen_by, wide
from bptoolkit.triton_kernels.randomness import hashed, keep_in_row

PROGRAMS = 512  # enough for the widest part; the sums of parts so take at most this many tiles


@triton.jit(do_not_specialize=["MH", "MG", "H", "G", "L", "S", "C", "shift", "threshold", "count", "parts"])
def mask_kernel(
    do, q, k, v, m, slopes, lengths, seed, T_, r_, D, order, dm,
    ob, oh, og, ol, qb, qh, qg, ql, kb, kh, ks, vb, vh, vs, mb, mh, mg, ml, ms, MH, MG, count, parts,
    H, G, L, S, C, left, right, shift, scale, cap, threshold, inverse,
    E: tl.constexpr, EV: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    NATURAL: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    ROW: tl.constexpr, COLUMN: tl.constexpr,
):  # fmt: skip
    """dM of a tile, of a part of the samples.

    order: the numbers of the samples, those `count` together that share one sample of the mask. ROW: the mask has one row,
    COLUMN: one column.
    """
    down, across = tl.cdiv(L, BM), tl.cdiv(S, BN)
    pid = tl.program_id(0)
    i0, j0 = pid // across % down * BM, pid % across * BN
    c = pid // (across * down)
    part, c = c % parts, c // parts
    i, j = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    F = tl.zeros((BM, BN), tl.float32)
    begin, _, _, end = seen_by(i0, BM, BN, S, left, right, shift)
    last = tl.where((j0 >= begin) & (j0 < end), count, 0)
    stretch, row = tl.cdiv(L, BR) * BR, i0 + tl.arange(0, BM)
    order += wide(c) * count
    m += mask_at(tl.load(order), mb, mh, mg, MH, MG)
    do += wide(i0) * ol
    q += wide(i0) * ql
    k += wide(j0) * ks
    v += wide(j0) * vs
    for s in range(part, last, parts):
        n = tl.load(order + s)
        b, h, g = sample_at(n, H, G)
        slope, length = None, S
        if slopes is not None:
            slope = tl.load(slopes + n)
        if lengths is not None:
            length = tl.load(lengths + n)
        Q = rows(q + (b * qb + h * qh + g * qg), ql, L - i0, E, BM, BE, UPCAST)  # BM BE
        K = rows(k + (b * kb + h * kh), ks, S - j0, E, BN, BE, UPCAST)  # BN BE
        x = tl.dot(Q, tl.trans(K), input_precision=PRECISION)  # BM BN
        y, _t = scores(
            x, i, j, i0, j0, m, ml, ms, L, slope, None, None, shift, length, scale, cap, NATURAL, lengths is not None
        )  # fmt: skip
        at = wide(n) * stretch + row
        p = exponential(y - tl.load(T_ + at)[:, None], NATURAL) * tl.load(r_ + at)[:, None]
        dO = rows(do + (b * ob + h * oh + g * og), ol, L - i0, EV, BM, BV, UPCAST)  # BM BV
        V = rows(v + (b * vb + h * vh), vs, S - j0, EV, BN, BV, UPCAST)  # BN BV
        dp = tl.dot(dO, tl.trans(V), input_precision=PRECISION)  # BM BN
        if seed is not None:
            keys = hashed(wide(n) * L + row, seed)[:, None]
            dp = tl.where(keep_in_row(j0 + j, keys, threshold), dp * inverse, 0.0)
        F += p * (dp - tl.load(D + at)[:, None])
    seen = (i < L - i0) & (j < S - j0)  # what is hidden in all samples is left out here: in the loop it would cost registers
    if left is not None:
        seen = seen & (j - i >= i0 + shift - left - j0)
    if right is not None:
        seen = seen & (j - i <= i0 + shift + right - j0)
    F = tl.where(seen, F, 0.0)
    c = wide(c) * parts + part
    R, C = down if ROW else L, across if COLUMN else S
    r, e = tl.arange(0, BM), tl.arange(0, BN)
    if ROW and COLUMN:
        tl.store(dm + (c * R + i0 // BM) * C + j0 // BN, tl.sum(F))
    elif ROW:
        F = tl.sum(F, 0)
        tl.store(dm + ((c * R + i0 // BM) * C + j0 + e), F, e < S - j0)
    elif COLUMN:
        F = tl.sum(F, 1)
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
    own, shared = ([d for d, step in enumerate(mask.own) if (step > 0) == of] for of in (True, False))
    order = torch.arange(prod(mask.sizes), dtype=torch.int32, device=m.device)
    order = order.view(mask.sizes).permute(*own, *shared).reshape(-1)
    ROW, COLUMN = m.shape[-2] == 1, m.shape[-1] == 1
    count = prod(mask.sizes[d] for d in shared)
    samples = prod(mask.sizes[d] for d in own)
    tiles = samples * down * across
    parts = max(1, min(count, PROGRAMS // max(tiles, 1)))
    sums = parts > 1 or (ROW and down != 1) or (COLUMN and across != 1)
    shape = samples, parts, down if ROW else n.L, across if COLUMN else n.S
    dm = torch.empty(shape, dtype=torch.float32 if sums else m.dtype, device=m.device)
    if dm.numel():
        mask_kernel[(tiles * parts,)](*given, order, dm, *steps, count, parts, *launch, *fixed, ROW, COLUMN, **options)
    if sums:
        dm = dm.sum([1, *[2] * ROW, *[3] * COLUMN])
    return dm.view(*mask.batch, *m.shape[-2:]).sum_to_size(m.shape).to(m.dtype)
