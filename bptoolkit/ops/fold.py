"""Unfold and fold (im2col and col2im): sliding windows of an image laid out as columns, and columns summed back into an image.

Maths     unfold   y[n,(c,k),j] = x[n,c,js + kd − p]                          where x is 0 outside its range
          fold     y[n,c,m]     = Σ_{(j,k): js + kd − p = m} x[n,(c,k),j]

          Both are linear, with matrices U and V of zeros and ones, and V[(n,c,m),(n,(c,k),j)] = 1 exactly where
          U[(n,(c,k),j),(n,c,m)] = 1, namely where js + kd − p = m. So V = Uᵀ, and each is the other's backward:
          unfold   dx = fold(dy)
          fold     dx = unfold(dy)
Letters   n runs over samples, c over channels; k over positions of the kernel, (c,k) over C·K rows; j over L = Π Y places of
          the window, m over positions of the image, each an index per dimension; s stride, p padding, d dilation
Numerics  half tensors are summed in float32; nothing is kept for backward
Source    Chellapilla et al., "High performance convolutional neural networks for document processing", 2006, §3.1
"""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.op import Op
from bptoolkit.ops.conv import _ints
from bptoolkit.precision import wide


def unfold_forward(x, size, kernel, dilation, padding, stride):
    return F.unfold(x, kernel, dilation, padding, stride)  # N CK L


def unfold_backward(dy, size, kernel, dilation, padding, stride):
    return fold_forward(dy, size, kernel, dilation, padding, stride)


def fold_forward(x, size, kernel, dilation, padding, stride):
    return F.fold(wide(x), size, kernel, dilation, padding, stride).to(x.dtype)  # N C H W


def fold_backward(dy, size, kernel, dilation, padding, stride):
    return unfold_forward(dy, size, kernel, dilation, padding, stride)


UNFOLD_RULE = Rule("unfold", unfold_forward, unfold_backward, inputs="x", outputs="y")
FOLD_RULE = Rule("fold", fold_forward, fold_backward, inputs="x", outputs="y")


def _options(name: str, kernel_size: Any, dilation: Any, padding: Any, stride: Any) -> tuple[tuple[int, ...], ...]:
    """The four options of a window, an int per dimension, in the order of the rules."""
    return (
        _ints(name, "kernel_size", kernel_size, 2, 1),
        _ints(name, "dilation", dilation, 2, 1),
        _ints(name, "padding", padding, 2, 0),
        _ints(name, "stride", stride, 2, 1),
    )


def _places(name: str, size: Any, options: tuple[tuple[int, ...], ...]) -> list[int]:
    """How many places the window has, per dimension."""
    kernel, dilation, padding, stride = options
    spare = [m + 2 * p - d * (k - 1) - 1 for m, k, d, p in zip(size, kernel, dilation, padding)]
    if min(spare) < 0:
        raise ValueError(
            f"{name}: the window {kernel} with dilation={dilation} is larger than the image {tuple(size)} "
            f"with padding={padding}"
        )
    return [r // s + 1 for r, s in zip(spare, stride)]


def unfold(
    input: Tensor,
    kernel_size: Any,
    dilation: Any = 1,
    padding: Any = 0,
    stride: Any = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """The windows of an image as columns, as `torch.nn.functional.unfold`.

    Args:
        input: (N, C, H, W), or unbatched (C, H, W), floating point.
        kernel_size: the window's size, one int or one per dimension.
        dilation: the spacing of the window's elements, likewise.
        padding: zeros on both sides, likewise.
        stride: the step of the window, likewise.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (N, C kH kW, L) or (C kH kW, L), L the number of places of the window, row by row.

    Raises:
        ValueError: a shape or an option is not possible, the window is larger than the padded image, or the named backend
            cannot run the call.
        TypeError: the input is not a tensor of floating point.
    """
    UNFOLD.check(input)
    if input.dim() not in (3, 4) or 0 in input.shape[-3:]:
        raise ValueError(
            f"unfold: input has shape {tuple(input.shape)}; it needs (N, C, H, W) or (C, H, W), none of C, H, W zero"
        )
    options = _options("unfold", kernel_size, dilation, padding, stride)
    size = tuple(input.shape[-2:])
    _places("unfold", size, options)
    return UNFOLD_RULE(input, size, *options, backend=UNFOLD.pick(UNFOLD_RULE, backend, input))


def fold(
    input: Tensor,
    output_size: Any,
    kernel_size: Any,
    dilation: Any = 1,
    padding: Any = 0,
    stride: Any = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """Columns summed back into an image, where windows overlap too, as `torch.nn.functional.fold`.

    Args:
        input: (N, C kH kW, L), or unbatched (C kH kW, L), floating point.
        output_size: the image's size (H, W), one int or one per dimension.
        kernel_size: the window's size, likewise.
        dilation: the spacing of the window's elements, likewise.
        padding: what lies outside the image on both sides and is dropped, likewise.
        stride: the step of the window, likewise.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (N, C, H, W) or (C, H, W).

    Raises:
        ValueError: a shape or an option is not possible, L is not the number of the window's places, or the named backend
            cannot run the call.
        TypeError: the input is not a tensor of floating point.
    """
    FOLD.check(input)
    if input.dim() not in (2, 3) or 0 in input.shape[-2:]:
        raise ValueError(f"fold: input has shape {tuple(input.shape)}; it needs (N, C kH kW, L) or (C kH kW, L), neither zero")
    size = _ints("fold", "output_size", output_size, 2, 1)
    options = _options("fold", kernel_size, dilation, padding, stride)
    rows, L = input.shape[-2:]
    places, kernel = _places("fold", size, options), options[0]
    if rows % prod(kernel) or prod(places) != L:
        raise ValueError(
            f"fold: input {tuple(input.shape)} has {rows} rows and {L} columns; the first must be divisible by the "
            f"{prod(kernel)} elements of the window {kernel}, and the second be its {places[0]} · {places[1]} places in the "
            f"image {size}"
        )
    return FOLD_RULE(input, size, *options, backend=FOLD.pick(FOLD_RULE, backend, input))


class Unfold(nn.Unfold):
    """`torch.nn.Unfold` with the backward above; same arguments."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`

    def forward(self, input: Tensor) -> Tensor:
        return unfold(input, self.kernel_size, self.dilation, self.padding, self.stride, backend=self.backend)


class Fold(nn.Fold):
    """`torch.nn.Fold` with the backward above; same arguments."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        options = (self.kernel_size, self.dilation, self.padding, self.stride)
        return fold(input, self.output_size, *options, backend=self.backend)


def _draw(draw: Draw) -> tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """A batch, an image's size, and options that fit it."""
    pairs = [(draw.choice(c), draw.choice(c)) for c in ((1, 2, 3), (1, 1, 2), (0, 1, 2), (1, 2, 3))]
    least = [max(d * (k - 1) + 1 - 2 * p, 1) for k, d, p in zip(*pairs[:3])]
    size = tuple(max(draw.size(least=1, most=5), r) for r in least)
    return (() if draw.random.random() < 0.2 else (draw.size(most=2),)), size, tuple(pairs)


def unfold_case(draw: Draw) -> Case:
    batch, size, options = _draw(draw)
    return Case((draw.tensor(*batch, draw.size(least=1, most=3), *size), *options), {})


def fold_case(draw: Draw) -> Case:
    batch, size, options = _draw(draw)
    rows = draw.size(least=1, most=2) * prod(options[0])
    return Case((draw.tensor(*batch, rows, prod(_places("fold", size, options))), size, *options), {})


def unfold_bench(draw: Draw) -> Case:
    return Case((draw.tensor(8, 32, 56, 56), 3, 1, 1), {})


def fold_bench(draw: Draw) -> Case:
    return Case((draw.tensor(8, 32 * 9, 56 * 56), 56, 3, 1, 1), {})


UNFOLD = Op(
    name="unfold",
    call=unfold,
    reference=F.unfold,
    rules=(UNFOLD_RULE,),
    module=(Unfold,),
    replaces=(nn.Unfold,),
    shapes="input: *N C H W -> *N CK L",
    source="Chellapilla et al. 2006, §3.1",
    case=unfold_case,
    bench=unfold_bench,
)
FOLD = Op(
    name="fold",
    call=fold,
    reference=F.fold,
    rules=(FOLD_RULE,),
    module=(Fold,),
    replaces=(nn.Fold,),
    shapes="input: *N CK L -> *N C H W",
    source="Chellapilla et al. 2006, §3.1",
    case=fold_case,
    bench=fold_bench,
)
OPS = (UNFOLD, FOLD)
