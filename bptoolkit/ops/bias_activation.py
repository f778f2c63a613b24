"""A bias and an activation in one node: y = f(x + b), which keeps x and b, or y alone.

Maths     u = x + b        y = f(u)        dx = dy f'(u)        db = Σₘ dxₘ        for f and f' see activation.py
Letters   x, y (*B, N), m runs over all of *B; b (N); dt is the gradient of the loss by t
Numerics  half tensors: u, f and f' in float32, y and dx rounded once, db the sum of dx before it is rounded; relu keeps y,
          "identity" keeps nothing, the others x and b; a relu that is off blocks any cotangent, infinite ones too
Source    Hendrycks & Gimpel, arXiv 1606.08415 (gelu, silu); Shoeybi et al., "Megatron-LM", arXiv 1909.08053, §3 (the fusion)
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor
from torch.nn import functional as F

from bptoolkit.blocks import by_elements, by_rows
from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.op import LOW, Op
from bptoolkit.ops.activation import gelu_slope, gelu_tanh_slope, silu_slope
from bptoolkit.ops.linear import rows
from bptoolkit.precision import wide
from bptoolkit.shapes import check_floating

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda u: F.gelu(u, approximate="tanh"),
    "identity": lambda u: u,
}
SLOPES: dict[str, Callable[[Tensor], Tensor]] = {"silu": silu_slope, "gelu": gelu_slope, "gelu_tanh": gelu_tanh_slope}


def chain(dy, u, activation):
    """Du from dy at u, in their dtype."""
    if activation == "identity":
        return dy
    if activation == "relu":
        return torch.where(u <= 0, 0.0, dy)
    return dy * SLOPES[activation](u)


def forward(x, b, activation):
    return by_rows(lambda x: FUNCTIONS[activation](wide(x) + wide(b)).to(x.dtype), rows(x)).reshape(x.shape)


def backward(dy, x, b, activation, need):
    dx = by_rows(lambda x, dy: chain(wide(dy), wide(x) + wide(b), activation), rows(x), rows(dy))  # M N
    return dx.reshape(x.shape).to(x.dtype) if need.x else None, dx.sum(0).to(b.dtype) if need.b else None


def relu_forward(x, b):
    return torch.relu(x + b)


def relu_backward(dy, y, need):
    dx = by_elements(lambda y, dy: chain(dy, y, "relu"), y, dy)
    return dx if need.x else None, rows(dx).sum(0) if need.b else None


def identity_forward(x, b):
    return x + b


def identity_backward(dy, need):
    return dy if need.x else None, rows(dy).sum(0) if need.b else None


def kernel():
    from bptoolkit.triton_kernels.bias_activation import KERNEL

    return KERNEL


def relu_kernel():
    from bptoolkit.triton_kernels.bias_activation import RELU

    return RELU


RULE = Rule("bias_activation", forward, backward, inputs="x b", outputs="y", kernel=kernel)
RELU_RULE = Rule("bias_relu", relu_forward, relu_backward, inputs="x b", outputs="y", kernel=relu_kernel)
IDENTITY_RULE = Rule("bias_identity", identity_forward, identity_backward, inputs="x b", outputs="y")


def bias_activation(input: Tensor, bias: Tensor, activation: str = "gelu", *, backend: str = "auto") -> Tensor:
    """y = f(x + b), the end of a layer whose products were computed without their bias.

    Args:
        input: (*B, N), floating point.
        bias: (N,), of the input's dtype.
        activation: "relu", "silu", "gelu", "gelu_tanh" or "identity".
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`. "identity" has no kernel: torch's sum is one pass.

    Returns:
        (*B, N), of the input's dtype.

    Raises:
        TypeError: the two are not tensors of one floating-point dtype.
        ValueError: shapes or devices disagree, the activation is not known, or the named backend cannot run the call.
    """
    input, bias = OP.cast(input, bias)
    check_floating("bias_activation", "bias", bias)
    OP.check(input, bias)
    check_activation("bias_activation", activation, FUNCTIONS)
    if activation == "relu":
        return RELU_RULE(input, bias, backend=OP.pick(RELU_RULE, backend, input, bias))
    if activation == "identity":
        return IDENTITY_RULE(input, bias, backend=OP.pick(IDENTITY_RULE, backend, input, bias))
    return RULE(input, bias, activation, backend=OP.pick(RULE, backend, input, bias, activation))


def check_activation(op: str, activation: str | None, known: Collection[str | None]) -> None:
    """Raise unless the activation is one of those that are known."""
    if activation not in tuple(known):
        raise ValueError(f"{op}: activation={activation!r} is not known; choose from {', '.join(map(repr, known))}")


def reference(input, bias, activation="gelu"):
    u = input + bias
    if activation == "gelu_tanh":
        return F.gelu(u, approximate="tanh")
    return u if activation == "identity" else getattr(F, activation)(u)


def case(draw: Draw) -> Case:
    N = draw.size()
    activation = draw.choice(("gelu", "silu", "relu", "gelu_tanh", "identity"))
    return Case((draw.tensor(*draw.batch(), N, scale=2.0), draw.tensor(N)), {"activation": activation})


def bench(draw: Draw) -> Case:
    return Case((draw.tensor(64, 128, 512), draw.tensor(512)), {})


OP = Op(
    name="bias_activation",
    call=bias_activation,
    reference=reference,
    rules=(RULE, RELU_RULE, IDENTITY_RULE),
    shapes="input: *B N, bias: N -> *B N",
    source="Shoeybi et al. 2019, §3",
    autocast=LOW,
    case=case,
    bench=bench,
)
OPS = (OP,)
