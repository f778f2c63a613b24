"""Rectifiers: leaky_relu, prelu, rrelu, threshold, relu6, hardtanh, hardshrink, softshrink, hardsigmoid, hardswish.

Maths     leaky_relu   y = x [x > 0] + s x [x ≤ 0]            dx = dy [x > 0] + s dy [x ≤ 0]
          prelu        y = x [x > 0] + w x [x ≤ 0]            dx = dy [x > 0] + w dy [x ≤ 0]    dw = Σ dy x [x ≤ 0]
          rrelu        y = r x, r = 1 where x > 0, else       dx = r dy
                       drawn once from U(lower, upper)
          threshold    y = x [x > t] + v [x ≤ t]              dx = dy [x > t]
          hardtanh     y = min(max(x, a), b)                  dx = dy [a < x < b]; relu6 has a = 0, b = 6
          hardshrink   y = x [|x| > λ]                        dx = dy [|x| > λ]
          softshrink   y = (x − λ sign x) [|x| > λ]           dx = dy [|x| > λ]
          hardsigmoid  y = min(max(x + 3, 0), 6) / 6          dx = dy/6 [−3 < x < 3]
          hardswish    y = x min(max(x + 3, 0), 6) / 6        dx = dy (x/3 + ½) [−3 < x < 3] + dy [x ≥ 3]
Letters   x, y of any shape (*B); prelu's w is one number or one per channel (dimension 1), and Σ runs over all that share it;
          [ ] is 1 where the condition holds, else 0; dt is the gradient of the loss by t
Numerics  the output is kept where it tells the piece, else the input (`_x` rules): leaky_relu with s ≤ 0, threshold with v > t,
          hardshrink with λ < 0, hardswish, prelu; rrelu keeps r. hardtanh and threshold of half tensors keep the input, as a
          compiler may compare an output that was rounded with a bound that was not.
          NaN goes through; its gradient is dy, but s dy in leaky_relu, w dy in prelu, 0 in hardsigmoid (in torch the vectorized
          and the plain loop differ in it for hardtanh, relu6 and the shrinks: 0 and dy; CUDA has dy). A cotangent is blocked
          where a piece is flat, infinite ones too. The largest number below 3 has hardsigmoid 1 and counts as 3
Source    Maas et al. 2013 (leaky_relu); He et al., arXiv 1502.01852 (prelu); Xu et al., arXiv 1505.00853 (rrelu);
          Collobert 2004 (hardtanh); Krizhevsky 2010 (relu6); Donoho & Johnstone 1994, eq. 8, 9 (hardshrink, softshrink);
          Courbariaux et al., arXiv 1511.00363, eq. 3 (hardsigmoid); Howard et al., arXiv 1905.02244 §5.2 (hardswish)
"""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.blocks import by_elements, by_rows
from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule, unwatched
from bptoolkit.op import Op
from bptoolkit.ops.elementwise import case_with, check_numbers, either, holds, in_place, unary
from bptoolkit.precision import wide

_HALF = (torch.bfloat16, torch.float16)


# leaky_relu


def leaky_forward(x, slope):
    return F.leaky_relu(x, slope)


def leak(t, dy, slope):
    """Dy where t > 0, else slope · dy."""
    on = holds(torch.gt, t, 0, dy)
    if on.dtype not in (torch.bool, *_HALF) and 0 <= slope <= 1:
        return on.clamp_(min=slope).mul_(dy)
    return either(on, dy, slope * dy)


def leaky_backward(dy, y, slope):
    return by_elements(lambda y, dy: leak(y, dy, slope), y, dy)


def leaky_backward_x(dy, x, slope):
    return leaky_backward(dy, x, slope)


LEAKY_RULE = Rule("leaky_relu", leaky_forward, leaky_backward, inputs="x", outputs="y")
LEAKY_X_RULE = Rule("leaky_relu_x", leaky_forward, leaky_backward_x, inputs="x", outputs="y")


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False, *, backend: str = "auto") -> Tensor:
    """y = x where x > 0, else negative_slope · x, as `torch.nn.functional.leaky_relu`.

    Args:
        input: (*B), floating point.
        negative_slope: the slope for x ≤ 0, any number. (torch's call in place has no gradient for negative ones; ours has.)
        inplace: write the result over the input, and return the input.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B), of the input's dtype.

    Raises:
        TypeError: the input is not a tensor of floating point, or an option is not a number.
        ValueError: the named backend cannot run the call.
        RuntimeError: inplace=True and the input is a leaf that requires grad.
    """
    LEAKY_RELU.check(input)
    check_numbers("leaky_relu", negative_slope=negative_slope)
    return _leaky(LEAKY_RELU, input, negative_slope, inplace, backend)


def _leaky(op: Op, x: Tensor, slope: float, inplace: bool, backend: str) -> Tensor:
    from_output = slope > 0
    rule = LEAKY_RULE if from_output else LEAKY_X_RULE
    backend = op.pick(rule, backend, x, slope)
    if inplace:
        return in_place(op, rule, x, slope, backend=backend, write=torch._C._nn.leaky_relu_ if from_output else None)
    return rule(x, slope, backend=backend)


# prelu


def prelu_forward(x, w):
    return torch.prelu(x, w)


def prelu_backward(dy, x, w, need):
    one, dx, dw = w.numel() == 1, None, None
    if need.x:
        w_ = wide(w).reshape(() if one else (-1, *(1,) * (x.dim() - 2)))  # C 1…

        def rule(x, dy):
            return either(holds(torch.gt, x, 0, dy, w), dy, (wide(dy) * w_).to(dy.dtype))

        dx = by_elements(rule, x, dy) if one else by_rows(rule, x, dy)
    if need.w:
        rest = [d for d in range(x.dim()) if d != 1 or one]

        def off(x, dy):
            return either(holds(torch.gt, wide(x), 0, dy), 0.0, wide(x) * wide(dy))

        dw = (off(x, dy).sum(rest) if rest else off(x, dy)).reshape(w.shape).to(w.dtype)
    return dx, dw


PRELU_RULE = Rule("prelu", prelu_forward, prelu_backward, inputs="x w", outputs="y")


def prelu(input: Tensor, weight: Tensor, *, backend: str = "auto") -> Tensor:
    """y = x where x > 0, else weight · x, as `torch.nn.functional.prelu`.

    Args:
        input: (*B) or (B, C, *): floating point.
        weight: one number, of shape () or (1,), or one per channel, (C,), where an input of fewer than two dimensions has one.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        input's shape and dtype.

    Raises:
        TypeError: a tensor is not of floating point, or the dtypes differ.
        ValueError: weight has more than one dimension or not one element per channel, the devices differ, or the named backend
            cannot run the call.
    """
    input, weight = PRELU.cast(input, weight)
    PRELU.check(input, weight)
    if weight.dim() > 1:
        raise ValueError(f"prelu: weight has shape {tuple(weight.shape)}; it needs () or one dimension")
    channels = input.shape[1] if input.dim() > 1 else 1
    if weight.numel() != 1 and weight.numel() != channels:
        raise ValueError(
            f"prelu: weight has {weight.numel()} elements but input {tuple(input.shape)} has {channels} channels; "
            "weight needs one element, or one per channel"
        )
    return PRELU_RULE(input, weight, backend=PRELU.pick(PRELU_RULE, backend, input, weight))


# rrelu


def rrelu_forward(x, lower, upper):
    if unwatched(x) and not (x.is_cpu and x.dtype == torch.float16):  # torch's kernel, and so its draws
        r = torch.empty_like(x)
        return torch.ops.aten.rrelu_with_noise(x, r, lower, upper, True), r
    r = torch.where(x > 0, 1.0, lower + (upper - lower) * torch.rand_like(x))
    r = torch.where(x.isnan(), 1.0, r)
    return x * r, r


def rrelu_backward(dy, r):
    return dy * r


RRELU_RULE = Rule("rrelu", rrelu_forward, rrelu_backward, inputs="x", outputs="y r", constants="r")


def rrelu(
    input: Tensor,
    lower: float = 1.0 / 8,
    upper: float = 1.0 / 3,
    training: bool = False,
    inplace: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:
    """y = x where x > 0, else r x with r ~ U(lower, upper) per element, as `torch.nn.functional.rrelu`.

    From one seed the draws are torch's own, outside torch.compile and torch.func's transforms.

    Args:
        input: (*B), floating point.
        lower: the least slope.
        upper: the largest slope.
        training: draw the slopes; else all are (lower + upper) / 2.
        inplace: write the result over the input, and return the input.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B), of the input's dtype.

    Raises:
        TypeError: the input is not a tensor of floating point, or an option is not a number.
        ValueError: lower is above upper or either is not finite, or the named backend cannot run the call.
        RuntimeError: inplace=True and the input is a leaf that requires grad.
    """
    RRELU.check(input)
    check_numbers("rrelu", lower=lower, upper=upper)
    if not (isfinite(lower) and isfinite(upper) and lower <= upper):
        raise ValueError(f"rrelu: lower={lower} and upper={upper} must be finite, and lower not above upper")
    if not training:
        return _leaky(RRELU, input, (lower + upper) / 2, inplace, backend)
    backend = RRELU.pick(RRELU_RULE, backend, input, lower, upper)
    if inplace:
        return in_place(RRELU, RRELU_RULE, input, lower, upper, backend=backend)
    return RRELU_RULE(input, lower, upper, backend=backend)[0]


# threshold


def threshold_forward(x, threshold, value):
    return F.threshold(x, threshold, value)


def threshold_backward(dy, y, threshold):
    def rule(y, dy):  # in float32, as torch compares half tensors with the threshold
        return either(holds(torch.le, wide(y), threshold, dy), 0.0, wide(dy)).to(dy.dtype)

    return by_elements(rule, y, dy)


def threshold_backward_x(dy, x, threshold):
    return threshold_backward(dy, x, threshold)


THRESHOLD_RULE = Rule("threshold", threshold_forward, threshold_backward, inputs="x", outputs="y")
THRESHOLD_X_RULE = Rule("threshold_x", threshold_forward, threshold_backward_x, inputs="x", outputs="y")


def threshold(input: Tensor, threshold: float, value: float, inplace: bool = False, *, backend: str = "auto") -> Tensor:
    """y = x where x > threshold, else value, as `torch.nn.functional.threshold`.

    Args:
        input: (*B), floating point.
        threshold: up to and with which x is replaced.
        value: what it is replaced by.
        inplace: write the result over the input, and return the input.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B), of the input's dtype.

    Raises:
        TypeError: the input is not a tensor of floating point, or an option is not a number.
        ValueError: the named backend cannot run the call.
        RuntimeError: inplace=True and the input is a leaf that requires grad.
    """
    THRESHOLD.check(input)
    check_numbers("threshold", threshold=threshold, value=value)
    from_output = value <= threshold and input.dtype not in _HALF
    rule = THRESHOLD_RULE if from_output else THRESHOLD_X_RULE
    backend = THRESHOLD.pick(rule, backend, input, threshold, value)
    if inplace:
        write = torch.threshold_ if from_output else None
        return in_place(THRESHOLD, rule, input, threshold, value, backend=backend, write=write)
    return rule(input, threshold, value, backend=backend)


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
    from_output = op is RELU6 or x.dtype not in _HALF
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


class LeakyReLU(nn.LeakyReLU):
    """`torch.nn.LeakyReLU` with the backward above; same arguments."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`

    def forward(self, input: Tensor) -> Tensor:
        return leaky_relu(input, self.negative_slope, self.inplace, backend=self.backend)


class PReLU(nn.PReLU):
    """`torch.nn.PReLU` with the backward above; same parameters, state_dict and arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return prelu(input, self.weight, backend=self.backend)


class RReLU(nn.RReLU):
    """`torch.nn.RReLU` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return rrelu(input, self.lower, self.upper, self.training, self.inplace, backend=self.backend)


class Threshold(nn.Threshold):
    """`torch.nn.Threshold` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return threshold(input, self.threshold, self.value, self.inplace, backend=self.backend)


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


def prelu_case(draw: Draw) -> Case:
    C = draw.size()
    x = draw.tensor(*draw.batch(1), C, scale=2.0) if draw.flag() else draw.tensor(draw.size(), C, *draw.batch(), scale=2.0)
    return Case((x, draw.tensor(*draw.choice(((), (1,), (x.shape[1] if x.dim() > 1 else 1,))))), {})


def prelu_bench(draw: Draw) -> Case:
    return Case((draw.tensor(16, 64, 64, 64), draw.tensor(64)), {})


def prelu_bench_one(draw: Draw) -> Case:
    return Case((draw.tensor(64, 128, 512), draw.tensor(1)), {})


LEAKY_RELU = unary(
    leaky_relu,
    F.leaky_relu,
    (LEAKY_RULE, LEAKY_X_RULE),
    LeakyReLU,
    "Maas et al. 2013",
    case=case_with({}, *({"negative_slope": s} for s in (0.3, 1.5, 0.0, -0.5))),
)
PRELU = Op(
    name="prelu",
    call=prelu,
    reference=F.prelu,
    rules=(PRELU_RULE,),
    module=(PReLU,),
    replaces=(nn.PReLU,),
    shapes="input: *B, weight: *W -> *B",
    source="He et al. 2015",
    autocast={"cuda": "low"},
    case=prelu_case,
    bench={"per channel": prelu_bench, "one": prelu_bench_one},
)
# drawn slopes are no case: the reference would draw its own
RRELU = unary(
    rrelu,
    F.rrelu,
    (RRELU_RULE, LEAKY_RULE, LEAKY_X_RULE),
    RReLU,
    "Xu et al. 2015",
    case=case_with({}, {"lower": -0.2, "upper": 0.1}),
)
THRESHOLD = unary(
    threshold,
    F.threshold,
    (THRESHOLD_RULE, THRESHOLD_X_RULE),
    Threshold,
    "Nair & Hinton 2010",
    case=case_with({"threshold": 0.1, "value": -1.5}, {"threshold": 0.1, "value": 20.0}, {"threshold": -0.3, "value": -0.3}),
    bench=lambda draw: Case((draw.tensor(64, 128, 512), 0.1, 0.0), {}),
)
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
OPS = (LEAKY_RELU, PRELU, RRELU, THRESHOLD, HARDTANH, RELU6, HARDSHRINK, SOFTSHRINK, HARDSIGMOID, HARDSWISH)
