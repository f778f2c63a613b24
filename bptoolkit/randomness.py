"""Random masks that are computed from a seed wherever they are needed, so that nobody has to keep them.

The bits of element i are a hash of i and the seed, in plain integer arithmetic: the same on every device, in every block, in a
compiled graph and under vmap, and nothing but the seed's 8 bytes lies between forward and backward. The seed itself comes from
torch's global generator of the tensor's device; `torch.manual_seed`, `fork_rng`, checkpointing and vmap's `randomness=` govern
it.

    h = G i + k₀,  h ⊕= h ≫ 17,  h = A h ⊕ k₁,  h ⊕= h ≫ 11,  h = B h,  h ⊕= h ≫ 15,  h = C h    (mod 2³², ≫ logical)

A, B, C and the shifts are those of Wellons' `triple32`, an integer hash of low avalanche bias; G is 2³² / golden ratio (Weyl
sequence); k₀ and k₁ are the seed. Counter-based generators: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from bptoolkit.function import unwatched

G, A, B, C = 0x9E3779B9, 0xED5AD4BB, 0xAC4C1B51, 0x31848BAB
BLOCK = 1 << 18  # elements: the block, its hash and a temporary fit the cache


def draw_seed(like: Tensor) -> Tensor:
    """A seed from torch's global generator: (2,) of int32, on the device of `like`."""
    return torch.randint(-(1 << 31), 1 << 31, (2,), dtype=torch.int32, device=like.device)


def keep(seed: Tensor, shape: Sequence[int], p: float) -> Tensor:
    """A boolean mask of a shape, each element True with probability 1 − p, independently: a function of the seed alone.

    Args:
        seed: of `draw_seed`.
        shape: of the mask.
        p: the probability of False; exact to 2⁻³², and where it is 0 or 1.
    """
    n, p = prod(shape), float(p)
    if p == 0 or p == 1:
        return torch.full(tuple(shape), p == 0, device=seed.device)
    if seed.device.type == "cpu" and unwatched(seed):
        return _in_blocks(seed, n, p).view(tuple(shape))
    i = torch.arange(n, dtype=torch.int32 if n <= 1 << 31 else torch.int64, device=seed.device)
    return (hashed(i, seed) < threshold(p)).view(tuple(shape))


def threshold(p: float) -> int:
    """What a hash, as a signed number, lies below with probability 1 − p."""
    return min(round((1 - p) * 2**32), 2**32 - 1) - (1 << 31)


def hashed(i: Tensor, seed: Tensor) -> Tensor:
    """The hash of indices (int32, or int64 for large ones), as signed 32-bit numbers."""
    k0, k1 = seed.unbind(-1)
    if i.dtype == torch.int64:
        k1 = k1 ^ (i >> 32).to(torch.int32) * signed(G)
        i = ((i + (1 << 31) & 0xFFFFFFFF) - (1 << 31)).to(torch.int32)
    h = i * signed(G) + k0
    h = h ^ (h >> 17 & 0x7FFF)
    h = h * signed(A) ^ k1
    h = h ^ (h >> 11 & 0x1FFFFF)
    h = h * signed(B)
    h = h ^ (h >> 15 & 0x1FFFF)
    return h * signed(C)


def hashed_rows(keys: Tensor, columns: Tensor, room: dict[str, Tensor]) -> Tensor:
    """The hash of columns with a seed per row: with key h, of one call's rows each another, the seed is (h, C h).

    Args:
        keys: (..., 1) of int32.
        columns: (S,) of int32.
        room: where the result and a temporary lie; what was in them is gone.

    Returns:
        (..., S) of int32: `hashed(columns, seed)`, in place.
    """
    shape = (*keys.shape[:-1], *columns.shape)
    n = prod(shape)
    if not room or room["h"].numel() < n:
        room.update({x: torch.empty(n, dtype=torch.int32, device=keys.device) for x in "hs"})
    h, s = (room[x][:n].view(shape) for x in "hs")
    torch.add(columns * signed(G), keys, out=h)
    h ^= torch.bitwise_right_shift(h, 17, out=s).bitwise_and_(0x7FFF)
    h.mul_(signed(A)).bitwise_xor_(keys * signed(C))
    h ^= torch.bitwise_right_shift(h, 11, out=s).bitwise_and_(0x1FFFFF)
    h.mul_(signed(B))
    h ^= torch.bitwise_right_shift(h, 15, out=s).bitwise_and_(0x1FFFF)
    return h.mul_(signed(C))


def signed(k: int) -> int:
    """A number mod 2³² as a signed one."""
    return (k + (1 << 31) & 0xFFFFFFFF) - (1 << 31)


def _in_blocks(seed: Tensor, n: int, p: float) -> Tensor:
    """The same mask, in place and block by block."""
    (k0, k1), t, out = seed.tolist(), threshold(p), torch.empty(n, dtype=torch.bool)
    size = min(n, BLOCK)
    steps = torch.arange(size, dtype=torch.int32).mul_(signed(G))
    h_, s_ = torch.empty_like(steps), torch.empty_like(steps)
    for start in range(0, n, BLOCK):
        m = min(BLOCK, n - start)
        s = s_[:m]
        h = torch.add(steps[:m], signed(k0 + G * start), out=h_[:m])
        h ^= torch.bitwise_right_shift(h, 17, out=s).bitwise_and_(0x7FFF)
        h.mul_(signed(A)).bitwise_xor_(k1 ^ signed((start >> 32) * G))
        h ^= torch.bitwise_right_shift(h, 11, out=s).bitwise_and_(0x1FFFFF)
        h.mul_(signed(B))
        h ^= torch.bitwise_right_shift(h, 15, out=s).bitwise_and_(0x1FFFF)
        torch.lt(h.mul_(signed(C)), t, out=out[start : start + m])
    return out
