"""What the kernels of lstm, gru and rnn share: the choice of a path, the tiles, and what a program reads at each step.

The product with x is one for all steps, torch's. What is left is a loop over T, and these ways to run it:

resident   one launch. A program has BM rows of the batch and all H units; it reads the recurrent weights once, and holds the
           states in float32 registers; a step is one product of matrices per gate
steps      a product of torch's and one pointwise kernel a step, of any H. Nothing waits for the device, so that a CUDA graph
           can hold the loop
slices     a program has BM rows and BN units with all their gates, and all programs make a step in one launch
persistent the same kernel, all steps in one launch: a program holds its slice of the recurrent weights, and at the end of a
           step waits for those that have the same rows. Only where it is asked for by name: it has not been run on a GPU

Letters as in `bptoolkit.ops.recurrent`. Rows end at `ends`; a step is t, in reverse T − 1 − t. A row that is past its end, or
in reverse has not begun, keeps its state, and what is written for it is zero.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.kernel import WARP, Paths, precision_of, upcasts
from bptoolkit.triton_kernels.linear_recurrence import between, position

ROWS = 16  # of the batch, the fewest that a matrix instruction takes
SLICE = 16  # units
HELD = {32: 128 << 10, 64: 32 << 10}  # bytes of weights: in shared memory, or with warps of 64 in the registers of every warp
BESIDE = 16 << 10  # bytes of shared memory for all else
PATHS = ("resident", "steps", "slices", "persistent")
_paths = Paths(PATHS)
forced = _paths.forced  # every sequence, whatever its size

# --- the choice of a path -------------------------------------------------------------------------------------------------


def room(device: torch.device) -> int:
    """Bytes of recurrent weights that a program holds on a device."""
    if WARP == 64 or device.type == "cpu":
        return HELD[WARP]
    return min(HELD[WARP], torch.cuda.get_device_properties(device).shared_memory_per_block_optin - BESIDE)


def held(gates: int, rows: int, columns: int, bytes: int, warp: int) -> int:
    """Bytes of weights of so many gates; tf32x3, of float32 on NVIDIA's parts, has each twice."""
    return gates * rows * columns * bytes * (2 if bytes == 4 and warp == 32 else 1)


def widest(gates: int, bytes: int, warp: int, room: int) -> int:
    """The most units whose recurrent weights a program holds."""
    return max(BH for BH in (0, 16, 32, 64, 128, 256) if held(gates, BH, BH, bytes, warp) <= room)


def widest_sliced(gates: int, bytes: int, warp: int, room: int) -> int:
    """The most units of which a program holds the recurrent weights of a slice, and at which no register spills."""
    most = (1024 if bytes == 2 else 128) // (4 if warp == 64 else 1)
    return most if warp == 64 or held(gates, most, SLICE, bytes, warp) <= room else 0


def path(H: int, gates: int, dtype: torch.dtype, device: torch.device) -> str:
    """How a sequence is run: "resident" where one program holds the recurrent weights, else "steps"; or as `forced` says."""
    asked = _paths.chosen
    if asked == "steps":
        return asked
    limit = widest_sliced if asked in ("slices", "persistent") else widest
    most = limit(gates, dtype.itemsize, WARP, room(device))
    if asked is not None and most < H:
        raise ValueError(f"the {asked} path takes at most {most} units of {dtype}, not {H}")
    return asked or ("resident" if most >= H else "steps")


# --- tiles and launches ---------------------------------------------------------------------------------------------------


class Resident(NamedTuple):
    """A launch of a resident kernel: padded units, and warps."""

    BH: int
    warps: int


_WARPS = {16: (1, 2), 32: (2, 8), 64: (8, 8), 128: (16, 8), 256: (16, 8)}  # BH -> for half, for float32: none spills


def resident(H: int, gates: int, bytes: int, warp: int) -> Resident:
    """The tile for H units of elements of so many bytes. Warps of 32 share the units among them, warps of 64 do not."""
    BH = max(16, triton.next_power_of_2(H))
    if warp == 64:
        return Resident(BH, max(1, BH // 32))
    warps = _WARPS[BH][bytes == 4]
    return Resident(BH, warps // 2 if gates == 1 and BH == 64 and bytes == 2 else warps)


def fixed(t: Tensor, H: int, gates: int, reverse: bool) -> tuple[tuple[int], dict[str, Any]]:
    """The grid of a resident kernel over T B ·, its constants, and how it is launched."""
    way = resident(H, gates, t.element_size(), WARP)
    constants = {
        "H": H,
        "REVERSE": reverse,
        "BM": ROWS,
        "BH": way.BH,
        "PRECISION": precision_of(t.dtype, WARP),
        "UPCAST": upcasts(t),
    }
    return (triton.cdiv(t.shape[1], ROWS),), constants | {"num_warps": way.warps, "num_stages": 1, "enable_fp_fusion": True}


class Sliced(NamedTuple):
    """A launch of a kernel by slices: rows, units, what a product takes at a time, and warps."""

    BM: int
    BN: int
    BK: int
    warps: int


def sliced(B: int, H: int, gates: int, bytes: int) -> Sliced:
    """The tile for B rows of H units, each of so many gates, of elements of so many bytes."""
    rows, chunk = (32, 128) if bytes == 2 else (16, 64 if gates == 1 else 32)
    BM, BK = (min(max(16, triton.next_power_of_2(n)), most) for n, most in ((B, rows), (H, chunk)))
    return Sliced(BM, SLICE, BK, 4)


def pointwise(B: int, H: int, bytes: int, warp: int) -> dict[str, int]:
    """BM and BN of one step of B rows: a warp, each thread of which reads 16 bytes at a time."""
    elements = 16 // bytes * warp
    BN = min(triton.next_power_of_2(H), elements)
    return {"BM": elements // BN, "BN": BN}


def stepwise(t: Tensor, H: int) -> tuple[tuple[int], dict[str, Any]]:
    """The grid of a pointwise kernel over one step of T B ·, and how it is launched."""
    sizes = pointwise(t.shape[1], H, t.element_size(), WARP)
    grid = (triton.cdiv(t.shape[1], sizes["BM"]) * triton.cdiv(H, sizes["BN"]),)
    return grid, sizes | {"num_warps": 1, "enable_fp_fusion": True}


def rows_of(t: Tensor | None) -> Tensor | None:
    """T B ·, its rows dense."""
    return t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def steps_of(t: Tensor | None) -> tuple[int, int]:
    """From step to step, and from row to row."""
    return (0, 0) if t is None else (t.stride(0), t.stride(1))


def at_start(t: Tensor, lengths: Tensor | None, reverse: bool) -> Tensor:
    """What a sequence has at the first step of each row; a row without any has what the first step in time has."""
    if not reverse:
        return t[0]
    if lengths is None:
        return t[-1]
    at = (lengths - 1).clamp(0, t.shape[0] - 1)
    return t.gather(0, at.view(1, -1, 1).expand(1, *t.shape[1:]))[0]


_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_FLOAT32, _NUMBERS = ("carried",), ("first", "last", "base", "t", "T", "B", "yt", "yb", "ct", "cb")


def shipped(name: str, gates: int, way: str, kernel: Any, warp: int, back: bool) -> list[Spec]:
    """A kernel at its shipped configurations: units that fill a tile; a tile that is not full, ragged and in reverse."""
    every, names = [], kernel.arg_names
    for t, bytes in (("bf16", 2), ("fp32", 4)):
        widths = [(512, True), (512, False)]
        if way == "resident":
            most = widest(gates, bytes, warp, HELD[warp])
            widths = [(BH, True) for BH in (16, 32, 64, 128, 256) if most >= BH] + [(most - 8, False)]
        elif way != "steps":
            most = widest_sliced(gates, bytes, warp, HELD[warp])
            widths = [(most, True), (most - 8, False)][bytes == 4 :]
        for H, full in widths:
            values: dict[str, Any] = {"H": H, "REVERSE": not full, "PRECISION": precision_of(_DTYPES[t], warp), "UPCAST": False}
            values |= {"RAW": not full, "TANH": full} | (dict.fromkeys(("lengths", "state", "dc", "U")) if full else {})
            if way == "resident":
                BH, warps = resident(H, gates, bytes, warp)
                values |= {"BM": ROWS, "BH": BH}
            elif way != "steps":
                BM, BN, BK, warps = sliced(64, H, gates, bytes)
                values |= {"BM": BM, "BN": BN, "BK": BK}
            else:
                warps = 1
                values |= pointwise(64, H, bytes, warp)
                del values["H"]
            values = {n: value for n, value in values.items() if n in names}
            types = {n: "i32" if n in _NUMBERS or n == "H" else "*fp32" if n in _FLOAT32 else f"*{t}" for n in names}
            types = {n: {"lengths": "*i64", "counters": "*i32"}.get(n, of) for n, of in types.items() if n not in values}
            aligned = tuple(n for n, of in types.items() if of[0] == "*" or n in ("H", "yt", "yb", "ct", "cb"))
            label = f"{name} {way}{' backward' * back} {t} {H}{', ragged' * (not full)}"
            narrow = "rows of few units" if (16 if way == "resident" else 32) >= H else ""
            every.append(Spec(label, kernel, types, values, aligned, warps, 1, way != "steps", narrow))
    return every


# --- inside the kernels ---------------------------------------------------------------------------------------------------


@triton.jit
def step_of(k, T, REVERSE: tl.constexpr):
    """The k-th step, 64 bits wide; there is one for any k, the last."""
    return tl.full((), 0, tl.int64) + position(tl.minimum(k, T - 1), T, REVERSE)


@triton.jit
def weights(w, H: tl.constexpr, BH: tl.constexpr, TRANSPOSED: tl.constexpr, UPCAST: tl.constexpr):
    """The block of a gate, rows of units by columns of what they take, or transposed; zeros beside it: BH BH."""
    k, n = tl.arange(0, BH)[:, None], tl.arange(0, BH)[None, :]
    if TRANSPOSED:
        at = w + n * H + k
    else:
        at = w + k * H + n
    if H < BH:
        x = tl.load(at, (k < H) & (n < H), other=0.0)
    else:
        x = tl.load(at)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def factor(x, w, UPCAST: tl.constexpr):
    """A factor of a product with w: rounded to its dtype, as what is stored is."""
    x = x.to(w.dtype.element_ty)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def units(x, H: tl.constexpr, BH: tl.constexpr):
    """Zeros beside the units that there are, where an infinity times a weight of zero has left NaN: BM BH."""
    if H < BH:
        x = tl.where((tl.arange(0, BH) < H)[None, :], x, 0.0)
    return x


@triton.jit
def given(p, at, mask):
    """What lies there, or zeros where no tensor is given."""
    if p is None:
        x = tl.zeros(mask.shape, tl.float32)
    else:
        x = tl.load(p + at, mask, other=0.0)
    return x


@triton.jit
def kept(lengths, t, ends, new, old):
    """The state of the rows that took step t; the others keep theirs."""
    if lengths is not None:
        new = tl.where(between(t, 0, ends), new, old)
    return new


@triton.jit
def state_before(s, s0, t, T, ends, at, B, H, mask, REVERSE: tl.constexpr):
    """What step t started from: s0 at a row's first step, else what the step before left."""
    if REVERSE:
        p, first = t + 1, between(t, ends - 1, ends)
    else:
        p, first = t - 1, between(t, 0, ends * 0 + 1)
    there = mask & between(p, 0, ends * 0 + T)
    return tl.where(first, s0, tl.load(s + p * B * H + at, there, other=0.0).to(tl.float32))


@triton.jit
def put(p, x, lengths, t, ends, mask):
    """Write step t, zeros in the rows that are past their ends."""
    tl.store(p, kept(lengths, t, ends, x, 0.0).to(p.dtype.element_ty), mask)
