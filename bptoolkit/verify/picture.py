"""Where an error sits: as text to look at, and in words."""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = " .:-=+*#%@"
ROWS, COLUMNS = 16, 48


def heat_map(error: Tensor, want: Tensor | None = None, dtype: torch.dtype | None = None) -> str:
    """A tensor's errors as a picture: rows of the last dimension, a character a cell, a level a power of ten below the largest.

    Args:
        error: absolute errors, of any shape.
        want: the expected values, of the same shape; if given, a row below says how large they are.
        dtype: of the result; an error that its rounding explains is then not called wrong.

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
    allowed = torch.as_tensor(1e-6 * top)
    if want is not None and dtype is not None:
        allowed = 16 * torch.finfo(dtype).eps * want.detach().double().abs().nan_to_num(0, 0, 0).clamp(min=1e-6 * top)
    lines.append(f"{'':>{width}}  wrong: {where_wrong(e > allowed if bool((e > allowed).any()) else e > 0)}")
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
    if wrong in (0, n):
        return "everywhere" if wrong else "nowhere"
    at = mask.nonzero()
    if wrong == 1:
        return f"one element of {n}, at {tuple(int(k) for k in at[0])}"
    said, box = [], 1
    for d, size in enumerate(mask.shape):
        marked = at[:, d].unique()
        box *= len(marked)
        if len(marked) < size:
            said.append(_span(marked, size, noun(mask.dim(), d)))
    if not said:
        return f"{wrong} of {n} elements, scattered"
    return "part of " * (box > wrong) + ", ".join(said)


def _span(marked: Tensor, size: int, name: str) -> str:
    """The marked indices of a dimension: "row 3 (the last)", "rows 16-31", "4 of 8 columns"."""
    first, last, count = int(marked[0]), int(marked[-1]), len(marked)
    if count == 1:
        return f"{name} {first}" + (" (the last)" if last == size - 1 else " (the first)" if first == 0 else "")
    names = name.replace("slice", "slices") if name.startswith("slice") else f"{name}s"
    if last - first + 1 > count:
        return f"{count} of {size} {names}"
    return f"{names} {_range(marked)}" + f" (all from {first} on)" * (last == size - 1)


def noun(dims: int, d: int) -> str:
    """What an index along a dimension is called."""
    if dims == 1:
        return "element"
    return "column" if d == dims - 1 else "row" if d == dims - 2 else f"slice of dimension {d}"
