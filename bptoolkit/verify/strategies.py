"""Hypothesis strategies for tensors, cotangents and points, to be composed with your own.

Structure is drawn, and a seed; elements come from a `torch.Generator`. So shrinking acts on sizes, layouts and kinds, never on
elements, and a tensor of a million elements costs one draw. What is simplest comes first everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from bptoolkit.shapes import Shapes
from bptoolkit.verify.layouts import COTANGENTS, KINKS, LAYOUTS, VALUES
from bptoolkit.verify.point import DTYPES, Axes, Point

SEEDS = st.integers(0, 2**16 - 1)


def sizes(
    around: Sequence[int] = (16, 32, 64, 128), *, zero: bool = True, one: bool = True, small: int = 5
) -> st.SearchStrategy[int]:
    """Sizes: small ones, then one, zero, and both sides of each tile in `around`.

    Example:
        >>> import hypothesis
        >>> hypothesis.find(sizes(around=(8,), zero=False), lambda n: n > 6)
        7
    """
    if any(n < 2 for n in around) or small < 2:
        raise ValueError(f"verify.strategies.sizes: around={tuple(around)} and small={small} must be at least 2")
    edges = [n for tile in around for n in (tile - 1, tile, tile + 1)]
    return st.sampled_from([*range(2, small + 1), *[1] * one, *[0] * zero, *edges])


def dtypes(names: Sequence[str] = tuple(DTYPES)) -> st.SearchStrategy[torch.dtype]:
    """Floating-point dtypes, the widest first."""
    return st.sampled_from([_known(n, DTYPES, "dtype") for n in names])


def layouts(names: Sequence[str] = tuple(LAYOUTS)) -> st.SearchStrategy[str]:
    """Names of memory layouts, see `bptoolkit.verify.layouts`; contiguous first."""
    for n in names:
        _known(n, LAYOUTS, "layout")
    return st.sampled_from(list(names))


def values(names: Sequence[str] = tuple(VALUES)) -> st.SearchStrategy[str]:
    """Names of value regimes (normal, kinks, large, ...), normal first."""
    for n in names:
        _known(n, VALUES, "values")
    return st.sampled_from(list(names))


def kinks() -> st.SearchStrategy[float]:
    """Where piecewise functions change their formula: zero, one, one half, three, six ..."""
    return st.sampled_from(KINKS)


@st.composite
def tensors(
    draw: Any,
    shape: Sequence[int] | st.SearchStrategy[Any],
    *,
    dtype: torch.dtype | st.SearchStrategy[torch.dtype] = torch.float64,
    layout: str | st.SearchStrategy[str] | None = None,
    regime: str | st.SearchStrategy[str] = "normal",
    requires_grad: bool = False,
) -> Tensor:
    """A tensor of a shape: drawn layout and kind of values, elements from a drawn seed.

    Args:
        draw: is given by Hypothesis.
        shape: the shape, or a strategy of shapes.
        dtype: of the elements, or a strategy (`dtypes()`).
        layout: a name in `LAYOUTS`, or a strategy (`layouts()`); any of them by default.
        regime: a name in `VALUES`, or a strategy (`values()`).
        requires_grad: of the tensor, which is a leaf.

    Example:
        >>> import hypothesis
        >>> @hypothesis.given(tensors((3, 4), dtype=dtypes(), requires_grad=True))
        ... def test(x): assert x.shape == (3, 4) and x.is_leaf
        >>> test()
    """
    fixed: Any = [draw(s) if isinstance(s, st.SearchStrategy) else s for s in (shape, dtype, regime)]
    layout = draw(layouts() if layout is None else layout) if not isinstance(layout, str) else layout
    g = torch.Generator().manual_seed(draw(SEEDS))
    t = _known(fixed[2], VALUES, "values")(tuple(fixed[0]), g).to(fixed[1])
    return _known(layout, LAYOUTS, "layout")(t.contiguous()).detach().requires_grad_(requires_grad)


@st.composite
def shapes(
    draw: Any,
    text: str,
    *,
    size: st.SearchStrategy[int] | None = None,
    dtype: torch.dtype | st.SearchStrategy[torch.dtype] = torch.float64,
    layout: str | st.SearchStrategy[str] | None = "contiguous",
    regime: str | st.SearchStrategy[str] = "normal",
    requires_grad: bool = False,
) -> tuple[Tensor, ...]:
    """The arguments that a shapes string describes: one size a letter, one dtype for all.

    Example:
        >>> from bptoolkit import verify
        >>> args = shapes("x: *B I, w: O I", size=sizes(zero=False))
        >>> verify.check(torch.nn.functional.linear, args, quick=True).ok
        True
    """
    if ":" not in text:
        raise ValueError(f"verify.strategies.shapes: {text!r} is not a shapes string; one looks like 'x: *B I, w: O I'")
    size = sizes() if size is None else size
    dtype = draw(dtype) if isinstance(dtype, st.SearchStrategy) else dtype
    found: dict[str, tuple[int, ...]] = {}
    args = []
    for _, lead, dims in Shapes(text).inputs:
        for d in dims:
            if d not in found:
                found[d] = (int(d),) if d.isdigit() else (draw(size),)
        if lead and lead not in found:
            found[lead] = tuple(draw(st.lists(st.sampled_from((2, 1, 3, 0)), max_size=2)))
        shape = [n for d in ((lead, *dims) if lead else dims) for n in found[d]]
        args.append(draw(tensors(shape, dtype=dtype, layout=layout, regime=regime, requires_grad=requires_grad)))
    return tuple(args)


@st.composite
def cotangents(draw: Any, outputs: Tensor | Sequence[Tensor], kinds: Sequence[str] = tuple(COTANGENTS)) -> tuple[Tensor, ...]:
    """A cotangent per output, all of one drawn kind: random, expanded, sliced, transposed, zero, one-hot ..."""
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    kind = _known(draw(st.sampled_from(list(kinds))), COTANGENTS, "cotangent")
    g = torch.Generator().manual_seed(draw(SEEDS))
    return tuple(kind(torch.randn(o.shape, generator=g, dtype=torch.float64).to(o.device, o.dtype)) for o in outputs)


@st.composite
def points(draw: Any, axes: Axes) -> Point:
    """A `Point` with any value on any axis, and a seed."""
    point = axes.base
    for axis, choices in axes.all.items():
        point = point.having(axis, draw(st.sampled_from(list(choices))))
    return point.having("seed", draw(SEEDS))


def _known(name: Any, table: Any, what: str) -> Any:
    if name not in table:
        raise ValueError(f"verify.strategies: there is no {what} {name!r}; there are {', '.join(map(str, table))}")
    return table[name]
