"""Batch normalization: each channel over all samples and positions.

Maths     training    m = mean(x)    v = mean((x − m)²)    r = 1/√(v + eps)    y = (x − m) r w + b
          evaluation  the same with m and v the running statistics, which are constants
          db = Σ dy            dw = Σ dy x̂            with x̂ = (x − m) r, the sums and means over samples and positions
          training    dx = r w (dy − mean(dy) − x̂ mean(dy x̂)) + dm/M − dr r² x̂/M
          evaluation  dx = r w dy
          In training, running ← (1 − momentum) running + momentum · (m, or v M/(M − 1)), no part of any gradient.
Letters   x, y of shape N C *I; w, b, m and r of shape C, m and r residual outputs that the public function hides; M elements in
          a channel; dt is the gradient of the loss by t, in t's shape
Numerics  half inputs are normalized in float32, and m and r are float32; y has x's dtype
Source    Ioffe & Szegedy, "Batch Normalization", arXiv 1502.03167, Algorithm 1 and §3
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.op import Op
from bptoolkit.ops import channel_norm
from bptoolkit.ops.channel_norm import check_eps, check_input, check_per_channel, in_one_dtype
from bptoolkit.precision import wide


def forward(x, w, b, running_mean, running_var, training, momentum, eps):
    if x.numel() == 0:  # torch's kernel refuses; the running statistics stay
        m = wide(x.new_zeros(x.shape[1]))
        return torch.empty_like(x), m, m.clone()
    if in_one_dtype(x, w, b, running_mean, running_var):
        return normalized(x, w, b, running_mean, running_var, training, momentum, eps)
    running = running_mean, running_var
    mean, var = (t if t is None else wide(t) for t in running)
    y, m, r = normalized(wide(x), *(t if t is None else wide(t) for t in (w, b)), mean, var, training, momentum, eps)
    if training:
        for t, new in zip(running, (mean, var)):
            if t is not new:
                t.copy_(new)
    return y.to(x.dtype), m, r


def normalized(x, w, b, mean, var, training, momentum, eps):
    kernel = torch.ops.aten._native_batch_norm_legit
    if mean is None:
        return kernel.no_stats(x, w, b, True, momentum, eps)
    y, m, r = kernel(x, w, b, mean, var, training, momentum, eps)  # in training it updates mean and var
    if not training:  # the CPU's kernel returns no statistics then
        m, r = given(mean, var, eps)
    return y, m, r


def given(mean, var, eps):
    """Evaluation's m and r."""
    return wide(mean).clone(), (wide(var) + eps).rsqrt()


def backward(dy, dm, dr, x, w, b, m, r, training, need):
    pool = channel_norm.Batch(x) if x is not None else None
    dx, dw, db = channel_norm.backward(dy, dm, dr, x, w, b, m, r, pool, not training, need)
    return dx, dw, db, None, None


def kernel():
    from bptoolkit.triton_kernels.batch_norm import KERNEL

    return KERNEL


RULE = Rule(
    "batch_norm",
    forward,
    backward,
    inputs="x w b running_mean running_var",
    outputs="y m r",
    uses={"x": "x w m r", "w": "x w m r", "b": "b", "running_mean": "", "running_var": ""},
    kernel=kernel,
)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> Tensor:
    """(x − mean) / √(variance + eps) · weight + bias per channel, as `torch.nn.functional.batch_norm`.

    Args:
        input: (N, C) or (N, C, *I), floating point.
        running_mean: (C,) or None; what evaluation subtracts, and in training what is updated, in place.
        running_var: (C,) or None, likewise; training stores the unbiased variance.
        weight: (C,) or None; of input's dtype, or float32 for a half input, as are the other three.
        bias: (C,) or None.
        training: take the statistics from the input, not from the running ones.
        momentum: how much of the running statistics a call in training replaces.
        eps: added to the variance.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        input's shape and dtype.

    Raises:
        ValueError: shapes or devices disagree, there are no running statistics in evaluation or one of the two, training has
            one value per channel, eps is not positive, or the named backend cannot run the call.
        TypeError: a tensor is not of floating point, or the dtypes do not go together.
    """
    args = checked("batch_norm", input, running_mean, running_var, weight, bias, training, momentum, eps)
    return RULE(*args, backend=OP.pick(RULE, backend, *args))[0]


def checked(
    op: str,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Any, ...]:
    """The rule's arguments, after the checks that go with them."""
    check_input(op, input)
    C = input.shape[1]
    check_per_channel(op, input, C, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    check_options(op, input.shape, running_mean, running_var, training, eps)
    return input, weight, bias, running_mean, running_var, bool(training), momentum, eps


def check_options(
    op: str, shape: Any, running_mean: Tensor | None, running_var: Tensor | None, training: bool, eps: float
) -> None:
    """What must go together to normalize a tensor of this shape."""
    check_eps(op, eps, positive=training)
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(f"{op}: {missing} is None but the other is not; give both running statistics or neither")
    if not training and running_mean is None:
        raise ValueError(f"{op}: running_mean and running_var are None; training=False needs them")
    if training and shape[0] * prod(shape[2:]) == 1:
        raise ValueError(f"{op}: input has shape {tuple(shape)}, one value per channel; training=True needs more")


def run(call: Callable[..., Tensor], module: Any, input: Tensor) -> Tensor:
    """A module's forward, by a function of these arguments: it counts the batches, and with momentum None averages over all."""
    module._check_input_dim(input)
    tracking = module.training and module.track_running_stats
    momentum = 0.0 if module.momentum is None else module.momentum
    if tracking and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if module.momentum is None:
            momentum = 1.0 / float(module.num_batches_tracked)
    mean, var = module.running_mean, module.running_var
    training = module.training or (mean is None and var is None)
    if module.training and not module.track_running_stats:
        mean = var = None
    return call(input, mean, var, module.weight, module.bias, training, momentum, module.eps, backend=module.backend)


class BatchNorm1d(nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` with the backward above; same parameters, buffers, state_dict and arguments."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`

    def forward(self, input: Tensor) -> Tensor:
        return run(batch_norm, self, input)


class BatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with the backward above; same parameters, buffers, state_dict and arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return run(batch_norm, self, input)


class BatchNorm3d(nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` with the backward above; same parameters, buffers, state_dict and arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return run(batch_norm, self, input)


def reference(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    """In plain torch, without the update: third derivatives of torch's own drop those of mean and rstd."""
    x, dims = wide(input), (0, *range(2, input.dim()))
    shape = (1, -1, *(1,) * (input.dim() - 2)) if input.shape[1] else (1, 0, *(1,) * (input.dim() - 2))
    if training:
        x = x - x.mean(dims, keepdim=True)
        y = x / (x.square().mean(dims, keepdim=True) + eps).sqrt()
    else:
        y = (x - running_mean.reshape(shape)) / (running_var.reshape(shape) + eps).sqrt()
    y = y if weight is None else y * weight.reshape(shape)
    return (y if bias is None else y + bias.reshape(shape)).to(input.dtype)


def case(draw: Draw) -> Case:
    inner = tuple(draw.size() for _ in range(draw.choice((0, 1, 1, 2))))
    N, C = draw.size(), draw.size()
    if N * prod(inner) == 1:
        N += 1
    w, b = (draw.tensor(C) if draw.random.random() < 0.75 else None for _ in range(2))
    running: tuple[Tensor | None, ...] = draw.tensor(C, grad=False), draw.tensor(C, grad=False).abs() + 0.5
    training = draw.flag()
    if training:
        running = None, None  # their update, which has no gradient, is refused by torch's transforms
    options = {"training": training, "eps": draw.choice((1e-5, 0.1))}
    return Case((draw.tensor(N, C, *inner), *running, w, b), options)


def _bench(draw: Draw, *shape: int, training: bool = True) -> Case:
    C = shape[1]
    running = draw.tensor(C, grad=False), draw.tensor(C, grad=False).abs() + 0.5
    return Case((draw.tensor(*shape), *running, draw.tensor(C), draw.tensor(C)), {"training": training})


OP = Op(
    name="batch_norm",
    call=batch_norm,
    reference=reference,
    peer=F.batch_norm,
    rules=(RULE,),
    module=(BatchNorm1d, BatchNorm2d, BatchNorm3d),
    replaces=(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    shapes="input: *X, running_mean: C, running_var: C, weight: C, bias: C -> *X",
    source="Ioffe & Szegedy 2015, Algorithm 1",
    case=case,
    bench={
        "32 × 64 × 56 × 56": lambda draw: _bench(draw, 32, 64, 56, 56),
        "4096 × 512": lambda draw: _bench(draw, 4096, 512),
        "32 × 64 × 56 × 56, evaluation": lambda draw: _bench(draw, 32, 64, 56, 56, training=False),
    },
)
OPS = (OP,)
