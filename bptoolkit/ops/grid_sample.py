"""Sampling at given places: grid_sample, and affine_grid, which makes the places of an affine map.

Maths     i_d = (g + 1) X_d/2 − ½, or (g + 1)(X_d − 1)/2 with align_corners; then clamped to 0 … X_d − 1 (border), or reflected
          at the outer edges, or centres, and clamped (reflection);  m_d = ∂i_d/∂g: X_d/2 or (X_d − 1)/2, minus it after an odd
          number of reflections, 0 where it is clamped
          y_c = Σ_k w_k x_c[j_k],  w_k = Π_d k_d(u_d),  u_d = i_d − ⌊i_d⌋,  over 2 taps a dimension, 4 (bicubic) or 1 (nearest)
          dx_c[j] = Σ_{p, k: j_k = j} w_k dy_c
          dw_k = Σ_c dy_c x_c[j_k]        dg_d = m_d Σ_k dw_k k′_d(u_d) Π_{e ≠ d} k_e(u_e),  0 for nearest
          linear taps  1 − u, u                                            derivatives  −1, 1
          cubic taps   o(1 + u), c(u), c(1 − u), o(2 − u),  a = −¾          o′(1 + u), c′(u), −c′(1 − u), −o′(2 − u)
                       c(s) = (a+2)s³ − (a+3)s² + 1    o(s) = a(s³ − 5s² + 8s − 4)
          affine_grid  g_p = θ b_p        dθ = Σ_p dg_p b_pᵀ
Letters   x input N C *X, g grid N *Y n, p one of M = N ∏Y places, k over the K taps of it, j places in x, d and e dimensions;
          θ N n n+1, b_p the place p of the output itself, and 1
Numerics  half tensors are computed in float32. Taps outside of x are left out (zeros); bicubic has its taps clamped or
          reflected, not i. x is gathered and dx added up a tap at a time, a few samples at a time
Source    Jaderberg et al. 2015, eq. 5 to 8; Keys 1981, eq. 4 (cubic)
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule, unwatched
from bptoolkit.op import LOW, Op
from bptoolkit.ops.bilinear import promoted
from bptoolkit.precision import wide

MODES = ("bilinear", "nearest", "bicubic")
PADDINGS = ("zeros", "border", "reflection")
BLOCK = 1 << 18  # elements of dy whose gradients are taken at a time, in the cache
A = -0.75


def forward(x, g, X, mode, padding, align):
    return F.grid_sample(wide(x), wide(g), mode, padding, align).to(x.dtype)


def scaled(g, X, align, vectors):
    """Grid coordinates as positions, and the factor; rounded as in torch's kernels, which `vectors` tells apart."""
    if align:
        return (g + 1) * ((X - 1) / 2), (X - 1) / 2
    return ((g + 1) * (X / 2) - 0.5 if vectors else ((g + 1) * X - 1) / 2), X / 2


def into(i, X, padding, align):
    """Positions brought into 0 … X − 1, and ∂/∂i of that; a NaN goes to 0, as in torch."""
    sign = torch.ones_like(i)
    if padding == "reflection":
        low, span = (0.0, X - 1) if align else (-0.5, X)
        if span == 0:
            return torch.zeros_like(i), torch.zeros_like(i)
        off = i - low
        away = off.abs()
        odd = (away / span).floor() % 2 == 1
        extra = away % span
        sign = torch.where((off < 0) ^ odd, -sign, sign)
        i = torch.where(odd, span - extra, extra) + low
    inside = (i > 0) & (i < X - 1)
    return torch.where(i.isnan(), 0.0, i.clamp(0, X - 1)), torch.where(inside, sign, 0.0)


def taps(g, X, mode, padding, align, vectors):
    """Of one dimension, per tap: the place j, whether it is in x, the weight and its derivative by g; N P each."""
    i, m = scaled(g, X, align, vectors)
    if mode != "bicubic" and padding != "zeros":
        i, sign = into(i, X, padding, align)
        m = m * sign
    if mode == "nearest":
        js, ws, slopes = [i.detach().round()], [torch.ones_like(i)], [None]
    else:
        low = i.detach().floor()
        u = i - low
        if mode == "bilinear":
            js, ws, m = [low, low + 1], [1 - u, u], m * torch.ones_like(u)
            slopes = [-m, m]
        else:
            js = [low + k for k in range(-1, 3)]
            ws = [outer(1 + u), inner(u), inner(1 - u), outer(2 - u)]
            slopes = [m * t for t in (outer_slope(1 + u), inner_slope(u), -inner_slope(1 - u), -outer_slope(2 - u))]
            if padding != "zeros":
                js = [into(j, X, padding, align)[0] for j in js]
    there = [(j >= 0) & (j < X) for j in js]  # not where it is NaN
    return [(j.long().clamp(0, X - 1), t, w, s) for j, t, w, s in zip(js, there, ws, slopes)]


def inner(s):
    return ((A + 2) * s - (A + 3)) * s * s + 1


def outer(s):
    return ((A * s - 5 * A) * s + 8 * A) * s - 4 * A


def inner_slope(s):
    return (3 * (A + 2) * s - 2 * (A + 3)) * s


def outer_slope(s):
    return (3 * A * s - 10 * A) * s + 8 * A


def gradients(dy, x, g, X, mode, padding, align, need):
    """dx (N C S) and dg (N P n) from dy (N C P), x (N C S) and g (N P n), in place where nothing watches."""
    n, (N, C, P), S, alone = len(X), dy.shape, prod(X), unwatched(dy, x, g)
    vectors = n == 2 and g.device.type == "cpu"
    each = [taps(g.select(2, n - 1 - d), X[d], mode, padding, align, vectors) for d in range(n)]
    dx = dy.new_zeros(N, C, S + 1) if need.x else None  # in the last place goes what belongs to no element
    dgs = [torch.zeros_like(g.select(2, 0)) for _ in range(n)]
    for chosen in itertools.product(*each):
        j, there = chosen[0][:2]
        for d in range(1, n):
            j, there = j * X[d] + chosen[d][0], there & chosen[d][1]  # N P
        w = [t[2] for t in chosen]
        if need.x:
            at, part = torch.where(there, j, S).unsqueeze(1).expand(N, C, P), dy * product(w).unsqueeze(1)
            dx = dx.scatter_add_(2, at, part) if alone else dx.scatter_add(2, at, part)
        if need.g:
            v = x.gather(2, j.unsqueeze(1).expand(N, C, P))
            dw = torch.where(there, (v.mul_(dy) if alone else v * dy).sum(1), 0.0)  # N P
            for d in range(n):
                dgs[d] = dgs[d] + product([dw, *w[:d], chosen[d][3], *w[d + 1 :]])
    return dx.narrow(2, 0, S) if need.x else None, torch.stack(dgs[::-1], 2) if need.g else None


def product(factors):
    out = factors[0]
    for f in factors[1:]:
        out = out * f
    return out


def backward(dy, x, g, X, mode, padding, align, need):
    N, C, S, P, n = g.shape[0], dy.shape[1], prod(X), prod(g.shape[1:-1]), len(X)
    wanted = RULE.Need(x=need.x, g=need.g and mode != "nearest")
    x_ = wide(x).reshape(N, C, S) if wanted.g else None
    dy_, g_ = wide(dy).reshape(N, C, P), wide(g).reshape(N, P, n)
    args = (X, mode, padding, align, wanted)
    each = max(C, 16) * P  # a sample's elements; of few channels, the integers count
    if unwatched(dy, x, g) and dy.is_cpu and N > 1 and N * each > BLOCK:
        step = max(BLOCK // each, 1)
        samples = (t.split(step) if t is not None else itertools.repeat(None) for t in (dy_, x_, g_))
        parts = [gradients(*some, *args) for some in zip(*samples)]
        dx, dg = (torch.cat(t) if t[0] is not None else None for t in zip(*parts))
    else:
        dx, dg = gradients(dy_, x_, g_, *args)
    if need.x:
        dx = dx.reshape(N, C, *X).to(dy.dtype)
    if need.g:
        dg = torch.zeros_like(g) if dg is None else dg.reshape(g.shape).to(g.dtype)
    return dx, dg if need.g else None


RULE = Rule("grid_sample", forward, backward, inputs="x g", outputs="y", uses={"x": "g", "g": "x g"})


def places(size, align, like):
    """The places b of a grid of the size, and 1: P n+1."""
    n = len(size)
    axes = []
    for d, s in enumerate(size):
        if type(s) is int:
            line = torch.linspace(-1, 1, s, dtype=like.dtype, device=like.device) if s > 1 else like.new_zeros(s)
        else:  # of a graph for any size, which linspace would bind to this one
            line = (2 * torch.arange(s, dtype=like.dtype, device=like.device) + 1 - s) / (s - 1)
        line = line if align else line * ((s - 1) / max(s, 1))
        axes.append(line.view(*[1] * d, s, *[1] * (n - 1 - d)).expand(*size))
    return torch.stack((*axes[::-1], torch.ones_like(axes[0])), -1).reshape(-1, n + 1)


def affine_forward(t, size, align):
    if all(type(s) is int for s in size):
        return F.affine_grid(wide(t), list(size), align).to(t.dtype)
    return (places(size[2:], align, wide(t)) @ wide(t).mT).reshape(size[0], *size[2:], len(size) - 2).to(t.dtype)


def affine_backward(dg, size, align):
    N, n, dg_ = dg.shape[0], len(size) - 2, wide(dg)
    return (dg_.reshape(N, -1, n).mT @ places(size[2:], align, dg_)).to(dg.dtype)


AFFINE_RULE = Rule("affine_grid", affine_forward, affine_backward, inputs="t", outputs="g")


def grid_sample(
    input: Tensor,
    grid: Tensor,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """The input at the places of the grid, interpolated, as `torch.nn.functional.grid_sample`.

    Args:
        input: (N, C, H, W) or (N, C, D, H, W), floating point.
        grid: (N, H', W', 2) or (N, D', H', W', 3): places (x, y) or (x, y, z), where −1 and 1 are the input's ends.
        mode: "bilinear" (also for volumes), "nearest" or "bicubic" (images alone).
        padding_mode: outside of the input "zeros", the "border", or its "reflection".
        align_corners: whether −1 and 1 are the centres of the corner elements, rather than their outer edges; None is False,
            with torch's warning.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (N, C, H', W') or (N, C, D', H', W').

    Raises:
        ValueError: shapes that disagree, an input without elements at its places, a mode that does not exist or not for
            volumes, or the named backend cannot run the call.
        TypeError: the tensors are not of one floating-point dtype.
    """
    if mode not in MODES:
        raise ValueError(f"grid_sample: mode={mode!r} is not known; choose from {', '.join(map(repr, MODES))}")
    if padding_mode not in PADDINGS:
        known = ", ".join(map(repr, PADDINGS))
        raise ValueError(f"grid_sample: padding_mode={padding_mode!r} is not known; choose from {known}")
    x, g = GRID_SAMPLE.cast(*promoted(input, grid))
    GRID_SAMPLE.check(x, g)
    n, found = x.dim() - 2, f"input has shape {tuple(x.shape)} and grid {tuple(g.shape)}"
    if n not in (2, 3) or g.dim() != n + 2 or g.shape[-1] != n or g.shape[0] != x.shape[0]:
        raise ValueError(f"grid_sample: {found}; they need (N C H W) and (N H' W' 2), or (N C D H W) and (N D' H' W' 3)")
    if any(s == 0 for s in x.shape[1:]):
        raise ValueError(f"grid_sample: {found}; only the number of samples may be 0")
    if mode == "bicubic" and n == 3:
        raise ValueError(f"grid_sample: mode='bicubic' is for images, not for an input of shape {tuple(x.shape)}")
    args = (x, g, tuple(x.shape[2:]), mode, padding_mode, _aligned("grid_sample", align_corners))
    return RULE(*args, backend=GRID_SAMPLE.pick(RULE, backend, *args))


def affine_grid(theta: Tensor, size: Sequence[int], align_corners: bool | None = None, *, backend: str = "auto") -> Tensor:
    """The places of a grid under affine maps, for `grid_sample`, as `torch.nn.functional.affine_grid`.

    Args:
        theta: (N, 2, 3) or (N, 3, 4), floating point: a matrix and a shift per sample.
        size: of the output of grid_sample, (N, C, H, W) or (N, C, D, H, W).
        align_corners: as in `grid_sample`.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (N, H, W, 2) or (N, D, H, W, 3).

    Raises:
        ValueError: theta and size do not go together, or a size is not positive.
        TypeError: theta is not a tensor of floating point.
    """
    (t,) = AFFINE_GRID.cast(theta)
    AFFINE_GRID.check(t)
    size, n = tuple(size), len(size) - 2
    if n not in (2, 3) or t.shape[1:] != (n, n + 1) or t.shape[0] != size[0]:
        found = f"theta has shape {tuple(t.shape)} and size is {size}"
        raise ValueError(f"affine_grid: {found}; they need (N 2 3) and (N C H W), or (N 3 4) and (N C D H W)")
    if any(s < 1 for s in size[1:]):
        raise ValueError(f"affine_grid: size={size} must be positive")
    args = (t, size, _aligned("affine_grid", align_corners))
    return AFFINE_RULE(*args, backend=AFFINE_GRID.pick(AFFINE_RULE, backend, *args))


def _aligned(op: str, given: bool | None) -> bool:
    if given is None:
        warnings.warn(f"{op}: align_corners is False by default since torch 1.3; say which is meant", stacklevel=3)
    return bool(given)


def reference(input, grid, mode="bilinear", padding_mode="zeros", align_corners=None):
    """By a matrix of weights from every element to every place: torch has no second derivative."""
    x, (n, X), size = wide(input), (input.dim() - 2, input.shape[2:]), grid.shape[1:-1]
    N = x.shape[0]
    total = None
    for d in range(n):
        i, W = wide(grid)[..., n - 1 - d].reshape(N, -1, 1), X[d]
        i = (i + 1) / 2 * (W - 1) if align_corners else (i + 1) / 2 * W - 0.5
        seen = torch.arange(W, device=x.device, dtype=x.dtype)
        reach = int(i.detach().nan_to_num(0, 0, 0).abs().max()) // max(W, 1) + 3 if i.numel() else 1
        if mode != "bicubic" and padding_mode != "zeros":
            i = mirrored(i, W, align_corners) if padding_mode == "reflection" else i
            i = i.clamp(0, W - 1)
            reach = 0
        far = torch.arange(-reach * W - 2, (reach + 1) * W + 2, device=x.device, dtype=x.dtype)  # taps, before they are padded
        s = (i - far).abs()
        if mode == "nearest":
            w = (i.round() == far).to(x.dtype) + 0 * i
        elif mode == "bilinear":
            w = (1 - s).clamp(min=0)
        else:
            w = torch.where(s <= 1, inner(s), torch.where(s < 2, outer(s), 0.0))
        if padding_mode != "zeros":
            far = (mirrored(far, W, align_corners) if padding_mode == "reflection" else far).clamp(0, W - 1)
        w = w @ (far.round().unsqueeze(1) == seen).to(x.dtype)  # N P W
        total = w if total is None else (total.unsqueeze(3) * w.unsqueeze(2)).flatten(2)
    return (x.flatten(2) @ total.mT).reshape(N, -1, *size).to(input.dtype)


def mirrored(i, W, align):
    """A triangle wave."""
    low, span = (0.0, W - 1) if align else (-0.5, W)
    if span == 0:
        return i * 0
    return span - ((i - low) % (2 * span) - span).abs() + low


def affine_reference(theta, size, align_corners=None):
    base = places(size[2:], align_corners, wide(theta))
    return (base @ wide(theta).mT).reshape(size[0], *size[2:], len(size) - 2).to(theta.dtype)


def case(draw: Draw) -> Case:
    n = draw.choice((2, 2, 3))
    mode = draw.choice(MODES if n == 2 else MODES[:2])
    most = 5 if n == 2 else 3
    N, C = draw.size(most=2), draw.size(least=1, most=3)
    X, Y = ([draw.size(least=1, most=most) for _ in range(n)] for _ in range(2))
    kwargs = {"mode": mode, "padding_mode": draw.choice(PADDINGS), "align_corners": draw.flag()}
    return Case((draw.tensor(N, C, *X), draw.tensor(N, *Y, n, scale=0.8)), kwargs)


def affine_case(draw: Draw) -> Case:
    n = draw.choice((2, 3))
    size = tuple(draw.size(least=1, most=5) for _ in range(n + 2))
    return Case((draw.tensor(size[0], n, n + 1), size), {"align_corners": draw.flag()})


def bench_of(X: tuple[int, ...], C: int, mode: str, N: int = 4) -> Any:
    def bench(draw: Draw) -> Case:
        n = len(X)
        turn = torch.eye(n, n + 1, device=draw.device) + 0.2 * draw.tensor(N, n, n + 1, grad=False).float()
        g = F.affine_grid(turn, [N, C, *X], align_corners=False).to(draw.dtype).requires_grad_()
        return Case((draw.tensor(N, C, *X), g), {"mode": mode, "align_corners": False})

    return bench


GRID_SAMPLE = Op(
    name="grid_sample",
    call=grid_sample,
    reference=reference,
    peer=F.grid_sample,
    rules=(RULE,),
    shapes="input: *X, grid: *G -> *Y",
    source="Jaderberg et al. 2015, eq. 5–8",
    autocast={"cpu": "float32"},
    case=case,
    bench={
        "bilinear": bench_of((64, 64), 32, "bilinear"),
        "nearest": bench_of((64, 64), 32, "nearest"),
        "bicubic": bench_of((48, 48), 16, "bicubic"),
        "volume": bench_of((16, 16, 16), 16, "bilinear"),
        "3 channels": bench_of((64, 64), 3, "bilinear", 8),  # its reference makes a matrix of places by elements
    },
)
AFFINE_GRID = Op(
    name="affine_grid",
    call=affine_grid,
    reference=affine_reference,
    peer=F.affine_grid,
    rules=(AFFINE_RULE,),
    shapes="theta: N I J -> *G",
    source="Jaderberg et al. 2015, eq. 1",
    autocast=LOW,
    case=affine_case,
    bench=lambda draw: Case((draw.tensor(16, 2, 3), (16, 3, 256, 256)), {"align_corners": False}),
)
OPS = (GRID_SAMPLE, AFFINE_GRID)
