"""Mistakes in what a backward reads: the right gradient, of a call that is not quite the one that was made.

A backward that leaves out a row of the cotangent, or saved two inputs in the wrong order, gives the gradient of another call
exactly. So the expected gradients of such calls are computed, and compared with the result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from bptoolkit.verify.picture import noun
from bptoolkit.verify.probing import Finding, tensors

TILES = (128, 64, 32, 16, 8)
ROUNDED = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SECONDS = 3.0  # a long recurrence takes its time
Variant = tuple[str, list[Tensor], list[Tensor]]


def mistaken_call(f: Finding) -> Iterator[str]:
    """The result is the expected gradient of a call with something left out, moved or exchanged."""
    if f.truth is None or f.name not in f.inputs or (f.g.numel() < 4 and f.got.dtype != torch.float64):
        return
    k, until = list(f.inputs).index(f.name), time.monotonic() + SECONDS
    for words, inputs, cotangents in variants(f):
        if time.monotonic() > until:
            return
        try:
            gradient = f.truth(inputs, cotangents)[k]
        except Exception:  # the reference may refuse the other call
            continue
        if gradient is not None and f.like(gradient):
            yield f"{f.subject} equals the expected one {words}"
            return


def variants(f: Finding) -> Iterator[Variant]:
    """Calls that a mistaken backward may have seen: what is different about each, its inputs and its cotangents."""
    inputs = [x.detach().double() for x in f.inputs.values()]
    cotangents = [c.detach().double() for c in f.cotangents]
    for words, changed in _of_cotangents(cotangents):
        yield words, inputs, changed
    for words, changed in _of_inputs(f, inputs):
        yield words, changed, cotangents


def _of_cotangents(cs: list[Tensor]) -> Iterator[tuple[str, list[Tensor]]]:
    several = len(cs) > 1
    for k, c in enumerate(cs if several else ()):
        yield f"without the cotangent of output {k}", [*cs[:k], torch.zeros_like(c), *cs[k + 1 :]]
    for j, k in combinations(range(len(cs)), 2):
        if cs[j].shape == cs[k].shape:
            swapped = list(cs)
            swapped[j], swapped[k] = cs[k], cs[j]
            yield f"with the cotangents of outputs {j} and {k} exchanged", swapped
    for k, c in enumerate(cs):
        of = f"cotangent of output {k}" if several else "cotangent"
        for words, changed in _of_tensor(f"the {of}", c):
            yield words, [*cs[:k], changed, *cs[k + 1 :]]
        if c.numel() > 1:
            yield f"for a {of} of ones: ignores it", [*cs[:k], torch.ones_like(c), *cs[k + 1 :]]
            first = c.reshape(-1)[0].expand_as(c)
            yield f"for a {of} that is its first element everywhere: taken to be constant", [*cs[:k], first, *cs[k + 1 :]]
            yield f"for a {of} that is its mean everywhere", [*cs[:k], c.mean().expand_as(c), *cs[k + 1 :]]
    if several:
        for by, dtype in ROUNDED.items():
            yield f"with its cotangents rounded to {by}", [c.to(dtype).double() for c in cs]


def _of_inputs(f: Finding, xs: list[Tensor]) -> Iterator[tuple[str, list[Tensor]]]:
    names = list(f.inputs)
    for j, k in combinations(range(len(xs)), 2):
        if xs[j].shape == xs[k].shape:
            swapped = list(xs)
            swapped[j], swapped[k] = xs[k], xs[j]
            yield f"with {names[j]} and {names[k]} exchanged: saved in the wrong order?", swapped
    for k, x in enumerate(xs):
        for j, o in enumerate(f.outputs):
            if o.shape == x.shape:
                of = "the output" if len(f.outputs) == 1 else f"output {j}"
                yield f"with {of} in the place of {names[k]}", [*xs[:k], o.detach().double(), *xs[k + 1 :]]
        if x.numel() > 1:
            yield f"with ones in the place of {names[k]}: {names[k]} is left out", [*xs[:k], torch.ones_like(x), *xs[k + 1 :]]
        for words, changed in _of_tensor(names[k], x):
            yield words, [*xs[:k], changed, *xs[k + 1 :]]
        yield f"with {names[k]} negative", [*xs[:k], -x, *xs[k + 1 :]]


def _of_tensor(name: str, t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One tensor with a part of it left out, moved, or rounded."""
    for d, n in enumerate(t.shape):
        if n < 2:
            continue
        part, keep = noun(t.dim(), d), _keeping(t, d)
        parts = part.replace("slice", "slices") if part.startswith("slice") else f"{part}s"
        for tile in TILES:
            rest = n % tile
            if tile < n and rest:
                yield f"without the {parts} of {name} beyond the last whole block of {tile}", keep(0, n - rest)
                yield f"with only the {parts} of {name} beyond the last whole block of {tile}", keep(n - rest, n)
            if tile < n:
                yield f"with only the first {tile} {parts} of {name}", keep(0, tile)
                yield f"with only the last {tile} {parts} of {name}", keep(n - tile, n)
        yield f"without the last {part} of {name}", keep(0, n - 1)
        yield f"without the first {part} of {name}", keep(1, n)
        if n > 2:
            yield f"with only the first {part} of {name}", keep(0, 1)
            yield f"with only the last {part} of {name}", keep(n - 1, n)
        yield f"with the first {part} of {name} in the place of all", t.narrow(d, 0, 1).expand_as(t)
        for by in (1, -1):
            rolled = t.roll(by, d)
            ends = rolled.clone()
            ends.select(d, 0 if by > 0 else n - 1).zero_()
            words = f"with {name} shifted by {by:+d} along dimension {d}: an index or time step off by one?"
            yield words, rolled
            yield words, ends
        if n > 2:
            yield f"with {name} in reverse order along dimension {d}", t.flip(d)
    if t.dim() > 1:
        yield f"with {name} transposed", t.mT.reshape(t.shape)
    for short, dtype in ROUNDED.items():
        yield f"with {name} rounded to {short}", t.to(dtype).double()


def _keeping(t: Tensor, d: int) -> Callable[[int, int], Tensor]:
    """A copy that is zero outside a range of indices along a dimension."""

    def keep(first: int, end: int) -> Tensor:
        kept = torch.zeros_like(t)
        kept.narrow(d, first, end - first).copy_(t.narrow(d, first, end - first))
        return kept

    return keep


def products(f: Finding) -> Iterator[tuple[str, Tensor]]:
    """Matrix products of two tensors of the call that have the shape of the result."""
    found: list[tuple[str, Tensor]] = []
    for name, t in tensors(f):
        if t.dim() == 2 and 1 < t.numel() <= 1 << 15:
            found += [(name, t), (f"{name} transposed", t.mT)]
    for a, left in found:
        for b, right in found:
            if left.shape[1] == right.shape[0] and (left.shape[0], right.shape[1]) == tuple(f.w.shape):
                yield f"{a} @ {b}", left @ right


def sizes_that_matter(f: Finding) -> Iterator[str]:
    """What the sizes at which it fails say by themselves."""
    sizes: dict[str, Any] = dict(f.point.sizes)
    for axis in f.matters:
        letter = axis.removeprefix("sizes:")
        n = str(sizes.get(letter, ""))
        if letter == "case" or not n.isdigit():
            continue
        if int(n) == 0:
            yield f"wrong when {letter} is 0: what is left of a sum or a buffer without elements?"
        elif int(n) == 1:
            yield f"wrong when {letter} is 1, a dimension of size one that is squeezed or broadcast?"
        elif int(n) > 8:
            tile = max(t for t in TILES if t <= int(n))
            yield f"right while {letter} is small, wrong at {letter} = {n}: past a block of {tile}?"
