"""Instance normalization: each channel of each sample over its positions.

Maths     group normalization with one channel in a group; with running statistics, batch normalization of x as 1 NC *I
          running ← mean over samples of (1 − momentum) running + momentum · (m, or the unbiased variance)
          without the input's own statistics: m and v are the running ones, and dx = r w dy
Letters   x, y of shape N C *I; w, b of shape C, the running statistics too
Numerics  as the two rules it runs
Source    Ulyanov, Vedaldi & Lempitsky, "Instance Normalization", arXiv 1607.08022, eq. 2
"""

from __future__ import annotations

import warnings
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.cases import Case, Draw
from bptoolkit.op import Op
from bptoolkit.ops import batch_norm, group_norm
from bptoolkit.ops.channel_norm import check_eps, check_input, check_per_channel
from bptoolkit.precision import wide


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> Tensor:
    """(x − mean) / √(variance + eps) · weight + bias per sample and channel, as `torch.nn.functional.instance_norm`.

    Args:
        input: (N, C, *I), floating point.
        running_mean: (C,) or None; updated in place if the input's statistics are used, else what is subtracted.
        running_var: (C,) or None, likewise.
        weight: (C,) or None; of input's dtype, or float32 for a half input, as are the other three.
        bias: (C,) or None.
        use_input_stats: take the statistics from the input, not from the running ones.
        momentum: how much of the running statistics a call replaces.
        eps: added to the variance.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        input's shape and dtype.

    Raises:
        ValueError: shapes or devices disagree, there are no running statistics where they are used or one of the two, there is
            one position alone, or the named backend cannot run the call.
        TypeError: a tensor is not of floating point, or the dtypes do not go together.
    """
    check_input("instance_norm", input)
    N, C, *I = input.shape
    check_per_channel("instance_norm", input, C, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    check_eps("instance_norm", eps, positive=use_input_stats)
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(f"instance_norm: {missing} is None but the other is not; give both running statistics or neither")
    if not use_input_stats and running_mean is None:
        raise ValueError("instance_norm: running_mean and running_var are None; use_input_stats=False needs them")
    if use_input_stats and prod(I) == 1:
        raise ValueError(
            f"instance_norm: input {tuple(input.shape)} has one position; use_input_stats=True needs more than one"
        )
    if not use_input_stats:
        return _batch(input, running_mean, running_var, weight, bias, False, momentum, eps, backend)
    if running_mean is None or running_var is None or not input.numel():
        args = (input, weight, bias, max(C, 1), eps)
        return group_norm.RULE(*args, backend=OP.pick(group_norm.RULE, backend, *args))[0]
    mean, var = running_mean.repeat(N), running_var.repeat(N)  # NC
    w, b = (t if t is None else t.repeat(N) for t in (weight, bias))
    y = _batch(input.reshape(1, N * C, *I), mean, var, w, b, True, momentum, eps, backend)
    with torch.no_grad():
        running_mean.copy_(mean.reshape(N, C).mean(0))
        running_var.copy_(var.reshape(N, C).mean(0))
    return y.reshape(input.shape)


def _batch(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    w: Tensor | None,
    b: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    backend: str,
) -> Tensor:
    args = (x, w, b, mean, var, training, momentum, eps)
    return batch_norm.RULE(*args, backend=OP.pick(batch_norm.RULE, backend, *args))[0]


def run(module: nn.modules.instancenorm._InstanceNorm, input: Tensor, backend: str) -> Tensor:
    """A module's forward; an input without samples is one sample."""
    module._check_input_dim(input)
    unbatched = module._get_no_batch_dim()
    at = input.dim() - unbatched
    if input.shape[at] != module.num_features:
        if module.affine:
            raise ValueError(
                f"expected input's size at dim={at} to match num_features ({module.num_features}), but got: {input.shape[at]}."
            )
        warnings.warn(
            f"input's size at dim={at} does not match num_features. You can silence this warning by not passing in "
            "num_features, which is not used because affine=False",
            stacklevel=3,
        )
    y = instance_norm(
        input if at else input.unsqueeze(0),
        module.running_mean,
        module.running_var,
        module.weight,
        module.bias,
        module.training or not module.track_running_stats,
        0.0 if module.momentum is None else module.momentum,
        module.eps,
        backend=backend,
    )
    return y if at else y.squeeze(0)


class InstanceNorm1d(nn.InstanceNorm1d):
    """`torch.nn.InstanceNorm1d` with the backward above; same parameters, buffers, state_dict and arguments."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`

    def forward(self, input: Tensor) -> Tensor:
        return run(self, input, self.backend)


class InstanceNorm2d(nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d` with the backward above; same parameters, buffers, state_dict and arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return run(self, input, self.backend)


class InstanceNorm3d(nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d` with the backward above; same parameters, buffers, state_dict and arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return run(self, input, self.backend)


def reference(
    input,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    use_input_stats=True,
    momentum=0.1,
    eps=1e-5,
):
    """In plain torch, without the update: third derivatives of torch's own drop those of mean and rstd."""
    x, dims, C = wide(input), tuple(range(2, input.dim())), input.shape[1]
    shape = (1, C, *(1,) * len(dims))
    if use_input_stats:
        x = x - x.mean(dims, keepdim=True)
        y = x / (x.square().mean(dims, keepdim=True) + eps).sqrt()
    else:
        y = (x - running_mean.reshape(shape)) / (running_var.reshape(shape) + eps).sqrt()
    y = y if weight is None else y * weight.reshape(shape)
    return (y if bias is None else y + bias.reshape(shape)).to(input.dtype)


def case(draw: Draw) -> Case:
    N, C = draw.size(), draw.size()
    inner = tuple(draw.size() for _ in range(draw.choice((1, 1, 2))))
    if prod(inner) == 1:
        inner = (*inner[:-1], 2)
    w, b = (draw.tensor(C) if draw.random.random() < 0.75 else None for _ in range(2))
    options = {"use_input_stats": draw.random.random() < 0.75, "eps": draw.choice((1e-5, 0.1))}
    running: tuple[Tensor | None, ...] = draw.tensor(C, grad=False), draw.tensor(C, grad=False).abs() + 0.5
    if options["use_input_stats"]:
        running = None, None  # the update, which has no gradient, is refused by torch's transforms
    return Case((draw.tensor(N, C, *inner), *running, w, b), options)


def bench(draw: Draw) -> Case:
    return Case((draw.tensor(16, 64, 64, 64), None, None, draw.tensor(64), draw.tensor(64)), {})


OP = Op(
    name="instance_norm",
    call=instance_norm,
    reference=reference,
    peer=F.instance_norm,
    rules=(group_norm.RULE, batch_norm.RULE),
    module=(InstanceNorm1d, InstanceNorm2d, InstanceNorm3d),
    replaces=(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    shapes="input: *X, running_mean: C, running_var: C, weight: C, bias: C -> *X",
    source="Ulyanov et al. 2016, eq. 2",
    case=case,
    bench={"16 × 64 × 64 × 64": bench},
)
OPS = (OP,)
