"""Cosine similarity and pairwise distance.

Maths     cosine    y = Σ u1 u2,  u = x/N,  N = max(n, ε),  n = ‖x‖
                    dx1 = dy (u2 − y x1/n1) / N1,  dx2 alike;  x/n = 0 at n = 0; N′(n) = 1 also below ε, as torch has it
          distance  y = ‖e‖_p,  e = x1 − x2 + ε
                    p = 0    y = Σ [e ≠ 0]            dx1 = 0
                    p = ∞    y = max |e|              dx1 = dy sgn e [|e| = y] / how many are equal to y
                    else     y = (Σ |e|^p)^(1/p)      dx1 = dy sgn e (|e|/y)^(p − 1),  0 at y = 0
                    dx2 = −dx1
Letters   x1, x2 *B after broadcasting; Σ and ‖·‖ run over one dimension: dim, or the last; y, dy without it
Numerics  half tensors are computed in float32; N keeps the value of the larger of n and ε and the derivative of n
Source    Salton & McGill, "Introduction to modern information retrieval", 1983, section 4 (cosine); Minkowski 1896 (distance)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn import functional as F

from bptoolkit.blocks import by_rows
from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.op import FLOAT32_CUDA, Op
from bptoolkit.precision import wide


def unit(x, dim, eps):
    """u, x/n and N."""
    n = vector_norm(x, 2, dim, keepdim=True)
    zero = n == 0
    N = n + (n.clamp_min(eps) - n).detach()
    return x / N, torch.where(zero, 0, x / torch.where(zero, 1, n)), N


def cosine_forward(x1, x2, dim, eps):
    return F.cosine_similarity(wide(x1), wide(x2), dim, eps).to(x1.dtype)


def cosine_backward(dy, x1, x2, dim, eps, need):
    u1, v1, N1 = unit(wide(x1), dim, eps)
    u2, v2, N2 = unit(wide(x2), dim, eps)
    dy = wide(dy).unsqueeze(dim)
    y = (u1 * u2).sum(dim, keepdim=True)
    dx1 = (dy / N1 * (u2 - y * v1)).to(x1.dtype) if need.x1 else None
    dx2 = (dy / N2 * (u1 - y * v2)).to(x2.dtype) if need.x2 else None
    return dx1, dx2


def distance_forward(x1, x2, p, eps, keepdim):
    y = vector_norm(wide(x1) - wide(x2) + eps, p, -1, keepdim=True).to(x1.dtype)  # torch 2.11 keeps a size of 1 on meta anyway
    return y if keepdim else y.squeeze(-1)


def distance_backward(dy, x1, x2, p, eps, keepdim, need):
    M, E = math.prod(x1.shape[:-1]), x1.shape[-1]

    def rule(x1, x2, dy):
        e = wide(x1) - wide(x2) + eps  # M E
        return (wide(dy) * norm_slope(e, p)).to(x1.dtype)

    de = by_rows(rule, x1.reshape(M, E), x2.reshape(M, E), dy.reshape(M, 1)).reshape(x1.shape)
    return de if need.x1 else None, -de if need.x2 else None


def norm_slope(e, p):
    """The derivative of ‖e‖_p over the last dimension."""
    if p == 0:
        return torch.zeros_like(e)
    if p == 1:
        return e.sgn()
    y = vector_norm(e, p, -1, keepdim=True)
    if math.isinf(p):
        most = (e.abs() == y) | e.isnan()
        return e.sgn() * most / most.sum(-1, keepdim=True)
    zero = y == 0
    over = 1 / torch.where(zero, 1, y)
    if p == 2:
        return e * torch.where(zero, 0, over)
    a = e.abs()
    if p < 2:  # |e|^(p − 1) and its derivative are infinite at 0
        a = torch.where(a == 0, 1 if p < 1 else a, a)
    slope = e.sgn() * (a * over) ** (p - 1) if p < 2 else e * over * (a * over) ** (p - 2)
    return torch.where(zero, 0, slope)


COSINE_RULE = Rule("cosine_similarity", cosine_forward, cosine_backward, inputs="x1 x2", outputs="y")
DISTANCE_RULE = Rule("pairwise_distance", distance_forward, distance_backward, inputs="x1 x2", outputs="y")


def broadcast(op: str, x1: Tensor, x2: Tensor) -> torch.Size:
    """The shape of both; raises where they have none."""
    try:
        return torch.broadcast_shapes(x1.shape, x2.shape)
    except RuntimeError:
        raise ValueError(f"{op}: x1 has shape {tuple(x1.shape)} but x2 {tuple(x2.shape)}; they cannot be broadcast") from None


def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8, *, backend: str = "auto") -> Tensor:
    """Σ x1 x2 / (max(‖x1‖, eps) max(‖x2‖, eps)), as `torch.nn.functional.cosine_similarity`.

    Args:
        x1: (*B), floating point.
        x2: broadcastable with x1.
        dim: the dimension of the vectors, after broadcasting.
        eps: the least norm to divide by.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B) without dim.

    Raises:
        ValueError: the shapes cannot be broadcast or have no such dimension, devices differ, or the named backend cannot run
            the call.
        TypeError: the tensors are not of one floating-point dtype.
    """
    x1, x2 = COSINE.cast(x1, x2)
    COSINE.check(x1, x2)
    shape = broadcast("cosine_similarity", x1, x2)
    if not shape and dim in (0, -1):  # as torch: a scalar is a vector of one
        return cosine_similarity(x1.reshape(1), x2.reshape(1), 0, eps, backend=backend)
    if not -len(shape) <= dim < len(shape):
        raise ValueError(f"cosine_similarity: dim={dim} is no dimension of {tuple(shape)}")
    dim = dim % len(shape) - len(shape)
    x1, x2 = x1.expand(shape), x2.expand(shape)
    return COSINE_RULE(x1, x2, dim, eps, backend=COSINE.pick(COSINE_RULE, backend, x1, x2))


def pairwise_distance(
    x1: Tensor, x2: Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False, *, backend: str = "auto"
) -> Tensor:
    """‖x1 − x2 + eps‖_p over the last dimension, as `torch.nn.functional.pairwise_distance`.

    Args:
        x1: (*B, E), floating point.
        x2: broadcastable with x1.
        p: of the norm, any number or inf.
        eps: added to every difference.
        keepdim: keep the last dimension, of size 1.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B), or (*B, 1) with keepdim.

    Raises:
        ValueError: the shapes cannot be broadcast or have no dimensions, devices differ, or the named backend
            cannot run the call.
        TypeError: the tensors are not of one floating-point dtype.
    """
    x1, x2 = DISTANCE.cast(x1, x2)
    DISTANCE.check(x1, x2)
    shape = broadcast("pairwise_distance", x1, x2)
    if not len(shape):
        raise ValueError("pairwise_distance: x1 and x2 have no dimensions; they need (*B E)")
    x1, x2 = x1.expand(shape), x2.expand(shape)
    args = (x1, x2, float(p), eps, keepdim)
    return DISTANCE_RULE(*args, backend=DISTANCE.pick(DISTANCE_RULE, backend, x1, x2))


class CosineSimilarity(nn.CosineSimilarity):
    """`torch.nn.CosineSimilarity` with the backward above; same arguments."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return cosine_similarity(x1, x2, self.dim, self.eps, backend=self.backend)


class PairwiseDistance(nn.PairwiseDistance):
    """`torch.nn.PairwiseDistance` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return pairwise_distance(x1, x2, self.norm, self.eps, self.keepdim, backend=self.backend)


def pair(draw: Draw, *shape: int) -> tuple[Tensor, Tensor]:
    """Two tensors of a shape, one of them at times of a shape that is broadcast to it."""
    return draw.tensor(*shape), draw.tensor(*(draw.choice((s, s, 1)) for s in shape))


def cosine_case(draw: Draw) -> Case:
    shape = (*draw.batch(), draw.size(least=1))
    return Case(pair(draw, *shape), {"dim": draw.random.randrange(-len(shape), len(shape)), "eps": draw.choice((1e-8, 0.5))})


def distance_case(draw: Draw) -> Case:
    shape = (*draw.batch(), draw.size(least=1))
    p = draw.choice((2.0, 2.0, 1.0, 3.0, 1.5, float("inf"), 0.0))
    return Case(pair(draw, *shape), {"p": p, "eps": draw.choice((1e-6, 0.1)), "keepdim": draw.flag()})


def bench(draw: Draw) -> Case:
    return Case((draw.tensor(4096, 512), draw.tensor(4096, 512)), {})


COSINE = Op(
    name="cosine_similarity",
    call=cosine_similarity,
    reference=F.cosine_similarity,
    rules=(COSINE_RULE,),
    module=(CosineSimilarity,),
    replaces=(nn.CosineSimilarity,),
    shapes="x1: *B, x2: *C -> *D",
    source="Salton & McGill 1983, §4",
    autocast=FLOAT32_CUDA,
    case=cosine_case,
    bench=bench,
)
DISTANCE = Op(
    name="pairwise_distance",
    call=pairwise_distance,
    reference=F.pairwise_distance,
    rules=(DISTANCE_RULE,),
    module=(PairwiseDistance,),
    replaces=(nn.PairwiseDistance,),
    shapes="x1: *B, x2: *C -> *D",
    source="Minkowski 1896",
    autocast=FLOAT32_CUDA,
    case=distance_case,
    bench=bench,
)
OPS = (COSINE, DISTANCE)
