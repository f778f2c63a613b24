"""Transposed convolution in one, two and three dimensions: the adjoint of convolution, used to go up in size.

Maths     y[n,o,m] = b[o] + Σ_i Σ_{(j,k): js + kd − p = m} w[i,o,k] x[n,i,j]

          x[n,i,j] is spread over the outputs m = js + kd − p, one for every k, each times w[i,o,k]. Read backwards:
          dx[n,i,j]   = Σ_o Σ_k w[i,o,k] dy[n,o,js + kd − p]                   where dy is 0 outside its range
                      = the convolution of dy with the same w, s, p and d
          dw[i,o,k]   = Σ_n Σ_j x[n,i,j] dy[n,o,kd + js − p]
                      = the correlation of dy with x: convolution's dw with input and cotangent exchanged
          db[o]       = Σ_n Σ_m dy[n,o,m]
          With groups, all of this within each group.

          Y = (X − 1) s − 2p + d (K − 1) + r + 1: the output padding r only says how much of the range that no x reaches is
          part of y. Where r ≥ s (which takes d > r) the convolution of dy has positions beyond X, and they are cut off.
Letters   n runs over N samples; i over I input channels, o over O output channels of a group; m, j, k over positions of the
          output (Y), input (X) and kernel (K), each an index per dimension; s stride, p padding, d dilation, r output padding
Numerics  products accumulate in float32 for half inputs (the vendor's kernels); channels_last goes through
Source    Dumoulin & Visin, "A guide to convolution arithmetic", arXiv 1603.07285, §4; Zeiler et al. 2010
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.op import LOW, Op
from bptoolkit.ops.conv import _ints, correlation


def forward(x, w, b, stride, padding, output_padding, dilation, groups):
    return torch.convolution(x, w, b, stride, padding, dilation, True, output_padding, groups)  # N GO Y


def backward(dy, x, w, stride, padding, output_padding, dilation, groups, need):
    if not torch.is_grad_enabled() and x is not None and w is not None:  # the three sums in the vendor's one call
        mask, bias = [need.x, need.w, need.b], [dy.shape[1]] if need.b else None
        options = (stride, padding, dilation, True, output_padding, groups)
        return torch.ops.aten.convolution_backward(dy, x, w, bias, *options, mask)
    dx = gathered(dy, w, stride, padding, output_padding, dilation, groups) if need.x else None
    dw = correlation(dy, x, w, stride, padding, dilation, groups) if need.w else None
    db = dy.sum((0, *range(2, dy.dim()))) if need.b else None  # GO
    return dx, dw, db


def gathered(dy, w, stride, padding, output_padding, dilation, groups):
    n = len(stride)
    dx = torch.convolution(dy, w, None, stride, padding, dilation, False, (0,) * n, groups)  # N I X+
    for k in range(n):
        if output_padding[k] >= stride[k]:
            dx = dx.narrow(2 + k, 0, dx.shape[2 + k] - output_padding[k] // stride[k])  # N I X
    return dx


RULE = Rule("conv_transpose", forward, backward, inputs="x w b", outputs="y", uses={"x": "w", "w": "x w", "b": ""})


def _convolve(
    op: Op,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: int,
    dilation: Any,
    backend: str,
) -> Tensor:
    input, weight, bias = op.cast(input, weight, bias)
    op.check(input, weight, bias)
    n, name = weight.dim() - 2, op.name
    if input.dim() > n + 2:
        raise ValueError(f"{name}: input has shape {tuple(input.shape)}; it needs {n + 2} dimensions, or {n + 1} unbatched")
    stride, dilation = _ints(name, "stride", stride, n, 1), _ints(name, "dilation", dilation, n, 1)
    padding, output_padding = _ints(name, "padding", padding, n, 0), _ints(name, "output_padding", output_padding, n, 0)
    I, O, *K = weight.shape
    C, X = input.shape[-1 - n], input.shape[-n:]
    if groups < 1 or I != C or I % groups:
        raise ValueError(
            f"{name}: input {tuple(input.shape)} has {C} channels and weight {tuple(weight.shape)} takes {I}; they must be "
            f"equal and divisible by groups={groups}"
        )
    if bias is not None and bias.shape[0] != O * groups:
        raise ValueError(
            f"{name}: bias has shape {tuple(bias.shape)}; weight {tuple(weight.shape)} and groups={groups} "
            f"make {O * groups} channels"
        )
    if any(r >= max(s, d) for r, s, d in zip(output_padding, stride, dilation)):
        raise ValueError(
            f"{name}: output_padding={output_padding} must be smaller than stride={stride} or than dilation={dilation}, "
            "in each dimension"
        )
    Y = [(m - 1) * s - 2 * p + d * (k - 1) + r + 1 for m, s, p, d, k, r in zip(X, stride, padding, dilation, K, output_padding)]
    if min(X) < 1 or min(K) < 1 or min(Y) < 1:
        raise ValueError(
            f"{name}: input {tuple(X)} and kernel {tuple(K)} with stride={stride}, padding={padding}, dilation={dilation} and "
            f"output_padding={output_padding} give an output of {tuple(Y)}; every size must be at least 1"
        )
    x = input if input.dim() == n + 2 else input.unsqueeze(0)
    args = (x, weight, bias, stride, padding, output_padding, dilation, groups)
    y = RULE(*args, backend=op.pick(RULE, backend, *args))
    return y if input.dim() == n + 2 else y.squeeze(0)


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """Transposed convolution over one dimension, as torch.nn.functional has it; arguments and errors as `conv_transpose2d`.

    Input (N, C, L) or (C, L), weight (C, O / groups, K), bias (O,).
    """
    args = (input, weight, bias, stride, padding, output_padding, groups, dilation)
    return _convolve(CONV_TRANSPOSE1D, *args, backend)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """Transposed convolution over two dimensions, as `torch.nn.functional.conv_transpose2d`.

    Args:
        input: (N, C, H, W), or unbatched (C, H, W), floating point.
        weight: (C, O / groups, kH, kW).
        bias: (O,) or None.
        stride: the step between the places that neighbouring inputs are spread over, one int or one per dimension.
        padding: what is cut off the output on both sides, likewise.
        output_padding: what is added to the output's end, likewise; smaller than stride or than dilation.
        groups: blocks of channels that do not see each other; divides C and O.
        dilation: the spacing of the kernel's elements, one int or one per dimension.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (N, O, H', W') or (O, H', W'), H' = (H − 1) stride − 2 padding + dilation (kH − 1) + output_padding + 1.

    Raises:
        ValueError: shapes, channels or options disagree, the output would be empty, or the named backend cannot run the call.
        TypeError: the tensors are not of one floating-point dtype.
    """
    args = (input, weight, bias, stride, padding, output_padding, groups, dilation)
    return _convolve(CONV_TRANSPOSE2D, *args, backend)


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """Transposed convolution over three dimensions, as torch.nn.functional has it; arguments and errors as `conv_transpose2d`.

    Input (N, C, D, H, W) or (C, D, H, W), weight (C, O / groups, kD, kH, kW), bias (O,).
    """
    args = (input, weight, bias, stride, padding, output_padding, groups, dilation)
    return _convolve(CONV_TRANSPOSE3D, *args, backend)


def _module_forward(call: Any, module: Any, input: Tensor, output_size: Any) -> Tensor:
    """What a module does: find the output padding that gives the size asked for, then convolve."""
    geometry = (module.stride, module.padding, module.kernel_size, len(module.stride), module.dilation)
    output_padding = tuple(module._output_padding(input, output_size, *geometry))
    options = (module.stride, module.padding, output_padding, module.groups, module.dilation)
    return call(input, module.weight, module.bias, *options, backend=module.backend)


class ConvTranspose1d(nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` with the backward above; same parameters, state_dict and arguments."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _module_forward(conv_transpose1d, self, input, output_size)


class ConvTranspose2d(nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` with the backward above; same parameters, state_dict and arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _module_forward(conv_transpose2d, self, input, output_size)


class ConvTranspose3d(nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` with the backward above; same parameters, state_dict and arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _module_forward(conv_transpose3d, self, input, output_size)


def reference(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    """Zeros between the inputs, and a plain convolution with the kernel turned round. torch's own has no third derivative
    where there is output padding (it raises in 2.13)."""
    n = weight.dim() - 2
    stride, padding, output_padding, dilation = (
        (t,) * n if isinstance(t, int) else tuple(t) for t in (stride, padding, output_padding, dilation)
    )
    x, (I, O, *K) = input, weight.shape
    for k in range(n):
        dim, s = x.dim() - n + k, stride[k]
        spread = F.pad(x.unsqueeze(dim + 1), [0, 0] * (n - 1 - k) + [0, s - 1]).flatten(dim, dim + 1)
        x = spread.narrow(dim, 0, (x.shape[dim] - 1) * s + 1)
    reach = [d * (k - 1) - p for d, k, p in zip(dilation, K, padding)]
    x = F.pad(x, [e for b, r in zip(reversed(reach), reversed(output_padding)) for e in (b, b + r)])
    w = weight.reshape(groups, I // groups, O, *K).transpose(1, 2).reshape(groups * O, I // groups, *K)
    w = w.flip(list(range(2, n + 2)))
    return (F.conv1d, F.conv2d, F.conv3d)[n - 1](x, w, bias, 1, 0, dilation, groups)


def _case(n: int) -> Any:
    """Draws a call in n dimensions, the smaller the more dimensions it has."""
    most, kernels, dilations = {1: (9, (1, 2, 3), (1, 1, 2)), 2: (4, (1, 2, 3), (1, 1, 2)), 3: (2, (1, 1, 2), (1, 1, 1, 2))}[n]

    def case(draw: Draw) -> Case:
        groups, I = draw.choice(((1, 2), (2, 2), (3, 1)) if n < 3 else ((1, 2), (2, 1)))
        O, K = draw.choice((1, 2) if n < 3 else (1,)), [draw.choice(kernels) for _ in range(n)]
        dilation, stride = [draw.choice(dilations) for _ in range(n)], [draw.choice((1, 2, 3)) for _ in range(n)]
        output_padding = [draw.choice(range(max(s, d))) for s, d in zip(stride, dilation)]
        X = [draw.size(least=1, most=most) for _ in range(n)]
        reach = [(m - 1) * s + d * (k - 1) + r for m, s, d, k, r in zip(X, stride, dilation, K, output_padding)]
        padding = [draw.choice([p for p in (0, 1, 2) if 2 * p <= e]) for e in reach]
        batch = () if draw.random.random() < 0.2 else (draw.size(most=2),)
        x, w = draw.tensor(*batch, groups * I, *X), draw.tensor(groups * I, O, *K, scale=0.5)
        b = draw.tensor(groups * O) if draw.flag() else None
        return Case((x, w, b, stride, padding, output_padding, groups, dilation), {})

    return case


def bench_up2(draw: Draw) -> Case:
    return Case((draw.tensor(8, 128, 16, 16), draw.tensor(128, 64, 4, 4, scale=0.05), draw.tensor(64), 2, 1), {})


def bench_depthwise(draw: Draw) -> Case:
    return Case((draw.tensor(8, 64, 32, 32), draw.tensor(64, 1, 4, 4), draw.tensor(64), 2, 1, 0, 64), {})


def bench_1d(draw: Draw) -> Case:
    return Case((draw.tensor(16, 64, 256), draw.tensor(64, 64, 4, scale=0.05), draw.tensor(64), 2, 1), {})


def bench_3d(draw: Draw) -> Case:
    return Case((draw.tensor(2, 32, 8, 16, 16), draw.tensor(32, 16, 2, 2, 2, scale=0.05), draw.tensor(16), 2), {})


def _op(call: Any, peer: Any, module: Any, shapes: str, **kw: Any) -> Op:
    return Op(
        name=call.__name__,
        call=call,
        reference=reference,
        peer=peer,
        rules=(RULE,),
        module=(module,),
        replaces=(module.__base__,),
        shapes=shapes,
        source="Dumoulin & Visin 2016, §4",
        autocast=LOW,
        **kw,
    )


CONV_TRANSPOSE1D = _op(
    conv_transpose1d,
    F.conv_transpose1d,
    ConvTranspose1d,
    "input: *N C L, weight: C O K, bias: O' -> *N O' L'",
    case=_case(1),
    bench=bench_1d,
)
CONV_TRANSPOSE2D = _op(
    conv_transpose2d,
    F.conv_transpose2d,
    ConvTranspose2d,
    "input: *N C H W, weight: C O kH kW, bias: O' -> *N O' H' W'",
    case=_case(2),
    bench={"up by 2": bench_up2, "depthwise": bench_depthwise},
)
CONV_TRANSPOSE3D = _op(
    conv_transpose3d,
    F.conv_transpose3d,
    ConvTranspose3d,
    "input: *N C D H W, weight: C O kD kH kW, bias: O' -> *N O' D' H' W'",
    case=_case(3),
    bench=bench_3d,
)
OPS = (CONV_TRANSPOSE1D, CONV_TRANSPOSE2D, CONV_TRANSPOSE3D)
