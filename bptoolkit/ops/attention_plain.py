"""Attention in whole matrices: what `attention_blocks` does by tiles, as plain torch that can be differentiated again.

Letters as in `bptoolkit.ops.attention`. It runs where the loops cannot: for third derivatives, for
reverse over forward mode, and under `is_grads_batched=True`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bptoolkit.opaque import Opaque
from bptoolkit.ops import attention_blocks as blocks
from bptoolkit.ops.attention_tiles import to_mask, wide


def scores(q: Tensor, k: Tensor, m: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """S = σ Q Kᵀ + M."""
    s = q @ k.mT * (scale if scale is not None else max(q.shape[-1], 1) ** -0.5)  # *B L S
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1), -math.inf)
    if m is not None:
        s = s.masked_fill(~m, -math.inf) if m.dtype == torch.bool else s + m
    return s


def probabilities(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P, and the largest score and l of every row: 0 and 1 where the row is masked out wholly."""
    if s.shape[-1] == 0:
        top = s.new_zeros(s.shape[:-1])
        return s, top, top + 1
    top = s.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(s.dtype).min)  # *B L 1
    e = torch.exp(s - top)
    l = e.sum(-1, keepdim=True)
    unseen = l == 0
    l = l.masked_fill(unseen, 1)
    return e / l, top.masked_fill(unseen, 0).squeeze(-1), l.squeeze(-1)


def widen(*tensors: Tensor | None) -> list[Any]:
    return [t.to(wide(t.dtype)) if t is not None and t.is_floating_point() else t for t in tensors]


def _keep_fake(q: Tensor, k: Tensor, seed: Tensor, causal: bool, p: float) -> Tensor:
    return q.new_empty((*q.shape[:-1], k.shape[-2]), dtype=wide(q.dtype))


def _keep(q: Tensor, k: Tensor, seed: Tensor, causal: bool, p: float) -> Tensor:
    return blocks.keep(q, k, seed, causal, p)


KEEP = Opaque("attention_keep", _keep, _keep_fake, vmap="leading")


def dropout_factor(q: Tensor, k: Tensor, seed: Tensor | None, causal: bool, p: float) -> Tensor | None:
    return None if seed is None else KEEP(q.detach(), k.detach(), seed, causal, p)


def times(t: Tensor, z: Tensor | None) -> Tensor:
    return t if z is None else t * z


def forward(
    q: Tensor, k: Tensor, v: Tensor, m: Tensor | None, seed: Tensor | None, causal: bool, scale: float | None, p: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, z = q.dtype, dropout_factor(q, k, seed, causal, p)
    q, k, v, m = widen(q, k, v, m)
    P, top, l = probabilities(scores(q, k, m, causal, scale))
    o = (times(P, z) @ v).to(dtype)  # *B L Ev
    return o, top + l.log(), top, l


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
    seed: Tensor | None,
    o: Tensor | None,
    top: Tensor,
    l: Tensor,
    causal: bool,
    scale: float | None,
    p: float,
    need: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z = dropout_factor(q, k, seed, causal, p)
    Do, Q, K, V, M, O = widen(do, q, k, v, m, o)
    P = probabilities(scores(Q, K, M, causal, scale))[0]
    dv = (times(P, z).mT @ Do).to(do.dtype) if "v" in need else nothing(q)
    if need in ("", "v"):
        return nothing(q), nothing(q), dv, nothing(q)
    s = scale if scale is not None else max(q.shape[-1], 1) ** -0.5
    D = (Do * O).sum(-1) - (0 if dlse is None else dlse)  # *B L
    ds = P * (times(Do @ V.mT, z) - D.unsqueeze(-1))  # *B L S
    return (
        (ds @ K * s).to(q.dtype) if "q" in need else nothing(q),
        (ds.mT @ Q * s).to(k.dtype) if "k" in need else nothing(q),
        dv,
        to_mask(ds, m).to(m.dtype) if m is not None and "m" in need else nothing(q),
    )


def double_backward(a, b, c, e, do, dlse, q, k, v, m, seed, o, top, l, causal, scale, p, need):
    """The same in whole matrices, and from do, dlse, q, k, v and m alone: so it can be differentiated again."""
    dtype, z = q.dtype, dropout_factor(q, k, seed, causal, p)
    do, dlse, q, k, v, M, a, b, c, e = widen(do, dlse, q, k, v, m, a, b, c, e)
    s = scale if scale is not None else max(q.shape[-1], 1) ** -0.5
    P = probabilities(scores(q, k, M, causal, scale))[0]
    R = times(P, z)
    zero = torch.zeros_like(P)
    U = zero
    if a is not None:
        U = U + s * (a @ k.mT)
    if b is not None:
        U = U + s * (q @ b.mT)
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
    dS = P * X

    def total(*terms):
        return sum(t for t in terms if t is not None)

    g_do = gq = gk = None
    if "o" in need:
        g_do = total(None if v is None else (R * U) @ v - u * O, None if c is None else R @ c)
    if "q" in need:
        gq = s * total(W @ k, None if b is None else dS @ b)
    if "k" in need:
        gk = s * total(W.mT @ q, None if a is None else dS.mT @ a)
    return (
        None if g_do is None else g_do.to(dtype),
        u.squeeze(-1) if "l" in need else None,
        None if gq is None else gq.to(dtype),
        None if gk is None else gk.to(dtype),
        ((R * (U - u)).mT @ do).to(dtype) if "v" in need else None,
        to_mask(W, m).to(m.dtype) if "m" in need else None,
    )
