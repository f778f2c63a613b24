"""Squeeze and excitation: each channel times a gate that sees the means of all channels.

Maths     z = mean(x) over positions        s = σ(W₂ relu(W₁ z + b₁) + b₂)        y = x s
Letters   x, y (N, C, *I); z and s (N, C); W₁ (C/r, C), W₂ (C, C/r)
Source    Hu, Shen & Sun 2018, "Squeeze-and-Excitation Networks", eqs. 2-4
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bptoolkit.ops.activation import relu, sigmoid
from bptoolkit.ops.linear import Linear


class SqueezeExcitation(nn.Module):
    """y = x · σ(excite(relu(squeeze(mean of x over positions)))).

    Args:
        channels: C.
        reduction: r; C/r, at least 1, are the units in between.
        device, dtype: of the parameters.

    Shape:
        (N, C, *I) -> (N, C, *I), with any number of dimensions of positions, none included.

    Raises:
        ValueError: the input has not C channels.
    """

    def __init__(self, channels: int, reduction: int = 16, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.squeeze = Linear(channels, hidden, device=device, dtype=dtype)
        self.excite = Linear(hidden, channels, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        C = self.squeeze.in_features
        if x.dim() < 2 or x.shape[1] != C:
            raise ValueError(f"SqueezeExcitation: input has shape {tuple(x.shape)}; it needs (N, {C}, *)")
        z = x.flatten(2).mean(2) if x.dim() > 2 else x  # N C
        s = sigmoid(self.excite(relu(self.squeeze(z))))  # N C
        return x * s.reshape(*s.shape, *(1,) * (x.dim() - 2))
