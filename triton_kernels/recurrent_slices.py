"""What the recurrent kernels by slices share. A program has BM rows of the batch and BN units with all their gates, so that
what a step does besides its product is its own; the product takes what all slices of these rows made before.

Between two steps lies either the end of a launch, or `arrive`: a count in global memory of the programs that have come so far.
Nothing is carried in registers, so the two are one kernel. first ≤ k < last are the steps of a launch, in its order; counters
is None where a launch is one step. S has the h that a step starts from, at the step's parity, and gets the next: no program
writes there again before all others have read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bptoolkit.triton_kernels.kernel import WARP, precision_of, programs
from bptoolkit.triton_kernels.recurrent import sliced


def launch_slices(kernel: Any, persistent: bool, gates: int, t: Tensor, H: int, args: Sequence[Any], **flags: Any) -> None:
    """A kernel by slices over all steps of T B ·: all in one launch, persistent, or else one each.

    Raises:
        ValueError: all in one launch, but there are more slices than can run at a time.
    """
    (T, B, _), bytes = t.shape, t.element_size()
    way = sliced(B, H, gates, bytes)
    slices, tiles = triton.cdiv(H, way.BN), triton.cdiv(B, way.BM)
    most = 1 if t.device.type == "cpu" else programs(t.device, 16)  # that run at a time; the interpreter's do not
    constants = {"H": H, "BM": way.BM, "BN": way.BN, "BK": way.BK, "PRECISION": precision_of(t.dtype, WARP)}
    constants |= {"UPCAST": t.device.type == "cpu" and t.dtype == torch.bfloat16} | flags
    options = {"num_warps": way.warps, "num_stages": 1, "enable_fp_fusion": True}
    if not persistent:
        for k in range(T):
            kernel[(slices, tiles)](*args, None, k, k + 1, 0, **constants, **options)
        return
    if slices > most:
        raise ValueError(f"the persistent path needs {slices} programs at a time; this device runs {most}")
    counters = torch.empty(tiles, dtype=torch.int32, device=t.device).zero_()
    for tile in range(0, tiles, most // slices):  # rows of other tiles need not wait for these
        grid = slices, min(most // slices, tiles - tile)
        kernel[grid](*args, counters, 0, T, tile, **constants, **options, launch_cooperative_grid=True)


def states(h0: Tensor) -> Tensor:
    """S, for the first step."""
    S = torch.empty((2, *h0.shape), dtype=h0.dtype, device=h0.device)
    S[0] = h0
    return S


# --- inside the kernels ---------------------------------------------------------------------------------------------------


@triton.jit
def blocks(
    wh, n, GATES: tl.constexpr, H: tl.constexpr, BK: tl.constexpr, TRANSPOSED: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """The weights of a slice, chunk by chunk of BK units, each of the gates: a tuple of BK BN."""
    found = ()
    for chunk in tl.static_range((H + BK - 1) // BK):
        k = chunk * BK + tl.arange(0, BK)
        mask = (k < H)[:, None] & (n < H)[None, :]
        for gate in tl.static_range(GATES):
            if TRANSPOSED:  # from hₜ₋₁ to the gate
                at = wh + (gate * H + n[None, :]) * H + k[:, None]
            else:
                at = wh + (gate * H + k[:, None]) * H + n[None, :]
            x = tl.load(at, mask, other=0.0)
            found = found + (x.to(tl.float32) if UPCAST else x,)  # noqa: RUF005
    return found


@triton.jit
def factors(
    p, chunk: tl.constexpr, rows, H: tl.constexpr, step: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """A chunk of BK units of some rows, past any cache that others' writes do not reach: BM BK."""
    r, q = tl.arange(0, BM)[:, None], tl.arange(0, BK)[None, :]
    there = r < rows
    if H % BK:
        there = there & (q < H - chunk * BK)
    x = tl.load(p + chunk * BK + (r * step + q), there, other=0.0, cache_modifier=".cg")
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def arrive(counter, count):
    """Wait until the programs that share the counter have arrived `count` times in all: what they wrote is there to be read."""
    tl.debug_barrier()
    seen = tl.atomic_add(counter, 1, sem="acq_rel") + 1
    while seen < count:
        seen = tl.atomic_add(counter, 0, sem="acquire")
    tl.debug_barrier()
