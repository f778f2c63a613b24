"""`Point`: one configuration of a call, a value per axis; and the rows of points that a search visits.

The axes are the sizes (one axis a letter of the shapes string), the dtype, the layout of the inputs, the kind of cotangent, the
subset of inputs that requires grad, the regime of the values, and a seed. The values of an axis go from simple to strange, so
that shrinking is moving to the left. A point is one line of text, which `bptoolkit verify --replay` takes back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from random import Random
from typing import Any

import torch

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FIELDS = ("dtype", "layout", "cotangent", "need", "values")  # the axes beside the sizes, simplest value first in `Axes`


@dataclass(frozen=True)
class Point:
    """One configuration.

    Attributes:
        sizes: letter -> size, as pairs; "*B" -> leading sizes joined by x ("2x3", or "-" for none). Inputs that are not
            described by letters have the one letter "case", a number.
        dtype: a name in `DTYPES`.
        layout: how the inputs lie in memory, a name in `layouts.LAYOUTS`.
        cotangent: a name in `layouts.COTANGENTS`.
        need: which inputs require grad, a digit each ("101"); "1" alone for all of them.
        values: a name in `layouts.VALUES`.
        seed: of the elements.
    """

    sizes: tuple[tuple[str, int | str], ...] = ()
    dtype: str = "float64"
    layout: str = "contiguous"
    cotangent: str = "random"
    need: str = "1"
    values: str = "normal"
    seed: int = 0

    def get(self, axis: str) -> Any:
        """The value of an axis: a field, or a letter of the sizes."""
        return getattr(self, axis) if axis in FIELDS or axis == "seed" else dict(self.sizes)[axis]

    def having(self, axis: str, value: Any) -> Point:
        """The same point with another value on one axis."""
        if axis in FIELDS or axis == "seed":
            return replace(self, **{axis: value})
        return replace(self, sizes=tuple((k, value if k == axis else v) for k, v in self.sizes))

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def __str__(self) -> str:
        """The line that `parse` reads."""
        sizes = ",".join(f"{k}={v}" for k, v in self.sizes) or "-"
        return f"sizes={sizes} " + " ".join(f"{f}={getattr(self, f)}" for f in (*FIELDS, "seed"))

    @classmethod
    def parse(cls, line: str) -> Point:
        """A point from its line.

        Raises:
            ValueError: the line is not one that a point prints.
        """
        try:
            given = dict(part.split("=", 1) for part in line.split())
            sizes = () if given["sizes"] == "-" else tuple(_pair(p) for p in given["sizes"].split(","))
            return cls(sizes=sizes, seed=int(given["seed"]), **{f: given[f] for f in FIELDS})
        except (KeyError, ValueError) as bad:
            raise ValueError(f"verify: {line!r} is not a point; one looks like '{cls((('B', 2), ('I', 3)))}' ({bad})") from None


def _pair(text: str) -> tuple[str, int | str]:
    letter, _, value = text.partition("=")
    return letter, value if letter.startswith("*") else int(value)


@dataclass(frozen=True)
class Axes:
    """What each axis can be, simplest value first. `sizes`: letter -> its sizes; `fields`: field -> its values."""

    sizes: Mapping[str, Sequence[Any]]
    fields: Mapping[str, Sequence[Any]]
    base: Point = field(init=False)

    def __post_init__(self) -> None:
        first = {f: v[0] for f, v in self.fields.items()}
        object.__setattr__(self, "base", Point(sizes=tuple((k, v[0]) for k, v in self.sizes.items()), **first))

    @property
    def all(self) -> dict[str, Sequence[Any]]:
        """Every axis."""
        return {**self.sizes, **self.fields}

    def off(self, point: Point) -> list[str]:
        """The axes on which a point is not at its simplest."""
        return [a for a, values in self.all.items() if point.get(a) != values[0]]

    def sweep(self) -> Iterator[Point]:
        """The simplest point, then one axis at a time through all its values."""
        yield self.base
        for axis, values in self.all.items():
            for v in values[1:]:
                yield self.base.having(axis, v)

    def pairs(self, random: Random, sizes: int = 6) -> Iterator[Point]:
        """A pairwise covering array: every two values of two axes meet in a row. Greedy; simple rows come first.

        The sizes take part with at most `sizes` values each, or the array grows with their square.
        """
        axes = {a: list(v) for a, v in self.all.items() if len(v) > 1}
        for a in self.sizes:
            if a in axes and len(axes[a]) > sizes:
                axes[a] = axes[a][:2] + random.sample(axes[a][2:], sizes - 2)
        order = {a: k for k, a in enumerate(axes)}
        unmet = dict.fromkeys((a, x, b, y) for a, b in combinations(axes, 2) for x in axes[a] for y in axes[b])
        rows: list[dict[str, Any]] = []

        def pair(a: str, x: Any, b: str, y: Any) -> tuple[str, Any, str, Any]:
            return (a, x, b, y) if order[a] < order[b] else (b, y, a, x)

        while unmet:
            best: dict[str, Any] = {}
            most = -1
            first = list(unmet)
            for _ in range(4):
                a, x, b, y = random.choice(first)
                row = {a: x, b: y}
                for c in random.sample(list(axes), len(axes)):
                    if c not in row:
                        gains = [sum(pair(c, v, d, w) in unmet for d, w in row.items()) for v in axes[c]]
                        row[c] = axes[c][gains.index(max(gains))]  # of equal gains the simplest
                met = sum(pair(c, row[c], d, row[d]) in unmet for c, d in combinations(row, 2))
                if met > most:
                    best, most = row, met
            for c, d in combinations(best, 2):
                unmet.pop(pair(c, best[c], d, best[d]), None)
            rows.append(best)
        rows.sort(key=lambda r: sum(axes[a].index(v) for a, v in r.items()))
        for row in rows:
            point = self.base
            for a, v in row.items():
                point = point.having(a, v)
            yield point
