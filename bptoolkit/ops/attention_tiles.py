"""The tiles of attention: which there are, their scores, their dropout masks, and sums over them.

Letters as in `bptoolkit.ops.attention`. A tile is some samples of the flattened batch, rows I and columns J of an L × S matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from bptoolkit import randomness


def wide(dtype: torch.dtype) -> torch.dtype:
    """What the scores are computed in: float32 for half inputs."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def tile_size(L: int, S: int, N: int, device: str, sides: tuple[int, int] = (256, 256)) -> tuple[int, int]:
    """Rows and columns of a tile; more rows where N samples are few, so that the threads have something to do."""
    rows, columns = sides if device == "cpu" else (1024, 2048)
    while device == "cpu" and 0 < N * rows * columns < 1 << 18:
        rows *= 2
    return min(L, rows), min(S, columns)


def tile_samples(rows: int, columns: int, device: str) -> int:
    """How many samples make a tile that fits the cache (on a GPU: that fills it)."""
    return max(1, (1 << 20 if device == "cpu" else 1 << 25) // max(rows * columns, 1))


def to_mask(t: Tensor, m: Tensor) -> Tensor:
    """Sum over the dimensions that m was broadcast over."""
    over = [d for d in range(t.dim()) if m.shape[d] == 1 and t.shape[d] != 1]
    return t.sum(over, keepdim=True) if over else t


EVERYWHERE = (-1, -1, 0)  # a window without bounds
CAUSAL = (-1, 0, 0)


class Terms(NamedTuple):
    """What the scores depend on beside q and k, and what is done to P."""

    m: Tensor | None = None  # the mask, of as many dimensions as the scores
    slopes: Tensor | None = None  # of ALiBi, of as many dimensions as the batch
    lengths: Tensor | None = None  # of the keys, likewise
    seed: Tensor | None = None  # of the dropout: (2,) int32, with the dimensions in front that vmap added
    window: Sequence[int] = EVERYWHERE  # left and right bound, −1 for none; 1 if the last row stands at the last column, else 0
    scale: float | None = None
    cap: float = 0.0  # of the scores; 0 for none
    p: float = 0.0
    place: tuple[int, int, int] | None = None  # of a packed sequence: rows of all sequences, its first row and column


class Tile(NamedTuple):
    """Where a tile lies."""

    n: slice  # samples, of the flattened batch
    at: tuple[slice, ...]  # the same samples, in the mask's batch dimensions
    batch: tuple[int, ...]  # their number in each
    I: slice  # rows
    J: slice  # columns

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.n.stop - self.n.start, self.I.stop - self.I.start, self.J.stop - self.J.start


class Tiles:
    """S = c tanh(σ Q Kᵀ / c) + M − h|distance|, tile by tile, in buffers that are allocated once."""

    def __init__(self, q: Tensor, k: Tensor, terms: Terms, sides: tuple[int, int] = (512, 256)) -> None:
        m, slopes, lengths, self.seed, self.window, scale, self.cap, self.p, place = terms
        self.batch, (self.L, E), self.S = tuple(q.shape[:-2]), q.shape[-2:], k.shape[-2]
        self.N, self.dtype, self.device = math.prod(self.batch), wide(q.dtype), q.device
        self.q, self.k = self.flat(q), self.flat(k)
        self.scale = scale if scale is not None else max(E, 1) ** -0.5
        left, right, end = self.window
        self.shift = self.S - self.L if end else 0  # row i stands at column i + shift
        self.slopes = None if slopes is None else self.sample(slopes).to(self.dtype)
        self.lengths = None if lengths is None else self.sample(lengths)
        self.stops = None if self.lengths is None else self.lengths.flatten().tolist()
        # whether a row may see nothing, in all or in the first of its tiles
        self.blind = m is not None or lengths is not None or left >= 0 or (right >= 0 and self.shift < 0) or not self.S
        # exp2 is over twice as fast as exp; but in its unit an additive mask of float32's lowest number would overflow
        self.unit = 1 / math.log(2) if m is None or m.dtype == torch.bool else 1.0
        self.over = self.batch  # the batch dimensions that m has
        if m is None or m.shape[:-2].numel() == 1:
            self.over, m = (self.N,), None if m is None else m.reshape(1, *m.shape[-2:])
        self.m = m
        bounded = left >= 0 or right >= 0
        size = self.N, self.device.type, (256, 256) if bounded else sides
        self.rows, self.columns = tile_size(self.L, self.S, *size)
        self.samples = tile_samples(self.rows, self.columns, self.device.type)
        self.place = (self.L, 0, 0) if place is None else place
        self.keys: tuple[tuple[int, int], Tensor] | None = None  # of the rows of the last band
        self.buffers: dict[str, Tensor] = {}
        self.integers: dict[str, Tensor] = {}  # of `keep`
        self.edges: dict[tuple[int, int, int], Tensor] = {}
        self.steps: dict[tuple[int, int], Tensor] = {}

    def flat(self, t: Tensor) -> Tensor:
        """(*B, a, b) -> (N, a, b), in the dtype of the scores."""
        return t.reshape(self.N, *t.shape[-2:]).to(self.dtype)

    def column(self, t: Tensor) -> Tensor:
        """(*B, L) -> (N, L, 1)."""
        return t.reshape(self.N, self.L, 1).to(self.dtype)

    def sample(self, t: Tensor) -> Tensor:
        """A number per sample, broadcast over the batch: (N, 1, 1)."""
        return t.expand(self.batch).reshape(self.N, 1, 1)

    def zeros(self, rows: int, columns: int) -> Tensor:
        """(N, rows, columns), to add up in."""
        return torch.zeros(self.N, rows, columns, dtype=self.dtype, device=self.device)

    def back(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """(N, a, b) -> (*B, a, b)."""
        return t.reshape(*self.batch, *t.shape[1:]).to(dtype)

    def sums(self, rows: int, columns: int) -> Sums:
        """(N, rows, columns), to add products up in."""
        return Sums(self, rows, columns)

    def bands(self) -> Iterator[list[Tile]]:
        """For some samples and rows at a time, the tiles of the columns they may see."""
        if not self.N or not self.L:
            return
        for n, at, batch in _pieces(self.over, self.samples):
            end = self.S if self.stops is None else min(self.S, max(self.stops[n]))
            for i in range(0, self.L, self.rows):
                I = slice(i, min(i + self.rows, self.L))
                first, last = self.seen(I)
                columns = range(first - first % max(self.columns, 1), min(last, end), self.columns or 1)
                yield [Tile(n, at, batch, I, slice(j, min(j + self.columns, self.S))) for j in columns]

    def seen(self, I: slice) -> tuple[int, int]:
        """The columns that some row of I may see by its place: from the first up to the last, exclusive."""
        left, right, _ = self.window
        first = I.start + self.shift - left if left >= 0 else 0
        last = I.stop + self.shift + right if right >= 0 else self.S
        return max(first, 0), min(last, self.S)

    def __iter__(self) -> Iterator[Tile]:
        return (tile for band in self.bands() for tile in band)

    def buffer(self, name: str, tile: Tile) -> Tensor:
        """Room for a tile; its old content is gone."""
        if name not in self.buffers:
            size = min(self.samples, self.N) * self.rows * self.columns
            self.buffers[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return self.buffers[name][: math.prod(tile.shape)].view(tile.shape)

    def scores(self, tile: Tile, minus: Tensor | None = None, bent: bool = False) -> Tensor:
        """S of a tile in `unit`s, less a column of row terms; −inf where it is masked. `bent`: keep the tanh for `bend`."""
        n, I, J = tile.n, tile.I, tile.J
        s = self.buffer("s", tile)
        if self.cap:
            torch.baddbmm(s, self.q[n, I], self.k[n, J].mT, beta=0, alpha=self.scale / self.cap, out=s).tanh_()
            if bent:
                self.buffer("tanh", tile).copy_(s)
            s.mul_(self.cap * self.unit)
            if minus is not None:
                s.sub_(minus[n, I])
        elif minus is None:
            torch.baddbmm(s, self.q[n, I], self.k[n, J].mT, beta=0, alpha=self.scale * self.unit, out=s)
        else:
            torch.baddbmm(minus[n, I], self.q[n, I], self.k[n, J].mT, beta=-1, alpha=self.scale * self.unit, out=s)
        if self.slopes is not None:
            s.addcmul_(self.slopes[n], self.distance(tile), value=-self.unit)
        left, right, _ = self.window
        if 0 <= right < J.stop - 1 - I.start - self.shift or 0 <= left < I.stop - 1 + self.shift - J.start:
            s += self.edge(tile)
        if self.lengths is not None and self.stops is not None and min(self.stops[n]) < J.stop:
            s.masked_fill_(torch.arange(J.start, J.stop, device=self.device) >= self.lengths[n], -math.inf)
        if self.m is not None:
            m = self.part(self.m, tile)
            if m.dtype == torch.bool:
                m = torch.zeros(m.shape, dtype=self.dtype, device=self.device).masked_fill_(~m, -math.inf)
            s.view(*tile.batch, *s.shape[1:]).add_(m)
        return s

    def bend(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """tanh(σ Q Kᵀ / c), kept by `scores`, and 1 less its square: the derivative of S by σ Q Kᵀ."""
        t = self.buffer("tanh", tile)
        return t, torch.mul(t, t, out=self.buffer("bend", tile)).neg_().add_(1)

    def distance(self, tile: Tile) -> Tensor:
        """|i + shift − j| of a tile."""
        shape = tile.shape[1:]
        if shape not in self.steps:
            rows, columns = (torch.arange(n, dtype=self.dtype, device=self.device) for n in shape)
            self.steps[shape] = rows.unsqueeze(-1) - columns
        return (self.steps[shape] + (tile.I.start + self.shift - tile.J.start)).abs_()

    def add_to_slopes(self, dslopes: Tensor, tile: Tile, ds: Tensor) -> None:
        """Add what a tile of a gradient of S gives to the slopes, (N,)."""
        dslopes[tile.n] -= ds.flatten(1) @ self.distance(tile).flatten()

    def exp(self, s: Tensor) -> Tensor:
        """The exponential of scores in `unit`s, in place."""
        return s.exp_() if self.unit == 1 else s.exp2_()

    def edge(self, tile: Tile) -> Tensor:
        """What a window adds: −inf where column j lies right or left of what row i may see."""
        (left, right, _), (_, rows, columns) = self.window, tile.shape
        key = rows, columns, tile.I.start + self.shift - tile.J.start
        if key not in self.edges:
            hidden = torch.full(key[:2], -math.inf, dtype=self.dtype, device=self.device)
            edge = hidden.triu(key[2] + right + 1) if right >= 0 else torch.zeros_like(hidden)
            self.edges[key] = edge.add_(hidden.tril_(key[2] - left - 1)) if left >= 0 else edge
        return self.edges[key]

    def keep(self, tile: Tile) -> Tensor | None:
        """The dropout factor Z of a tile, 0 or 1/(1 − p): a function of the seed and the place alone. None without dropout."""
        if self.seed is None:
            return None
        z, first = self.buffer("z", tile), self.place[2]
        columns = torch.arange(first + tile.J.start, first + tile.J.stop, dtype=torch.int32, device=self.device)
        keys = self.row_keys(tile)
        step = max(1, randomness.BLOCK // max(z[:1].numel(), 1)) if self.device.type == "cpu" else len(z)
        for n in range(0, len(z), max(step, 1)):
            h = randomness.hashed_rows(keys[n : n + step], columns, self.integers)
            torch.lt(h, randomness.threshold(self.p), out=z[n : n + step])
        return z.mul_(1 / (1 - self.p) if self.p < 1 else 0.0)

    def row_keys(self, tile: Tile) -> Tensor:
        """A key per row of a tile: the hash of the row's number among those of the call, (samples, rows, 1) of int32."""
        assert self.seed is not None
        n, I = tile.n, tile.I
        if self.keys is None or self.keys[0] != (n.start, I.start):
            all_rows, first, _ = self.place
            seeds = self.seed.reshape(-1, 2)
            each = self.N // len(seeds)  # samples of one call; vmap has put calls side by side
            sample = torch.arange(n.start, n.stop, device=self.device)[:, None]
            row = torch.arange(first + I.start, first + I.stop, device=self.device)
            h = randomness.hashed(sample % each * all_rows + row, seeds[sample // each])
            self.keys = (n.start, I.start), h.unsqueeze(-1)
        return self.keys[1]

    def part(self, m: Tensor, tile: Tile) -> Tensor:
        """What of m, or of its gradient, meets a tile."""
        return m[tuple(slice(None) if size == 1 else s for size, s in zip(m.shape, (*tile.at, tile.I, tile.J)))]

    def add_to_mask(self, dm: Tensor, tile: Tile, ds: Tensor) -> None:
        """Add a tile of a gradient of S to the gradient of M, summed over what M was broadcast over."""
        part = self.part(dm, tile)
        part.add_(to_mask(ds.view(*tile.batch, *ds.shape[1:]), part))

    def mask_zeros(self) -> Tensor:
        """Room for the gradient of M."""
        assert self.m is not None
        return torch.zeros(self.m.shape, dtype=self.dtype, device=self.device)


class Sums:
    """Sums of products over tiles: (N, rows, columns), each block of rows in memory of its own.

    A slice of the whole would not be contiguous, and torch's bmm goes through the samples one by one to write into such.
    """

    def __init__(self, tiles: Tiles, rows: int, columns: int) -> None:
        self.tiles, self.shape = tiles, (tiles.N, rows, columns)
        self.blocks: dict[tuple[int, int], tuple[slice, slice, Tensor]] = {}
        self.all: Tensor | None = None  # where all rows are one block

    def add(self, n: slice, rows: slice, a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
        """Add alpha a b to the block of some samples and rows; returns the block."""
        found = self.blocks.get((n.start, rows.start))
        if found is not None:
            return found[2].baddbmm_(a, b, alpha=alpha)
        block = self._new(n, rows)
        self.blocks[n.start, rows.start] = n, rows, block
        return torch.baddbmm(block, a, b, beta=0, alpha=alpha, out=block)

    def _new(self, n: slice, rows: slice) -> Tensor:
        shape, dtype, device = (n.stop - n.start, rows.stop - rows.start, self.shape[2]), self.tiles.dtype, self.tiles.device
        if shape[1] < self.shape[1]:
            return torch.empty(shape, dtype=dtype, device=device)
        if self.all is None:
            # with all rows in one block, some samples may have no tile at all
            new = torch.zeros if self.tiles.blind else torch.empty
            self.all = new(self.shape, dtype=dtype, device=device)
        return self.all[n]

    def whole(self, dtype: torch.dtype) -> Tensor:
        """All of it: (*B, rows, columns)."""
        out = self.all
        if out is None:
            out = torch.zeros(self.shape, dtype=dtype, device=self.tiles.device)
            for n, rows, block in self.blocks.values():
                out[n, rows] = block
        return out.view(*self.tiles.batch, *self.shape[1:]).to(dtype)


def _pieces(batch: Sequence[int], most: int) -> Iterator[tuple[slice, tuple[slice, ...], tuple[int, ...]]]:
    """Rectangular pieces of the batch dimensions that are contiguous when flattened, of at most `most` samples each."""
    d, inner = len(batch), 1
    while d and inner * batch[d - 1] <= most:
        d -= 1
        inner *= batch[d]
    whole = tuple(slice(0, b) for b in batch[d:])
    if not d:
        yield slice(0, inner), whole, tuple(batch)
        return
    *outer, length = batch[:d]
    step = max(1, most // inner)
    for k, index in enumerate(product(*map(range, outer))):
        for start in range(0, length, step):
            stop = min(start + step, length)
            at = (*(slice(x, x + 1) for x in index), slice(start, stop), *whole)
            first = (k * length + start) * inner
            yield slice(first, first + (stop - start) * inner), at, tuple(s.stop - s.start for s in at)
