"""Activations in fewer bits, to be kept between forward and backward: 8, 4 or 2 bits for an element, 1 for a mask's.

Maths     of each group of elements    m = min x,   s = (max x − m)/B   with B = 2^bits − 1
          v = (x − m)/s                q = ⌊v⌋ + [u < v − ⌊v⌋]          x̂ = q s + m
          stochastic: u uniform on [0, 1), so E q = v and E x̂ = x;      nearest: u = 1/2
Letters   x of any shape, flattened: N elements, G = ⌈N/group⌉ groups, of which the last may be shorter; q the codes;
          m and s one number a group; u a hash of a seed and the element's index (`bptoolkit.randomness`), of 24 bits
Numerics  computed in float32 (float64 if x is); s is rounded up to 16 significant bits: then q ≤ B, and q s is exact, so that a
          fused multiply-add gives the same bits; s is at least the smallest normal number, or 0 where the group is constant;
          x̂ is rounded to x's dtype
Source    per-group quantization with stochastic rounding: Chen et al., "ActNN", 2021, arXiv 2104.14129
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bptoolkit import kernels
from bptoolkit.choose import State, choose
from bptoolkit.precision import wide
from bptoolkit.randomness import draw_seed, hashed
from bptoolkit.shapes import check_floating

BITS = (8, 4, 2)


class Packed(NamedTuple):
    """A tensor in fewer bits: what `pack` returns and `unpack` takes.

    Attributes:
        codes: ⌈N bits/8⌉ of uint8; neighbours share a byte, the first in its lowest bits; what is over is 0.
        scale: (G,), float32, or float64 of a float64 tensor: the step of each group; 0 of a constant one, NaN where a number is
            not finite.
        minimum: (G,), of the tensor's dtype.
        shape: of the tensor.
        dtype: of the tensor.
        bits: of a code.
        group: the number of elements that share a scale and a minimum.
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor
    shape: torch.Size
    dtype: torch.dtype
    bits: int
    group: int

    @property
    def nbytes(self) -> int:
        """What it keeps, in bytes."""
        return self.codes.nbytes + self.scale.nbytes + self.minimum.nbytes


def pack(
    x: Tensor, bits: int, *, group: int = 256, stochastic: bool = True, seed: Tensor | None = None, backend: str = "auto"
) -> Packed:
    """Keep a tensor in 8, 4 or 2 bits an element, with a scale and a minimum for each group of neighbours.

    No gradient flows through it. `unpack` is within one step of a group's scale of every element, nearest within half a step,
    up to rounding; stochastic, the mean of what it returns is x, up to the rounding of x's dtype. The smallest element of a
    group, and constant groups, are exact. A group with NaN or an infinity becomes NaN as a whole; so does one whose range
    max − min, or the last step, is beyond float32 (float64 of float64). −0 becomes 0.

    Args:
        x: any shape, floating point; its elements are grouped in the order of its shape, whatever its strides are.
        bits: 8, 4 or 2.
        group: how many elements share a scale; a multiple of 8.
        stochastic: round up or down by chance, so that x is the mean; else to the nearest.
        seed: of `bptoolkit.randomness.draw_seed`, (2,) of int32 on x's device; None draws it from torch's global generator. The
            same seed gives the same bits on every device and backend. Nearest uses none.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Raises:
        TypeError: x is not of floating point, or the seed is not of int32.
        ValueError: bits, group or the seed's shape or device are none of the above, or the named backend cannot run the call.
    """
    check_floating("pack", "x", x)
    if bits not in BITS:
        raise ValueError(f"pack: bits={bits}; a code has 8, 4 or 2 bits")
    if group < 8 or group % 8:
        raise ValueError(f"pack: group={group}; a group is a multiple of 8 elements, so that it fills whole bytes")
    if seed is not None:
        _check_seed(seed, x)
    rules = _pick("pack", backend, x, group)
    if not stochastic:
        seed = None
    elif seed is None:
        seed = draw_seed(x)
    run = kernel().pack if rules == "triton" else _pack
    with torch.no_grad():
        codes, scale, minimum = run(x.detach(), seed, bits, group)
    return Packed(codes, scale, minimum, x.shape, x.dtype, bits, group)


def unpack(packed: Packed, *, backend: str = "auto") -> Tensor:
    """The tensor that `pack` was given, up to its rounding; dense, in its own shape and dtype. No gradient flows through it.

    Args:
        packed: what `pack` returned.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Raises:
        ValueError: the named backend cannot run the call.
    """
    rules = _pick("unpack", backend, packed.scale, packed.group)
    run = kernel().unpack if rules == "triton" else _unpack
    with torch.no_grad():
        return run(*packed)


def pack_bits(mask: Tensor, *, backend: str = "auto") -> Tensor:
    """A mask in one bit an element: ⌈N/8⌉ of uint8, the first element in the lowest bit; what is over is 0.

    As `numpy.packbits(mask, bitorder="little")`.

    Args:
        mask: any shape, of torch.bool.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Raises:
        TypeError: the mask is not of torch.bool.
        ValueError: the named backend cannot run the call.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"pack_bits: mask is {mask.dtype}; it must be torch.bool")
    run = kernel().pack_bits if _pick("pack_bits", backend, mask) == "triton" else _pack_bits
    return run(mask)


def unpack_bits(bits: Tensor, shape: Sequence[int], *, backend: str = "auto") -> Tensor:
    """The mask of a shape that `pack_bits` was given.

    Args:
        bits: (⌈N/8⌉,), uint8.
        shape: of the mask, N elements.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Raises:
        TypeError: bits is not of torch.uint8.
        ValueError: bits has not the length that the shape asks for, or the named backend cannot run the call.
    """
    if bits.dtype != torch.uint8:
        raise TypeError(f"unpack_bits: bits is {bits.dtype}; it must be torch.uint8")
    if bits.dim() != 1 or len(bits) != -(-prod(shape) // 8):
        raise ValueError(
            f"unpack_bits: bits has shape {tuple(bits.shape)}; a mask of shape {tuple(shape)} needs ({-(-prod(shape) // 8)},)"
        )
    run = kernel().unpack_bits if _pick("unpack_bits", backend, bits) == "triton" else _unpack_bits
    return run(bits, torch.Size(shape))


def kernel() -> Any:
    """The same four functions, as Triton kernels."""
    from bptoolkit.triton_kernels.compress import KERNELS

    return KERNELS


_AS_RULE = SimpleNamespace(kernel=kernel)


def _pick(name: str, backend: str, t: Tensor, *options: Any) -> str:
    """Which functions run: "eager" or "triton"; errors as `Op.pick`."""
    on_device = kernels.runs_on(t.device.type)
    unsupported = kernels.unsupported(_AS_RULE, t, *options) if on_device else None
    watched = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return choose(State(backend, "forward", True, on_device, watched, False, unsupported), name).rule


def _check_seed(seed: Tensor, x: Tensor) -> None:
    if seed.dtype != torch.int32:
        raise TypeError(f"pack: seed is {seed.dtype}; it must be torch.int32")
    if seed.shape != (2,) or seed.device != x.device:
        raise ValueError(f"pack: seed has shape {tuple(seed.shape)} on {seed.device}; it must be (2,) on x's {x.device}")


def _pack(x: Tensor, seed: Tensor | None, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    N, B = x.numel(), 2**bits - 1
    t = x.reshape(-1)
    if N % group:
        t = torch.cat((t, t[-1:].expand(-N % group)))  # G group, without another minimum or maximum
    t = wide(t).view(-1, group)
    m, hi = t.amin(1), t.amax(1)  # G
    s = torch.where(hi > m, _rounded_up((hi - m) * (1 / B)).clamp_min(torch.finfo(t.dtype).tiny), 0.0)
    fine = (s * B < torch.inf) & (m + s * B < torch.inf) & (m > -torch.inf)
    s, m = torch.where(fine, s, torch.nan), torch.where(fine & (m != 0), m, 0.0)
    used = (s > 0)[:, None]  # neither constant nor NaN
    v = torch.where(used, (t - m[:, None]) / torch.where(used, s[:, None], 1.0), 0.0)  # G group
    q = v.floor()
    u = 0.5 if seed is None else _uniform(seed, t.numel(), t.dtype).view_as(v)
    q = (q + (u < v - q)).clamp_max(B).to(torch.uint8).view(-1)
    q[N:] = 0
    return _together(q, bits)[: -(-N * bits // 8)].contiguous(), s, m.to(x.dtype)


def _unpack(
    codes: Tensor, scale: Tensor, minimum: Tensor, shape: torch.Size, dtype: torch.dtype, bits: int, group: int
) -> Tensor:
    G, N = len(scale), prod(shape)
    q = torch.nn.functional.pad(_apart(codes, bits)[:N], (0, G * group - N)).view(G, group)
    return (q * scale[:, None] + minimum[:, None]).to(dtype).view(-1)[:N].reshape(shape)


def _pack_bits(mask: Tensor) -> Tensor:
    t = mask.reshape(-1).to(torch.uint8)
    return _together(torch.nn.functional.pad(t, (0, -len(t) % 8)), 1)


def _unpack_bits(bits: Tensor, shape: torch.Size) -> Tensor:
    return _apart(bits, 1)[: prod(shape)].bool().view(shape)


def _together(q: Tensor, bits: int) -> Tensor:
    """Codes, as many as fill whole bytes, side by side in bytes."""
    K = 8 // bits
    return sum((part << bits * k for k, part in enumerate(q.view(-1, K).unbind(1))), torch.zeros_like(q[::K]))


def _apart(codes: Tensor, bits: int) -> Tensor:
    return torch.stack([codes >> bits * k & 2**bits - 1 for k in range(8 // bits)], 1).view(-1)


def _rounded_up(s: Tensor) -> Tensor:
    """Positive numbers with 16 significant bits, none of them smaller than it was."""
    number, rest = (torch.int32, 255) if s.dtype == torch.float32 else (torch.int64, (1 << 37) - 1)
    return ((s.view(number) + rest) & ~rest).view(s.dtype)


def _uniform(seed: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """A number of 24 bits on [0, 1) for each index below n."""
    i = torch.arange(n, dtype=torch.int32 if n <= 1 << 31 else torch.int64, device=seed.device)
    return (hashed(i, seed) >> 8 & 0xFFFFFF).to(dtype) * 2**-24
