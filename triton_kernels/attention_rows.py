"""Rows of q, k, v and dO inside a kernel: by a pointer and steps, or by a tensor descriptor.

For the latter see `attention_descriptors`.
"""

import triton
import triton.language as tl


@triton.jit
def wide(n):
    """A number of a tile or row, of 64 bits, to be multiplied by a step."""
    return tl.full((), 0, tl.int64) + n


@triton.jit
def rows(p, step, count, E: tl.constexpr, R: tl.constexpr, BE: tl.constexpr, UPCAST: tl.constexpr, EDGE: tl.constexpr = True):
    """R rows of E elements, zeros below and beside those that there are; not at an edge, all R are there."""
    r, e = tl.arange(0, R), tl.arange(0, BE)
    at = p + (r[:, None] * step + e[None, :])
    if EDGE:
        mask = (r < count)[:, None]
        if E < BE:
            mask = mask & (e < E)[None, :]
        x = tl.load(at, mask, other=0.0)  # R BE
    elif E < BE:
        x = tl.load(at, (e < E)[None, :], other=0.0)
    else:
        x = tl.load(at)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def put(p, x, count, E: tl.constexpr, R: tl.constexpr, BE: tl.constexpr):
    """Write R dense rows of E elements, those that there are."""
    r, e = tl.arange(0, R), tl.arange(0, BE)
    mask = (r < count)[:, None]
    if E < BE:
        mask = mask & (e < E)[None, :]
    tl.store(p + (r[:, None] * E + e[None, :]), x.to(p.dtype.element_ty), mask)


@triton.jit
def moved(p, step):
    """A pointer, moved; a descriptor stays, as it is told where to read."""
    return p if isinstance(p, tl.tensor_descriptor) else p + step


@triton.jit
def tile_of(
    p, b, h, g, r, gs, rs, count, E: tl.constexpr, R: tl.constexpr, BE: tl.constexpr, UPCAST: tl.constexpr,
    EDGE: tl.constexpr = True,
):  # fmt: skip
    """R rows from row r on of sample (b, h, g), as `rows` has them.

    p: a pointer to the first row of (b, h, 0), gs and rs its steps from g to g and from row to row, count the rows that there
    are; or a descriptor over B H G L E, which itself has zeros where there is nothing.
    """
    if isinstance(p, tl.tensor_descriptor):
        x = p.load([b.to(tl.int32), h.to(tl.int32), wide(g).to(tl.int32), r, 0]).reshape(R, BE)
        x = x.to(tl.float32) if UPCAST else x
    else:
        x = rows(p + (wide(g) * gs + wide(r) * rs), rs, count, E, R, BE, UPCAST, EDGE)
    return x
