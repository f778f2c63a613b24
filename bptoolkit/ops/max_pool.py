"""Max pooling in one, two and three dimensions.

Maths     y[j] = max_k x[js + kd − p]        over the positions of window j that lie in x
          i[j] = the position of that maximum; so y[j] = x[i[j]], and near x it stays so:
          dx[m] = Σ_{j: i[j] = m} dy[j]
Letters   m, j, k run over positions of the input (X), output (Y) and kernel, an index per dimension; i is flat over X;
          s stride, p padding, d dilation; dt is the gradient of the loss by t
Numerics  keeps i alone, not x; where windows overlap, half gradients are added in float32. Of equal maxima the first gets the
          gradient; NaN is larger than everything. channels_last goes through
Source    Yamaguchi et al., "A neural network for speaker-independent isolated word recognition", ICSLP 1990; Ranzato et al.,
          "Unsupervised learning of invariant feature hierarchies", CVPR 2007
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.op import Op
from bptoolkit.ops.windows import layout, scatter, windows

POOLS = (F.max_pool1d, F.max_pool2d, F.max_pool3d)


def forward(x, kernel, stride, padding, dilation, ceil_mode, size, last):
    return POOLS[len(kernel) - 1](x, kernel, stride, padding, dilation, ceil_mode, return_indices=True)  # *B Y, *B Y


def backward(dy, i, kernel, stride, padding, dilation, size, last):
    if hollow(padding, dilation, size):
        dy, i = torch.where(i < 0, dy, 0.0), i.clamp(max=0)  # i < 0 nowhere
    overlap = any(s < d * (k - 1) + 1 for k, s, d in zip(kernel, stride, dilation))
    return scatter(dy, i, size, last, overlap)  # *B X


def hollow(padding, dilation, size):
    """Whether the window, there is but one then, steps over all of x: y is −∞, and torch's i is no place in x."""
    return any(-p % d >= X for p, d, X in zip(padding, dilation, size))  # its first place that is not before x


def kernel():
    from bptoolkit.triton_kernels.max_pool import KERNEL

    return KERNEL


RULE = Rule("max_pool", forward, backward, inputs="x", outputs="y i", constants="i", kernel=kernel)


def _pool(op: Op, n: int, x: Tensor, options: Any, ceil_mode: bool, return_indices: bool, backend: str) -> Any:
    if not (n == 3 and return_indices):  # torch's autocast has no entry for max_pool3d_with_indices
        (x,) = op.cast(x)
    args = (x, *windows(op, n, x, options, ceil_mode), *layout(n, x))
    y, i = RULE(*args, backend=op.pick(RULE, backend, *args))
    return (y, i) if return_indices else y


def max_pool1d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    backend: str = "auto",
) -> Any:
    """The largest element of each window, as `torch.nn.functional.max_pool1d`; arguments and errors as `max_pool2d`.

    Input (N, C, L) or (C, L).
    """
    return _pool(MAX_POOL1D, 1, input, (kernel_size, stride, padding, dilation), ceil_mode, return_indices, backend)


def max_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    backend: str = "auto",
) -> Any:
    """The largest element of each window, as `torch.nn.functional.max_pool2d`.

    Args:
        input: (N, C, H, W), or unbatched (C, H, W), floating point.
        kernel_size: the size of a window, one int or one per dimension.
        stride: the step from window to window, likewise; None for the size of a window.
        padding: positions of −∞ on both sides, likewise; at most half a window.
        dilation: the spacing of a window's elements, likewise.
        ceil_mode: a last window that lies partly outside counts too.
        return_indices: return the places of the maxima too.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (N, C, H', W') or (C, H', W'), H' = ⌊(H + 2 padding − dilation (kH − 1) − 1) / stride⌋ + 1, or ⌈…⌉; channels_last as
        the input. With return_indices a pair, the second of int64: places in the flattened H W.

    Raises:
        ValueError: shapes or options disagree, the window is larger than the padded input, or the named backend cannot run
            the call.
        TypeError: the input is not a tensor of floating point.
    """
    return _pool(MAX_POOL2D, 2, input, (kernel_size, stride, padding, dilation), ceil_mode, return_indices, backend)


def max_pool3d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    backend: str = "auto",
) -> Any:
    """The largest element of each window, as `torch.nn.functional.max_pool3d`; arguments and errors as `max_pool2d`.

    Input (N, C, D, H, W) or (C, D, H, W).
    """
    return _pool(MAX_POOL3D, 3, input, (kernel_size, stride, padding, dilation), ceil_mode, return_indices, backend)


def _module_forward(call: Any, module: Any, input: Tensor) -> Any:
    options = (module.stride, module.padding, module.dilation, module.ceil_mode, module.return_indices)
    return call(input, module.kernel_size, *options, backend=module.backend)


class MaxPool1d(nn.MaxPool1d):
    """`torch.nn.MaxPool1d` with the backward above; same arguments."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`

    def forward(self, input: Tensor) -> Any:
        return _module_forward(max_pool1d, self, input)


class MaxPool2d(nn.MaxPool2d):
    """`torch.nn.MaxPool2d` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Any:
        return _module_forward(max_pool2d, self, input)


class MaxPool3d(nn.MaxPool3d):
    """`torch.nn.MaxPool3d` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Any:
        return _module_forward(max_pool3d, self, input)


def draw_windows(draw: Draw, n: int, dilated: bool = True, padded: bool = True) -> tuple[Tensor, dict[str, Any]]:
    """An input and the options of windows that fit it, the smaller the more dimensions it has."""
    most, kernels = {1: (17, (1, 2, 3, 4, 5)), 2: (8, (1, 2, 3, 4)), 3: (4, (1, 2, 3))}[n]
    kernel = [draw.choice(kernels) for _ in range(n)]
    stride: Any = draw.choice((None, 1, 2, [draw.choice((1, 2, 3)) for _ in range(n)]))
    dilation = [draw.choice((1, 1, 2)) for _ in range(n)] if dilated else [1] * n
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation)]
    padding = [draw.choice(range(k // 2 + 1)) for k in kernel] if padded else [0] * n
    least = [max(r - 2 * p, d if k > 1 else 1) for r, p, d, k in zip(reach, padding, dilation, kernel)]  # no window is empty
    X = [max(draw.size(least=1, most=most), m) for m in least]
    batch = () if draw.random.random() < 0.2 else (draw.size(most=2),)
    x = draw.tensor(*batch, draw.size(least=1, most=3), *X)
    kwargs = {"kernel_size": kernel, "stride": stride, "ceil_mode": draw.flag()}
    return x, kwargs | ({"dilation": dilation} if dilated else {}) | ({"padding": padding} if padded else {})


def _case(n: int) -> Any:
    def case(draw: Draw) -> Case:
        x, kwargs = draw_windows(draw, n)
        return Case((x,), {**kwargs, "return_indices": draw.flag()})

    return case


def bench_2x2(draw: Draw) -> Case:
    return Case((draw.tensor(8, 64, 56, 56), 2), {})


def bench_3x3(draw: Draw) -> Case:
    return Case((draw.tensor(8, 64, 56, 56), 3, 2, 1), {})


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
        source="Yamaguchi et al. 1990; Ranzato et al. 2007",
        case=_case(n),
        **kw,
    )


MAX_POOL1D = _op(max_pool1d, F.max_pool1d, MaxPool1d, "input: *N C L -> *N C L'", 1, bench=bench_1d)
MAX_POOL2D = _op(
    max_pool2d,
    F.max_pool2d,
    MaxPool2d,
    "input: *N C H W -> *N C H' W'",
    2,
    bench={"2×2": bench_2x2, "3×3, stride 2": bench_3x3},
)
MAX_POOL3D = _op(
    max_pool3d,
    F.max_pool3d,
    MaxPool3d,
    "input: *N C D H W -> *N C D' H' W'",
    3,
    autocast={"cpu": "float32"},
    bench=bench_3d,
)
OPS = (MAX_POOL1D, MAX_POOL2D, MAX_POOL3D)
