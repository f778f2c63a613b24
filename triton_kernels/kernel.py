"""What the kernels' modules share: the record of a rule's fused form, and the sizes of a launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

WARP = 64 if torch.version.hip else 32  # threads in a warp


class Kernel(NamedTuple):
    """The two rules of an op, fused, with the eager rules' parameters.

    Attributes:
        forward: as `Rule.forward`.
        backward: as `Rule.backward`.
        unsupported: the rule's inputs and options -> why the kernel cannot take the call, or None.
        again: as `backward`, but one that can be differentiated again, pushed forward and batched; or None: the eager rule's.
        push: as `Rule.push`, of `again`.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    unsupported: Callable[..., str | None]
    again: Callable[..., Any] | None = None
    push: Callable[..., Any] | None = None


class Paths:
    """The ways in which a kernel can be run, one of which may be asked for by name: for tests and benchmarks."""

    def __init__(self, names: tuple[str, ...], chosen: str | None = None) -> None:
        self.names, self.chosen = names, chosen

    @contextmanager
    def forced(self, name: str) -> Iterator[None]:
        """Inside, every call goes this way, or raises with the reason.

        Raises:
            ValueError: there is no such path.
        """
        if name not in self.names:
            raise ValueError(f"there is no path {name!r}; there are {', '.join(self.names)}")
        before, self.chosen = self.chosen, name
        try:
            yield
        finally:
            self.chosen = before


def computed_in_float32(x: Tensor) -> str | None:
    """Why a kernel that computes in float32 cannot take x, or None."""
    return "the fused kernel computes in float32, not float64" if x.dtype == torch.float64 else None


def dense(t: Tensor | None) -> Tensor | None:
    """A tensor that a kernel reads as one row of elements."""
    return None if t is None else t.contiguous()


def precision_of(dtype: torch.dtype, warp: int) -> str:
    """How products of float32 are made: by matrix instructions, on NVIDIA's parts out of three of tf32."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3" if warp == 32 else "ieee"


def upcasts(t: Tensor) -> bool:
    """Whether factors of a product become float32 first: the interpreter gets those of bfloat16 wrong."""
    return t.device.type == "cpu" and t.dtype == torch.bfloat16


@cache
def programs(device: torch.device, warps: int) -> int:
    """How many programs run at a time: 16 warps on each multiprocessor; 3 in the interpreter."""
    if device.type == "cpu":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count * max(1, 16 // warps)
