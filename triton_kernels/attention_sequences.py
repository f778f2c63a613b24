"""Packed sequences inside a kernel: which one a block of rows is of, read from cu on the device. No rows are padded.

cu: C + 1 numbers, where the sequences begin and end among N rows. See `bptoolkit.ops.attention_varlen`.
"""

import triton
import triton.language as tl


@triton.jit
def bound(cu, c, C, N):
    """Where sequence c begins, of N rows; nothing is read or said that lies outside of cu's C + 1 numbers or of the rows."""
    return tl.minimum(tl.maximum(tl.load(cu + tl.minimum(tl.maximum(c, 0), C)), 0), N).to(tl.int32)


@triton.jit
def sequence_at(x, cu, C, N, B: tl.constexpr):
    """Block x of B rows is one of a sequence: its number c, its first row and its rows; and the block's first row in it.

    Sequence c has the blocks from cu[c] / B + c + 1 on, as many as it needs or one more. The rows before all of the C sequences
    and those after them are two further ones, −1 and C.
    """
    low, high = 0, C + 1
    while low < high:
        middle = (low + high) // 2
        here = bound(cu, middle, C, N) // B + middle + 1 <= x
        low = tl.where(here, middle + 1, low)
        high = tl.where(here, high, middle)
    c = low - 1
    first = tl.where(c < 0, 0, bound(cu, c, C, N))
    last = tl.where(c == C, N, bound(cu, c + 1, C, N))
    i0 = (x - tl.where(c < 0, 0, first // B + c + 1)) * B
    return c, first, tl.where(i0 < 0, 0, tl.maximum(last - first, 0)), tl.maximum(i0, 0)  # negative if cu falls


@triton.jit
def others(c, cu, C, N):
    """The first row and the number of rows of sequence c in the other tensor: none outside of the sequences."""
    first, last = bound(cu, c, C, N), bound(cu, c + 1, C, N)
    return first, tl.where((c >= 0) & (c < C), tl.maximum(last - first, 0), 0)


@triton.jit
def blocks_of(N, C, cu, B: tl.constexpr):
    """How many blocks of B there are of N rows: where sequences are packed, of all of them."""
    return tl.cdiv(N, B) if cu is None else N // B + C + 2
