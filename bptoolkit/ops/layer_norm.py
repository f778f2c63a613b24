"""Layer normalization over the last D dimensions.

Maths     m = mean(x)        r = 1/√(mean((x − m)²) + eps)        x̂ = (x − m) r        y = x̂ w + b
          with g = dy w:     dx = r (g − mean(g) − x̂ mean(g x̂)) + dm/N − dr r² x̂/N
          dw = Σₘ dy x̂       db = Σₘ dy
Letters   *B leading dimensions; M rows, one per element of *B; N elements in a row, over which mean() runs; m and r are
          residual outputs, of shape *B 1…1, hidden by the public function; dt is the gradient of the loss by t, in t's shape
Numerics  half inputs are normalized in float32, and m and r are float32; y has x's dtype
Source    Ba, Kiros & Hinton, "Layer Normalization", 2016, eq. 4
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.blocks import BLOCK
from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule, unwatched
from bptoolkit.op import FLOAT32_CUDA, Op
from bptoolkit.precision import wide
from bptoolkit.shapes import check_floating

_HALF = (torch.bfloat16, torch.float16)
_SMALL = 1 << 15  # elements, up to which the plain form is the faster one


def forward(x, w, b, D, eps):
    shape = x.shape[x.dim() - D :]
    if x.dtype not in _HALF or (x.device.type == "cuda" and all(t is None or t.dtype == x.dtype for t in (w, b))):
        return torch.native_layer_norm(x, shape, w, b, eps)  # *B …, *B 1…1, *B 1…1
    # torch's CPU kernel would give m and r in half, and its CUDA kernel takes no float32 w beside a half x
    y, m, r = torch.native_layer_norm(wide(x), shape, *(t if t is None else wide(t) for t in (w, b)), eps)
    return y.to(x.dtype), m, r


def backward(dy, dm, dr, x, w, b, m, r, D, need):
    plain = not need.x or dy is None or dm is not None or dr is not None
    if not plain and dy.is_cpu and dy.numel() > _SMALL and unwatched(dy, x, w, b, m, r):
        return in_blocks(dy, x, w, b, m, r, D, need)
    dx = dw = db = None
    if need.x or need.w:
        M, N = rows(x, D)
        r2 = r.reshape(M, 1)
        xh = (wide(x).reshape(M, N) - m.reshape(M, 1)) * r2  # M N
    if dy is not None:
        dy2 = wide(dy).reshape(rows(dy, D))  # M N
        dw = (dy2 * xh).sum(0).reshape(w.shape).to(w.dtype) if need.w else None
        db = dy2.sum(0).reshape(b.shape).to(b.dtype) if need.b else None
    if need.x:
        if dy is None:
            dx = torch.zeros_like(xh)  # M N
        else:
            g = dy2 if w is None else dy2 * w.reshape(N)  # M N
            dx = r2 * (g - g.mean(1, keepdim=True) - xh * (g * xh).mean(1, keepdim=True))
        if dm is not None:
            dx = dx + dm.reshape(M, 1) / N
        if dr is not None:
            dx = dx - dr.reshape(M, 1) * r2.square() / N * xh
        dx = dx.reshape(x.shape).to(x.dtype)
    return dx, dw, db


def rows(t, D):
    """M and N: how many rows, and how long; not reshape(M, -1), which is ambiguous when M is 0."""
    return prod(t.shape[: t.dim() - D]), prod(t.shape[t.dim() - D :])


def in_blocks(dy, x, w, b, m, r, D, need, block=2 * BLOCK):
    """The same backward in place, a block of rows at a time: 9 passes over each, of which one goes to memory.

    xc = x − m, t = dy xc:    dx = r (dy w − mean(dy w) − r² mean(t w) xc)    dw = Σₘ r t
    """
    shape, (M, N) = x.shape, rows(x, D)
    x, dy, m, r = x.reshape(M, N), dy.reshape(M, N), m.reshape(M, 1), r.reshape(M)
    v = r.new_ones(N) if w is None else w.reshape(N).to(r.dtype)
    dx, dw, db = torch.empty_like(x, memory_format=torch.contiguous_format), torch.zeros_like(v), torch.zeros_like(v)
    R = min(M, max(1, block // N))  # rows in a block
    xc_, t_, ones_ = r.new_empty(R, N), r.new_empty(R, N), r.new_ones(R)
    for xk, dyk, dxk, mk, rk, sk in zip(*(a.split(R) for a in (x, dy, dx, m, r, r.square() / -N))):
        k, dyk = len(rk), wide(dyk)
        xc = torch.sub(xk, mk, out=xc_[:k])  # R N
        t = torch.mul(dyk, xc, out=t_[:k])  # R N
        c1 = torch.mv(dyk, v).div_(-N)  # R: −mean(dy w)
        c2 = torch.mv(t, v).mul_(sk)  # R: −r² mean(t w)
        if need.w:
            dw.addmv_(t.mT, rk)  # N
        if need.b:
            db.addmv_(dyk.mT, ones_[:k])  # N
        out = dxk if dxk.dtype == r.dtype else t
        torch.addcmul(c1[:, None], dyk, v, out=out).addcmul_(xc, c2[:, None]).mul_(rk[:, None])  # R N
        if out is t:
            dxk.copy_(t)
    dw = dw.reshape(w.shape).to(w.dtype) if need.w else None
    db = db.reshape(b.shape).to(b.dtype) if need.b else None
    return dx.reshape(shape), dw, db


def kernel():
    from bptoolkit.triton_kernels.layer_norm import KERNEL

    return KERNEL


RULE = Rule(
    "layer_norm",
    forward,
    backward,
    inputs="x w b",
    outputs="y m r",
    uses={"x": "x w m r", "w": "x w m r", "b": "b"},
    kernel=kernel,
)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> Tensor:
    """(x − mean) / √(variance + eps) · weight + bias over the last dimensions, as `torch.nn.functional.layer_norm`.

    Args:
        input: (*B, *normalized_shape), floating point.
        normalized_shape: the sizes of the dimensions to normalize over, one or more.
        weight: of normalized_shape, or None; of input's dtype, or float32 for a half input.
        bias: as weight.
        eps: added to the variance.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        input's shape and dtype.

    Raises:
        ValueError: shapes or devices disagree, or the named backend cannot run the call.
        TypeError: a tensor is not of floating point, or the dtypes do not go together.
    """
    input, weight, bias = OP.cast(input, weight, bias)
    D = check_normalized("layer_norm", input, normalized_shape, weight, bias)
    args = (input, weight, bias, D, eps)
    return RULE(*args, backend=OP.pick(RULE, backend, *args))[0]


def check_normalized(op: str, x: Tensor, normalized_shape: Any, w: Tensor | None, b: Tensor | None = None) -> int:
    """How many dimensions to normalize over; raises for arguments that are not right."""
    check_floating(op, "input", x)
    if not isinstance(normalized_shape, (tuple, list)):
        raise TypeError(f"{op}: normalized_shape must be a tuple or list of sizes, not {normalized_shape!r}")
    shape = tuple(normalized_shape)
    D = len(shape)
    if not D:
        raise ValueError(f"{op}: normalized_shape is (); it needs at least one size")
    if x.dim() < D or tuple(x.shape[x.dim() - D :]) != shape:
        raise ValueError(f"{op}: input has shape {tuple(x.shape)}; it needs (*, {', '.join(map(str, shape))})")
    for name, t in (("weight", w), ("bias", b)):
        if t is None:
            continue
        check_floating(op, name, t)
        if tuple(t.shape) != shape:
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)} but normalized_shape is {shape}")
        if t.device != x.device:
            raise ValueError(f"{op}: {name} is on {t.device} but input is on {x.device}; they must be on one device")
        if t.dtype != x.dtype and (x.dtype not in _HALF or t.dtype != torch.float32):
            raise TypeError(f"{op}: {name} is {t.dtype} but input is {x.dtype}; it must be {_allowed(x.dtype)}")
    if w is not None and b is not None and w.dtype != b.dtype:
        raise TypeError(f"{op}: bias is {b.dtype} but weight is {w.dtype}; they must have one dtype")
    return D


def _allowed(dtype: torch.dtype) -> str:
    return f"{dtype} or torch.float32" if dtype in _HALF else str(dtype)


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` with the backward above; same parameters, state_dict and arguments."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps, backend=self.backend)


def reference(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    """In plain torch: third derivatives of torch's own layer_norm are wrong (it drops those of mean and rstd)."""
    x, dims = wide(input), tuple(range(-len(normalized_shape), 0))
    x = x - x.mean(dims, keepdim=True)
    y = x / (x.square().mean(dims, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(input.dtype)


def case(draw: Draw) -> Case:
    shape = tuple(draw.size() for _ in range(draw.choice((1, 1, 2))))
    x = draw.tensor(*draw.batch(), *shape)
    w, b = (draw.tensor(*shape) if draw.random.random() < 0.75 else None for _ in range(2))
    return Case((x, shape, w, b), {"eps": draw.choice((1e-5, 0.1))})


def bench(draw: Draw) -> Case:
    return Case((draw.tensor(4096, 1024), (1024,), draw.tensor(1024), draw.tensor(1024)), {})


def bench_sequences(draw: Draw) -> Case:
    return Case((draw.tensor(32, 128, 512), (512,), draw.tensor(512), draw.tensor(512)), {})


OP = Op(
    name="layer_norm",
    call=layer_norm,
    reference=reference,
    peer=F.layer_norm,
    rules=(RULE,),
    module=(LayerNorm,),
    replaces=(nn.LayerNorm,),
    shapes="input: *B N, weight: N, bias: N -> *B N",
    source="Ba, Kiros & Hinton 2016, eq. 4",
    autocast=FLOAT32_CUDA,
    case=case,
    bench={"4096 × 1024": bench, "32 × 128 × 512": bench_sequences},
)
OPS = (OP,)
