"""Causal depthwise convolution over a sequence, with its activation, as in front of a state-space model's scan.

Maths     z[b,d,l] = c[d] + Σ_k w[d,k] x[b,d,l − K + 1 + k]     where x is 0 before its beginning        y = f(z)

          dz = dy f'(z), z computed again from x. Each x[b,d,m] meets w[d,k] in z[b,d,m + K − 1 − k]:
          dx[b,d,m] = Σ_k w[d,k] dz[b,d,m + K − 1 − k]            where dz is 0 past its end: the sum runs to the future
          dw[d,k]   = Σ_b Σ_l dz[b,d,l] x[b,d,l − K + 1 + k]      dc[d] = Σ_b Σ_l dz[b,d,l]
Letters   b runs over B samples, d over D channels, l and m over L positions, k over the K elements of the kernel, the last of
          which stands on the present; f is the identity or silu; dt is the gradient of the loss by t
Numerics  half inputs are computed in float32 and y is rounded once
Source    Gu & Dao, "Mamba", arXiv 2312.00752, §3.4; signature of causal_conv1d_fn (Dao-AILab/causal-conv1d)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule, unwatched
from bptoolkit.op import LOW, Op
from bptoolkit.ops.activation import silu_slope
from bptoolkit.ops.bias_activation import check_activation
from bptoolkit.precision import wide


def forward(x, w, c):
    return preactivation(x, w, c).to(x.dtype)


def backward(dy, x, w, need):
    return gradients(wide(dy), x, w, dy.dtype, need)


def silu_forward(x, w, c):
    return F.silu(preactivation(x, w, c)).to(x.dtype)


def silu_backward(dy, x, w, c, need):
    return gradients(wide(dy) * silu_slope(preactivation(x, w, c)), x, w, dy.dtype, need)


def preactivation(x, w, c):
    z = past(wide(x), wide(w))
    return z if c is None else z + wide(c)[:, None]


def gradients(dz, x, w, dtype, need):
    dx = future(dz, wide(w)).to(dtype) if need.x else None
    dw = products(dz, wide(x), w.shape[1]).to(dtype) if need.w else None
    dc = dz.sum((0, 2)).to(dtype) if need.c else None
    return dx, dw, dc


def past(x, w):
    """Σ_k w[d,k] x[b,d,l − K + 1 + k]."""
    K, L = w.shape[1], x.shape[2]
    if unwatched(x, w):  # the same where the terms are, not on padded copies
        z = x * w[:, K - 1 :]
        for s in range(1, min(K, L)):
            z[..., s:].addcmul_(x[..., : L - s], w[:, K - 1 - s, None])
        return z
    x = F.pad(x, (K - 1, 0))  # B D L+K−1
    return sum(x[..., k : k + L] * w[:, k, None] for k in range(K))  # B D L


def future(dz, w):
    """Σ_k w[d,k] dz[b,d,m + K − 1 − k]: the transpose of `past`."""
    K, L = w.shape[1], dz.shape[2]
    if unwatched(dz, w):
        dx = dz * w[:, K - 1 :]
        for s in range(1, min(K, L)):
            dx[..., : L - s].addcmul_(dz[..., s:], w[:, K - 1 - s, None])
        return dx
    dz = F.pad(dz, (0, K - 1))  # B D L+K−1
    return sum(dz[..., K - 1 - k : K - 1 - k + L] * w[:, k, None] for k in range(K))  # B D L


def products(dz, x, K):
    """Σ_b Σ_l dz[b,d,l] x[b,d,l − K + 1 + k]."""
    L = x.shape[2]
    x = F.pad(x, (K - 1, 0))  # B D L+K−1
    return torch.stack([(dz * x[..., k : k + L]).sum((0, 2)) for k in range(K)], 1)  # D K


def kernel():
    from bptoolkit.triton_kernels.causal_conv1d import KERNEL

    return KERNEL


def silu_kernel():
    from bptoolkit.triton_kernels.causal_conv1d import SILU

    return SILU


KEPT = {"x": "w", "w": "x w", "c": ""}
RULE = Rule("causal_conv1d", forward, backward, inputs="x w c", outputs="y", uses=KEPT, kernel=kernel)
SILU_RULE = Rule("causal_conv1d_silu", silu_forward, silu_backward, inputs="x w c", outputs="y", kernel=silu_kernel)
ACTIVATIONS = {None: RULE, "silu": SILU_RULE, "swish": SILU_RULE}


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    *,
    backend: str = "auto",
) -> Any:
    """Each channel convolved with a kernel of its own that sees the present and the past, then the activation.

    Args:
        x: (B, D, L), floating point; of any strides, (B, L, D) transposed among them.
        weight: (D, K), K ≥ 1; weight[:, K − 1] stands on the present.
        bias: (D,) or None.
        activation: None, or "silu", which is also called "swish".
        initial_states: (B, D, K − 1), what came before x; zeros if None.
        return_final_states: return the last K − 1 positions of x too, initial_states for the sequence that goes on.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        y (B, D, L), or y and the final states (B, D, K − 1).

    Raises:
        ValueError: shapes or devices disagree, the activation is not known, or the named backend cannot run the call.
        TypeError: the tensors are not of one floating-point dtype.
    """
    x, weight, bias, initial_states = OP.cast(x, weight, bias, initial_states)
    OP.check(x, weight, bias, initial_states)
    check_activation("causal_conv1d", activation, ACTIVATIONS)
    K = weight.shape[1]
    if K < 1:
        raise ValueError(f"causal_conv1d: weight has shape {tuple(weight.shape)}; a kernel needs at least one element")
    if initial_states is not None:
        if initial_states.shape[2] != K - 1:
            raise ValueError(
                f"causal_conv1d: initial_states has shape {tuple(initial_states.shape)} and weight {tuple(weight.shape)}; a "
                f"kernel of {K} elements sees {K - 1} positions before the present"
            )
        x = torch.cat((initial_states, x), 2)  # B D K−1+L
    rule = ACTIVATIONS[activation]
    y = rule(x, weight, bias, backend=OP.pick(rule, backend, x, weight, bias))
    if initial_states is not None:
        y = y[..., K - 1 :]  # B D L
    return (y, F.pad(x, (K - 1 - x.shape[2], 0))) if return_final_states else y


class CausalConv1d(nn.Conv1d):
    """A causal depthwise convolution and its activation; parameters and state_dict as
    `torch.nn.Conv1d(channels, channels, kernel_size, groups=channels, padding=kernel_size - 1)`, the `conv1d` of Mamba's block.

    Args:
        channels: D.
        kernel_size: K.
        bias: whether there is one.
        activation: None, "silu" or "swish".
        device, dtype: of the parameters.

    Shape:
        (B, D, L) -> (B, D, L), or with the final states (B, D, K − 1); see `causal_conv1d`.
    """

    backend: str = "auto"  # an instance may set its own

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        bias: bool = True,
        activation: str | None = None,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_activation("CausalConv1d", activation, ACTIVATIONS)
        options: dict[str, Any] = {"groups": channels, "padding": kernel_size - 1, "bias": bias}
        super().__init__(channels, channels, kernel_size, **options, device=device, dtype=dtype)
        self.activation = activation

    def forward(self, input: Tensor, initial_states: Tensor | None = None, return_final_states: bool = False) -> Any:
        options = (self.activation, initial_states, return_final_states)
        return causal_conv1d(input, self.weight.squeeze(1), self.bias, *options, backend=self.backend)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, kernel_size={self.kernel_size[0]}, bias={self.bias is not None}"
        return text if self.activation is None else f"{text}, activation={self.activation!r}"


def reference(x, weight, bias=None, activation=None, initial_states=None, return_final_states=False):
    """As Mamba's block calls torch: a padded convolution, cut to length."""
    (D, K), L = weight.shape, x.shape[2]
    before = 0 if initial_states is None else K - 1
    x = x if initial_states is None else torch.cat((initial_states, x), 2)
    z = F.conv1d(x, weight.unsqueeze(1), bias, padding=K - 1, groups=D)[..., before : before + L]
    y = z if activation is None else F.silu(z)
    return (y, F.pad(x, (K - 1 - x.shape[2], 0))) if return_final_states else y


def case(draw: Draw) -> Case:
    B, D, L, K = draw.size(most=5), draw.size(least=1, most=5), draw.size(least=1), draw.choice((1, 2, 3, 4))
    options = {"activation": draw.choice((None, "silu", "swish")), "return_final_states": draw.flag()}
    x, w, c = draw.tensor(B, D, L), draw.tensor(D, K, scale=K**-0.5), draw.tensor(D) if draw.flag() else None
    return Case((x, w, c), options | ({"initial_states": draw.tensor(B, D, K - 1)} if draw.flag() else {}))


def bench(draw: Draw) -> Case:
    return Case((draw.tensor(4, 512, 1024), draw.tensor(512, 4, scale=0.5), draw.tensor(512), "silu"), {})


def bench_channels_last(draw: Draw) -> Case:
    x = draw.tensor(4, 1024, 512).detach().mT.requires_grad_()
    return Case((x, draw.tensor(512, 4, scale=0.5), draw.tensor(512), "silu"), {})


OP = Op(
    name="causal_conv1d",
    call=causal_conv1d,
    reference=reference,
    rules=(RULE, SILU_RULE),
    shapes="x: B D L, weight: D K, bias: D, initial_states: B D S -> B D L",
    source="Gu & Dao 2023, §3.4",
    autocast=LOW,
    case=case,
    bench={"4 × 512 × 1024": bench, "channels last": bench_channels_last},
)
OPS = (OP,)
