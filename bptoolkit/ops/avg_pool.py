"""Average pooling in one, two and three dimensions.

Maths     y[j] = Σ_k x[js + k − p] / D[j]        where x is 0 outside its range
          D[j] is the number of positions in window j: those in x and its padding (count_include_pad), those in x alone
          (not count_include_pad), or a given number (divisor_override); a product of one factor per dimension
          Each x[m] meets 1/D[j] in the windows that cover it:
          dx[m] = Σ_{j: js − p ≤ m < js − p + K} dy[j] / D[j]
          The condition is one per dimension, so the sum is taken one dimension after the other. In one of them let
          m + p = sq + r with r < s and K = sa + b with b < s. Window q − t covers m if st + r < K, so for t < a, and for t = a
          too if r < b: with g = dy / D each block q of s positions has two values,
          B[q] = g[q] + … + g[q − a] in its first b positions, A[q] = g[q] + … + g[q − a + 1] in the others
Letters   m, j, k run over positions of the input (X), output (Y) and kernel (K), an index per dimension; s stride, p padding;
          dt is the gradient of the loss by t
Numerics  keeps nothing; half gradients are added in float32; no differences of prefix sums, so infinities and NaN stay in the
          windows they are in; channels_last goes through
Source    LeCun et al., "Gradient-based learning applied to document recognition", 1998, §2 (sub-sampling)
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.op import Op
from bptoolkit.ops.max_pool import draw_windows
from bptoolkit.ops.windows import by_samples, layout, repeat, spread, windows
from bptoolkit.precision import wide


def average(x, kernel, stride, padding, ceil_mode, count_include_pad, divisor):
    """The pooling itself; torch's CPU kernel in three dimensions takes no half tensors."""
    if len(kernel) == 1:
        return F.avg_pool1d(x, kernel, stride, padding, ceil_mode, count_include_pad)  # *B Y
    if len(kernel) == 2:
        return F.avg_pool2d(x, kernel, stride, padding, ceil_mode, count_include_pad, divisor)
    x3 = wide(x) if x.device.type == "cpu" else x
    return F.avg_pool3d(x3, kernel, stride, padding, ceil_mode, count_include_pad, divisor).to(x.dtype)


def transposed(g, kernel, stride, padding, ceil_mode, count_include_pad, divisor, size, last):
    """Σ_j g[j] / D[j] over the windows that cover each position, in g's dtype."""
    n = len(kernel)
    several = divisor is None and (ceil_mode or (any(padding) and not count_include_pad))  # sizes of windows

    def formula(g):  # R Y, or R Y C
        g = wide(g)
        if several:
            for k in range(n):
                D = lengths(g, 1 + k, kernel[k], stride[k], padding[k], size[k], count_include_pad)
                g = g / D.reshape(-1, *(1,) * (g.dim() - 2 - k))
        else:
            g = g / (divisor or prod(kernel))
        if disjoint:
            return repeat(g, size)
        for k in reversed(range(n)):
            g = spread(g, 1 + k, kernel[k], stride[k], padding[k], size[k])
        return g

    disjoint = last and kernel == stride and not any(padding) and not any(X % k for X, k in zip(size, kernel))
    blocks = any(k >= 2 * s for k, s in zip(kernel, stride))  # sums of several elements
    return by_samples(formula, g, size, last, blocks)


def lengths(g, dim, k, s, p, X, count_include_pad):
    """One dimension's factor of D."""
    start = torch.arange(g.shape[dim], device=g.device) * s - p
    stop = (start + k).clamp(max=X + p)
    if not count_include_pad:
        start, stop = start.clamp(min=0), stop.clamp(max=X)
    return (stop - start).to(g.dtype)  # Y


def forward(x, kernel, stride, padding, ceil_mode, count_include_pad, divisor, size, last):
    return average(x, kernel, stride, padding, ceil_mode, count_include_pad, divisor)


def backward(dy, kernel, stride, padding, ceil_mode, count_include_pad, divisor, size, last):
    return transposed(dy, kernel, stride, padding, ceil_mode, count_include_pad, divisor, size, last)


RULE = Rule("avg_pool", forward, backward, inputs="x", outputs="y")


def _pool(op: Op, n: int, x: Tensor, options: Any, ceil_mode: bool, include: bool, divisor: int | None, backend: str) -> Tensor:
    (x,) = op.cast(x)
    kernel, stride, padding, _, ceil_mode = windows(op, n, x, (*options, 1), ceil_mode)
    if divisor == 0:
        raise ValueError(f"{op.name}: divisor_override is 0; it must be another number, or None for the size of the window")
    args = (x, kernel, stride, padding, ceil_mode, bool(include), divisor, *layout(n, x))
    return RULE(*args, backend=op.pick(RULE, backend, *args))


def avg_pool1d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    *,
    backend: str = "auto",
) -> Tensor:
    """The mean of each window, as `torch.nn.functional.avg_pool1d`; arguments and errors as `avg_pool2d`.

    Input (N, C, L) or (C, L).
    """
    return _pool(AVG_POOL1D, 1, input, (kernel_size, stride, padding), ceil_mode, count_include_pad, None, backend)


def avg_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """The mean of each window, as `torch.nn.functional.avg_pool2d`.

    Args:
        input: (N, C, H, W), or unbatched (C, H, W), floating point.
        kernel_size: the size of a window, one int or one per dimension.
        stride: the step from window to window, likewise; None for the size of a window.
        padding: zeros on both sides, likewise; at most half a window.
        ceil_mode: a last window that lies partly outside counts too.
        count_include_pad: the padding counts in the number that a window's sum is divided by.
        divisor_override: that number, for all windows.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (N, C, H', W') or (C, H', W'), H' = ⌊(H + 2 padding − kH) / stride⌋ + 1, or ⌈…⌉; channels_last as the input.

    Raises:
        ValueError: shapes or options disagree, the window is larger than the padded input, the divisor is 0, or the named
            backend cannot run the call.
        TypeError: the input is not a tensor of floating point.
    """
    options = (kernel_size, stride, padding)
    return _pool(AVG_POOL2D, 2, input, options, ceil_mode, count_include_pad, divisor_override, backend)


def avg_pool3d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """The mean of each window, as `torch.nn.functional.avg_pool3d`; arguments and errors as `avg_pool2d`.

    Input (N, C, D, H, W) or (C, D, H, W).
    """
    options = (kernel_size, stride, padding)
    return _pool(AVG_POOL3D, 3, input, options, ceil_mode, count_include_pad, divisor_override, backend)


def _module_forward(call: Any, module: Any, input: Tensor, *divisor: int | None) -> Tensor:
    options = (module.stride, module.padding, module.ceil_mode, module.count_include_pad, *divisor)
    return call(input, module.kernel_size, *options, backend=module.backend)


class AvgPool1d(nn.AvgPool1d):
    """`torch.nn.AvgPool1d` with the backward above; same arguments."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`

    def forward(self, input: Tensor) -> Tensor:
        return _module_forward(avg_pool1d, self, input)


class AvgPool2d(nn.AvgPool2d):
    """`torch.nn.AvgPool2d` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return _module_forward(avg_pool2d, self, input, self.divisor_override)


class AvgPool3d(nn.AvgPool3d):
    """`torch.nn.AvgPool3d` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return _module_forward(avg_pool3d, self, input, self.divisor_override)


def _case(n: int) -> Any:
    def case(draw: Draw) -> Case:
        x, kwargs = draw_windows(draw, n, dilated=False)
        kwargs["count_include_pad"] = draw.flag()
        if n > 1:
            kwargs["divisor_override"] = draw.choice((None, None, 3, -2))
        return Case((x,), kwargs)

    return case


def reference(input, *args, **kwargs):
    """torch's avg_pool3d, whose CPU kernel takes no half tensors."""
    return F.avg_pool3d(wide(input), *args, **kwargs).to(input.dtype)


def bench_2x2(draw: Draw) -> Case:
    return Case((draw.tensor(8, 64, 56, 56), 2), {})


def bench_3x3(draw: Draw) -> Case:
    return Case((draw.tensor(8, 64, 56, 56), 3, 1, 1), {"count_include_pad": False})


def bench_1d(draw: Draw) -> Case:
    return Case((draw.tensor(32, 64, 1024), 4), {})


def bench_3d(draw: Draw) -> Case:
    return Case((draw.tensor(2, 16, 16, 56, 56), 2), {})


def _op(call: Any, reference: Any, module: Any, shapes: str, n: int, **kw: Any) -> Op:
    return Op(
        name=call.__name__,
        call=call,
        reference=reference,
        rules=(RULE,),
        module=(module,),
        replaces=(module.__base__,),
        shapes=shapes,
        source="LeCun et al. 1998, §2",
        case=_case(n),
        **kw,
    )


AVG_POOL1D = _op(avg_pool1d, F.avg_pool1d, AvgPool1d, "input: *N C L -> *N C L'", 1, bench=bench_1d)
AVG_POOL2D = _op(
    avg_pool2d,
    F.avg_pool2d,
    AvgPool2d,
    "input: *N C H W -> *N C H' W'",
    2,
    bench={"2×2": bench_2x2, "3×3, stride 1": bench_3x3},
)
AVG_POOL3D = _op(
    avg_pool3d,
    reference,
    AvgPool3d,
    "input: *N C D H W -> *N C D' H' W'",
    3,
    peer=F.avg_pool3d,
    autocast={"cpu": "float32"},
    bench=bench_3d,
)
OPS = (AVG_POOL1D, AVG_POOL2D, AVG_POOL3D)
