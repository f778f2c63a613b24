"""Where an error sits: as text to look at, and in words."""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = " .:-=+*#%@"
ROWS, COLUMNS = 16, 48


def heat_map(error: Tensor, want: Tensor | None = None) -> str:
    """A tensor's errors as a picture: rows of the last dimension, a character a cell, a level a power of ten below the largest.

    Args:
        error: absolute errors, of any shape.
        want: the expected values, of the same shape; if given, a row below says how large they are.

    Returns:
        Text of at most 16 rows and 48 columns, with the ranges of the indices, and a sentence on where the error sits.
    """
    e = error.detach().double().abs().nan_to_num(torch.inf)
    if e.numel() == 0:
        return "(no elements)"
    table = e.reshape(-1, e.shape[-1]) if e.dim() else e.reshape(1, 1)
    finite = table[table.isfinite()]
    top = float(finite.max()) if finite.numel() and float(finite.max()) > 0 else 1.0
    rows = [r for r in torch.arange(table.shape[0]).tensor_split(min(ROWS, table.shape[0])) if len(r)]
    columns = [c for c in torch.arange(table.shape[1]).tensor_split(min(COLUMNS, table.shape[1])) if len(c)]
    width = max(len(_range(r)) for r in rows)
    lines = []
    for r in rows:
        cells = "".join(_level(float(table[r][:, c].max()), top) for c in columns)
        lines.append(f"{_range(r):>{width}} |{cells}|")
    lines.append(f"{'':>{width}}  columns 0-{table.shape[1] - 1}; '{LEVELS[-1]}' is {top:.2g}, each level below a tenth")
    if want is not None and want.numel():
        lines.append(
            f"{'':>{width}}  expected values are up to {float(want.detach().double().abs().nan_to_num(0, 0, 0).max()):.2g}"
        )
    lines.append(f"{'':>{width}}  wrong: {where_wrong(e > 1e-6 * top)}")
    return "\n".join(lines)


def _level(value: float, top: float) -> str:
    if value == 0:
        return LEVELS[0]
    if value >= top:
        return LEVELS[-1]
    below = -float(torch.tensor(value / top, dtype=torch.float64).log10())
    return LEVELS[max(1, len(LEVELS) - 1 - int(below))]


def _range(index: Tensor) -> str:
    first, last = int(index[0]), int(index[-1])
    return str(first) if first == last else f"{first}-{last}"


def where_wrong(mask: Tensor) -> str:
    """In words, which elements a mask marks: everywhere, one element, some rows, the tail of a dimension ..."""
    n, wrong = mask.numel(), int(mask.sum())
    if wrong == 0:
        return "nowhere"
    if wrong == n:
        return "everywhere"
    at = mask.nonzero()
    if wrong == 1:
        return f"one element of {n}, at {tuple(int(k) for k in at[0])}"
    for d in range(mask.dim()):
        size = mask.shape[d]
        marked = at[:, d].unique()
        if len(marked) == size:
            continue
        name = "rows" if d == mask.dim() - 2 else "columns" if d == mask.dim() - 1 and mask.dim() > 1 else f"dimension {d}"
        whole = bool(mask.index_select(d, marked).all())
        first, last = int(marked[0]), int(marked[-1])
        span = _range(marked) if last - first + 1 == len(marked) else f"{len(marked)} of {size}"
        tail = (
            " (the last)"
            if len(marked) == 1 and last == size - 1
            else " (the first)"
            if len(marked) == 1 and first == 0
            else ""
        )
        tail = f" (all from {first} on)" if last == size - 1 and len(marked) > 1 and last - first + 1 == len(marked) else tail
        return f"{'all' if whole else 'some'} of {name} {span}{tail}"
    return f"{wrong} of {n} elements, scattered"
