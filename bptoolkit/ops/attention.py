"""Scaled dot-product attention, with windows, a cap of the scores, ALiBi's slopes and lengths of the keys.

Maths     O = softmax(c tanh(σ Q Kᵀ / c) + M − h|distance|) V; the rule and its derivatives are in `attention_rule.py`
Letters   *B batch and heads, the last of them H; L queries; S keys; E, Ev features; σ the scale; M the mask; c the cap of the
          scores; h ALiBi's slopes
Numerics  scores, sums and lse in float32 for half inputs; a row that sees nothing gives 0 and gradients 0
Source    Vaswani et al. 2017, eq. 1; Dao et al. 2022 (FlashAttention)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bptoolkit.cases import Case, Draw
from bptoolkit.op import LOW, Op
from bptoolkit.ops import attention_options as options
from bptoolkit.ops.attention_rule import RULE
from bptoolkit.ops.attention_varlen import is_nested, nested_attention

NAME = "scaled_dot_product_attention"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0,  # 0 and not 0.0, which Dynamo would make a symbol and compile for twice
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: int | tuple[int, int] | None = None,
    causal_align: str = "top_left",
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    key_lengths: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """O = softmax(σ Q Kᵀ + M) V, as `torch.nn.functional.scaled_dot_product_attention`, with memory linear in the length.

    Unlike torch's it can be differentiated twice, in forward mode and by vmap without the L × S matrices.

    Args:
        query: (*B, L, E), floating point.
        key: (*B, S, E). The batch dimensions *B of the three are broadcast.
        value: (*B, S, Ev).
        attn_mask: broadcastable to (*B, L, S), or None. Boolean: True takes part. Floating point, of query's dtype or float32:
            added to the scores, and differentiable.
        dropout_p: the share of probabilities set to 0; the others are divided by 1 - dropout_p. Applied whenever it is not 0.
            A seed is drawn per call from torch's generator; every pass makes the same mask again from it.
        is_causal: query i sees the keys 0 ... i; not together with attn_mask.
        scale: σ; E ** -0.5 by default.
        enable_gqa: key and value may have fewer heads (dimension -3) than query; each serves a group of query's heads.
        window: (left, right): query i sees the keys i - left ... i + right alone; -1 for no bound; one number stands for both.
            With is_causal the right bound is 0. Tiles outside are skipped: the cost grows with L times the window.
        causal_align: where L and S differ: "top_left", query 0 stands at key 0, as torch has it; or "bottom_right", the last
            query stands at the last key, as in decoding with a cache. For is_causal, window and alibi_slopes.
        softcap: c > 0: the scores σ Q Kᵀ become c tanh(σ Q Kᵀ / c), before masks and slopes.
        alibi_slopes: (H,) or (*B, H): the head's slope times the distance |i - j| is taken from the scores. Of query's dtype or
            float32, and differentiable. See `alibi_slopes` for the usual ones.
        key_lengths: (B,), integers, for query's first dimension: keys from that number on are padding and seen by nobody.
        return_lse: return the log-sum-exp of each row's scores as well; it is differentiable.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B, L, Ev), of query's dtype. Where a query may see no key: 0, with gradients 0. With return_lse a tuple of it and
        (*B, L), float32 for half inputs, -inf where a query sees no key. A nested tensor for nested tensors.

    Raises:
        ValueError: shapes, heads or devices disagree, both attn_mask and is_causal are given, an option is out of its range, or
            the named backend cannot run the call.
        TypeError: the tensors are not of one floating-point dtype, or the mask, slopes, lengths or window are not of a dtype
            or type that they can have.
    """
    if is_nested(query, key, value):
        left_out = {"attn_mask": attn_mask, "key_lengths": key_lengths}
        given: dict[str, Any] = {
            "dropout_p": dropout_p,
            "is_causal": is_causal,
            "scale": scale,
            "enable_gqa": enable_gqa,
            "window": window,
        }
        given |= {"causal_align": causal_align, "softcap": softcap, "alibi_slopes": alibi_slopes, "return_lse": return_lse}
        return nested_attention(query, key, value, backend, left_out, given)
    q, k, v, m = OP.cast(query, key, value, attn_mask)
    OP.check(q, k, v)
    p = options.read_dropout(NAME, dropout_p)
    options.check_mask(NAME, q, m, is_causal)
    bounds = options.read_window(NAME, window, is_causal, causal_align, alibi_slopes is not None)
    q, k, v, m, groups = _lay_out(q, k, v, m, enable_gqa)
    slopes, lengths = alibi_slopes, key_lengths
    if slopes is not None or lengths is not None:
        slopes = options.lay_out_slopes(NAME, slopes, q, groups)
        lengths = options.lay_out_lengths(NAME, lengths, q, groups)
    cap, seed = options.read_cap(NAME, softcap), options.draw_seed(p, q)
    picked = OP.pick(RULE, backend, q, k, v, m, slopes, lengths, None, None, None, bounds, scale, cap, p)
    o, lse, _, _ = RULE(q, k, v, m, slopes, lengths, seed, None, None, bounds, scale, cap, p, backend=picked)
    o = o.flatten(-4, -3) if groups else o
    return (o, lse.flatten(-3, -2) if groups else lse) if return_lse else o


def _lay_out(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None, gqa: bool) -> tuple[Any, Any, Any, Any, bool]:
    """Views with the same batch dimensions, and of the mask with as many; whether the heads are split into groups."""
    groups = gqa and not q.shape[-3:-2] == k.shape[-3:-2] == v.shape[-3:-2]
    name = NAME
    shapes = f"query is {tuple(q.shape)}, key {tuple(k.shape)}, value {tuple(v.shape)}"
    if groups:
        if min(q.dim(), k.dim(), v.dim()) < 3:
            raise ValueError(f"{name}: enable_gqa=True needs heads in dimension -3, but {shapes}")
        H, Hk, Hv = q.shape[-3], k.shape[-3], v.shape[-3]
        if not Hk or not Hv or H % Hk or H % Hv:
            raise ValueError(f"{name}: {H} heads of query are no multiple of the {Hk} of key and {Hv} of value; {shapes}")
        if Hk != Hv:
            k, v, groups = k.repeat_interleave(H // Hk, -3), v.repeat_interleave(H // Hv, -3), False
        else:
            q, k, v = q.unflatten(-3, (Hk, H // Hk)), k.unsqueeze(-3), v.unsqueeze(-3)
    if q.shape[:-2] != k.shape[:-2] or q.shape[:-2] != v.shape[:-2]:
        try:
            B = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
        except RuntimeError:
            raise ValueError(f"{name}: the batch dimensions cannot be broadcast: {shapes}") from None
        shared = (*B[:-1], 1) if groups else B
        q, k, v = (t.expand(*b, *t.shape[-2:]) for t, b in ((q, B), (k, shared), (v, shared)))
    if m is not None:
        want = (*(q.flatten(-4, -3) if groups else q).shape[:-1], k.shape[-2])
        if m.dim() > len(want) or any(s != 1 and s != w for s, w in zip(reversed(m.shape), reversed(want))):
            raise ValueError(f"{name}: attn_mask is {tuple(m.shape)}; it must broadcast to the scores {want}")
        m = m[(None,) * (len(want) - m.dim())]
        if groups:
            m = m.unsqueeze(-3) if m.shape[-3] == 1 else m.unflatten(-3, q.shape[-4:-2])
    return q, k, v, m, groups


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: int | tuple[int, int] | None = None,
    causal_align: str = "top_left",
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    key_lengths: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """The op of torch, by its plain form: the fused ones cannot be differentiated twice. What it lacks, in whole matrices."""
    if (window, causal_align, softcap, alibi_slopes, key_lengths, return_lse) == (None, "top_left", None, None, None, False):
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
    q, k, v = (t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in (query, key, value))
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    s = q @ k.mT * (max(q.shape[-1], 1) ** -0.5 if scale is None else scale)
    if softcap is not None:
        s = (s / softcap).tanh() * softcap
    L, S = s.shape[-2:]
    d = torch.arange(S, device=s.device) - torch.arange(L, device=s.device)[:, None]
    d = d - (S - L if causal_align == "bottom_right" else 0)  # L S: from the query to the key
    if alibi_slopes is not None:
        s = s - alibi_slopes[..., None, None] * d.abs()
    left, right = window if isinstance(window, tuple) else (-1 if window is None else window,) * 2
    right = 0 if is_causal else right
    seen = torch.ones_like(d, dtype=torch.bool)
    for bound, side in ((left, -d), (right, d)):
        seen = seen & (side <= bound) if bound >= 0 else seen
    if key_lengths is not None:
        seen = seen & (torch.arange(S, device=s.device) < key_lengths.view(-1, *(1,) * (s.dim() - 1)))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        seen = seen & attn_mask
    elif attn_mask is not None:
        s = s + attn_mask
    s = s.masked_fill(~seen, -math.inf)
    void = s.detach().isneginf().all(-1, keepdim=True)
    s = s.masked_fill(void, 0)
    a = F.dropout(s.softmax(-1).masked_fill(void, 0), dropout_p)
    o = (a @ v).to(query.dtype)
    return (o, s.logsumexp(-1).masked_fill(void.squeeze(-1), -math.inf)) if return_lse else o


def case(draw: Draw) -> Case:
    B, H, L, S, E, Ev = draw.batch(1), draw.size(1, 2), draw.size(), draw.size(), draw.size(), draw.size()
    grouped = draw.flag()
    G = draw.choice((1, 2)) if grouped else 1
    q, k, v = draw.tensor(*B, H * G, L, E), draw.tensor(*B, H, S, E), draw.tensor(*B, H, S, Ev)
    kwargs: dict[str, Any] = {"enable_gqa": True} if grouped else {}
    if draw.flag():
        kwargs["scale"] = 0.7
    kind = draw.choice(("none", "causal", "boolean", "additive"))
    over = [*(draw.choice((1, b)) for b in (*B, H * G)), draw.choice((1, L)), S][draw.choice((0, -2)) :]
    if kind == "causal":
        kwargs["is_causal"] = True
    elif kind == "boolean":
        kwargs["attn_mask"] = draw.booleans(*over, share=0.7)
    elif kind == "additive":
        kwargs["attn_mask"] = draw.tensor(*over)
    if draw.flag():
        kwargs.update(extras(draw, S, H * G, B[0] if B else None))
        kwargs["return_lse"] = draw.choice((False, False, True)) and kind != "boolean" and sees_all(kwargs, L, S)
    return Case((q, k, v), kwargs)


def extras(draw: Draw, S: int, H: int, B: int | None) -> dict[str, Any]:
    """Some of the options that torch lacks."""
    third, out = (True, False, False), {}
    if draw.choice(third):
        out["window"] = draw.choice((0, 2, (1, -1), (3, 1), (-1, 2)))
    if draw.choice(third):
        out["softcap"] = draw.choice((1.5, 20.0))
    if draw.choice(third):
        out["alibi_slopes"] = draw.tensor(H, scale=0.3)
    if draw.choice(third):
        out["causal_align"] = "bottom_right"
    if B is not None and draw.choice(third):
        out["key_lengths"] = draw.integers(0, S + 2, B)
    return out


def sees_all(kwargs: dict[str, Any], L: int, S: int) -> bool:
    """Whether every row sees a key; else its lse is -inf, with which no loss of the checks is finite."""
    return S > 0 and "key_lengths" not in kwargs and (L <= S or not {"window", "causal_align"} & kwargs.keys())


def bench(causal: bool, *shape: int) -> Any:
    """The benchmark at one shape: B H L E."""
    return lambda draw: Case(tuple(draw.tensor(*shape) for _ in range(3)), {"is_causal": causal})


OP = Op(
    name="scaled_dot_product_attention",
    call=scaled_dot_product_attention,
    reference=reference,
    peer=F.scaled_dot_product_attention,
    rules=(RULE,),
    shapes="query: *B L E, key: *B S E, value: *B S Ev -> *B L Ev",
    source="Vaswani et al. 2017, eq. 1; Dao et al. 2022, algorithm 4",
    autocast=LOW,
    case=case,
    bench={
        "full": bench(False, 4, 8, 512, 64),
        "causal": bench(True, 4, 8, 512, 64),
        "long": bench(False, 1, 4, 2048, 64),
        "long causal": bench(True, 1, 4, 2048, 64),
    },
)
OPS = (OP,)
