"""A layer of a self-normalizing network: its activations tend to mean 0 and variance 1 by themselves.

Maths     y = alpha_dropout(selu(x Wᵀ + b))        W ~ N(0, 1/N), b = 0
          For such weights (0, 1) is a fixed point of how selu moves mean and variance, and it attracts; alpha dropout sets
          units to selu's lowest value and scales so that both are kept.
Letters   x (*B, N), y (*B, O)
Source    Klambauer, Unterthiner, Mayr & Hochreiter 2017, "Self-Normalizing Neural Networks", §2
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bptoolkit.init import lecun_normal_
from bptoolkit.ops.activation_smooth import selu
from bptoolkit.ops.dropout import alpha_dropout
from bptoolkit.ops.linear import Linear


class SelfNormalizing(nn.Module):
    """alpha_dropout(selu(linear(x))), with LeCun's initialisation. Inputs should have mean 0 and variance 1.

    Args:
        in_features: N.
        out_features: O.
        dropout: the probability of alpha dropout; 0.05 or 0.1 in the paper.
        device, dtype: of the parameters.

    Shape:
        (*B, N) -> (*B, O).
    """

    def __init__(
        self, in_features: int, out_features: int, dropout: float = 0.0, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.linear, self.dropout = Linear(in_features, out_features, device=device, dtype=dtype), dropout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """LeCun's normal weights, biases 0."""
        lecun_normal_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return alpha_dropout(selu(self.linear(x)), self.dropout, self.training)

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"
