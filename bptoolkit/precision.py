"""The precision that rules compute in."""

from __future__ import annotations

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def wide(t: Tensor) -> Tensor:
    """t in float32 if it is bfloat16 or float16, else t itself: rules of several steps round once, at their end."""
    return t.float() if t.dtype in HALF else t
