"""Smooth activations: elu, selu, celu, softplus, mish, logsigmoid, softsign, tanhshrink.

Maths     elu         y = s x for x > 0, else s a (e^(cx) − 1)     dx = dy s for x > 0, else dy c s a e^(cx) = dy c (y + s a)
          elu has s = c = 1; selu c = 1 with fixed a, s; celu s = 1, c = 1/a
          softplus    y = log(1 + e^(βx)) / β                      dx = dy σ(βx); y = x and dx = dy where βx > threshold
          mish        y = x t, t = tanh(log(1 + e^x))              dx = dy (t + x (1 − t²) σ(x))
          logsigmoid  y = log σ(x) = −log(1 + e⁻ˣ)                 dx = dy (1 − σ(x)) = dy (1 − e^y)
          softsign    y = x / (1 + |x|)                            dx = dy / (1 + |x|)²
          tanhshrink  y = x − t, t = tanh x                        dx = dy t² + dt (1 − t²)
Letters   x, y of any shape (*B); a = alpha, β = beta; σ(x) = 1 / (1 + e⁻ˣ); dt is the gradient of the loss by t; tanhshrink's t
          is an output too, hidden by the public function
Numerics  elu, selu, celu and logsigmoid keep their output, tanhshrink t, the others their input. An output tells e^(cx) only to
          its own rounding: elu, selu and celu of half tensors keep the input, and so does elu with a < 0, whose y has no sign
          to go by. 1 − e^y is −expm1(y), right to the last digits at either end. Half tensors are computed in float32
          NaN goes through; its gradient is s dy in elu, selu and celu, else NaN
Source    Clevert et al., arXiv 1511.07289, eq. 16 (elu); Klambauer et al., arXiv 1706.02515, eq. 2 (selu); Barron, arXiv
          1704.07483 (celu); Dugas et al. 2000 (softplus); Misra, arXiv 1908.08681 (mish); Turian et al. 2009 (softsign)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.blocks import by_elements
from bptoolkit.function import Rule
from bptoolkit.op import FLOAT32_CUDA, Op
from bptoolkit.ops.activation import chain
from bptoolkit.ops.elementwise import case_with, check_numbers, either, holds, in_place, unary
from bptoolkit.precision import wide

_HALF = (torch.bfloat16, torch.float16)
SELU_ALPHA, SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946


# elu, selu, celu


def elu_forward(x, alpha, scale, input_scale):
    return torch.ops.aten.elu(x, alpha, scale, input_scale)


def elu_backward(dy, y, alpha, scale, input_scale):
    def slope(y):
        below = y + scale * alpha
        return either(holds(torch.le, y, 0), below if input_scale == 1 else below * input_scale, scale, over=True)

    return chain(slope, dy, y)


def elu_backward_x(dy, x, alpha, scale, input_scale):
    def slope(x):
        below = torch.exp(x.clamp(max=0) * input_scale)  # not e^(cx) for all x: where it is infinite, its gradient is 0 · ∞
        return either(holds(torch.le, x, 0), below * (scale * alpha * input_scale), scale, over=True)

    return chain(slope, dy, x)


ELU_RULE = Rule("elu", elu_forward, elu_backward, inputs="x", outputs="y")
ELU_X_RULE = Rule("elu_x", elu_forward, elu_backward_x, inputs="x", outputs="y")


def _elu(op: Op, x: Tensor, alpha: float, scale: float, input_scale: float, inplace: bool, backend: str) -> Tensor:
    from_output = alpha * input_scale >= 0 and x.dtype not in _HALF
    rule = ELU_RULE if from_output else ELU_X_RULE
    backend = op.pick(rule, backend, x, alpha, scale, input_scale)
    if inplace:
        write = torch.ops.aten.elu_ if from_output else None
        return in_place(op, rule, x, alpha, scale, input_scale, backend=backend, write=write)
    return rule(x, alpha, scale, input_scale, backend=backend)


def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False, *, backend: str = "auto") -> Tensor:
    """y = x where x > 0, else alpha (eˣ − 1), as `torch.nn.functional.elu`.

    Args:
        input: (*B), floating point.
        alpha: −y far below 0, any number. (torch's call in place has no gradient for negative ones; ours has.)
        inplace: write the result over the input, and return the input.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B), of the input's dtype.

    Raises:
        TypeError: the input is not a tensor of floating point, or an option is not a number.
        ValueError: the named backend cannot run the call.
        RuntimeError: inplace=True and the input is a leaf that requires grad.
    """
    ELU_OP.check(input)
    check_numbers("elu", alpha=alpha)
    return _elu(ELU_OP, input, alpha, 1.0, 1.0, inplace, backend)


def selu(input: Tensor, inplace: bool = False, *, backend: str = "auto") -> Tensor:
    """y = s x where x > 0, else s a (eˣ − 1), as `torch.nn.functional.selu`; arguments and errors as `elu`."""
    SELU_OP.check(input)
    return _elu(SELU_OP, input, SELU_ALPHA, SELU_SCALE, 1.0, inplace, backend)


def celu(input: Tensor, alpha: float = 1.0, inplace: bool = False, *, backend: str = "auto") -> Tensor:
    """y = x where x > 0, else alpha (e^(x/alpha) − 1), as `torch.nn.functional.celu`; arguments and errors as `elu`.

    Raises:
        ValueError: alpha is 0, too.
    """
    CELU_OP.check(input)
    check_numbers("celu", alpha=alpha)
    if alpha == 0:
        raise ValueError("celu: alpha=0 is not possible: x is divided by it")
    return _elu(CELU_OP, input, alpha, 1.0, 1.0 / alpha, inplace, backend)


# softplus, mish, logsigmoid, softsign, tanhshrink


def softplus_forward(x, beta, threshold):
    return F.softplus(x, beta, threshold)


def softplus_backward(dy, x, beta, threshold):
    def slope(x):
        z = x if beta == 1 else x * beta
        straight, s = holds(torch.gt, z, threshold), torch.sigmoid(z)
        return torch.where(straight, 1.0, s) if straight.dtype is torch.bool else torch.maximum(straight, s)  # s ≤ 1

    return chain(slope, dy, x)


def mish_forward(x):
    return F.mish(x)


def mish_slope(x):
    t = torch.tanh(F.softplus(x))
    return t + x * (1 - t * t) * torch.sigmoid(x)


def mish_backward(dy, x):
    return chain(mish_slope, dy, x)


def logsigmoid_forward(x):
    return F.logsigmoid(x)


def logsigmoid_backward(dy, y):
    return chain(lambda y: -torch.expm1(y), dy, y)


def softsign_forward(x):
    return by_elements(lambda x: (wide(x) / (1 + wide(x).abs())).to(x.dtype), x)


def softsign_backward(dy, x):
    return chain(lambda x: 1 / (1 + x.abs()).square(), dy, x)


def tanhshrink_forward(x):
    t = torch.tanh(wide(x))
    return (wide(x) - t).to(x.dtype), t.to(x.dtype)


def tanhshrink_backward(dy, dt, t):
    dx = None if dy is None else chain(lambda t: t * t, dy, t)
    if dt is None:
        return dx
    dx_t = chain(lambda t: 1 - t * t, dt, t)
    return dx_t if dx is None else dx + dx_t


SOFTPLUS_RULE = Rule("softplus", softplus_forward, softplus_backward, inputs="x", outputs="y")
MISH_RULE = Rule("mish", mish_forward, mish_backward, inputs="x", outputs="y")
LOGSIGMOID_RULE = Rule("logsigmoid", logsigmoid_forward, logsigmoid_backward, inputs="x", outputs="y")
SOFTSIGN_RULE = Rule("softsign", softsign_forward, softsign_backward, inputs="x", outputs="y")
TANHSHRINK_RULE = Rule("tanhshrink", tanhshrink_forward, tanhshrink_backward, inputs="x", outputs="y t")


def softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0, *, backend: str = "auto") -> Tensor:
    """y = log(1 + e^(beta x)) / beta, as `torch.nn.functional.softplus`.

    Args:
        input: (*B), floating point.
        beta: how sharp the bend is.
        threshold: y = x where beta x is above it.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B), of the input's dtype; float32 under CUDA's autocast.

    Raises:
        TypeError: the input is not a tensor of floating point, or an option is not a number.
        ValueError: the named backend cannot run the call.
    """
    (input,) = SOFTPLUS.cast(input)
    SOFTPLUS.check(input)
    check_numbers("softplus", beta=beta, threshold=threshold)
    return SOFTPLUS_RULE(input, beta, threshold, backend=SOFTPLUS.pick(SOFTPLUS_RULE, backend, input, beta, threshold))


def mish(input: Tensor, inplace: bool = False, *, backend: str = "auto") -> Tensor:
    """y = x tanh(log(1 + eˣ)), as `torch.nn.functional.mish`.

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
    MISH.check(input)
    backend = MISH.pick(MISH_RULE, backend, input)
    if inplace:
        return in_place(MISH, MISH_RULE, input, backend=backend)
    return MISH_RULE(input, backend=backend)


def logsigmoid(input: Tensor, *, backend: str = "auto") -> Tensor:
    """y = log σ(x), as `torch.nn.functional.logsigmoid`.

    Args:
        input: (*B), floating point.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B), of the input's dtype.

    Raises:
        TypeError: the input is not a tensor of floating point.
        ValueError: the named backend cannot run the call.
    """
    LOGSIGMOID.check(input)
    return LOGSIGMOID_RULE(input, backend=LOGSIGMOID.pick(LOGSIGMOID_RULE, backend, input))


def softsign(input: Tensor, *, backend: str = "auto") -> Tensor:
    """y = x / (1 + |x|), as `torch.nn.functional.softsign`; arguments and errors as `logsigmoid`."""
    SOFTSIGN.check(input)
    return SOFTSIGN_RULE(input, backend=SOFTSIGN.pick(SOFTSIGN_RULE, backend, input))


def tanhshrink(input: Tensor, *, backend: str = "auto") -> Tensor:
    """y = x − tanh x, as `torch.nn.functional.tanhshrink`; arguments and errors as `logsigmoid`."""
    TANHSHRINK.check(input)
    return TANHSHRINK_RULE(input, backend=TANHSHRINK.pick(TANHSHRINK_RULE, backend, input))[0]


# modules


class ELU(nn.ELU):
    """`torch.nn.ELU` with the backward above; same arguments."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`

    def forward(self, input: Tensor) -> Tensor:
        return elu(input, self.alpha, self.inplace, backend=self.backend)


class SELU(nn.SELU):
    """`torch.nn.SELU` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return selu(input, self.inplace, backend=self.backend)


class CELU(nn.CELU):
    """`torch.nn.CELU` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return celu(input, self.alpha, self.inplace, backend=self.backend)


class Softplus(nn.Softplus):
    """`torch.nn.Softplus` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return softplus(input, self.beta, self.threshold, backend=self.backend)


class Mish(nn.Mish):
    """`torch.nn.Mish` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return mish(input, self.inplace, backend=self.backend)


class LogSigmoid(nn.LogSigmoid):
    """`torch.nn.LogSigmoid` with the backward above."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return logsigmoid(input, backend=self.backend)


class Softsign(nn.Softsign):
    """`torch.nn.Softsign` with the backward above."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return softsign(input, backend=self.backend)


class Tanhshrink(nn.Tanhshrink):
    """`torch.nn.Tanhshrink` with the backward above."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return tanhshrink(input, backend=self.backend)


def celu_reference(input, alpha=1.0):
    """In plain torch: torch's own gradient has 1/alpha in float32 for float64 tensors too."""
    return torch.where(input <= 0, alpha * torch.expm1(wide(input).clamp(max=0) / alpha), input).to(input.dtype)


ELU_RULES = (ELU_RULE, ELU_X_RULE)
_ALPHAS: tuple[dict[str, Any], ...] = ({}, {"alpha": 0.4}, {"alpha": 2.5}, {"alpha": -0.7})
ELU_OP = unary(elu, F.elu, ELU_RULES, ELU, "Clevert et al. 2015, eq. 16", case=case_with(*_ALPHAS, {"alpha": 0.0}))
SELU_OP = unary(selu, F.selu, ELU_RULES, SELU, "Klambauer et al. 2017, eq. 2")
CELU_OP = unary(celu, celu_reference, ELU_RULES, CELU, "Barron 2017", peer=F.celu, case=case_with(*_ALPHAS, scale=1.5))
SOFTPLUS = unary(
    softplus,
    F.softplus,
    SOFTPLUS_RULE,
    Softplus,
    "Dugas et al. 2000",
    autocast=FLOAT32_CUDA,
    case=case_with({}, {"beta": 2.5}, {"beta": 0.7, "threshold": 1.0}, {"beta": -1.5}),
)
MISH = unary(mish, F.mish, MISH_RULE, Mish, "Misra 2019")
LOGSIGMOID = unary(logsigmoid, F.logsigmoid, LOGSIGMOID_RULE, LogSigmoid, "Rumelhart, Hinton & Williams 1986")
SOFTSIGN = unary(softsign, F.softsign, SOFTSIGN_RULE, Softsign, "Turian et al. 2009")
TANHSHRINK = unary(tanhshrink, F.tanhshrink, TANHSHRINK_RULE, Tanhshrink, "LeCun et al. 1998, §4.4")
OPS = (ELU_OP, SELU_OP, CELU_OP, SOFTPLUS, MISH, LOGSIGMOID, SOFTSIGN, TANHSHRINK)
