"""The loops over time of the LSTM, and its products over all steps. The maths is in `lstm`, truncation in `bptt`.

Letters   see `recurrent`; *V dimensions that vmap adds; G the four gates i f g o side by side, T B 4H; xi the factors of ARTBP,
          T B 1, or None; cut: e-prop
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bptoolkit import grad_norms
from bptoolkit.function import unwatched
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
    pre: Tensor, h0: Tensor, c0: Tensor, wh: Tensor, wr: Tensor | None, lengths: Tensor | None, reverse: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs y, the cells c and the gates from pre = Wi x + b: *V T B 4H. Without `keep`, the gates come back empty."""
    return truncated(pre, h0, c0, wh, wr, lengths, None, reverse, keep, False)


def truncated(pre, h0, c0, wh, wr, lengths, xi, reverse, keep, cut):
    """`loop`, with `slack` on what a step takes from the one before."""
    T, h, c = pre.shape[-3], h0, c0
    keeps, xis = each(None if lengths is None else valid(T, lengths), T), each(xi, T)
    pres, ys, cs, gs = pre.unbind(-3), [pre] * T, [pre] * T, [pre] * T
    for t in order(T, reverse):
        i, f, g, o = (pres[t] + slack(h, xis[t], cut) @ wh.mT).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = carry(keeps[t], f * slack(c, xis[t]) + i * g, c)
        m = o * c.tanh()
        h = carry(keeps[t], m if wr is None else m @ wr.mT, h)
        ys[t], cs[t], gs[t] = h, c, torch.cat([i, f, g, o], -1)
    y, c, g = torch.stack(ys, -3), torch.stack(cs, -3), torch.stack(gs, -3)
    return within(y, lengths), within(c, lengths), within(g, lengths) if keep else _no_gates(pre)


def loop_fast(pre, h0, c0, wh, wr, lengths, reverse, keep):
    """`loop` in place, without *V."""
    T, B, H = pre.shape[0], pre.shape[1], c0.shape[-1]
    y, c = pre.new_empty(T, B, h0.shape[-1]), pre.new_empty(T, B, H)
    gates = pre.new_empty(T if keep else 1, B, 4 * H)
    blocks = [gates, gates[..., : 2 * H], *gates.split(H, -1)]  # all; i and f at once; i, f, g, o
    rows = list(zip(*(b.unbind(0) if keep else [b[0]] * T for b in blocks), pre.unbind(0), y.unbind(0), c.unbind(0)))
    m, h, ct, wt = pre.new_empty(B, H), h0, c0, wh.mT
    reset = valid(T, lengths).unbind(0) if reverse and lengths is not None else None
    for t in order(T, reverse):
        a, i_f, i, f, g, o, pt, yt, cn = rows[t]
        torch.addmm(pt, h, wt, out=a)
        i_f.sigmoid_()
        g.tanh_()
        o.sigmoid_()
        torch.mul(f, ct, out=cn).addcmul_(i, g)
        torch.tanh(cn, out=yt if wr is None else m).mul_(o)
        if wr is not None:
            torch.mm(m, wr.mT, out=yt)
        h, ct = yt, cn
        if reset is not None:  # a row starts at its own end
            h, ct = torch.where(reset[t], yt, h0), torch.where(reset[t], cn, c0)
    if lengths is not None:
        ends = ~valid(T, lengths)
        for s in (y, c, gates) if keep else (y, c):
            s.masked_fill_(ends, 0)
    return y, c, gates if keep else _no_gates(pre)


def _no_gates(pre: Tensor) -> Tensor:
    return pre.new_empty(*pre.shape[:-3], 0, *pre.shape[-2:])


def loop_fake(pre, h0, c0, wh, wr, lengths, reverse, keep):
    *V, T, B, _ = pre.shape
    y, c = pre.new_empty(*V, T, B, h0.shape[-1]), pre.new_empty(*V, T, B, c0.shape[-1])
    return y, c, pre.new_empty(pre.shape) if keep else _no_gates(pre)


def bptt(
    dy: Tensor | None,
    dc: Tensor | None,
    dG: Tensor | None,
    G: Tensor,
    c: Tensor,
    c0: Tensor,
    wh: Tensor,
    wr: Tensor | None,
    lengths: Tensor | None,
    xi: Tensor | None,
    reverse: bool,
    cut: bool,
    record: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients da, dh0 and dc0 from the cotangents of y, c and the gates; past a row's length all are zero."""
    T = G.shape[-3]
    keeps, xis = each(None if lengths is None else valid(T, lengths), T), each(xi, T)
    i, f, g, o = G.chunk(4, -1)
    tc, cp = c.tanh(), slack(before(c0, c, lengths, reverse), xi)
    # the local derivatives, for all steps at once: the loop holds the carries only
    ki, kf, kg, ko, kc = g * i * (1 - i), cp * f * (1 - f), i * (1 - g * g), tc * o * (1 - o), o * (1 - tc * tc)
    slope = None if dG is None else dG * torch.cat([i * (1 - i), f * (1 - f), 1 - g * g, o * (1 - o)], -1)
    dct = torch.zeros_like(c[..., 0, :, :])  # *V B H
    dh, das = c.new_zeros(*dct.shape[:-1], wh.shape[-1]), [G] * T  # *V B P
    dys, dcs, slopes, kis, kfs, kgs, kos, kcs, fs = (each(s, T) for s in (dy, dc, slope, ki, kf, kg, ko, kc, f))
    for t in order(T, reverse)[::-1]:
        dht = dh if dys[t] is None else dh + dys[t]
        dm = dht if wr is None else dht @ wr
        dcn = dct + dm * kcs[t]
        if dcs[t] is not None:
            dcn = dcn + dcs[t]
        da = torch.cat([dcn * kis[t], dcn * kfs[t], dcn * kgs[t], dm * kos[t]], -1)  # *V B 4H
        if slopes[t] is not None:
            da = da + slopes[t]
        das[t] = da
        sent, kept = torch.zeros_like(dh) if cut else da @ wh, dcn * fs[t]
        if xis[t] is not None:
            sent, kept = sent * xis[t], kept * xis[t]
        dh, dct = carry(keeps[t], sent, dh), carry(keeps[t], kept, dct)
    return torch.stack(das, -3), dh, dct


def bptt_fast(dy, dc, dG, G, c, c0, wh, wr, lengths, xi, reverse, cut, record):
    """`bptt` in place, without *V. The local derivatives are made for a few steps at a time, so that they stay in cache."""
    if dG is not None:  # second order only
        return bptt(dy, dc, dG, G, c, c0, wh, wr, lengths, xi, reverse, cut, record)
    T, B, H = c.shape
    da, dct, dh = G.new_empty(G.shape), c.new_zeros(B, H), c.new_zeros(B, wh.shape[-1])
    dht, dm = torch.empty_like(dh), torch.empty_like(dct)
    das, i_f_g, o = da.unbind(0), da[..., : 3 * H].unflatten(-1, (3, H)).unbind(0), da[..., 3 * H :].unbind(0)
    f, dys, dcs = G[..., H : 2 * H].unbind(0), dy if dy is None else dy.unbind(0), dc if dc is None else dc.unbind(0)
    freeze = lengths is not None and reverse  # the other way dh and dct are still zero past the lengths
    keeps = valid(T, lengths).unbind(0) if freeze else None
    xis = None if xi is None else xi.unbind(0)
    cps = before(c0, c, lengths, reverse) if freeze else None
    steps, few, behind = order(T, reverse)[::-1], max(1, CHUNK // max(1, 4 * B * H)), None
    for k in range(0, T, few):
        ts = steps[k : k + few]
        at = slice(min(ts), max(ts) + 1)
        edge = at.stop if reverse else at.start - 1
        cp = before(c[edge] if 0 <= edge < T else c0, c[at], None, reverse) if cps is None else cps[at]
        kc = _local(da[at], G[at], c[at], cp).unbind(0)
        for t in ts:
            if behind is None:
                dht = dh if dy is None else dh + dys[t]
            else:
                dht = torch.mm(behind, wh, out=dht) if dy is None else torch.addmm(dys[t], behind, wh, out=dht)
            dm = dht if wr is None else torch.mm(dht, wr, out=dm)
            dct.addcmul_(dm, kc[t - at.start])
            if dc is not None:
                dct += dcs[t]
            i_f_g[t].mul_(dct.unsqueeze(1))
            o[t].mul_(dm)
            if keeps is None and xis is None:
                behind = None if cut else das[t]
                dct.mul_(f[t])
                continue
            sent, kept = dh if cut else das[t] @ wh, dct * f[t]
            if xis is not None:
                sent, kept = sent * xis[t], kept.mul_(xis[t])
            dh, dct = carry(keeps and keeps[t], sent, dh), carry(keeps and keeps[t], kept, dct)
    return da, dh if behind is None else behind @ wh, dct


def _local(A: Tensor, gates: Tensor, c: Tensor, cp: Tensor) -> Tensor:
    """The local derivatives of a few steps: those of i, f, g, o into A; returns that of c."""
    (i, f, g, o), (ki, kf, kg, ko) = gates.chunk(4, -1), A.chunk(4, -1)
    u = i * g
    torch.addcmul(u, u, i, value=-1, out=ki)  # g i (1-i)
    torch.addcmul(i, u, g, value=-1, out=kg)  # i (1-g²)
    torch.mul(cp, f, out=u)
    torch.addcmul(u, u, f, value=-1, out=kf)  # cₜ₋₁ f (1-f)
    tc = c.tanh()
    torch.mul(tc, o, out=u)
    torch.addcmul(u, u, o, value=-1, out=ko)  # tanh(c) o (1-o)
    return torch.addcmul(o, u, tc, value=-1)  # o (1-tanh² c)


def squares(da, dy, dc, dG, G, c, c0, wh, wr, lengths, xi, reverse, cut, recur=recurrence):
    """The squares of what each row sends back, dh and dc, after the loop that made da: *V T B."""
    _, f, _, o = G.chunk(4, -1)
    sent, tc = sent_back(da, wh, xi, cut), c.tanh()
    dht = whole_dh(dy, sent, reverse)
    u = (dht if wr is None else back(dht, wr)) * (o * (1 - tc * tc))
    u = wide(u if dc is None else u + dc)
    f = wide(f if xi is None else f * xi)
    # dcₜ = uₜ + fₜ₊₁ dcₜ₊₁ is a recurrence of its own
    dc = recur(next_sends(f, reverse), u, torch.zeros_like(u[..., 0, :, :]), not reverse, False)
    return grad_norms.squares(None if lengths is None else valid(c.shape[-3], lengths), sent, dc * f)


def bptt_fake(dy, dc, dG, G, c, c0, wh, wr, lengths, xi, reverse, cut, record):
    return G.new_empty(G.shape), G.new_empty(*c0.shape[:-1], wh.shape[-1]), G.new_empty(c0.shape)


LOOP = Opaque("lstm_loop", loop, loop_fake, vmap="leading", fast=folded("tbbwwl", loop_fast, loop))
BPTT = Opaque("lstm_bptt", bptt, bptt_fake, vmap="leading", fast=recorded(folded("tttttbwwlt", bptt_fast, bptt), squares))

# --- over all steps ---------------------------------------------------------------------------------------------------------


def gates(x, hp, wi, wh, b, bh=None):
    """All gates again, with one product over all steps."""
    H = wi.shape[0] // 4
    pre = F.linear(x, wi, b)  # T B 4H
    if unwatched(x, hp, wi, wh, b):
        pre.view(-1, 4 * H).addmm_(hp.reshape(-1, hp.shape[-1]), wh.mT)
        pre[..., : 2 * H].sigmoid_()
        pre[..., 2 * H : 3 * H].tanh_()
        pre[..., 3 * H :].sigmoid_()
        return pre
    i, f, g, o = (pre + hp @ wh.mT).chunk(4, -1)
    return torch.cat([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], -1)


def sent_back(da, wh, xi, cut):
    """What each step sends back to hₜ₋₁: *V T B P."""
    sent = da.new_zeros(*da.shape[:-1], wh.shape[-1]) if cut else back(da, wh)
    return sent if xi is None else sent * xi


def whole_dh(dy, sent, reverse):
    """The whole gradient of each hₜ: dyₜ, and what step t+1 sends back."""
    dh = next_sends(sent, reverse)
    return dh if dy is None else dh + dy


def products(need, dy, da, x, hp, c, G, wi, wh, wr, xi, reverse, cut):
    """The gradients of x, wi, wh, b, no second bias, and wr: each one product over all steps."""
    dx = da @ wi if need.x else None  # T B I
    dwi = over_time(da, x) if need.wi else None  # 4H I
    dwh = over_time(da, hp) if need.wh else None  # 4H P
    db = da.sum((0, 1)) if need.b else None  # 4H
    dwr = over_time(whole_dh(dy, sent_back(da, wh, xi, cut), reverse), G.chunk(4, -1)[3] * c.tanh()) if need.wr else None  # P H
    return dx, dwi, dwh, db, None, dwr


def cells(G: Tensor, c0: Tensor, C: Tensor, lengths: Tensor | None, reverse: bool, K: int) -> Tensor:
    """All cells from the gates and every K-th cell: K elementwise steps, each for all stretches at once."""
    T, B, H = G.shape[0], G.shape[1], c0.shape[-1]
    n = C.shape[0] + 1
    i, f, g, _ = G.chunk(4, -1)
    keep = None if lengths is None else valid(T, lengths)
    f, ig = (f, i * g) if keep is None else (torch.where(keep, f, 1), i * g)  # outside its length a row keeps its cell

    def stretches(t: Tensor) -> Tensor:
        t = t.flip(0) if reverse else t
        return F.pad(t, (0, 0, 0, 0, 0, n * K - T)).view(n, K, B, H)

    f, ig, c = stretches(f), stretches(ig), torch.cat([c0.unsqueeze(0), C])
    out = G.new_empty(n, K, B, H)
    for k in range(K):
        c = torch.addcmul(ig[:, k], f[:, k], c, out=out[:, k])
    every = out.view(n * K, B, H)[:T]
    return within(every.flip(0) if reverse else every, lengths)


# --- for the other ways of saving, and truncation ----------------------------------------------------------------------------


def _loop(pre, h0, c0, wh, bh, wr, lengths, xi, reverse, cut):
    return truncated(pre, h0, c0, wh, wr, lengths, xi, reverse, True, cut)


def _fast(pre, h0, c0, wh, bh, wr, lengths, reverse, keep):
    return loop_fast(pre, h0, c0, wh, wr, lengths, reverse, keep)


def _node(pre, h0, c0, wh, bh, wr, lengths, reverse, keep):
    return LOOP(pre, h0, c0, wh, wr, lengths, reverse, keep)


def _back(fast, dy, dc, G, y, c, h0, c0, wh, wr, lengths, xi, reverse, cut):
    return (bptt_fast if fast else bptt)(dy, dc, None, G, c, c0, wh, wr, lengths, xi, reverse, cut, 0)


def _squares(da, dy, dc, G, y, c, h0, c0, wh, wr, lengths, xi, reverse, cut):
    return squares(da, dy, dc, None, G, c, c0, wh, wr, lengths, xi, reverse, cut)


MADE = rules(Core("lstm", "lstm", _loop, _fast, _node, _back, _squares, products, gates, cells))
