"""Multi-head attention.

Maths     Q = q Wqᵀ + bq,  K = k Wkᵀ + bk,  V = v Wvᵀ + bv, each split into H heads of d features
          per head  O = softmax(Q Kᵀ/√d + M) V          y = [O_1 … O_H] Woᵀ + bo
          The backward is that of its parts: linear, scaled_dot_product_attention, and, where the weights A = softmax(…) are
          asked for, softmax and Y = A V:     dA = dY Vᵀ        dV = Aᵀ dY
Letters   L queries, S keys, N batch, E = H d features; M the mask, −∞ where hidden; dt is the gradient of the loss by t
Numerics  a query that may see no key gives 0 (before Wo), with gradients 0
Source    Vaswani et al., "Attention is all you need", 2017, §3.2.2
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.op import LOW, Op
from bptoolkit.ops.attention import scaled_dot_product_attention
from bptoolkit.ops.linear import linear
from bptoolkit.ops.softmax import softmax
from bptoolkit.shapes import check_alike, check_floating

NAME = "multi_head_attention_forward"


def product(a, b):
    return a @ b  # *B L S · *B S d -> *B L d


def product_backward(dy, a, b, need):
    return dy @ b.mT if need.a else None, a.mT @ dy if need.b else None


PRODUCT = Rule("product", product, product_backward, inputs="a b", outputs="y", uses={"a": "b", "b": "a"})


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Attention of several heads, as `torch.nn.functional.multi_head_attention_forward`.

    Args:
        query: (L, N, E), or (L, E) unbatched.
        key: (S, N, kdim), or (S, kdim).
        value: (S, N, vdim), or (S, vdim).
        embed_dim_to_check: E.
        num_heads: H, a divisor of E.
        in_proj_weight: (3E, E), the three projections in one, unless use_separate_proj_weight.
        in_proj_bias: (3E,) or None.
        bias_k: (1, 1, E), one more key for every row, or None; with bias_v.
        bias_v: (1, 1, E), its value.
        add_zero_attn: add a key and a value of zeros.
        dropout_p: the share of attention weights zeroed, if training.
        out_proj_weight: (E, E).
        out_proj_bias: (E,) or None.
        training: whether dropout applies.
        key_padding_mask: (N, S) or (S,): boolean, True hides a key; or floating point, added to the scores.
        need_weights: return the attention weights too. Without them no L × S matrix is kept.
        attn_mask: (L, S) or (N·H, L, S): boolean, True hides; or floating point, added to the scores, and differentiable.
        use_separate_proj_weight: use q_proj_weight (E, E), k_proj_weight (E, kdim) and v_proj_weight (E, vdim).
        q_proj_weight, k_proj_weight, v_proj_weight: see there.
        static_k: (N·H, S, E/H), a projected key to use as it is.
        static_v: likewise.
        average_attn_weights: return the mean of the heads' weights.
        is_causal: a hint that attn_mask is the causal one; it needs attn_mask.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (L, N, E) or (L, E); and the weights, (N, L, S) averaged or (N, H, L, S), without N if unbatched, or None.

    Raises:
        ValueError: shapes, heads or devices disagree, is_causal without attn_mask, or the named backend cannot run the call.
        TypeError: the tensors are not of one floating-point dtype.
    """
    _check(query, key, value, embed_dim_to_check, num_heads, attn_mask, key_padding_mask, is_causal)
    batched = query.dim() == 3
    if not batched:
        query, key, value = (t.unsqueeze(1) if t is not None else t for t in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    (L, N, E), H = query.shape, num_heads
    d = E // H
    if use_separate_proj_weight:
        weights: Any = (q_proj_weight, k_proj_weight, v_proj_weight)
    else:
        weights = None
    _check_weights(E, in_proj_weight, weights, bias_k, bias_v, static_k, static_v, dropout_p)
    q, k, v = _project(query, key, value, in_proj_weight, in_proj_bias, weights, backend)
    if bias_k is not None and bias_v is not None:
        k, v = (torch.cat([t, b.to(t.dtype).expand(1, N, E)]) for t, b in ((k, bias_k), (v, bias_v)))
    q = q.reshape(L, N, H, d).permute(1, 2, 0, 3)  # N H L d
    k, v = (  # N H S d
        t.reshape(t.shape[0], N, H, d).permute(1, 2, 0, 3) if fixed is None else fixed.reshape(N, H, -1, d)
        for t, fixed in ((k, static_k), (v, static_v))
    )
    if add_zero_attn:
        k, v = (torch.cat([t, t.new_zeros(N, H, 1, d)], 2) for t in (k, v))
    causal = is_causal and key_padding_mask is None and not need_weights and k.shape[2] == (key.shape[0])
    mask = None if causal else _mask(attn_mask, key_padding_mask, N, H, k.shape[2], q.dtype)
    p = dropout_p if training else 0.0
    if need_weights:
        o, a = _with_weights(q, k, v, mask, p, backend)
    else:
        o, a = scaled_dot_product_attention(q, k, v, mask, p, causal, backend=backend), None
    o = o.permute(2, 0, 1, 3).reshape(L, N, E)
    y = linear(o, out_proj_weight, out_proj_bias, backend=backend)
    if a is not None and average_attn_weights:
        a = a.mean(1)  # N L S
    if not batched:
        return y.squeeze(1), None if a is None else a.squeeze(0)
    return y, a


def _project(q: Tensor, k: Tensor, v: Tensor, w: Any, b: Any, separate: Any, backend: str) -> tuple[Tensor, ...]:
    """Q, K and V: one product where the three inputs are one tensor, or the last two are."""
    E = q.shape[-1]
    if separate is not None:
        bq, bk, bv = (None,) * 3 if b is None else b.chunk(3)
        wq, wk, wv = separate
        return linear(q, wq, bq, backend=backend), linear(k, wk, bk, backend=backend), linear(v, wv, bv, backend=backend)
    if q is k and k is v:
        return linear(q, w, b, backend=backend).chunk(3, -1)
    wq, wkv = w.split([E, 2 * E])
    bq, bkv = (None, None) if b is None else b.split([E, 2 * E])
    if k is v:
        return (linear(q, wq, bq, backend=backend), *linear(k, wkv, bkv, backend=backend).chunk(2, -1))
    (wk, wv), (bk, bv) = wkv.chunk(2), (None, None) if bkv is None else bkv.chunk(2)
    return linear(q, wq, bq, backend=backend), linear(k, wk, bk, backend=backend), linear(v, wv, bv, backend=backend)


def _mask(m: Tensor | None, padding: Tensor | None, N: int, H: int, S: int, dtype: torch.dtype) -> Tensor | None:
    """The two masks as one that scaled_dot_product_attention takes: True takes part, or added to the scores."""
    if m is not None:
        m = m.reshape(N, H, *m.shape[1:]) if m.dim() == 3 else m  # N H L S, or L S
        m = F.pad(m, (0, S - m.shape[-1]))  # keys that were added are seen by all
    if padding is not None:
        padding = F.pad(padding, (0, S - padding.shape[-1]))[:, None, None]  # N 1 1 S
    masks = [t for t in (m, padding) if t is not None]
    if not masks:
        return None
    if all(t.dtype == torch.bool for t in masks):
        return ~(masks[0] if len(masks) == 1 else masks[0] | masks[1])
    added = [
        torch.zeros_like(t, dtype=dtype).masked_fill(t, -math.inf) if t.dtype == torch.bool else t.to(dtype) for t in masks
    ]
    return added[0] if len(added) == 1 else added[0] + added[1]


def _with_weights(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, backend: str) -> tuple[Tensor, Tensor]:
    """O and the weights A: N H L d, N H L S."""
    s = PRODUCT(q * q.shape[-1] ** -0.5, k.mT)  # N H L S
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask
    nothing = (s == -math.inf).all(-1, keepdim=True)  # N H L 1: sees no key; softmax would give NaN
    a = softmax(s.masked_fill(nothing, 0), -1, backend=backend).masked_fill(nothing, 0)
    if p > 0:
        a = F.dropout(a, p)
    return PRODUCT(a.to(v.dtype), v), a  # under autocast softmax may be wider than v


def _check(q: Any, k: Any, v: Any, E: int, H: int, m: Any, padding: Any, is_causal: bool) -> None:
    """Raise for arguments that disagree."""
    for name, t in (("query", q), ("key", k), ("value", v)):
        check_floating(NAME, name, t)
        check_alike(NAME, "query", q, name, t)
        if t.dim() != q.dim() or t.dim() not in (2, 3):
            raise ValueError(
                f"{NAME}: {name} has shape {tuple(t.shape)} and query {tuple(q.shape)}; all need 3 dimensions, or 2 unbatched"
            )
    if q.shape[-1] != E:
        raise ValueError(f"{NAME}: query {tuple(q.shape)} has {q.shape[-1]} features; embed_dim is {E}")
    if H < 1 or E % H:
        raise ValueError(f"{NAME}: embed_dim={E} is not divisible by num_heads={H}")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"{NAME}: key {tuple(k.shape)} and value {tuple(v.shape)} must agree in all but their last dimension")
    N = q.shape[1] if q.dim() == 3 else 1
    if q.dim() == 3 and k.shape[1] != N:
        raise ValueError(f"{NAME}: query {tuple(q.shape)} has a batch of {N} but key {tuple(k.shape)} of {k.shape[1]}")
    L, S = q.shape[0], k.shape[0]
    if is_causal and m is None:
        raise ValueError(f"{NAME}: is_causal=True is a hint about attn_mask, which is None; give the causal mask as well")
    for name, t in (("attn_mask", m), ("key_padding_mask", padding)):
        if t is not None and not (isinstance(t, Tensor) and (t.dtype == torch.bool or t.dtype.is_floating_point)):
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{NAME}: {name} is {got}; it must be boolean or of floating point")
    if m is not None and tuple(m.shape) not in ((L, S), (N * H, L, S)):
        raise ValueError(f"{NAME}: attn_mask has shape {tuple(m.shape)}; it needs {(L, S)} or {(N * H, L, S)}")
    wanted = (N, S) if q.dim() == 3 else (S,)
    if padding is not None and tuple(padding.shape) != wanted:
        raise ValueError(f"{NAME}: key_padding_mask has shape {tuple(padding.shape)}; it needs {wanted}")


def _check_weights(
    E: int, packed: Any, separate: Any, bias_k: Any, bias_v: Any, static_k: Any, static_v: Any, p: float
) -> None:
    """Raise for weights that are missing or do not go together."""
    if separate is not None:
        if any(w is None for w in separate):
            raise ValueError(f"{NAME}: use_separate_proj_weight=True needs q_proj_weight, k_proj_weight and v_proj_weight")
    elif packed is None:
        raise ValueError(f"{NAME}: in_proj_weight is None; only use_separate_proj_weight=True goes without")
    elif packed.shape != (3 * E, E):
        raise ValueError(f"{NAME}: in_proj_weight has shape {tuple(packed.shape)}; it needs {(3 * E, E)}")
    if (bias_k is None) != (bias_v is None):
        raise ValueError(f"{NAME}: {'bias_k' if bias_k is None else 'bias_v'} is None; give bias_k and bias_v, or neither")
    if bias_k is not None and (static_k is not None or static_v is not None):
        raise ValueError(f"{NAME}: bias_k and bias_v cannot be added to static_k or static_v")
    if not 0 <= p <= 1:
        raise ValueError(f"{NAME}: dropout_p={p} must be between 0 and 1")


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with the backward of its parts; same parameters, state_dict and arguments."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        turned = self.batch_first and isinstance(query, Tensor) and query.dim() == 3
        if turned:  # one tensor stays one: it is then projected in one product
            same_qk, same_kv = query is key, key is value
            query = query.transpose(0, 1)
            key = query if same_qk else key.transpose(0, 1)
            value = key if same_kv else value.transpose(0, 1)
        y, a = multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            self.out_proj.weight,
            self.out_proj.bias,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=not self._qkv_same_embed_dim,
            q_proj_weight=self.q_proj_weight,
            k_proj_weight=self.k_proj_weight,
            v_proj_weight=self.v_proj_weight,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
            backend=self.backend,
        )
        return y.transpose(0, 1) if turned else y, a


def reference(*args: Any, need_weights: bool = True, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Torch's own, on its path with weights, which can be differentiated twice."""
    kwargs["need_weights"] = True
    y, a = F.multi_head_attention_forward(*args, **kwargs)
    return y, a if need_weights else None


def case(draw: Draw) -> Case:
    L, S, N, H, d = draw.size(1), draw.size(1), draw.size(1, 3), draw.size(1, 3), draw.size(1, 5)
    E, separate, bias = H * d, draw.flag(), draw.flag()
    I, V = (draw.size(1), draw.size(1)) if separate else (E, E)
    batch = (N,) if draw.flag() else ()
    q, k, v = draw.tensor(L, *batch, E), draw.tensor(S, *batch, I), draw.tensor(S, *batch, V)
    w = [draw.tensor(E, n, scale=n**-0.5) for n in (E, I, V)] if separate else [None] * 3
    packed = None if separate else draw.tensor(3 * E, E, scale=E**-0.5)
    b, extra = draw.tensor(3 * E) if bias else None, [draw.tensor(1, 1, E) if draw.flag() else None for _ in range(1)] * 2
    kwargs: dict[str, Any] = dict(zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), w))
    kwargs |= {"use_separate_proj_weight": separate, "need_weights": draw.flag(), "average_attn_weights": draw.flag()}
    hidden = draw.choice((None, "bool", "float"))
    if hidden == "bool":  # the first key stays in sight
        kwargs["attn_mask"] = draw.booleans(L, S) & (torch.arange(S, device=draw.device) > 0)
    elif hidden == "float":
        kwargs["attn_mask"] = draw.tensor(*(((N if batch else 1) * H,) if draw.flag() else ()), L, S)
    if draw.flag():
        padding = torch.zeros(*batch, S, dtype=torch.bool, device=draw.device)
        padding[..., 1:] = draw.flag()
        kwargs["key_padding_mask"] = padding if hidden != "float" else torch.zeros_like(padding, dtype=draw.dtype)
    args = (q, k, v, E, H, packed, b, *extra, draw.flag(), 0.0, draw.tensor(E, E, scale=E**-0.5), draw.tensor(E))
    return Case(args, kwargs)


def bench(draw: Draw) -> Case:
    x, E = draw.tensor(256, 8, 256), 256
    weights = draw.tensor(3 * E, E, scale=E**-0.5), draw.tensor(3 * E)
    args = (x, x, x, E, 8, *weights, None, None, False, 0.0, draw.tensor(E, E, scale=E**-0.5), draw.tensor(E))
    return Case(args, {"need_weights": False})


OP = Op(
    name=NAME,
    call=multi_head_attention_forward,
    reference=reference,
    peer=F.multi_head_attention_forward,
    rules=(PRODUCT,),
    module=(MultiheadAttention,),
    replaces=(nn.MultiheadAttention,),
    shapes="query: L N E, key: S N K, value: S N V -> L N E, N L S",
    source="Vaswani et al. 2017, §3.2.2",
    autocast=LOW,
    case=case,
    bench=bench,
)
OPS = (OP,)
