"""Shapes, stated once as a string, and the errors for arguments that disagree with it.

`"input: *B I, weight: O I, bias: O -> *B O"`: one entry per tensor argument, a letter per dimension, `*B` for any leading
dimensions, `1` for a dimension of that size. The same letter is the same size everywhere. An argument that is None is skipped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_FLOATING = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))


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
        first: Tensor | None = None
        for (name, lead, dims), t in zip(self.inputs, tensors):
            if t is None:
                continue
            if first is None:
                check_floating(op, name, t)
                first, first_name, dtype, device = t, name, t.dtype, t.device
            elif not isinstance(t, Tensor) or t.dtype is not dtype or t.device != device:
                check_floating(op, name, t)
                check_alike(op, first_name, first, name, t)
            shape = t.shape
            k = len(shape) - len(dims)
            if k and (k < 0 or not lead):
                wanted = " ".join((lead, *dims) if lead else dims) or "no dimensions"
                raise ValueError(f"{op}: {name} has shape {tuple(shape)}, {len(shape)} dimensions; it needs ({wanted})")
            for d in dims:
                if d not in sizes:
                    sizes[d] = shape[k]
                elif sizes[d] != shape[k]:
                    self._disagree(op, d, name, tensors)
                k += 1

    def _disagree(self, op: str, letter: str, name: str, tensors: Any) -> None:
        """Raise, naming the two arguments in which a letter has two sizes."""
        found: dict[str, tuple[int, tuple[int, ...]]] = {}
        for (arg, _, dims), t in zip(self.inputs, tensors):
            if t is not None and letter in dims and (arg == name or not found):
                found[arg] = t.shape[t.dim() - len(dims) + dims.index(letter)], tuple(t.shape)
        first, *_, last = found
        raise ValueError(
            f"{op}: {letter} is {found[first][0]} in {first} {found[first][1]} "
            f"but {found[last][0]} in {last} {found[last][1]}; the shapes are {self.text}"
        )


def check_floating(op: str, name: str, t: Any) -> None:
    """Raise TypeError unless t is a tensor of real floating point."""
    if isinstance(t, Tensor) and t.dtype in _FLOATING and t.layout is torch.strided:
        return
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, not {type(t).__name__} ({t!r})")
    if t.dtype not in _FLOATING:
        raise TypeError(f"{op}: {name} is {t.dtype}; it must be of floating point (float64, float32, bfloat16, float16)")
    raise TypeError(f"{op}: {name} has layout {t.layout}; it must be a strided (dense) tensor")


def check_alike(op: str, first_name: str, first: Tensor, name: str, t: Tensor) -> None:
    """Raise unless t has the dtype and the device of first."""
    if t.dtype != first.dtype:
        raise TypeError(f"{op}: {name} is {t.dtype} but {first_name} is {first.dtype}; they must have one dtype")
    if t.device != first.device:
        raise ValueError(f"{op}: {name} is on {t.device} but {first_name} is on {first.device}; they must be on one device")
