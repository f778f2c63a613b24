"""Padding: constant, reflect, replicate and circular; negative sizes cut off.

Maths     y[m] = x[source(m)] for m = −lo … X + hi − 1, in each padded dimension; inside, source(m) = m. Outside it is
          constant    nothing: y[m] = value                  reflect     |m|, or 2 (X − 1) − m at the end
          replicate   0, or X − 1                            circular    m mod X

          A gather, so its backward is the scatter dx[i] = Σ_{source(m) = i} dy[m]: the inside of dy, and on it
          constant    nothing
          reflect     dx[1 … lo] += dy[−1 … −lo]             dx[X − 1 − hi … X − 2] += dy[X + hi − 1 … X]
          replicate   dx[0] += Σ dy[−lo … −1]                dx[X − 1] += Σ dy[X … X + hi − 1]
          circular    dx[X − lo … X − 1] += dy[−lo … −1]     dx[0 … hi − 1] += dy[X … X + hi − 1]
          one dimension after the other, since the sources of the dimensions are independent. Where lo or hi is negative, y does
          not see the first −lo (last −hi) of x, and their gradient is 0.
Letters   x input, y output, X the size of x in a dimension, m and i positions in it; lo and hi what is added before and after
Numerics  half tensors are summed in float32; nothing is kept for backward
Source    Dumoulin & Visin, arXiv 1603.07285, §2 (zeros); the chain rule for a gather
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.op import Op
from bptoolkit.precision import wide

MODES = ("constant", "reflect", "replicate", "circular")


def forward(x, pad, mode, value):
    return F.pad(x, pad, mode, value)


def backward(dy, pad, mode, value):
    if mode == "constant" and any(p < 0 for p in pad):
        return F.pad(dy, [-p for p in pad])
    if mode == "constant":
        return inside(dy, pad)
    return folded(wide(dy), pad, mode, len(pad) // 2).to(dy.dtype)


def inside(dy, pad):
    for k in range(len(pad) // 2):
        dim = dy.dim() - 1 - k
        dy = dy.narrow(dim, pad[2 * k], dy.shape[dim] - pad[2 * k] - pad[2 * k + 1])
    return dy


def folded(dy, pad, mode, n):
    """Dy with the borders of its last n dimensions added to where they came from. The inside is copied once, at the end."""
    if n == 0:
        return dy.clone()
    dim, lo, hi = dy.dim() - n, pad[2 * n - 2], pad[2 * n - 1]
    Y = dy.shape[dim]
    dx = folded(dy.narrow(dim, max(lo, 0), Y - max(lo, 0) - max(hi, 0)), pad, mode, n - 1)
    if lo < 0 or hi < 0:  # what y does not see
        dx = F.pad(dx, [0, 0] * (n - 1) + [max(-lo, 0), max(-hi, 0)])
    X = dx.shape[dim]
    if lo > 0:
        before = folded(dy.narrow(dim, 0, lo), pad, mode, n - 1)
        if mode == "reflect":
            dx.narrow(dim, 1, lo).add_(before.flip(dim))
        elif mode == "replicate":
            dx.narrow(dim, 0, 1).add_(before if lo == 1 else before.sum(dim, keepdim=True))
        else:
            dx.narrow(dim, X - lo, lo).add_(before)
    if hi > 0:
        after = folded(dy.narrow(dim, Y - hi, hi), pad, mode, n - 1)
        if mode == "reflect":
            dx.narrow(dim, X - 1 - hi, hi).add_(after.flip(dim))
        elif mode == "replicate":
            dx.narrow(dim, X - 1, 1).add_(after if hi == 1 else after.sum(dim, keepdim=True))
        else:
            dx.narrow(dim, 0, hi).add_(after)
    return dx


RULE = Rule("pad", forward, backward, inputs="x", outputs="y")


def pad(input: Tensor, pad: Any, mode: str = "constant", value: float | None = None, *, backend: str = "auto") -> Tensor:
    """Add to the borders of a tensor, or cut them off, as `torch.nn.functional.pad`.

    Args:
        input: (*B), floating point.
        pad: (lo, hi) of the last dimension, then of the one before, and so on; negative ones cut off. For the modes other than
            "constant" the last 1, 2 or 3 dimensions of an input with 1 or 2 more.
        mode: "constant", "reflect", "replicate" or "circular".
        value: the constant, 0 if None; only with mode="constant".
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B), each padded dimension X now X + lo + hi.

    Raises:
        ValueError: the padding does not fit the shape or the mode, or the named backend cannot run the call.
        TypeError: the input is not a tensor of floating point.
    """
    if mode in ("reflect", "replicate") and isinstance(input, Tensor) and input.is_cpu:
        (input,) = OP.cast(input)
    OP.check(input)
    _check(input, pad, mode, value)
    pad, value = tuple(pad), 0.0 if value is None else value
    if mode == "circular" and any(p < 0 for p in pad):  # torch cuts off first; what is left is then periodic
        cut = tuple(min(p, 0) for p in pad)
        input = RULE(input, cut, "constant", 0.0, backend=OP.pick(RULE, backend, input))
        pad = tuple(max(p, 0) for p in pad)
    if mode != "constant":
        value = None
    return RULE(input, pad, mode, value, backend=OP.pick(RULE, backend, input))


def _check(x: Tensor, pad: Any, mode: str, value: float | None) -> None:
    """Raise where the padding is not possible."""
    if mode not in MODES:
        raise ValueError(f"pad: mode={mode!r} is not known; choose from {', '.join(map(repr, MODES))}")
    ints = isinstance(pad, (tuple, list, torch.Size)) and not any(isinstance(p, (float, str, Tensor)) for p in pad)
    if not ints or len(pad) % 2 or len(pad) > 2 * x.dim():
        raise ValueError(
            f"pad: pad={pad!r} must be an even number of ints, two for each of up to {x.dim()} dimensions of input "
            f"{tuple(x.shape)}"
        )
    n = len(pad) // 2
    if mode != "constant":
        if value is not None and value != 0:
            raise ValueError(f"pad: value={value!r} has no meaning with mode={mode!r}; leave it out")
        if n not in (1, 2, 3) or x.dim() not in (n + 1, n + 2):
            raise ValueError(
                f"pad: mode={mode!r} pads the last 1, 2 or 3 dimensions of an input with 1 or 2 dimensions more; input has "
                f"shape {tuple(x.shape)} and pad={pad!r}"
            )
    for k in range(n):
        dim, lo, hi = x.dim() - 1 - k, pad[2 * k], pad[2 * k + 1]
        X = x.shape[dim]
        left = X + min(lo, 0) + min(hi, 0)
        if left < 0 or (mode != "constant" and X + lo + hi < 1):
            raise ValueError(f"pad: pad={pad!r} cuts more off dimension {dim} of input {tuple(x.shape)} than there is")
        if mode != "constant":
            most = X - 1 if mode == "reflect" else left
            if (mode != "replicate" and max(lo, hi) > most) or X < 1:
                raise ValueError(
                    f"pad: mode={mode!r} can pad dimension {dim} of input {tuple(x.shape)} by up to {most}, not by {pad!r}"
                )


def _module_forward(module: Any, input: Tensor, mode: str, value: float | None = None) -> Tensor:
    return pad(input, module.padding, mode, value, backend=module.backend)


class ConstantPad1d(nn.ConstantPad1d):
    """`torch.nn.ConstantPad1d` with the backward above; same arguments."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`

    def forward(self, input: Tensor) -> Tensor:
        return _module_forward(self, input, "constant", self.value)


class ConstantPad2d(nn.ConstantPad2d):
    """`torch.nn.ConstantPad2d` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return _module_forward(self, input, "constant", self.value)


class ConstantPad3d(nn.ConstantPad3d):
    """`torch.nn.ConstantPad3d` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return _module_forward(self, input, "constant", self.value)


class ZeroPad1d(nn.ZeroPad1d):
    """`torch.nn.ZeroPad1d` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return _module_forward(self, input, "constant", self.value)


class ZeroPad2d(nn.ZeroPad2d):
    """`torch.nn.ZeroPad2d` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return _module_forward(self, input, "constant", self.value)


class ZeroPad3d(nn.ZeroPad3d):
    """`torch.nn.ZeroPad3d` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return _module_forward(self, input, "constant", self.value)


class ReflectionPad1d(nn.ReflectionPad1d):
    """`torch.nn.ReflectionPad1d` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return _module_forward(self, input, "reflect")


class ReflectionPad2d(nn.ReflectionPad2d):
    """`torch.nn.ReflectionPad2d` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return _module_forward(self, input, "reflect")


class ReflectionPad3d(nn.ReflectionPad3d):
    """`torch.nn.ReflectionPad3d` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return _module_forward(self, input, "reflect")


class ReplicationPad1d(nn.ReplicationPad1d):
    """`torch.nn.ReplicationPad1d` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return _module_forward(self, input, "replicate")


class ReplicationPad2d(nn.ReplicationPad2d):
    """`torch.nn.ReplicationPad2d` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return _module_forward(self, input, "replicate")


class ReplicationPad3d(nn.ReplicationPad3d):
    """`torch.nn.ReplicationPad3d` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return _module_forward(self, input, "replicate")


class CircularPad1d(nn.CircularPad1d):
    """`torch.nn.CircularPad1d` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        return _module_forward(self, input, "circular")


class CircularPad2d(nn.CircularPad2d):
    """`torch.nn.CircularPad2d` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        return _module_forward(self, input, "circular")


class CircularPad3d(nn.CircularPad3d):
    """`torch.nn.CircularPad3d` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        return _module_forward(self, input, "circular")


MODULES = (
    ConstantPad1d,
    ConstantPad2d,
    ConstantPad3d,
    ZeroPad1d,
    ZeroPad2d,
    ZeroPad3d,
    ReflectionPad1d,
    ReflectionPad2d,
    ReflectionPad3d,
    ReplicationPad1d,
    ReplicationPad2d,
    ReplicationPad3d,
    CircularPad1d,
    CircularPad2d,
    CircularPad3d,
)


def case(draw: Draw) -> Case:
    mode, n = draw.choice(MODES), draw.choice((1, 1, 2, 2, 3))
    if mode == "constant":
        X = [draw.size(most=3) for _ in range(n + draw.choice((0, 1)))]
        amounts = [[draw.choice(range(-(m // 2), 3)) for _ in range(2)] for m in reversed(X)][:n]
    else:
        X = [draw.size(least=1, most=4 if n < 3 else 2) for _ in range(n)]
        most = [m - (mode == "reflect") if mode != "replicate" else 2 for m in reversed(X)]
        amounts = [[draw.choice(range(min(m, 3) + 1)) for _ in range(2)] for m in most]
        if draw.random.random() < 0.3 and X[-1] > 2:
            amounts[0][draw.choice((0, 1))] = -1
            amounts[0] = [min(a, 1) for a in amounts[0]]
        X = [*([] if draw.flag() else [draw.size(most=2)]), draw.size(least=1, most=2), *X]
    value = {"value": draw.choice((None, 1.5))} if mode == "constant" else {}
    return Case((draw.tensor(*X), tuple(a for pair in amounts for a in pair), mode), value)


def _bench(mode: str) -> Any:
    def bench(draw: Draw) -> Case:
        return Case((draw.tensor(16, 64, 56, 56), (1, 1, 1, 1), mode), {})

    return bench


OP = Op(
    name="pad",
    call=pad,
    reference=F.pad,
    rules=(RULE,),
    module=MODULES,
    replaces=tuple(m.__bases__[0] for m in MODULES),
    shapes="input: *B -> *B'",
    source="the chain rule for a gather",
    autocast={"cpu": "float32"},  # reflect and replicate alone
    case=case,
    bench={mode: _bench(mode) for mode in MODES},
)
OPS = (OP,)
