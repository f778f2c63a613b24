"""Dense and grouped convolution over one to three dimensions, as products of matrices that are gathered on the way. For the
maths see the op `conv`; the loops are in conv_dense_loops.py. The vendor's library is the default: this runs by name alone.

forward    y: rows are places, columns output channels; the sum runs over taps and input channels, (q, r, s, c) as one. The
           bias is added at the end
input      dx: the same loop over dy. With strides, the places of dx fall into classes by their residue: each meets taps of its
           own, and is a small convolution without stride; a class that meets none is 0
weight     dw: rows are output channels, columns taps and input channels, the sum runs over samples and places. Programs share
           it; their sums, in float32, are added up by one torch.sum: no atomics, the same bits every time
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import gcd, prod
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from bptoolkit.ops.conv import DENSE
from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.conv_dense_loops import OF_GATHER, OF_WEIGHT, gather_kernel, weight_kernel
from bptoolkit.triton_kernels.kernel import WARP, Kernel, computed_in_float32, dense, precision_of, programs, upcasts
from bptoolkit.triton_kernels.operator import operator

LARGEST = 2**31  # elements of an image, or of the kernel: inside a sample offsets are of 32 bits


class Axis(NamedTuple):
    """How places along an axis meet what is gathered: place u in tap t at u·step + at + t·reach, the kernel's element
    first + t·every; and where they lie in what comes out: at to, to + apart, ..."""

    step: int
    at: int
    reach: int
    taps: int
    first: int
    every: int
    to: int
    apart: int
    places: int


def forward_axis(m: int, k: int, s: int, p: int, d: int) -> Axis:
    return Axis(s, -p, d, k, 0, 1, 0, 1, (m + 2 * p - d * (k - 1) - 1) // s + 1)


def input_axes(m: int, k: int, s: int, p: int, d: int) -> Iterator[Axis]:
    """The classes of m places of dx by their residue: place a + us meets dy at j in element e where js + ed − p = a + us."""
    for a in range(min(s, m)):
        met = [e for e in range(k) if (a + p - e * d) % s == 0]
        every, count = s // gcd(s, d), (m - a - 1) // s + 1
        if met:
            yield Axis(1, (a + p - met[0] * d) // s, -(d * every // s), len(met), met[0], every, a, s, count)
        else:
            yield Axis(1, 0, 0, 0, 0, 1, a, s, count)


class Tile(NamedTuple):
    """A launch: rows, columns and depth of a tile, warps, loads under way."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


def tile(kernel: str, columns: int, channels: int, bytes: int, warp: int) -> Tile:
    """The tile of "gather" or "weight" for so many columns; x has so many channels in a group, of so many bytes each."""
    BN = min(max(triton.next_power_of_2(columns), 16), 64)
    if bytes == 4:
        return Tile(64, min(BN, 32), 16, 4, 2)
    if each(channels, bytes) < 8:  # element by element, each with a place of its own: their addresses take registers
        return Tile(64, BN, 16, 4, 2)
    stages = 3 if warp == 32 else 2
    return Tile(128 if kernel == "gather" else 64, BN, 64 if channels % 64 == 0 else 32, 4, stages)


def each(channels: int, bytes: int) -> int:
    """A power of two that divides the channels, 16 bytes at most."""
    return gcd(channels, 16 // bytes)


def three(values: Sequence[int], one: int = 1) -> tuple[int, ...]:
    """The values of three axes, the first of which have a size of 1."""
    return (one,) * (3 - len(values)) + tuple(values)


def axes_of(w: Tensor, m: Sequence[int], stride: Any, padding: Any, dilation: Any) -> zip:
    """Size, kernel, stride, padding and dilation of each of three axes."""
    return zip(three(m), three(w.shape[2:]), three(stride), three(padding, 0), three(dilation))


def is_last(t: Tensor) -> bool:
    """Whether channels, not places, lie side by side."""
    return t.movedim(1, -1).is_contiguous() and not t.is_contiguous()


def last(t: Tensor) -> Tensor:
    """T with its channels in the end, dense."""
    return t.movedim(1, -1).contiguous()


def _empty(shape: Sequence[int], like: Tensor) -> Tensor:
    if is_last(like):
        t = torch.empty((shape[0], *shape[2:], shape[1]), dtype=like.dtype, device=like.device)
        return t.movedim(-1, 1)
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device)


def _numbers(t: Tile, channels: int, kind: str, precision: str, upcast: bool) -> dict[str, Any]:
    """The tile and how its product is made. Where its depth (or columns) divides the channels of a group, it has one tap."""
    whole = channels % (t.BN if kind == "weight" else t.BK) == 0
    return {"WHOLE": whole, "BM": t.BM, "BN": t.BN, "BK": t.BK, "PRECISION": precision, "UPCAST": upcast}


def _options(x: Tensor, t: Tile, channels: int, kind: str) -> dict[str, Any]:
    """The tile for a launch."""
    numbers = _numbers(t, channels, kind, precision_of(x.dtype, WARP), upcasts(x))
    return numbers | {"num_warps": t.warps, "num_stages": t.stages, "enable_fp_fusion": True}


def _geometry(axes: Sequence[Axis]) -> list[int]:
    """What both kernels take from UD to rw."""
    _, R, S = (a.taps for a in axes)
    numbers = [a.places for a in axes] + [prod(a.taps for a in axes), R, S]
    return numbers + [a.step for a in axes] + [a.at for a in axes] + [a.reach for a in axes]


def _gather(x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, axes: Sequence[Axis], G: int, transposed: bool) -> None:
    """One class of places of y, from x (N, *, C); w: (O, *K, I), the vendor's channels_last."""
    n = y.dim() - 2
    y = y[(slice(None), slice(None), *(slice(a.to, None, a.apart) for a in axes[3 - n :]))]
    if not all(a.taps for a in axes):
        y.zero_()
        return
    N, I, O, size = x.shape[0], x.shape[-1] // G, y.shape[1] // G, x.element_size()
    EI, EO, t = each(I, size), each(O, size), tile("gather", O, I, size, WARP)
    _, KR, KS = K = three(w.shape[1:-1])
    first, every = zip(*((a.first, a.every) for a in axes))
    elements = (prod(K), (first[0] * KR + first[1]) * KS + first[2], every[0] * KR * KS, every[1] * KS, every[2])
    grid = (triton.cdiv(y.numel() // y.shape[1], t.BM) * G * triton.cdiv(O, t.BN),)
    sizes = (N, *three(x.shape[1:-1]), *_geometry(axes), *elements, I // EI, O // EO, G)
    strides = (y.stride(0), *three(y.stride()[2:], 0), y.stride(1))
    constants = {"EI": EI, "EO": EO, "DEEP": n == 3, "TRANSPOSED": transposed} | _options(x, t, I, "gather")
    gather_kernel[grid](x, w, b, y, *sizes, *strides, **constants)


def _launch_forward(
    x: Tensor, w: Tensor, b: Tensor | None, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Tensor:
    y = _fake_forward(x, w, b, stride, padding, dilation, groups)
    if y.numel():
        axes = [forward_axis(*a) for a in axes_of(w, x.shape[2:], stride, padding, dilation)]
        _gather(last(x), last(w), dense(b), y, axes, groups, False)
    return y


def _fake_forward(x, w, b, stride, padding, dilation, groups):
    sizes = zip(x.shape[2:], w.shape[2:], stride, padding, dilation)
    return _empty((x.shape[0], w.shape[0], *((m + 2 * p - d * (k - 1) - 1) // s + 1 for m, k, s, p, d in sizes)), x)


def _launch_input(
    dy: Tensor, w: Tensor, size: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Tensor:
    dx = _fake_input(dy, w, size, stride, padding, dilation, groups)
    if not dx.numel():
        return dx
    dy, w_ = last(dy), last(w)
    for axes in product(*(list(input_axes(*a)) for a in axes_of(w, size, stride, padding, dilation))):
        _gather(dy, w_, None, dx, axes, groups, True)
    return dx


def _fake_input(dy, w, size, stride, padding, dilation, groups):
    return _empty((dy.shape[0], w.shape[1] * groups, *size), dy)


def _launch_weight(
    dy: Tensor, x: Tensor, w: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Tensor:
    dw = _fake_weight(dy, x, w, stride, padding, dilation, groups)
    if not dw.numel() or not dy.numel():
        return dw.zero_()
    axes = [forward_axis(*a) for a in axes_of(w, x.shape[2:], stride, padding, dilation)]
    O, I, *K = w.shape
    O, size, columns = O // groups, x.element_size(), prod(K) * I
    t, EI, EO = tile("weight", columns, I, size, WARP), each(I, size), each(O, size)
    tiles = groups * triton.cdiv(O, t.BM) * triton.cdiv(columns, t.BN)
    blocks = triton.cdiv(dy.numel() // dy.shape[1], t.BK)
    P = min(blocks, max(programs(x.device, t.warps) // tiles, 1))
    sums = torch.empty((P, *dw.shape), dtype=torch.float32, device=x.device)
    sizes = (x.shape[0], *three(x.shape[2:]), *_geometry(axes), blocks, I // EI, O // EO, groups)
    constants = {"EI": EI, "EO": EO, "DEEP": len(K) == 3} | _options(x, t, I, "weight")
    weight_kernel[(tiles, P)](last(dy), last(x), sums, *sizes, **constants)
    return torch.sum(sums, 0, out=dw)


def _fake_weight(dy, x, w, stride, padding, dilation, groups):
    return torch.empty((w.shape[0], *w.shape[2:], w.shape[1]), dtype=torch.float32, device=x.device)


def _forward_flops(x, w, b, *_, out_shape=None, **__) -> int:
    return 2 * prod(out_shape) * prod(w[1:])


def _input_flops(dy, w, *_, out_shape=None, **__) -> int:
    return 2 * prod(dy) * prod(w[1:])


def _weight_flops(dy, x, w, *_, out_shape=None, **__) -> int:
    return 2 * prod(dy) * prod(w[1:])


FORWARD = operator("triton_conv_dense", _launch_forward, _fake_forward, flops=_forward_flops)
INPUT = operator("triton_conv_dense_input", _launch_input, _fake_input, flops=_input_flops)
WEIGHT = operator("triton_conv_dense_weight", _launch_weight, _fake_weight, flops=_weight_flops)


def forward(x, w, b, stride, padding, dilation, tail, groups):
    return FORWARD(x, w, b, stride, padding, dilation, groups)


def backward(dy, x, w, stride, padding, dilation, tail, groups, need):
    dx = dw = db = None
    if need.x:
        sizes = zip(dy.shape[2:], w.shape[2:], stride, padding, dilation, tail)
        size = [(j - 1) * s + d * (k - 1) + 1 - 2 * p + r for j, k, s, p, d, r in sizes]
        dx = INPUT(dy, w, size, stride, padding, dilation, groups)
    if need.w:
        dw = WEIGHT(dy, x, w, stride, padding, dilation, groups).movedim(-1, 1).to(w.dtype)
        dw = dw if is_last(w) else dw.contiguous()
    if need.b:
        db = DENSE.backward(dy, None, None, stride, padding, dilation, tail, groups, DENSE.Need(False, False, True))[2]
    return dx, dw, db


def unsupported(x, w, b, stride, padding, dilation, tail, groups) -> str | None:
    """Why the kernels cannot take the call, or None."""
    padded = [m + 2 * p for m, p in zip(x.shape[2:], padding)]  # a list: Dynamo knows no prod of a generator
    if prod(padded) * max(x.shape[1], w.shape[0]) >= LARGEST or w.numel() >= LARGEST:
        return f"an image of {tuple(x.shape[1:])} is too large for the fused kernel, which counts its elements in 32 bits"
    return computed_in_float32(x)


KERNEL = Kernel(forward, backward, unsupported)


SHAPES = {  # what -> the kernel's elements, input and output channels of a group; and what is compiled of it
    "64→64": (9, 64, 64, "forward input weight"),
    "24→40": (9, 24, 40, "forward input weight"),
    "3→64": (49, 3, 64, "forward weight"),
    "64→64 three dimensions": (27, 64, 64, "forward input weight"),
}


def compilations(warp: int) -> list[Spec]:
    """The loops at the shipped configurations, channels last; what a convolution is like they need not know."""
    half = [("bf16", torch.bfloat16, 2, what) for what in SHAPES]
    return [
        _spec(kind, t, dtype, size, what, warp)
        for t, dtype, size, what in (*half, ("fp32", torch.float32, 4, "64→64"))
        for kind in SHAPES[what][-1].split()
    ]


def _spec(kind: str, t: str, dtype: torch.dtype, size: int, what: str, warp: int) -> Spec:
    K, I, O, _ = SHAPES[what]
    columns, depth = {"forward": (O, I), "input": (I, O), "weight": (K * I, I)}[kind]
    gather = kind != "weight"
    tile_ = tile("gather" if gather else "weight", columns, depth, size, warp)
    values: dict[str, Any] = {"EI": each(depth, size), "EO": each(I if kind == "input" else O, size)}
    values |= {"DEEP": "three" in what} | _numbers(tile_, depth, kind, precision_of(dtype, warp), False)
    if gather:
        types = dict.fromkeys(("x", "w", "y"), f"*{t}") | ({"b": f"*{t}"} if kind == "forward" else {})
        values |= {"TRANSPOSED": kind == "input", "yc": 1} | ({"b": None} if kind == "input" else {})
        kernel, numbers, aligned = gather_kernel, OF_GATHER, (*types, "yn", "yd", "yh", "yw")
    else:
        types = {"dy": f"*{t}", "x": f"*{t}", "sums": "*fp32"}
        kernel, numbers, aligned = weight_kernel, OF_WEIGHT, tuple(types)
    types |= dict.fromkeys((*numbers, *(n for n in ("I", "O", "G", "yn", "yd", "yh", "yw") if n in kernel.arg_names)), "i32")
    types = {n: types[n] for n in kernel.arg_names if n in types}
    narrow = "rows of 3 channels are not aligned" if I == 3 else ""
    return Spec(f"conv dense {kind} {what} {t}", kernel, types, values, aligned, tile_.warps, tile_.stages, True, narrow)
