"""A launcher of kernels as an operator, `bptoolkit::<name>`: graphs keep it as one node and Dynamo never sees Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bptoolkit import kernels
from bptoolkit.triton_kernels.interpreter import launch

_LIBRARY = torch.library.Library("bptoolkit", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)  # no tensor is restrided behind the launcher's back


REGISTERED: dict[str, Any] = {}  # name -> operator


def operator(
    name: str, launcher: Callable[..., Any], fake: Callable[..., Any], *, flops: Callable[..., int] | None = None
) -> Any:
    """Register launcher as an operator on CUDA tensors, and on CPU tensors inside `interpret()`; return the operator.

    Args:
        name: the operator's name.
        launcher: annotated, as `torch.library.infer_schema` wants it; returns new tensors that share no memory.
        fake: the same parameters -> empty outputs of the right shapes and dtypes.
        flops: the arguments, shapes in place of tensors, and out_shape= -> multiplications and additions of its matrix products
            or convolutions, for `torch.utils.flop_counter`; without it there are none.
    """

    def on_gpu(*args: Any) -> Any:
        first = next(t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,)) if isinstance(t, Tensor))
        with torch._C._AutoDispatchBelowAutograd(), torch.cuda.device_of(first):
            return launcher(*args)

    def on_cpu(*args: Any) -> Any:
        if not kernels.INTERPRETING:
            raise RuntimeError(
                f"bptoolkit::{name}: a Triton kernel runs on CPU tensors only inside bptoolkit.triton_kernels.interpret(), "
                "its backward too"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return launch(launcher, *args)

    _LIBRARY.define(name + torch.library.infer_schema(launcher, mutates_args=()), tags=_TAGS)
    _LIBRARY.impl(name, on_gpu, "CUDA")
    _LIBRARY.impl(name, on_cpu, "CPU")
    torch.library.register_fake(f"bptoolkit::{name}", fake, lib=_LIBRARY)
    packet = getattr(torch.ops.bptoolkit, name)
    if flops is not None:
        from torch.utils.flop_counter import register_flop_formula

        register_flop_formula(packet)(flops)
    REGISTERED[name] = packet.default
    return packet.default
