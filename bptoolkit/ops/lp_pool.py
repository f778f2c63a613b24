"""Power-average pooling: the p-norm of each window, in one, two and three dimensions.

Maths     u[j] = K/D[j] Σ_k x[js + k]^p        y = u^(1/p)
          K positions in a window, D[j] of them in x: torch scales what a last window (ceil_mode) misses
          dy/du = u^(1/p − 1) / p = y^(1−p) / p
          du[j]/dx[m] = K/D[j] p x[m]^(p−1)        for the windows j that cover m
          dx[m] = x[m]^(p−1) Σ_{j covers m} (K/D[j]) dy[j] y[j]^(1−p)
          where u[j] = 0 the norm has no derivative, and the window gives 0
          p = ±∞   y[j] = ± max_k ±|x[js + k]| = |x[i[j]]|        dx[m] = sign(x[m]) Σ_{j: i[j] = m} dy[j]
Letters   m, j, k run over positions of the input (X), output (Y) and kernel, an index per dimension; s stride; i is flat over
          X; dt is the gradient of the loss by t
Numerics  half tensors are computed in float32; keeps x and y; the sum over windows is avg_pool's
Source    Sermanet, Chintala & LeCun, "Convolutional neural networks applied to house numbers digit classification", ICPR 2012
"""

from __future__ import annotations

from math import inf, isinf, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.op import FLOAT32, FLOAT32_CUDA, Op
from bptoolkit.ops import max_pool
from bptoolkit.ops.avg_pool import average, transposed
from bptoolkit.ops.max_pool import draw_windows
from bptoolkit.ops.windows import layout, windows
from bptoolkit.precision import wide


def forward(x, p, kernel, stride, padding, ceil_mode, size, last):
    mean = average(wide(x).pow(p), kernel, stride, padding, ceil_mode, True, None)
    return mean.mul(prod(kernel)).pow(1 / p).to(x.dtype)  # *B Y


def backward(dy, x, y, p, kernel, stride, padding, ceil_mode, size, last):
    g, x, y = wide(dy), wide(x), wide(y)
    zero = y == 0
    g = g if p == 1 else g * torch.where(zero, 1.0, y).pow(1 - p)  # *B Y
    g = torch.where(zero, 0.0, g * prod(kernel))
    g = transposed(g, kernel, stride, padding, ceil_mode, True, None, size, last)  # *B X
    return (g if p == 1 else g * x.pow(p - 1)).to(dy.dtype)


RULE = Rule("lp_pool", forward, backward, inputs="x", outputs="y")


def extreme_forward(x, sign, kernel, stride, padding, dilation, ceil_mode, size, last):
    y, i = max_pool.forward(sign * x.abs(), kernel, stride, padding, dilation, ceil_mode, size, last)
    return sign * y, i


def extreme_backward(dy, x, i, kernel, stride, padding, dilation, size, last):
    return x.sign() * max_pool.backward(dy, i, kernel, stride, padding, dilation, size, last)


EXTREME_RULE = Rule("lp_pool_extreme", extreme_forward, extreme_backward, inputs="x", outputs="y i", constants="i")


def _pool(op: Op, n: int, x: Tensor, p: float, kernel: Any, stride: Any, ceil_mode: bool, backend: str) -> Tensor:
    if not isinstance(p, (int, float)) or p == 0:
        raise ValueError(f"{op.name}: norm_type={p!r} must be a number other than 0")
    extreme = p in (inf, -inf)
    (x,) = (max_pool.OPS[n - 1] if extreme else op).cast(x)
    kernel, stride, padding, dilation, ceil_mode = windows(op, n, x, (kernel, stride, 0, 1), ceil_mode)
    args: Any
    if extreme:
        args = (x, 1 if p > 0 else -1, kernel, stride, padding, dilation, ceil_mode, *layout(n, x))
        return EXTREME_RULE(*args, backend=op.pick(EXTREME_RULE, backend, *args))[0]
    args = (x, float(p), kernel, stride, padding, ceil_mode, *layout(n, x))
    return RULE(*args, backend=op.pick(RULE, backend, *args))


def lp_pool1d(
    input: Tensor, norm_type: float, kernel_size: Any, stride: Any = None, ceil_mode: bool = False, *, backend: str = "auto"
) -> Tensor:
    """The p-norm of each window, as `torch.nn.functional.lp_pool1d`; arguments and errors as `lp_pool2d`.

    Input (N, C, L) or (C, L).
    """
    return _pool(LP_POOL1D, 1, input, norm_type, kernel_size, stride, ceil_mode, backend)


def lp_pool2d(
    input: Tensor, norm_type: float, kernel_size: Any, stride: Any = None, ceil_mode: bool = False, *, backend: str = "auto"
) -> Tensor:
    """(Σ x^p)^(1/p) of each window, as `torch.nn.functional.lp_pool2d`: no absolute values unless p is ±inf.

    Args:
        input: (N, C, H, W), or unbatched (C, H, W), floating point.
        norm_type: p, a number other than 0; inf and -inf give the largest and the smallest absolute value.
        kernel_size: the size of a window, one int or one per dimension.
        stride: the step from window to window, likewise; None for the size of a window.
        ceil_mode: a last window that lies partly outside counts too; its sum is scaled up to a whole window.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (N, C, H', W') or (C, H', W'), H' = ⌊(H − kH) / stride⌋ + 1, or ⌈…⌉; channels_last as the input.

    Raises:
        ValueError: shapes or options disagree, the window is larger than the input, norm_type is 0, or the named backend
            cannot run the call.
        TypeError: the input is not a tensor of floating point.
    """
    return _pool(LP_POOL2D, 2, input, norm_type, kernel_size, stride, ceil_mode, backend)


def lp_pool3d(
    input: Tensor, norm_type: float, kernel_size: Any, stride: Any = None, ceil_mode: bool = False, *, backend: str = "auto"
) -> Tensor:
    """The p-norm of each window, as `torch.nn.functional.lp_pool3d`; arguments and errors as `lp_pool2d`.

    Input (N, C, D, H, W) or (C, D, H, W).
    """
    return _pool(LP_POOL3D, 3, input, norm_type, kernel_size, stride, ceil_mode, backend)


def _module_forward(call: Any, module: Any, input: Tensor) -> Tensor:
    options = (float(module.norm_type), module.kernel_size, module.stride, module.ceil_mode)
    return call(input, *options, backend=module.backend)


class LPPool1d(nn.LPPool1d):
    """`torch.nn.LPPool1d` with the backward above; same arguments."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`

    def forward(self, input: Tensor) -> Tensor:
        return _module_forward(lp_pool1d, self, input)


class LPPool2d(nn.LPPool2d):
    """`torch.nn.LPPool2d` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return _module_forward(lp_pool2d, self, input)


class LPPool3d(nn.LPPool3d):
    """`torch.nn.LPPool3d` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return _module_forward(lp_pool3d, self, input)


def _case(n: int) -> Any:
    def case(draw: Draw) -> Case:
        x, kwargs = draw_windows(draw, n, dilated=False, padded=False)
        if n == 1:
            kwargs["kernel_size"] = kwargs["kernel_size"][0]  # torch's lp_pool1d takes an int alone
        p = draw.choice((2.0, 2, 1, 3.0, 1.5, inf, -inf))
        if p in (3.0, 1.5):  # roots of negative sums are NaN
            x = x.detach().abs().clamp(max=0.9).add(0.5).requires_grad_()
        return Case((x, p), kwargs)

    return case


def _reference(n: int) -> Any:
    """torch's lp_pool, whose CPU kernel of 3 dimensions takes no half tensors; before 2.12 it takes no infinite norm."""

    def reference(input, norm_type, *args, **kwargs):
        if isinf(norm_type):
            most = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[n - 1]
            sign = 1 if norm_type > 0 else -1
            return sign * most(sign * input.abs(), *args, **kwargs)
        if n == 3:
            return F.lp_pool3d(wide(input), norm_type, *args, **kwargs).to(input.dtype)
        return (F.lp_pool1d, F.lp_pool2d)[n - 1](input, norm_type, *args, **kwargs)

    return reference


def bench_1d(draw: Draw) -> Case:
    return Case((draw.tensor(32, 64, 1024), 2.0, 4), {})


def bench_2d(draw: Draw) -> Case:
    return Case((draw.tensor(8, 64, 56, 56), 2.0, 2), {})


def bench_3d(draw: Draw) -> Case:
    return Case((draw.tensor(2, 16, 16, 56, 56), 2.0, 2), {})


def _op(call: Any, reference: Any, module: Any, shapes: str, n: int, **kw: Any) -> Op:
    return Op(
        name=call.__name__,
        call=call,
        reference=reference,
        rules=(RULE, EXTREME_RULE),
        module=(module,),
        replaces=(module.__base__,),
        shapes=shapes,
        source="Sermanet, Chintala & LeCun 2012",
        case=_case(n),
        **{"autocast": FLOAT32_CUDA, **kw},
    )


LP_POOL1D = _op(lp_pool1d, _reference(1), LPPool1d, "input: *N C L -> *N C L'", 1, bench=bench_1d)
LP_POOL2D = _op(lp_pool2d, _reference(2), LPPool2d, "input: *N C H W -> *N C H' W'", 2, bench=bench_2d)
LP_POOL3D = _op(
    lp_pool3d,
    _reference(3),
    LPPool3d,
    "input: *N C D H W -> *N C D' H' W'",
    3,
    peer=F.lp_pool3d,
    autocast=FLOAT32,
    bench=bench_3d,
)
OPS = (LP_POOL1D, LP_POOL2D, LP_POOL3D)
