"""Batch normalization, and with the relu after it, fused. For the maths see the ops batch_norm and batch_norm_relu.

forward    training: programs measure the mean and the squares about it of their share of a channel; one kernel puts these
           together, and the running statistics with them; then x is normalized, a tile a program
backward   programs sum dz and dz (x − m) over their share of a channel; the partial sums, in float32, are added up: no atomics,
           the same bits every time; then dx, a tile a program. The relu's sign is computed again from x, as forward did

A tile is of BM × BC × BS elements of x as M × C × S: samples, channels and positions. Where the channels lie innermost,
positions count as samples, and S is 1.
"""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from bptoolkit.ops import batch_norm
from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.functions import chain, relu
from bptoolkit.triton_kernels.kernel import WARP, Kernel, computed_in_float32, dense, programs
from bptoolkit.triton_kernels.operator import operator

TILE = 2048  # elements
SEGMENT = 256  # of them in a row of positions, where there are samples or channels for the rest
CHANNELS = 64  # of a tile, where they lie innermost
PER_THREAD = 16  # elements of a tile
SHARES = 32  # partial results that are put together at a time


@triton.jit
def places(k, g, M, C, S, BM: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr):
    """Of tile k of a group g of channels: m (BM 1 1), c (1 BC 1) and s (1 1 BS), in int64, and where there are elements."""
    T = tl.cdiv(S, BS)
    m = (k // T * BM + tl.arange(0, BM))[:, None, None]
    c = (g * BC + tl.arange(0, BC))[None, :, None]
    s = (k % T * BS + tl.arange(0, BS))[None, None, :]
    return m.to(tl.int64), c.to(tl.int64), s.to(tl.int64), (m < M) & (c < C) & (s < S)


@triton.jit
def total(t):
    return tl.sum(tl.sum(t, 2), 0)[None, :, None]  # BM BC BS -> 1 BC 1


@triton.jit
def slope(r, w, c, C):
    """R w, the factor of x − m."""
    R = tl.load(r + c, c < C, other=0.0)
    if w is not None:
        R *= tl.load(w + c, c < C, other=0.0).to(tl.float32)
    return R


@triton.jit
def normalized(t, a, b, c, C):
    """A t + b, always by one operation, so that its sign is the same wherever it is computed."""
    if b is None:
        return t * a
    return tl.fma(t, a, tl.load(b + c, c < C, other=0.0).to(tl.float32))


@triton.jit
def through(dy, z, TYPE: tl.constexpr):
    """Dy where the relu of z, rounded as y is, lets it through."""
    return chain(dy, z.to(TYPE).to(tl.float32), "relu")


@triton.jit(do_not_specialize=["M", "P"])
def measure_kernel(x, n, mean, M2, xm, xc, xs, M, C, S, P, BM: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr):
    p, g, T = tl.program_id(0) % P, tl.program_id(0) // P, tl.cdiv(S, BS)
    m, c, s, mask = places(p, g, M, C, S, BM, BC, BS)
    X = tl.load(x + m * xm + c * xc + s * xs, mask, other=0.0).to(tl.float32)  # BM BC BS
    # Sums about the mean of the first tile, of which there are not many in all: they lose little to a large mean.
    shift = total(X) / (tl.minimum(M - p // T * BM, BM) * tl.minimum(S - p % T * BS, BS))  # 1 BC 1
    N = 0.0
    s1 = tl.zeros((BM, BC, BS), tl.float32)
    s2 = tl.zeros((BM, BC, BS), tl.float32)
    for k in range(p, tl.cdiv(M, BM) * T, P):
        m, c, s, mask = places(k, g, M, C, S, BM, BC, BS)
        X = tl.load(x + m * xm + c * xc + s * xs, mask, other=0.0).to(tl.float32)
        t = tl.where(mask, X - shift, 0.0)
        s1 += t
        s2 += t * t
        N += (tl.minimum(M - k // T * BM, BM) * tl.minimum(S - k % T * BS, BS)).to(tl.float32)
    at, channels = p.to(tl.int64) * C + c, c < C
    d = total(s1)
    tl.store(n + p, N)
    tl.store(mean + at, shift + d / N, channels)
    tl.store(M2 + at, total(s2) - d * (d / N), channels)


@triton.jit(do_not_specialize=["P"])
def statistics_kernel(
    n, mean, M2, old_mean, old_var, m, r, new_mean, new_var, P, C, M, eps, momentum, unbiased,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)  # BC
    channels = c < C
    first = tl.load(mean + c, channels, other=0.0)
    d = tl.zeros((BP, BC), tl.float32)
    for k in range(0, P, BP):
        p = (k + tl.arange(0, BP)).to(tl.int64)  # BP
        mask = (p < P)[:, None] & channels[None, :]
        N = tl.load(n + p, p < P, other=0.0)[:, None]  # BP 1
        d += N * (tl.load(mean + p[:, None] * C + c[None, :], mask, other=0.0) - tl.where(mask, first[None, :], 0.0))
    mu = first + tl.sum(d, 0) / M
    d = tl.zeros((BP, BC), tl.float32)
    for k in range(0, P, BP):
        p = (k + tl.arange(0, BP)).to(tl.int64)
        mask = (p < P)[:, None] & channels[None, :]
        N = tl.load(n + p, p < P, other=0.0)[:, None]
        off = tl.load(mean + p[:, None] * C + c[None, :], mask, other=0.0) - tl.where(mask, mu[None, :], 0.0)
        d += tl.load(M2 + p[:, None] * C + c[None, :], mask, other=0.0) + N * off * off
    v = tl.sum(d, 0) / M
    tl.store(m + c, mu, channels)
    tl.store(r + c, 1 / tl.sqrt(v + eps), channels)
    if old_mean is not None:
        old = tl.load(old_mean + c, channels, other=0.0).to(tl.float32)
        tl.store(new_mean + c, (1 - momentum) * old + momentum * mu, channels)
        old = tl.load(old_var + c, channels, other=0.0).to(tl.float32)
        tl.store(new_var + c, (1 - momentum) * old + momentum * (v * unbiased), channels)


@triton.jit(do_not_specialize=["M"])
def normalize_kernel(
    x, w, b, m, r, y, xm, xc, xs, M, C, S, RELU: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr
):
    tiles = tl.cdiv(M, BM) * tl.cdiv(S, BS)
    i, c, s, mask = places(tl.program_id(0) % tiles, tl.program_id(0) // tiles, M, C, S, BM, BC, BS)
    X = tl.load(x + i * xm + c * xc + s * xs, mask, other=0.0).to(tl.float32)  # BM BC BS
    Y = normalized(X - tl.load(m + c, c < C, other=0.0), slope(r, w, c, C), b, c, C)
    if RELU:
        Y = relu(Y)
    tl.store(y + i * C * S + c * S + s, Y.to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["M", "P"])
def sums_kernel(
    dy, x, w, b, m, r, s1, s2, dym, dyc, dys, xm, xc, xs, M, C, S, P,
    RELU: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    p, g = tl.program_id(0) % P, tl.program_id(0) // P
    i, c, s, mask = places(p, g, M, C, S, BM, BC, BS)
    mu = tl.load(m + c, c < C, other=0.0)  # 1 BC 1
    a = slope(r, w, c, C)
    S1 = tl.zeros((BM, BC, BS), tl.float32)
    S2 = tl.zeros((BM, BC, BS), tl.float32)
    for k in range(p, tl.cdiv(M, BM) * tl.cdiv(S, BS), P):
        i, c, s, mask = places(k, g, M, C, S, BM, BC, BS)
        DZ = tl.load(dy + i * dym + c * dyc + s * dys, mask, other=0.0).to(tl.float32)  # BM BC BS
        X = tl.load(x + i * xm + c * xc + s * xs, mask, other=0.0).to(tl.float32)
        t = X - mu
        if RELU:
            DZ = through(DZ, normalized(t, a, b, c, C), x.dtype.element_ty)
        S1 += DZ
        S2 += tl.where(mask, DZ * t, 0.0)
    at = p.to(tl.int64) * C + c
    tl.store(s1 + at, total(S1), c < C)
    tl.store(s2 + at, total(S2), c < C)


@triton.jit(do_not_specialize=["M"])
def gradient_kernel(
    dy, dm, dr, x, w, b, m, r, s1, s2, dx, dym, dyc, dys, xm, xc, xs, M, C, S, count,
    RELU: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(M, BM) * tl.cdiv(S, BS)
    i, c, s, mask = places(tl.program_id(0) % tiles, tl.program_id(0) // tiles, M, C, S, BM, BC, BS)
    DZ = tl.load(dy + i * dym + c * dyc + s * dys, mask, other=0.0).to(tl.float32)  # BM BC BS
    a = slope(r, w, c, C)  # 1 BC 1
    if x is not None:
        X = tl.load(x + i * xm + c * xc + s * xs, mask, other=0.0).to(tl.float32)  # BM BC BS
        t = X - tl.load(m + c, c < C, other=0.0)
        if RELU:
            DZ = through(DZ, normalized(t, a, b, c, C), x.dtype.element_ty)
    DX = DZ * a
    if s1 is not None:
        R = tl.load(r + c, c < C, other=0.0)
        DM = -a * tl.load(s1 + c, c < C, other=0.0)
        DR = tl.load(s2 + c, c < C, other=0.0)
        if w is not None:
            DR *= tl.load(w + c, c < C, other=0.0).to(tl.float32)
        if dm is not None:
            DM += tl.load(dm + c, c < C, other=0.0)
        if dr is not None:
            DR += tl.load(dr + c, c < C, other=0.0)
        DX += DM / count - (t * R) * (R * (R * DR) / count)  # not r³, which leaves float32's range where x is large
    tl.store(dx + i * C * S + c * S + s, DX.to(dx.dtype.element_ty), mask)


def innermost(x: Tensor) -> bool:
    """Whether the channels are what lies side by side."""
    return x.dim() == 2 or (x.shape[1] > 1 and x.stride(1) == 1)


def view(t: Tensor, inner: bool) -> Tensor:
    """T as M C S; a copy where it has no such strides."""
    if inner:
        return t.movedim(1, -1).reshape(-1, t.shape[1], 1)
    return t.reshape(t.shape[0], t.shape[1], -1)


def like(x: Tensor, inner: bool) -> Tensor:
    """A dense tensor of x's shape and dtype, the channels where they are in x."""
    shape = (x.shape[0], *x.shape[2:], x.shape[1]) if inner else x.shape
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    return y.movedim(-1, 1) if inner else y


def per_channel(x: Tensor, *given: bool) -> list[Tensor]:
    """Float32 tensors of shape C; of shape 0 where they are not given."""
    return [torch.empty(x.shape[1] if g else 0, dtype=torch.float32, device=x.device) for g in given]


def tile(M: int, C: int, S: int, warp: int) -> tuple[int, int, int, int]:
    """BM, BC, BS and the number of warps, of `warp` threads each."""
    up = triton.next_power_of_2
    if S == 1:
        BS, BC = 1, min(up(C), CHANNELS)
        BM = min(up(M), TILE // BC)
    else:
        BS = min(up(S), SEGMENT)
        BM = min(up(M), TILE // BS)
        BC = min(up(C), TILE // (BM * BS))
        BS = min(up(S), TILE // (BM * BC))
    return BM, BC, BS, min(max(BM * BC * BS // (PER_THREAD * warp), 1), 1024 // warp)


class Grid:
    """The sizes of the launches over a tensor of M C S."""

    def __init__(self, x: Tensor) -> None:
        self.M, self.C, self.S = shape = x.shape
        *self.blocks, warps = tile(*shape, WARP)
        BM, BC, BS = self.blocks
        self.tiles, self.groups = triton.cdiv(self.M, BM) * triton.cdiv(self.S, BS), triton.cdiv(self.C, BC)
        self.P = min(self.tiles, triton.cdiv(2 * programs(x.device, warps), self.groups))  # programs that share a channel
        self.options = {"num_warps": warps, "enable_fp_fusion": True}


def _launch_forward(
    x: Tensor,
    w: Tensor | None,
    b: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    y, m, r, new_mean, new_var = _fake_forward(x, w, b, running_mean, running_var, training, momentum, eps, relu)
    if not x.numel():
        kept = [t.copy_(old) if t.numel() else t for t, old in ((new_mean, running_mean), (new_var, running_var))]
        return y, m.zero_(), r.zero_(), *kept
    x3 = view(x, innermost(x))
    grid = Grid(x3)
    P, C, count = grid.P, grid.C, grid.M * grid.S
    if training:
        n, mean, M2 = (torch.empty(size, dtype=torch.float32, device=x.device) for size in (P, (P, C), (P, C)))
        shape = (*x3.stride(), grid.M, C, grid.S, P, *grid.blocks)
        measure_kernel[(P * grid.groups,)](x3, n, mean, M2, *shape, **grid.options)
        BC = min(triton.next_power_of_2(C), CHANNELS)
        shape = (P, C, float(count), eps, momentum, count / max(count - 1, 1), min(triton.next_power_of_2(P), SHARES), BC)
        tracked = (dense(running_mean), dense(running_var), m, r, new_mean, new_var)
        statistics_kernel[(triton.cdiv(C, BC),)](n, mean, M2, *tracked, *shape, num_warps=4, enable_fp_fusion=True)
    else:
        m, r = (t.to(torch.float32) for t in batch_norm.given(running_mean, running_var, eps))
    shape = (*x3.stride(), grid.M, C, grid.S, relu, *grid.blocks)
    normalize_kernel[(grid.tiles * grid.groups,)](x3, dense(w), dense(b), m, r, y, *shape, **grid.options)
    return y, m, r, new_mean, new_var


def _fake_forward(x, w, b, running_mean, running_var, training, momentum, eps, relu):
    tracked = training and running_mean is not None
    return like(x, innermost(x)), *per_channel(x, True, True, tracked, tracked)


def _launch_backward(
    dy: Tensor | None,
    dm: Tensor | None,
    dr: Tensor | None,
    x: Tensor,
    w: Tensor | None,
    b: Tensor | None,
    m: Tensor,
    r: Tensor,
    training: bool,
    relu: bool,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dw, db = _fake_backward(dy, dm, dr, x, w, b, m, r, training, relu, need)
    if not x.numel():
        return dx, dw.zero_(), db.zero_()
    inner = innermost(x)
    x3, dy3 = (view(t, inner) for t in (x, x.new_zeros(()).expand(x.shape) if dy is None else dy))
    grid, (w, b, m, r, dm, dr) = Grid(x3), map(dense, (w, b, m, r, dm, dr))
    strides, sizes = (*dy3.stride(), *x3.stride()), (grid.M, grid.C, grid.S)
    s1 = s2 = None
    if training or need[1] or need[2]:
        s1, s2 = per_channel(x, True, True)
        part = torch.empty(2, grid.P, grid.C, dtype=torch.float32, device=x.device)
        shape = (*strides, *sizes, grid.P, relu, *grid.blocks)
        sums_kernel[(grid.P * grid.groups,)](dy3, x3, w, b, m, r, *part, *shape, **grid.options)
        for s, shares in zip((s1, s2), part):
            torch.sum(shares, 0, out=s)
        dw = s2 * r if need[1] else dw
        db = s1 if need[2] else db
    if need[0]:
        if not training:  # m and r are constants, and x is there for the relu's sign alone
            dm = dr = s1 = s2 = None
            x3 = x3 if relu else None
        read = (dy3, dm, dr, x3, w, b, m, r, s1, s2)
        shape = (*strides, *sizes, float(grid.M * grid.S), relu, *grid.blocks)
        gradient_kernel[(grid.tiles * grid.groups,)](*read, dx, *shape, **grid.options)
    return dx, dw, db


def _fake_backward(dy, dm, dr, x, w, b, m, r, training, relu, need):
    dx = like(x, innermost(x)) if need[0] else torch.empty(0, dtype=x.dtype, device=x.device)
    return dx, *per_channel(x, need[1], need[2])


FORWARD = operator("triton_batch_norm", _launch_forward, _fake_forward)
BACKWARD = operator("triton_batch_norm_backward", _launch_backward, _fake_backward)


def forward(relu, x, w, b, running_mean, running_var, training, momentum, eps):
    y, m, r, *new = FORWARD(x, w, b, running_mean, running_var, training, momentum, eps, relu)
    if training and running_mean is not None:
        running_mean.copy_(new[0])
        running_var.copy_(new[1])
    return y, m, r


def backward(relu, dy, dm, dr, x, w, b, m, r, training, need):
    if not (relu or need.x or need.w):
        return batch_norm.RULE.backward(dy, dm, dr, x, w, b, m, r, training, need)  # x has not been kept
    dx, dw, db = BACKWARD(dy, dm, dr, x, w, b, m, r, training, relu, [need.x, need.w, need.b])
    dw = dw.to(w.dtype) if need.w else None
    db = db.to(b.dtype) if need.b else None
    return dx if need.x else None, dw, db, None, None


def unsupported(x, w, b, running_mean, running_var, training, momentum, eps) -> str | None:
    """Why the kernels cannot take the call, or None."""
    return computed_in_float32(x)


KERNEL = Kernel(partial(forward, False), partial(backward, False), unsupported)
RELU = Kernel(partial(forward, True), partial(backward, True), unsupported)


SHAPES = {"planes": (32, 64, 3136), "short": (2, 512, 64), "inner": (8192, 256, 1)}


def specs(warp: int) -> list[Spec]:
    """The kernels at the shipped configurations: planes of positions, short ones of few samples, and channels innermost."""
    every = []
    shares, vectors, sums = (dict.fromkeys(names.split(), "*fp32") for names in ("n mean M2", "m r", "s1 s2"))
    for t, (name, shape) in product(("bf16", "fp32"), SHAPES.items()):
        *blocks, warps = tile(*shape, warp)
        known = {"S": 1, "xc": 1, "dyc": 1, "xs": 0, "dys": 0} if name == "inner" else {"xs": 1, "dys": 1}
        known |= dict(zip(("BM", "BC", "BS"), blocks))
        x, dy = {"x": f"*{t}"}, {"dy": f"*{t}"}
        read = x | dict.fromkeys(("w", "b"), f"*{t}") | vectors
        every.append(_spec(f"batch_norm measure {name} {t}", measure_kernel, x | shares, known, warps))
        for op, on in (("batch_norm", False), ("batch_norm_relu", True)):
            one = known | {"RELU": on}
            every.append(_spec(f"{op} normalize {name} {t}", normalize_kernel, read | {"y": f"*{t}"}, one, warps))
            every.append(_spec(f"{op} sums {name} {t}", sums_kernel, read | dy | sums, one, warps))
            second = {"dm": "*fp32", "dr": "*fp32", "dx": f"*{t}"}
            every.append(_spec(f"{op} gradient {name} {t}", gradient_kernel, read | dy | sums | second, one, warps))
    tracked = dict.fromkeys(("old_mean", "old_var", "new_mean", "new_var"), "*fp32")
    known = {"BP": SHARES, "BC": CHANNELS}
    every.append(_spec("batch_norm statistics", statistics_kernel, shares | vectors | tracked, known, 4, M="fp32"))
    return every


def _spec(label, kernel, pointers, known, warps, **types) -> Spec:
    """A compilation; what is neither a pointer nor known is an integer, and those of x's shape are divided by 16."""
    floats = dict.fromkeys(("count", "eps", "momentum", "unbiased"), "fp32")
    rest = [k for k in kernel.arg_names if k not in pointers and k not in known]
    types = pointers | {k: (floats | types).get(k, "i32") for k in rest}
    aligned = (*pointers, *(k for k in rest if k in ("C", "S", "xm", "xc", "dym", "dyc")))
    return Spec(label, kernel, types, {k: v for k, v in known.items() if k in kernel.arg_names}, aligned, warps)
