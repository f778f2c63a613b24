"""Scaled dot-product attention.

Maths     S = σ Q Kᵀ + M      P = softmax of S's rows      O = (P∘Z) V      lse = log Σⱼ exp Sᵢⱼ
          D = rowsum(dO∘O) − dlse      X = Z∘(dO Vᵀ) − D      dS = P∘X
          dQ = σ dS K      dK = σ dSᵀ Q      dV = (P∘Z)ᵀ dO      dM = dS, summed over what M was broadcast over
Twice     at cotangents a, b, c, e of dQ, dK, dV, dM:      U = σ (a Kᵀ + Q bᵀ) + e      C = dO cᵀ
          u = rowsum(P∘U)      w = rowsum(P∘(U∘X + Z∘C))
          g_dO = (P∘Z∘U) V + (P∘Z) c − u O      g_dlse = u
          W = P∘((U − u)∘X + Z∘C − (w − u dlse))
          gQ = σ (W K + dS b)      gK = σ (Wᵀ Q + dSᵀ a)      gV = (P∘Z∘(U − u))ᵀ dO      gM = W, summed
Letters   *B batch and heads; L queries, rows i; S keys, columns j; E, Ev features; M the additive mask (−inf where a boolean or
          causal mask hides); Z the dropout factor, 0 or 1/(1 − p); ∘ elementwise; kept
          are o, a row's largest score (top) and l = Σⱼ exp(Sᵢⱼ − topᵢ)
Numerics  scores, O's sums and lse in float32 for half inputs; a row that is masked out wholly gives 0 and gradients 0
Source    Vaswani et al. 2017, eq. 1; the backward by tiles: Dao et al. 2022 (FlashAttention), algorithm 4; the second order is
          derived in docs/attention.md

No pass keeps an L × S matrix: forward, backward and the backward's backward are loops over tiles (`attention_blocks.py`).
`attention_plain.py` says the same in whole matrices; third derivatives and reverse over forward mode are autograd's of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule, _transforms_active
from bptoolkit.op import LOW, Op
from bptoolkit.opaque import Opaque, _legacy_batched
from bptoolkit.ops import attention_blocks as blocks
from bptoolkit.ops import attention_plain as plain
from bptoolkit.ops.attention_plain import nothing
from bptoolkit.ops.attention_tiles import wide

# The three loops, as nodes of a graph --------------------------------------------------------------------------------------


def _forward_fake(q, k, v, m, seed, causal, scale, p):
    row = q.new_empty(q.shape[:-1], dtype=wide(q.dtype))
    return q.new_empty((*q.shape[:-1], v.shape[-1])), row, torch.empty_like(row), torch.empty_like(row)


ATTEND = Opaque("attention", plain.forward, _forward_fake, vmap="leading", fast=blocks.forward)


def _backward_fast(do, dlse, q, k, v, m, seed, o, top, l, causal, scale, p, need):
    grads = blocks.backward(do, dlse, q, k, v, m, seed, o, top, l, causal, scale, p, need)
    return tuple(nothing(q) if g is None else g for g in grads)


def _backward_fake(do, dlse, q, k, v, m, seed, o, top, l, causal, scale, p, need):
    shapes = {"q": q.shape, "k": k.shape, "v": (*k.shape[:-1], do.shape[-1]), "m": None if m is None else m.shape}
    return tuple(q.new_empty(shapes[x], dtype=m.dtype if x == "m" else q.dtype) if x in need else nothing(q) for x in "qkvm")


def _double(cotangents, need, *args):
    """The vjp of backward. `need`: do, dlse, q, k, v, m, seed, o, top, l; the last four are hints and get nothing."""
    asked = args[-1]
    a, b, c, e = (g if x in asked else None for g, x in zip(cotangents, "qkvm"))
    wanted = "".join(x for x, n in zip("olqkvm", need) if n)
    if all(g is None for g in (a, b, c, e)):
        return [None if not n else torch.zeros_like(t) for n, t in zip(need, args)]
    if _transforms_active() or _legacy_batched((*cotangents, *args)):
        grads = plain.double_backward(a, b, c, e, *args[:-1], wanted)
    else:
        with torch.no_grad():
            grads = blocks.double_backward(a, b, c, e, *args[:-1], wanted)
    return [*grads, None, None, None, None]


def _push(tangents, *args):
    """The jvp of backward: linear in do and dlse; in q, k, v, m its Jacobian is a Hessian, hence its own transpose."""
    ddo, ddlse, dq, dk, dv, dm = tangents[:6]
    do, q, asked = args[0], args[2], args[-1]
    asked_of = [x in asked for x in "qkvm"]
    out = [None] * 4
    if ddo is not None or ddlse is not None:
        first = BACKWARD(torch.zeros_like(do) if ddo is None else ddo, ddlse, *args[2:])
        out = [t if n else None for t, n in zip(first, asked_of)]
    if any(t is not None for t in (dq, dk, dv, dm)):
        need = [False, False, *asked_of, False, False, False, False]
        second = BACKWARD.vjp((dq, dk, dv, dm), need, *args[:-1], "qkvm")[2:6]
        out = [x if y is None else y if x is None else x + y for x, y in zip(out, second)]
    return tuple(torch.zeros_like(nothing(q)) if t is None else t for t in out)


BACKWARD = Opaque(
    "attention_backward", plain.backward, _backward_fake, vmap="leading", vjp=_double, jvp=_push, fast=_backward_fast
)


# The rule ------------------------------------------------------------------------------------------------------------------


def forward(q, k, v, m, seed, causal, scale, p):
    return ATTEND(q, k, v, m, seed, causal, scale, p)


def backward(do, dlse, q, k, v, m, seed, o, top, l, causal, scale, p, need):
    asked = "".join(x for x, n in zip("qkvm", need) if n)
    if do is None:  # only lse was used, which does not depend on v
        if v is None:
            return None, None, None, None, None
        do = q.new_zeros((*q.shape[:-1], v.shape[-1]))
    # o, top and l tell the tiles what they need not recompute; how they depend on q, k, v, m is inside the formulas
    o = None if o is None else o.detach()
    grads = BACKWARD(do, dlse, q, k, v, m, seed, o, top, l, causal, scale, p, asked)
    return *(g if n else None for g, n in zip(grads, need)), None


RULE = Rule(
    "attention",
    forward,
    backward,
    inputs="q k v m seed",
    outputs="o lse top l",
    constants="top l",
    uses={"v": "q k m seed top l"},
)


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
    backend: str = "auto",
) -> Tensor:
    """O = softmax(σ Q Kᵀ + M) V, as `torch.nn.functional.scaled_dot_product_attention`, with memory linear in the length.

    Unlike torch's it can be differentiated twice, in forward mode and by vmap without the L × S matrices.

    Args:
        query: (*B, L, E), floating point.
        key: (*B, S, E). The batch dimensions *B of the three are broadcast.
        value: (*B, S, Ev).
        attn_mask: broadcastable to (*B, L, S), or None. Boolean: True takes part. Floating point, of query's dtype or float32:
            added to the scores, and differentiable.
        dropout_p: the share of probabilities set to 0; the others are divided by 1 - dropout_p. Applied whenever it is not 0.
            One number is drawn per call from the CPU's generator; every pass makes the same mask again from it.
        is_causal: query i sees the keys 0 ... i; not together with attn_mask.
        scale: σ; E ** -0.5 by default.
        enable_gqa: key and value may have fewer heads (dimension -3) than query; each serves a group of query's heads.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B, L, Ev), of query's dtype. Where a query may see no key: 0, with gradients 0.

    Raises:
        ValueError: shapes, heads or devices disagree, both attn_mask and is_causal are given, dropout_p is not in [0, 1], or
            the named backend cannot run the call.
        TypeError: the tensors are not of one floating-point dtype, or the mask is neither boolean nor of such a dtype.
    """
    q, k, v, m = OP.cast(query, key, value, attn_mask)
    OP.check(q, k, v)
    p = 0.0 if dropout_p == 0 else float(dropout_p)
    _check(q, k, m, p, is_causal)
    q, k, v, m, groups = _lay_out(q, k, v, m, enable_gqa)
    # int64 on the CPU: reading it back is no synchronisation
    seed = torch.randint(0, 1 << 62, (), dtype=torch.int64, device="cpu") if p > 0 else None
    picked = OP.pick(RULE, backend, q, k, v, m, None, is_causal, scale, p)
    o = RULE(q, k, v, m, seed, is_causal, scale, p, backend=picked)[0]
    return o.flatten(-4, -3) if groups else o


def _check(q: Tensor, k: Tensor, m: Any, p: float, causal: bool) -> None:
    """Raise for a mask or option that cannot be."""
    name = "scaled_dot_product_attention"
    if not 0 <= p <= 1:
        raise ValueError(f"{name}: dropout_p={p} must be between 0 and 1")
    if m is None:
        return
    if not isinstance(m, Tensor):
        raise TypeError(f"{name}: attn_mask must be a tensor or None, not {type(m).__name__}")
    if causal:
        raise ValueError(f"{name}: attn_mask and is_causal=True cannot both be given; put the causal part into the mask")
    if m.dtype not in (torch.bool, q.dtype, wide(q.dtype)):
        raise TypeError(
            f"{name}: attn_mask is {m.dtype}; it must be torch.bool, or query's {q.dtype}, to be added to the scores"
        )
    if m.device != q.device:
        raise ValueError(f"{name}: attn_mask is on {m.device} but query is on {q.device}; they must be on one device")


def _lay_out(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None, gqa: bool) -> tuple[Any, Any, Any, Any, bool]:
    """Views with the same batch dimensions, and of the mask with as many; whether the heads are split into groups."""
    groups = gqa and not q.shape[-3:-2] == k.shape[-3:-2] == v.shape[-3:-2]
    name = "scaled_dot_product_attention"
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
        q, k, v = (t.expand(*B, *t.shape[-2:]) for t in (q, k, v))
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
) -> Tensor:
    """The op of torch, by its plain form: the fused ones cannot be differentiated twice."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )


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
    return Case((q, k, v), kwargs)


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
