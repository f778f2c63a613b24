"""A highway layer: a learnt gate between a layer's output and its input.

Maths     t = σ(x W_tᵀ + b_t)        h = φ(x W_hᵀ + b_h)        y = t h + (1 − t) x
Letters   x, y (*B, N); t the transform gate, 1 − t the carry gate; φ the activation
Source    Srivastava, Greff & Schmidhuber 2015, "Training Very Deep Networks", eq. 3; b_t < 0 at first, §2.3
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from bptoolkit.ops.activation import relu, sigmoid
from bptoolkit.ops.linear import Linear


class Highway(nn.Module):
    """y = t · activation(transform(x)) + (1 − t) · x with t = σ(gate(x)).

    Args:
        features: N.
        activation: a function of one tensor.
        carry: the first value of the gate's bias; below 0 the layer begins by letting x through.
        device, dtype: of the parameters.

    Shape:
        (*B, N) -> (*B, N).
    """

    def __init__(
        self,
        features: int,
        activation: Callable[[Tensor], Tensor] = relu,
        carry: float = -2.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.transform = Linear(features, features, device=device, dtype=dtype)
        self.gate = Linear(features, features, device=device, dtype=dtype)
        self.activation = activation
        nn.init.constant_(self.gate.bias, carry)

    def forward(self, x: Tensor) -> Tensor:
        return x.lerp(self.activation(self.transform(x)), sigmoid(self.gate(x)))
