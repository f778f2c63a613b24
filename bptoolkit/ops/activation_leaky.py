"""Rectifiers that change what is not positive: leaky_relu, prelu, rrelu, threshold.

Maths     leaky_relu   y = x [x > 0] + s x [x ≤ 0]            dx = dy [x > 0] + s dy [x ≤ 0]
          prelu        y = x [x > 0] + w x [x ≤ 0]            dx = dy [x > 0] + w dy [x ≤ 0]    dw = Σ dy x [x ≤ 0]
          rrelu        y = r x, r = 1 where x > 0, else       dx = r dy
                       drawn once from U(lower, upper)
          threshold    y = x [x > t] + v [x ≤ t]              dx = dy [x > t]
Letters   x, y of any shape (*B); prelu's w is one number or one per channel (dimension 1), and Σ runs over all that share it;
          [ ] is 1 where the condition holds, else 0; dt is the gradient of the loss by t
Numerics  the output is kept where it tells the piece, else the input (`_x` rules): leaky_relu with s ≤ 0, threshold with v > t,
          prelu; rrelu keeps r. threshold of half tensors keeps the input, as a compiler may compare an output that was rounded
          with a bound that was not.
          NaN goes through; its gradient is dy, but s dy in leaky_relu and w dy in prelu. A cotangent is blocked where a piece
          is flat, infinite ones too
Source    Maas et al. 2013 (leaky_relu); He et al., arXiv 1502.01852 (prelu); Xu et al., arXiv 1505.00853 (rrelu); Nair & Hinton
          2010 (threshold)
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.blocks import by_elements, by_rows
from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule, unwatched
from bptoolkit.op import Op
from bptoolkit.ops.elementwise import case_with, check_numbers, either, holds, in_place, unary
from bptoolkit.precision import HALF, wide

# leaky_relu


def leaky_forward(x, slope):
    return F.leaky_relu(x, slope)


def leak(t, dy, slope):
    """Dy where t > 0, else slope · dy."""
    on = holds(torch.gt, t, 0, dy)
    if on.dtype not in (torch.bool, *HALF) and 0 <= slope <= 1:
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
    if not -inf < lower <= upper < inf:
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
    from_output = value <= threshold and input.dtype not in HALF
    rule = THRESHOLD_RULE if from_output else THRESHOLD_X_RULE
    backend = THRESHOLD.pick(rule, backend, input, threshold, value)
    if inplace:
        write = torch.threshold_ if from_output else None
        return in_place(THRESHOLD, rule, input, threshold, value, backend=backend, write=write)
    return rule(input, threshold, value, backend=backend)


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
OPS = (LEAKY_RELU, PRELU, RRELU, THRESHOLD)
