"""Convolution over two dimensions with its bias and activation: one node, which keeps one tensor of the output's size.

Maths     u = x ∗ w, the convolution of conv.py        z = u + b, one b a channel        y = f(z)
          dz = dy f'(z)        db[o] = Σ_n Σ_j dz[n,o,j]        dx, dw: those of conv.py, from dz
          relu: f'(z) = [y > 0], so y is kept, which the next layer keeps anyway, and z is not. The others keep u: z = u + b
Letters   those of conv.py; f is relu, silu, gelu or gelu with tanh, see activation.py; u is a residual output of the others,
          hidden by the public function, and du is what flows into it in higher order; dt is the gradient of the loss by t
Numerics  half inputs: u is rounded to half (the vendor's), z and f are computed in float32 and y is rounded once; relu blocks
          any cotangent where it is off, infinite ones too
Source    Dumoulin & Visin, arXiv 1603.07285, §4; fused as NVIDIA/apex's conv_bias_relu
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from bptoolkit.blocks import by_elements
from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.op import LOW, Op
from bptoolkit.ops import conv
from bptoolkit.ops.activation import relu_backward
from bptoolkit.ops.bias_activation import FUNCTIONS, chain, check_activation
from bptoolkit.precision import wide

ACTIVATIONS = ("relu", "silu", "gelu", "gelu_tanh")


def relu_forward(x, w, b, stride, padding, dilation, tail, groups):
    return conv.forward(x, w, b, stride, padding, dilation, tail, groups).relu()  # N O Y


def relu_backward_rule(dy, x, w, y, stride, padding, dilation, tail, groups, need):
    return conv.backward(relu_backward(dy, y), x, w, stride, padding, dilation, tail, groups, need)


def forward(x, w, b, stride, padding, dilation, tail, groups, activation):
    u = conv.forward(x, w, None, stride, padding, dilation, tail, groups)  # N O Y
    return FUNCTIONS[activation](biased(u, b)).to(u.dtype), u


def backward(dy, du, x, w, b, u, stride, padding, dilation, tail, groups, activation, need):
    dz = db = None
    if dy is not None:
        dz = by_elements(lambda z, dy: chain(wide(dy), wide(z), activation).to(dy.dtype), biased(u, b), dy)  # N O Y
        db = wide(dz).sum((0, 2, 3)).to(dy.dtype) if need.b else None  # O
    return *convolution_gradients(dz, du, x, w, stride, padding, dilation, tail, groups, need), db


def biased(u, b):
    return wide(u) if b is None else wide(u) + wide(b)[:, None, None]


def convolution_gradients(dz, du, x, w, stride, padding, dilation, tail, groups, need):
    """dx and dw: all that flows into u goes through the convolution."""
    if not (need.x or need.w):
        return None, None
    du = dz if du is None else du if dz is None else dz + du
    return conv.backward(du, x, w, stride, padding, dilation, tail, groups, conv.RULE.Need(need.x, need.w, False))[:2]


def kernel():
    from bptoolkit.triton_kernels.conv_activation import KERNEL

    return KERNEL


def relu_kernel():
    from bptoolkit.triton_kernels.conv_activation import RELU

    return RELU


RULE = Rule(
    "conv_activation",
    forward,
    backward,
    inputs="x w b",
    outputs="y u",
    uses={"x": "w b u", "w": "x w b u", "b": "b u"},
    kernel=kernel,
)
RELU_RULE = Rule(
    "conv_relu",
    relu_forward,
    relu_backward_rule,
    inputs="x w b",
    outputs="y",
    uses={"x": "w y", "w": "x w y", "b": "y"},
    kernel=relu_kernel,
)


def conv2d_activation(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    activation: str = "relu",
    *,
    backend: str = "auto",
) -> Tensor:
    """activation(conv2d(input, weight) + bias).

    Args:
        input, weight, bias, stride, padding, dilation, groups: as in `bptoolkit.functional.conv2d`.
        activation: "relu", "silu", "gelu" or "gelu_tanh".
        backend: "auto", "eager" or "triton", of the pass after the convolution, which is the vendor's; see `bptoolkit.choose`.

    Returns:
        (N, O, H', W') or (O, H', W'); channels_last as the input.

    Raises:
        ValueError: shapes, channels or options disagree, the kernel is larger than the padded input, the activation is not
            known, or the named backend cannot run the call.
        TypeError: the tensors are not of one floating-point dtype.
    """
    check_activation("conv2d_activation", activation, ACTIVATIONS)
    args = conv.arguments(OP, input, weight, bias, stride, padding, dilation, groups)
    if activation == "relu":
        y = RELU_RULE(*args, backend=OP.pick(RELU_RULE, backend, *args))
    else:
        args = (*args, activation)
        y = RULE(*args, backend=OP.pick(RULE, backend, *args))[0]
    return y if input.dim() == 4 else y.squeeze(0)


class ConvActivation2d(conv.Conv2d):
    """A convolution, its bias and an activation; parameters, state_dict and arguments as `torch.nn.Conv2d`, and `activation`.

    Args:
        activation: "relu", "silu", "gelu" or "gelu_tanh".
    """

    def __init__(self, *args: Any, activation: str = "relu", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_activation("ConvActivation2d", activation, ACTIVATIONS)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        return conv.module_forward(partial(conv2d_activation, activation=self.activation), self, input)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"


def reference(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, activation="relu"):
    z = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return FUNCTIONS[activation](z)


def case(draw: Draw) -> Case:
    call = conv.CONV2D.draw(draw)
    return Case(call.args, {"activation": draw.choice(ACTIVATIONS)})


def bench_relu(draw: Draw) -> Case:
    return conv.bench_3x3(draw)


def bench_gelu(draw: Draw) -> Case:
    return Case(conv.bench_3x3(draw).args, {"activation": "gelu"})


OP = Op(
    name="conv2d_activation",
    call=conv2d_activation,
    reference=reference,
    rules=(RELU_RULE, RULE),
    shapes="input: *N C H W, weight: O I kH kW, bias: O -> *N O H' W'",
    source="Dumoulin & Visin 2016, §4",
    autocast=LOW,
    case=case,
    bench={"3×3 relu": bench_relu, "3×3 gelu": bench_gelu},
)
OPS = (OP,)
