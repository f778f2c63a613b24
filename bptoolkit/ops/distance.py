"""Distances of all pairs: cdist between two sets of vectors, pdist within one.

Maths     y_ij = ‖e‖_p,  e = x_i − z_j                     p = 0 how many of e are not 0, p = ∞ max |e|
          s = ∂y/∂e = sgn e (|e|/y)^(p − 1),  0 at y = 0   sgn e (p = 1)   e/y (p = 2)   sgn e [|e| = y] (p = ∞)   0 (p = 0)
          dx_i = Σ_j dy_ij s_ij      dz_j = − Σ_i dy_ij s_ij
          p = 2, by products: w = dy/y      dx_i = x_i Σ_j w_ij − Σ_j w_ij z_j      dz_j = z_j Σ_i w_ij − Σ_i w_ij x_i
          pdist  y_k is the distance of the k-th pair i < j; with D_ij = D_ji = dy_k and z = x it is dx_i = Σ_j D_ij s_ij
Letters   x *B P M, z *B R M, y *B P R; in pdist x N M, y N(N−1)/2
Numerics  half tensors are computed in float32. Products where torch's forward uses them, on vectors with their mean taken off,
          which no difference notices; or in float64, for pdist of float32. Equal largest elements of p = ∞ get the whole
          gradient each, as torch has it here
Source    Minkowski 1896
"""

from __future__ import annotations

from math import inf, prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bptoolkit.blocks import BLOCK
from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule, unwatched
from bptoolkit.op import FLOAT32, FLOAT32_CUDA, Op
from bptoolkit.precision import wide

MODES = {
    "use_mm_for_euclid_dist_if_necessary": None,
    "use_mm_for_euclid_dist": True,
    "donot_use_mm_for_euclid_dist": False,
}


def slope(e, y, p):
    """∂y/∂e; y has a last dimension of 1."""
    if p == 0:
        return torch.zeros_like(e)
    if p == 1:
        return e.sgn()
    if p == inf:
        return e.sgn() * (e.abs() == y)
    zero = y == 0
    over = 1 / torch.where(zero, 1.0, y)
    if p == 2:
        return torch.where(zero, 0.0, e * over)
    flat = zero | (e == 0)  # powers below 1 and their derivatives are infinite at 0
    return torch.where(flat, 0.0, e.sgn() * (torch.where(flat, 1.0, e.abs()) * over) ** (p - 1))


def pull(dy, x, z, y, p, need_x, need_z):
    """Σ_j dy s and −Σ_i dy s, on a few x at a time where nothing watches."""

    def some(dy, x, y):
        g = dy.unsqueeze(-1) * slope(x.unsqueeze(-2) - z.unsqueeze(-3), y.unsqueeze(-1), p)  # *B P R M
        return g.sum(-2) if need_x else None, g.sum(-3).neg() if need_z else None

    P, size = x.shape[-2], prod(y.shape) * x.shape[-1]
    if not (unwatched(dy, x, z, y) and x.is_cpu and size > BLOCK // 4):
        return some(dy, x, y)
    n = max(BLOCK // 4 * P // size, 1)
    dx, dz = torch.empty_like(x) if need_x else None, torch.zeros_like(z) if need_z else None
    for k in range(0, P, n):
        at = slice(k, k + n)
        w, s = weighted(x[..., at, :].unsqueeze(-2) - z.unsqueeze(-3), dy[..., at, :], y[..., at, :], p)
        if need_x:
            torch.matmul(w.unsqueeze(-2), s, out=dx[..., at, :].unsqueeze(-2))
        if need_z:
            dz -= s.mul_(w.unsqueeze(-1)).sum(-3)
    return dx, dz


def weighted(e, dy, y, p):
    """W and s with dy ∂y/∂e = w s, per element of y and of e, which is used up."""
    if p == 1:
        return dy, e.sgn_()
    if p == 2:
        return torch.where(y == 0, 0.0, dy / y), e
    return dy, slope(e, y.unsqueeze(-1), p)


def products(dy, x, z, y, need_x, need_z):
    """The same for p = 2, by matrix products."""
    zero = y == 0
    w = torch.where(zero, 0.0, dy / torch.where(zero, 1.0, y))  # *B P R
    middle = z.detach().sum(-2, keepdim=True) / max(z.shape[-2], 1)
    x, z = x - middle, z - middle
    dx = x * w.sum(-1, keepdim=True) - w @ z if need_x else None
    return dx, z * w.sum(-2).unsqueeze(-1) - w.mT @ x if need_z else None


def cdist_forward(x, z, p, mm):
    mode = "use_mm_for_euclid_dist" if mm else "donot_use_mm_for_euclid_dist"
    return torch.cdist(wide(x), wide(z), p, mode)  # wide: backward divides by it


def cdist_backward(dy, x, z, y, p, mm, need):
    dtype, x, z = x.dtype, wide(x), wide(z)
    dx, dz = products(dy, x, z, y, *need) if mm else pull(dy, x, z, y, p, *need)
    return dx if dx is None else dx.to(dtype), dz if dz is None else dz.to(dtype)


def pdist_forward(x, p):
    if unwatched(x):
        return torch.pdist(wide(x), p)
    N, all_pairs = x.shape[0], cdist_forward(x, x, p, False)  # vmap and graphs of any size have no pdist
    i, j = pairs(N, x.device)
    return all_pairs.reshape(N * N).index_select(0, i * N + j)


def pairs(N, device):
    """All i < j, in pdist's order. k − j is the same along a row i; not torch.triu_indices, which binds a graph to one N."""
    k = torch.arange(N * (N - 1) // 2, device=device)
    i = ((2 * N - 1 - ((2 * N - 1) ** 2 - 8 * k).double().sqrt()) / 2).floor().long()  # exact: at j = i + 1 it is a square
    return i, k - i * (2 * N - i - 1) // 2 + i + 1


def square(t, N):
    """N N, symmetric, from what belongs to the pairs i < j."""
    i, j = pairs(N, t.device)
    return t.new_zeros(N * N).index_add(0, torch.cat((i * N + j, j * N + i)), torch.cat((t, t))).view(N, N)


def pdist_backward(dy, x, y, p):
    N, x_ = x.shape[0], wide(x)
    if unwatched(dy, x, y) and p == 2 and x_.dtype == torch.float32:  # products in float64 lose less than float32 has
        i, j = torch.triu_indices(N, N, 1, device=x.device)
        w, x64 = x_.new_zeros(N * N, dtype=torch.float64), x_.double()
        w.index_copy_(0, i * N + j, torch.where(y == 0, 0.0, dy / y).double())
        w = w.view(N, N)
        w = w + w.mT
        return (x64 * w.sum(1, keepdim=True) - w @ x64).to(x.dtype)
    if unwatched(dy, x, y):
        dx, rows, others = torch.zeros_like(x_), x_.unbind(0), range(N - 1, 0, -1)  # a row and those after it at a time
        if p == 2:
            dy = torch.where(y == 0, 0.0, dy / y)
        for i, d, n in zip(range(N - 1), dy.split(list(others)), y.split(list(others))):
            e = rows[i] - x_[i + 1 :]
            s = e if p == 2 else slope(e, n.unsqueeze(1), p)
            dx[i] += d @ s
            dx[i + 1 :] -= s.mul_(d.unsqueeze(1))
        return dx.to(x.dtype)
    return pull(square(dy, N), x_, x_, square(y, N), p, True, False)[0].to(x.dtype)


CDIST_RULE = Rule("cdist", cdist_forward, cdist_backward, inputs="x z", outputs="y")
PDIST_RULE = Rule("pdist", pdist_forward, pdist_backward, inputs="x", outputs="y")


def cdist(
    x1: Tensor,
    x2: Tensor,
    p: float = 2.0,
    compute_mode: str = "use_mm_for_euclid_dist_if_necessary",
    *,
    backend: str = "auto",
) -> Tensor:
    """The p-norms of the differences of all pairs of rows, as `torch.cdist`.

    Args:
        x1: (*B, P, M), floating point.
        x2: (*B, R, M); the leading dimensions are broadcast.
        p: of the norm, from 0 to inf.
        compute_mode: whether matrix products are used for p = 2, which lose small distances between long vectors:
            "use_mm_for_euclid_dist_if_necessary" (where P or R is above 25), "use_mm_for_euclid_dist" or
            "donot_use_mm_for_euclid_dist". Forward and backward alike.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B, P, R).

    Raises:
        ValueError: shapes that disagree, a negative p, or a compute_mode that does not exist.
        TypeError: the tensors are not of one floating-point dtype.
    """
    if compute_mode not in MODES:
        known = ", ".join(map(repr, MODES))
        raise ValueError(f"cdist: compute_mode={compute_mode!r} is not known; choose from {known}")
    _check_p("cdist", p)
    x, z = CDIST.cast(x1, x2)
    CDIST.check(x, z)
    try:
        lead = torch.broadcast_shapes(x.shape[:-2], z.shape[:-2])
    except RuntimeError:
        found = f"x1 {tuple(x1.shape)} and x2 {tuple(x2.shape)}"
        raise ValueError(f"cdist: the leading dimensions of {found} cannot be broadcast") from None
    mm = MODES[compute_mode]
    mm = p == 2 and (mm or (mm is None and bool(z.shape[-2] > 25 or x.shape[-2] > 25)))
    args = (x.expand(*lead, *x.shape[-2:]), z.expand(*lead, *z.shape[-2:]), float(p), mm)
    return CDIST_RULE(*args, backend=CDIST.pick(CDIST_RULE, backend, *args)).to(x.dtype)


def pdist(input: Tensor, p: float = 2, *, backend: str = "auto") -> Tensor:
    """The p-norms of the differences of all pairs of rows i < j, as `torch.nn.functional.pdist`.

    Args:
        input: (N, M), floating point.
        p: of the norm, from 0 to inf.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (N(N−1)/2), ordered by i and then by j.

    Raises:
        ValueError: the input has not two dimensions, or p is negative.
        TypeError: the input is not a tensor of floating point.
    """
    _check_p("pdist", p)
    (x,) = PDIST.cast(input)
    PDIST.check(x)
    args = (x, float(p))
    return PDIST_RULE(*args, backend=PDIST.pick(PDIST_RULE, backend, *args)).to(x.dtype)


def _check_p(op: str, p: Any) -> None:
    if not isinstance(p, (int, float)) or not p >= 0:
        raise ValueError(f"{op}: p={p!r} is no norm; it must be a number from 0 to inf")


def cdist_reference(x1, x2, p=2.0, compute_mode=None):
    e = wide(x1).unsqueeze(-2) - wide(x2).unsqueeze(-3)
    if e.shape[-1] == 0:
        return e.sum(-1).to(x1.dtype)
    if p == inf:
        return e.abs().amax(-1).to(x1.dtype)
    return torch.linalg.vector_norm(e, p, -1).to(x1.dtype)


def pdist_reference(input, p=2):
    i, j = torch.triu_indices(input.shape[0], input.shape[0], 1, device=input.device)
    return cdist_reference(input[i].unsqueeze(-2), input[j].unsqueeze(-2), p).flatten()


PS = (2.0, 2.0, 1.0, 3.0, 1.5, inf, 0.0)


def cdist_case(draw: Draw) -> Case:
    lead, P, R, M = draw.batch(1), draw.size(), draw.size(), draw.size()
    other = lead if draw.flag() else ()
    mode = draw.choice((*MODES, "donot_use_mm_for_euclid_dist"))
    return Case((draw.tensor(*lead, P, M), draw.tensor(*other, R, M), draw.choice(PS), mode), {})


def pdist_case(draw: Draw) -> Case:
    return Case((draw.tensor(draw.size(least=2), draw.size(least=1)), draw.choice(PS)), {})


def bench_of(p: float, *shape: int) -> Any:
    return lambda draw: Case((draw.tensor(*shape), draw.tensor(*shape), p), {})


CDIST = Op(
    name="cdist",
    call=cdist,
    reference=cdist_reference,
    peer=torch.cdist,
    rules=(CDIST_RULE,),
    shapes="x1: *B P M, x2: *C R M -> *D P R",
    source="Minkowski 1896",
    autocast=FLOAT32,
    case=cdist_case,
    bench={"p = 2": bench_of(2.0, 512, 64), "p = 1": bench_of(1.0, 256, 64), "p = 3": bench_of(3.0, 128, 64)},
)
PDIST = Op(
    name="pdist",
    call=pdist,
    reference=pdist_reference,
    peer=F.pdist,
    rules=(PDIST_RULE,),
    shapes="input: N M -> K",
    source="Minkowski 1896",
    autocast=FLOAT32_CUDA,
    case=pdist_case,
    bench=lambda draw: Case((draw.tensor(512, 64),), {}),
)
OPS = (CDIST, PDIST)
