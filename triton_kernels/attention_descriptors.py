"""How attention's kernels read q, k, v and dO: by pointers; or, where that is asked for by name, by tensor descriptors.

pointers     every thread computes the addresses of what it reads
descriptors  a tensor is a base, sizes and steps over B H G L E, encoded at a launch; one instruction of one thread has a tile
             copied to shared memory by hardware of its own (TMA, NVIDIA's parts from compute capability 9.0 on), zeros there
             where the tensor has nothing. What `attention_rows.tile_of` gives is the same to the bit, and so is all else
specialised  descriptors, and warps of their own for the copies and for the products, beside those of the softmax: compute
             capability 10. A loop is one then, not three

Only the first is chosen by itself: the others have not been run on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from bptoolkit.triton_kernels.attention_layout import Batch
from bptoolkit.triton_kernels.kernel import Paths

PATHS = ("pointers", "descriptors", "specialised")
PARTS: Mapping[str, tuple[str, ...]] = {"pointers": (), "descriptors": ("sm_90", "sm_100"), "specialised": ("sm_100",)}
WIDEST = 128  # features of a head: at 256 registers spill in `rows`
BYTES = 16  # what bases and steps are multiples of
_paths = Paths(PATHS, "pointers")
forced = _paths.forced  # the second order and a mask's gradient read by pointers all the same


def path_of(n: Batch, options: int, packed: bool, **tensors: Tensor | None) -> str:
    """The path of a call, its tensors B H G L E by name: as `forced` says, but "pointers" where there is nothing to read.

    Raises:
        ValueError: they cannot be read as `forced` says.
    """
    path = _paths.chosen
    if path == "pointers" or not min(n.L, n.S, n.E, n.EV):
        return "pointers"
    given = {name: t for name, t in tensors.items() if t is not None}
    why = _unsuitable(path, n, options, packed, next(iter(given.values())))
    why = why or next((f"{name} {of}" for name, t in given.items() if (of := _unreadable(t))), None)
    if why is not None:
        raise ValueError(f"attention by the {path} path cannot take this call: {why}")
    return path


def _unsuitable(path: str, n: Batch, options: int, packed: bool, q: Tensor) -> str | None:
    """Why a call cannot use descriptors, or have its loops specialised; or None."""
    if packed:
        return "packed sequences (cu_q) end inside of tiles"
    if q.element_size() != 2:
        return f"it takes half precision, not {q.dtype}"
    if max(n.E, n.EV) > WIDEST:
        return f"a head has at most {WIDEST} features, not {max(n.E, n.EV)}"
    if path == "specialised" and options:  # registers would spill
        return "it takes is_causal, and no mask, window to the left, slopes, lengths, soft cap or dropout"
    if q.device.type == "cuda":
        if torch.version.hip:
            return f"{torch.cuda.get_device_name(q.device)} has no tensor memory accelerator"
        major, minor = torch.cuda.get_device_capability(q.device)
        if major < 9 or (path == "specialised" and major != 10):
            return f"it takes compute capability {'10' if path == 'specialised' else '9.0 or more'}, not {major}.{minor}"
    return None


def _unreadable(t: Tensor) -> str | None:
    """Why there can be no descriptor of a tensor B H G L E, or None."""
    begins = t.data_ptr() % BYTES
    if begins:
        return f"begins {begins} bytes after a multiple of {BYTES}"
    for d, (size, step) in enumerate(zip(t.shape[:-1], t.stride())):
        if size > 1 and (step == 0 or step * t.element_size() % BYTES):
            dims = ("the batch", "heads", "the heads of a group", "rows")
            return f"has a step of {step * t.element_size()} bytes over {dims[d]}: multiples of {BYTES} are read, not 0"
    return None


def readable(path: str, t: Tensor) -> Tensor:
    """A cotangent B H G L E, copied if it cannot be read."""
    if path == "pointers" or _unreadable(t) is None:
        return t
    E = t.shape[-1]
    room = triton.cdiv(E, BYTES // t.element_size()) * (BYTES // t.element_size())
    return torch.empty(*t.shape[:-1], room, dtype=t.dtype, device=t.device)[..., :E].copy_(t)


def described(path: str, rows: int, *tensors: Tensor | None) -> tuple[Tensor | TensorDescriptor | None, ...]:
    """The tensors B H G L E, or descriptors of them for tiles of so many rows."""
    return tensors if path == "pointers" else tuple(None if t is None else _descriptor(t, rows) for t in tensors)


def _descriptor(t: Tensor, rows: int) -> TensorDescriptor:
    BE = max(triton.next_power_of_2(t.shape[-1]), 16)
    steps = [step if size > 1 else BYTES for size, step in zip(t.shape[:-1], t.stride())]  # over one element any would do
    return TensorDescriptor(t, list(t.shape), [*steps, 1], [1, 1, 1, rows, BE])


def type_of(t: str, rows: int, E: int) -> str:
    """How Triton names a descriptor's type."""
    return f"tensordesc<{t}[1, 1, 1, {rows}, {E}]>"
