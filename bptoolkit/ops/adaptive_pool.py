"""Adaptive average and max pooling: the number of windows is given, their sizes follow.

Maths     window j of Y over X positions: ⌊jX/Y⌋ ≤ m < ⌈(j+1)X/Y⌉, of length L[j]; a product of windows in several dimensions

          average   y[j] = Σ_{m in j} x[m] / L[j]
                    dx[m] = Σ_{j: m in j} dy[j] / L[j]
                    ⌊jX/Y⌋ ≤ m means jX < (m+1)Y, that is j < ⌈(m+1)Y/X⌉, and m < ⌈(j+1)X/Y⌉ means j ≥ ⌊mY/X⌋: m lies in
                    the windows ⌊mY/X⌋ ≤ j < ⌈(m+1)Y/X⌉. The transpose has windows of the same kind, X of them over Y:
                    where Y ≤ X these hold one or two elements, one if Y divides X
          max       y[j] = x[i[j]], i[j] the place of the largest element of window j
                    dx[m] = Σ_{j: i[j] = m} dy[j]
Letters   m runs over the input's positions (X), j over the output's (Y), an index per dimension; i is flat over X; dt is the
          gradient of the loss by t
Numerics  the average keeps nothing, max keeps i; half gradients are added in float32; of equal maxima the first gets the
          gradient, and NaN is larger than everything; channels_last goes through
Source    He et al., "Spatial pyramid pooling in deep convolutional networks", ECCV 2014, §2.2 (windows ⌊⌋ to ⌈⌉ in §3.1);
          Lin et al., "Network in network", ICLR 2014, §3.2 (one window)
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
from bptoolkit.ops.windows import by_samples, check_input, layout, repeat, scatter, spread
from bptoolkit.precision import wide

AVERAGES = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
MAXIMA = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)


def avg_forward(x, windows, size, last):
    return AVERAGES[len(size) - 1](x, windows)  # *B Y


def avg_backward(dy, windows, size, last):
    def formula(g):  # R Y, or R Y C
        g = wide(g)
        if whole and (last or max(windows) == 1):
            return repeat(g / (prod(size) // prod(windows)), size)
        for k in reversed(range(len(size))):
            g = adaptive_spread(g, 1 + k, size[k])
        return g

    whole = all(divides(Y, X) for X, Y in zip(size, windows))
    return by_samples(formula, dy, size, last)  # *B X


def adaptive_spread(g, dim, X):
    """Σ g[j] / L[j] over the windows of one dimension that hold each of its X positions."""
    Y = g.shape[dim]
    if type(X) is int and X == Y:
        return g
    if divides(Y, X):
        return spread(g / (X // Y), dim, X // Y, X // Y, 0, X)
    if Y % X:  # else windows of one element each
        start, stop = bounds(Y, X, g.device)
        g = g / (stop - start).to(g.dtype).reshape(-1, *(1,) * (g.dim() - 1 - dim))
    zeros = X if Y == 0 else 1
    h = F.pad(g, (0, 0) * (g.dim() - 1 - dim) + (0, zeros))  # h[Y] = 0
    if Y == 0:
        return h
    start, stop = bounds(X, Y, g.device)
    most = Y // X if Y % X == 0 else Y // X + 2  # windows that hold a position
    return sum(h.index_select(dim, torch.where(start + t < stop, start + t, Y)) for t in range(1, most)) + h.index_select(
        dim, start
    )


def divides(Y, X):
    """Whether X positions fall into Y windows of one size; a graph for any X does not ask, and takes what is right for all."""
    return type(X) is int and Y > 0 and X % Y == 0


def bounds(Y, X, device):
    """Where each of Y windows over X positions starts and stops."""
    j = torch.arange(Y, device=device)
    return j * X // Y, ((j + 1) * X + Y - 1) // Y


AVG_RULE = Rule("adaptive_avg_pool", avg_forward, avg_backward, inputs="x", outputs="y")


def max_forward(x, windows, size, last):
    return MAXIMA[len(size) - 1](x, windows, return_indices=True)  # *B Y, *B Y


def max_backward(dy, i, windows, size, last):
    return scatter(dy, i, size, last, add=not all(divides(Y, X) for X, Y in zip(size, windows)))  # *B X


MAX_RULE = Rule("adaptive_max_pool", max_forward, max_backward, inputs="x", outputs="y i", constants="i")


def _windows(op: Op, n: int, x: Tensor, output_size: Any, channels: bool) -> tuple[int, ...]:
    """How many windows each dimension gets."""
    check_input(op, n, x, channels)
    sizes = (output_size,) * n if isinstance(output_size, int) else output_size
    good = isinstance(sizes, (tuple, list)) and len(sizes) == n
    if good and n > 1:
        sizes = [X if Y is None else Y for X, Y in zip(x.shape[-n:], sizes)]
    if not good or not all(isinstance(Y, int) and Y >= 0 for Y in sizes):
        kinds = "ints of at least 0" if n == 1 else "ints of at least 0 or None"
        raise ValueError(f"{op.name}: output_size={output_size!r} must be an int of at least 0, or {n} {kinds}")
    return tuple(sizes)


def _avg(op: Op, n: int, x: Tensor, output_size: Any, backend: str) -> Tensor:
    (x,) = op.cast(x)
    args = (x, _windows(op, n, x, output_size, False), *layout(n, x))
    return AVG_RULE(*args, backend=op.pick(AVG_RULE, backend, *args))


def _max(op: Op, n: int, x: Tensor, output_size: Any, return_indices: bool, backend: str) -> Any:
    (x,) = op.cast(x)
    args = (x, _windows(op, n, x, output_size, True), *layout(n, x))
    y, i = MAX_RULE(*args, backend=op.pick(MAX_RULE, backend, *args))
    return (y, i) if return_indices else y


def adaptive_avg_pool1d(input: Tensor, output_size: Any, *, backend: str = "auto") -> Tensor:
    """Means of windows, as `torch.nn.functional.adaptive_avg_pool1d`; arguments and errors as `adaptive_avg_pool2d`.

    Input (N, C, L) or (C, L); output_size an int or a tuple of one.
    """
    return _avg(ADAPTIVE_AVG_POOL1D, 1, input, output_size, backend)


def adaptive_avg_pool2d(input: Tensor, output_size: Any, *, backend: str = "auto") -> Tensor:
    """Means of windows, as `torch.nn.functional.adaptive_avg_pool2d`.

    Args:
        input: (N, C, H, W), or unbatched (C, H, W), floating point.
        output_size: the number of windows H', W': one int for both, or two, where None stands for the input's size.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (N, C, H', W') or (C, H', W'); channels_last as the input.

    Raises:
        ValueError: shapes or sizes disagree, a size of the input is 0, or the named backend cannot run the call.
        TypeError: the input is not a tensor of floating point.
    """
    return _avg(ADAPTIVE_AVG_POOL2D, 2, input, output_size, backend)


def adaptive_avg_pool3d(input: Tensor, output_size: Any, *, backend: str = "auto") -> Tensor:
    """Means of windows, as `torch.nn.functional.adaptive_avg_pool3d`; arguments and errors as `adaptive_avg_pool2d`.

    Input (N, C, D, H, W) or (C, D, H, W).
    """
    return _avg(ADAPTIVE_AVG_POOL3D, 3, input, output_size, backend)


def adaptive_max_pool1d(input: Tensor, output_size: Any, return_indices: bool = False, *, backend: str = "auto") -> Any:
    """Maxima of windows, as `torch.nn.functional.adaptive_max_pool1d`; arguments and errors as `adaptive_max_pool2d`.

    Input (N, C, L) or (C, L); output_size an int or a tuple of one.
    """
    return _max(ADAPTIVE_MAX_POOL1D, 1, input, output_size, return_indices, backend)


def adaptive_max_pool2d(input: Tensor, output_size: Any, return_indices: bool = False, *, backend: str = "auto") -> Any:
    """Maxima of windows, as `torch.nn.functional.adaptive_max_pool2d`.

    Args:
        input: (N, C, H, W), or unbatched (C, H, W), floating point.
        output_size: the number of windows H', W': one int for both, or two, where None stands for the input's size.
        return_indices: return the places of the maxima too.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (N, C, H', W') or (C, H', W'); channels_last as the input. With return_indices a pair, the second of int64: places in
        the flattened H W.

    Raises:
        ValueError: shapes or sizes disagree, a size of the input other than N is 0, or the named backend cannot run the call.
        TypeError: the input is not a tensor of floating point.
    """
    return _max(ADAPTIVE_MAX_POOL2D, 2, input, output_size, return_indices, backend)


def adaptive_max_pool3d(input: Tensor, output_size: Any, return_indices: bool = False, *, backend: str = "auto") -> Any:
    """Maxima of windows, as `torch.nn.functional.adaptive_max_pool3d`; arguments and errors as `adaptive_max_pool2d`.

    Input (N, C, D, H, W) or (C, D, H, W).
    """
    return _max(ADAPTIVE_MAX_POOL3D, 3, input, output_size, return_indices, backend)


class AdaptiveAvgPool1d(nn.AdaptiveAvgPool1d):
    """`torch.nn.AdaptiveAvgPool1d` with the backward above; same arguments."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`

    def forward(self, input: Tensor) -> Tensor:
        return adaptive_avg_pool1d(input, self.output_size, backend=self.backend)


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """`torch.nn.AdaptiveAvgPool2d` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return adaptive_avg_pool2d(input, self.output_size, backend=self.backend)


class AdaptiveAvgPool3d(nn.AdaptiveAvgPool3d):
    """`torch.nn.AdaptiveAvgPool3d` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return adaptive_avg_pool3d(input, self.output_size, backend=self.backend)


class AdaptiveMaxPool1d(nn.AdaptiveMaxPool1d):
    """`torch.nn.AdaptiveMaxPool1d` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Any:
        return adaptive_max_pool1d(input, self.output_size, self.return_indices, backend=self.backend)


class AdaptiveMaxPool2d(nn.AdaptiveMaxPool2d):
    """`torch.nn.AdaptiveMaxPool2d` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Any:
        return adaptive_max_pool2d(input, self.output_size, self.return_indices, backend=self.backend)


class AdaptiveMaxPool3d(nn.AdaptiveMaxPool3d):
    """`torch.nn.AdaptiveMaxPool3d` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Any:
        return adaptive_max_pool3d(input, self.output_size, self.return_indices, backend=self.backend)


def _case(n: int, indices: bool) -> Any:
    most = {1: 17, 2: 7, 3: 4}[n]

    def case(draw: Draw) -> Case:
        batch = () if draw.random.random() < 0.2 else (draw.size(most=2),)
        x = draw.tensor(*batch, draw.size(least=1, most=3), *(draw.size(least=1, most=most) for _ in range(n)))
        sizes = (1, 2, 3, 4, 5, 9) if n < 3 else (1, 2, 3, 5)
        each: Any = [draw.choice(sizes if n == 1 else (*sizes, None)) for _ in range(n)]
        return Case((x, draw.choice((1, each, each, each))), {"return_indices": draw.flag()} if indices else {})

    return case


def bench_1d(draw: Draw) -> Case:
    return Case((draw.tensor(32, 256, 500), 64), {})


def bench_to_7(draw: Draw) -> Case:
    return Case((draw.tensor(16, 256, 14, 14), 7), {})


def bench_to_6(draw: Draw) -> Case:
    return Case((draw.tensor(16, 256, 14, 14), 6), {})


def bench_global(draw: Draw) -> Case:
    return Case((draw.tensor(32, 512, 14, 14), 1), {})


def bench_3d(draw: Draw) -> Case:
    return Case((draw.tensor(4, 64, 8, 14, 14), (4, 7, 7)), {})


def _op(call: Any, reference: Any, module: Any, n: int, **kw: Any) -> Op:
    sizes = ["D", "H", "W"][-n:] if n > 1 else ["L"]
    indices = "max" in call.__name__
    return Op(
        name=call.__name__,
        call=call,
        reference=reference,
        rules=(MAX_RULE if indices else AVG_RULE,),
        module=(module,),
        replaces=(module.__base__,),
        shapes=f"input: *N C {' '.join(sizes)} -> *N C {' '.join(d + chr(39) for d in sizes)}",
        source="He et al. 2014, §2.2; Lin et al. 2014, §3.2",
        case=_case(n, indices),
        autocast={"cpu": "float32"} if n == 3 else {},
        **kw,
    )


BENCH_2D = {"14 to 7": bench_to_7, "14 to 6": bench_to_6, "global": bench_global}
ADAPTIVE_AVG_POOL1D = _op(adaptive_avg_pool1d, F.adaptive_avg_pool1d, AdaptiveAvgPool1d, 1, bench=bench_1d)
ADAPTIVE_AVG_POOL2D = _op(adaptive_avg_pool2d, F.adaptive_avg_pool2d, AdaptiveAvgPool2d, 2, bench=BENCH_2D)
ADAPTIVE_AVG_POOL3D = _op(adaptive_avg_pool3d, F.adaptive_avg_pool3d, AdaptiveAvgPool3d, 3, bench=bench_3d)
ADAPTIVE_MAX_POOL1D = _op(adaptive_max_pool1d, F.adaptive_max_pool1d, AdaptiveMaxPool1d, 1, bench=bench_1d)
ADAPTIVE_MAX_POOL2D = _op(adaptive_max_pool2d, F.adaptive_max_pool2d, AdaptiveMaxPool2d, 2, bench=BENCH_2D)
ADAPTIVE_MAX_POOL3D = _op(adaptive_max_pool3d, F.adaptive_max_pool3d, AdaptiveMaxPool3d, 3, bench=bench_3d)
OPS = (
    ADAPTIVE_AVG_POOL1D,
    ADAPTIVE_AVG_POOL2D,
    ADAPTIVE_AVG_POOL3D,
    ADAPTIVE_MAX_POOL1D,
    ADAPTIVE_MAX_POOL2D,
    ADAPTIVE_MAX_POOL3D,
)
