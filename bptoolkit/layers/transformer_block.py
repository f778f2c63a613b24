"""A transformer block that normalises before each of its two parts.

Maths     s = x + A(norm₁(x))        y = s + M(norm₂(s))
          A(h)    softmax(Q Kᵀ/√E) V per head, concatenated, times W_oᵀ, with (Q K V) = h W_qkvᵀ
          M(h)    φ(h W_upᵀ) W_downᵀ, or gated: (φ(g) u) W_downᵀ with (g u) = h W_upᵀ
          The sum s and the normalization after it are one node: `add_layer_norm`, `add_rms_norm`.
Letters   x, y (N, L, D); H heads of E = D/H elements; F the width of M
Source    Vaswani et al. 2017; norms first: Xiong et al. 2020, "On Layer Normalization in the Transformer Architecture"; gated
          units: Shazeer 2020; fewer heads of keys and values: Ainslie et al. 2023, "GQA"
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from bptoolkit.ops.activation import gelu, relu, silu
from bptoolkit.ops.add_norm import add_layer_norm, add_rms_norm
from bptoolkit.ops.attention import scaled_dot_product_attention
from bptoolkit.ops.dropout import dropout
from bptoolkit.ops.gated import geglu, reglu, swiglu
from bptoolkit.ops.layer_norm import LayerNorm
from bptoolkit.ops.linear import Linear
from bptoolkit.ops.rms_norm import RMSNorm

PLAIN: dict[str, Callable[[Tensor], Tensor]] = {"relu": relu, "gelu": gelu, "silu": silu}
GATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"reglu": reglu, "geglu": geglu, "swiglu": swiglu}


class PreNormTransformerBlock(nn.Module):
    """x + attention(norm(x)), then s + mlp(norm(s)).

    Args:
        features: D.
        heads: H, which divides D.
        hidden: F; 4 D by default, and 8/3 D, rounded up, where the mlp is gated: as many parameters.
        kv_heads: heads of keys and values, which divide H; H by default.
        norm: "layer_norm" or "rms_norm".
        activation: "relu", "gelu" or "silu"; or gated: "reglu", "geglu" or "swiglu".
        causal: position i sees 0 ... i only.
        dropout: the probability, in training, for attention weights and for what both parts add.
        bias: whether the linear layers have biases.
        eps: of the norms.
        device, dtype: of the parameters.

    Shape:
        x (N, L, D) -> (N, L, D); `attn_mask` as in `scaled_dot_product_attention`, broadcastable to (N, H, L, L).

    Raises:
        ValueError: the heads do not divide, norm or activation is not known, dropout is not in [0, 1], or the input has not
            the shape above.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        hidden: int | None = None,
        *,
        kv_heads: int | None = None,
        norm: str = "layer_norm",
        activation: str = "gelu",
        causal: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        eps: float = 1e-5,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        name, D, H, K = "PreNormTransformerBlock", features, heads, heads if kv_heads is None else kv_heads
        if H < 1 or K < 1 or D % H or H % K:
            raise ValueError(f"{name}: heads={H} must divide features={D}, and kv_heads={K} must divide heads")
        if norm not in ("layer_norm", "rms_norm"):
            raise ValueError(f"{name}: norm={norm!r} is not known; choose 'layer_norm' or 'rms_norm'")
        if activation not in PLAIN and activation not in GATED:
            raise ValueError(f"{name}: activation={activation!r} is not known; choose from {', '.join((*PLAIN, *GATED))}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"{name}: dropout={dropout} must be between 0 and 1")
        self.features, self.heads, self.kv_heads, self.causal, self.dropout = D, H, K, causal, dropout
        self.activation, gated = activation, activation in GATED
        F = hidden if hidden is not None else -(-8 * D // 3) if gated else 4 * D
        where = {"device": device, "dtype": dtype}
        self.norm1, self.norm2 = (
            LayerNorm(D, eps, **where) if norm == "layer_norm" else RMSNorm(D, eps, **where) for _ in range(2)
        )
        self.qkv = Linear(D, (H + 2 * K) * (D // H), bias, **where)
        self.out = Linear(D, D, bias, **where)
        self.up = Linear(D, 2 * F if gated else F, bias, **where)
        self.down = Linear(F, D, bias, **where)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        if x.dim() != 3 or x.shape[2] != self.features:
            shape = tuple(x.shape)
            raise ValueError(f"PreNormTransformerBlock: input has shape {shape}; it needs (N, L, {self.features})")
        h, s = self._add_norm(self._dropped(self._attention(self.norm1(x), attn_mask)), x)
        return s + self._dropped(self.down(self._activated(self.up(h))))

    def _attention(self, h: Tensor, mask: Tensor | None) -> Tensor:
        H, K = self.heads, self.kv_heads
        heads = self.qkv(h).unflatten(2, (H + 2 * K, self.features // H)).transpose(1, 2)  # N H+2K L E
        q, k, v = heads.split((H, K, K), 1)
        p = self.dropout if self.training else 0.0
        o = scaled_dot_product_attention(q, k, v, mask, p, self.causal, enable_gqa=H != K)  # N H L E
        return self.out(o.transpose(1, 2).flatten(2))

    def _add_norm(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        n: Any = self.norm2
        if isinstance(n, LayerNorm):
            return add_layer_norm(x, residual, n.normalized_shape, n.weight, n.bias, n.eps)
        return add_rms_norm(x, residual, n.normalized_shape, n.weight, n.eps)

    def _activated(self, u: Tensor) -> Tensor:
        return PLAIN[self.activation](u) if self.activation in PLAIN else GATED[self.activation](*u.chunk(2, -1))

    def _dropped(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, self.training) if self.dropout else x

    def extra_repr(self) -> str:
        return f"heads={self.heads}, kv_heads={self.kv_heads}, activation={self.activation!r}, causal={self.causal}"
