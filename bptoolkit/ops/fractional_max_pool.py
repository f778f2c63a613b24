"""Fractional max pooling in two and three dimensions: windows at random steps between 1 and 2 sizes of a fraction.

Maths     y[j] = max_k x[s_j + k]        window j of a dimension starts at s_j = ⌊(j + u) α⌋ − ⌊u α⌋, the last one at X − K;
          i[j] = the position of that maximum                                                      α = (X − K)/(Y − 1)
          dx[m] = Σ_{j: i[j] = m} dy[j]
Letters   j, k, m run over the positions of output (Y), window (K) and input (X), an index per dimension; i is flat over X;
          u between 0 and 1, one per sample, channel and dimension: constants
Numerics  keeps i alone, not x; half gradients are added in float32. Of equal maxima the first gets the gradient; NaN is larger
          than everything
Source    Graham, "Fractional max-pooling", arXiv 1412.6071, section 2
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.op import Op
from bptoolkit.ops.windows import check_input, ints, scatter

KERNELS = {2: torch._C._nn.fractional_max_pool2d, 3: torch._C._nn.fractional_max_pool3d}


def forward(x, u, kernel, Y, X):
    if all(type(s) is int for s in (*X, *x.shape)):
        return KERNELS[len(kernel)](x, kernel, Y, u)  # *B Y, *B Y
    return plain_forward(x, u, kernel, Y, X)


def plain_forward(x, u, kernel, Y, X):
    """The same, a window as K gathered elements; torch's kernel for volumes binds a graph for any size to one."""
    n, (N, C) = len(X), u.shape[:2]
    at, count, size = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=x.device), 1, 1
    for d in range(n):
        r = u[..., 1 - d if n == 2 else d].unsqueeze(-1)  # of images the width has the first, of volumes the depth
        a = (X[d] - kernel[d]) / max(Y[d] - 1, 1)
        starts = ((torch.arange(Y[d] - 1, device=x.device) + r) * a).floor() - (r * a).floor()
        starts = torch.cat((starts.long(), torch.zeros_like(r).long() + (X[d] - kernel[d])), -1)  # N C Y
        places = starts.unsqueeze(-1) + torch.arange(kernel[d], device=x.device)  # N C Y K
        count, size = count * Y[d], size * kernel[d]
        at = (at.unsqueeze(3).unsqueeze(5) * X[d] + places.unsqueeze(2).unsqueeze(4)).reshape(N, C, count, size)
    windows = x.reshape(N, C, prod(X)).gather(2, at.reshape(N, C, count * size)).reshape(at.shape)
    best = windows.max(-1, keepdim=True)[1]
    shape = (*x.shape[: x.dim() - n], *Y)
    return windows.gather(-1, best).reshape(shape), at.gather(-1, best).reshape(shape)


def backward(dy, i, X):
    return scatter(dy, i, X, False, True), None  # *B X


RULE = Rule("fractional_max_pool", forward, backward, inputs="x u", outputs="y i", constants="i")


def _pool(op: Op, n: int, x: Tensor, kernel: Any, size: Any, ratio: Any, return_indices: bool, u: Any, backend: str) -> Any:
    check_input(op, n, x)
    if size is None and ratio is None:
        raise ValueError(f"{op.name}: output_size and output_ratio are both None; one of them is needed")
    X, kernel = tuple(x.shape[-n:]), ints(op.name, "kernel_size", kernel, n, 1)
    if size is None:
        ratios = tuple(ratio) if isinstance(ratio, (tuple, list)) else (ratio,) * n
        if len(ratios) != n:
            raise ValueError(f"{op.name}: output_ratio={ratio!r} must be one number, or one for each of the {n} dimensions")
        size = [torch.sym_int(s * r) for s, r in zip(X, ratios)]
    Y = ints(op.name, "output_size", size, n, 1)
    for s, k, y in zip(X, kernel, Y):
        least = y + k - int(n == 2)  # torch's kernel for volumes asks for one more
        if s < least:
            found = f"kernel_size={kernel} and output_size={Y}"
            raise ValueError(f"{op.name}: {found} need an input of at least size {least}, not {tuple(x.shape)}")
    wanted = (1 if x.dim() == n + 1 else x.shape[0], x.shape[-n - 1], n)
    if u is None:
        u = torch.rand(wanted, dtype=x.dtype, device=x.device)
    u = u[: wanted[0]]  # torch takes more rows than there are samples
    if tuple(u.shape) != wanted or u.dtype != x.dtype or u.device != x.device:
        raise ValueError(
            f"{op.name}: _random_samples has shape {tuple(u.shape)} and {u.dtype} on {u.device}; "
            f"it needs {wanted} and the input's {x.dtype} on {x.device}"
        )
    x, u = op.cast(x, u.detach())
    args = (x, u, kernel, Y, X)
    y, i = RULE(*args, backend=op.pick(RULE, backend, *args))
    return (y, i) if return_indices else y


def fractional_max_pool2d(
    input: Tensor,
    kernel_size: Any,
    output_size: Any = None,
    output_ratio: Any = None,
    return_indices: bool = False,
    _random_samples: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Any:
    """The largest element of each window, windows at random steps, as `torch.nn.functional.fractional_max_pool2d`.

    Args:
        input: (N, C, H, W), or unbatched (C, H, W), floating point.
        kernel_size: the size of a window, one int or one per dimension.
        output_size: the size of the output, likewise.
        output_ratio: instead, the output's size as a share of the input's: a number, or one per dimension.
        return_indices: return the places of the maxima too.
        _random_samples: (N, C, 2) of input's dtype, between 0 and 1: where the windows lie. None draws it from torch's
            generator, as torch does.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (N, C, H', W') or (C, H', W'). With return_indices a pair, the second of int64: places in the flattened H W.

    Raises:
        ValueError: shapes or options disagree, no output_size and no output_ratio is given, or the windows do not fit.
        TypeError: the input is not a tensor of floating point.
    """
    options = (kernel_size, output_size, output_ratio, return_indices, _random_samples)
    return _pool(POOL2D, 2, input, *options, backend)


def fractional_max_pool3d(
    input: Tensor,
    kernel_size: Any,
    output_size: Any = None,
    output_ratio: Any = None,
    return_indices: bool = False,
    _random_samples: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Any:
    """The same of volumes, as torch's function of this name; arguments and errors as `fractional_max_pool2d`.

    Input (N, C, D, H, W) or (C, D, H, W); _random_samples (N, C, 3).
    """
    options = (kernel_size, output_size, output_ratio, return_indices, _random_samples)
    return _pool(POOL3D, 3, input, *options, backend)


def _module_forward(call: Any, m: Any, input: Tensor) -> Any:
    options = (m.kernel_size, m.output_size, m.output_ratio, m.return_indices)
    return call(input, *options, _random_samples=m._random_samples, backend=m.backend)


class FractionalMaxPool2d(nn.FractionalMaxPool2d):
    """`torch.nn.FractionalMaxPool2d` with the backward above; same arguments."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`

    def forward(self, input: Tensor) -> Any:
        return _module_forward(fractional_max_pool2d, self, input)


class FractionalMaxPool3d(nn.FractionalMaxPool3d):
    """`torch.nn.FractionalMaxPool3d` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Any:
        return _module_forward(fractional_max_pool3d, self, input)


def reference(input, kernel_size, output_size, output_ratio=None, return_indices=False, _random_samples=None):
    """Elements gathered at torch's indices: torch has no second derivative."""
    n = len(output_size)
    call = getattr(nn.functional, f"fractional_max_pool{n}d")
    _, i = call(input.detach(), kernel_size, output_size, return_indices=True, _random_samples=_random_samples)
    y = input.flatten(-n).gather(-1, i.flatten(-n)).reshape(i.shape)
    return (y, i) if return_indices else y


def case_of(n: int) -> Any:
    def case(draw: Draw) -> Case:
        spare = n - 2  # see _pool
        X = [draw.size(least=1 + spare, most=8 if n == 2 else 5) for _ in range(n)]
        kernel = [draw.random.randint(1, min(s - spare, 3)) for s in X]
        size = [draw.random.randint(1, s - spare - k + 1) for s, k in zip(X, kernel)]
        batch, C = () if draw.random.random() < 0.2 else (draw.size(most=2),), draw.size(least=1, most=3)
        u = torch.rand(prod(batch), C, n, generator=draw.generator, dtype=torch.float64).to(draw.device, draw.dtype)
        kwargs = {"return_indices": draw.flag(), "_random_samples": u}
        return Case((draw.tensor(*batch, C, *X), kernel, size), kwargs)

    return case


def bench_of(*shape: int) -> Any:
    n = len(shape) - 2

    def bench(draw: Draw) -> Case:
        u = torch.rand(*shape[:2], n, generator=draw.generator).to(draw.device, draw.dtype)
        return Case((draw.tensor(*shape), 2), {"output_size": [s * 7 // 10 for s in shape[2:]], "_random_samples": u})

    return bench


def _op(n: int, call: Any, module: Any, shapes: str, bench: Any, **kw: Any) -> Op:
    return Op(
        name=call.__name__,
        call=call,
        reference=reference,
        peer=getattr(nn.functional, call.__name__),
        rules=(RULE,),
        module=(module,),
        replaces=(module.__base__,),
        shapes=shapes,
        source="Graham 2014, §2",
        autocast={"cpu": "float32"},
        case=case_of(n),
        bench=bench,
        **kw,
    )


POOL2D = _op(2, fractional_max_pool2d, FractionalMaxPool2d, "input: *N C H W -> *N C H' W'", bench_of(8, 64, 56, 56))
POOL3D = _op(3, fractional_max_pool3d, FractionalMaxPool3d, "input: *N C D H W -> *N C D' H' W'", bench_of(2, 16, 16, 56, 56))
OPS = (POOL2D, POOL3D)
