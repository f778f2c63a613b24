"""Max unpooling: maxima go back to the places they were taken from, zeros elsewhere.

Maths     y[i[j]] = x[j], and y[m] = 0 where no i[j] is m
          dx[j] = dy[i[j]]
          max_pool with the roles of forward and backward exchanged
Letters   j runs over the input's positions (X), m over the output's (Y), an index per dimension; i is flat over Y; dt is the
          gradient of the loss by t
Numerics  keeps i alone. Where several i[j] are one place (windows that overlapped) one of the values is kept, and each of
          them gets the gradient of the place, both as in torch; channels_last goes through
Source    Zeiler & Fergus, "Visualizing and understanding convolutional networks", ECCV 2014, §2.1
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
from bptoolkit.ops.conv import _ints as ints
from bptoolkit.ops.windows import check_input, gather, layout, scatter


def forward(x, i, size, last):
    return scatter(x, i, size, last, add=False)  # *B Y


def backward(dy, i, size, last, need):
    return gather(dy, i, len(size), last) if need.x else None, None  # *B X


RULE = Rule("max_unpool", forward, backward, inputs="x i", outputs="y")


def _unpool(op: Op, n: int, x: Tensor, i: Tensor, options: Any, output_size: Any, backend: str) -> Tensor:
    (x,) = op.cast(x)
    check_input(op, n, x)
    name = op.name
    if not isinstance(i, Tensor) or i.dtype != torch.int64:
        raise TypeError(f"{name}: indices must be a tensor of int64, not {i.dtype if isinstance(i, Tensor) else repr(i)}")
    if i.shape != x.shape:
        raise ValueError(f"{name}: indices have shape {tuple(i.shape)} but input {tuple(x.shape)}; they must be equal")
    if i.device != x.device:
        raise ValueError(f"{name}: indices are on {i.device} but input is on {x.device}; they must be on one device")
    args = (x, i, _size(name, n, x, options, output_size), layout(n, x)[1])
    return RULE(*args, backend=op.pick(RULE, backend, *args))


def _size(name: str, n: int, x: Tensor, options: Any, output_size: Any) -> tuple[int, ...]:
    """The output's n sizes: those that a max pooling with these options would have taken to x's."""
    kernel, stride, padding = options
    kernel = ints(name, "kernel_size", kernel, n, 1)
    stride = kernel if stride is None else ints(name, "stride", stride, n, 1)
    padding = ints(name, "padding", padding, n, 0)
    size = tuple((X - 1) * s + k - 2 * p for X, k, s, p in zip(x.shape[-n:], kernel, stride, padding))
    if output_size is not None:
        wanted = tuple(output_size)[-n:]
        if len(output_size) not in (n, n + 2) or not all(d - s < w < d + s for w, d, s in zip(wanted, size, stride)):
            raise ValueError(f"{name}: output_size={tuple(output_size)} must be {n} sizes, each less than {stride} from {size}")
        size = wanted
    if any(Y < 0 for Y in size):
        raise ValueError(f"{name}: kernel_size={kernel}, stride={stride} and padding={padding} give an output of {size}")
    return size


def max_unpool1d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    output_size: Any = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Maxima back in their places, as `torch.nn.functional.max_unpool1d`; arguments and errors as `max_unpool2d`.

    Input (N, C, L) or (C, L).
    """
    return _unpool(MAX_UNPOOL1D, 1, input, indices, (kernel_size, stride, padding), output_size, backend)


def max_unpool2d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    output_size: Any = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Maxima back in their places and zeros elsewhere, as `torch.nn.functional.max_unpool2d`.

    Args:
        input: (N, C, H, W), or unbatched (C, H, W), floating point.
        indices: likewise, int64: places in the flattened output, as `max_pool2d` with return_indices gives them.
        kernel_size: of the pooling that is undone, one int or one per dimension.
        stride: likewise; None for the size of a window.
        padding: likewise.
        output_size: the output's sizes (H', W'), or all of its shape, where the stride leaves several possible.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (N, C, H', W') or (C, H', W'), H' = (H − 1) stride + kH − 2 padding unless it is given; channels_last as the input.

    Raises:
        ValueError: shapes, options or devices disagree, or the named backend cannot run the call.
        TypeError: the input is not a tensor of floating point, or the indices not of int64.
        RuntimeError: an index lies outside the output.
    """
    return _unpool(MAX_UNPOOL2D, 2, input, indices, (kernel_size, stride, padding), output_size, backend)


def max_unpool3d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    output_size: Any = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Maxima back in their places, as `torch.nn.functional.max_unpool3d`; arguments and errors as `max_unpool2d`.

    Input (N, C, D, H, W) or (C, D, H, W).
    """
    return _unpool(MAX_UNPOOL3D, 3, input, indices, (kernel_size, stride, padding), output_size, backend)


class MaxUnpool1d(nn.MaxUnpool1d):
    """`torch.nn.MaxUnpool1d` with the backward above; same arguments."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`

    def forward(self, input: Tensor, indices: Tensor, output_size: Any = None) -> Tensor:
        options = (self.kernel_size, self.stride, self.padding, output_size)
        return max_unpool1d(input, indices, *options, backend=self.backend)


class MaxUnpool2d(nn.MaxUnpool2d):
    """`torch.nn.MaxUnpool2d` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor, indices: Tensor, output_size: Any = None) -> Tensor:
        options = (self.kernel_size, self.stride, self.padding, output_size)
        return max_unpool2d(input, indices, *options, backend=self.backend)


class MaxUnpool3d(nn.MaxUnpool3d):
    """`torch.nn.MaxUnpool3d` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor, indices: Tensor, output_size: Any = None) -> Tensor:
        options = (self.kernel_size, self.stride, self.padding, output_size)
        return max_unpool3d(input, indices, *options, backend=self.backend)


def _case(n: int) -> Any:
    most = {1: 9, 2: 4, 3: 3}[n]

    def case(draw: Draw) -> Case:
        batch = () if draw.random.random() < 0.2 else (draw.size(most=2),)
        x = draw.tensor(*batch, draw.size(least=1, most=3), *(draw.size(least=1, most=most) for _ in range(n)))
        stride, padding = draw.choice((2, 3)), draw.choice((0, 0, 1))
        kernel = stride + padding
        size = [(X - 1) * stride + kernel - 2 * padding + draw.choice((0, 1)) for X in x.shape[-n:]]
        lead = prod(x.shape[:-n])
        order = torch.rand(lead, prod(size), generator=draw.generator).argsort(1)  # each place at most once
        i = order[:, : prod(x.shape[-n:])].reshape(x.shape).to(x.device)
        return Case((x, i, kernel, stride, padding, size), {})

    return case


def _bench(*shape: int) -> Any:
    def bench(draw: Draw) -> Case:
        pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(shape) - 3]
        y, i = pool(draw.tensor(*shape).detach(), 2, return_indices=True)
        return Case((y.requires_grad_(), i, 2), {})

    return bench


def _op(call: Any, reference: Any, module: Any, letters: str, bench: Any) -> Op:
    return Op(
        name=call.__name__,
        call=call,
        reference=reference,
        rules=(RULE,),
        module=(module,),
        replaces=(module.__base__,),
        shapes=f"input: *N C {letters} -> *N C {' '.join(d + chr(39) for d in letters.split())}",
        source="Zeiler & Fergus 2014, §2.1",
        autocast={"cpu": "float32"},
        case=_case(len(letters.split())),
        bench=bench,
    )


MAX_UNPOOL1D = _op(max_unpool1d, F.max_unpool1d, MaxUnpool1d, "L", _bench(32, 64, 2048))
MAX_UNPOOL2D = _op(max_unpool2d, F.max_unpool2d, MaxUnpool2d, "H W", _bench(16, 64, 56, 56))
MAX_UNPOOL3D = _op(max_unpool3d, F.max_unpool3d, MaxUnpool3d, "D H W", _bench(4, 32, 16, 28, 28))
OPS = (MAX_UNPOOL1D, MAX_UNPOOL2D, MAX_UNPOOL3D)
