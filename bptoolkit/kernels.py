"""Where the fused kernels can run, and what they cannot take."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

INSTALLED = importlib.util.find_spec("triton") is not None  # found, not imported
INTERPRETING = False  # set by bptoolkit.triton_kernels.interpret() for its duration


def runs_on(device_type: str) -> bool:
    """Whether kernels run on a device of this type: on GPUs, and on the CPU inside `triton_kernels.interpret()`."""
    return device_type == "cuda" or (INTERPRETING and device_type == "cpu")


def unsupported(rule: Any, *args: Any) -> str | None:
    """Why the rule's kernel cannot take a call on these inputs and options, or None."""
    if not INSTALLED:
        return "Triton is not installed"
    for t in args:
        if isinstance(t, Tensor) and type(t) not in (Tensor, torch.nn.Parameter):
            return f"the fused kernel takes plain tensors, not {type(t).__name__}"
    return rule.kernel().unsupported(*args)
