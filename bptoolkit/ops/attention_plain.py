"""Attention in whole matrices: what `attention_blocks` does by tiles, as plain torch that can be differentiated again.

Letters as in `bptoolkit.ops.attention`. It runs where the loops cannot: for third derivatives, for
reverse over forward mode, and under `is_grads_batched=True`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bptoolkit.opaque import Opaque
from bptoolkit.ops import attention_blocks as blocks
from bptoolkit.ops.attention_tiles import Terms, to_mask, wide


class Scores(NamedTuple):
    """S, whole, and its parts."""

    S: Tensor
    T: Tensor | None  # tanh(σ Q Kᵀ / c), with a cap
    distance: Tensor | None  # |i + shift − j|, with slopes


def scores(q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, terms: Terms) -> Scores:
    """S = c tanh(σ Q Kᵀ / c) + M − h|distance|, −∞ where it is hidden."""
    m, slopes, lengths, _, (left, right, end), scale, cap, _, _ = terms
    s, t = q @ k.mT * (scale if scale is not None else max(q.shape[-1], 1) ** -0.5), None  # *B L S
    if cap:
        t = torch.tanh(s / cap)
        s = cap * t
    rows, columns = (torch.arange(n, device=s.device) for n in s.shape[-2:])
    hidden = distance = None
    if lengths is not None:
        hidden = columns >= lengths[..., None, None]
    if cu_q is not None and cu_k is not None:
        at, of = _sequence(rows, cu_q), _sequence(columns, cu_k)
        hidden = (at.number.unsqueeze(-1) != of.number) | (at.number < 1).unsqueeze(-1)
        rows, columns = at.place + (_total(at, cu_q, cu_k) if end else 0), of.place
    elif end:
        rows = rows + (s.shape[-1] - s.shape[-2])
    if left >= 0 or right >= 0 or slopes is not None:
        ahead = columns - rows.unsqueeze(-1)  # L S: how far the column lies right of the row's place
        for out in (ahead > right if right >= 0 else None, ahead < -left if left >= 0 else None):
            hidden = out if hidden is None else hidden if out is None else hidden | out
        if slopes is not None:
            distance = ahead.abs().to(s.dtype)
            s = s - slopes.to(s.dtype)[..., None, None] * distance
    if hidden is not None:
        s = s.masked_fill(hidden, -math.inf)
    if m is not None:
        s = s.masked_fill(~m, -math.inf) if m.dtype == torch.bool else s + m
    return Scores(s, t, distance)


class Sequence(NamedTuple):
    """Of every row: the number of its sequence, from 1 on, 0 for none; and its place there."""

    number: Tensor
    place: Tensor


def _sequence(rows: Tensor, cu: Tensor) -> Sequence:
    number = (rows.unsqueeze(-1) >= cu).sum(-1)
    place = rows - cu[(number - 1).clamp_min(0)]
    return Sequence(number.masked_fill(number == cu.shape[0], 0), place)


def _total(at: Sequence, cu_q: Tensor, cu_k: Tensor) -> Tensor:
    """How many more columns than rows the sequence of each row has."""
    return (cu_k.diff() - cu_q.diff())[(at.number - 1).clamp_min(0)]


def probabilities(s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P, lse, the largest score and l of every row; −∞, 0 and 1 where the row is masked out wholly."""
    if s.shape[-1] == 0:
        top = s.new_zeros(s.shape[:-1])
        return s, top - math.inf, top, top + 1
    top = s.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(s.dtype).min)  # *B L 1
    e = torch.exp(s - top)
    l = e.sum(-1, keepdim=True)
    unseen = l == 0
    l, top = l.masked_fill(unseen, 1), top.masked_fill(unseen, 0)
    lse = (top + l.log()).masked_fill(unseen, -math.inf)
    return e / l, lse.squeeze(-1), top.squeeze(-1), l.squeeze(-1)


def widen(*tensors: Tensor | None) -> list[Any]:
    return [t.to(wide(t.dtype)) if t is not None and t.is_floating_point() else t for t in tensors]


def _keep_fake(q: Tensor, k: Tensor, seed: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, p: float) -> Tensor:
    return q.new_empty((*q.shape[:-1], k.shape[-2]), dtype=wide(q.dtype))


def _keep(q: Tensor, k: Tensor, seed: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, p: float) -> Tensor:
    return blocks.keep(q, k, seed, p)  # packed sequences lie along the diagonal of the same matrix


KEEP = Opaque("attention_keep", _keep, _keep_fake, vmap="leading")


def dropout_factor(q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, terms: Terms) -> Tensor | None:
    return None if terms.seed is None else KEEP(q.detach(), k.detach(), terms.seed, cu_q, cu_k, terms.p)


def times(t: Tensor, z: Tensor | None) -> Tensor:
    return t if z is None else t * z


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    m: Tensor | None,
    slopes: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    window: list[int],
    scale: float | None,
    cap: float,
    p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    terms = Terms(m, slopes, lengths, seed, window, scale, cap, p)
    dtype, z = q.dtype, dropout_factor(q, k, cu_q, cu_k, terms)
    q, k, v, m = widen(q, k, v, m)
    P, lse, top, l = probabilities(scores(q, k, cu_q, cu_k, terms._replace(m=m)).S)
    return (times(P, z) @ v).to(dtype), lse, top, l  # *B L Ev


def nothing(like: Tensor) -> Tensor:
    """What stands for a gradient that was not asked for."""
    return like.new_empty((*like.shape[:-2], 0, 0))


def backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    m: Tensor | None,
    slopes: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    o: Tensor | None,
    top: Tensor,
    l: Tensor,
    window: list[int],
    scale: float | None,
    cap: float,
    p: float,
    need: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    terms = Terms(m, slopes, lengths, seed, window, scale, cap, p)
    z = dropout_factor(q, k, cu_q, cu_k, terms)
    Do, Q, K, V, M, O = widen(do, q, k, v, m, o)
    S, T, distance = scores(Q, K, cu_q, cu_k, terms._replace(m=M))
    P = probabilities(S)[0]
    dv = (times(P, z).mT @ Do).to(do.dtype) if "v" in need else nothing(q)
    if need in ("", "v"):
        return nothing(q), nothing(q), dv, nothing(q), nothing(q)
    s = scale if scale is not None else max(q.shape[-1], 1) ** -0.5
    D = (Do * O).sum(-1) - (0 if dlse is None else dlse)  # *B L
    ds = P * (times(Do @ V.mT, z) - D.unsqueeze(-1))  # *B L S
    dr = ds if T is None else ds * (1 - T * T)
    return (
        (dr @ K * s).to(q.dtype) if "q" in need else nothing(q),
        (dr.mT @ Q * s).to(k.dtype) if "k" in need else nothing(q),
        dv,
        to_mask(ds, m).to(m.dtype) if m is not None and "m" in need else nothing(q),
        to_slopes(ds, distance, slopes) if slopes is not None and "s" in need else nothing(q),
    )


def to_slopes(ds: Tensor, distance: Any, slopes: Tensor) -> Tensor:
    return to_mask(-(ds * distance).sum((-2, -1)), slopes).to(slopes.dtype)


def double_backward(a, b, c, e, f, do, dlse, q, k, v, cu_q, cu_k, terms, need):
    """The same in whole matrices, and from the inputs of the rule and do, dlse alone: so it can be differentiated again."""
    m, slopes, scale, cap = terms.m, terms.slopes, terms.scale, terms.cap
    dtype, z = q.dtype, dropout_factor(q, k, cu_q, cu_k, terms)
    do, dlse, q, k, v, M, a, b, c, e = widen(do, dlse, q, k, v, m, a, b, c, e)
    s = scale if scale is not None else max(q.shape[-1], 1) ** -0.5
    S, T, distance = scores(q, k, cu_q, cu_k, terms._replace(m=M))
    P = probabilities(S)[0]
    R = times(P, z)
    zero = torch.zeros_like(P)
    U = zero
    if a is not None:
        U = U + s * (a @ k.mT)
    if b is not None:
        U = U + s * (q @ b.mT)
    if T is not None:
        U = ab = U * (1 - T * T)
    if f is not None:
        U = U - f.to(P.dtype)[..., None, None] * distance
    if e is not None:
        U = U + e
    u = (P * U).sum(-1, keepdim=True)  # *B L 1
    C = zero if c is None else times(do @ c.mT, z)
    if v is None:  # then nothing but c came, and U is 0
        X = O = zero
    else:
        O = R @ v
        D = (do * O).sum(-1, keepdim=True) - (0 if dlse is None else dlse.unsqueeze(-1))
        X = times(do @ v.mT, z) - D
    w = (P * (U * X + C)).sum(-1, keepdim=True)
    W = P * ((U - u) * X + C - (w if dlse is None else w - u * dlse.unsqueeze(-1)))
    dS = dR = P * X
    WR = W
    if T is not None:  # by R = σ Q Kᵀ, S = c tanh(R/c)
        WR, dR = W * (1 - T * T) - (2 / cap) * dS * ab * T, dS * (1 - T * T)

    def total(*terms):
        return sum(t for t in terms if t is not None)

    g_do = gq = gk = None
    if "o" in need:
        g_do = total(None if v is None else (R * U) @ v - u * O, None if c is None else R @ c)
    if "q" in need:
        gq = s * total(WR @ k, None if b is None else dR @ b)
    if "k" in need:
        gk = s * total(WR.mT @ q, None if a is None else dR.mT @ a)
    return (
        None if g_do is None else g_do.to(dtype),
        u.squeeze(-1) if "l" in need else None,
        None if gq is None else gq.to(dtype),
        None if gk is None else gk.to(dtype),
        ((R * (U - u)).mT @ do).to(dtype) if "v" in need else None,
        to_mask(W, m).to(m.dtype) if "m" in need else None,
        to_slopes(W, distance, slopes) if "s" in need else None,
    )
