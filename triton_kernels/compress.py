"""Activations in fewer bits: the four functions of `bptoolkit.compress` as kernels, with the same bits.

pack, unpack              one program per tile of BM groups × BN ≥ GROUP elements; each reads x, or the codes, once
pack_bits, unpack_bits    one program per BLOCK elements

Nothing here may depend on whether a multiplication and an addition are fused: q s and s B are exact, since s has 16 bits and q
and B have 8; the division is rounded correctly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.kernel import WARP, computed_in_float32, dense
from bptoolkit.triton_kernels.operator import operator
from bptoolkit.triton_kernels.randomness import hashed

LONGEST = 8192  # elements of a group, which a program holds
TILE = 2048  # elements, for groups that are shorter than that
PER_THREAD = 16  # elements of a tile
BLOCK = 4096  # elements of a mask


@triton.jit
def together(q, BITS: tl.constexpr):
    """Codes (BM, BN) of int32 side by side in bytes (BM, BN BITS/8)."""
    K: tl.constexpr = 8 // BITS
    if K > 1:
        q = tl.sum(tl.reshape(q, (q.shape[0], q.shape[1] // K, K)) << (tl.arange(0, K) * BITS)[None, None, :], 2)
    return q.to(tl.uint8)


@triton.jit
def apart(b, BITS: tl.constexpr):
    """The codes (BM, BN) of int32 in bytes (BM, BN BITS/8)."""
    K: tl.constexpr = 8 // BITS
    q = b.to(tl.int32)
    if K > 1:
        q = (q[:, :, None] >> (tl.arange(0, K) * BITS)[None, None, :]) & ((1 << BITS) - 1)
        q = tl.reshape(q, (b.shape[0], b.shape[1] * K))
    return q


@triton.jit
def places(p, N, GROUP: tl.constexpr, BITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, FULL: tl.constexpr):
    """Of tile p: its groups, elements and bytes, and which of them there are. A full tile's masks do not know N."""
    K: tl.constexpr = 8 // BITS
    g = p * BM + tl.arange(0, BM)  # BM
    n = tl.arange(0, BN)[None, :]  # 1 BN
    b = tl.arange(0, BN // K)[None, :]  # 1 BN/K
    i = g[:, None] * GROUP + n  # BM BN
    j = g[:, None] * (GROUP // K) + b  # BM BN/K
    if FULL:
        return g, i, j, g >= 0, (n < GROUP) & (g >= 0)[:, None], (b < GROUP // K) & (g >= 0)[:, None]
    else:
        return g, i, j, g * GROUP < N, (n < GROUP) & (i < N), (b < GROUP // K) & (j < tl.cdiv(N, K))


@triton.jit
def pack_tile(
    x,
    seed,
    codes,
    scale,
    minimum,
    p,
    N,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    FULL: tl.constexpr,
):
    B: tl.constexpr = (1 << BITS) - 1
    g, i, j, groups, elements, bytes = places(p, N, GROUP, BITS, BM, BN, FULL)
    X = tl.load(x + i, elements, other=0.0).to(tl.float32)  # BM BN
    m = tl.min(tl.where(elements & (X == X), X, float("inf")), 1)  # BM
    hi = tl.max(tl.where(elements, tl.where(X == X, X, float("inf")), float("-inf")), 1)  # BM
    s = (hi - m) * (1 / B)
    s = ((s.to(tl.int32, bitcast=True) + 255) & -256).to(tl.float32, bitcast=True)  # rounded up to 16 bits
    s = tl.where(hi > m, tl.maximum(s, 1.1754943508222875e-38), 0.0)  # 2^−126
    top = s * B
    fine = (top < float("inf")) & (m + top < float("inf")) & (m > float("-inf"))
    s = tl.where(fine, s, float("nan"))
    m = tl.where(fine & (m != 0), m, 0.0)
    tl.store(scale + g, s, groups)
    tl.store(minimum + g, m.to(minimum.dtype.element_ty), groups)
    used = s > 0  # neither constant nor NaN
    v = tl.div_rn(X - m[:, None], tl.broadcast_to(tl.where(used, s, 1.0)[:, None], (BM, BN)))  # BM BN
    v = tl.where(elements & used[:, None], v, 0.0)
    q = tl.floor(v)
    if seed is not None:
        u = ((hashed(i, seed) >> 8) & 0xFFFFFF).to(tl.float32) * 5.9604644775390625e-08  # 2^−24
        q += tl.where(u < v - q, 1.0, 0.0)
    else:
        q += tl.where(v - q > 0.5, 1.0, 0.0)
    tl.store(codes + j, together(tl.minimum(q, B).to(tl.int32), BITS), bytes)


@triton.jit(do_not_specialize=["N"])
def pack_kernel(x, seed, codes, scale, minimum, N, GROUP: tl.constexpr, BITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    p = tl.program_id(0).to(tl.int64)
    if (p + 1) * BM * GROUP <= N:
        pack_tile(x, seed, codes, scale, minimum, p, N, GROUP, BITS, BM, BN, True)
    else:
        pack_tile(x, seed, codes, scale, minimum, p, N, GROUP, BITS, BM, BN, False)


@triton.jit
def unpack_tile(
    codes,
    scale,
    minimum,
    x,
    p,
    N,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    FULL: tl.constexpr,
):
    g, i, j, groups, elements, bytes = places(p, N, GROUP, BITS, BM, BN, FULL)
    q = apart(tl.load(codes + j, bytes, other=0), BITS)  # BM BN
    s = tl.load(scale + g, groups, other=0.0)  # BM
    m = tl.load(minimum + g, groups, other=0.0).to(tl.float32)  # BM
    X = q.to(tl.float32) * s[:, None] + m[:, None]
    tl.store(x + i, X.to(x.dtype.element_ty), elements)


@triton.jit(do_not_specialize=["N"])
def unpack_kernel(codes, scale, minimum, x, N, GROUP: tl.constexpr, BITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    p = tl.program_id(0).to(tl.int64)
    if (p + 1) * BM * GROUP <= N:
        unpack_tile(codes, scale, minimum, x, p, N, GROUP, BITS, BM, BN, True)
    else:
        unpack_tile(codes, scale, minimum, x, p, N, GROUP, BITS, BM, BN, False)


@triton.jit
def pack_bits_tile(mask, bits, p, N, BLOCK: tl.constexpr, FULL: tl.constexpr):
    _, i, j, _, elements, bytes = places(p, N, BLOCK, 1, 1, BLOCK, FULL)
    tl.store(bits + j, together((tl.load(mask + i, elements, other=0) != 0).to(tl.int32), 1), bytes)


@triton.jit(do_not_specialize=["N"])
def pack_bits_kernel(mask, bits, N, BLOCK: tl.constexpr):
    p = tl.program_id(0).to(tl.int64)
    if (p + 1) * BLOCK <= N:
        pack_bits_tile(mask, bits, p, N, BLOCK, True)
    else:
        pack_bits_tile(mask, bits, p, N, BLOCK, False)


@triton.jit
def unpack_bits_tile(bits, mask, p, N, BLOCK: tl.constexpr, FULL: tl.constexpr):
    _, i, j, _, elements, bytes = places(p, N, BLOCK, 1, 1, BLOCK, FULL)
    tl.store(mask + i, apart(tl.load(bits + j, bytes, other=0), 1).to(tl.uint8), elements)


@triton.jit(do_not_specialize=["N"])
def unpack_bits_kernel(bits, mask, N, BLOCK: tl.constexpr):
    p = tl.program_id(0).to(tl.int64)
    if (p + 1) * BLOCK <= N:
        unpack_bits_tile(bits, mask, p, N, BLOCK, True)
    else:
        unpack_bits_tile(bits, mask, p, N, BLOCK, False)


def tile(group: int, warp: int) -> tuple[int, int, int]:
    """BM, BN and the number of warps, of `warp` threads each, for groups of this size."""
    BN = triton.next_power_of_2(group)
    BM = max(1, TILE // BN)
    return BM, BN, BM * BN // (PER_THREAD * warp)


def _launch_pack(x: Tensor, seed: Tensor | None, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    codes, scale, minimum = _fake_pack(x, seed, bits, group)
    if x.numel():
        BM, BN, warps = tile(group, WARP)
        pack_kernel[(triton.cdiv(len(scale), BM),)](
            dense(x), dense(seed), codes, scale, minimum, x.numel(), group, bits, BM, BN, num_warps=warps, enable_fp_fusion=True
        )  # fmt: skip
    return codes, scale, minimum


def _fake_pack(x, seed, bits, group):
    N, G = x.numel(), -(-x.numel() // group)
    codes = torch.empty(-(-N * bits // 8), dtype=torch.uint8, device=x.device)
    return codes, *(torch.empty(G, dtype=t, device=x.device) for t in (torch.float32, x.dtype))


def _launch_unpack(
    codes: Tensor, scale: Tensor, minimum: Tensor, shape: Sequence[int], dtype: torch.dtype, bits: int, group: int
) -> Tensor:
    x = _fake_unpack(codes, scale, minimum, shape, dtype, bits, group)
    if x.numel():
        BM, BN, warps = tile(group, WARP)
        given = map(dense, (codes, scale, minimum))
        unpack_kernel[(triton.cdiv(len(scale), BM),)](
            *given, x, x.numel(), group, bits, BM, BN, num_warps=warps, enable_fp_fusion=True
        )  # fmt: skip
    return x


def _fake_unpack(codes, scale, minimum, shape, dtype, bits, group):
    return torch.empty(tuple(shape), dtype=dtype, device=codes.device)


def _launch_pack_bits(mask: Tensor) -> Tensor:
    bits, N = _fake_pack_bits(mask), mask.numel()
    if N:
        given = (dense(mask).view(torch.uint8), bits, N, BLOCK)
        pack_bits_kernel[(triton.cdiv(N, BLOCK),)](*given, num_warps=BLOCK // (PER_THREAD * WARP), enable_fp_fusion=True)
    return bits


def _fake_pack_bits(mask):
    return torch.empty(-(-mask.numel() // 8), dtype=torch.uint8, device=mask.device)


def _launch_unpack_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    mask, N = _fake_unpack_bits(bits, shape), prod(shape)
    if N:
        given = (dense(bits), mask.view(torch.uint8), N, BLOCK)
        unpack_bits_kernel[(triton.cdiv(N, BLOCK),)](*given, num_warps=BLOCK // (PER_THREAD * WARP), enable_fp_fusion=True)
    return mask


def _fake_unpack_bits(bits, shape):
    return torch.empty(tuple(shape), dtype=torch.bool, device=bits.device)


def unsupported(t: Tensor, group: int = 8) -> str | None:
    """Why the kernels cannot take a call, of x or of a scale and its group; or None."""
    if group > LONGEST:
        return f"a group of {group} elements is too long for the fused kernel, which holds a group: at most {LONGEST}"
    return computed_in_float32(t)


class Kernels(NamedTuple):
    """The functions of `bptoolkit.compress` by their names there."""

    pack: Callable[..., tuple[Tensor, Tensor, Tensor]]
    unpack: Callable[..., Tensor]
    pack_bits: Callable[..., Tensor]
    unpack_bits: Callable[..., Tensor]
    unsupported: Callable[..., str | None]


KERNELS = Kernels(
    operator("triton_pack", _launch_pack, _fake_pack),
    operator("triton_unpack", _launch_unpack, _fake_unpack),
    operator("triton_pack_bits", _launch_pack_bits, _fake_pack_bits),
    operator("triton_unpack_bits", _launch_unpack_bits, _fake_unpack_bits),
    unsupported,
)


def specs(warp: int) -> list[Spec]:
    """The kernels at the shipped configurations: common groups, the shortest, the longest; nearest; masks."""
    every = []
    for t in ("bf16", "fp32"):
        pointers = {"x": f"*{t}", "seed": "*i32", "codes": "*u8", "scale": "*fp32", "minimum": f"*{t}"}
        for bits, group in ((8, 256), (4, 256), (2, 256), (2, 8), (2, LONGEST)):
            BM, BN, warps = tile(group, warp)
            constants = {"GROUP": group, "BITS": bits, "BM": BM, "BN": BN}
            types = pointers | {"N": "i32"}
            label = f"{t} {bits} bits {group}"
            every.append(Spec(f"compress pack {label}", pack_kernel, types, constants, tuple(pointers), warps))
            if group == 256 and bits == 2:
                given = {k: v for k, v in types.items() if k != "seed"}
                aligned = tuple(k for k in pointers if k != "seed")
                every.append(
                    Spec(f"compress pack nearest {label}", pack_kernel, given, constants | {"seed": None}, aligned, warps)
                )
            given = {k: v for k, v in types.items() if k != "seed"}
            aligned = tuple(k for k in given if k != "N")
            few = "codes are read in the pieces of which their elements are written, 16 bytes at a time"
            every.append(Spec(f"compress unpack {label}", unpack_kernel, given, constants, aligned, warps, narrow=few))
    types, constants = {"mask": "*u8", "bits": "*u8", "N": "i32"}, {"BLOCK": BLOCK}
    for name, kernel in (("pack_bits", pack_bits_kernel), ("unpack_bits", unpack_bits_kernel)):
        few = "" if name == "pack_bits" else "a byte of bits is 8 of the mask"
        warps = BLOCK // (PER_THREAD * warp)
        every.append(Spec(f"compress {name}", kernel, types, constants, ("mask", "bits"), warps, narrow=few))
    return every
