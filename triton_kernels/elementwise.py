"""What elementwise kernels share: tensors as matrices that are read by their strides, and the tile of a program.

Tensors whose elements lie alike are one long row; where a dimension has a stride of its own (the halves of a larger tensor),
what is before and with it are rows, what is after it columns, and nothing is copied.
"""

from __future__ import annotations

from itertools import pairwise
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # elements
PER_THREAD = 8  # of them: 16 bytes of a half tensor
WIDEST = 512  # columns of a tile with several rows: little of it lies past the end of a long row


@triton.jit
def place(M, N, BM: tl.constexpr, BN: tl.constexpr):
    """The rows and columns of this program's tile, which of all it has, and which elements are there."""
    p, J = tl.program_id(0), tl.cdiv(N, BN)
    m = (p // J).to(tl.int64) * BM + tl.arange(0, BM)  # BM
    n = (p % J).to(tl.int64) * BN + tl.arange(0, BN)  # BN
    return m, n, (m < M)[:, None] & (n < N)[None, :]


@triton.jit
def read(x, m, n, xm, xn, mask):
    """A tile of x, in float32."""
    return tl.load(x + m[:, None] * xm + n[None, :] * xn, mask, other=0.0).to(tl.float32)  # BM BN


@triton.jit
def write(y, value, m, n, ym, mask):
    """A tile of y, whose rows are dense, rounded to its dtype."""
    tl.store(y + m[:, None] * ym + n[None, :], value.to(y.dtype.element_ty), mask)


def tile(M: int, N: int, warp: int) -> tuple[int, int, int]:
    """BM, BN and the number of warps, of `warp` threads each, for M rows of N elements."""
    BN = TILE if M == 1 else min(triton.next_power_of_2(N), WIDEST)
    return TILE // BN, BN, TILE // (PER_THREAD * warp)


def tiles(M: int, N: int, BM: int, BN: int) -> tuple[int]:
    """The grid of a launch: a program per tile."""
    return (triton.cdiv(M, BM) * triton.cdiv(N, BN),)


def memory_format(x: Tensor) -> torch.memory_format:
    """The order of what is made from x: channels last where x is so, as torch's own elementwise functions have it."""
    if not x.is_contiguous():
        for dims, order in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if x.dim() == dims and x.is_contiguous(memory_format=order):
                return order
    return torch.contiguous_format


def in_order(order: torch.memory_format, *tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors with their dimensions in that order."""
    return list(tensors) if order is torch.contiguous_format else [t if t is None else t.movedim(1, -1) for t in tensors]


def matrices(*tensors: Tensor | None, rows: int | None = None) -> tuple[int, int, list[Tensor | None]]:
    """M, N, and the tensors, which are of one shape and not empty, as M × N: views unless two dimensions stand apart.

    Args:
        tensors: what is read.
        rows: how many dimensions become the rows; by default those up to the last that stands apart in some tensor.
    """
    given = [t for t in tensors if t is not None]
    shape = given[0].shape
    if rows is None:
        dims = [d for d, size in enumerate(shape) if size != 1]
        apart = [d for d, e in pairwise(dims) if any(t.stride(d) != t.stride(e) * shape[e] for t in given)]
        rows = apart[-1] + 1 if apart else 0
    M, N = prod(shape[:rows]), prod(shape[rows:])
    return M, N, [t if t is None else t.reshape(M, N) for t in tensors]


def strides(*tensors: Tensor | None) -> tuple[int, ...]:
    """Those of matrices, one after the other; 0 for one that is not given."""
    return tuple(s for t in tensors for s in ((0, 0) if t is None else t.stride()))
