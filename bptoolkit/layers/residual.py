"""A residual connection.

Maths     y = s(x) + α f(x)
Letters   f the body, s the shortcut (the identity unless one is given), α a learnt number, or 1
Source    He et al. 2016, "Deep Residual Learning"; α = 0 at first: Bachlechner et al. 2021, "ReZero"
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """y = shortcut(x) + scale · body(x).

    Args:
        body: a module whose output has the shape of the shortcut's.
        shortcut: what x passes through where body changes its shape, such as a convolution of size 1; None is the identity.
        scale: the first value of a learnt number α; 0 is ReZero, 1 the multiplier of Fixup. None: no such number.

    Shape:
        x of any shape that the body takes -> the shape of the body's output; further arguments go to the body.

    Raises:
        ValueError: the two shapes differ (a sum that broadcasts would hide it).
    """

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None, scale: float | None = None) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut
        self.scale = None if scale is None else nn.Parameter(torch.tensor(float(scale)))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        f, s = self.body(x, *args, **kwargs), x if self.shortcut is None else self.shortcut(x)
        if f.shape != s.shape:
            raise ValueError(f"Residual: the body gives {tuple(f.shape)} but the shortcut {tuple(s.shape)}; they must be equal")
        return s + (f if self.scale is None else f * self.scale)
