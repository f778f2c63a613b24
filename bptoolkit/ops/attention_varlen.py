"""Attention of sequences of several lengths, packed one after another, without padding.

Maths     per sequence b and head: O_b = softmax(σ Q_b K_bᵀ) V_b, with the terms and the derivatives of `attention_rule.py`
Letters   N rows of query, M of key, of all sequences together; H heads of query, Hk of key; E, Ev features
Numerics  as `scaled_dot_product_attention`; rows outside every sequence give 0 and gradients 0
Source    Dao 2023 (FlashAttention-2), its interface for variable lengths

A nested tensor of torch's jagged layout is such a packing; `scaled_dot_product_attention` of nested tensors comes here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bptoolkit.cases import Case, Draw
from bptoolkit.op import LOW, Op
from bptoolkit.ops import attention_options as options
from bptoolkit.ops.attention_rule import PACKED_RULE as RULE

NAME = "varlen_attention"


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: int | tuple[int, int] | None = None,
    causal_align: str = "top_left",
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """Attention within each of several sequences that are packed one after another.

    Sequence b is query[cu_seqlens_q[b]:cu_seqlens_q[b + 1]] and the same of key and value by cu_seqlens_k. Memory is linear in
    the lengths, in every order of derivatives up to the second; no padding is made.

    Args:
        query: (N, H, E), floating point.
        key: (M, H, E).
        value: (M, H, Ev).
        cu_seqlens_q: (B + 1,), integers that do not fall, from 0 to N: where the sequences begin and end.
        cu_seqlens_k: (B + 1,), likewise to M; cu_seqlens_q by default.
        max_seqlen_q: the length of the longest sequence of query; not needed, and taken for the sake of other libraries' calls.
        max_seqlen_k: likewise.
        dropout_p: the share of probabilities set to 0; the others are divided by 1 - dropout_p. Applied whenever it is not 0.
        is_causal: query i of a sequence sees its keys 0 ... i.
        scale: σ; E ** -0.5 by default.
        enable_gqa: key and value may have fewer heads than query; each serves a group of query's heads.
        window: (left, right): query i sees the keys i - left ... i + right alone; -1 for no bound; one number stands for both.
        causal_align: "top_left": query 0 of a sequence stands at its key 0; or "bottom_right": the last at the last.
        softcap: c > 0: the scores σ Q Kᵀ become c tanh(σ Q Kᵀ / c).
        alibi_slopes: (H,): the head's slope times the distance is taken from the scores; differentiable.
        return_lse: return the log-sum-exp of each row's scores as well; it is differentiable.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (N, H, Ev), of query's dtype; 0 where a query may see no key. With return_lse a tuple of it and (N, H), float32 for half
        inputs, -inf where a query sees no key.

    Raises:
        ValueError: shapes, heads or devices disagree, an option is out of its range, cu_seqlens fall or pass the end (which
            the fused kernels, that never read them on the host, do not say), or the named backend cannot run the call.
        TypeError: the tensors are not of one floating-point dtype, or cu_seqlens or an option is not of a type it can have.
    """
    q, k, v = OP.cast(query, key, value)
    OP.check(q, k, v)
    p = options.read_dropout(NAME, dropout_p)
    cu_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    _check_cu(q, cu_seqlens_q, cu_k)
    bounds = options.read_window(NAME, window, is_causal, causal_align, alibi_slopes is not None)
    cap = options.read_cap(NAME, softcap)
    q, k, v, groups = _heads_first(q, k, v, enable_gqa)
    slopes = options.lay_out_slopes(NAME, alibi_slopes, q, groups)
    seed = options.draw_seed(p, q)
    picked = OP.pick(RULE, backend, q, k, v, None, slopes, None, None, cu_seqlens_q, cu_k, bounds, scale, cap, p)
    o, lse, _, _ = RULE(q, k, v, None, slopes, None, seed, cu_seqlens_q, cu_k, bounds, scale, cap, p, backend=picked)
    if groups:
        o, lse = o.flatten(0, 1), lse.flatten(0, 1)
    o = o.transpose(0, 1)
    return (o, lse.transpose(0, 1)) if return_lse else o


def _check_cu(q: Tensor, cu_q: Any, cu_k: Any) -> None:
    for name, cu in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if not isinstance(cu, Tensor) or cu.dtype not in (torch.int32, torch.int64):
            kind = cu.dtype if isinstance(cu, Tensor) else type(cu).__name__
            raise TypeError(f"{NAME}: {name} is {kind}; it must be a tensor of torch.int32 or torch.int64")
        if cu.dim() != 1 or not cu.shape[0]:
            raise ValueError(f"{NAME}: {name} has shape {tuple(cu.shape)}; it must be (B + 1,), with B sequences")
        if cu.device != q.device:
            raise ValueError(f"{NAME}: {name} is on {cu.device} but query is on {q.device}; they must be on one device")
    if cu_q.shape != cu_k.shape:
        raise ValueError(
            f"{NAME}: cu_seqlens_q is of {cu_q.shape[0] - 1} sequences and cu_seqlens_k of {cu_k.shape[0] - 1}; "
            "they must be of as many"
        )


def _heads_first(q: Tensor, k: Tensor, v: Tensor, gqa: bool) -> tuple[Tensor, Tensor, Tensor, bool]:
    """(N, H, E) -> (H, N, E), or by groups (Hk, H/Hk, N, E)."""
    q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    H, Hk, Hv = q.shape[0], k.shape[0], v.shape[0]
    if H == Hk == Hv:
        return q, k, v, False
    heads = f"query has {H} heads, key {Hk} and value {Hv}"
    if not gqa:
        raise ValueError(f"{NAME}: {heads}; they must be equal, or enable_gqa=True")
    if not Hk or not Hv or H % Hk or H % Hv:
        raise ValueError(f"{NAME}: {heads}; query's must be a multiple of the others")
    if Hk != Hv:
        return q, k.repeat_interleave(H // Hk, 0), v.repeat_interleave(H // Hv, 0), False
    return q.unflatten(0, (Hk, H // Hk)), k.unsqueeze(1), v.unsqueeze(1), True


def is_nested(*tensors: Any) -> bool:
    return any(isinstance(t, Tensor) and t.is_nested for t in tensors)


def nested_attention(query: Any, key: Any, value: Any, backend: str, others: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    """`scaled_dot_product_attention` of nested tensors (B, H, L*, E); `others` are arguments that it cannot have there.

    The sequences lie packed in a jagged tensor; nothing is copied that the loops do not.
    """
    name = "scaled_dot_product_attention"
    packed: list[Any] = []
    for what, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, Tensor) or not t.is_nested or t.layout is not torch.jagged:
            kind = t.layout if isinstance(t, Tensor) else type(t).__name__
            nested = isinstance(t, Tensor) and t.is_nested
            raise TypeError(
                f"{name}: {what} is {'a nested tensor of layout ' if nested else ''}{kind}; "
                "query, key and value must all be nested tensors of layout torch.jagged, or none"
            )
        if t.dim() != 4 or t._ragged_idx != 2 or t.lengths() is not None:  # type: ignore[attr-defined]
            raise ValueError(
                f"{name}: {what} is nested, of {t.dim()} dimensions; it must be (B, H, L*, E) with no holes, as of "
                "nested.transpose(1, 2)"
            )
        packed.append((t.values().transpose(0, 1), t.offsets()))  # type: ignore[attr-defined]  # (N, H, E)
    for what, given in others.items():
        if given is not None and given is not False:
            raise ValueError(f"{name}: {what} cannot be given with nested tensors")
    (q, rows), (k, columns), (v, of_v) = packed
    if of_v is not columns and (of_v.shape != columns.shape or not torch.equal(of_v, columns)):
        raise ValueError(f"{name}: the nested key and value must have the same lengths")
    o = varlen_attention(q, k, v, rows, columns, backend=backend, **kwargs)
    o, lse = o if kwargs["return_lse"] else (o, None)
    o, lse = (None if t is None else _as_jagged(t, rows).transpose(1, 2) for t in (o, lse))
    return o if lse is None else (o, lse)


def _as_jagged(t: Tensor, offsets: Tensor) -> Any:
    """Rows as a nested tensor."""
    if torch.compiler.is_compiling():
        return torch.nested.nested_tensor_from_jagged(t, offsets)
    return _Jagged.apply(t, offsets)


class _Jagged(torch.autograd.Function):
    """`nested_tensor_from_jagged`, which torch cannot differentiate twice."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, offsets: Tensor) -> Any:
        return torch.nested.nested_tensor_from_jagged(t.detach(), offsets)

    @staticmethod
    def backward(ctx: Any, dy: Any) -> Any:
        return dy.values(), None


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    **kwargs: Any,
) -> Any:
    """One call of the plain form per sequence."""
    from bptoolkit.ops.attention import reference as one

    rows, columns = (c.tolist() for c in (cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k))
    q, k, v = (t.transpose(0, 1) for t in (query, key, value))
    parts = [
        one(q[:, i:i1], k[:, j:j1], v[:, j:j1], None, dropout_p, is_causal, scale, enable_gqa, **kwargs)
        for i, i1, j, j1 in zip(rows, rows[1:], columns, columns[1:])
    ]
    if kwargs.get("return_lse"):
        return tuple(torch.cat(part, 1).transpose(0, 1) for part in zip(*parts))
    return torch.cat(parts, 1).transpose(0, 1)


def case(draw: Draw) -> Case:
    from bptoolkit.ops.attention import extras, sees_all

    B, Hk, E, Ev = draw.choice((1, 2, 3)), draw.size(1, 2), draw.size(), draw.size()
    H = Hk * draw.choice((1, 2))
    lengths = [draw.size() for _ in range(B)]
    same = draw.flag()
    keys = lengths if same else [draw.size() for _ in range(B)]
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).to(draw.device, torch.int32) for n in (lengths, keys))
    q, k, v = draw.tensor(sum(lengths), H, E), draw.tensor(sum(keys), Hk, E), draw.tensor(sum(keys), Hk, Ev)
    kwargs: dict[str, Any] = {"enable_gqa": True} if Hk != H else {}
    kwargs |= {"cu_seqlens_k": cu_k} if not same or draw.flag() else {}
    kwargs |= {"is_causal": True} if draw.flag() else {}
    kwargs |= {"scale": 0.7} if draw.flag() else {}
    if draw.flag():
        kwargs |= extras(draw, 0, H, None)
        if draw.flag() and all(sees_all(kwargs, L, S) for L, S in zip(lengths, keys)):
            kwargs["return_lse"] = True
    return Case((q, k, v, cu_q), kwargs)


def bench(draw: Draw) -> Case:
    lengths = [512, 100, 300, 712, 30, 394]
    cu = torch.tensor([0, *lengths]).cumsum(0).to(draw.device, torch.int32)
    return Case((*(draw.tensor(sum(lengths), 8, 64) for _ in range(3)), cu), {"is_causal": True})


OP = Op(
    name=NAME,
    call=varlen_attention,
    reference=reference,
    rules=(RULE,),
    shapes="query: N H E, key: M Hk E, value: M Hv Ev -> N H Ev",
    source="Vaswani et al. 2017, eq. 1; Dao 2023",
    autocast=LOW,
    case=case,
    bench=bench,
)
OPS = (OP,)
