"""Elementwise activations, fused: y in one pass, dx in one pass without what stands between. For the maths see the op.

backward   by what the eager rule keeps: the output of relu, tanh and sigmoid, the input of silu and gelu
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.elementwise import in_order, matrices, memory_format, place, read, strides, tile, tiles, write
from bptoolkit.triton_kernels.functions import activate, chain
from bptoolkit.triton_kernels.kernel import WARP, Kernel, computed_in_float32
from bptoolkit.triton_kernels.operator import operator


@triton.jit(do_not_specialize=["M"])
def forward_kernel(x, y, xm, xn, M, N, NAME: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    m, n, mask = place(M, N, BM, BN)
    write(y, activate(read(x, m, n, xm, xn, mask), NAME), m, n, N, mask)


@triton.jit(do_not_specialize=["M"])
def backward_kernel(dy, t, dx, dym, dyn, tm, tn, M, N, NAME: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """t is x, or y for relu, tanh and sigmoid."""
    m, n, mask = place(M, N, BM, BN)
    DY = read(dy, m, n, dym, dyn, mask)  # BM BN
    T = read(t, m, n, tm, tn, mask)  # BM BN
    if NAME == "tanh":
        DX = DY * (1 - T * T)
    elif NAME == "sigmoid":
        DX = DY * (T * (1 - T))
    else:
        DX = chain(DY, T, NAME)
    write(dx, DX, m, n, N, mask)


def _launch_forward(x: Tensor, name: str) -> Tensor:
    y = _fake_forward(x, name)
    if y.numel():
        _launch(forward_kernel, y, name, x)
    return y


def _fake_forward(x, name):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _launch_backward(dy: Tensor, t: Tensor, name: str) -> Tensor:
    dx = _fake_backward(dy, t, name)
    if dx.numel():
        _launch(backward_kernel, dx, name, dy, t)
    return dx


def _fake_backward(dy, t, name):
    return torch.empty(t.shape, dtype=dy.dtype, device=t.device, memory_format=memory_format(t))


def _launch(kernel, out, name, *inputs):
    M, N, inputs = matrices(*in_order(memory_format(inputs[-1]), *inputs))
    BM, BN, warps = tile(M, N, WARP)
    shape = (*strides(*inputs), M, N, name, BM, BN)
    kernel[tiles(M, N, BM, BN)](*inputs, out, *shape, num_warps=warps, enable_fp_fusion=True)


FORWARD = operator("triton_activation", _launch_forward, _fake_forward)
BACKWARD = operator("triton_activation_backward", _launch_backward, _fake_backward)


def relu_forward(x):
    return FORWARD(x, "relu")


def relu_backward(dy, y):
    return BACKWARD(dy, y, "relu")


def tanh_forward(x):
    return FORWARD(x, "tanh")


def tanh_backward(dy, y):
    return BACKWARD(dy, y, "tanh")


def sigmoid_forward(x):
    return FORWARD(x, "sigmoid")


def sigmoid_backward(dy, y):
    return BACKWARD(dy, y, "sigmoid")


def silu_forward(x):
    return FORWARD(x, "silu")


def silu_backward(dy, x):
    return BACKWARD(dy, x, "silu")


def gelu_forward(x, approximate):
    return FORWARD(x, GELUS[approximate])


def gelu_backward(dy, x, approximate):
    return BACKWARD(dy, x, GELUS[approximate])


GELUS = {"none": "gelu", "tanh": "gelu_tanh"}


def unsupported(x: Tensor, approximate: str = "none") -> str | None:
    """Why the kernels cannot take the call, or None."""
    return computed_in_float32(x)


RELU = Kernel(relu_forward, relu_backward, unsupported)
TANH = Kernel(tanh_forward, tanh_backward, unsupported)
SIGMOID = Kernel(sigmoid_forward, sigmoid_backward, unsupported)
SILU = Kernel(silu_forward, silu_backward, unsupported)
GELU = Kernel(gelu_forward, gelu_backward, unsupported)


def specs(warp: int) -> list[Spec]:
    """The kernels at the shipped configurations: one long row, of each activation; rows of a larger tensor."""
    every = []
    for t in ("bf16", "fp32"):
        dense = [(name, 1, 1 << 20) for name in ("relu", "tanh", "sigmoid", "silu", "gelu", "gelu_tanh")]
        for name, M, N in (*dense, ("gelu", 4096, 4096), ("gelu", 4096, 64)):
            BM, BN, warps = tile(M, N, warp)
            constants = {"xn": 1, "dyn": 1, "tn": 1, "NAME": name, "BM": BM, "BN": BN}
            label = f"activation {name} {t}" if M == 1 else f"activation {name} rows of {N} {t}"
            for kernel, pointers, rows in (
                (forward_kernel, ("x", "y"), ("xm",)),
                (backward_kernel, ("dy", "t", "dx"), ("dym", "tm")),
            ):
                types = dict.fromkeys(pointers, f"*{t}") | dict.fromkeys((*rows, "M", "N"), "i32")
                every.append(Spec(label, kernel, types, constants, (*pointers, *rows, "N"), warps))
                label = label.replace("activation", "activation backward", 1)
    return every
