"""Division by a norm: normalize, weight_norm and local_response_norm.

Maths     normalize            n = ‖x‖ₚ    d = max(n, eps)    y = x / d
                               dn' = dn − [n ≥ eps] Σ dy y / d         dx = dy / d + dn' ∂n/∂x
                               ∂n/∂x = x / n (p = 2)    sgn x (p = 1)    sgn x |x|ᵖ⁻¹ n¹⁻ᵖ (else), and 0 where n = 0
                               ∂n/∂x = sgn x [|x| = n] / (how many are) (p = ±∞)    0 (p = 0)
          weight_norm          n = ‖v‖    w = g v / n
                               dg = Σ dw v / n    dn' = dn − g dg / n    dv = g dw / n + dn' v / n
          local_response_norm  s = k + (α/size) Σ_window x²    y = x s⁻ᵝ
                               ds' = ds − β dy y / s    dx = dy s⁻ᵝ + 2 α/size x Σ_window' ds'
Letters   n and s residual outputs, hidden by the public functions; a norm runs over `dim` for normalize, over all dimensions
          but `dim` for weight_norm; a window is `size` channels, size // 2 of them before; window' is its mirror image; dt is
          the gradient of the loss by t, in t's shape
Numerics  half tensors are computed in float32; where torch's clamp is at its kink the gradient passes; ties of p = ±∞ share it
Source    Salimans & Kingma, "Weight Normalization", arXiv 1602.07868, eq. 3; Krizhevsky et al. 2012, §3.3
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.blocks import by_rows
from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.op import FLOAT32, FLOAT32_CUDA, Op
from bptoolkit.precision import wide
from bptoolkit.shapes import check_alike, check_floating


def normalize_forward(x, p, dim, eps):
    n = torch.linalg.vector_norm(wide(x), p, dim, keepdim=True)
    return (x / n.clamp_min(eps)).to(x.dtype), n


def normalize_backward(dy, dn, x, n, p, dim, eps):
    x_ = wide(x)
    dx = None
    if dy is not None:
        d = n.clamp_min(eps)
        dx = wide(dy) / d
        through_n = torch.where(n >= eps, -(dx * x_ / d).sum(dim, keepdim=True), 0.0)
        dn = through_n if dn is None else dn + through_n
    u = slope_of_norm(x_, n, p, dim)
    dx = dn * u if dx is None else dx + dn * u
    return dx.expand(x.shape).to(x.dtype)


def slope_of_norm(x, n, p, dim):
    """∂n/∂x for n = ‖x‖ₚ, with torch's subgradients."""
    if p == 0:
        return torch.zeros_like(x)
    if p == 1:
        return x.sgn()
    if abs(p) == inf:
        hit = x.abs() == n
        return torch.where(hit, x.sgn(), 0.0) / hit.sum(dim, keepdim=True)
    zero = n == 0
    safe = torch.where(zero, 1.0, n)
    if p == 2:
        return torch.where(zero, 0.0, x / safe)
    if p < 2:  # a power below 1 has an infinite slope at 0, which torch leaves out
        at_zero = x == 0
        a = torch.where(at_zero, 1.0, x.abs())
        return torch.where(at_zero | zero, 0.0, x.sgn() * (a / safe).pow(p - 1))
    return torch.where(zero, 0.0, x * x.abs().pow(p - 2) / safe.pow(p - 1))


NORMALIZE_RULE = Rule("normalize", normalize_forward, normalize_backward, inputs="x", outputs="y n")


def weight_norm_forward(v, g, dims):
    v_ = wide(v)
    n = torch.linalg.vector_norm(v_, 2, dims, keepdim=True)
    return (v_ * (wide(g) / n)).to(v.dtype), n


def weight_norm_backward(dw, dn, v, g, n, dims, need):
    dv = dg = None
    along = by_rows if 0 not in dims else lambda formula, *tensors: formula(*tensors)  # rows keep their own norms

    if dw is not None:
        dg = along(lambda v, dw, n: (wide(dw) * wide(v)).sum(dims, keepdim=True) / n, v, dw, n)
    if need.v:
        a = None if dw is None else wide(g) / n
        c = 0 if dw is None else -a * dg / n
        c = c if dn is None else c + dn / n  # dv = a dw + c v
        rule = lambda v, dw, a, c: (wide(v) * c if dw is None else torch.addcmul(wide(dw) * a, wide(v), c)).to(v.dtype)  # noqa: E731
        dv = along(rule, v, dw, a, c)
    return dv, dg.to(g.dtype) if dg is not None and need.g else None


WEIGHT_NORM_RULE = Rule("weight_norm", weight_norm_forward, weight_norm_backward, inputs="v g", outputs="w n")


def window(t, before, after):
    """The sum of each channel with `before` ones before it and `after` ones after it."""
    C = t.shape[1]
    padded = F.pad(t, (*(0,) * (2 * (t.dim() - 2)), before, after))
    total = padded.narrow(1, 0, C)
    for k in range(1, before + after + 1):
        total = total + padded.narrow(1, k, C)
    return total


def response_forward(x, size, alpha, beta, k):
    x_ = wide(x)
    s = k + alpha / size * window(x_ * x_, size // 2, (size - 1) // 2)
    return (x_ * s.pow(-beta)).to(x.dtype), s


def response_backward(dy, ds, x, s, size, alpha, beta):
    def rule(x, s, dy, ds):
        x_, dx = wide(x), None
        if dy is not None:
            dx = wide(dy) * s.pow(-beta)
            through_s = -beta * dx * x_ / s
            ds = through_s if ds is None else ds + through_s
        from_s = 2 * alpha / size * x_ * window(ds, (size - 1) // 2, size // 2)
        return (from_s if dx is None else dx + from_s).to(x.dtype)

    return by_rows(rule, x, s, dy, ds)


RESPONSE_RULE = Rule("local_response_norm", response_forward, response_backward, inputs="x", outputs="y s")


def normalize(
    input: Tensor,
    p: float = 2.0,
    dim: int | Sequence[int] = 1,
    eps: float = 1e-12,
    out: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """X / max(‖x‖ₚ, eps) along a dimension, as `torch.nn.functional.normalize`.

    Args:
        input: (*B), floating point.
        p: the exponent of the norm; ±inf and 0 as in `torch.linalg.vector_norm`.
        dim: the dimension or dimensions of the norm.
        eps: the least divisor.
        out: where to write the result; no gradient then, as in torch.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        input's shape and dtype.

    Raises:
        TypeError: the input is not a tensor of floating point.
        ValueError: `dim` is out of range or repeated, or the named backend cannot run the call.
        RuntimeError: `out` is given and a gradient is wanted.
    """
    (input,) = NORMALIZE.cast(input)
    NORMALIZE.check(input)
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    rank = max(input.dim(), 1)
    if not all(isinstance(d, int) and -rank <= d < rank for d in dims) or len({d % rank for d in dims}) < len(dims):
        raise ValueError(f"normalize: dim={dim} does not name dimensions of input {tuple(input.shape)}, each once")
    if out is not None and torch.is_grad_enabled() and (input.requires_grad or out.requires_grad):
        raise RuntimeError("normalize: out= does not support automatic differentiation, but an argument requires grad")
    args = (input, float(p), dims, eps)
    y = NORMALIZE_RULE(*args, backend=NORMALIZE.pick(NORMALIZE_RULE, backend, *args))[0]
    return y if out is None else out.resize_(y.shape).copy_(y)


def weight_norm(v: Tensor, g: Tensor, dim: int | None = 0, *, backend: str = "auto") -> Tensor:
    """W = g v / ‖v‖, the norm over all dimensions but one, as `torch.nn.utils.parametrizations.weight_norm` has it.

    Args:
        v: (*B), the direction.
        g: the length: v's size at `dim` and 1 elsewhere; of any shape with one element if dim is None.
        dim: the dimension that keeps its own norms; None or −1 is one norm over everything, as in torch.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        v's shape and dtype.

    Raises:
        TypeError: the tensors are not of one floating-point dtype.
        ValueError: g's shape or `dim` does not fit v, or the named backend cannot run the call.
    """
    v, g = WEIGHT_NORM.cast(v, g)
    check_floating("weight_norm", "v", v)
    check_floating("weight_norm", "g", g)
    check_alike("weight_norm", "v", v, "g", g)
    if dim is not None and not -1 <= dim < v.dim():
        raise ValueError(f"weight_norm: dim={dim} is not a dimension of v {tuple(v.shape)}")
    whole = dim is None or dim == -1
    wanted = (1,) * v.dim() if whole else tuple(s if d == dim else 1 for d, s in enumerate(v.shape))
    if whole and g.numel() == 1:
        g = g.reshape(wanted)
    if tuple(g.shape) != wanted:
        raise ValueError(f"weight_norm: g has shape {tuple(g.shape)}; for v {tuple(v.shape)} and dim={dim} it needs {wanted}")
    dims = tuple(d for d in range(v.dim()) if whole or d != dim)
    if not dims:  # a norm over no dimension would be one over all of them: |v| is one over a further one
        return weight_norm(v.unsqueeze(1), g.unsqueeze(1), dim, backend=backend).squeeze(1)
    return WEIGHT_NORM_RULE(v, g, dims, backend=WEIGHT_NORM.pick(WEIGHT_NORM_RULE, backend, v, g))[0]


class WeightNorm(nn.Module):
    """W = g v / ‖v‖ as a parametrization: `parametrize.register_parametrization(layer, "weight", WeightNorm())`.

    Its parameters have the names, shapes and order of `torch.nn.utils.parametrizations.weight_norm`.
    """

    def __init__(self, dim: int | None = 0, backend: str = "auto") -> None:
        super().__init__()
        self.dim, self.backend = dim, backend

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        return weight_norm(v, g, self.dim, backend=self.backend)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return torch.norm_except_dim(weight, 2, -1 if self.dim is None else self.dim), weight


def local_response_norm(
    input: Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    *,
    backend: str = "auto",
) -> Tensor:
    """X / (k + alpha · mean of x² over neighbouring channels)^beta, as `torch.nn.functional.local_response_norm`.

    Args:
        input: (N, C, *I) with at least one position dimension, floating point.
        size: how many channels a mean runs over; those outside count as 0.
        alpha: the weight of the mean.
        beta: the exponent.
        k: what is added to it.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        input's shape and dtype.

    Raises:
        TypeError: the input is not a tensor of floating point.
        ValueError: the input has fewer than 3 dimensions, size is below 1, or the named backend cannot run the call.
    """
    (input,) = RESPONSE.cast(input)
    RESPONSE.check(input)
    if input.dim() < 3:
        raise ValueError(
            f"local_response_norm: input has shape {tuple(input.shape)}; it needs at least 3 dimensions (N, C, *I)"
        )
    if size < 1:
        raise ValueError(f"local_response_norm: size={size} must be at least 1")
    args = (input, size, alpha, beta, k)
    return RESPONSE_RULE(*args, backend=RESPONSE.pick(RESPONSE_RULE, backend, *args))[0]


class LocalResponseNorm(nn.LocalResponseNorm):
    """`torch.nn.LocalResponseNorm` with the backward above; same arguments."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`

    def forward(self, input: Tensor) -> Tensor:
        return local_response_norm(input, self.size, self.alpha, self.beta, self.k, backend=self.backend)


def weight_norm_reference(v, g, dim=0):
    dims = tuple(d for d in range(v.dim()) if dim is None or d != dim)
    v_ = wide(v)
    n = v_.square().sum(dims, keepdim=True).sqrt() if dims else v_.abs()
    return (v_ * (wide(g) / n)).to(v.dtype)


def response_reference(input, size, alpha=1e-4, beta=0.75, k=1.0):
    x = wide(input)
    C = x.shape[1]
    near = torch.arange(C)[None] - torch.arange(C)[:, None]
    band = ((near >= -(size // 2)) & (near <= (size - 1) // 2)).to(x.device, x.dtype)
    total = torch.tensordot(band, x.square(), ([1], [1])).movedim(0, 1)
    return (x / (k + alpha / size * total).pow(beta)).to(input.dtype)


def normalize_case(draw: Draw) -> Case:
    shape = (*draw.batch(), draw.size(), draw.size(1))
    p = draw.choice((2.0, 2.0, 1.0, 3.0, 1.5, inf))
    dim = draw.choice((-1, len(shape) - 1, (-1, -2)))
    return Case((draw.tensor(*shape), p, dim), draw.choice(({}, {"eps": 0.5})))


def weight_norm_case(draw: Draw) -> Case:
    shape = (draw.size(1), *(draw.size(1) for _ in range(draw.choice((0, 1, 2)))))
    dim = draw.choice((None, *range(len(shape))))
    length = (1,) * len(shape) if dim is None else tuple(s if d == dim else 1 for d, s in enumerate(shape))
    return Case((draw.tensor(*shape), draw.tensor(*length), dim), {})


def response_case(draw: Draw) -> Case:
    inner = tuple(draw.size() for _ in range(draw.choice((1, 1, 2))))
    options = draw.choice(({}, {"alpha": 0.5}, {"alpha": 0.3, "beta": 0.5, "k": 2.0}))
    return Case((draw.tensor(draw.size(), draw.size(), *inner), draw.choice((1, 2, 3, 5))), options)


NORMALIZE = Op(
    name="normalize",
    call=normalize,
    reference=F.normalize,
    rules=(NORMALIZE_RULE,),
    shapes="input: *B -> *B",
    source="the quotient rule; torch.nn.functional.normalize",
    autocast=FLOAT32_CUDA,
    case=normalize_case,
    bench=lambda draw: Case((draw.tensor(4096, 1024),), {}),
)
WEIGHT_NORM = Op(
    name="weight_norm",
    call=weight_norm,
    reference=weight_norm_reference,
    peer=lambda v, g, dim=0: torch._weight_norm(v, g, dim),
    rules=(WEIGHT_NORM_RULE,),
    shapes="v: *B, g: *G -> *B",
    source="Salimans & Kingma 2016, eq. 3",
    autocast=FLOAT32_CUDA,
    case=weight_norm_case,
    bench=lambda draw: Case((draw.tensor(2048, 1024), draw.tensor(2048, 1)), {}),
)
RESPONSE = Op(
    name="local_response_norm",
    call=local_response_norm,
    reference=response_reference,
    peer=F.local_response_norm,
    rules=(RESPONSE_RULE,),
    module=(LocalResponseNorm,),
    replaces=(nn.LocalResponseNorm,),
    shapes="input: *X -> *X",
    source="Krizhevsky et al. 2012, §3.3",
    autocast=FLOAT32,
    case=response_case,
    bench=lambda draw: Case((draw.tensor(16, 64, 32, 32), 5), {}),
)
OPS = (NORMALIZE, WEIGHT_NORM, RESPONSE)
