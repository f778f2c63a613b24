"""Rotary position embedding, fused: one pass over x, turned pairs and what stays alike. For the maths see the op of this name.

forward, backward    the same kernel, the angle negated; one program per tile of BM rows × BH ≥ H pairs, and BR ≥ E − 2H that
                     stay. A row is (i₀, i₁, i₂): leading dimensions that are one dimension to x, cos and sin are merged,
                     so that views of (N, L, H, E) as (N, H, L, E) are read where they lie
dc, ds               rare, by the eager rule's pieces
"""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from bptoolkit.ops.rotary import RULE
from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.kernel import WARP, Kernel, computed_in_float32
from bptoolkit.triton_kernels.operator import operator

LONGEST = 4096  # elements of a row, which a program holds
ROWS = 1 << 30  # rows are counted in 32 bits
TILE = 2048  # elements, for rows that are shorter than that
PER_THREAD = 16  # elements of a tile


@triton.jit(do_not_specialize=["M", "N1", "N2"])
def rotary_kernel(
    x, c, s, y, x0, x1, x2, xe, c0, c1, c2, ce, M, N1, N2, H, E,
    INVERSE: tl.constexpr, INTERLEAVED: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BM + tl.arange(0, BM)  # BM
    rows = m < M
    i2 = (m % N2).to(tl.int64)
    i1 = (m // N2 % N1).to(tl.int64)
    i0 = (m // N2 // N1).to(tl.int64)
    x += (i0 * x0 + i1 * x1 + i2 * x2)[:, None]  # BM 1
    y += (m.to(tl.int64) * E)[:, None]  # BM 1
    k = tl.arange(0, BH)[None, :]  # 1 BH
    pairs = rows[:, None] & (k < H)  # BM BH
    angle = (i0 * c0 + i1 * c1 + i2 * c2)[:, None] + k.to(tl.int64) * ce  # BM BH
    C = tl.load(c + angle, pairs, other=0.0).to(tl.float32)
    S = tl.load(s + angle, pairs, other=0.0).to(tl.float32)
    if INVERSE:
        S = -S
    if INTERLEAVED:
        n = tl.arange(0, 2 * BH)[None, :]  # 1 2BH
        mask = rows[:, None] & (n < 2 * H)  # BM 2BH
        X = tl.load(x + n.to(tl.int64) * xe, mask, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(X, (BM, BH, 2)))  # BM BH
        Y = tl.reshape(tl.join(a * C - b * S, b * C + a * S), (BM, 2 * BH))
        tl.store(y + n, Y.to(y.dtype.element_ty), mask)
    else:
        a = tl.load(x + k.to(tl.int64) * xe, pairs, other=0.0).to(tl.float32)  # BM BH
        b = tl.load(x + (H + k).to(tl.int64) * xe, pairs, other=0.0).to(tl.float32)
        tl.store(y + k, (a * C - b * S).to(y.dtype.element_ty), pairs)
        tl.store(y + H + k, (b * C + a * S).to(y.dtype.element_ty), pairs)
    if BR > 0:
        n = 2 * H + tl.arange(0, BR)[None, :]  # 1 BR
        mask = rows[:, None] & (n < E)  # BM BR
        tl.store(y + n, tl.load(x + n.to(tl.int64) * xe, mask, other=0.0), mask)


def tile(H: int, E: int, warp: int) -> tuple[int, int, int, int]:
    """BM, BH, BR and the number of warps, of `warp` threads each, for rows of H pairs and E elements."""
    BH = triton.next_power_of_2(H)
    BR = triton.next_power_of_2(E - 2 * H) if E > 2 * H else 0
    width = triton.next_power_of_2(2 * BH + BR)
    BM = max(1, TILE // width)
    return BM, BH, BR, min(max(BM * width // (PER_THREAD * warp), 1), 512 // warp)


def merged(shape: tuple[int, ...], *strides: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The dimensions, each a size and one stride per tensor, after those have been merged that are one to every tensor."""
    dims: list[tuple[int, ...]] = []
    for n, *inner in zip(shape, *strides):
        if n == 1:
            continue
        if dims and all(o == n * i for o, i in zip(dims[-1][1:], inner)):
            dims[-1] = (dims[-1][0] * n, *inner)
        else:
            dims.append((n, *inner))
    return dims


def _launch(x: Tensor, c: Tensor, s: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    y, H, E = _fake(x, c, s, interleaved, inverse), c.shape[-1], x.shape[-1]
    if not x.numel() or not H:
        return y.copy_(x)
    lead = x.shape[:-1]
    if c.stride() != s.stride():
        c, s = c.contiguous(), s.contiguous()
    c, s = c.expand(*lead, H), s.expand(*lead, H)
    dims = merged(lead, x.stride(), c.stride())
    if len(dims) > 3:
        x = x.contiguous()
        dims = merged(lead, x.stride(), c.stride())
    if len(dims) > 3:
        c, s = c.contiguous(), s.contiguous()
        dims = merged(lead, x.stride(), c.stride())
    (_, x0, c0), (N1, x1, c1), (N2, x2, c2) = [(1, 0, 0)] * (3 - len(dims)) + dims
    M, (BM, BH, BR, warps) = prod(lead), tile(H, E, WARP)
    strides = (x0, x1, x2, x.stride(-1), c0, c1, c2, c.stride(-1))
    rotary_kernel[(triton.cdiv(M, BM),)](
        x, c, s, y, *strides, M, N1, N2, H, E, inverse, interleaved, BM, BH, BR, num_warps=warps, enable_fp_fusion=True
    )  # fmt: skip
    return y


def _fake(x, c, s, interleaved, inverse):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


ROTATE = operator("triton_rotary_embedding", _launch, _fake)


def forward(x, c, s, interleaved):
    return ROTATE(x, c, s, interleaved, False)


def backward(dy, x, c, s, interleaved, need):
    dx = ROTATE(dy, c, s, interleaved, True) if need.x else None
    if need.c or need.s:
        _, dc, ds = RULE.backward(dy, x, c, s, interleaved, RULE.Need(False, need.c, need.s))
        return dx, dc, ds
    return dx, None, None


def unsupported(x: Tensor, c: Tensor, s: Tensor, interleaved: bool) -> str | None:
    """Why the kernel cannot take the call, or None."""
    if x.shape[-1] > LONGEST:
        return f"a row of {x.shape[-1]} elements is too long for the fused kernel, which holds a row: at most {LONGEST}"
    if prod(x.shape[:-1]) > ROWS:
        return f"{prod(x.shape[:-1])} rows are too many for the fused kernel, which counts them in 32 bits: at most {ROWS}"
    return computed_in_float32(x)


KERNEL = Kernel(forward, backward, unsupported)


def specs(warp: int) -> list[Spec]:
    """The kernel at the shipped configurations: heads of 64 and 128, one of which only a part is turned, the longest."""
    every = []
    for t in ("bf16", "fp32"):
        for H, E in ((32, 64), (64, 128), (32, 128), (LONGEST // 2, LONGEST)):
            BM, BH, BR, warps = tile(H, E, warp)
            pointers = {"x": f"*{t}", "c": "*fp32", "s": "*fp32", "y": f"*{t}"}
            numbers = ("x0", "x1", "x2", "c2", "M", "N1", "N2", "H", "E")
            for interleaved in (False, True):
                constants = {"xe": 1, "ce": 1, "c0": 0, "c1": 0, "INVERSE": True, "INTERLEAVED": interleaved}
                constants |= {"BM": BM, "BH": BH, "BR": BR}
                aligned = (*pointers, "x0", "x1", "x2", "c2", "H", "E")
                label = f"rotary_embedding {'interleaved ' * interleaved}{t} {2 * H} of {E}"
                every.append(Spec(label, rotary_kernel, pointers | dict.fromkeys(numbers, "i32"), constants, aligned, warps))
    return every
