"""Convolution, batch normalization and relu: the kernels of batch_norm_relu around the vendor's convolution. For the maths see
the op of this name. They make z again from u, which backward makes again from x.
"""

from __future__ import annotations

from torch import Tensor

from bptoolkit.ops import conv
from bptoolkit.ops.conv_batch_norm_relu import gradients
from bptoolkit.triton_kernels.batch_norm import RELU
from bptoolkit.triton_kernels.kernel import Kernel, computed_in_float32


def forward(x, w, b, g, h, running_mean, running_var, stride, padding, dilation, tail, groups, training, momentum, eps):
    u = conv.forward(x, w, b, stride, padding, dilation, tail, groups)
    return RELU.forward(u, g, h, running_mean, running_var, training, momentum, eps)


def backward(dy, dm, dr, x, w, b, g, h, m, r, stride, padding, dilation, tail, groups, training, need):
    return gradients(RELU.backward, dy, dm, dr, x, w, b, g, h, m, r, stride, padding, dilation, tail, groups, training, need)


def unsupported(x: Tensor, *others: object) -> str | None:
    """Why the kernels cannot take the call, or None."""
    return computed_in_float32(x)


KERNEL = Kernel(forward, backward, unsupported)
