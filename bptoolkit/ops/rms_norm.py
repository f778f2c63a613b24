"""Root-mean-square normalization over the last D dimensions.

Maths     r = 1/√(mean(x²) + eps)        x̂ = x r        y = x̂ w
          with g = dy w:     dx = r (g − x̂ mean(g x̂)) − dr r² x̂/N
          dw = Σₘ dy x̂
Letters   *B leading dimensions; M rows, one per element of *B; N elements in a row, over which mean() runs; r is a residual
          output of shape *B 1…1, hidden by the public function; dt is the gradient of the loss by t, in t's shape
Numerics  half inputs are normalized in float32, and r is float32; y has x's dtype; eps None is the machine epsilon of the dtype
          it is computed in
Source    Zhang & Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467, eq. 4
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.blocks import BLOCK, by_rows
from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule, unwatched
from bptoolkit.op import Op
from bptoolkit.ops.layer_norm import check_normalized, rows
from bptoolkit.precision import wide

_SMALL = 1 << 15  # elements, up to which the plain form is the faster one


def forward(x, w, D, eps):
    M, N = rows(x, D)
    x2 = x.reshape(M, N)
    r = (by_rows(lambda x: wide(x).square().sum(1), x2)[:, None] / max(N, 1) + eps).rsqrt()  # M 1
    v = None if w is None else wide(w).reshape(1, N)

    def scaled(x, r):
        y = wide(x) * r
        return (y if v is None else y * v).to(x.dtype)

    return by_rows(scaled, x2, r).reshape(x.shape), r.reshape(*x.shape[: x.dim() - D], *(1,) * D)


def backward(dy, dr, x, w, r, D, need):
    if dy is not None and need.x and dr is None and dy.is_cpu and dy.numel() > _SMALL and unwatched(dy, x, w, r):
        return in_blocks(dy, x, w, r, D, need)
    M, N = rows(x, D)
    r = r.reshape(M, 1)
    xh = wide(x).reshape(M, N) * r  # M N
    dx = dw = None
    if dy is not None:
        dy = wide(dy).reshape(M, N)
        dw = (dy * xh).sum(0).reshape(w.shape).to(w.dtype) if need.w else None
    if need.x:
        if dy is not None:
            g = dy if w is None else dy * w.reshape(N)  # M N
            dx = r * (g - xh * (g * xh).mean(1, keepdim=True))
        if dr is not None:
            through_r = -dr.reshape(M, 1) * r.square() / max(N, 1) * xh
            dx = through_r if dx is None else dx + through_r
        dx = dx.reshape(x.shape).to(x.dtype)
    return dx, dw


def in_blocks(dy, x, w, r, D, need):
    """The same in place, a block of rows at a time.

    t = dy x:    dx = r (dy w − r² mean(t w) x)    dw = Σₘ r t
    """
    shape, (M, N) = x.shape, rows(x, D)
    x, dy, r = x.reshape(M, N), dy.reshape(M, N), r.reshape(M)
    v = r.new_ones(N) if w is None else w.reshape(N).to(r.dtype)
    dx, dw = torch.empty_like(x, memory_format=torch.contiguous_format), torch.zeros_like(v)
    R = min(M, max(1, BLOCK // N))  # rows in a block
    t_ = r.new_empty(R, N)
    for xk, dyk, dxk, rk in zip(*(a.split(R) for a in (x, dy, dx, r))):
        xk, dyk = wide(xk), wide(dyk)
        t = torch.mul(dyk, xk, out=t_[: len(rk)])  # R N
        c = torch.mv(t, v).mul_(rk.pow(3).div_(-N))  # R: −r³ mean(t w)
        if need.w:
            dw.addmv_(t.mT, rk)  # N
        out = dxk if dxk.dtype == r.dtype else t
        torch.mul(dyk, v, out=out).mul_(rk[:, None]).addcmul_(xk, c[:, None])  # R N
        if out is t:
            dxk.copy_(t)
    return dx.reshape(shape), dw.reshape(w.shape).to(w.dtype) if need.w else None


def kernel():
    from bptoolkit.triton_kernels.rms_norm import KERNEL

    return KERNEL


RULE = Rule("rms_norm", forward, backward, inputs="x w", outputs="y r", kernel=kernel)


def epsilon(x: Tensor, eps: float | None) -> float:
    """Eps, or the machine epsilon of what x is computed in."""
    return torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps if eps is None else eps


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """X / √(mean(x²) + eps) · weight over the last dimensions, as `torch.nn.functional.rms_norm`.

    Args:
        input: (*B, *normalized_shape), floating point.
        normalized_shape: the sizes of the dimensions to normalize over, one or more.
        weight: of normalized_shape, or None; of input's dtype, or float32 for a half input.
        eps: added to the mean square; None is the machine epsilon, of float32 for half inputs.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        input's shape and dtype.

    Raises:
        ValueError: shapes or devices disagree, or the named backend cannot run the call.
        TypeError: a tensor is not of floating point, or the dtypes do not go together.
    """
    D = check_normalized("rms_norm", input, normalized_shape, weight)
    args = (input, weight, D, epsilon(input, eps))
    return RULE(*args, backend=OP.pick(RULE, backend, *args))[0]


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` with the backward above; same parameters, state_dict and arguments."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.normalized_shape, self.weight, self.eps, backend=self.backend)


def reference(input: Any, normalized_shape: Any, weight: Any = None, eps: Any = None) -> Any:
    """In plain torch."""
    x, dims = wide(input), tuple(range(-len(normalized_shape), 0))
    y = x / (x.square().mean(dims, keepdim=True) + epsilon(input, eps)).sqrt()
    return (y if weight is None else y * weight).to(input.dtype)


def case(draw: Draw) -> Case:
    shape = tuple(draw.size() for _ in range(draw.choice((1, 1, 2))))
    w = draw.tensor(*shape) if draw.random.random() < 0.75 else None
    return Case((draw.tensor(*draw.batch(), *shape), shape, w), draw.choice(({}, {"eps": 1e-5}, {"eps": 0.1})))


def bench(draw: Draw) -> Case:
    return Case((draw.tensor(4096, 1024), (1024,), draw.tensor(1024)), {"eps": 1e-5})


OP = Op(
    name="rms_norm",
    call=rms_norm,
    reference=reference,
    peer=F.rms_norm,
    rules=(RULE,),
    module=(RMSNorm,),
    replaces=(nn.RMSNorm,),
    shapes="input: *B N, weight: N -> *B N",
    source="Zhang & Sennrich 2019, eq. 4",
    case=case,
    bench={"4096 × 1024": bench},
)
OPS = (OP,)
