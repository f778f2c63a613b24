"""What Triton 3.6 is known to spill where 3.9 spills nothing, so that the gate reports all else. All of it costs a few
instructions; to be rid of it would take smaller tiles or more warps.

NVIDIA     bytes of stack: a few words, each written once before a loop and read once after it. None is touched in a loop
gfx942     scalar registers, kept in lanes of a vector register and not in memory. A loop of thousands of instructions reads ten
           of them at most; `attention columns` twenty, once a head of a group

tests/kernels/test_gate.py holds them to this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OF_3_6: Mapping[str, Mapping[Any, int]] = {  # kernel -> architecture -> how much
    "attention columns bf16 128 options": {"gfx942": 29},
    "attention columns bf16 256 everything": {"gfx942": 7},
    "attention forward fp32 128 causal": {80: 24, 90: 24, 100: 24},
    "attention rows bf16 128 options": {"gfx942": 19},
    "attention twice columns bf16 128 causal": {"gfx942": 1},
    "attention twice columns bf16 64 all": {"gfx942": 2},
    "attention twice do bf16 128 all": {90: 16, 100: 16, "gfx942": 24},
    "attention twice do bf16 64 all": {"gfx942": 12},
    "attention twice sums bf16 128 all": {"gfx942": 12},
    "attention twice sums bf16 128 packed": {80: 8},
    "attention twice sums bf16 64 all": {"gfx942": 2},
    "attention twice sums bf16 64 packed": {80: 8, 100: 8},
    "attention twice sums fp32 64 all": {100: 16},
    "attention twice v bf16 128 all": {"gfx942": 18},
    "causal_conv1d backward bf16 channels last K=4 D=1024": {"gfx942": 15},
    "causal_conv1d backward bf16 channels last K=8 D=1024": {"gfx942": 13},
    "causal_conv1d backward fp32 channels last K=4 D=1024": {"gfx942": 13},
    "causal_conv1d backward fp32 channels last K=8 D=1024": {"gfx942": 11},
    "conv dense forward 64→64 bf16": {80: 24},
    "conv dense forward 64→64 three dimensions bf16": {80: 48},
    "conv dense input 24→40 bf16": {80: 8, 100: 8},
    "conv dense input 64→64 bf16": {80: 24},
    "conv dense input 64→64 three dimensions bf16": {80: 40},
    "lstm resident backward bf16 32": {100: 8},
    "softmax bf16 16384x4096": {100: 8},
}


def known(kernel: str, arch: Any, version: str) -> int:
    """How much of a kernel may spill under a version of Triton."""
    return OF_3_6.get(kernel, {}).get(arch, 0) if version.startswith("3.6.") else 0
