"""Attention by tiles: the loops behind `bptoolkit.ops.attention`, with memory linear in the length.

The L × S matrices of the maths (P, dS, U, W ...) exist one tile at a time: some samples of the batch, rows I, columns J. A tile
is recomputed from q, k and two numbers per row, so nothing of that size is kept between the passes.

Letters as in `bptoolkit.ops.attention`. A row's probabilities are P = exp(S − T)/l with T its largest score and
l = Σ exp(S − T). T and l are kept, and not lse = T + log l alone: P would be less exact, and wrong where an additive mask of
−1e38 in a whole row swallows log l. A row that is masked out wholly has T = 0 and l = 1, hence P = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bptoolkit.ops.attention_tiles import Tile, Tiles


def forward(q, k, v, m, seed, causal, scale, p):
    """O, lse, T and l, with the running maximum of Milakov & Gimelshein 2018."""
    t = Tiles(q, k, m, seed, causal, scale, p, (512, 512))
    v, o = t.flat(v), t.sums(t.L, v.shape[-1])
    top, l = t.zeros(t.L, 1), t.zeros(t.L, 1).add_(1)
    lowest = torch.finfo(t.dtype).min / (1 if t.unit == 1 else 2)  # finite in `unit`s too
    for band in t.bands():
        for c, tile in enumerate(band):
            n, I, J = tile.n, tile.I, tile.J
            s = t.scores(tile)
            t1 = s.amax(-1, keepdim=True).div_(t.unit)
            if m is not None:
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
            if m is not None:
                nothing = l0 == 0
                l0.masked_fill_(nothing, 1)
                t0.masked_fill_(nothing, 0)
            block.div_(l0)
            top[n, I], l[n, I] = t0, l0
    top, l = (t.back(x, t.dtype).squeeze(-1) for x in (top, l))
    return o.whole(q.dtype), top + l.log(), top, l


def backward(do, dlse, q, k, v, m, seed, o, top, l, causal, scale, p, need):
    """dQ, dK, dV, dM: those that `need` names, else None."""
    t = Tiles(q, k, m, seed, causal, scale, p)
    top, r, do = t.column(top) * t.unit, t.column(l).reciprocal(), t.flat(do)
    dq = t.sums(t.L, q.shape[-1]) if "q" in need else None
    dk = t.sums(t.S, k.shape[-1]) if "k" in need else None
    dv = t.sums(t.S, do.shape[-1]) if "v" in need else None
    dm = t.mask_zeros() if "m" in need else None
    scores = "q" in need or "k" in need or "m" in need
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
            e, z = t.exp(t.scores(tile, minus=top)), t.keep(tile)
            if dv is not None:
                dv.add(n, J, (e if z is None else torch.mul(e, z, out=t.buffer("x", tile))).mT, do_)
            if not scores:
                continue
            if z is None:
                ds = torch.baddbmm(D, do_, v[n, J].mT, beta=-1, out=t.buffer("x", tile)).mul_(e)
            else:
                ds = torch.bmm(do_, v[n, J].mT, out=t.buffer("x", tile)).mul_(z).sub_(D).mul_(e)
            if dq is not None:
                dq.add(n, I, ds, t.k[n, J], alpha=t.scale)
            if dk is not None:
                dk.add(n, J, ds.mT, t.q[n, I], alpha=t.scale)
            if dm is not None:
                t.add_to_mask(dm, tile, ds)
    return (
        None if dq is None else dq.whole(q.dtype),
        None if dk is None else dk.whole(k.dtype),
        None if dv is None else dv.whole(k.dtype),
        None if dm is None else dm.reshape(m.shape).to(m.dtype),
    )


def double_backward(a, b, c, e, do, dlse, q, k, v, m, seed, o, top, l, causal, scale, p, need):
    """The vjp of backward at the cotangents a, b, c, e of dQ, dK, dV, dM; each may be None.

    Returns the gradients of do, dlse, q, k, v, m: those that `need` names ("o" is do, "l" is dlse), else None. The dependence
    of o, T and l on q, k, v and m is inside the formulas. Two sweeps: the rows' statistics u and w, then the tiles.
    """
    t = Tiles(q, k, m, seed, causal, scale, p)
    top, r = t.column(top) * t.unit, t.column(l).reciprocal()
    do_, dlse = t.flat(do), None if dlse is None else t.column(dlse)
    a = None if a is None else t.flat(a) * t.scale
    b = None if b is None else t.flat(b) * t.scale
    c = None if c is None else t.flat(c)
    e = None if e is None else e.to(t.dtype).reshape(t.m.shape)
    has_u = a is not None or b is not None or e is not None
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
                gq.add(n, I, W, t.k[n, J], alpha=t.scale)
                if b is not None:
                    gq.add(n, I, ds, b[n, J])
            if gk is not None:
                gk.add(n, J, W.mT, t.q[n, I], alpha=t.scale)
                if a is not None:
                    gk.add(n, J, ds.mT, a[n, I])
            if gm is not None:
                t.add_to_mask(gm, tile, W)
        if gv is not None and has_u:
            gv.add(n, J, drop(p_.mul_(u_), z).mT, do_[n, I])
    return (
        gdo,
        t.back(u, t.dtype).squeeze(-1) if "l" in need else None,
        None if gq is None else gq.whole(q.dtype),
        None if gk is None else gk.whole(k.dtype),
        None if gv is None else gv.whole(k.dtype),
        None if gm is None else gm.reshape(m.shape).to(m.dtype),
    )


def keep(q, k, seed, causal, p):
    """The whole dropout factor Z, put together from its tiles."""
    t = Tiles(q, k, None, seed, causal, None, p)
    whole = t.zeros(t.L, t.S)
    for tile in t:
        whole[tile.n, tile.I, tile.J] = t.keep(tile)
    return t.back(whole, t.dtype)
