"""Linear attention.

Maths     F = φ(Q), G = φ(K)      N_i = Σⱼ (F_i·G_j) V_j      z_i = Σⱼ F_i·G_j + ε      O = N / z, or N if not normalised
          the sums over all j, or j ≤ i if causal; with V′ = [V 1], N′ = [N z] is one product T(F, G, V′) = mask(F Gᵀ) V′
          dN = dO / z      dz = −(dO·O) / z      dN′ = [dN dz]
          dF_i = Σ_{j≤i} (dN′_i·V′_j) G_j      dG_j = Σ_{i≥j} (dN′_i·V′_j) F_i      dV′_j = Σ_{i≥j} (F_i·G_j) dN′_i
          dQ = dF∘φ′(Q)      dK = dG∘φ′(K)
          φ = elu + 1: φ′ = min(φ, 1);      φ = relu: φ′ = 1 where x > 0, else 0
Letters   *B batch and heads; L queries, rows i; S keys, rows j; E, Ev features; F, G (*B, L or S, E); V′ (*B, S, Ev + 1)
Numerics  half inputs are computed in float32; q, k, v, o and z are kept, no L × S matrix and no state per position
Source    Katharopoulos et al., "Transformers are RNNs", 2020, eqs. 4-12 and algorithm 1; chunks: Hua et al. 2022, section 3.2

The backward is three products of the same kind: T(dN′, V′, G) and, with the sums from the other end, T(V′, dN′, F) and
T(G, F, dN′). So each is done in chunks with a running state of E × Ev numbers, and so is every higher derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.op import LOW, Op
from bptoolkit.opaque import Opaque
from bptoolkit.precision import wide

NAME = "linear_attention"
CHUNK = 64  # rows: a chunk's matrix of scores and the state are of a size

# The causal product --------------------------------------------------------------------------------------------------------


def _product(a: Tensor, b: Tensor, c: Tensor, reverse: bool) -> Tensor:
    """y_i = Σⱼ (a_i·b_j) c_j over j ≤ i, or j ≥ i if reverse; in chunks with a running state Σⱼ b_j c_jᵀ."""
    N, L, shape = prod(a.shape[:-2]), a.shape[-2], (*a.shape[:-1], c.shape[-1])
    a, b, c = (t.reshape(N, *t.shape[-2:]) for t in (a, b, c))
    starts = list(range(0, L, CHUNK))
    state, out = None, []
    for i in reversed(starts) if reverse else starts:
        a_, b_, c_ = (t.narrow(1, i, min(CHUNK, L - i)) for t in (a, b, c))
        s = torch.bmm(a_, b_.mT)
        y = torch.bmm(s.triu() if reverse else s.tril(), c_)
        if state is None:
            state = torch.bmm(b_.mT, c_)
        else:
            y = torch.baddbmm(y, a_, state)
            state = torch.baddbmm(state, b_.mT, c_)
        out.append(y)
    return torch.cat(out[::-1] if reverse else out, 1).view(shape) if out else a.new_zeros(shape)


def _product_fake(a, b, c, reverse):
    return a.new_empty((*a.shape[:-1], c.shape[-1]))


def _product_vjp(cotangents, need, a, b, c, reverse):
    (dy,) = cotangents
    return [
        PRODUCT(dy, c, b, reverse) if need[0] else None,
        PRODUCT(c, dy, a, not reverse) if need[1] else None,
        PRODUCT(b, a, dy, not reverse) if need[2] else None,
    ]


def _product_jvp(tangents, a, b, c, reverse):
    da, db, dc = tangents
    parts = ((da, b, c), (a, db, c), (a, b, dc))
    return sum(PRODUCT(*part, reverse) for part, t in zip(parts, tangents) if t is not None)


PRODUCT = Opaque("linear_attention_product", _product, _product_fake, vmap="leading", vjp=_product_vjp, jvp=_product_jvp)


# The rule ------------------------------------------------------------------------------------------------------------------


def features(x, kind):
    if kind == "elu":
        return torch.where(x > 0, x + 1, x.clamp_max(0).exp())
    return x.relu() if kind == "relu" else x


def through_features(d, x, f, kind):
    """From a gradient by φ(x) = f to the one by x."""
    if kind == "elu":
        return d * f.clamp_max(1)
    return d * (x > 0) if kind == "relu" else d


def with_ones(v, normalize):
    v = wide(v)
    return torch.cat((v, v.new_ones(*v.shape[:-1], 1)), -1) if normalize else v


def forward(q, k, v, causal, kind, normalize, eps):
    f, g, v1 = features(wide(q), kind), features(wide(k), kind), with_ones(v, normalize)
    n = PRODUCT(f, g, v1, False) if causal else f @ (g.mT @ v1)  # *B L Ev, or Ev + 1
    if not normalize:
        return n.to(q.dtype), n.new_zeros(0)
    z = n[..., -1] + eps
    return (n[..., :-1] / z.unsqueeze(-1)).to(q.dtype), z


def backward(do, dz, q, k, v, o, z, causal, kind, normalize, need):
    Q, K, v1 = wide(q), wide(k), with_ones(v, normalize)
    f, g = features(Q, kind), features(K, kind)
    if do is None:
        do = q.new_zeros((*q.shape[:-1], v.shape[-1]))
    dn = wide(do)
    if normalize:
        dn = dn / z.unsqueeze(-1)
        D = -(dn * wide(o)).sum(-1, keepdim=True) + (0 if dz is None else dz.unsqueeze(-1))
        dn = torch.cat((dn, D), -1)
    dq = dk = dv = None
    if causal:
        df = PRODUCT(dn, v1, g, False) if need.q else None
        dg = PRODUCT(v1, dn, f, True) if need.k else None
        dv1 = PRODUCT(g, f, dn, True) if need.v else None
    else:
        df = dn @ (v1.mT @ g) if need.q else None
        R = f.mT @ dn if need.k or need.v else None  # *B E Ev
        dg = v1 @ R.mT if need.k else None
        dv1 = g @ R if need.v else None
    if need.q:
        dq = through_features(df, Q, f, kind).to(q.dtype)
    if need.k:
        dk = through_features(dg, K, g, kind).to(k.dtype)
    if need.v:
        dv = (dv1[..., :-1] if normalize else dv1).to(v.dtype)
    return dq, dk, dv


RULE = Rule(NAME, forward, backward, inputs="q k v", outputs="o z")


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    feature_map: str | Callable[[Tensor], Tensor] | None = "elu",
    normalize: bool = True,
    eps: float = 1e-6,
    *,
    backend: str = "auto",
) -> Tensor:
    """O_i = Σⱼ φ(q_i)·φ(k_j) v_j / Σⱼ φ(q_i)·φ(k_j): attention whose time and memory are linear in the length.

    Args:
        query: (*B, L, E), floating point.
        key: (*B, S, E). The batch dimensions *B of the three are broadcast.
        value: (*B, S, Ev).
        is_causal: query i sees the keys 0 ... i; L and S must be equal.
        feature_map: φ: "elu" (elu(x) + 1, positive), "relu", None for the identity, or a function of a tensor (*B, L or S, E)
            that keeps all but the last dimension, and is differentiated by autograd.
        normalize: divide by the sum of the weights. It should be positive, which φ has to see to.
        eps: added to that sum.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B, L, Ev), of query's dtype.

    Raises:
        ValueError: shapes or devices disagree, is_causal with L and S unequal, feature_map is not known, eps is negative, or
            the named backend cannot run the call.
        TypeError: the tensors are not of one floating-point dtype.
    """
    q, k, v = OP.cast(query, key, value)
    OP.check(q, k, v)
    L, S = q.shape[-2], k.shape[-2]
    if is_causal and L != S:
        raise ValueError(f"{NAME}: is_causal=True with {L} queries and {S} keys; they must be as many")
    if not eps >= 0:
        raise ValueError(f"{NAME}: eps={eps} must not be negative")
    if callable(feature_map):
        q, k, kind = feature_map(q), feature_map(k), "identity"
        if q.shape[:-1] != query.shape[:-1] or k.shape[:-1] != key.shape[:-1] or q.shape[-1] != k.shape[-1]:
            raise ValueError(
                f"{NAME}: feature_map made {tuple(q.shape)} of query {tuple(query.shape)} and {tuple(k.shape)} of key "
                f"{tuple(key.shape)}; it may change the last size alone, of both alike"
            )
    elif feature_map in ("elu", "relu", None):
        kind = feature_map or "identity"
    else:
        raise ValueError(f"{NAME}: feature_map={feature_map!r} must be 'elu', 'relu', None or a function")
    if q.shape[:-2] != k.shape[:-2] or q.shape[:-2] != v.shape[:-2]:
        shapes = f"query is {tuple(q.shape)}, key {tuple(k.shape)}, value {tuple(v.shape)}"
        try:
            B = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
        except RuntimeError:
            raise ValueError(f"{NAME}: the batch dimensions cannot be broadcast: {shapes}") from None
        q, k, v = (t.expand(*B, *t.shape[-2:]) for t in (q, k, v))
    picked = OP.pick(RULE, backend, q, k, v, is_causal, kind, normalize, eps)
    return RULE(q, k, v, is_causal, kind, normalize, eps, backend=picked)[0]


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    feature_map: str | Callable[[Tensor], Tensor] | None = "elu",
    normalize: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """With the whole matrix of weights."""
    maps: dict[Any, Any] = {"elu": lambda x: torch.nn.functional.elu(x) + 1, "relu": torch.relu, None: lambda x: x}
    phi: Any = maps.get(feature_map, feature_map)
    q, k, v = (t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in (query, key, value))
    a = phi(q) @ phi(k).mT
    a = a.tril() if is_causal else a
    a = a / (a.sum(-1, keepdim=True) + eps) if normalize else a
    return (a @ v).to(query.dtype)


def case(draw: Draw) -> Case:
    B, L, S, E, Ev = draw.batch(), draw.size(), draw.size(), draw.size(), draw.size()
    causal = draw.flag()
    S = L if causal else S
    kind = draw.choice(("elu", "elu", "relu", None))
    kwargs: dict[str, Any] = {"is_causal": True} if causal else {}
    if kind != "elu":
        kwargs["feature_map"] = kind
    if kind != "elu" or draw.choice((True, False, False)):  # other maps' sums of weights may be 0
        kwargs["normalize"] = False
    elif draw.flag():
        kwargs["eps"] = 0.1
    return Case((draw.tensor(*B, L, E), draw.tensor(*B, S, E), draw.tensor(*B, S, Ev)), kwargs)


def bench(causal: bool) -> Any:
    return lambda draw: Case(tuple(draw.tensor(1, 4, 2048, 64) for _ in range(3)), {"is_causal": causal})


OP = Op(
    name=NAME,
    call=linear_attention,
    reference=reference,
    rules=(RULE,),
    shapes="query: *B L E, key: *B S E, value: *B S Ev -> *B L Ev",
    source="Katharopoulos et al. 2020, eqs. 4-12",
    autocast=LOW,
    case=case,
    bench={"full": bench(False), "causal": bench(True)},
)
OPS = (OP,)
