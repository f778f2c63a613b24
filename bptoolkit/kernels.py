"""Where the fused kernels can run."""

from __future__ import annotations

INTERPRETING = False  # set by bptoolkit.triton_kernels.interpret() for its duration


def runs_on(device_type: str) -> bool:
    """Whether kernels run on a device of this type: on GPUs, and on the CPU inside `triton_kernels.interpret()`."""
    return device_type == "cuda" or (INTERPRETING and device_type == "cpu")
