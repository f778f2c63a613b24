"""The rule of attention: what `bptoolkit.ops.attention` and `bptoolkit.ops.attention_varlen` both run.

Maths     R = σ Q Kᵀ      S = c tanh(R/c) + M − h|i + s − j|      P = softmax of S's rows      O = (P∘Z) V
          lse = log Σⱼ exp Sᵢⱼ
          D = rowsum(dO∘O) − dlse      X = Z∘(dO Vᵀ) − D      dS = P∘X      τ = tanh(R/c)      dR = dS∘(1 − τ²)
          dQ = σ dR K      dK = σ dRᵀ Q      dV = (P∘Z)ᵀ dO      dM = dS, summed over what M was broadcast over
          dh = −Σ dS∘|i + s − j|
Twice     at cotangents a, b, c, e, f of dQ, dK, dV, dM, dh, without a cap:
          U = σ (a Kᵀ + Q bᵀ) + e − f|i + s − j|      C = dO cᵀ
          u = rowsum(P∘U)      w = rowsum(P∘(U∘X + Z∘C))
          g_dO = (P∘Z∘U) V + (P∘Z) c − u O      g_dlse = u
          W = P∘((U − u)∘X + Z∘C − (w − u dlse))
          gQ = σ (W K + dS b)      gK = σ (Wᵀ Q + dSᵀ a)      gV = (P∘Z∘(U − u))ᵀ dO
          gM = W, summed      gh = −Σ W∘|i + s − j|
          With a cap, A = σ (a Kᵀ + Q bᵀ) enters U as A∘(1 − τ²), and in gQ and gK stand for W and dS
          W∘(1 − τ²) − (2/c) dS∘A∘τ∘(1 − τ²)      and      dS∘(1 − τ²)
Letters   *B batch and heads; L queries, rows i; S keys, columns j; E, Ev features; M the additive mask (−inf where a boolean
          mask, a causal one, a window or a length hides); c the cap of the scores, without one S = R + ...; h the slopes of
          ALiBi; s is 0, or S − L where the last query stands at the last key; Z the dropout factor, 0 or 1/(1 − p);
          k and v have one head where a group of q's, its last batch dimension, shares it;
          ∘ elementwise; kept are o, a row's largest score (top) and l = Σⱼ exp(Sᵢⱼ − topᵢ)
Numerics  scores, O's sums and lse in float32 for half inputs; a row that sees nothing gives 0 and gradients 0, its lse is −inf
Source    Vaswani et al. 2017, eq. 1; the backward by tiles: Dao et al. 2022 (FlashAttention), algorithm 4; windows: Beltagy et
          al. 2020 (Longformer), section 3.1; the cap: Gemma Team 2024 (Gemma 2), section 2; slopes: Press et al. 2022, section
          3; the second order is derived in docs/attention.md

No pass keeps an L × S matrix: forward, backward and the backward's backward are loops over tiles (`attention_blocks.py`), or
over sequences and tiles (`attention_packed.py`). `attention_plain.py` says the same in whole matrices; third derivatives and
reverse over forward mode are autograd's of it.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor

from bptoolkit.function import Rule
from bptoolkit.opaque import Opaque
from bptoolkit.ops import attention_blocks as blocks
from bptoolkit.ops import attention_packed as packed
from bptoolkit.ops import attention_plain as plain
from bptoolkit.ops.attention_plain import nothing
from bptoolkit.ops.attention_tiles import Terms, wide
from bptoolkit.transforms import _legacy_batched, _transforms_active

# The three loops, as nodes of a graph --------------------------------------------------------------------------------------


def _forward_fast(q, k, v, m, slopes, lengths, seed, cu_q, cu_k, window, scale, cap, p):
    terms = Terms(m, slopes, lengths, seed, window, scale, cap, p)
    return blocks.forward(q, k, v, terms) if cu_q is None else packed.forward(q, k, v, cu_q, cu_k, terms)


def _forward_fake(q, k, v, m, slopes, lengths, seed, cu_q, cu_k, window, scale, cap, p):
    row = q.new_empty(q.shape[:-1], dtype=wide(q.dtype))
    return q.new_empty((*q.shape[:-1], v.shape[-1])), row, torch.empty_like(row), torch.empty_like(row)


ATTEND = Opaque("attention", plain.forward, _forward_fake, vmap="leading", fast=_forward_fast)


def _of_groups(backward):
    """backward at k and v that a group of heads may share: their gradients are sums over it."""

    @wraps(backward)
    def run(do, dlse, q, k, v, *rest):
        dq, dk, dv, *others = backward(do, dlse, q, shared(k, q), shared(v, q), *rest)
        need = rest[-1]
        return dq, summed(dk, k, "k" in need), summed(dv, k, "v" in need), *others

    return run


def _backward_fast(do, dlse, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, o, top, l, window, scale, cap, p, need):
    terms = Terms(m, slopes, lengths, seed, window, scale, cap, p)
    if cu_q is None:
        grads = blocks.backward(do, dlse, q, k, v, o, top, l, terms, need)
    else:
        grads = packed.backward(do, dlse, q, k, v, o, top, l, cu_q, cu_k, terms, need)
    return tuple(nothing(q) if g is None else g for g in grads)


def _backward_fake(do, dlse, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, o, top, l, window, scale, cap, p, need):
    like = {"q": (q.shape, q), "k": (k.shape, q), "v": ((*k.shape[:-1], do.shape[-1]), q)}
    like |= {x: (t.shape, t) for x, t in (("m", m), ("s", slopes)) if t is not None}
    return tuple(q.new_empty(like[x][0], dtype=like[x][1].dtype) if x in need else nothing(q) for x in "qkvms")


def _double_plain(a, b, c, e, f, wanted, args):
    do, dlse, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, _, _, _, window, scale, cap, p, _ = args
    K, V, b, c = (shared(t, q) for t in (k, v, b, c))
    terms = Terms(m, slopes, lengths, seed, window, scale, cap, p)
    grads = plain.double_backward(a, b, c, e, f, do, dlse, q, K, V, cu_q, cu_k, terms, wanted)
    return _summed_twice(grads, k)


def double_fast(a, b, c, e, f, wanted, args):
    """The vjp of backward by tiles, at the cotangents a ... f. `wanted`: "o" for do, "l" for dlse, and letters of "qkvms"."""
    do, dlse, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, o, top, l, window, scale, cap, p, _ = args
    K, V, b, c = (shared(t, q) for t in (k, v, b, c))
    terms = Terms(m, slopes, lengths, seed, window, scale, cap, p)
    if cu_q is None:
        grads = blocks.double_backward(a, b, c, e, f, do, dlse, q, K, V, o, top, l, terms, wanted)
    else:
        grads = packed.double_backward(a, b, c, e, f, do, dlse, q, K, V, o, top, l, cu_q, cu_k, terms, wanted)
    return _summed_twice(grads, k)


def _summed_twice(grads, k):
    gdo, gdlse, gq, gk, gv, *others = grads
    return gdo, gdlse, gq, summed(gk, k, gk is not None), summed(gv, k, gv is not None), *others


def backward_node(name: str, fast: Any, double: Any) -> Opaque:
    """backward as a node that can be differentiated again, pushed forward and batched.

    Args:
        name: of the operator.
        fast: what it runs, with the parameters of `plain.backward`.
        double: what its vjp runs, with those of `double_fast`; only on plain tensors, of which nothing is differentiated again.
    """

    def vjp(cotangents: Any, need: Any, *args: Any) -> list[Any]:
        """`need`: do, dlse, q, k, v, m, slopes, and what has none: integers; the hints o, top, l."""
        a, b, c, e, f = cotangents = [g if x in args[-1] else None for g, x in zip(cotangents, "qkvms")]
        wanted = "".join(x for x, n in zip("olqkvms", need) if n)
        if all(g is None for g in cotangents):
            return [None if not n else torch.zeros_like(t) for n, t in zip(need, args)]
        if _transforms_active() or _legacy_batched((*cotangents, *args)):
            return [*_double_plain(a, b, c, e, f, wanted, args), *(None,) * 7]
        with torch.no_grad():
            return [*double(a, b, c, e, f, wanted, args), *(None,) * 7]

    def jvp(tangents: Any, *args: Any) -> tuple[Tensor, ...]:
        """Linear in do and dlse; in the other inputs its Jacobian is a Hessian, hence its own transpose."""
        ddo, ddlse, *others = tangents[:7]
        do, q, asked = args[0], args[2], args[-1]
        asked_of = [x in asked for x in "qkvms"]
        out: list[Any] = [None] * 5
        if ddo is not None or ddlse is not None:
            linear = node(torch.zeros_like(do) if ddo is None else ddo, ddlse, *args[2:])
            out = [t if n else None for t, n in zip(linear, asked_of)]
        if any(t is not None for t in others):
            need = [False, False, *asked_of, *(False,) * 7]
            second = node.vjp(others, need, *args[:-1], "qkvms")[2:7]
            out = [x if y is None else y if x is None else x + y for x, y in zip(out, second)]
        return tuple(torch.zeros_like(nothing(q)) if t is None else t for t in out)

    node = Opaque(name, _of_groups(plain.backward), _backward_fake, vmap="leading", vjp=vjp, jvp=jvp, fast=fast)
    return node


BACKWARD = backward_node("attention_backward", _of_groups(_backward_fast), double_fast)


# The rule ------------------------------------------------------------------------------------------------------------------


def forward(q, k, v, m, slopes, lengths, seed, cu_q, cu_k, window, scale, cap, p):
    return ATTEND(q, shared(k, q), shared(v, q), m, slopes, lengths, seed, cu_q, cu_k, window, scale, cap, p)


def backward(do, dlse, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, o, top, l, window, scale, cap, p, need):
    return run_backward(
        BACKWARD, do, dlse, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, o, top, l, window, scale, cap, p, need
    )


def run_backward(node, do, dlse, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, o, top, l, window, scale, cap, p, need):
    asked = "".join(x for x, n in zip("qkvms", need) if n)
    if do is None:  # only lse was used, which does not depend on v
        if v is None:
            return (None,) * 9
        do = q.new_zeros((*q.shape[:-1], v.shape[-1]))
    # o, top and l tell the tiles what they need not recompute; how they depend on the inputs is inside the formulas
    o = None if o is None else o.detach()
    grads = node(do, dlse, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, o, top, l, window, scale, cap, p, asked)
    return *(g if n else None for g, n in zip(grads, need)), None, None, None, None


def push(tangents, do, dlse, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, o, top, l, window, scale, cap, p, need):
    args = do, dlse, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, o, top, l, window, scale, cap, p
    return push_by(BACKWARD, tangents, args, need)


def push_by(node, tangents, args, need):
    """The tangents of o and lse. backward is linear in do and dlse, with matrix Jᵀ; its vjp by them is J, wherever they are."""
    asked = "".join(x for x, n in zip("qkvms", need) if n)
    return node.vjp(tangents[:5], [True, True, *(False,) * 12], *args, asked)[:2]


def shared(t: Any, q: Tensor) -> Any:
    """k or v, of which a group of heads may share one, with the batch dimensions of q."""
    return t if t is None or t.shape[:-2] == q.shape[:-2] else t.expand(*q.shape[:-2], *t.shape[-2:])


def summed(g: Any, k: Tensor, there: bool) -> Any:
    """The gradient of k or v, summed over the group that shares it; `there`: it was asked for."""
    return g.sum(-3, keepdim=True) if there and g.shape[:-2] != k.shape[:-2] else g


def _kernel():
    from bptoolkit.triton_kernels.attention_double import KERNEL

    return KERNEL


STATED: dict[str, Any] = {
    "inputs": "q k v m slopes lengths seed cu_q cu_k",
    "outputs": "o lse top l",
    "constants": "top l",
    "push": push,
    "uses": {"v": "q k m slopes lengths seed cu_q cu_k top l"},
}
RULE = Rule("attention", forward, backward, **STATED, kernel=_kernel)
PACKED_RULE = Rule("packed_attention", forward, backward, **STATED, kernel=_kernel)
