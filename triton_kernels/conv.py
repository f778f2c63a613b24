"""Depthwise convolution over one or two dimensions, a kernel for each channel. For the maths see the op of this name.

A tile is BC channels × BP positions of an image, its last axis the one that is dense in memory: channels in channels_last, else
positions. One dimension is an image of height 1. Dense convolution is in conv_dense.py.

apply      one program a tile of what comes out, of y or of dx, which gathers what it meets: nothing is scattered
sums       dw and db: a program walks over tiles of dy and keeps a sum for each of the kernel's elements in registers; the
           partial sums, in float32, are added up afterwards: no atomics, the same bits every time
"""

# ruff: noqa: RUF005 (Triton's language knows no stars)
from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from bptoolkit.ops.conv import RULE
from bptoolkit.triton_kernels import conv_dense
from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.kernel import WARP, Kernel, computed_in_float32, dense, programs
from bptoolkit.triton_kernels.operator import operator

LARGEST = 49  # elements of a kernel, a sum each in registers
THREADS = 128  # of a program


@triton.jit
def along(n, LAST: tl.constexpr, OUTER: tl.constexpr):
    """A vector as the column of a tile if it is the outer axis, else as its row."""
    return n[:, None] if OUTER == LAST else n[None, :]


@triton.jit
def source(o, k, O, s: tl.constexpr, p: tl.constexpr, d: tl.constexpr, TRANSPOSED: tl.constexpr):
    """What position o meets at the kernel's element k, and whether it is there, of O positions: os + kd − p; or, transposed,
    the j for which js + kd − p = o."""
    if TRANSPOSED:
        j = o + p - k * d
        inside = (j >= 0) & (j % s == 0)
        j = j // s
        return j, inside & (j < O)
    else:
        j = o * s + k * d - p
        return j, (j >= 0) & (j < O)


@triton.jit(do_not_specialize=["N"])
def apply_kernel(
    x, w, b, y, xn, xc, xh, xw, yn, yc, yh, yw, N, C, H, W, OH, OW,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, TRANSPOSED: tl.constexpr, LAST: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """From x (N, C, H, W) to y (N, C, OH, OW); transposed, from dy to dx."""
    i = tl.program_id(0).to(tl.int64)
    tiles, channels = tl.cdiv(OH * OW, BP), tl.cdiv(C, BC)
    n = i // (tiles * channels)
    p = along((i // channels % tiles * BP).to(tl.int32) + tl.arange(0, BP), LAST, True)
    c = along((i % channels * BC).to(tl.int32) + tl.arange(0, BC), LAST, False)
    oh, ow = p // OW, p % OW
    here = c < C
    mask = here & (p < OH * OW)
    x += n * xn + c.to(tl.int64) * xc
    Y = tl.zeros(mask.shape, tl.float32)
    if b is not None:
        Y += tl.load(b + c, here, other=0.0).to(tl.float32)
    for r in tl.static_range(R):
        ih, inside_h = source(oh, r, H, SH, PH, DH, TRANSPOSED)
        row = x + ih.to(tl.int64) * xh
        for s in tl.static_range(S):
            iw, inside_w = source(ow, s, W, SW, PW, DW, TRANSPOSED)
            X = tl.load(row + iw.to(tl.int64) * xw, mask & inside_h & inside_w, other=0.0).to(tl.float32)
            Y += X * tl.load(w + c * (R * S) + (r * S + s), here, other=0.0).to(tl.float32)
    to = y + n * yn + c.to(tl.int64) * yc + oh.to(tl.int64) * yh + ow.to(tl.int64) * yw
    tl.store(to, Y.to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["N"])
def sums_kernel(
    dy, x, sums, dyn, dyc, dyh, dyw, xn, xc, xh, xw, N, C, H, W, OH, OW,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, LAST: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """From dy (N, C, OH, OW) and x (N, C, H, W) to sums (programs of axis 1, R S + 1, C): of dw, and then of db."""
    flat = tl.program_id(0) * BC + tl.arange(0, BC)  # BC
    c = along(flat, LAST, False)
    here = c < C
    x += c.to(tl.int64) * xc
    dy += c.to(tl.int64) * dyc
    total = ()
    for _ in tl.static_range(R * S + 1):
        total = total + (tl.zeros((BP, BC) if LAST else (BC, BP), tl.float32),)
    tiles = tl.cdiv(OH * OW, BP)
    for i in range(tl.program_id(1), N * tiles, tl.num_programs(1)):
        n = (tl.zeros((), tl.int64) + i) // tiles
        p = along(i % tiles * BP + tl.arange(0, BP), LAST, True)
        oh, ow = p // OW, p % OW
        mask = here & (p < OH * OW)
        DY = tl.load(dy + n * dyn + oh.to(tl.int64) * dyh + ow.to(tl.int64) * dyw, mask, other=0.0).to(tl.float32)
        new = ()
        for r in tl.static_range(R):
            ih, inside_h = source(oh, r, H, SH, PH, DH, False)
            row = x + n * xn + ih.to(tl.int64) * xh
            for s in tl.static_range(S):
                iw, inside_w = source(ow, s, W, SW, PW, DW, False)
                X = tl.load(row + iw.to(tl.int64) * xw, mask & inside_h & inside_w, other=0.0).to(tl.float32)
                new = new + (total[r * S + s] + DY * X,)
        total = new + (total[R * S] + DY,)
    for k in tl.static_range(R * S + 1):
        to = sums + (tl.program_id(1).to(tl.int64) * (R * S + 1) + k) * C + flat
        tl.store(to, tl.sum(total[k], 0 if LAST else 1), flat < C)


def is_last(x: Tensor) -> bool:
    """Whether channels, not positions, lie side by side."""
    return x.stride(1) == 1 and x.stride(3) != 1


def tile(C: int, positions: int, last: bool, size: int, sums: int, warp: int) -> tuple[dict[str, int], int]:
    """BP, BC and the number of warps, of `warp` threads each.

    Args:
        C: channels.
        positions: of an image.
        last: channels_last.
        size: bytes of an element.
        sums: how many each element of a tile has; 0 for none.
        warp: threads in a warp.
    """
    if last:  # 16 bytes a thread, or as many elements as their sums have room for
        each = 16 // size if not sums else 4 if sums <= 10 else 2 if sums <= 26 else 1
        BC = min(triton.next_power_of_2(C), 16 * each)
        BP = THREADS * each // BC
    else:  # neighbouring threads read neighbouring elements, of 4 bytes together: the kernel's elements are not aligned
        each = max(4 // size, 1) if not sums else 1
        BP = min(triton.next_power_of_2(positions), THREADS * each)
        BC = THREADS * each // BP
    return {"BP": BP, "BC": BC, "LAST": last}, THREADS // warp


def _image(t: Tensor) -> Tensor:
    return t.unsqueeze(2) if t.dim() == 3 else t


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    if is_last(_image(like)):
        return torch.empty(shape[0], *shape[2:], shape[1], dtype=like.dtype, device=like.device).permute(
            0, len(shape) - 1, *range(1, len(shape) - 1)
        )
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def _options(w: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> tuple[int, ...]:
    """The constants of both kernels; one dimension is the second of two."""
    one = len(stride) == 1
    pairs = zip(*((v, *o) if one else o for v, o in ((1, stride), (0, padding), (1, dilation), (1, w.shape[2:]))))
    (SH, PH, DH, R), (SW, PW, DW, S) = pairs
    return SH, SW, PH, PW, DH, DW, R, S


def _apply(x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, options: tuple[int, ...], transposed: bool) -> None:
    if not y.numel():
        return
    x, y = _image(x), _image(y)
    (N, C, OH, OW), last = y.shape, is_last(x)
    sizes, warps = tile(C, OH * OW, last, x.element_size(), 0, WARP)
    grid = (N * triton.cdiv(OH * OW, sizes["BP"]) * triton.cdiv(C, sizes["BC"]),)
    args = (x, dense(w), dense(b), y, *x.stride(), *y.stride(), N, C, *x.shape[2:], OH, OW)
    apply_kernel[grid](*args, *options, transposed, **sizes, num_warps=warps, enable_fp_fusion=True)


def _launch_forward(
    x: Tensor, w: Tensor, b: Tensor | None, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    y = _fake_forward(x, w, b, stride, padding, dilation)
    _apply(x, w, b, y, _options(w, stride, padding, dilation), False)
    return y


def _fake_forward(x, w, b, stride, padding, dilation):
    sizes = zip(x.shape[2:], w.shape[2:], stride, padding, dilation)
    return _empty((*x.shape[:2], *((m + 2 * p - d * (k - 1) - 1) // s + 1 for m, k, s, p, d in sizes)), x)


def _launch_input(dy: Tensor, w: Tensor, size: list[int], stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
    dx = _fake_input(dy, w, size, stride, padding, dilation)
    _apply(dy, w, None, dx, _options(w, stride, padding, dilation), True)
    return dx


def _fake_input(dy, w, size, stride, padding, dilation):
    return _empty((*dy.shape[:2], *size), dy)


def _launch_weight(
    dy: Tensor, x: Tensor, w: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> tuple[Tensor, Tensor]:
    dw, db = _fake_weight(dy, x, w, stride, padding, dilation)
    if not dy.numel():
        return dw.zero_(), db.zero_()
    dy, x, options = _image(dy), _image(x), _options(w, stride, padding, dilation)
    (N, C, OH, OW), K = dy.shape, prod(w.shape[2:])
    sizes, warps = tile(C, OH * OW, is_last(x), x.element_size(), K + 1, WARP)
    channels = triton.cdiv(C, sizes["BC"])
    P = min(N * triton.cdiv(OH * OW, sizes["BP"]), max(programs(x.device, warps) // channels, 1))
    sums = torch.empty(P, K + 1, C, dtype=torch.float32, device=x.device)
    args = (dy, x, sums, *dy.stride(), *x.stride(), N, C, *x.shape[2:], OH, OW)
    sums_kernel[(channels, P)](*args, *options, **sizes, num_warps=warps, enable_fp_fusion=True)
    torch.sum(sums[:, :K], 0, out=dw)
    torch.sum(sums[:, K], 0, out=db)
    return dw, db


def _fake_weight(dy, x, w, stride, padding, dilation):
    C, K = w.shape[0], prod(w.shape[2:])
    return tuple(torch.empty(s, dtype=torch.float32, device=x.device) for s in ((K, C), (C,)))


def _flops(positions, w) -> int:
    """Two for each of the kernel's elements at each output position."""
    return 2 * prod(positions) * prod(w[2:])


def _forward_flops(x, w, b, stride, padding, dilation, *, out_shape=None, **_) -> int:
    return _flops(out_shape, w)


def _input_flops(dy, w, *_, out_shape=None, **__) -> int:
    return _flops(dy, w)


def _weight_flops(dy, x, w, *_, out_shape=None, **__) -> int:
    return _flops(dy, w)


FORWARD = operator("triton_conv", _launch_forward, _fake_forward, flops=_forward_flops)
INPUT = operator("triton_conv_input", _launch_input, _fake_input, flops=_input_flops)
WEIGHT = operator("triton_conv_weight", _launch_weight, _fake_weight, flops=_weight_flops)


def forward(x, w, b, stride, padding, dilation, tail, groups):
    return FORWARD(x, w, b, stride, padding, dilation)


def backward(dy, x, w, stride, padding, dilation, tail, groups, need):
    dx = dw = db = None
    if need.x:
        sizes = zip(dy.shape[2:], w.shape[2:], stride, padding, dilation, tail)
        size = [(j - 1) * s + d * (k - 1) + 1 - 2 * p + r for j, k, s, p, d, r in sizes]
        dx = INPUT(dy, w, size, stride, padding, dilation)
    if need.w:
        dw, db = WEIGHT(dy, x, w, stride, padding, dilation)
        dw, db = dw.t().contiguous().view(w.shape).to(w.dtype), db.to(dy.dtype) if need.b else None
    elif need.b:
        db = RULE.backward(dy, None, None, stride, padding, dilation, tail, groups, RULE.Need(False, False, True))[2]
    return dx, dw, db


def unsupported(x, w, b, stride, padding, dilation, tail, groups) -> str | None:
    """Why the kernel cannot take the call, or None."""
    K = prod(w.shape[2:])
    if K > LARGEST:
        return f"the fused kernel takes kernels of {LARGEST} elements at most, not {K}"
    if prod([m + 2 * p for m, p in zip(x.shape[2:], padding)]) >= 2**30:  # a list: Dynamo knows no prod of a generator
        return f"an image of {tuple(x.shape[2:])} is too large for the fused kernel, which counts its positions in 32 bits"
    return computed_in_float32(x)


KERNEL = Kernel(forward, backward, unsupported)


def specs(warp: int) -> list[Spec]:
    """The kernels at the shipped configurations: both layouts, small and large kernels, stride 2; and the dense ones'."""
    every = conv_dense.compilations(warp)
    narrow = "positions are not aligned, and neighbouring threads read neighbouring elements"
    for t, size in (("bf16", 2), ("fp32", 4)):
        for last in (False, True):
            for R, stride in ((3, 1), (3, 2), (7, 1)):
                options = {"SH": stride, "SW": stride, "PH": R // 2, "PW": R // 2, "DH": 1, "DW": 1, "R": R, "S": R}
                name = f"{t} {R}×{R}{' stride 2' if stride > 1 else ''}{' channels last' if last else ''}"
                one = "c" if last else "w"
                common = dict.fromkeys(("N", "C", "H", "W", "OH", "OW"), "i32")
                for label, kernel, given, transposed in (  # only the transposed one divides by the stride
                    ("conv", apply_kernel, ("x", "y"), False),
                    ("conv input", apply_kernel, ("x", "y"), True),
                    ("conv weight", sums_kernel, ("dy", "x"), None),
                )[slice(1, 2) if stride > 1 else slice(3)]:
                    if kernel is apply_kernel:
                        pointers = dict.fromkeys(("x", "w", "y"), f"*{t}") | ({} if transposed else {"b": f"*{t}"})
                    else:
                        pointers = dict.fromkeys(("dy", "x"), f"*{t}") | {"sums": "*fp32"}
                    strides = [f"{g}{k}" for g in given for k in "nchw" if k != one]
                    sizes, warps = tile(256, 56 * 56, last, size, 0 if kernel is apply_kernel else R * R + 1, warp)
                    constants = options | sizes | {f"{g}{one}": 1 for g in given}
                    if kernel is apply_kernel:
                        constants |= {"TRANSPOSED": transposed} | ({"b": None} if transposed else {})
                    few = "as many channels a thread as the sums in registers have room for" if kernel is sums_kernel else ""
                    types = pointers | dict.fromkeys(strides, "i32") | common
                    aligned = (*pointers, *strides, "C")
                    every.append(
                        Spec(f"{label} {name}", kernel, types, constants, aligned, warps, narrow=few if last else narrow)
                    )
    return every
