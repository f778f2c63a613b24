"""Calls drawn at random from a seed: sizes, options and values, for checks and benchmarks.

`Draw` takes any `random.Random`, so that Hypothesis can supply one (`st.randoms()`) and shrink what it drew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bptoolkit.shapes import Shapes

SIZES = (1, 2, 3, 5, 0, 4, 7, 8, 15, 16, 17, 31, 33)  # small, zero, odd, either side of a tile


class Case(NamedTuple):
    """The arguments of one call; a tensor that requires grad is one to differentiate by."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Draw:
    """What an op's `case` draws from.

    Args:
        random: the source of all choices.
        dtype: of the floating-point tensors.
        device: of all tensors.
        sizes: what sizes are drawn from.
        force: the k-th size drawn -> what it is, where its bounds allow.
        values: (shape, generator) -> the elements of a tensor in float64; normal ones if None.
        salt: another one gives other elements in the same structure.
    """

    def __init__(
        self,
        random: Random,
        *,
        dtype: torch.dtype = torch.float64,
        device: str | torch.device = "cpu",
        sizes: Sequence[int] = SIZES,
        force: Mapping[int, int] | None = None,
        values: Callable[[tuple[int, ...], torch.Generator], Tensor] | None = None,
        salt: int = 0,
    ) -> None:
        self.force, self.drawn = dict(force or {}), 0
        self.random, self.dtype, self.device, self.sizes = random, dtype, torch.device(device), sizes
        self.values = values
        self.generator = torch.Generator().manual_seed(random.getrandbits(32) + salt)

    def size(self, least: int = 0, most: int = 1 << 30) -> int:
        """A size between two bounds."""
        self.drawn += 1
        forced = self.force.get(self.drawn - 1)
        if forced is not None and least <= forced <= most:
            return forced
        return self.random.choice([s for s in self.sizes if least <= s <= most] or [least])

    def batch(self, most: int = 2) -> tuple[int, ...]:
        """Leading dimensions: between none and `most` of them, small."""
        small = [s for s in self.sizes if s <= 5] or list(self.sizes)
        return tuple(self.random.choice(small) for _ in range(self.random.randint(0, most)))

    def choice(self, options: Sequence[Any]) -> Any:
        """One of the options."""
        return self.random.choice(list(options))

    def flag(self) -> bool:
        """True or False."""
        return self.random.random() < 0.5

    def tensor(self, *shape: int, scale: float = 1.0, grad: bool = True) -> Tensor:
        """A tensor of normal values. `grad`: whether it is one to differentiate by."""
        if self.values is not None:
            t = self.values(shape, self.generator)
        else:
            t = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        return t.to(self.device, self.dtype).requires_grad_(grad)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """A tensor of integers in [low, high)."""
        return torch.randint(low, max(high, low + 1), shape, generator=self.generator).to(self.device)

    def booleans(self, *shape: int, share: float = 0.5) -> Tensor:
        """A boolean tensor; `share` of it is True."""
        return (torch.rand(shape, generator=self.generator) < share).to(self.device)


def from_shapes(shapes: Shapes, draw: Draw) -> Case:
    """The arguments that a shapes string describes; any but the first may be None where its name ends in `?`."""
    sizes: dict[str, int] = {}
    leads: dict[str, tuple[int, ...]] = {}
    args = []
    for _, lead, dims in shapes.inputs:
        for d in dims:
            sizes.setdefault(d, draw.size())
        if lead:
            leads.setdefault(lead, draw.batch())
        fan = sizes[dims[-1]] if dims else 1
        args.append(draw.tensor(*leads.get(lead, ()), *(sizes[d] for d in dims), scale=max(fan, 1) ** -0.5))
    return Case(tuple(args), {})
