"""Convolution over two dimensions, batch normalization and relu: one node, which keeps its input and makes the rest again.

Maths     u = x ∗ w + b, the convolution of conv.py        y = max(z, 0), z = (u − m) r g + h, as in batch_norm_relu.py
          dz = dy [z > 0]        du, dg, dh: the gradients of batch_norm by dz        dx, dw, db: those of conv.py by du
          Three nodes of torch keep x, u and y. Here backward makes u again from x by one more convolution, and z from u, so x
          is kept, which the layer before has as its y
Letters   those of conv.py; g and h are the norm's weight and bias, of shape O as are m and r, residual outputs that the public
          function hides; dt is the gradient of the loss by t, in t's shape
Numerics  those of conv.py and batch_norm_relu.py. In training db is 0 but for rounding: the norm takes off what b adds. If the
          convolution of the vendor's does not give the same bits twice, z may change its sign where it is 0 but for rounding
Source    Ioffe & Szegedy, "Batch Normalization", arXiv 1502.03167, §3.2; what is kept: Chen et al., "Training Deep Nets with
          Sublinear Memory Cost", arXiv 1604.06174, §3
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.op import LOW, Op
from bptoolkit.ops import batch_norm, batch_norm_relu, conv
from bptoolkit.ops.channel_norm import check_per_channel


def forward(x, w, b, g, h, running_mean, running_var, stride, padding, dilation, tail, groups, training, momentum, eps):
    u = conv.forward(x, w, b, stride, padding, dilation, tail, groups)  # N O Y
    return batch_norm_relu.forward(u, g, h, running_mean, running_var, training, momentum, eps)


def backward(dy, dm, dr, x, w, b, g, h, m, r, stride, padding, dilation, tail, groups, training, need):
    return gradients(
        batch_norm_relu.backward, dy, dm, dr, x, w, b, g, h, m, r, stride, padding, dilation, tail, groups, training, need
    )


def gradients(norm, dy, dm, dr, x, w, b, g, h, m, r, stride, padding, dilation, tail, groups, training, need):
    """All gradients, by the backward of batch_norm_relu that is given."""
    u = conv.forward(x, w, b, stride, padding, dilation, tail, groups)  # N O Y
    through = need.x or need.w or need.b
    of_norm = batch_norm_relu.RULE.Need(through, need.g, need.h, False, False)
    du, dg, dh, _, _ = norm(dy, dm, dr, u, g, h, m, r, training, of_norm)
    dx = dw = db = None
    if du is not None:
        of_conv = conv.DENSE.Need(need.x, need.w, need.b)
        dx, dw, db = conv.backward(du, x, w, stride, padding, dilation, tail, groups, of_conv)
    return dx, dw, db, dg, dh, None, None


def kernel():
    from bptoolkit.triton_kernels.conv_batch_norm_relu import KERNEL

    return KERNEL


KEPT = "x w b g h m r"
RULE = Rule(
    "conv_batch_norm_relu",
    forward,
    backward,
    inputs="x w b g h running_mean running_var",
    outputs="y m r",
    uses=dict.fromkeys(("x", "w", "b", "g", "h"), KEPT) | {"running_mean": "", "running_var": ""},
    kernel=kernel,
)


def conv2d_batch_norm_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> Tensor:
    """relu(batch_norm(conv2d(input, weight, bias), ...)), of which backward keeps the input and makes the convolution again.

    That is one more convolution forward for two tensors of the output's size less. To keep the convolution's output and make
    the norm alone again, call `conv2d` and `batch_norm_relu`.

    Args:
        input, weight, bias, stride, padding, dilation, groups: as in `bptoolkit.functional.conv2d`.
        running_mean, running_var, training, momentum, eps: as in `bptoolkit.functional.batch_norm`, of the O channels.
        norm_weight, norm_bias: (O,) or None, the norm's; of input's dtype, or float32 for a half input.
        backend: "auto", "eager" or "triton", of the norm and the relu; the convolution is the vendor's. See `bptoolkit.choose`.

    Returns:
        (N, O, H', W') or (O, H', W'); channels_last as the input.

    Raises:
        ValueError: shapes, channels, devices or options disagree, the kernel is larger than the padded input, there are no
            running statistics in evaluation or one of the two, training has one value per channel, eps is not positive, or the
            named backend cannot run the call.
        TypeError: a tensor is not of floating point, or the dtypes do not go together.
    """
    name = OP.name
    x, w, b, *how = conv.arguments(OP, input, weight, bias, stride, padding, dilation, groups)
    O, _, *K = w.shape
    norms = {"running_mean": running_mean, "running_var": running_var, "norm_weight": norm_weight, "norm_bias": norm_bias}
    for key, t in norms.items():
        if isinstance(t, Tensor) and tuple(t.shape) != (O,):
            raise ValueError(
                f"{name}: {key} has shape {tuple(t.shape)} but weight {tuple(weight.shape)} makes {O} channels; it needs ({O},)"
            )
    check_per_channel(name, x, O, **norms)
    sizes = zip(x.shape[2:], K, *how[:3])
    shape = (x.shape[0], O, *((m + 2 * p - d * (k - 1) - 1) // s + 1 for m, k, s, p, d in sizes))
    batch_norm.check_options(name, shape, running_mean, running_var, training, eps)
    args = (x, w, b, norm_weight, norm_bias, running_mean, running_var, *how, bool(training), momentum, eps)
    y = RULE(*args, backend=OP.pick(RULE, backend, *args))[0]
    return y if input.dim() == 4 else y.squeeze(0)


class ConvBatchNormReLU2d(nn.Module):
    """relu(bn(conv(x))) in one node; the two layers hold the parameters and the running statistics, and are not called.

    The state_dict is that of a module with a Conv2d `conv` and a BatchNorm2d `bn`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as in `torch.nn.Conv2d`.
        eps, momentum, affine, track_running_stats: as in `torch.nn.BatchNorm2d`.
        device, dtype: of the parameters.

    Shape:
        (N, C, H, W) -> (N, O, H', W').
    """

    backend: str = "auto"  # an instance may set its own

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        sizes = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        self.conv = conv.Conv2d(*sizes, device=device, dtype=dtype)  # type: ignore[arg-type]
        self.bn = batch_norm.BatchNorm2d(out_channels, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        def normed(input: Tensor, mean: Any, var: Any, g: Any, h: Any, *options: Any, backend: str) -> Tensor:
            def convolved(input: Tensor, w: Tensor, b: Any, *how: Any, backend: str) -> Tensor:
                return conv2d_batch_norm_relu(input, w, b, mean, var, g, h, *how, *options, backend=self.backend)

            return conv.module_forward(convolved, self.conv, input)

        return batch_norm.run(normed, self.bn, input)


def reference(
    input,
    weight,
    bias,
    running_mean,
    running_var,
    norm_weight=None,
    norm_bias=None,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    training=False,
    momentum=0.1,
    eps=1e-5,
):
    u = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    norm = (running_mean, running_var, norm_weight, norm_bias, training, momentum, eps)
    y = batch_norm_relu.reference(u if u.dim() == 4 else u[None], *norm)
    return y if u.dim() == 4 else y[0]


def peer(input, weight, bias, mean, var, norm_weight, norm_bias, stride, padding, training):
    return F.relu(F.batch_norm(F.conv2d(input, weight, bias, stride, padding), mean, var, norm_weight, norm_bias, training))


def case(draw: Draw) -> Case:
    x, w, b, *how = conv.CONV2D.draw(draw).args
    O, w = w.shape[0], w.detach()
    w = (w / w.abs().sum((1, 2, 3), keepdim=True).clamp_min(1)).requires_grad_()  # u no larger than x: the norm loses no digits
    g, h = (draw.tensor(O) if draw.random.random() < 0.75 else None for _ in range(2))
    running: tuple[Tensor | None, ...] = draw.tensor(O, grad=False), draw.tensor(O, grad=False).abs() + 0.5
    values = F.conv2d(x.detach(), w.detach(), None, *how).numel() // O
    training = draw.flag() and values > 1
    if training:
        running = None, None  # their update, which has no gradient, is refused by torch's transforms
    return Case((x, w, b, *running, g, h, *how), {"training": training, "eps": draw.choice((1e-5, 0.1))})


def bench(draw: Draw) -> Case:
    x, w, _, stride, padding = conv.bench_3x3(draw).args
    O = w.shape[0]
    running = draw.tensor(O, grad=False), draw.tensor(O, grad=False).abs() + 0.5
    return Case((x, w, None, *running, draw.tensor(O), draw.tensor(O), stride, padding), {"training": True})


OP = Op(
    name="conv2d_batch_norm_relu",
    call=conv2d_batch_norm_relu,
    reference=reference,
    peer=peer,
    rules=(RULE,),
    shapes="input: *N C H W, weight: O I kH kW, bias: O, running_mean: O, running_var: O, norm_weight: O, norm_bias: O "
    "-> *N O H' W'",
    source="Ioffe & Szegedy 2015, §3.2",
    autocast=LOW,
    case=case,
    bench={"3×3": bench},
)
OPS = (OP,)
