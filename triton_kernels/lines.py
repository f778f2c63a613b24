"""Kernels along one dimension C of a tensor, seen as A C I: where a tile of its lines lies, and log Σ e^x in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import triton
import triton.language as tl


def lines(shape: Sequence[int], dim: int) -> tuple[int, int, int]:
    """A, C and I: the elements before dimension `dim`, of it, and behind it; not reshape(-1, …), which is ambiguous at 0."""
    d = dim % max(len(shape), 1)
    return prod(shape[:d]), prod(shape[d : d + 1]), prod(shape[d + 1 :])


def programs(A: int, I: int, BM: int) -> int:
    """How many tiles of lines there are."""
    return triton.cdiv(A, BM) if I == 1 else A * triton.cdiv(I, BM)


@triton.jit
def place(p, A, I, DENSE: tl.constexpr, BM: tl.constexpr):
    """The p-th BM lines: a and i in int64, and which of them exist. DENSE: I is 1, and they run over A; else over I."""
    if DENSE:
        a = p.to(tl.int64) * BM + tl.arange(0, BM)  # BM
        i = tl.zeros((BM,), tl.int64)
        rows = a < A
    else:
        blocks = tl.cdiv(I, BM)
        a = (p // blocks).to(tl.int64)
        i = (p % blocks).to(tl.int64) * BM + tl.arange(0, BM)  # BM
        rows = i < I
    return a, i, rows


@triton.jit
def join(M, S, X):
    """Largest element and Σ e^(x − M) − 1 of each place of a tile, with one more x each; one exponential.

    Begins with M = −∞, S = 0. Less one, since the sum of a class that is almost sure is 1 + little, and the little is wanted.
    """
    e = tl.exp(-tl.abs(X - M))
    S = tl.where(X > M, (S + 1) * e, tl.where(X == M, S + 1, S + e))  # NaN lands in S
    return tl.where(X > M, X, M), S


@triton.jit
def gather(M, S):
    """Largest element and Σ e^(x − m) − 1 of each line; NaN where the line holds NaN, +∞, or −∞ alone, m then as torch's."""
    m = tl.max(M, 1)  # BM
    top = m[:, None] == M  # BM BC
    s = tl.sum(tl.where(top, S, (S + 1) * tl.exp(M - m[:, None])), 1) + (tl.sum(top.to(tl.float32), 1) - 1)
    m = tl.where(s != s, s, m)
    return m, tl.where(tl.abs(m) == float("inf"), float("nan"), s)
