"""Max pooling's backward, fused: gathered, where the eager rule scatters. For the maths see the op of this name.

forward    torch's own: y and the places i of the maxima
backward   each place m of x looks at the windows j that may hold it, from ⌈(m + p − d (k − 1)) / s⌉ to ⌊(m + p) / s⌋, and adds
           up, in their order and in float32, dy[j] where i[j] = m: no atomics, no zeros to write first, and dx is rounded once
"""

from __future__ import annotations

from itertools import product
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from bptoolkit.ops.max_pool import RULE, hollow
from bptoolkit.ops.windows import channels_to_end, channels_to_front
from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.kernel import WARP, Kernel, computed_in_float32
from bptoolkit.triton_kernels.operator import operator

BLOCK = 512  # elements of dx
PER_THREAD = 4
INT32 = 2**31  # what an int32 counts to


@triton.jit
def first(m, Y, k: tl.constexpr, s: tl.constexpr, p: tl.constexpr, d: tl.constexpr):
    """Per place: the first window that may hold it, and one past the last."""
    low = tl.maximum(m + p - d * (k - 1) + s - 1, 0) // s
    return low, tl.minimum((m + p) // s + 1, Y)


@triton.jit(do_not_specialize=["numel"])
def backward_kernel(
    dy, i, dx, numel, D, H, W, C, YD, YH, YW,
    kd: tl.constexpr, kh: tl.constexpr, kw: tl.constexpr, sd: tl.constexpr, sh: tl.constexpr, sw: tl.constexpr,
    pd: tl.constexpr, ph: tl.constexpr, pw: tl.constexpr, dd: tl.constexpr, dh: tl.constexpr, dw: tl.constexpr,
    ND: tl.constexpr, NH: tl.constexpr, NW: tl.constexpr, LARGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if LARGE:
        pid = pid.to(tl.int64)
    e = pid * BLOCK + tl.arange(0, BLOCK)  # BLOCK; over N D H W C in this order
    mask = e < numel
    c, rest = e % C, e // C
    w, rest = rest % W, rest // W
    h, rest = rest % H, rest // H
    z, n = rest % D, rest // D
    here = (z * H + h) * W + w
    d0, d1 = first(z, YD, kd, sd, pd, dd)
    h0, h1 = first(h, YH, kh, sh, ph, dh)
    w0, w1 = first(w, YW, kw, sw, pw, dw)
    DX = tl.zeros((BLOCK,), tl.float32)
    for q in range(ND * NH * NW):
        jd, jh, jw = d0 + q // (NH * NW), h0 + q // NW % NH, w0 + q % NW
        inside = mask & (jd < d1) & (jh < h1) & (jw < w1)
        at = (((n * YD + jd) * YH + jh) * YW + jw) * C + c
        own = inside & (tl.load(i + at, inside, other=-1) == here)
        DX += tl.load(dy + at, own, other=0.0).to(tl.float32)
    tl.store(dx + e, DX.to(dx.dtype.element_ty), mask)


def three(values, fill: int) -> tuple[int, ...]:
    """As many as there are dimensions, of depth, height and width."""
    return (fill,) * (3 - len(values)) + tuple(values)


def _launch(
    dy: Tensor,
    i: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    size: list[int],
    last: bool,
) -> Tensor:
    dx = _fake(dy, i, kernel, stride, padding, dilation, size, last)
    if not dx.numel():
        return dx
    out = channels_to_end(dx) if last else dx
    dy, i = ((channels_to_end(t) if last else t).contiguous() for t in (dy, i))
    Y = dy.shape[1:-1] if last else dy.shape[dy.dim() - len(size) :]
    sizes = (*three(size, 1), dx.shape[1] if last else 1, *three(Y, 1))
    options = (three(kernel, 1), three(stride, 1), three(padding, 0), three(dilation, 1))
    most = [d * (k - 1) // s + 1 for k, s, _, d in zip(*options)]  # windows that may hold one place
    large = max(dx.numel(), dy.numel()) + BLOCK >= INT32
    warps = BLOCK // (PER_THREAD * WARP)
    grid, arguments = (
        (triton.cdiv(dx.numel(), BLOCK),),
        (dy, i, out, dx.numel(), *sizes, *(o for three in options for o in three)),
    )
    backward_kernel[grid](*arguments, *most, large, BLOCK, num_warps=warps, enable_fp_fusion=True)
    return dx


def _fake(dy, i, kernel, stride, padding, dilation, size, last):
    n = len(size)
    if last:
        return channels_to_front(torch.empty((dy.shape[0], *size, dy.shape[1]), dtype=dy.dtype, device=dy.device))
    return torch.empty((*dy.shape[: dy.dim() - n], *size), dtype=dy.dtype, device=dy.device)


BACKWARD = operator("triton_max_pool_backward", _launch, _fake)


def backward(dy, i, kernel, stride, padding, dilation, size, last):
    if hollow(padding, dilation, size):
        return RULE.backward(dy, i, kernel, stride, padding, dilation, size, last)
    return BACKWARD(dy, i, kernel, stride, padding, dilation, size, last)


def unsupported(x, kernel, stride, padding, dilation, ceil_mode, size, last) -> str | None:
    """Why the kernel cannot take the call, or None."""
    if prod(size) >= INT32:
        return f"the fused kernel counts the places of one plane in int32: {tuple(size)} are too many"
    return computed_in_float32(x)


KERNEL = Kernel(RULE.forward, backward, unsupported)


def specs(warp: int) -> list[Spec]:
    """Windows of 2 × 2, 3 × 3 and 2 × 2 × 2, stride 2, and of 13 × 13, stride 1; channels last; more elements than an int32."""
    every = []
    ints = ("numel", *(f"{y}{d}" for y in ("", "Y") for d in "DHW"), "C")
    windows = {"2×2": ((1, 2, 2), 2), "3×3": ((1, 3, 3), 2), "2×2×2": ((2, 2, 2), 2), "13×13": ((1, 13, 13), 1)}
    for t, (name, (kernel, stride)), kind in product(("bf16", "fp32"), windows.items(), ("", " channels last", " large")):
        if kind and name != "3×3":
            continue
        known = {"LARGE": kind == " large", "BLOCK": BLOCK}
        for d, k in zip("dhw", kernel):
            s = 1 if k == 1 else stride
            known |= {f"k{d}": k, f"s{d}": s, f"p{d}": (k - 1) // 2, f"d{d}": 1, f"N{d.upper()}": (k - 1) // s + 1}
        known |= {"D": 1, "YD": 1} if kernel[0] == 1 else {}
        known |= {} if kind == " channels last" else {"C": 1}
        types = {"dy": f"*{t}", "i": "*i64", "dx": f"*{t}"} | {k: "i32" for k in ints if k not in known}
        types |= {"numel": "i64"} if known["LARGE"] else {}
        label, warps = f"max_pool backward {name} {t}{kind}", BLOCK // (PER_THREAD * warp)
        why = "a place gathers from the windows that hold it"
        every.append(Spec(label, backward_kernel, types, known, ("dy", "i", "dx"), warps, narrow=why))
    return every
