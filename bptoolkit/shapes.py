"""Shapes, stated once as a string, and the errors for arguments that disagree with it.

`"input: *B I, weight: O I, bias: O -> *B O"`: one entry per tensor argument, a letter per dimension, `*B` for any leading
dimensions, `1` for a dimension of that size. The same letter is the same size everywhere. An argument that is None is skipped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Shapes:
    """The parsed string; checks tensors against it and names what disagrees."""

    def __init__(self, text: str) -> None:
        self.text = text
        inputs, _, outputs = text.partition("->")
        self.inputs = [self._parse(part) for part in inputs.split(",")]
        self.outputs = [self._parse("out:" + part)[1:] for part in outputs.split(",")]

    @staticmethod
    def _parse(part: str) -> tuple[str, str, tuple[str, ...]]:
        name, _, dims = part.partition(":")
        letters = tuple(dims.split())
        lead = letters[0] if letters and letters[0].startswith("*") else ""
        return name.strip(), lead, letters[1:] if lead else letters

    def check(self, op: str, *tensors: Tensor | None) -> None:
        """Check ranks, sizes, dtypes and devices.

        Raises:
            TypeError: an argument is no tensor, is not of floating point, or its dtype differs from the first one's.
            ValueError: ranks or sizes disagree with the string, or devices differ.
        """
        sizes: dict[str, Any] = {}
        seen: dict[str, str] = {}
        first: Tensor | None = None
        for (name, lead, dims), t in zip(self.inputs, tensors):
            if t is None:
                continue
            if first is None:
                first, first_name = t, name
                check_floating(op, name, t)
            elif not isinstance(t, Tensor) or t.dtype != first.dtype or t.device != first.device:
                check_floating(op, name, t)
                check_alike(op, first_name, first, name, t)
            shape = t.shape
            extra = len(shape) - len(dims)
            if extra < 0 or (extra and not lead):
                wanted = " ".join((lead, *dims) if lead else dims) or "no dimensions"
                raise ValueError(
                    f"{op}: {name} has shape {tuple(shape)}, which is {len(shape)} dimensions; it needs ({wanted})"
                )
            for d, s in zip(dims, shape[extra:] if extra else shape):
                if d not in sizes:
                    sizes[d], seen[d] = s, name
                elif sizes[d] != s:
                    other = next(t for (n, *_), t in zip(self.inputs, tensors) if n == seen[d] and t is not None)
                    raise ValueError(
                        f"{op}: {d} is {sizes[d]} in {seen[d]} {tuple(other.shape)} but {s} in {name} {tuple(shape)}; "
                        f"the shapes are {self.text}"
                    )


def check_floating(op: str, name: str, t: Any) -> None:
    """Raise TypeError unless t is a tensor of real floating point."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, not {type(t).__name__} ({t!r})")
    if not t.dtype.is_floating_point:
        raise TypeError(f"{op}: {name} is {t.dtype}; it must be of floating point (float64, float32, bfloat16, float16)")
    if t.layout != torch.strided:
        raise TypeError(f"{op}: {name} has layout {t.layout}; it must be a strided (dense) tensor")


def check_alike(op: str, first_name: str, first: Tensor, name: str, t: Tensor) -> None:
    """Raise unless t has the dtype and the device of first."""
    if t.dtype != first.dtype:
        raise TypeError(f"{op}: {name} is {t.dtype} but {first_name} is {first.dtype}; they must have one dtype")
    if t.device != first.device:
        raise ValueError(f"{op}: {name} is on {t.device} but {first_name} is on {first.device}; they must be on one device")
