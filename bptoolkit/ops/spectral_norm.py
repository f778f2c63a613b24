"""Division by the largest singular value, from a power iteration: spectral_norm.

Maths     u ← W v / max(|W v|, eps),  v ← Wᵀ u / max(|Wᵀ u|, eps)        n times, in place, without a gradient
          σ = uᵀ W v        y = W / σ
          dσ' = dσ − Σ dy W / σ²        dW = dy / σ + dσ' u vᵀ
Letters   W the weight as a matrix h w: the dimension `dim` in front, the others flattened; u h, v w, constants; σ a residual
          output, hidden by the public function; dt is the gradient of the loss by t
Numerics  half tensors are computed in float32. u vᵀ is the derivative of the largest singular value where u and v are its
          vectors: that they follow W adds nothing to first order, as their lengths stay 1
Source    Miyato et al., "Spectral normalization for generative adversarial networks", arXiv 1802.05957, eq. 7 to 12
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.op import FLOAT32_CUDA, Op
from bptoolkit.ops.normalize import normalize
from bptoolkit.precision import wide


def outer(u, v, dim, shape):
    """U vᵀ in the shape of the weight."""
    front = (shape[dim], *shape[:dim], *shape[dim + 1 :])
    order = [k + 1 if k < dim else 0 if k == dim else k for k in range(len(shape))]
    return (u.unsqueeze(1) * v).reshape(front).permute(order)


def matrix(w, dim):
    return w.permute(dim, *(d for d in range(w.dim()) if d != dim)).reshape(w.shape[dim], -1)


def forward(w, u, v, dim):
    w_ = wide(w)
    s = wide(u) @ (matrix(w_, dim) @ wide(v))
    return (w_ / s).to(w.dtype), s


def backward(dy, ds, w, u, v, s, dim):
    w_, dw = wide(w), None
    if dy is not None:
        dw = wide(dy) / s
        through = -(dw * w_).sum() / s
        ds = through if ds is None else ds + through
    part = ds * outer(wide(u), wide(v), dim, w.shape)
    return (part if dw is None else dw + part).to(w.dtype), None, None


RULE = Rule("spectral_norm", forward, backward, inputs="w u v", outputs="y s")


@torch.no_grad()
def iterate(W: Tensor, u: Tensor, v: Tensor, n: int, eps: float) -> None:
    """Steps of the power iteration, in place."""
    for _ in range(n):
        u.copy_(F.normalize(W @ v, dim=0, eps=eps))
        v.copy_(F.normalize(W.mT @ u, dim=0, eps=eps))


def spectral_norm(
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    dim: int = 0,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    training: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:
    """Weight / (uᵀ W v), as `torch.nn.utils.parametrizations.spectral_norm` has it.

    Args:
        weight: (*B), at least 2 dimensions, floating point.
        u: (h), the left singular vector as far as it is known, of length 1; h is weight's size at `dim`.
        v: (w), the right one; w is the product of the other sizes.
        dim: the dimension that stays in W = h w; the others are flattened.
        n_power_iterations: how many steps of the power iteration to take, if training.
        eps: the least norm to divide by.
        training: update u and v, in place, before they are used.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        weight's shape and dtype; u and v get no gradient.

    Raises:
        ValueError: shapes that disagree, no such dimension, or a negative number of iterations.
        TypeError: the tensors are not of one floating-point dtype.
    """
    if training and n_power_iterations:
        if n_power_iterations < 0:
            raise ValueError(f"spectral_norm: n_power_iterations={n_power_iterations} must not be negative")
        _check(weight, u, v, dim)
        iterate(matrix(weight.detach(), dim % weight.dim()), u, v, n_power_iterations, eps)
        u, v = u.clone(), v.clone()  # a second forward updates them before the first backward
    w, u, v = OP.cast(weight, u.detach(), v.detach())
    _check(w, u, v, dim)
    args = (w, u, v, dim % w.dim())
    return RULE(*args, backend=OP.pick(RULE, backend, *args))[0]


def _check(w: Tensor, u: Tensor, v: Tensor, dim: int) -> None:
    OP.check(w, u, v)
    if w.dim() < 2 or not -w.dim() <= dim < w.dim():
        raise ValueError(f"spectral_norm: dim={dim} is none of the dimensions of weight {tuple(w.shape)}, of which it needs 2")
    h = w.shape[dim]
    if u.shape[0] != h or v.shape[0] * h != w.numel():
        found = f"u {tuple(u.shape)} and v {tuple(v.shape)}"
        raise ValueError(f"spectral_norm: {found} do not go with weight {tuple(w.shape)} and dim={dim}")


class SpectralNorm(nn.Module):
    """W / σ(W) as a parametrization: `parametrize.register_parametrization(layer, "weight", SpectralNorm(layer.weight))`.

    Its buffers have the names and shapes of `torch.nn.utils.parametrizations.spectral_norm`; a vector is normalized. In
    training every forward takes `n_power_iterations` steps.
    """

    def __init__(
        self, weight: Tensor, n_power_iterations: int = 1, dim: int = 0, eps: float = 1e-12, backend: str = "auto"
    ) -> None:
        super().__init__()
        if not -weight.dim() <= dim < weight.dim():
            raise IndexError(f"SpectralNorm: dim={dim} is none of the dimensions of weight {tuple(weight.shape)}")
        if n_power_iterations < 1:
            raise ValueError(f"SpectralNorm: n_power_iterations={n_power_iterations} must be at least 1")
        self.n_power_iterations, self.dim, self.eps, self.backend = n_power_iterations, dim % weight.dim(), eps, backend
        if weight.dim() > 1:
            W = matrix(weight.detach(), self.dim)
            self._u: Tensor
            self._v: Tensor
            for name, size in (("_u", W.shape[0]), ("_v", W.shape[1])):
                self.register_buffer(name, F.normalize(W.new_empty(size).normal_(), dim=0, eps=eps))
            iterate(W, self._u, self._v, 15, eps)

    def forward(self, weight: Tensor) -> Tensor:
        if weight.dim() == 1:
            return normalize(weight, dim=0, eps=self.eps, backend=self.backend)
        options = (self.dim, self.n_power_iterations, self.eps, self.training)
        return spectral_norm(weight, self._u, self._v, *options, backend=self.backend)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


def reference(weight, u, v, dim=0, n_power_iterations=1, eps=1e-12, training=False):
    W = wide(weight).movedim(dim, 0).flatten(1)
    return (wide(weight) / torch.einsum("h,hw,w->", wide(u), W, wide(v))).to(weight.dtype)


def case(draw: Draw) -> Case:
    shape = [draw.size(least=1) for _ in range(draw.choice((2, 2, 3)))]
    w, dim = draw.tensor(*shape), draw.random.randrange(-len(shape), len(shape))
    h = shape[dim]
    rest = w.numel() // h
    u, v = (draw.tensor(s, grad=False) for s in (h, rest))
    # σ of a random u and v could be near 0, where W/σ has no derivative to speak of
    u, v = (torch.where(t < 0, -t, t) + 0.5 for t in (u, v))
    w = w.detach().abs().add(0.1).requires_grad_()
    return Case((w, u / u.norm(), v / v.norm(), dim), {})


def bench(draw: Draw) -> Any:
    w = draw.tensor(1024, 1024)
    u, v = (F.normalize(draw.tensor(1024, grad=False), dim=0) for _ in range(2))
    return Case((w, u, v), {})


OP = Op(
    name="spectral_norm",
    call=spectral_norm,
    reference=reference,
    rules=(RULE,),
    shapes="weight: *B, u: h, v: w -> *B",
    source="Miyato et al. 2018, eq. 7–12",
    autocast=FLOAT32_CUDA,
    case=case,
    bench=bench,
)
OPS = (OP,)
