"""Softmax, log-softmax and softmin along one dimension.

Maths     softmax      y_c = e^x_c / Σ_k e^x_k          dx = y ∘ (dy − Σ_c y_c dy_c)
          log_softmax  y_c = x_c − log Σ_k e^x_k        dx = dy − e^y Σ_c dy_c
          softmin      y_c = e^−x_c / Σ_k e^−x_k        dx = −y ∘ (dy − Σ_c y_c dy_c), softmax at −x
          All follow from ∂ log Σ_k e^x_k / ∂x_c = e^x_c / Σ_k e^x_k.
Letters   c, k run over dimension `dim` (C), all others (*B) stand by; dt is the gradient of the loss by t
Numerics  only the output is kept; half tensors are computed in float32; a row of −∞ alone is NaN, as in torch
Source    Bridle, "Probabilistic interpretation of feedforward classification network outputs", 1990
"""

from __future__ import annotations

import warnings
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.blocks import by_rows
from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.op import FLOAT32_CUDA, Op
from bptoolkit.precision import wide


def softmax_forward(x, dim):
    return torch.softmax(x, dim)


def softmax_backward(dy, y, dim):
    def rule(y, dy, dim):
        y_, dy_ = wide(y), wide(dy)
        return (y_ * (dy_ - (y_ * dy_).sum(dim, keepdim=True))).to(dy.dtype)

    return along(rule, y, dy, dim)


def log_softmax_forward(x, dim):
    return torch.log_softmax(x, dim)


def log_softmax_backward(dy, y, dim):
    def rule(y, dy, dim):
        y_, dy_ = wide(y), wide(dy)
        return (dy_ - y_.exp() * dy_.sum(dim, keepdim=True)).to(dy.dtype)

    return along(rule, y, dy, dim)


def softmin_forward(x, dim):
    return torch.softmax(-x, dim)


def softmin_backward(dy, y, dim):
    return softmax_backward(-dy, y, dim)


def along(rule, y, dy, dim):
    """rule(y, dy, dim), where what stands before `dim` is rows that may be taken block by block."""
    d = dim % max(y.dim(), 1)
    if d == 0:
        return rule(y, dy, dim)
    if d == 1:
        return by_rows(lambda y, dy: rule(y, dy, 1), y, dy)
    rows = (prod(y.shape[:d]), *y.shape[d:])  # R C *I
    return by_rows(lambda y, dy: rule(y, dy, 1), y.reshape(rows), dy.reshape(rows)).reshape(y.shape)


def softmax_kernel():
    from bptoolkit.triton_kernels.softmax import SOFTMAX

    return SOFTMAX


def log_softmax_kernel():
    from bptoolkit.triton_kernels.softmax import LOG_SOFTMAX

    return LOG_SOFTMAX


def softmin_kernel():
    from bptoolkit.triton_kernels.softmax import SOFTMIN

    return SOFTMIN


SOFTMAX_RULE = Rule("softmax", softmax_forward, softmax_backward, inputs="x", outputs="y", kernel=softmax_kernel)
LOG_SOFTMAX_RULE = Rule(
    "log_softmax", log_softmax_forward, log_softmax_backward, inputs="x", outputs="y", kernel=log_softmax_kernel
)
SOFTMIN_RULE = Rule("softmin", softmin_forward, softmin_backward, inputs="x", outputs="y", kernel=softmin_kernel)


def _prepared(op: Op, x: Tensor, dim: int | None, dtype: torch.dtype | None, stacklevel: int) -> tuple[Tensor, int]:
    """The input in the dtype asked for, and the dimension; raises for arguments that are not right."""
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"{op.name}: dtype={dtype} is not of floating point")
    if dtype is not None and isinstance(x, Tensor):
        x = x.to(dtype)
    else:
        (x,) = op.cast(x)
    op.check(x)
    if dim is None:
        warnings.warn(
            f"Implicit dimension choice for {op.name} has been deprecated. Change the call to include dim=X as an argument.",
            stacklevel=stacklevel,
        )
        dim = 0 if x.dim() in (0, 1, 3) else 1
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"{op.name}: dim={dim!r} is not an int")
    n = max(x.dim(), 1)
    if not -n <= dim < n:
        raise ValueError(f"{op.name}: dim={dim} is outside [{-n}, {n - 1}], the range for input of shape {tuple(x.shape)}")
    return x, dim


def softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Y = e^x / Σ e^x along a dimension, as `torch.nn.functional.softmax`.

    Args:
        input: (*B), floating point; of any dtype if `dtype` is given.
        dim: the dimension along which the result sums to 1. None is deprecated: 0 for inputs of 0, 1 or 3 dimensions, else 1.
        dtype: what to cast the input to first.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B), of the input's dtype or `dtype`.

    Raises:
        TypeError: the input or `dtype` is not of floating point, or `dim` is not an int.
        ValueError: `dim` is out of range, or the named backend cannot run the call.
    """
    input, dim = _prepared(SOFTMAX, input, dim, dtype, _stacklevel)
    return SOFTMAX_RULE(input, dim, backend=SOFTMAX.pick(SOFTMAX_RULE, backend, input, dim))


def log_softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Y = x − log Σ e^x along a dimension, as `torch.nn.functional.log_softmax`; arguments and errors as `softmax`."""
    input, dim = _prepared(LOG_SOFTMAX, input, dim, dtype, _stacklevel)
    return LOG_SOFTMAX_RULE(input, dim, backend=LOG_SOFTMAX.pick(LOG_SOFTMAX_RULE, backend, input, dim))


def softmin(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Y = e⁻ˣ / Σ e⁻ˣ along a dimension, as `torch.nn.functional.softmin`; arguments and errors as `softmax`."""
    input, dim = _prepared(SOFTMIN, input, dim, dtype, _stacklevel)
    return SOFTMIN_RULE(input, dim, backend=SOFTMIN.pick(SOFTMIN_RULE, backend, input, dim))


class Softmax(nn.Softmax):
    """`torch.nn.Softmax` with the backward above; same arguments."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`

    def forward(self, input: Tensor) -> Tensor:
        return softmax(input, self.dim, _stacklevel=5, backend=self.backend)


class Softmax2d(nn.Softmax2d):
    """`torch.nn.Softmax2d` with the backward above."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() not in (3, 4):
            raise ValueError(f"Softmax2d: input has shape {tuple(input.shape)}; it needs (N, C, H, W) or (C, H, W)")
        return softmax(input, -3, backend=self.backend)


class LogSoftmax(nn.LogSoftmax):
    """`torch.nn.LogSoftmax` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return log_softmax(input, self.dim, _stacklevel=5, backend=self.backend)


class Softmin(nn.Softmin):
    """`torch.nn.Softmin` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return softmin(input, self.dim, _stacklevel=5, backend=self.backend)


def case(draw: Draw) -> Case:
    shape = (*draw.batch(), draw.size())
    return Case((draw.tensor(*shape), draw.choice(range(-len(shape), len(shape)))), {})


def bench(draw: Draw) -> Case:
    return Case((draw.tensor(4096, 1024), -1), {})


SOFTMAX = Op(
    name="softmax",
    call=softmax,
    reference=F.softmax,
    rules=(SOFTMAX_RULE,),
    module=(Softmax, Softmax2d),
    replaces=(nn.Softmax, nn.Softmax2d),
    shapes="input: *B -> *B",
    source="Bridle 1990",
    autocast=FLOAT32_CUDA,
    case=case,
    bench=bench,
)
LOG_SOFTMAX = Op(
    name="log_softmax",
    call=log_softmax,
    reference=F.log_softmax,
    rules=(LOG_SOFTMAX_RULE,),
    module=(LogSoftmax,),
    replaces=(nn.LogSoftmax,),
    shapes="input: *B -> *B",
    source="Bridle 1990",
    autocast=FLOAT32_CUDA,
    case=case,
    bench=bench,
)
SOFTMIN = Op(
    name="softmin",
    call=softmin,
    reference=F.softmin,
    rules=(SOFTMIN_RULE,),
    module=(Softmin,),
    replaces=(nn.Softmin,),
    shapes="input: *B -> *B",
    source="Bridle 1990",
    autocast=FLOAT32_CUDA,
    case=case,
    bench=bench,
)
OPS = (SOFTMAX, LOG_SOFTMAX, SOFTMIN)
