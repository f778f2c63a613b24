"""Attention by tiles: the loops behind `bptoolkit.ops.attention`, with memory linear in the length.

The L × S matrices of the maths (P, dS, U, W ...) exist one tile at a time: some samples of the batch, rows I, columns J. A tile
is recomputed from q, k and two numbers per row, so nothing of that size is kept between the passes.

Letters as in `bptoolkit.ops.attention`. A row's probabilities are P = exp(S − t)/l with t its largest score and
l = Σ exp(S − t). They are kept as lse = t + log l and l, not as lse alone: a mask of −1e38 in a whole row would swallow log l,
and P would be too large by l, as happens in other kernels. A row that is masked out wholly has lse = 0 and l = 1, hence P = 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def wide(dtype: torch.dtype) -> torch.dtype:
    """What the scores are computed in: float32 for half inputs."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def tile_size(L: int, S: int, causal: bool, device: str) -> tuple[int, int]:
    """Rows and columns of a tile. It depends on the lengths alone: every pass has to draw the same dropout mask."""
    if device != "cpu":
        return min(L, 1024), min(S, 2048)
    return min(L, 128), min(S, 128 if causal else 512)


def tile_samples(rows: int, columns: int, device: str) -> int:
    """How many samples make a tile that fits the cache (on a GPU: that fills it)."""
    return max(1, (1 << 17 if device == "cpu" else 1 << 25) // max(rows * columns, 1))


def to_mask(t: Tensor, m: Tensor) -> Tensor:
    """Sum over the dimensions that m was broadcast over."""
    over = [d for d in range(t.dim()) if m.shape[d] == 1 and t.shape[d] != 1]
    return t.sum(over, keepdim=True) if over else t


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
    """S = σ Q Kᵀ + M, tile by tile, in buffers that are allocated once."""

    def __init__(
        self, q: Tensor, k: Tensor, m: Tensor | None, seed: Tensor | None, causal: bool, scale: float | None, p: float
    ) -> None:
        self.batch, (self.L, E), self.S = tuple(q.shape[:-2]), q.shape[-2:], k.shape[-2]
        self.N, self.dtype, self.device = math.prod(self.batch), wide(q.dtype), q.device
        self.q, self.k, self.causal, self.p = self.flat(q), self.flat(k), causal, p
        self.scale = scale if scale is not None else max(E, 1) ** -0.5
        # exp2 is over twice as fast as exp; but in its unit an additive mask of float32's lowest number would overflow
        self.unit = 1 / math.log(2) if m is None or m.dtype == torch.bool else 1.0
        self.over = self.batch  # the batch dimensions that m has
        if m is None or m.shape[:-2].numel() == 1:
            self.over, m = (self.N,), None if m is None else m.reshape(1, *m.shape[-2:])
        self.m = m
        self.rows, self.columns = tile_size(self.L, self.S, causal, self.device.type)
        self.samples = tile_samples(self.rows, self.columns, self.device.type)
        self.seeds = None if seed is None else _seeds(seed, self.N)
        self.generator = None if seed is None else torch.Generator(self.device)
        self.buffers: dict[str, Tensor] = {}
        self.triangles: dict[tuple[int, int, int], Tensor] = {}

    def flat(self, t: Tensor) -> Tensor:
        """(*B, a, b) -> (N, a, b), in the dtype of the scores."""
        return t.reshape(self.N, *t.shape[-2:]).to(self.dtype)

    def column(self, t: Tensor) -> Tensor:
        """(*B, L) -> (N, L, 1)."""
        return t.reshape(self.N, self.L, 1).to(self.dtype)

    def top(self, lse: Tensor, l: Tensor) -> Tensor:
        """(*B, L), (*B, L) -> the largest score of every row in `unit`s, (N, L, 1)."""
        return (self.column(lse) - self.column(l).log()).mul_(self.unit)

    def zeros(self, rows: int, columns: int) -> Tensor:
        """(N, rows, columns), to add up in."""
        return torch.zeros(self.N, rows, columns, dtype=self.dtype, device=self.device)

    def back(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """(N, a, b) -> (*B, a, b)."""
        return t.reshape(*self.batch, *t.shape[1:]).to(dtype)

    def bands(self) -> Iterator[list[Tile]]:
        """For some samples and rows at a time, the tiles of the columns they may see."""
        if not self.N or not self.L:
            return
        for n, at, batch in _pieces(self.over, self.samples):
            for i in range(0, self.L, self.rows):
                I = slice(i, min(i + self.rows, self.L))
                seen = min(I.stop, self.S) if self.causal else self.S
                yield [
                    Tile(n, at, batch, I, slice(j, min(j + self.columns, self.S))) for j in range(0, seen, self.columns or 1)
                ]

    def __iter__(self) -> Iterator[Tile]:
        return (tile for band in self.bands() for tile in band)

    def buffer(self, name: str, tile: Tile) -> Tensor:
        """Room for a tile; its old content is gone."""
        if name not in self.buffers:
            size = min(self.samples, self.N) * self.rows * self.columns
            self.buffers[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return self.buffers[name][: math.prod(tile.shape)].view(tile.shape)

    def scores(self, tile: Tile, minus: Tensor | None = None) -> Tensor:
        """S of a tile in `unit`s, less a column of row terms; −inf where it is masked."""
        n, I, J = tile.n, tile.I, tile.J
        s, alpha = self.buffer("s", tile), self.scale * self.unit
        if minus is None:
            torch.baddbmm(s, self.q[n, I], self.k[n, J].mT, beta=0, alpha=alpha, out=s)
        else:
            torch.baddbmm(minus[n, I], self.q[n, I], self.k[n, J].mT, beta=-1, alpha=alpha, out=s)
        if self.causal and J.stop - 1 > I.start:
            s += self.triangle(tile)
        if self.m is not None:
            m = self.part(self.m, tile)
            if m.dtype == torch.bool:
                m = torch.zeros(m.shape, dtype=self.dtype, device=self.device).masked_fill_(~m, -math.inf)
            s.view(*tile.batch, *s.shape[1:]).add_(m)
        return s

    def exp(self, s: Tensor) -> Tensor:
        """The exponential of scores in `unit`s, in place."""
        return s.exp_() if self.unit == 1 else s.exp2_()

    def triangle(self, tile: Tile) -> Tensor:
        """What a causal mask adds: −inf where column j lies right of row i."""
        key = (tile.shape[1], tile.shape[2], 1 + tile.I.start - tile.J.start)
        if key not in self.triangles:
            hidden = torch.full(key[:2], -math.inf, dtype=self.dtype, device=self.device)
            self.triangles[key] = hidden.triu_(key[2])
        return self.triangles[key]

    def keep(self, tile: Tile) -> Tensor | None:
        """The dropout factor Z of a tile, 0 or 1/(1 − p): the same in every pass. None without dropout."""
        if self.seeds is None:
            return None
        z = self.buffer("z", tile)
        where = tile.I.start // self.rows << 32 | tile.J.start // self.columns
        for row, seed in zip(z, self.seeds[tile.n]):
            self.generator.manual_seed(_mix(seed + where))  # type: ignore[union-attr]
            row.bernoulli_(1 - self.p, generator=self.generator)
        return z.mul_(1 / (1 - self.p) if self.p < 1 else 0.0)

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


def _seeds(seed: Tensor, N: int) -> list[int]:
    """One seed per sample of the flattened batch; `seed` has the leading dimensions that vmap added."""
    firsts = seed.reshape(-1).tolist()
    each = N // max(len(firsts), 1)
    return [_mix(_mix(first) + n) for first in firsts for n in range(each)]


def _mix(x: int) -> int:
    """The finalizer of splitmix64 (Steele, Lea & Flood 2014): neighbouring numbers become unrelated ones."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return (x ^ (x >> 31)) >> 1


def forward(q, k, v, m, seed, causal, scale, p):
    """O, lse and l, with the running maximum of Milakov & Gimelshein 2018."""
    t = Tiles(q, k, m, seed, causal, scale, p)
    v, o = t.flat(v), t.zeros(t.L, v.shape[-1])
    top, l = t.zeros(t.L, 1), t.zeros(t.L, 1).add_(1)
    lowest = torch.finfo(t.dtype).min
    for band in t.bands():
        for c, tile in enumerate(band):
            n, I, J = tile.n, tile.I, tile.J
            s = t.scores(tile)
            t1 = s.amax(-1, keepdim=True)
            if m is not None:
                t1.clamp_min_(lowest)  # all masked: exp(−inf − lowest) is 0, exp(−inf + inf) is not
            if c:
                t1 = torch.maximum(t0, t1)  # noqa: F821
            l1 = t.exp(s.sub_(t1)).sum(-1, keepdim=True)
            z = t.keep(tile)
            if z is not None:
                s *= z
            if c:
                shrink = t.exp(t0 - t1)  # noqa: F821
                l1.add_(shrink.mul(l0))  # noqa: F821
                o[n, I].mul_(shrink)
            o[n, I].baddbmm_(s, v[n, J])
            t0, l0 = t1, l1
        if band:
            if m is not None:
                nothing = l0 == 0
                l0.masked_fill_(nothing, 1)
                t0.masked_fill_(nothing, 0)
            o[n, I].div_(l0)
            top[n, I], l[n, I] = t0, l0
    lse = top.div_(t.unit).add_(l.log())
    return t.back(o, q.dtype), t.back(lse, t.dtype).squeeze(-1), t.back(l, t.dtype).squeeze(-1)


def backward(do, dlse, q, k, v, m, seed, o, lse, l, causal, scale, p, need):
    """dQ, dK, dV, dM: those that `need` names, else None."""
    t = Tiles(q, k, m, seed, causal, scale, p)
    r = t.column(l).reciprocal()
    top, do = t.top(lse, l), t.flat(do) * r  # P = exp(S − top) r: r is put into do and D, not into P
    dq = t.zeros(t.L, q.shape[-1]) if "q" in need else None
    dk = t.zeros(t.S, k.shape[-1]) if "k" in need else None
    dv = t.zeros(t.S, do.shape[-1]) if "v" in need else None
    dm = t.mask_zeros() if "m" in need else None
    scores = "q" in need or "k" in need or "m" in need
    if scores:
        v, D = t.flat(v), (do * t.flat(o)).sum(-1, keepdim=True)
        if dlse is not None:
            D -= t.column(dlse) * r
    for tile in t:
        n, I, J = tile.n, tile.I, tile.J
        e, z = t.exp(t.scores(tile, minus=top)), t.keep(tile)
        if dv is not None:
            dv[n, J].baddbmm_((e if z is None else torch.mul(e, z, out=t.buffer("x", tile))).mT, do[n, I])
        if not scores:
            continue
        if z is None:
            ds = torch.baddbmm(D[n, I], do[n, I], v[n, J].mT, beta=-1, out=t.buffer("x", tile)).mul_(e)
        else:
            ds = torch.bmm(do[n, I], v[n, J].mT, out=t.buffer("x", tile)).mul_(z).sub_(D[n, I]).mul_(e)
        if dq is not None:
            dq[n, I].baddbmm_(ds, t.k[n, J], alpha=t.scale)
        if dk is not None:
            dk[n, J].baddbmm_(ds.mT, t.q[n, I], alpha=t.scale)
        if dm is not None:
            t.add_to_mask(dm, tile, ds)
    return (
        None if dq is None else t.back(dq, q.dtype),
        None if dk is None else t.back(dk, k.dtype),
        None if dv is None else t.back(dv, q.dtype),
        None if dm is None else dm.reshape(m.shape).to(m.dtype),
    )


def double_backward(a, b, c, e, do, dlse, q, k, v, m, seed, o, lse, l, causal, scale, p, need):
    """The vjp of backward at the cotangents a, b, c, e of dQ, dK, dV, dM; each may be None.

    Returns the gradients of do, dlse, q, k, v, m: those that `need` names ("o" is do, "l" is dlse), else None. The dependence
    of o, lse and l on q, k, v and m is inside the formulas. Two sweeps: the rows' statistics u and w, then the tiles.
    """
    t = Tiles(q, k, m, seed, causal, scale, p)
    r, top = t.column(l).reciprocal(), t.top(lse, l)
    do_, dlse = t.flat(do), None if dlse is None else t.column(dlse)
    a = None if a is None else t.flat(a) * t.scale
    b = None if b is None else t.flat(b) * t.scale
    c = None if c is None else t.flat(c)
    e = None if e is None else e.to(t.dtype).reshape(t.m.shape)
    has_u = a is not None or b is not None or e is not None
    if v is not None:
        v, o = t.flat(v), t.flat(o)
        D = (do_ * o).sum(-1, keepdim=True)
        if dlse is not None:
            D -= dlse
    u, w = t.zeros(t.L, 1), t.zeros(t.L, 1)
    gdo = t.zeros(t.L, do.shape[-1]) if "o" in need else None
    gq = t.zeros(t.L, q.shape[-1]) if "q" in need else None
    gk = t.zeros(t.S, k.shape[-1]) if "k" in need else None
    gv = t.zeros(t.S, do.shape[-1]) if "v" in need else None
    gm = t.mask_zeros() if "m" in need else None
    scores = "q" in need or "k" in need or "m" in need

    def drop(x: Tensor, z: Tensor | None) -> Tensor:
        return x if z is None else x.mul_(z)

    def P(tile: Tile) -> Tensor:
        return t.exp(t.scores(tile, minus=top)).mul_(r[tile.n, tile.I])

    def U(tile: Tile) -> Tensor:
        n, I, J = tile.n, tile.I, tile.J
        out = t.buffer("u", tile)
        if a is not None:
            torch.bmm(a[n, I], t.k[n, J].mT, out=out)
        if b is not None:
            torch.baddbmm(out, t.q[n, I], b[n, J].mT, beta=0 if a is None else 1, out=out)
        if e is not None:
            out = out.zero_() if a is None and b is None else out
            out.view(*tile.batch, *out.shape[1:]).add_(t.part(e, tile))
        return out

    def X(tile: Tile, z: Tensor | None) -> Tensor:
        n, I, J = tile.n, tile.I, tile.J
        return drop(torch.bmm(do_[n, I], v[n, J].mT, out=t.buffer("x", tile)), z).sub_(D[n, I])

    def C(tile: Tile, z: Tensor | None) -> Tensor:
        return drop(torch.bmm(do_[tile.n, tile.I], c[tile.n, tile.J].mT, out=t.buffer("c", tile)), z)

    for tile in t:  # u = rowsum(P∘U), w = rowsum(P∘(U∘X + Z∘C)), g_do = (P∘U∘Z) V + (P∘Z) c − u O
        n, I, J = tile.n, tile.I, tile.J
        p_, z = P(tile), t.keep(tile)
        if has_u:
            u_ = U(tile)
            u[n, I] += torch.mul(p_, u_, out=t.buffer("t", tile)).sum(-1, keepdim=True)
        if scores:
            h = X(tile, z).mul_(u_) if has_u else None
            if c is not None:
                h = C(tile, z) if h is None else h.add_(C(tile, z))
            w[n, I] += h.mul_(p_).sum(-1, keepdim=True)
        if gdo is not None:
            drop(p_, z)
            if c is not None:
                gdo[n, I].baddbmm_(p_, c[n, J])
            if has_u:
                gdo[n, I].baddbmm_(p_.mul_(u_), v[n, J])
    if gdo is not None and has_u:
        gdo -= u * o
    if dlse is not None:
        w -= u * dlse
    for tile in t if scores or (gv is not None and has_u) else ():
        n, I, J = tile.n, tile.I, tile.J
        p_, z = P(tile), t.keep(tile)
        if has_u:
            u_ = U(tile).sub_(u[n, I])
        if scores:  # W = P∘((U − u)∘X + Z∘C − (w − u dlse)), dS = P∘X
            W = t.buffer("t", tile)
            if has_u:
                x = X(tile, z)
                torch.mul(x, u_, out=W).sub_(w[n, I])
                ds = x.mul_(p_)
            else:
                W.copy_(w[n, I].neg().expand(tile.shape))
            if c is not None:
                W += C(tile, z)
            W *= p_
            if gq is not None:
                gq[n, I].baddbmm_(W, t.k[n, J], alpha=t.scale)
                if b is not None:
                    gq[n, I].baddbmm_(ds, b[n, J])
            if gk is not None:
                gk[n, J].baddbmm_(W.mT, t.q[n, I], alpha=t.scale)
                if a is not None:
                    gk[n, J].baddbmm_(ds.mT, a[n, I])
            if gm is not None:
                t.add_to_mask(gm, tile, W)
        if gv is not None and has_u:
            gv[n, J].baddbmm_(drop(p_.mul_(u_), z).mT, do_[n, I])
    return (
        None if gdo is None else t.back(gdo, do.dtype),
        t.back(u, t.dtype).squeeze(-1) if "l" in need else None,
        None if gq is None else t.back(gq, q.dtype),
        None if gk is None else t.back(gk, k.dtype),
        None if gv is None else t.back(gv, do.dtype),
        None if gm is None else gm.reshape(m.shape).to(m.dtype),
    )


def keep(q, k, seed, causal, p):
    """The whole dropout factor Z, put together from its tiles."""
    t = Tiles(q, k, None, seed, causal, None, p)
    whole = t.zeros(t.L, t.S)
    for tile in t:
        whole[tile.n, tile.I, tile.J] = t.keep(tile)
    return t.back(whole, t.dtype)
