"""Convolution in one, two and three dimensions (cross-correlation, as everywhere in deep learning).

Maths     y[n,o,j] = b[o] + Σ_i Σ_k w[o,i,k] x[n,i,js + kd − p]       where x is 0 outside its range

          Swap the sums. Each x[n,i,m] meets w[o,i,k] in those outputs j for which js + kd − p = m:
          dx[n,i,m] = Σ_o Σ_{(j,k): js + kd − p = m} w[o,i,k] dy[n,o,j]
                    = the transposed convolution of dy with w; m runs up to x's size, which is (j_max s + d(k_max) − 2p) plus
                      the tail r that the last stride did not reach, r = (X + 2p − d(K − 1) − 1) mod s
          Each w[o,i,k] meets x[n,i,js + kd − p] in every n and j:
          dw[o,i,k] = Σ_n Σ_j dy[n,o,j] x[n,i,kd + js − p]
                    = the correlation of x with dy: the same sum as y's, with samples for channels, dy for the kernel, and the
                      roles of stride and dilation exchanged (k steps by d, j by s); what it has beyond K is the tail, cut off
          db[o]     = Σ_n Σ_j dy[n,o,j]
          With groups, all of this within each group. Padding with border values comes first, as an op of its own: pad.py.
Letters   n runs over N samples; i over I input channels of a group, o over O output channels; m, j, k over positions of the
          input (X), output (Y) and kernel (K), each an index per dimension; s stride, p padding, d dilation, r tail
Numerics  products accumulate in float32 for half inputs (the vendor's kernels); channels_last goes through
Source    Dumoulin & Visin, "A guide to convolution arithmetic", arXiv 1603.07285, §4; LeCun et al. 1989
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.op import LOW, Op
from bptoolkit.ops.pad import RULE as PAD_RULE


def forward(x, w, b, stride, padding, dilation, tail, groups):
    return torch.convolution(x, w, b, stride, padding, dilation, False, (0,) * len(stride), groups)  # N O Y


def backward(dy, x, w, stride, padding, dilation, tail, groups, need):
    if not torch.is_grad_enabled() and x is not None and w is not None:  # the three sums in the vendor's one call
        mask, none = [need.x, need.w, need.b], (0,) * len(stride)
        bias = [dy.shape[1]] if need.b else None
        return torch.ops.aten.convolution_backward(dy, x, w, bias, stride, padding, dilation, False, none, groups, mask)
    dx = transposed(dy, w, stride, padding, dilation, tail, groups) if need.x else None
    dw = correlation(x, dy, w, stride, padding, dilation, groups) if need.w else None
    db = dy.sum((0, *range(2, dy.dim()))) if need.b else None  # O
    return dx, dw, db


def transposed(dy, w, stride, padding, dilation, tail, groups):
    return torch.convolution(dy, w, None, stride, padding, dilation, True, tail, groups)  # N GI X


def correlation(x, dy, w, stride, padding, dilation, groups):
    N, I, n, X, K = x.shape[0], w.shape[1], len(stride), x.shape[2:], w.shape[2:]
    if N == 0:  # no samples: zero, and yet a function of both, as every sum over them is
        return (x.sum() + dy.sum()) * torch.zeros_like(w)
    x = x.reshape(N, groups, I, *X).permute(2, 1, 0, *range(3, 3 + n)).reshape(I, groups * N, *X)  # I GN X
    dw = torch.convolution(x, dy.transpose(0, 1), None, dilation, padding, stride, False, (0,) * n, groups)  # I O K+
    for k in range(n):
        dw = dw.narrow(2 + k, 0, K[k])  # I O K
    return dw.transpose(0, 1)  # O I K


def kernel():
    from bptoolkit.triton_kernels.conv import KERNEL

    return KERNEL


def dense_kernel():
    from bptoolkit.triton_kernels.conv_dense import KERNEL

    return KERNEL


KEPT = {"x": "w", "w": "x w", "b": ""}
RULE = Rule("conv", forward, backward, inputs="x w b", outputs="y", uses=KEPT, kernel=kernel)
DENSE = Rule(
    "conv_dense",
    forward,
    backward,
    inputs="x w b",
    outputs="y",
    uses=KEPT,
    kernel=dense_kernel,
    on_request="dense convolution belongs to the vendor's library",
)


def _ints(op: str, name: str, value: Any, n: int, least: int) -> tuple[int, ...]:
    """The value per dimension, of an int or one per dimension."""
    values = (value,) * n if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(values) == 1:
        values = values * n
    if len(values) != n or not all(isinstance(v, int) and v >= least for v in values):
        raise ValueError(f"{op}: {name}={value!r} must be an int of at least {least}, or {n} of them")
    return values


def arguments(
    op: Op, input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> tuple[Any, ...]:
    """The arguments of a rule, cast and checked; the input with its batch dimension."""
    input, weight, bias = op.cast(input, weight, bias)
    op.check(input, weight, bias)
    n, name = weight.dim() - 2, op.name
    if input.dim() > n + 2:
        raise ValueError(f"{name}: input has shape {tuple(input.shape)}; it needs {n + 2} dimensions, or {n + 1} unbatched")
    stride, dilation = _ints(name, "stride", stride, n, 1), _ints(name, "dilation", dilation, n, 1)
    O, I, *K = weight.shape
    C, X = input.shape[-1 - n], input.shape[-n:]
    if groups < 1 or I * groups != C or O % groups:
        raise ValueError(
            f"{name}: input {tuple(input.shape)} has {C} channels and weight {tuple(weight.shape)} makes {O} of {I} in each of "
            f"groups={groups}; input's must be {I} · {groups}, and {O} divisible by {groups}"
        )
    x = input if input.dim() == n + 2 else input.unsqueeze(0)
    if isinstance(padding, str):
        x, padding = _named_padding(name, x, K, stride, padding, dilation)
        X = x.shape[2:]
    else:
        padding = _ints(name, "padding", padding, n, 0)
    spare = [m + 2 * p - d * (k - 1) - 1 for m, k, p, d in zip(X, K, padding, dilation)]
    if any(r < 0 for r in spare):
        raise ValueError(
            f"{name}: the kernel {tuple(K)} with dilation={dilation} is larger than the input {tuple(X)} with padding={padding}"
        )
    tail = tuple(r % s for r, s in zip(spare, stride))
    return x, weight, bias, stride, padding, dilation, tail, groups


def _convolve(op: Op, input: Tensor, weight: Tensor, *options: Any, backend: str) -> Tensor:
    args = arguments(op, input, weight, *options)
    O, I, *K = weight.shape
    rule = RULE if options[-1] == O and I == 1 and len(K) < 3 else DENSE  # a kernel for each channel has a file of its own
    y = rule(*args, backend=op.pick(rule, backend, *args))
    return y if input.dim() == weight.dim() else y.squeeze(0)


def _named_padding(op: str, x: Tensor, K: Any, stride: Any, padding: str, dilation: Any) -> tuple[Tensor, tuple[int, ...]]:
    """The padding that "valid" or "same" stands for; where it is odd, the right side's extra zero is put in place first."""
    if padding == "valid":
        return x, (0,) * len(K)
    if padding != "same":
        raise ValueError(f"{op}: padding={padding!r} is not known; it is 'valid', 'same' or a number of elements")
    if any(s != 1 for s in stride):
        raise ValueError(f"{op}: padding='same' needs a stride of 1, not stride={stride}")
    both = [d * (k - 1) for d, k in zip(dilation, K)]
    if any(b % 2 for b in both):
        x = PAD_RULE(x, tuple(e for b in reversed(both) for e in (0, b % 2)), "constant", 0.0)
    return x, tuple(b // 2 for b in both)


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """Convolution over one dimension, as `torch.nn.functional.conv1d`; arguments and errors as `conv2d`.

    Input (N, C, L) or (C, L), weight (O, C / groups, K), bias (O,).
    """
    return _convolve(CONV1D, input, weight, bias, stride, padding, dilation, groups, backend=backend)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """Convolution over two dimensions, as `torch.nn.functional.conv2d`.

    Args:
        input: (N, C, H, W), or unbatched (C, H, W), floating point.
        weight: (O, C / groups, kH, kW).
        bias: (O,) or None.
        stride: the step of the kernel, one int or one per dimension.
        padding: zeros on both sides, likewise; or "valid" (none), or "same" (the output has the input's size; stride 1 only).
        dilation: the spacing of the kernel's elements, likewise.
        groups: blocks of channels that do not see each other; divides C and O.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`. "auto" leaves dense convolution to the vendor's library.

    Returns:
        (N, O, H', W') or (O, H', W'), H' = ⌊(H + 2 padding − dilation (kH − 1) − 1) / stride⌋ + 1; channels_last as the input.

    Raises:
        ValueError: shapes, channels or options disagree, the kernel is larger than the padded input, or the named backend
            cannot run the call.
        TypeError: the tensors are not of one floating-point dtype.
    """
    return _convolve(CONV2D, input, weight, bias, stride, padding, dilation, groups, backend=backend)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """Convolution over three dimensions, as `torch.nn.functional.conv3d`; arguments and errors as `conv2d`.

    Input (N, C, D, H, W) or (C, D, H, W), weight (O, C / groups, kD, kH, kW), bias (O,).
    """
    return _convolve(CONV3D, input, weight, bias, stride, padding, dilation, groups, backend=backend)


def module_forward(call: Any, module: Any, input: Tensor) -> Tensor:
    """What a convolution module does: pad with border values if it says so, then convolve."""
    padding = module.padding
    if module.padding_mode != "zeros":
        input, padding = _padded(module, input), 0
    options = (module.stride, padding, module.dilation, module.groups)
    return call(input, module.weight, module.bias, *options, backend=module.backend)


def _padded(module: Any, x: Tensor) -> Tensor:
    pad, mode = tuple(module._reversed_padding_repeated_twice), module.padding_mode
    OPS[len(pad) // 2 - 1].check(x, None, None)
    for k in range(len(pad)):
        most = x.shape[-1 - k // 2] - (1 if mode == "reflect" else 0)
        if mode != "replicate" and pad[k] > most:
            raise ValueError(
                f"{type(module).__name__}: padding_mode={mode!r} can pad dimension {x.dim() - 1 - k // 2} of input "
                f"{tuple(x.shape)} by up to {most}, not by {pad[k]}"
            )
    return PAD_RULE(x, pad, mode, None)


class Conv1d(nn.Conv1d):
    """`torch.nn.Conv1d` with the backward above; same parameters, state_dict and arguments."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`

    def forward(self, input: Tensor) -> Tensor:
        return module_forward(conv1d, self, input)


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` with the backward above; same parameters, state_dict and arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return module_forward(conv2d, self, input)


class Conv3d(nn.Conv3d):
    """`torch.nn.Conv3d` with the backward above; same parameters, state_dict and arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return module_forward(conv3d, self, input)


def _case(n: int) -> Any:
    """Draws a call in n dimensions, the smaller the more dimensions it has."""
    most, kernels, dilations = {1: (9, (1, 2, 3), (1, 1, 2)), 2: (4, (1, 2, 3), (1, 1, 2)), 3: (2, (1, 1, 2), (1, 1, 1, 2))}[n]

    def case(draw: Draw) -> Case:
        groups, I = draw.choice(((1, 2), (2, 2), (3, 1)) if n < 3 else ((1, 2), (2, 1)))
        O, K = groups * draw.choice((1, 2) if n < 3 else (1,)), [draw.choice(kernels) for _ in range(n)]
        dilation = [draw.choice(dilations) for _ in range(n)]
        padding: Any = [draw.choice((0, 1, 2) if n < 3 else (0, 1)) for _ in range(n)]
        stride: Any = [draw.choice((1, 2, 3)) for _ in range(n)]
        reach = [max(d * (k - 1) + 1 - 2 * p, 1) for d, k, p in zip(dilation, K, padding)]
        named = draw.choice((None, None, "same", "valid"))
        if named:
            padding, stride = named, 1
            reach = [d * (k - 1) + 1 for d, k in zip(dilation, K)]
        X = [max(draw.size(least=1, most=most), r) for r in reach]
        batch = () if draw.random.random() < 0.2 else (draw.size(most=2),)
        x, w = draw.tensor(*batch, groups * I, *X), draw.tensor(O, I, *K, scale=0.5)
        b = draw.tensor(O) if draw.flag() else None
        return Case((x, w, b, stride, padding, dilation, groups), {})

    return case


def bench_3x3(draw: Draw) -> Case:
    return Case((draw.tensor(16, 64, 28, 28), draw.tensor(64, 64, 3, 3, scale=0.05), draw.tensor(64), 1, 1), {})


def bench_strided(draw: Draw) -> Case:
    return Case((draw.tensor(16, 64, 56, 56), draw.tensor(128, 64, 3, 3, scale=0.05), None, 2, 1), {})


def bench_depthwise(draw: Draw) -> Case:
    return Case((draw.tensor(16, 128, 28, 28), draw.tensor(128, 1, 3, 3), draw.tensor(128), 1, "same", 1, 128), {})


def bench_pointwise(draw: Draw) -> Case:
    return Case((draw.tensor(16, 128, 28, 28), draw.tensor(256, 128, 1, 1, scale=0.05), draw.tensor(256)), {})


def bench_1d(draw: Draw) -> Case:
    return Case((draw.tensor(32, 64, 512), draw.tensor(64, 64, 5, scale=0.05), draw.tensor(64), 1, 2), {})


def bench_3d(draw: Draw) -> Case:
    return Case((draw.tensor(2, 16, 16, 32, 32), draw.tensor(32, 16, 3, 3, 3, scale=0.05), draw.tensor(32), 1, 1), {})


def _op(call: Any, reference: Any, module: Any, shapes: str, **kw: Any) -> Op:
    return Op(
        name=call.__name__,
        call=call,
        reference=reference,
        rules=(DENSE, PAD_RULE) if module is Conv3d else (RULE, DENSE, PAD_RULE),
        module=(module,),
        replaces=(module.__base__,),
        shapes=shapes,
        source="Dumoulin & Visin 2016, §4",
        autocast=LOW,
        **kw,
    )


CONV1D = _op(
    conv1d,
    F.conv1d,
    Conv1d,
    "input: *N C L, weight: O I K, bias: O -> *N O L'",
    case=_case(1),
    bench=bench_1d,
)
CONV2D = _op(
    conv2d,
    F.conv2d,
    Conv2d,
    "input: *N C H W, weight: O I kH kW, bias: O -> *N O H' W'",
    case=_case(2),
    bench={"3×3": bench_3x3, "stride 2": bench_strided, "depthwise": bench_depthwise, "1×1": bench_pointwise},
)
CONV3D = _op(
    conv3d,
    F.conv3d,
    Conv3d,
    "input: *N C D H W, weight: O I kD kH kW, bias: O -> *N O D' H' W'",
    case=_case(3),
    bench=bench_3d,
)
OPS = (CONV1D, CONV2D, CONV3D)
