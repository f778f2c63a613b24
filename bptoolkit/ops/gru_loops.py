"""The loops over time of the GRU, and its products over all steps. The maths is in `gru`, truncation in `bptt`.

Letters   see `recurrent`; *V dimensions that vmap adds; G is r z q n side by side, T B 4H; da is da_n da_r da_z dq: its first
          three blocks go back to x, its last three to hₜ₋₁; xi the factors of ARTBP, T B 1, or None
Cut       e-prop: the path hₜ₋₁ -> Wh hₜ₋₁ is cut, in all three gates; z hₜ₋₁ carries on
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bptoolkit import grad_norms
from bptoolkit.grad_norms import recorded
from bptoolkit.opaque import Opaque
from bptoolkit.ops.bptt import slack
from bptoolkit.ops.bptt_pieces import Core
from bptoolkit.ops.bptt_run import rules
from bptoolkit.ops.linear_recurrence import loop_fast as recurrence
from bptoolkit.ops.recurrent import (
    CHUNK,
    back,
    before,
    carry,
    each,
    folded,
    next_sends,
    order,
    over_time,
    valid,
    within,
)
from bptoolkit.precision import wide

# --- the loops ------------------------------------------------------------------------------------------------------------


def loop(
    pre: Tensor, h0: Tensor, wh: Tensor, bh: Tensor | None, lengths: Tensor | None, reverse: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    """The outputs y and the gates G from pre = Wi x + b: *V T B 3H, and bh: *V 1 3H. Without `keep`, G comes back empty."""
    return truncated(pre, h0, wh, bh, lengths, None, reverse, keep, False)


def truncated(pre, h0, wh, bh, lengths, xi, reverse, keep, cut):
    """`loop`, with `slack` on what a step takes from the one before."""
    T, h = pre.shape[-3], h0
    keeps, xis = each(None if lengths is None else valid(T, lengths), T), each(xi, T)
    pres, ys, gs = pre.unbind(-3), [pre] * T, [pre] * T
    for t in order(T, reverse):
        ar, az, an = pres[t].chunk(3, -1)
        u, hp = slack(h, xis[t], cut) @ wh.mT, slack(h, xis[t])  # *V B 3H
        ur, uz, q = (u if bh is None else u + bh).chunk(3, -1)
        r, z = (ar + ur).sigmoid(), (az + uz).sigmoid()
        n = (an + r * q).tanh()
        h = carry(keeps[t], n + z * (hp - n), h)
        ys[t], gs[t] = h, torch.cat([r, z, q, n], -1)
    return within(torch.stack(ys, -3), lengths), within(torch.stack(gs, -3), lengths) if keep else _no_gates(pre)


def loop_fast(pre, h0, wh, bh, lengths, reverse, keep):
    """`loop` in place, without *V."""
    T, B, H = pre.shape[0], pre.shape[1], h0.shape[-1]
    y, g, h, wt = pre.new_empty(T, B, H), pre.new_empty(T if keep else 1, B, 4 * H), h0, wh.mT
    blocks = [g[..., : 3 * H], g[..., : 2 * H], *g.split(H, -1)]  # r z q at once, r z at once, r, z, q, n
    above = [s.unbind(0) for s in (pre[..., : 2 * H], pre[..., 2 * H :], y)]
    rows = list(zip(*(b.unbind(0) if keep else [b[0]] * T for b in blocks), *above))
    reset = valid(T, lengths).unbind(0) if reverse and lengths is not None else None
    for t in order(T, reverse):
        rzq, rz, r, z, q, n, arz, an, yt = rows[t]
        torch.mm(h, wt, out=rzq) if bh is None else torch.addmm(bh, h, wt, out=rzq)
        rz.add_(arz).sigmoid_()
        torch.addcmul(an, r, q, out=n).tanh_()
        torch.lerp(n, h, z, out=yt)
        h = yt if reset is None else torch.where(reset[t], yt, h0)  # a row starts at its own end
    if lengths is not None:
        ends = ~valid(T, lengths)
        for s in (y, g) if keep else (y,):
            s.masked_fill_(ends, 0)
    return y, g if keep else _no_gates(pre)


def _no_gates(pre: Tensor) -> Tensor:
    *V, _, B, n = pre.shape
    return pre.new_empty(*V, 0, B, n // 3 * 4)


def loop_fake(pre, h0, wh, bh, lengths, reverse, keep):
    lead, H = pre.shape[:-1], h0.shape[-1]
    return pre.new_empty(*lead, H), pre.new_empty(*lead, 4 * H) if keep else _no_gates(pre)


def bptt(
    dy: Tensor | None,
    dG: Tensor | None,
    G: Tensor,
    y: Tensor,
    h0: Tensor,
    wh: Tensor,
    lengths: Tensor | None,
    xi: Tensor | None,
    reverse: bool,
    cut: bool,
    record: int,
) -> tuple[Tensor, Tensor]:
    """The gradients da and dh0 from the cotangents of y and G, which are zero past a row's length."""
    T, hp = G.shape[-3], slack(before(h0, y, lengths, reverse), xi)
    keeps, xis = each(None if lengths is None else valid(T, lengths), T), each(xi, T)
    r, z, q, n = G.chunk(4, -1)
    # the local derivatives, for all steps at once: the loop holds the carry only
    kn, kz, kr = within((1 - z) * (1 - n * n), lengths), (hp - n) * z * (1 - z), q * r * (1 - r)
    slope: Any = None, None
    if dG is not None:
        dr, dz, dq, dn = dG.chunk(4, -1)
        slope = dn * (1 - n * n), torch.cat([dr * r * (1 - r), dz * z * (1 - z), dq], -1)
    dh, das = torch.zeros_like(h0), [G] * T  # *V B H
    dys, rs, zs, kns, kzs, krs, of_a, of_u = (each(s, T) for s in (dy, r, z, kn, kz, kr, *slope))
    for t in order(T, reverse)[::-1]:
        dht = dh if dys[t] is None else dh + dys[t]
        an = dht * kns[t] if of_a[t] is None else dht * kns[t] + of_a[t]
        rzq = torch.cat([an * krs[t], dht * kzs[t], an * rs[t]], -1)  # *V B 3H
        if of_u[t] is not None:
            rzq = rzq + of_u[t]
        das[t] = torch.cat([an, rzq], -1)  # *V B 4H
        sent = dht * zs[t] if cut else dht * zs[t] + rzq @ wh
        dh = carry(keeps[t], sent if xis[t] is None else sent * xis[t], dh)
    return torch.stack(das, -3), dh


def bptt_fast(dy, dG, G, y, h0, wh, lengths, xi, reverse, cut, record):
    """`bptt` in place, without *V. The local derivatives are made for a few steps at a time, so that they stay in cache."""
    if dG is not None or dy is None:  # second order only
        return bptt(dy, dG, G, y, h0, wh, lengths, xi, reverse, cut, record)
    T, B, H = y.shape
    da, dh, dys = G.new_empty(G.shape), torch.zeros_like(h0), dy.unbind(0)
    all4, rzq, z = da.unflatten(-1, (4, H)).unbind(0), da[..., H:].unbind(0), G[..., H : 2 * H].unbind(0)
    freeze = lengths is not None and reverse  # the other way dh is still zero past the lengths
    keeps = valid(T, lengths).unbind(0) if freeze else None
    xis = None if xi is None else xi.unbind(0)
    hps = before(h0, y, lengths, reverse) if freeze else None
    steps, few = order(T, reverse)[::-1], max(1, CHUNK // max(1, 4 * B * H))
    dht = dys[steps[0]] + dh
    for k in range(0, T, few):
        ts = steps[k : k + few]
        at = slice(min(ts), max(ts) + 1)
        edge = at.stop if reverse else at.start - 1
        hp = before(y[edge] if 0 <= edge < T else h0, y[at], None, reverse) if hps is None else hps[at]
        _local(da[at], G[at], hp)
        if freeze:
            da[at].masked_fill_(~valid(T, lengths)[at], 0)
        for j, t in enumerate(ts, k + 1):
            all4[t].mul_(dht.unsqueeze(1))
            if keeps is not None or xis is not None or cut:
                sent = dht * z[t] if cut else torch.addmm(dht * z[t], rzq[t], wh)
                dh = carry(keeps and keeps[t], sent if xis is None else sent.mul_(xis[t]), dh)
                dht = dh if j == T else dh + dys[steps[j]]
            elif j == T:
                dh = (dht * z[t]).addmm_(rzq[t], wh)
            else:
                dht = torch.addcmul(dys[steps[j]], dht, z[t]).addmm_(rzq[t], wh)
    return da, dh


def _local(A: Tensor, g: Tensor, hp: Tensor) -> None:
    """The local derivatives of a few steps, all as multiples of dh, into A: those of n, r, z and q."""
    (r, z, q, n), (kn, kr, kz, kq) = g.chunk(4, -1), A.chunk(4, -1)
    u = 1 - z
    torch.mul(n, n, out=kz)
    torch.addcmul(u, u, kz, value=-1, out=kn)  # (1-z)(1-n²)
    torch.mul(kn, r, out=kq)
    torch.mul(kq, q, out=kr)
    kr.addcmul_(kr, r, value=-1)  # kn q r (1-r)
    torch.sub(hp, n, out=kz)
    kz.mul_(z).mul_(u)  # (hₜ₋₁ - n) z (1-z)


def squares(da, dy, dG, G, y, h0, wh, lengths, xi, reverse, cut, recur=recurrence):
    """The squares of what each row sends back, after the loop that made da: *V T B."""
    H = h0.shape[-1]
    z, through = G[..., H : 2 * H], torch.zeros_like(y) if cut else back(da[..., H:], wh)  # *V T B H
    z, through = (wide(t if xi is None else t * xi) for t in (z, through))
    u = next_sends(through, reverse)
    # dhₜ = dyₜ + Whᵀ [da_r da_z dq]ₜ₊₁ + zₜ₊₁ dhₜ₊₁ is a recurrence of its own
    dh = recur(next_sends(z, reverse), u if dy is None else u + dy, torch.zeros_like(u[..., 0, :, :]), not reverse, False)
    return grad_norms.squares(None if lengths is None else valid(y.shape[-3], lengths), through + dh * z)


def bptt_fake(dy, dG, G, y, h0, wh, lengths, xi, reverse, cut, record):
    return G.new_empty(G.shape), G.new_empty(h0.shape)


LOOP = Opaque("gru_loop", loop, loop_fake, vmap="leading", fast=folded("tbwwl", loop_fast, loop))
BPTT = Opaque("gru_bptt", bptt, bptt_fake, vmap="leading", fast=recorded(folded("ttttbwlt", bptt_fast, bptt), squares))

# --- over all steps ---------------------------------------------------------------------------------------------------------


def gates(x, hp, wi, wh, b, bh):
    """All gates again, with one product over all steps."""
    ar, az, an = F.linear(x, wi, b).chunk(3, -1)
    ur, uz, q = F.linear(hp, wh, bh).chunk(3, -1)
    r, z = (ar + ur).sigmoid(), (az + uz).sigmoid()
    return torch.cat([r, z, q, (an + r * q).tanh()], -1)  # T B 4H


def products(need, da, x, hp, wi):
    """The gradients of x, wi, wh and the two biases: each one product over all steps."""
    H = da.shape[-1] // 4
    nrz, rzq = da[..., : 3 * H], da[..., H:]  # T B 3H: what goes back to x, and to hₜ₋₁
    dx = nrz @ wi.roll(H, 0) if need.x else None  # T B I
    dwi = over_time(nrz, x).roll(-H, 0) if need.wi else None  # 3H I
    dwh = over_time(rzq, hp) if need.wh else None  # 3H H
    db = nrz.sum((0, 1)).roll(-H, 0) if need.b else None  # 3H
    dbh = rzq.sum((0, 1)) if need.bh else None  # 3H
    return dx, dwi, dwh, db, dbh


# --- for the other ways of saving, and truncation ----------------------------------------------------------------------------


def _loop(pre, h0, c0, wh, bh, wr, lengths, xi, reverse, cut):
    y, G = truncated(pre, h0, wh, bh, lengths, xi, reverse, True, cut)
    return y, None, G


def _fast(pre, h0, c0, wh, bh, wr, lengths, reverse, keep):
    y, G = loop_fast(pre, h0, wh, bh, lengths, reverse, keep)
    return y, None, G


def _node(pre, h0, c0, wh, bh, wr, lengths, reverse, keep):
    y, G = LOOP(pre, h0, wh, None if bh is None else bh.unsqueeze(0), lengths, reverse, keep)
    return y, None, G


def _back(fast, dy, dc, G, y, c, h0, c0, wh, wr, lengths, xi, reverse, cut):
    return *(bptt_fast if fast else bptt)(dy, None, G, y, h0, wh, lengths, xi, reverse, cut, 0), None


def _squares(da, dy, dc, G, y, c, h0, c0, wh, wr, lengths, xi, reverse, cut):
    return squares(da, dy, None, G, y, h0, wh, lengths, xi, reverse, cut)


def _products(need, dy, da, x, hp, c, G, wi, wh, wr, xi, reverse, cut):
    return *products(need, da, x, hp, wi), None


MADE = rules(Core("gru", "gru", _loop, _fast, _node, _back, _squares, _products, gates))
