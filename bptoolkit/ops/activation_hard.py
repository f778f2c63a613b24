"""Activations made of straight pieces: hardtanh, relu6, hardshrink, softshrink, hardsigmoid, and hardswish, with a bent one.

Maths     hardtanh     y = min(max(x, a), b)                  dx = dy [a < x < b]; relu6 has a = 0, b = 6
          hardshrink   y = x [|x| > λ]                        dx = dy [|x| > λ]
          softshrink   y = (x − λ sign x) [|x| > λ]           dx = dy [|x| > λ]
          hardsigmoid  y = min(max(x + 3, 0), 6) / 6          dx = dy/6 [−3 < x < 3]
          hardswish    y = x min(max(x + 3, 0), 6) / 6        dx = dy (x/3 + ½) [−3 < x < 3] + dy [x ≥ 3]
Letters   x, y of any shape (*B); [ ] is 1 where the condition holds, else 0; dt is the gradient of the loss by t
Numerics  the output is kept where it tells the piece, else the input (`_x` rules): hardshrink with λ < 0, hardswish. hardtanh
          of half tensors keeps the input, as a compiler may compare an output that was rounded with a bound that was not.
          NaN goes through; its gradient is dy, but 0 in hardsigmoid (in torch the vectorized and the plain loop differ in it
          for hardtanh, relu6 and the shrinks: 0 and dy; CUDA has dy). A cotangent is blocked where a piece is flat, infinite
          ones too. The largest number below 3 has hardsigmoid 1 and counts as 3
Source    Collobert 2004 (hardtanh); Krizhevsky 2010 (relu6); Donoho & Johnstone 1994, eq. 8, 9 (hardshrink, softshrink);
          Courbariaux et al., arXiv 1511.00363, eq. 3 (hardsigmoid); Howard et al., arXiv 1905.02244 §5.2 (hardswish)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.blocks import by_elements
from bptoolkit.function import Rule
from bptoolkit.op import Op
from bptoolkit.ops.elementwise import case_with, check_numbers, either, holds, in_place, unary
from bptoolkit.precision import HALF, wide

# hardtanh, relu6


def hardtanh_forward(x, low, high):
    return F.hardtanh(x, low, high)


def hardtanh_backward(dy, y, low, high):
    def rule(y, dy):
        y = wide(y)
        outside = holds(torch.le, y, low, dy) + holds(torch.ge, y, high, dy)
        return either(outside, 0.0, wide(dy)).to(dy.dtype)

    return by_elements(rule, y, dy)


def hardtanh_backward_x(dy, x, low, high):
    return hardtanh_backward(dy, x, low, high)


HARDTANH_RULE = Rule("hardtanh", hardtanh_forward, hardtanh_backward, inputs="x", outputs="y")
HARDTANH_X_RULE = Rule("hardtanh_x", hardtanh_forward, hardtanh_backward_x, inputs="x", outputs="y")


def hardtanh(
    input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False, *, backend: str = "auto"
) -> Tensor:
    """y = min(max(x, min_val), max_val), as `torch.nn.functional.hardtanh`.

    Args:
        input: (*B), floating point.
        min_val: the least result.
        max_val: the largest result.
        inplace: write the result over the input, and return the input.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B), of the input's dtype.

    Raises:
        TypeError: the input is not a tensor of floating point, or an option is not a number.
        ValueError: min_val is above max_val, or the named backend cannot run the call.
        RuntimeError: inplace=True and the input is a leaf that requires grad.
    """
    HARDTANH.check(input)
    check_numbers("hardtanh", min_val=min_val, max_val=max_val)
    if min_val > max_val:
        raise ValueError(f"hardtanh: min_val={min_val} cannot be greater than max_val={max_val}")
    return _clamped(HARDTANH, input, min_val, max_val, inplace, backend)


def relu6(input: Tensor, inplace: bool = False, *, backend: str = "auto") -> Tensor:
    """y = min(max(x, 0), 6), as `torch.nn.functional.relu6`; arguments and errors as `hardtanh`."""
    RELU6.check(input)
    return _clamped(RELU6, input, 0.0, 6.0, inplace, backend)


def _clamped(op: Op, x: Tensor, low: float, high: float, inplace: bool, backend: str) -> Tensor:
    from_output = op is RELU6 or x.dtype not in HALF
    rule = HARDTANH_RULE if from_output else HARDTANH_X_RULE
    backend = op.pick(rule, backend, x, low, high)
    if inplace:
        return in_place(op, rule, x, low, high, backend=backend, write=torch._C._nn.hardtanh_ if from_output else None)
    return rule(x, low, high, backend=backend)


# hardshrink, softshrink


def hardshrink_forward(x, lambd):
    return F.hardshrink(x, lambd)


def softshrink_forward(x, lambd):
    return F.softshrink(x, lambd)


def shrink_backward(dy, y):
    return by_elements(lambda y, dy: either(holds(torch.eq, y, 0, dy), 0.0, dy), y, dy)


def hardshrink_backward_x(dy, x, lambd):
    return torch.where(x.abs() <= lambd, 0.0, dy)


HARDSHRINK_RULE = Rule("hardshrink", hardshrink_forward, shrink_backward, inputs="x", outputs="y")
HARDSHRINK_X_RULE = Rule("hardshrink_x", hardshrink_forward, hardshrink_backward_x, inputs="x", outputs="y")
SOFTSHRINK_RULE = Rule("softshrink", softshrink_forward, shrink_backward, inputs="x", outputs="y")


def hardshrink(input: Tensor, lambd: float = 0.5, *, backend: str = "auto") -> Tensor:
    """y = x where |x| > lambd, else 0, as `torch.nn.functional.hardshrink`.

    Args:
        input: (*B), floating point.
        lambd: the threshold; everything passes a negative one.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B), of the input's dtype.

    Raises:
        TypeError: the input is not a tensor of floating point, or `lambd` is not a number.
        ValueError: the named backend cannot run the call.
    """
    HARDSHRINK.check(input)
    check_numbers("hardshrink", lambd=lambd)
    rule = HARDSHRINK_RULE if lambd >= 0 else HARDSHRINK_X_RULE
    return rule(input, lambd, backend=HARDSHRINK.pick(rule, backend, input, lambd))


def softshrink(input: Tensor, lambd: float = 0.5, *, backend: str = "auto") -> Tensor:
    """y = x − lambd · sign x where |x| > lambd, else 0, as `torch.nn.functional.softshrink`.

    Args:
        input: (*B), floating point.
        lambd: by how much, 0 or more.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B), of the input's dtype.

    Raises:
        TypeError: the input is not a tensor of floating point, or `lambd` is not a number.
        ValueError: `lambd` is negative, or the named backend cannot run the call.
    """
    SOFTSHRINK.check(input)
    check_numbers("softshrink", lambd=lambd)
    if not lambd >= 0:
        raise ValueError(f"softshrink: lambd={lambd} must be 0 or more")
    return SOFTSHRINK_RULE(input, lambd, backend=SOFTSHRINK.pick(SOFTSHRINK_RULE, backend, input, lambd))


# hardsigmoid, hardswish


def hardsigmoid_forward(x):
    return F.hardsigmoid(x)


def hardsigmoid_backward(dy, y):
    return by_elements(lambda y, dy: either(holds(torch.gt, y, 0, dy) * holds(torch.lt, y, 1, dy), dy / 6, 0.0), y, dy)


def hardswish_forward(x):
    return F.hardswish(x)


def hardswish_backward(dy, x):
    def rule(x, dy):
        x, dy = wide(x), wide(dy)
        left = holds(torch.le, x, -3, dy)
        if left.dtype is torch.bool:
            bend = either(left, 0.0, dy * (x / 3 + 0.5))
        else:  # in place
            bend = either(left, 0.0, (x / 3).add_(0.5).mul_(dy))
        return either(holds(torch.lt, x, 3, dy), bend, dy, over=True)

    return by_elements(lambda x, dy: rule(x, dy).to(dy.dtype), x, dy)


HARDSIGMOID_RULE = Rule("hardsigmoid", hardsigmoid_forward, hardsigmoid_backward, inputs="x", outputs="y")
HARDSWISH_RULE = Rule("hardswish", hardswish_forward, hardswish_backward, inputs="x", outputs="y")


def hardsigmoid(input: Tensor, inplace: bool = False, *, backend: str = "auto") -> Tensor:
    """y = min(max(x + 3, 0), 6) / 6, as `torch.nn.functional.hardsigmoid`; arguments and errors as `hardswish`."""
    HARDSIGMOID.check(input)
    backend = HARDSIGMOID.pick(HARDSIGMOID_RULE, backend, input)
    if inplace:
        return in_place(HARDSIGMOID, HARDSIGMOID_RULE, input, backend=backend, write=torch._C._nn.hardsigmoid_)
    return HARDSIGMOID_RULE(input, backend=backend)


def hardswish(input: Tensor, inplace: bool = False, *, backend: str = "auto") -> Tensor:
    """y = x min(max(x + 3, 0), 6) / 6, as `torch.nn.functional.hardswish`.

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
    HARDSWISH.check(input)
    backend = HARDSWISH.pick(HARDSWISH_RULE, backend, input)
    if inplace:
        return in_place(HARDSWISH, HARDSWISH_RULE, input, backend=backend)
    return HARDSWISH_RULE(input, backend=backend)


# modules


class Hardtanh(nn.Hardtanh):
    """`torch.nn.Hardtanh` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return hardtanh(input, self.min_val, self.max_val, self.inplace, backend=self.backend)


class ReLU6(nn.ReLU6):
    """`torch.nn.ReLU6` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return relu6(input, self.inplace, backend=self.backend)


class Hardshrink(nn.Hardshrink):
    """`torch.nn.Hardshrink` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return hardshrink(input, self.lambd, backend=self.backend)


class Softshrink(nn.Softshrink):
    """`torch.nn.Softshrink` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return softshrink(input, self.lambd, backend=self.backend)


class Hardsigmoid(nn.Hardsigmoid):
    """`torch.nn.Hardsigmoid` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return hardsigmoid(input, self.inplace, backend=self.backend)


class Hardswish(nn.Hardswish):
    """`torch.nn.Hardswish` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return hardswish(input, self.inplace, backend=self.backend)


def hardsigmoid_reference(input):
    """In plain torch: torch's own has no second derivative."""
    return torch.where(input <= -3, 0.0, torch.where(input >= 3, 1.0, wide(input) / 6 + 0.5)).to(input.dtype)


HARDTANH = unary(
    hardtanh,
    F.hardtanh,
    (HARDTANH_RULE, HARDTANH_X_RULE),
    Hardtanh,
    "Collobert 2004",
    case=case_with({}, {"min_val": -0.3, "max_val": 2.1}, {"min_val": 0.5, "max_val": 0.5}),
)
RELU6 = unary(relu6, F.relu6, HARDTANH_RULE, ReLU6, "Krizhevsky 2010", case=case_with({}, scale=5.0))
HARDSHRINK = unary(
    hardshrink,
    F.hardshrink,
    (HARDSHRINK_RULE, HARDSHRINK_X_RULE),
    Hardshrink,
    "Donoho & Johnstone 1994, eq. 8",
    case=case_with({}, {"lambd": 1.3}, {"lambd": 0.0}, {"lambd": -1.0}),
)
SOFTSHRINK = unary(
    softshrink,
    F.softshrink,
    SOFTSHRINK_RULE,
    Softshrink,
    "Donoho & Johnstone 1994, eq. 9",
    case=case_with({}, {"lambd": 1.3}, {"lambd": 0.0}),
)
HARDSIGMOID = unary(
    hardsigmoid,
    hardsigmoid_reference,
    HARDSIGMOID_RULE,
    Hardsigmoid,
    "Courbariaux et al. 2015",
    peer=F.hardsigmoid,
    case=case_with({}, scale=3.0),
)
HARDSWISH = unary(hardswish, F.hardswish, HARDSWISH_RULE, Hardswish, "Howard et al. 2019", case=case_with({}, scale=3.0))
OPS = (HARDTANH, RELU6, HARDSHRINK, SOFTSHRINK, HARDSIGMOID, HARDSWISH)
