"""The gradient of an embedding's table, fused and without atomics. For the maths see the op of this name.

The places where each row was looked up are sorted, stably, by row: a run of places for each.
chunks     a program sums LENGTH sorted places if they are of one run: of a row that is looked up very often, in parallel
rows       programs walk over the table's rows: each sums what its run has outside whole chunks, then the chunks' sums, always
           in this order and in float32, divides by the frequency if asked, and rounds once; rows without a run get 0

A tile is of BR places × BE elements of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bptoolkit.ops.embedding import RULE
from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.kernel import WARP, Kernel, computed_in_float32, programs
from bptoolkit.triton_kernels.operator import operator

LENGTH = 64  # places of a chunk
WIDEST = 1024  # elements of a row at a time
PLACES = 4  # of a tile, and twice as many where rows are short
PER_THREAD = 16  # elements of a tile


@triton.jit
def gathered(dy, order, j, mask, e, E, dyn, dye):
    """Dy at the sorted places j: BR BE."""
    n = tl.load(order + j, mask, other=0)  # BR
    there = mask[:, None] & (e < E)[None, :]
    return tl.load(dy + n[:, None] * dyn + e[None, :] * dye, there, other=0.0).to(tl.float32)


@triton.jit
def chunks_kernel(dy, order, rows, part, E, dyn, dye, LENGTH: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr):
    blocks = tl.cdiv(E, BE)
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    e = (tl.program_id(0) % blocks).to(tl.int64) * BE + tl.arange(0, BE)  # BE
    first = chunk * LENGTH
    if tl.load(rows + first) == tl.load(rows + first + LENGTH - 1):
        total = tl.zeros((BR, BE), tl.float32)
        for k in range(0, LENGTH, BR):
            j = first + k + tl.arange(0, BR)  # BR
            total += gathered(dy, order, j, j >= 0, e, E, dyn, dye)
        tl.store(part + chunk * E + e, tl.sum(total, 0), e < E)


@triton.jit(do_not_specialize=["padding"])
def rows_kernel(
    dy, order, starts, part, dw, V, E, dyn, dye, padding, BY_FREQ: tl.constexpr,
    LENGTH: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(E, BE)
    e = (tl.program_id(0) % blocks).to(tl.int64) * BE + tl.arange(0, BE)  # BE
    for v in range(tl.program_id(0) // blocks, V, tl.num_programs(0) // blocks):
        first, end = tl.load(starts + v), tl.load(starts + v + 1)
        if v == padding:
            end = first
        c0 = tl.cdiv(first, LENGTH)  # whole chunks c0 … c1 − 1; places before c0 and from c1 on
        c1 = tl.maximum(end // LENGTH, c0)
        head = tl.minimum(c0 * LENGTH, end) - first
        outside = head + tl.maximum(end - c1 * LENGTH, 0)
        total = tl.zeros((BR, BE), tl.float32)
        for k in range(0, outside, BR):
            j = k + tl.arange(0, BR)  # BR
            place = tl.where(j < head, first + j, c1 * LENGTH + j - head)
            total += gathered(dy, order, place, j < outside, e, E, dyn, dye)
        for k in range(c0, c1, BR):
            j = k + tl.arange(0, BR)  # BR
            total += tl.load(part + j[:, None] * E + e[None, :], (j < c1)[:, None] & (e < E)[None, :], other=0.0)
        DW = tl.sum(total, 0)  # BE
        if BY_FREQ:
            DW /= tl.maximum(end - first, 1).to(tl.float32)
        tl.store(dw + (tl.zeros((BE,), tl.int64) + v) * E + e, DW.to(dw.dtype.element_ty), e < E)


def tile(E: int, warp: int) -> tuple[int, int, int]:
    """BR, BE and the number of warps, of `warp` threads each, for rows of E elements."""
    BE = min(triton.next_power_of_2(E), WIDEST)
    BR = max(PLACES, min(2 * PLACES, WIDEST // BE))
    return BR, BE, max(BR * BE // (PER_THREAD * warp), 1)


def _launch(dy: Tensor, i: Tensor, V: int, padding: int | None, by_freq: bool) -> Tensor:
    dw = _fake(dy, i, V, padding, by_freq)
    E, N = dw.shape[1], i.numel()
    if not dw.numel() or not N:
        return dw.zero_()
    rows, order = torch.sort(i.reshape(-1), stable=True)
    starts = torch.searchsorted(rows, torch.arange(V + 1, dtype=rows.dtype, device=rows.device))  # V + 1, int64
    dy = dy.reshape(N, E)
    (BR, BE, warps), chunks = tile(E, WARP), N // LENGTH
    part = torch.empty(max(chunks, 1), E, dtype=torch.float32, device=dy.device)
    shape, options = (LENGTH, BR, BE), {"num_warps": warps, "enable_fp_fusion": True}
    blocks = triton.cdiv(E, BE)
    if chunks:
        chunks_kernel[(chunks * blocks,)](dy, order, rows, part, E, *dy.stride(), *shape, **options)
    P = min(V, 4 * programs(dy.device, warps)) * blocks
    forbidden = -1 if padding is None else padding
    rows_kernel[(P,)](dy, order, starts, part, dw, V, E, *dy.stride(), forbidden, by_freq, *shape, **options)
    return dw


def _fake(dy, i, V, padding, by_freq):
    return torch.empty(V, dy.shape[-1], dtype=dy.dtype, device=dy.device)


BACKWARD = operator("triton_embedding_backward", _launch, _fake)


def backward(dy, i, V, padding, by_freq, sparse):
    return BACKWARD(dy, i, V, padding, by_freq), None


def unsupported(w, i, V, padding, by_freq, sparse) -> str | None:
    """Why the kernel cannot take the call, or None."""
    if sparse:
        return "the fused kernel gives a dense gradient, not a sparse one"
    return computed_in_float32(w)


KERNEL = Kernel(RULE.forward, backward, unsupported)


def specs(warp: int) -> list[Spec]:
    """Short rows, several places to a tile; common ones; and of more than one block."""
    every = []
    for t in ("bf16", "fp32"):
        for E in (64, 768, 4096):
            BR, BE, warps = tile(E, warp)
            ints, known = ("E", "dyn", "V", "padding"), {"dye": 1, "LENGTH": LENGTH, "BR": BR, "BE": BE}
            dy = {"dy": f"*{t}", "order": "*i64", "part": "*fp32"}
            for name, kernel, pointers, count, constants in (
                ("chunks", chunks_kernel, dy | {"rows": "*i64"}, 2, known),
                ("rows", rows_kernel, dy | {"starts": "*i64", "dw": f"*{t}"}, 4, known | {"BY_FREQ": True}),
            ):
                types = pointers | dict.fromkeys(ints[:count], "i32")
                every.append(Spec(f"embedding {name} {t} {E}", kernel, types, constants, (*pointers, "E", "dyn"), warps))
    return every
