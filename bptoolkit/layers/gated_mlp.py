"""The gated block of a transformer as a module, with the names of Llama's parameters.

Maths     y = W_d (f(W_g x) · W_u x), in one node: see `bptoolkit.functional.gated_mlp`
Letters   x, y (*B, D); W_g, W_u (H, D); W_d (D, H); f the activation
Source    Shazeer 2020, "GLU Variants Improve Transformer", eq. 6; Touvron et al. 2023, "LLaMA", §2.2
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bptoolkit.ops.bias_activation import check_activation
from bptoolkit.ops.gated_mlp import GATES, gated_mlp
from bptoolkit.ops.linear import Linear


class GatedMLP(nn.Module):
    """y = down_proj(activation(gate_proj(x)) · up_proj(x)), without biases; the layers hold the weights and are not called.

    Args:
        features: D.
        hidden: H; 8/3 D by default, rounded up: as many parameters as a plain block of 4 D.
        activation: "silu", "gelu", "gelu_tanh" or "relu".
        device, dtype: of the parameters.

    Shape:
        (*B, D) -> (*B, D).

    Raises:
        ValueError: the activation is not known.
    """

    backend: str = "auto"  # an instance may set its own

    def __init__(
        self, features: int, hidden: int | None = None, activation: str = "silu", *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        check_activation("GatedMLP", activation, GATES)
        H, where = -(-8 * features // 3) if hidden is None else hidden, {"device": device, "dtype": dtype}
        self.activation = activation
        self.gate_proj = Linear(features, H, bias=False, **where)
        self.up_proj = Linear(features, H, bias=False, **where)
        self.down_proj = Linear(H, features, bias=False, **where)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
        return gated_mlp(x, *weights, self.activation, backend=self.backend)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
