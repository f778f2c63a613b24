"""Elementwise activations: relu, gelu (both forms), silu, tanh, sigmoid.

Maths     relu     y = max(x, 0)               dx = dy [y > 0], so relu'(0) = 0
          tanh     y = tanh x                  dx = dy (1 − y²)
          sigmoid  y = σ(x) = 1 / (1 + e⁻ˣ)    dx = dy y (1 − y)
          silu     y = x σ(x)                  dx = dy σ(x) (1 + x (1 − σ(x)))
          gelu     y = x Φ(x)                  dx = dy (Φ(x) + x φ(x))
                   Φ(x) = ½ (1 + erf(x/√2)), φ(x) = Φ'(x) = e^(−x²/2) / √(2π)
          or, with approximate="tanh",
                   y = ½ x (1 + tanh u)         u = √(2/π) (x + 0.044715 x³)
                     = x s, s = σ(2u)           dx = dy s (1 + x (1 − s) 2u')
Letters   x, y of any shape (*B); dt is the gradient of the loss by t
Numerics  relu, tanh and sigmoid keep their output, silu and gelu their input; half tensors are computed in float32;
          relu lets NaN through, and blocks any cotangent where it is off, infinite ones too, as torch does
Source    Nair & Hinton 2010 (relu); Hendrycks & Gimpel, arXiv 1606.08415 (gelu, silu); LeCun et al. 1998 §4.4 (tanh, sigmoid)
"""

from __future__ import annotations

from math import pi, sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.blocks import by_elements
from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule, unwatched
from bptoolkit.ops.elementwise import BITS, case, in_place, unary
from bptoolkit.precision import wide

SQRT_HALF, PDF_0, ROOT_2_PI, CUBIC = sqrt(0.5), 1 / sqrt(2 * pi), sqrt(2 / pi), 0.044715


def relu_forward(x):
    return torch.relu(x)


def relu_backward(dy, y):
    if y.device.type == "cpu" and unwatched(dy, y):
        return keep_where_nonzero(dy, y)
    return torch.where(y <= 0, 0.0, dy)  # not dy * (y > 0): an infinite dy times 0 is NaN


def keep_where_nonzero(dy, y):
    """Dy where y is not ±0, else 0: dy's bits times 0 or 1. On the CPU `where` takes a branch per element, 4 × the time."""
    bits = BITS[y.element_size()]
    on = y.view(bits) * 2  # the shift drops the sign: 0 for both zeros
    return on.ne_(0).mul_(dy.view(bits)).view(y.dtype)


def chain(slope, dy, t):
    """dx = dy ∘ f'(t): slope is f' as a function of t, the input or output that is kept."""
    return by_elements(lambda t, dy: (wide(dy) * slope(wide(t))).to(dy.dtype), t, dy)


def tanh_forward(x):
    return torch.tanh(x)


def tanh_backward(dy, y):
    return chain(lambda y: 1 - y * y, dy, y)


def sigmoid_forward(x):
    return torch.sigmoid(x)


def sigmoid_backward(dy, y):
    return chain(lambda y: y * (1 - y), dy, y)


def silu_slope(x):
    s = x.sigmoid()
    return s * (1 + x * (1 - s))


def silu_forward(x):
    return F.silu(x)


def silu_backward(dy, x):
    return chain(silu_slope, dy, x)


def gelu_slope(x):
    cdf, pdf = 0.5 * (1 + torch.erf(x * SQRT_HALF)), PDF_0 * torch.exp(-0.5 * x * x)
    return cdf + x * pdf


def gelu_tanh_slope(x):
    x2 = x * x
    s = torch.sigmoid(2 * ROOT_2_PI * (x * (1 + CUBIC * x2)))
    return s * (1 + x * (1 - s) * (2 * ROOT_2_PI * (1 + 3 * CUBIC * x2)))


def gelu_forward(x, approximate):
    return F.gelu(x, approximate=approximate)


def gelu_backward(dy, x, approximate):
    return chain(gelu_tanh_slope if approximate == "tanh" else gelu_slope, dy, x)


def relu_kernel():
    from bptoolkit.triton_kernels.activation import RELU

    return RELU


def tanh_kernel():
    from bptoolkit.triton_kernels.activation import TANH

    return TANH


def sigmoid_kernel():
    from bptoolkit.triton_kernels.activation import SIGMOID

    return SIGMOID


def silu_kernel():
    from bptoolkit.triton_kernels.activation import SILU

    return SILU


def gelu_kernel():
    from bptoolkit.triton_kernels.activation import GELU

    return GELU


RELU_RULE = Rule("relu", relu_forward, relu_backward, inputs="x", outputs="y", kernel=relu_kernel)
TANH_RULE = Rule("tanh", tanh_forward, tanh_backward, inputs="x", outputs="y", kernel=tanh_kernel)
SIGMOID_RULE = Rule("sigmoid", sigmoid_forward, sigmoid_backward, inputs="x", outputs="y", kernel=sigmoid_kernel)
SILU_RULE = Rule("silu", silu_forward, silu_backward, inputs="x", outputs="y", kernel=silu_kernel)
GELU_RULE = Rule("gelu", gelu_forward, gelu_backward, inputs="x", outputs="y", kernel=gelu_kernel)


def relu(input: Tensor, inplace: bool = False, *, backend: str = "auto") -> Tensor:
    """y = max(x, 0), as `torch.nn.functional.relu`.

    Args:
        input: (*B), floating point.
        inplace: write the result over the input, and return the input.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B), of the input's dtype.

    Raises:
        TypeError: the input is not a tensor of floating point.
        ValueError: the named backend cannot run the call.
        RuntimeError: inplace=True and the input is a leaf that requires grad.
    """
    RELU_OP.check(input)
    backend = RELU_OP.pick(RELU_RULE, backend, input)
    if inplace:
        return in_place(RELU_OP, RELU_RULE, input, backend=backend, write=torch.relu_)
    return RELU_RULE(input, backend=backend)


def gelu(input: Tensor, approximate: str = "none", *, backend: str = "auto") -> Tensor:
    """y = x Φ(x), as `torch.nn.functional.gelu`.

    Args:
        input: (*B), floating point.
        approximate: "none", or "tanh" for the form with tanh in place of erf.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B), of the input's dtype.

    Raises:
        TypeError: the input is not a tensor of floating point.
        ValueError: `approximate` is neither, or the named backend cannot run the call.
    """
    GELU_OP.check(input)
    if approximate != "none" and approximate != "tanh":
        raise ValueError(f"gelu: approximate={approximate!r} is not known; choose 'none' or 'tanh'")
    return GELU_RULE(input, approximate, backend=GELU_OP.pick(GELU_RULE, backend, input, approximate))


def silu(input: Tensor, inplace: bool = False, *, backend: str = "auto") -> Tensor:
    """y = x σ(x), as `torch.nn.functional.silu`.

    Args:
        input: (*B), floating point.
        inplace: write the result over the input, and return the input.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B), of the input's dtype.

    Raises:
        TypeError: the input is not a tensor of floating point.
        ValueError: the named backend cannot run the call.
        RuntimeError: inplace=True and the input is a leaf that requires grad.
    """
    SILU_OP.check(input)
    backend = SILU_OP.pick(SILU_RULE, backend, input)
    if inplace:
        return in_place(SILU_OP, SILU_RULE, input, backend=backend)
    return SILU_RULE(input, backend=backend)


def tanh(input: Tensor, *, backend: str = "auto") -> Tensor:
    """y = tanh x, as `torch.nn.functional.tanh`; arguments and errors as `sigmoid`."""
    TANH_OP.check(input)
    return TANH_RULE(input, backend=TANH_OP.pick(TANH_RULE, backend, input))


def sigmoid(input: Tensor, *, backend: str = "auto") -> Tensor:
    """y = 1 / (1 + e⁻ˣ), as `torch.nn.functional.sigmoid`.

    Args:
        input: (*B), floating point.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B), of the input's dtype.

    Raises:
        TypeError: the input is not a tensor of floating point.
        ValueError: the named backend cannot run the call.
    """
    SIGMOID_OP.check(input)
    return SIGMOID_RULE(input, backend=SIGMOID_OP.pick(SIGMOID_RULE, backend, input))


class ReLU(nn.ReLU):
    """`torch.nn.ReLU` with the backward above; same arguments."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`

    def forward(self, input: Tensor) -> Tensor:
        return relu(input, self.inplace, backend=self.backend)


class GELU(nn.GELU):
    """`torch.nn.GELU` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return gelu(input, self.approximate, backend=self.backend)


class SiLU(nn.SiLU):
    """`torch.nn.SiLU` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return silu(input, self.inplace, backend=self.backend)


class Tanh(nn.Tanh):
    """`torch.nn.Tanh` with the backward above."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return tanh(input, backend=self.backend)


class Sigmoid(nn.Sigmoid):
    """`torch.nn.Sigmoid` with the backward above."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return sigmoid(input, backend=self.backend)


def gelu_case(draw: Draw) -> Case:
    return Case(case(draw).args, draw.choice(({}, {"approximate": "tanh"})))


RELU_OP = unary(relu, F.relu, RELU_RULE, ReLU, "Nair & Hinton 2010")
GELU_OP = unary(gelu, F.gelu, GELU_RULE, GELU, "Hendrycks & Gimpel 2016", case=gelu_case)
SILU_OP = unary(silu, F.silu, SILU_RULE, SiLU, "Hendrycks & Gimpel 2016; Elfwing et al. 2017")
TANH_OP = unary(tanh, torch.tanh, TANH_RULE, Tanh, "LeCun et al. 1998, §4.4")
SIGMOID_OP = unary(sigmoid, torch.sigmoid, SIGMOID_RULE, Sigmoid, "Rumelhart, Hinton & Williams 1986")
OPS = (RELU_OP, GELU_OP, SILU_OP, TANH_OP, SIGMOID_OP)
