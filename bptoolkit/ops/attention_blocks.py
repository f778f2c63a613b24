"""Attention by tiles: the loops behind `bptoolkit.ops.attention`, with memory linear in the length.

The L × S matrices of the maths (P, dS, U, W ...) exist one tile at a time: some samples of the batch, rows I, columns J. A tile
is recomputed from q, k and two numbers per row, so nothing of that size is kept between the passes.

Letters as in `bptoolkit.ops.attention`. A row's probabilities are P = exp(S − T)/l with T its largest score and
l = Σ exp(S − T). T and l are kept, and not lse = T + log l alone: P would be less exact, and wrong where an additive mask of
−1e38 in a whole row swallows log l. A row that is masked out wholly has T = 0 and l = 1, hence P = 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bptoolkit.ops.attention_tiles import Terms, Tile, Tiles, to_mask


def forward(q, k, v, terms):
    """O, lse, T and l, with the running maximum of Milakov & Gimelshein 2018."""
    t = Tiles(q, k, terms, (512, 512))
    v, o = t.flat(v), t.sums(t.L, v.shape[-1])
    top, l = t.zeros(t.L, 1), t.zeros(t.L, 1).add_(1)
    lse = t.zeros(t.L, 1).sub_(math.inf) if t.blind else None
    lowest = torch.finfo(t.dtype).min / (1 if t.unit == 1 else 2)  # finite in `unit`s too
    for band in t.bands():
        for c, tile in enumerate(band):
            n, I, J = tile.n, tile.I, tile.J
            s = t.scores(tile)
            t1 = s.amax(-1, keepdim=True).div_(t.unit)
            if t.blind:
                t1.clamp_min_(lowest)  # all masked: exp(−inf − lowest) is 0, exp(−inf + inf) is not
            if c:
                t1 = torch.maximum(t0, t1)  # noqa: F821
            l1 = t.exp(s.sub_(t1 * t.unit)).sum(-1, keepdim=True)
            z = t.keep(tile)
            if z is not None:
                s *= z
            if c:
                shrink = torch.exp(t0 - t1)  # noqa: F821
                l1.add_(shrink.mul(l0))  # noqa: F821
                block.mul_(shrink)  # noqa: F821
            block = o.add(n, I, s, v[n, J])
            t0, l0 = t1, l1
        if band:
            if lse is not None:
                lse[n, I] = l0.log().add_(t0)
                nothing = l0 == 0
                l0.masked_fill_(nothing, 1)
                t0.masked_fill_(nothing, 0)
            block.div_(l0)
            top[n, I], l[n, I] = t0, l0
    lse = top + l.log() if lse is None else lse
    return o.whole(q.dtype), *(t.back(x, t.dtype).squeeze(-1) for x in (lse, top, l))


def backward(do, dlse, q, k, v, o, top, l, terms, need):
    """dQ, dK, dV, dM, dh: those that `need` names by q, k, v, m, s, else None."""
    t, m = Tiles(q, k, terms), terms.m
    top, r, do = t.column(top) * t.unit, t.column(l).reciprocal(), t.flat(do)
    dq = t.sums(t.L, q.shape[-1]) if "q" in need else None
    dk = t.sums(t.S, k.shape[-1]) if "k" in need else None
    dv = t.sums(t.S, do.shape[-1]) if "v" in need else None
    dm = t.mask_zeros() if "m" in need else None
    dh = t.zeros(1, 1).flatten() if "s" in need else None
    scores = need not in ("", "v")
    bent = t.cap != 0 and (dq is not None or dk is not None)
    if scores:
        v, o, dlse = t.flat(v), t.flat(o), None if dlse is None else t.column(dlse)
    for band in filter(None, t.bands()):
        n, I = band[0].n, band[0].I
        do_ = do[n, I] * r[n, I]  # P = r exp(S − T): r is put into the rows of dO and D, not into P
        if scores:
            D = (do_ * o[n, I]).sum(-1, keepdim=True)
            if dlse is not None:
                D -= dlse[n, I] * r[n, I]
        for tile in band:
            J = tile.J
            e, z = t.exp(t.scores(tile, minus=top, bent=bent)), t.keep(tile)
            if dv is not None:
                dv.add(n, J, (e if z is None else torch.mul(e, z, out=t.buffer("x", tile))).mT, do_)
            if not scores:
                continue
            if z is None:
                ds = torch.baddbmm(D, do_, v[n, J].mT, beta=-1, out=t.buffer("x", tile)).mul_(e)
            else:
                ds = torch.bmm(do_, v[n, J].mT, out=t.buffer("x", tile)).mul_(z).sub_(D).mul_(e)
            if dm is not None:
                t.add_to_mask(dm, tile, ds)
            if dh is not None:
                t.add_to_slopes(dh, tile, ds)
            if bent:
                ds.mul_(t.bend(tile)[1])
            if dq is not None:
                dq.add(n, I, ds, t.k[n, J], alpha=t.scale)
            if dk is not None:
                dk.add(n, J, ds.mT, t.q[n, I], alpha=t.scale)
    return (
        None if dq is None else dq.whole(q.dtype),
        None if dk is None else dk.whole(k.dtype),
        None if dv is None else dv.whole(k.dtype),
        None if dm is None else dm.reshape(m.shape).to(m.dtype),
        None if dh is None else _to_slopes(dh, t, terms),
    )


def double_backward(a, b, c, e, f, do, dlse, q, k, v, o, top, l, terms, need):
    """The vjp of backward at the cotangents a, b, c, e, f of dQ, dK, dV, dM, dh; each may be None.

    Returns the gradients of do, dlse, q, k, v, m, h: those that `need` names ("o" is do, "l" is dlse, "s" is h), else None. The
    dependence of o, T and l on the inputs is inside the formulas. Two sweeps: the rows' statistics u and w, then the tiles.
    """
    t, m = Tiles(q, k, terms), terms.m
    top, r = t.column(top) * t.unit, t.column(l).reciprocal()
    do_, dlse = t.flat(do), None if dlse is None else t.column(dlse)
    a = None if a is None else t.flat(a) * t.scale
    b = None if b is None else t.flat(b) * t.scale
    c = None if c is None else t.flat(c)
    e = None if e is None else e.to(t.dtype).reshape(t.m.shape)
    f = None if f is None else t.sample(f).to(t.dtype)
    has_ab = a is not None or b is not None
    has_u = has_ab or e is not None or f is not None
    if v is not None:  # else nothing but c came, and U is 0
        v, o = t.flat(v), t.flat(o)
        D = (do_ * o).sum(-1, keepdim=True)
        if dlse is not None:
            D -= dlse
    u, w = t.zeros(t.L, 1), t.zeros(t.L, 1)
    gdo = t.sums(t.L, do.shape[-1]) if "o" in need else None
    gq = t.sums(t.L, q.shape[-1]) if "q" in need else None
    gk = t.sums(t.S, k.shape[-1]) if "k" in need else None
    gv = t.sums(t.S, do.shape[-1]) if "v" in need else None
    gm = t.mask_zeros() if "m" in need else None
    gh = t.zeros(1, 1).flatten() if "s" in need else None
    scores = gq is not None or gk is not None or gm is not None or gh is not None
    bent = t.cap != 0 and (has_ab or gq is not None or gk is not None)

    def drop(x: Tensor, z: Tensor | None) -> Tensor:
        return x if z is None else x.mul_(z)

    def P(tile: Tile) -> Tensor:
        return t.exp(t.scores(tile, minus=top, bent=bent)).mul_(r[tile.n, tile.I])

    def U(tile: Tile) -> Tensor:
        n, I, J = tile.n, tile.I, tile.J
        out = t.buffer("u", tile)
        if a is not None:
            torch.bmm(a[n, I], t.k[n, J].mT, out=out)
        if b is not None:
            torch.baddbmm(out, t.q[n, I], b[n, J].mT, beta=0 if a is None else 1, out=out)
        if bent and has_ab:
            t.buffer("ab", tile).copy_(out.mul_(t.bend(tile)[1]))
        if not has_ab:
            out.zero_()
        if e is not None:
            out.view(*tile.batch, *out.shape[1:]).add_(t.part(e, tile))
        if f is not None:
            out.addcmul_(f[n], t.distance(tile), value=-1)
        return out

    def X(tile: Tile, z: Tensor | None) -> Tensor:
        n, I, J = tile.n, tile.I, tile.J
        return drop(torch.bmm(do_[n, I], v[n, J].mT, out=t.buffer("x", tile)), z).sub_(D[n, I])

    def C(tile: Tile, z: Tensor | None) -> Tensor:
        return drop(torch.bmm(do_[tile.n, tile.I], c[tile.n, tile.J].mT, out=t.buffer("c", tile)), z)

    def bend(tile: Tile, W: Tensor, ds: Tensor | None) -> None:
        """From gradients by S to those by R = σ Q Kᵀ, S = c tanh(R/c) + ...; U holds tanh′ too."""
        T, slope = t.bend(tile)
        W.mul_(slope)
        if has_ab and ds is not None:
            W.addcmul_(t.buffer("ab", tile).mul_(T), ds, value=-2 / t.cap)
            ds.mul_(slope)

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
                gdo.add(n, I, p_, c[n, J])
            if has_u:
                gdo.add(n, I, p_.mul_(u_), v[n, J])
    if gdo is not None:
        gdo = gdo.whole(t.dtype)
        gdo = (gdo - t.back(u * o, t.dtype) if has_u else gdo).to(do.dtype)
    if dlse is not None:
        w -= u * dlse
    for tile in t if scores or (gv is not None and has_u) else ():
        n, I, J = tile.n, tile.I, tile.J
        p_, z = P(tile), t.keep(tile)
        if has_u:
            u_ = U(tile).sub_(u[n, I])
        ds = None
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
            if gm is not None:
                t.add_to_mask(gm, tile, W)
            if gh is not None:
                t.add_to_slopes(gh, tile, W)
            if bent:
                bend(tile, W, ds)
            if gq is not None:
                gq.add(n, I, W, t.k[n, J], alpha=t.scale)
                if b is not None:
                    gq.add(n, I, ds, b[n, J])
            if gk is not None:
                gk.add(n, J, W.mT, t.q[n, I], alpha=t.scale)
                if a is not None:
                    gk.add(n, J, ds.mT, a[n, I])
        if gv is not None and has_u:
            gv.add(n, J, drop(p_.mul_(u_), z).mT, do_[n, I])
    return (
        gdo,
        t.back(u, t.dtype).squeeze(-1) if "l" in need else None,
        None if gq is None else gq.whole(q.dtype),
        None if gk is None else gk.whole(k.dtype),
        None if gv is None else gv.whole(k.dtype),
        None if gm is None else gm.reshape(m.shape).to(m.dtype),
        None if gh is None else _to_slopes(gh, t, terms),
    )


def _to_slopes(dh, t, terms):
    """A gradient per sample, summed over the samples that share a slope."""
    return to_mask(dh.view(t.batch), terms.slopes).to(terms.slopes.dtype)


def keep(q, k, seed, p):
    """The whole dropout factor Z, put together from its tiles."""
    t = Tiles(q, k, Terms(seed=seed, p=p))
    whole = t.zeros(t.L, t.S)
    for tile in t:
        whole[tile.n, tile.I, tile.J] = t.keep(tile)
    return t.back(whole, t.dtype)
