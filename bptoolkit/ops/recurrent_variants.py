"""The rule of the LSTM's variants: peepholes, layer normalisation, and what is dropped or kept at random on the way.

Maths     aₜ = N(Wi kx xₜ) + N(Wh kh hₜ₋₁) + b           four blocks of H rows, one per gate: i f g o
          i = σ(aᵢ + pᵢ cₜ₋₁)   f = σ(a_f + p_f cₜ₋₁)   g = tanh(a_g)
          ĉ = f cₜ₋₁ + i kg g
          o = σ(aₒ + pₒ ĉ)      ĥ = o tanh(N(ĉ))
          cₜ = zc cₜ₋₁ + (1-zc) ĉ      hₜ = zh hₜ₋₁ + (1-zh) ĥ      yₜ = hₜ
          N(v) = γ (v - mean v) r + β,  r = 1/√(var v + eps),  over a row; or N(v) = v
          Nᵀ(d) = r (d' - mean d' - n mean(d' n)),  d' = γ d,  n = (v - mean v) r            the transpose of N's Jacobian
          backward through time, t = T … 1, with the carries dh and dc from step t+1:
          dh += dyₜ             dĥ = (1-zh) dh                 dĉ = (1-zc) dc
          du = dĥ o (1 - tanh² N(ĉ))            daₒ = dĥ tanh(N(ĉ)) o(1-o)
          dĉ += Nᵀ(du) + pₒ daₒ
          daᵢ = dĉ kg g i(1-i)    da_f = dĉ cₜ₋₁ f(1-f)    da_g = dĉ i kg (1-g²)
          dh ← zh dh + kh Whᵀ Nᵀ(da)            dc ← zc dc + f dĉ + pᵢ daᵢ + p_f da_f
          after the loop, each one product or sum over all steps:
          dx = kx Wiᵀ Nᵀ(da)        dWi = Σₜ Nᵀ(da)ₜᵀ kx xₜ         dWh = Σₜ Nᵀ(da)ₜᵀ kh hₜ₋₁        db = Σₜ daₜ
          dp = Σₜ [daᵢ cₜ₋₁, da_f cₜ₋₁, daₒ ĉ]       dγ = Σₜ n d,  dβ = Σₜ d   of each N, from what reaches it
Letters   see `recurrent`; *V dimensions that vmap adds; p the peepholes i f o side by side, 3H; gi, gh, gc the gains of the
          three N, 4H 4H H; the shifts of the first two are b, that of the third bc, H
          kx B I, kh B H: variational dropout, one mask for all steps; kg T B H: recurrent dropout; zh, zc T B H: zoneout;
          in evaluation k is 1 and z its expectation, eh, ec
Saving    x y c: hₜ₋₁ and cₜ₋₁ are known for every t, so all else is made again with one product over all steps; the masks
          are hashes of a seed, `bptoolkit.randomness`
Numerics  N of half tensors is computed in float32
Source    peepholes: Gers & Schmidhuber 2000; Graves 2013, eqs. 7-11; N: Ba et al. 2016, eqs. 20-22; kg: Semeniuta et al. 2016;
          kx, kh: Gal & Ghahramani 2016; z: Krueger et al. 2017
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bptoolkit import randomness
from bptoolkit.blocks import by_rows
from bptoolkit.function import Rule
from bptoolkit.opaque import Opaque
from bptoolkit.ops.recurrent import before, carry, each, folded, order, over_time, valid, within
from bptoolkit.precision import wide

# --- masks ----------------------------------------------------------------------------------------------------------------

ZONE_H, ZONE_C, CANDIDATE, INPUT, STATE = range(5)  # the streams of random numbers that one seed gives, and the order of rates


class Masks(NamedTuple):
    """What the random masks of one layer in one direction are; None where there is nothing to drop."""

    kx: Tensor | None = None  # B I: 0 or 1/(1-p)
    kh: Tensor | None = None  # B H: 0 or 1/(1-p)
    kg: Tensor | None = None  # T B H: 0 or 1/(1-p)
    zh: Tensor | None = None  # T B H: True keeps the old state
    zc: Tensor | None = None  # T B H
    eh: float = 0.0  # without masks: the share of the old state
    ec: float = 0.0


def stream(seed: Tensor, k: int) -> Tensor:
    """One of several seeds made from one."""
    return seed ^ randomness.signed(k * randomness.B)


def masks(seed: Tensor | None, rates: tuple[float, ...], x: Tensor, h0: Tensor) -> Masks:
    """The masks of x: T B I, for probabilities in the order of the streams; without a seed, the expectation of zoneout."""
    rates = tuple(map(float, rates))  # constants of the graph, where Dynamo has made them symbols
    if seed is None:
        return Masks(eh=rates[ZONE_H], ec=rates[ZONE_C])
    T, (B, H) = x.shape[0], h0.shape

    def kept(k, *shape):
        p = rates[k]
        return None if p == 0 else randomness.keep(stream(seed, k), shape, p)

    def dropped(k, *shape):
        mask, p = kept(k, *shape), rates[k]
        return None if mask is None else mask.to(x.dtype) * (1 / (1 - p) if p < 1 else 0.0)

    def zoned(k):
        mask = kept(k, T, B, H)
        return None if mask is None else ~mask

    ks = dropped(INPUT, B, x.shape[2]), dropped(STATE, B, H), dropped(CANDIDATE, T, B, H)
    return Masks(*ks, zoned(ZONE_H), zoned(ZONE_C))


def mixed(z: Tensor | None, e: float, new: Tensor, old: Tensor) -> Tensor:
    """The state after zoneout."""
    if z is not None:
        return torch.where(z, old, new)
    return new if e == 0 else e * old + (1 - e) * new


def split(z: Tensor | None, e: float, d: Tensor) -> tuple[Tensor, Tensor | None]:
    """The transpose of `mixed`: what of d goes to the new state, and what to the old one."""
    if z is not None:
        return torch.where(z, 0.0, d), torch.where(z, d, 0.0)
    return (d, None) if e == 0 else ((1 - e) * d, e * d)


def times(t: Tensor, k: Tensor | None) -> Tensor:
    return t if k is None else t * k


def plus(t: Tensor, k: Tensor | None) -> Tensor:
    return t if k is None else t + k


# --- layer normalisation ----------------------------------------------------------------------------------------------------


def normal(v: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """N without its gain and shift, and r."""
    w = wide(v)
    w = w - w.mean(-1, keepdim=True)
    r = (w.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (w * r).to(v.dtype), r


def normal_vjp(d: Tensor, n: Tensor, r: Tensor) -> Tensor:
    """The transpose of the Jacobian of `normal`, applied to d."""
    e, m = wide(d), wide(n)
    return (r * (e - e.mean(-1, keepdim=True) - m * (e * m).mean(-1, keepdim=True))).to(d.dtype)


# --- the loops ------------------------------------------------------------------------------------------------------------


def cell(a, cp, p, gc, bc, kg, eps):
    """One step, or all of them at once, from a and cₜ₋₁: i f g o ĉ and tanh(N(ĉ))."""
    ai, af, ag, ao = a.chunk(4, -1)
    pi, pf, po = (None, None, None) if p is None else p.chunk(3, -1)
    i = (ai if pi is None else ai + pi * cp).sigmoid()
    f = (af if pf is None else af + pf * cp).sigmoid()
    g = ag.tanh()
    cn = f * cp + i * times(g, kg)
    o = (ao if po is None else ao + po * cn).sigmoid()
    return i, f, g, o, cn, (cn if gc is None else plus(normal(cn, eps)[0] * gc, bc)).tanh()


def loop(
    pre: Tensor,
    h0: Tensor,
    c0: Tensor,
    wh: Tensor,
    p: Tensor | None,
    gh: Tensor | None,
    gc: Tensor | None,
    bc: Tensor | None,
    kh: Tensor | None,
    kg: Tensor | None,
    zh: Tensor | None,
    zc: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
    eh: float,
    ec: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The outputs y and the cells c from pre = N(Wi kx x) + b: *V T B 4H; p, gh, gc and bc are *V 1 ·."""
    T, h, c, wt = pre.shape[-3], h0, c0, wh.mT
    keeps = each(None if lengths is None else valid(T, lengths), T)
    pres, kgs, zhs, zcs, ys, cs = pre.unbind(-3), *(each(s, T) for s in (kg, zh, zc)), [pre] * T, [pre] * T
    for t in order(T, reverse):
        v = times(h, kh) @ wt  # *V B 4H
        if gh is not None:
            v = normal(v, eps)[0] * gh
        _, _, _, o, cn, tu = cell(pres[t] + v, c, p, gc, bc, kgs[t], eps)
        h = carry(keeps[t], mixed(zhs[t], eh, o * tu, h), h)
        c = carry(keeps[t], mixed(zcs[t], ec, cn, c), c)
        ys[t], cs[t] = h, c
    return within(torch.stack(ys, -3), lengths), within(torch.stack(cs, -3), lengths)


def loop_fake(pre, h0, c0, *_):
    shape = (*pre.shape[:-1], h0.shape[-1])
    return pre.new_empty(shape), pre.new_empty(shape)


def bptt(
    dy: Tensor | None,
    dc: Tensor | None,
    K: Tensor,
    h0: Tensor,
    wh: Tensor,
    p: Tensor | None,
    gh: Tensor | None,
    vn: Tensor | None,
    vr: Tensor | None,
    gc: Tensor | None,
    cn: Tensor | None,
    cr: Tensor | None,
    kh: Tensor | None,
    zh: Tensor | None,
    zc: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
    eh: float,
    ec: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients da, du, dh0 and dc0 from the cotangents of y and c; past a row's length all are zero.

    K: *V T B 6H has the local derivatives of all steps, `slopes`, so that the loop holds the carries only. vn, vr and cn, cr
    are n and r of the N of Wh h and of ĉ. du comes back empty without the latter.
    """
    T, H = K.shape[-3], h0.shape[-1]
    keeps = each(None if lengths is None else valid(T, lengths), T)
    pi, pf, po = (None, None, None) if p is None else p.chunk(3, -1)
    dh, dct, das, dus = torch.zeros_like(h0), torch.zeros_like(h0), [K] * T, [K] * T  # *V B H
    Ks, dys, dcs, zhs, zcs, cns, crs, vns, vrs = (each(s, T) for s in (K, dy, dc, zh, zc, cn, cr, vn, vr))
    for t in order(T, reverse)[::-1]:
        k, ku, f = Ks[t].split((4 * H, H, H), -1)
        dhn, dh_old = split(zhs[t], eh, plus(dh, dys[t]))
        dcn, dc_old = split(zcs[t], ec, plus(dct, dcs[t]))
        du = dhn * ku
        dcn = dcn + (du if gc is None else normal_vjp(du * gc, cns[t], crs[t]))
        if po is not None:
            dcn = dcn + po * (dhn * k[..., 3 * H :])
        da = torch.cat([dcn, dcn, dcn, dhn], -1) * k  # *V B 4H
        dv = da if gh is None else normal_vjp(da * gh, vns[t], vrs[t])
        dc_new = plus(dcn * f, dc_old)
        if pi is not None and pf is not None:
            ai, af, _, _ = da.chunk(4, -1)
            dc_new = dc_new + pi * ai + pf * af
        dh, dct = carry(keeps[t], plus(times(dv @ wh, kh), dh_old), dh), carry(keeps[t], dc_new, dct)
        das[t], dus[t] = da, du
    return torch.stack(das, -3), _no_du(K) if gc is None else torch.stack(dus, -3), dh, dct


def _no_du(K: Tensor) -> Tensor:
    *V, _, B, n = K.shape
    return K.new_empty(*V, 0, B, n // 6)


def bptt_fake(dy, dc, K, h0, wh, p, gh, vn, vr, gc, *_):
    lead, H = K.shape[:-1], h0.shape[-1]
    du = _no_du(K) if gc is None else K.new_empty(*lead, H)
    return K.new_empty(*lead, 4 * H), du, h0.new_empty(h0.shape), h0.new_empty(h0.shape)


LOOP = Opaque("lstm_variant_loop", loop, loop_fake, vmap="leading", fast=folded("tbbwwwwwbtttl", loop, loop))
BPTT = Opaque("lstm_variant_bptt", bptt, bptt_fake, vmap="leading", fast=folded("tttbwwwttwttbttl", bptt, bptt))

# --- the rule -------------------------------------------------------------------------------------------------------------


def row(t: Tensor | None) -> Tensor | None:
    """A vector as a row: vmap's dimensions come before it."""
    return t if t is None else t.unsqueeze(0)


def of_input(x, wi, b, gi, kx, lengths, eps):
    """kx x and pre for all steps, and n and r of its N."""
    x = times(within(x, lengths), kx)  # T B I
    if gi is None:
        return x, F.linear(x, wi, b), None, None
    n, r = normal(F.linear(x, wi), eps)
    return x, plus(n * gi, b), n, r  # T B 4H


def forward(x, h0, c0, wi, wh, b, p, gi, gh, gc, bc, seed, lengths, reverse, rates, eps):
    m = masks(seed, rates, x, h0)
    _, pre, _, _ = of_input(x, wi, b, gi, m.kx, lengths, eps)
    norms = row(p), row(gh), row(gc), row(bc)
    return LOOP(pre, h0, c0, wh, *norms, m.kh, m.kg, m.zh, m.zc, lengths, reverse, m.eh, m.ec, eps)


def slopes(a, cp, kg, p, gc, bc, eps):
    """Of all steps: the derivatives of aᵢ, a_f and a_g by dĉ, of aₒ and N(ĉ) by dĥ, of cₜ₋₁ by dĉ; and ĉ: T B 7H."""
    i, f, g, o, ch, tu = cell(a, cp, p, gc, bc, kg, eps)
    ki, k = times(g, kg) * i * (1 - i), times(i * (1 - g * g), kg)
    return torch.cat([ki, cp * f * (1 - f), k, tu * o * (1 - o), o * (1 - tu * tu), f, ch], -1)


def backward(dy, dc, x, h0, c0, wi, wh, b, p, gi, gh, gc, bc, seed, lengths, reverse, rates, eps, y, c, need):
    m, H = masks(seed, rates, x, h0), h0.shape[1]
    dy, dc = within(dy, lengths), within(dc, lengths)
    x, pre, un, ur = of_input(x, wi, b, gi, m.kx, lengths, eps)
    hp, cp = times(before(h0, y, lengths, reverse), m.kh), before(c0, c, lengths, reverse)  # T B H
    if gh is None:
        a, vn, vr = torch.addmm(pre.reshape(-1, 4 * H), hp.reshape(-1, H), wh.mT).view(pre.shape), None, None  # T B 4H
    else:
        vn, vr = normal(hp @ wh.mT, eps)
        a = pre + vn * gh
    K = by_rows(lambda a, cp, kg: slopes(a, cp, kg, p, gc, bc, eps), a, cp, m.kg)
    K, ch = within(K[..., : 6 * H], lengths), K[..., 6 * H :]
    cn, cr = (None, None) if gc is None else normal(ch, eps)
    norms = row(p), row(gh), vn, vr, row(gc), cn, cr
    da, du, dh0, dc0 = BPTT(dy, dc, K, h0, wh, *norms, m.kh, m.zh, m.zc, lengths, reverse, m.eh, m.ec)
    dpre = da if gi is None else by_rows(lambda d, n, r: normal_vjp(d * gi, n, r), da, un, ur)
    dv = da if gh is None else by_rows(lambda d, n, r: normal_vjp(d * gh, n, r), da, vn, vr)
    ai, af, _, ao = da.chunk(4, -1)
    return (
        times(dpre @ wi, m.kx) if need.x else None,  # T B I
        dh0,
        dc0,
        over_time(dpre, x) if need.wi else None,  # 4H I
        over_time(dv, hp) if need.wh else None,  # 4H H
        da.sum((0, 1)) if need.b else None,  # 4H
        torch.cat([(ai * cp).sum((0, 1)), (af * cp).sum((0, 1)), (ao * ch).sum((0, 1))]) if need.p else None,  # 3H
        (da * un).sum((0, 1)) if need.gi else None,  # 4H
        (da * vn).sum((0, 1)) if need.gh else None,  # 4H
        (du * cn).sum((0, 1)) if need.gc else None,  # H
        du.sum((0, 1)) if need.bc else None,  # H
        None,
        None,
    )


RULE = Rule("lstm_variant", forward, backward, inputs="x h0 c0 wi wh b p gi gh gc bc seed lengths", outputs="y c")
