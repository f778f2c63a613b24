"""Dropout, fused: the mask is hashed in registers, in both directions. For the maths see the op of this name.

forward, backward    the same kernel: y = x (k a) + (k c + b), with c = b = 0 in backward
elements             one program per BLOCK elements
channels             one program per tile of BM channels × BN elements of each; one hash a channel
"""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from bptoolkit.ops.dropout import affine
from bptoolkit.randomness import threshold
from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.kernel import WARP, Kernel, computed_in_float32, dense
from bptoolkit.triton_kernels.operator import operator
from bptoolkit.triton_kernels.randomness import keep

BLOCK = 2048  # elements of a program
PER_THREAD = 8  # of them


@triton.jit
def dropped(X, k, a, c, b, ALPHA: tl.constexpr):
    Y = X * tl.where(k, a, 0.0)
    if ALPHA:
        Y += tl.where(k, c, 0.0) + b
    return Y


@triton.jit
def some_elements(x, seed, y, i, mask, t, a, c, b, ALPHA: tl.constexpr):
    X = tl.load(x + i, mask).to(tl.float32)
    Y = dropped(X, keep(i, seed, t), a, c, b, ALPHA)
    tl.store(y + i, Y.to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["N", "t"])
def elements_kernel(x, seed, y, N, t, a, c, b, ALPHA: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = start + tl.arange(0, BLOCK)  # BLOCK
    if start + BLOCK <= N:
        some_elements(x, seed, y, i, None, t, a, c, b, ALPHA)  # 16 bytes at a time, whatever N is
    else:
        some_elements(x, seed, y, i, i < N, t, a, c, b, ALPHA)


@triton.jit(do_not_specialize=["M", "t"])
def channels_kernel(x, seed, y, M, N, t, a, c, b, ALPHA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    tiles = tl.cdiv(N, BN)
    p = tl.program_id(0)
    m = (p // tiles).to(tl.int64) * BM + tl.arange(0, BM)  # BM
    n = (p % tiles).to(tl.int64) * BN + tl.arange(0, BN)  # BN
    mask = (m < M)[:, None] & (n < N)[None, :]
    at = m[:, None] * N + n[None, :]  # BM BN
    X = tl.load(x + at, mask, other=0.0).to(tl.float32)
    Y = dropped(X, keep(m, seed, t)[:, None], a, c, b, ALPHA)
    tl.store(y + at, Y.to(y.dtype.element_ty), mask)


def tile(N: int, warp: int) -> tuple[int, int, int]:
    """BM, BN and the number of warps, of `warp` threads each, for channels of N elements."""
    BN = min(triton.next_power_of_2(N), BLOCK)
    return BLOCK // BN, BN, BLOCK // (PER_THREAD * warp)


def _launch(x: Tensor, s: Tensor, p: float, lead: int, a: float, c: float, b: float, alpha: bool) -> Tensor:
    y = _fake(x, s, p, lead, a, c, b, alpha)
    if p == 0 or not x.numel():
        return y.copy_(x)
    given = (dense(x), dense(s), y)
    coefficients = (threshold(p), a, c, b, alpha)
    M, N = prod(x.shape[:lead]), prod(x.shape[lead:])
    BM, BN, warps = tile(N, WARP)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    if N == 1:
        elements_kernel[(triton.cdiv(M, BLOCK),)](*given, M, *coefficients, BLOCK, **options)
    else:
        programs = triton.cdiv(M, BM) * triton.cdiv(N, BN)
        channels_kernel[(programs,)](*given, M, N, *coefficients, BM, BN, **options)
    return y


def _fake(x, s, p, lead, a, c, b, alpha):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


DROP = operator("triton_dropout", _launch, _fake)


def forward(x, s, p, lead, alpha):
    return DROP(x, s, p, lead, *affine(p, alpha), alpha)


def backward(dy, s, p, lead, alpha):
    a, _, _ = affine(p, alpha)
    return DROP(dy, s, p, lead, a, 0.0, 0.0, False), None


def unsupported(x: Tensor, s: Tensor | None, p: float, lead: int, alpha: bool) -> str | None:
    """Why the kernel cannot take the call, or None."""
    return computed_in_float32(x)


KERNEL = Kernel(forward, backward, unsupported)


def specs(warp: int) -> list[Spec]:
    """The kernels at the shipped configurations: elements; channels that are short, common, and longer than a tile."""
    every = []
    for t in ("bf16", "fp32"):
        pointers = {"x": f"*{t}", "seed": "*i32", "y": f"*{t}"}
        scalars = {"t": "i32", "a": "fp32", "c": "fp32", "b": "fp32"}
        for alpha in (False, True):
            name = f"{'alpha_' * alpha}dropout {t}"
            BM, BN, warps = tile(1, warp)
            types = pointers | scalars | {"N": "i32"}
            constants = {"ALPHA": alpha, "BLOCK": BLOCK}
            every.append(Spec(name, elements_kernel, types, constants, tuple(pointers), warps))
            for N in (64, 1024, BLOCK):
                BM, BN, warps = tile(N, warp)
                types = pointers | scalars | {"M": "i32", "N": "i32"}
                constants = {"ALPHA": alpha, "BM": BM, "BN": BN}
                every.append(Spec(f"{name} channels {N}", channels_kernel, types, constants, (*pointers, "N"), warps))
    return every
