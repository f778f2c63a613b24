"""How a call of attention is laid out for its kernels: samples, steps, tiles. For the launches see `attention`."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from bptoolkit import randomness
from bptoolkit.triton_kernels.kernel import WARP, precision_of, upcasts

COLUMNS = 64  # a multiple of those of a tile
FARTHEST = 1 << 22  # elements from one row to the next: inside a tile offsets are of 32 bits


class Tile(NamedTuple):
    """A launch: rows and columns of a tile, warps, loads under way."""

    BM: int
    BN: int
    warps: int
    stages: int


def tile(kernel: str, E: int, bytes: int, options: int, warp: int) -> Tile:
    """The tile of a kernel for E padded features of elements of so many bytes.

    kernel: "forward", "rows", "columns", or "mask". BM of "rows" is a multiple of those of the last two. options: `options_of`.
    """
    if bytes == 4:
        if E <= 64:
            return Tile(32, 16 if kernel == "rows" else 32, 8 if kernel == "columns" and warp == 32 else 4, 1)
        small = {"forward": Tile(32, 16, 8, 1), "rows": Tile(16, 16, 4, 2), "mask": Tile(16, 32 if warp == 32 else 16, 8, 1)}
        return small.get(kernel, Tile(16, 16, 8, 1))
    amd = warp == 64
    warps = 4 if amd else 8
    if E > 128:
        if kernel == "forward":
            return Tile(64, 32, warps, 1 if amd else 2)
        if kernel == "rows":
            return Tile(32, 16 if amd else 32, warps, 1)
        if not amd:
            return Tile(32, 64 if kernel == "mask" else 32, warps, 1)
        return Tile(16, 32, warps, 1) if kernel == "columns" else Tile(*(16, 16) if options > 2 else (32, 32), warps, 1)
    if kernel == "forward":
        return Tile(128, 32 if E > 64 or options else 64, 8, 2)
    if kernel == "rows":
        return Tile(64, 32, warps, 1 if options > 2 else 2)
    if kernel == "mask":
        return Tile(64, 64 if E <= 64 else 32, 8, 1)
    if options > 2:
        return Tile(16, 64, 4, 1) if amd else Tile(32, 64 if E <= 64 else 32, 8, 1)
    return Tile(32, 64, warps, 2 if E > 64 and options < 2 and not amd else 1)


class Batch(NamedTuple):
    """The sizes of a call: samples (b, h, g), rows and columns, features."""

    B: int
    H: int
    G: int  # heads that share one of k and v
    L: int
    S: int
    E: int
    EV: int
    C: int  # packed sequences


def batch_of(q: Tensor, k: Tensor, EV: int, cu: Tensor | None = None) -> Batch:
    lead = tuple(q.shape[:-2])
    if q.shape[:-2] == k.shape[:-2]:
        lead = (*lead, 1)
    G, H = lead[-1], lead[-2] if len(lead) > 1 else 1
    return Batch(prod(lead[:-2]), H, G, q.shape[-2], k.shape[-2], q.shape[-1], EV, 0 if cu is None else cu.shape[0] - 1)


def samples(t: Tensor, n: Batch, G: int) -> Tensor:
    """(*B, R, E) as (B, H, G, R, E), its rows dense and near each other."""
    t = t.reshape(n.B, n.H, G, *t.shape[-2:])
    return t if t.stride(-1) == 1 and t.stride(-2) <= FARTHEST else t.contiguous()


def near(t: Tensor) -> tuple[int, int, int]:
    """The steps of k or v over b, h and rows."""
    b, h, _, r, _ = t.stride()
    return b, h, r


class Mask(NamedTuple):
    """The mask, booleans as bytes, over at most three dimensions of samples; these have nothing to do with (b, h, g)."""

    m: Tensor | None
    steps: tuple[int, ...]  # over the three, rows and columns, 0 where it is broadcast; then the sizes of the last two
    sizes: tuple[int, ...]  # of the three
    own: tuple[int, ...]  # the steps over them in the mask's gradient, counted in its samples; 0 where it is shared
    batch: tuple[int, ...]  # the samples of that


def mask_of(m: Tensor | None, q: Tensor) -> Mask:
    """Its columns can be read to the end of a tile, so that loads need no mask of their own and stay wide: if S is no multiple
    of that, it is copied. It is expanded where it is broadcast over every second dimension, so that they cannot be merged into
    three.
    """
    if m is None:
        return Mask(None, (0, 0, 0, 0, 0, 1, 1), (1, 1, 1), (0, 0, 0), ())
    m = m.view(torch.uint8) if m.dtype == torch.bool else m
    if m.shape[-1] > 1 and m.shape[-1] % COLUMNS:
        m = torch.nn.functional.pad(m, (0, -m.shape[-1] % COLUMNS))
    elif max(m.stride()[-2:]) > FARTHEST:
        m = m.contiguous()
    batch, (*outer, L, S) = q.shape[:-2], m.shape
    own = [0 if size == 1 else prod(outer[d + 1 :]) for d, size in enumerate(outer)]
    dims = merged(batch, m.expand(*batch, L, S).stride(), own)
    if len(dims) > 3:
        m, outer = m.expand(*batch, L, S).contiguous(), list(batch)
        dims = [(prod(batch), m.stride(-3), 1)]
    sizes, steps, owned = zip(*[(1, 0, 0)] * (3 - len(dims)), *dims)
    inner = 0 if L == 1 else m.stride(-2), 0 if S == 1 else m.stride(-1)
    return Mask(m, (*steps, *inner, *sizes[1:]), sizes, owned, tuple(outer))


def merged(sizes: Sequence[int], *steps: Sequence[int]) -> list[tuple[int, ...]]:
    """Dimensions as few as can be, each its size and its step in each tensor: neighbours that are one in all are merged."""
    dims: list[tuple[int, ...]] = []
    for size, *step in zip(sizes, *steps):
        if size == 1:
            continue
        if dims and all(before == size * here for before, here in zip(dims[-1][1:], step)):
            size *= dims.pop()[0]
        dims.append((size, *step))
    return dims


def of_samples(t: Tensor | None, q: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A number per sample."""
    return None if t is None else t.to(dtype).expand(q.shape[:-2]).contiguous()


def shared_arguments(
    q: Tensor, n: Batch, window: Sequence[int], scale: float | None, cap: float, p: float, packed: bool
) -> tuple[Any, ...]:
    """What the kernels take between the steps and the tile. The shift of packed sequences is each one's own, or 0."""
    left, right, end = window
    shift = 0 if not end else 1 if packed else n.S - n.L
    bounds = (None if left < 0 else left, None if right < 0 else right, shift)
    scale = max(n.E, 1) ** -0.5 if scale is None else scale
    dropped = (randomness.threshold(p), 1 / (1 - p) if p < 1 else 0.0) if p else (0, 1.0)
    return n.H, n.G, n.L, n.S, n.C, *bounds, float(scale), cap or None, *dropped


def blocks(n: Batch, rows: int, B: int, packed: bool) -> int:
    """How many blocks of B there are of so many rows; as `attention_loops.blocks_of`."""
    return rows // B + n.C + 2 if packed else triton.cdiv(rows, B)


def constants(
    q: Tensor, m: Tensor | None, n: Batch, kernel: str, has: int, split: bool = True
) -> tuple[tuple[Any, ...], dict[str, Any], Tile]:
    """What the kernels take from the features on, how they are launched, and the tile. split: whether loops may be."""
    BE, BV = (max(triton.next_power_of_2(x), 16) for x in (n.E, n.EV))
    t = tile(kernel, max(BE, BV), q.element_size(), has, WARP)
    precision = precision_of(q.dtype, WARP)
    natural = m is not None and m.dtype != torch.bool
    options = {"num_warps": t.warps, "num_stages": t.stages, "enable_fp_fusion": True}
    more = tile("rows", max(BE, BV), q.element_size(), has, WARP).BM if kernel in ("columns", "mask") else split and not has
    return (n.E, n.EV, BE, BV, t.BM, t.BN, natural, more, precision, upcasts(q)), options, t


def options_of(terms: Sequence[Any], window: Sequence[int], cap: float) -> int:
    """What takes registers: 0 for nothing but causal, which leaves enough for loops of their own over the tiles that need no
    mask of places; 1 for a mask; 2 for more, 3 for dropout. terms: mask, slopes, lengths, seed."""
    if terms[3] is not None:
        return 3
    return 2 if cap or window[0] >= 0 or any(t is not None for t in terms[1:3]) else int(terms[0] is not None)
