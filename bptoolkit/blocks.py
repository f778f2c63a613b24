"""A formula over large tensors, block by block: what it computes on the way stays in the cache.

A formula of n steps walks n times through memory and asks for n new tensors. In blocks it walks once. The formula itself is
what is differentiated, batched and traced elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bptoolkit.function import unwatched

BLOCK = 1 << 18  # elements: a few tensors of this size fit the cache, and two threads share one


def by_rows(formula: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """formula(*tensors), for tensors of one shape and a formula whose k-th row needs the tensors' k-th rows alone.

    The result has the last tensor's layout and the first one's dtype.
    """
    if not (unwatched(*tensors) and _worth(tensors)):
        return formula(*tensors)
    out = torch.empty_like(tensors[-1], dtype=tensors[0].dtype)
    n = max(BLOCK * len(out) // out.numel(), 1)
    for block, *parts in zip(out.split(n), *(t.split(n) for t in tensors)):
        block.copy_(formula(*parts))
    return out


def by_elements(formula: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """The same for a formula whose every element needs the tensors' same element alone."""
    if not (unwatched(*tensors) and _worth(tensors)):
        return formula(*tensors)
    if not all(t.is_contiguous() for t in tensors):
        return by_rows(formula, *tensors)
    return by_rows(formula, *(t.view(-1) for t in tensors)).view(tensors[0].shape)


def _worth(tensors: Any) -> bool:
    return tensors[0].device.type == "cpu" and tensors[0].numel() > BLOCK
