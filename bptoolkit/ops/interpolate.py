"""Interpolation: nearest, nearest-exact, linear, bilinear, trilinear, bicubic, area, and antialiased bicubic and bilinear.

Maths     In one dimension y[j] = Σ_t w[j,t] x[i[j,t]], T taps for each output; in several, one dimension after the other,
          y = A_H x A_Wᵀ for an image, where A[j,m] = Σ_{t: i[j,t] = m} w[j,t]. This is linear in x, so
          dx = A_Hᵀ dy A_W;  in each dimension  dx[m] = Σ_{(j,t): i[j,t] = m} w[j,t] dy[j]
          the sum over the outputs that source m went into, with the weights it went in with.

          With s the step between outputs, in inputs (X/Y or 1/scale; (X − 1)/(Y − 1) if corners are aligned), output j lies at
          r = s (j + ½) − ½, or s j if corners are aligned; i₀ = ⌊r⌋, λ = r − i₀:
          nearest        i = ⌊s j⌋                     w = 1
          nearest-exact  i = ⌊s (j + ½)⌋               w = 1
          linear         i = i₀, i₀ + 1                w = 1 − λ, λ              r at least 0, i at most X − 1
          cubic          i = i₀ − 1 … i₀ + 2           w = k(i − r), a = −¾      i clamped to 0 … X − 1
          area           i = ⌊jX/Y⌋ … ⌈(j+1)X/Y⌉ − 1   w = 1 / their number
          antialiased    all i with |i − r| < R max(s, 1), w = k((i − r) / max(s, 1)), normalized; R = 1, 2, a = −½ if cubic
          k(u) = 1 − |u| (linear);   (a+2)|u|³ − (a+3)u² + 1, |u| ≤ 1;  a(|u|³ − 5u² + 8|u| − 4), |u| < 2 (cubic)
Letters   x input, y output; X and Y their sizes in a dimension, m and i positions in x, j in y, t over T taps, w weights
Numerics  half tensors are computed in float32; weights are computed as the kernels of torch do; nothing is kept for backward.
          In float32 on the CPU each sum is one pass of embedding_bag over rows; elsewhere it is one index_add.
Source    Keys, "Cubic convolution interpolation for digital image processing", 1981, eq. 15 (cubic)
"""

from __future__ import annotations

from math import ceil, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule, unwatched
from bptoolkit.op import Op
from bptoolkit.precision import wide

MODES = {  # mode -> the numbers of spatial dimensions it has
    "nearest": (1, 2, 3),
    "nearest-exact": (1, 2, 3),
    "area": (1, 2, 3),
    "linear": (1,),
    "bilinear": (2,),
    "trilinear": (3,),
    "bicubic": (2,),
}
NEAREST = ("nearest", "nearest-exact")
_SMALL = 1 << 12  # elements, up to which the plain form is the faster one


def forward(x, X, Y, scales, mode, align_corners, antialias):
    size, scales = (list(Y), None) if scales is None else (None, list(scales))
    align_corners = None if mode in (*NEAREST, "area") else align_corners
    if antialias:  # torch's CPU kernel takes no half tensors, and is wrong where the output is 1 wide: then its transpose
        turned, t = Y[-1] == 1 and Y[0] > 1, wide(x)
        if turned:
            t, size, scales = t.mT.contiguous(), size and size[::-1], scales and scales[::-1]
        y = F.interpolate(t, size, scales, mode, align_corners, antialias=True).to(x.dtype)
        return y.mT.contiguous() if turned else y
    if mode in NEAREST and len(X) == 3 and channels_last(x):  # torch's kernel for it can round to other sources than its others
        return F.interpolate(x.contiguous(), size, scales, mode).contiguous(memory_format=torch.channels_last_3d)
    return F.interpolate(x, size, scales, mode, align_corners)


def channels_last(t):
    layout = torch.channels_last if t.dim() == 4 else torch.channels_last_3d
    return t.dim() > 3 and t.is_contiguous(memory_format=layout) and not t.is_contiguous()


def backward(dy, X, Y, scales, mode, align_corners, antialias):
    dx, n = wide(dy), len(X)
    fast = dx.is_cpu and dx.dtype == torch.float32 and dx.numel() > _SMALL and unwatched(dx)
    last = fast and channels_last(dx)
    if last:
        dx = dx.movedim(1, -1)  # N H W C, contiguous
    for k in range(n):
        scale, dim = None if scales is None else scales[k], (1 if last else 2) + k
        s = whole_step(X[k], Y[k], scale)
        if s == 1 or (X[k] == Y[k] and "linear" in mode and not antialias):  # then the kernels ignore the scale
            continue
        if mode in NEAREST and s:
            dx = dx.reshape(*dx.shape[:dim], X[k], s, *dx.shape[dim + 1 :])  # X s
            dx = sum((dx.select(dim + 1, a) for a in range(1, s)), dx.select(dim + 1, 0))
            continue
        i, w, real = taps(n, X[k], Y[k], scale, mode, align_corners, antialias, dx)
        dx = (in_bags if fast else scattered)(dx, dim, X[k], i, w, real)
    return (dx.movedim(-1, 1) if last else dx).to(dy.dtype)


def whole_step(X, Y, scale):
    """Y / X where it is 1, 2, 3 or 4 and rounding cannot disturb it, else None."""
    for s in (1, 2, 3, 4):
        if s * X == Y and (scale is None or scale == s):
            return s
    return None


def scattered(dy, dim, X, i, w, real):
    t, after = dy, [1] * (dy.dim() - dim - 1)
    if w is not None:
        t = dy.unsqueeze(dim + 1) * w.view(*w.shape, *after)  # Y T
        if real is not None:  # not by weights of 0: an infinite dy times 0 is NaN
            t = torch.where(real.view(*real.shape, *after), t, 0.0)
        t = t.reshape(*dy.shape[:dim], i.numel(), *dy.shape[dim + 1 :])  # YT
    zeros = dy.new_zeros(*dy.shape[:dim], X, *dy.shape[dim + 1 :])
    return zeros.index_add(dim, i.flatten(), t)  # X


def in_bags(dy, dim, X, i, w, real):
    """The same sums, of rows: m's bag holds the rows j that m went into. Along the last dimension, of the transpose."""
    if dim == dy.dim() - 1:
        return in_bags(dy.transpose(-1, -2).contiguous(), dim - 1, X, i, w, real).transpose(-1, -2).contiguous()
    before, Y, after = prod(dy.shape[:dim]), dy.shape[dim], prod(dy.shape[dim + 1 :])
    j = torch.arange(Y).unsqueeze(1).expand(i.shape)
    i, j = (i.flatten(), j.flatten()) if real is None else (i[real], j[real])
    order = torch.argsort(i, stable=True)
    ends = torch.bincount(i, minlength=X).cumsum(0)
    starts, E = torch.cat([ends.new_zeros(1), ends[:-1]]), len(i)
    maps = torch.arange(before).unsqueeze(1)
    rows = (maps * Y + j[order]).flatten()
    offsets = torch.cat([(maps * E + starts).flatten(), torch.tensor([before * E])])
    if w is not None:
        w = (w.flatten() if real is None else w[real])[order].repeat(before)
    table = dy.reshape(before * Y, after)
    dx = torch.embedding_bag(table, rows, offsets, False, 0, False, w, True)[0]
    return dx.view(*dy.shape[:dim], X, *dy.shape[dim + 1 :])


def taps(n, X, Y, scale, mode, align_corners, antialias, like):
    """The sources i of each output, their weights w (None: 1), and which of the taps are real (None: all); Y T each."""
    options = {"dtype": like.dtype, "device": like.device}
    if mode in NEAREST:  # where the kernel of forward takes them from
        source, ones = torch.arange(X, **options).view(1, 1, *[1] * (n - 1), X), [1] * (n - 1)
        size, scales = ([*ones, Y], None) if scale is None else (None, [*map(float, ones), scale])
        i = F.interpolate(source, size, scales, mode)
        return i.view(Y, 1).long(), None, None
    j = torch.arange(Y, device=like.device).unsqueeze(1)
    if mode == "area":
        start, end = j * X // Y, ((j + 1) * X + Y - 1) // Y
        i = start + torch.arange((X + Y - 1) // Y + 1, device=like.device)
        return i.clamp(max=X - 1), (1 / (end - start).to(like.dtype)).expand(i.shape), i < end
    if align_corners:
        s = (X - 1) / (Y - 1) if Y > 1 else 0.0
    else:
        s = X / Y if scale is None else 1 / scale
    j = j.to(like.dtype)
    if antialias:
        return antialiased(X, s, j, mode)
    r = s * j if align_corners else s * (j + 0.5) - 0.5
    if mode != "bicubic":
        r = r.clamp(min=0)
    low = r.floor().clamp(max=X - 1)
    u, i = (r - low).clamp(0, 1), low.long()
    if mode != "bicubic":
        return torch.cat([i, (i + 1).clamp(max=X - 1)], 1), torch.cat([1 - u, u], 1), None
    near = torch.arange(-1, 3, device=like.device)
    return (i + near).clamp(0, X - 1), cubic(near - u, -0.75), None


def antialiased(X, s, j, mode):
    radius, wider = 1 if mode == "bilinear" else 2, max(s, 1.0)
    center, support = s * (j + 0.5), radius * wider  # of pixels that begin at whole numbers
    start = (center - support + 0.5).long().clamp(min=0)
    end = (center + support + 0.5).long().clamp(max=X)
    i = start + torch.arange(2 * ceil(support) + 1, device=j.device)
    u, real = (i - center + 0.5) / wider, i < end
    w = (1 - u.abs()).clamp(min=0) if mode == "bilinear" else cubic(u, -0.5)
    w = torch.where(real, w, 0.0)
    return i.clamp(max=X - 1), w / w.sum(1, keepdim=True), real


def cubic(u, a):
    u = u.abs()
    inner, outer = ((a + 2) * u - (a + 3)) * u * u + 1, ((a * u - 5 * a) * u + 8 * a) * u - 4 * a
    return torch.where(u <= 1, inner, torch.where(u < 2, outer, 0.0))


RULE = Rule("interpolate", forward, backward, inputs="x", outputs="y")


def interpolate(
    input: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:
    """Resize a signal, an image or a volume, as `torch.nn.functional.interpolate`.

    Args:
        input: (N, C, L), (N, C, H, W) or (N, C, D, H, W), floating point.
        size: the output's size, one int or one per dimension; either this or `scale_factor`.
        scale_factor: the ratio of the sizes, one number or one per dimension.
        mode: "nearest", "nearest-exact" or "area"; "linear" (3-D input), "bilinear" or "bicubic" (4-D), "trilinear" (5-D).
        align_corners: whether the centres of the corner elements coincide, rather than their outer edges; for the linear and
            cubic modes alone.
        recompute_scale_factor: compute the scale anew from the two sizes, instead of taking `scale_factor` as it is.
        antialias: widen the filter when the output is smaller; "bilinear" and "bicubic" alone.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (N, C, …) of the size asked for, or ⌊input's size · scale_factor⌋.

    Raises:
        ValueError: shape, mode and options do not go together, a size is 0, or the named backend cannot run the call.
        TypeError: the input is not a tensor of floating point.
    """
    OP.check(input)
    n = input.dim() - 2
    if mode not in MODES:
        raise ValueError(f"interpolate: mode={mode!r} is not known; choose from {', '.join(map(repr, MODES))}")
    if n not in MODES[mode]:
        wanted = " or ".join(str(k + 2) for k in MODES[mode])
        raise ValueError(f"interpolate: mode={mode!r} needs an input of {wanted} dimensions; it has shape {tuple(input.shape)}")
    if align_corners is not None and mode in (*NEAREST, "area"):
        raise ValueError(f"interpolate: align_corners={align_corners} has no meaning with mode={mode!r}; leave it out")
    if antialias and mode not in ("bilinear", "bicubic"):
        raise ValueError(f"interpolate: antialias=True goes with mode='bilinear' and 'bicubic', not with {mode!r}")
    if (size is None) == (scale_factor is None):
        raise ValueError(f"interpolate: size={size!r} and scale_factor={scale_factor!r}; give exactly one of them")
    X = tuple(input.shape[2:])
    if size is not None:
        if recompute_scale_factor:
            raise ValueError(f"interpolate: recompute_scale_factor=True has no meaning with size={size!r}")
        Y, scales = _each("size", size, n), None
    else:
        scales = _each("scale_factor", scale_factor, n)
        Y = tuple(torch.sym_int(m * s) for m, s in zip(X, scales))
        if recompute_scale_factor or mode == "area":
            scales = None
    if any(m < 1 for m in (*X, *Y, input.shape[1])):
        raise ValueError(
            f"interpolate: input {tuple(input.shape)} with size={size!r} and scale_factor={scale_factor!r} gives {Y}; "
            "every size but the batch's must be at least 1"
        )
    args = (input, X, Y, scales, mode, bool(align_corners), antialias)
    return RULE(*args, backend=OP.pick(RULE, backend, *args))


def _each(name: str, value: Any, n: int) -> tuple[Any, ...]:
    """The value per dimension, of one or one per dimension."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * n
    if len(values) != n:
        raise ValueError(f"interpolate: {name}={value!r} must be one number, or one for each of the {n} dimensions")
    if name == "size" and any(isinstance(v, (float, str, Tensor)) for v in values):
        raise TypeError(f"interpolate: size={value!r} must be made of ints")
    return values if name == "size" else tuple(float(v) for v in values)


def _module_forward(module: Any, input: Tensor) -> Tensor:
    options = (module.size, module.scale_factor, module.mode, module.align_corners, module.recompute_scale_factor)
    return interpolate(input, *options, backend=module.backend)


class Upsample(nn.Upsample):
    """`torch.nn.Upsample` with the backward above; same arguments."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`

    def forward(self, input: Tensor) -> Tensor:
        return _module_forward(self, input)


class UpsamplingNearest2d(nn.UpsamplingNearest2d):
    """`torch.nn.UpsamplingNearest2d` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return _module_forward(self, input)


class UpsamplingBilinear2d(nn.UpsamplingBilinear2d):
    """`torch.nn.UpsamplingBilinear2d` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return _module_forward(self, input)


def case(draw: Draw) -> Case:
    mode = draw.choice(tuple(MODES))
    n = draw.choice(MODES[mode])
    most = (8, 5, 3)[n - 1]
    X = [draw.size(least=1, most=most) for _ in range(n)]
    kwargs: dict[str, Any] = {"mode": mode}
    if draw.flag():
        kwargs["size"] = [draw.choice(range(1, most + 2)) for _ in range(n)]
    else:
        kwargs["scale_factor"] = [draw.choice([s for s in (0.5, 0.7, 1.0, 1.3, 2.0, 2.4) if int(m * s)]) for m in X]
        kwargs["recompute_scale_factor"] = draw.choice((None, True))
    if mode not in (*NEAREST, "area"):
        kwargs["align_corners"] = draw.choice((None, True, False))
    if mode in ("bilinear", "bicubic"):
        size = kwargs.get("size") or [int(m * s) for m, s in zip(X, kwargs["scale_factor"])]
        kwargs["antialias"] = draw.flag() and size[1] > 1  # torch's forward is wrong at a width of 1
    return Case((draw.tensor(draw.size(most=2), draw.size(least=1, most=2), *X),), kwargs)


def _bench(shape: tuple[int, ...], **kwargs: Any) -> Any:
    def bench(draw: Draw) -> Case:
        return Case((draw.tensor(*shape),), {"scale_factor": 2, **kwargs})

    return bench


OP = Op(
    name="interpolate",
    call=interpolate,
    reference=F.interpolate,
    rules=(RULE,),
    module=(Upsample, UpsamplingNearest2d, UpsamplingBilinear2d),
    replaces=(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
    shapes="input: *B -> *B'",
    source="Keys 1981, eq. 15 (cubic)",
    case=case,
    bench={
        "nearest": _bench((8, 32, 64, 64)),
        "nearest, ÷ 2": _bench((8, 32, 128, 128), scale_factor=0.5),
        "linear": _bench((16, 64, 512), mode="linear"),
        "bilinear": _bench((8, 32, 64, 64), mode="bilinear"),
        "bilinear, 2.5": _bench((8, 32, 48, 48), mode="bilinear", scale_factor=2.5),
        "bicubic": _bench((4, 16, 64, 64), mode="bicubic"),
        "trilinear": _bench((2, 8, 16, 32, 32), mode="trilinear"),
        "area": _bench((8, 32, 128, 128), mode="area", scale_factor=0.5),
        "antialiased": _bench((8, 32, 128, 128), mode="bilinear", scale_factor=0.5, antialias=True),
    },
)
OPS = (OP,)
