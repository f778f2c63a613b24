"""Attention of packed sequences: the loops of `attention_blocks`, once per sequence.

q *B N E and k, v *B M E hold sequences one after another; number b is rows cu_q[b] ... cu_q[b + 1] of q and likewise of k and
v. No score between two sequences exists. Rows outside every sequence see nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bptoolkit.ops import attention_blocks as blocks
from bptoolkit.ops.attention_tiles import Terms, wide


def forward(q, k, v, cu_q, cu_k, terms):
    o, row = q.new_zeros(*q.shape[:-1], v.shape[-1]), q.new_zeros(q.shape[:-1], dtype=wide(q.dtype))
    outs = o, row - torch.inf, row, row + 1
    for I, J, one in sequences(q, k, cu_q, cu_k, terms):
        here = blocks.forward(q[..., I, :], k[..., J, :], v[..., J, :], one)
        o[..., I, :] = here[0]
        for out, x in zip(outs[1:], here[1:]):
            out[..., I] = x
    return outs


def backward(do, dlse, q, k, v, o, top, l, cu_q, cu_k, terms, need):
    like = {"q": q, "k": k, "v": v, "s": terms.slopes}
    if "v" in need and v is None:
        like["v"] = k.new_empty(*k.shape[:-1], do.shape[-1])
    grads = {x: t.new_zeros(t.shape) for x, t in like.items() if x in need}
    for I, J, one in sequences(q, k, cu_q, cu_k, terms):
        dO, Q, O = (_rows(t, I) for t in (do, q, o))
        K, V = (_rows(t, J) for t in (k, v))
        here = blocks.backward(dO, _numbers(dlse, I), Q, K, V, O, top[..., I], l[..., I], one, need)
        _put(grads, zip("qkvms", here), I, J)
    return tuple(grads.get(x) for x in "qkvms")


def double_backward(a, b, c, e, f, do, dlse, q, k, v, o, top, l, cu_q, cu_k, terms, need):
    like = {"o": do, "l": top, "q": q, "k": k, "v": v, "s": terms.slopes}
    grads = {x: t.new_zeros(t.shape) for x, t in like.items() if x in need}
    for I, J, one in sequences(q, k, cu_q, cu_k, terms):
        A, dO, Q, O = (_rows(t, I) for t in (a, do, q, o))
        B, C, K, V = (_rows(t, J) for t in (b, c, k, v))
        here = blocks.double_backward(A, B, C, e, f, dO, _numbers(dlse, I), Q, K, V, O, top[..., I], l[..., I], one, need)
        _put(grads, zip("olqkvms", here), I, J)
    return tuple(grads.get(x) for x in "olqkvms")


def sequences(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, terms: Terms) -> Iterator[tuple[slice, slice, Terms]]:
    """The rows of q and of k of each sequence that has any of q, and its terms."""
    rows, columns = _bounds(cu_q), _bounds(cu_k)
    for b, (i, i_end, j, j_end) in enumerate(zip(rows, rows[1:], columns, columns[1:])):
        if not (0 <= i <= i_end <= q.shape[-2] and 0 <= j <= j_end <= k.shape[-2]):
            raise ValueError(
                f"varlen_attention: sequence {b} is rows {i} to {i_end} of query and {j} to {j_end} of key, which have "
                f"{q.shape[-2]} and {k.shape[-2]}; cu_seqlens must not fall, from 0 on"
            )
        if i < i_end:
            yield slice(i, i_end), slice(j, j_end), terms._replace(place=(q.shape[-2], i, j))


def _bounds(cu: Tensor) -> list[int]:
    """The numbers; vmap has put dimensions in front, along which they must be the same."""
    first = cu.reshape(-1, cu.shape[-1])
    if cu.dim() > 1 and not bool((first == first[:1]).all()):
        raise NotImplementedError("varlen_attention: vmap over cu_seqlens that differ is not supported")
    return first[0].tolist() if first.shape[0] else [0]


def _rows(t: Tensor | None, I: slice) -> Any:
    return None if t is None else t[..., I, :]


def _numbers(t: Tensor | None, I: slice) -> Any:
    return None if t is None else t[..., I]


def _put(grads: dict[str, Tensor], here: Any, I: slice, J: slice) -> None:
    """Write the gradients of one sequence to their places; those of the slopes are added up."""
    for x, g in here:
        if g is None or x not in grads:
            continue
        if x == "s":
            grads[x] += g
        elif x == "l":
            grads[x][..., I] = g
        else:
            grads[x][..., I if x in "oq" else J, :] = g
