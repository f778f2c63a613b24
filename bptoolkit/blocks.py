"""A formula over large tensors, block by block: what it computes on the way stays in the cache.

A formula of n steps walks n times through memory and asks for n new tensors. In blocks it walks once. The formula itself is
what is differentiated, batched and traced elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bptoolkit.function import unwatched

BLOCK = 1 << 19  # elements: a few tensors of this size fit the cache, and threads have enough to share


def by_rows(formula: Callable[..., Tensor], first: Tensor, *others: Tensor | None) -> Tensor:
    """formula(first, *others), for a formula whose k-th row needs the tensors' k-th rows alone.

    The result has the first tensor's layout if it has its shape.
    """
    if not (unwatched(first, *others) and _worth(first)):
        return formula(first, *others)
    n, out = max(BLOCK * len(first) // first.numel(), 1), None
    for k in range(0, len(first), n):
        part = formula(first[k : k + n], *(t if t is None else t[k : k + n] for t in others))
        if out is None and part.shape[1:] == first.shape[1:]:
            out = torch.empty_like(first, dtype=part.dtype)
        elif out is None:
            out = part.new_empty(len(first), *part.shape[1:])
        out[k : k + n] = part
    assert out is not None
    return out


def by_elements(formula: Callable[..., Tensor], first: Tensor, *others: Tensor) -> Tensor:
    """The same for a formula whose every element needs the tensors' same element alone."""
    if not (unwatched(first, *others) and _worth(first)):
        return formula(first, *others)
    if not all(t.is_contiguous() for t in (first, *others)):
        return by_rows(formula, first, *others)
    return by_rows(formula, first.view(-1), *(t.view(-1) for t in others)).view(first.shape)


def _worth(t: Tensor) -> bool:
    return t.device.type == "cpu" and t.numel() > BLOCK
