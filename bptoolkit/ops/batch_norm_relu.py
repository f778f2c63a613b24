"""Batch normalization and the relu after it, in one node that keeps the input alone.

Maths     z = (x − m) r w + b        y = max(z, 0)        m, r and their gradients as in batch_norm
          dz = dy [z > 0]            dx, dw, db = the gradients of batch_norm by dz
Letters   x, y, z of shape N C *I; w, b, m and r of shape C, m and r residual outputs that the public function hides; dt is the
          gradient of the loss by t, in t's shape
Numerics  z is not kept: backward computes it again from x by the formula that forward used, in the same order, so that a
          gradient passes exactly where y is not 0. A half z is rounded before it is compared. NaN passes, in y and in dx
Source    Ioffe & Szegedy, "Batch Normalization", arXiv 1502.03167, §3; recomputation as in Pleiss et al., "Memory-Efficient
          Implementation of DenseNets", arXiv 1707.06990, §3
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bptoolkit.blocks import by_rows
from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.op import Op
from bptoolkit.ops import batch_norm
from bptoolkit.ops.activation import relu_backward
from bptoolkit.ops.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, run
from bptoolkit.ops.channel_norm import over
from bptoolkit.precision import wide


def forward(x, w, b, running_mean, running_var, training, momentum, eps):
    if training:
        _, m, r = batch_norm.forward(x, w, b, running_mean, running_var, training, momentum, eps)
    else:
        m, r = batch_norm.given(running_mean, running_var, eps)
    return by_rows(lambda x: activated(x, w, b, m, r), x), m, r


def activated(x, w, b, m, r):
    """Y from the statistics, always by the same steps."""
    a = r if w is None else r * w  # C
    z = (wide(x) - over(m[None], x)) * over(a[None], x)
    z = z if b is None else z + over(b[None], x)
    return torch.relu(z.to(x.dtype))


def backward(dy, dm, dr, x, w, b, m, r, training, need):
    dz = None if dy is None else by_rows(lambda x, dy: relu_backward(dy, activated(x, w, b, m, r)), x, dy)
    return batch_norm.backward(dz, dm, dr, x, w, b, m, r, training, need)


def kernel():
    from bptoolkit.triton_kernels.batch_norm import RELU

    return RELU


KEPT = "x w b m r"
RULE = Rule(
    "batch_norm_relu",
    forward,
    backward,
    inputs="x w b running_mean running_var",
    outputs="y m r",
    uses={"x": KEPT, "w": KEPT, "b": KEPT, "running_mean": "", "running_var": ""},
    kernel=kernel,
)


def batch_norm_relu(
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
    """relu(batch_norm(input, ...)), of which the input and what has one element per channel are kept for backward.

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
    args = batch_norm.checked("batch_norm_relu", input, running_mean, running_var, weight, bias, training, momentum, eps)
    return RULE(*args, backend=OP.pick(RULE, backend, *args))[0]


class BatchNormReLU1d(BatchNorm1d):
    """`torch.nn.BatchNorm1d` and the relu after it, in one node; same parameters, buffers, state_dict and arguments."""

    def forward(self, input: Tensor) -> Tensor:
        return run(batch_norm_relu, self, input)


class BatchNormReLU2d(BatchNorm2d):
    """`torch.nn.BatchNorm2d` and the relu after it, in one node; same parameters, buffers, state_dict and arguments."""

    def forward(self, input: Tensor) -> Tensor:
        return run(batch_norm_relu, self, input)


class BatchNormReLU3d(BatchNorm3d):
    """`torch.nn.BatchNorm3d` and the relu after it, in one node; same parameters, buffers, state_dict and arguments."""

    def forward(self, input: Tensor) -> Tensor:
        return run(batch_norm_relu, self, input)


def reference(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    return torch.relu(batch_norm.reference(input, running_mean, running_var, weight, bias, training, momentum, eps))


def peer(*args, **kwargs):
    return F.relu(F.batch_norm(*args, **kwargs))


def bench(draw: Draw) -> Case:
    return batch_norm._bench(draw, 32, 64, 56, 56)


OP = Op(
    name="batch_norm_relu",
    call=batch_norm_relu,
    reference=reference,
    peer=peer,
    rules=(RULE,),
    shapes=batch_norm.OP.shapes,
    source="Ioffe & Szegedy 2015, §3",
    case=batch_norm.case,
    bench={"32 × 64 × 56 × 56": bench},
)
OPS = (OP,)
