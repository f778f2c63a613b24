"""Faults and twins of what works on rows: softmax, cross entropy and the norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from faults.record import Fault, Twin

EPS = 1e-5
LAYER = "x: B N, w: N, b: N -> B N"
RMS = "x: B N, w: N -> B N"


def up(t: Tensor) -> Tensor:
    """To the dtype to compute in."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def along_rows(forward: Callable[[Tensor], Tensor], gradient: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function of rows in the new style; the gradient is made of the cotangent and the input, both wide enough."""
    compute = forward

    class Rows(Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return compute(x)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
            ctx.save_for_backward(inputs[0])

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return gradient(up(dy), up(x)).to(x.dtype)

    return Rows.apply


def softmax(x: Tensor) -> Tensor:
    """Of rows."""
    return x.softmax(-1)


def log_softmax(x: Tensor) -> Tensor:
    """Of rows."""
    return x.log_softmax(-1)


def softmax_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """The right gradient of softmax."""
    y = x.softmax(-1)
    return y * (dy - (dy * y).sum(-1, keepdim=True))


def log_softmax_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """The right gradient of log_softmax."""
    return dy - x.softmax(-1) * dy.sum(-1, keepdim=True)


def without_sum(dy: Tensor, x: Tensor) -> Tensor:
    """Of softmax, the diagonal of the Jacobian alone, without its square."""
    return x.softmax(-1) * dy


def over_columns(dy: Tensor, x: Tensor) -> Tensor:
    """Of softmax, the sum over the wrong dimension."""
    y = x.softmax(-1)
    return y * (dy - (dy * y).sum(0, keepdim=True))


def without_max(dy: Tensor, x: Tensor) -> Tensor:
    """Of log_softmax, by exponentials that overflow."""
    e = x.exp()
    return dy - e / e.sum(-1, keepdim=True) * dy.sum(-1, keepdim=True)


def sum_of_first_row(dy: Tensor, x: Tensor) -> Tensor:
    """Of log_softmax, every row with the sum of the first cotangent."""
    return dy - x.softmax(-1) * dy[:1].sum(-1, keepdim=True)


def pairs_of_rows(dy: Tensor, x: Tensor) -> Tensor:
    """Of softmax, two rows a program: the last of an odd number, above one, is not written."""
    dx = softmax_gradient(dy, x)
    if len(x) > 1 and len(x) % 2:
        dx[-1] = 0
    return dx


def entropy(
    scale: Callable[[int], float] = lambda rows: 1 / max(rows, 1), normalized: bool = False
) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross entropy with soft targets, the mean over rows."""

    class Entropy(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, t: Tensor) -> Tensor:
            ctx.save_for_backward(x, t)
            return cross_entropy(x, t)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
            x, t = ctx.saved_tensors
            g = up(dy) * scale(len(x))
            p, weight = up(x).softmax(-1), up(t).sum(-1, keepdim=True)
            dx = p - up(t) if normalized else p * weight - up(t)
            return (g * dx).to(x.dtype), (-g * up(x).log_softmax(-1)).to(t.dtype)

    return Entropy.apply


def cross_entropy(x: Tensor, t: Tensor) -> Tensor:
    """With soft targets, the mean over rows."""
    return (-(up(t) * up(x).log_softmax(-1)).sum(-1).mean()).to(x.dtype)


def two_pass(x: Tensor) -> Tensor:
    """1 / sqrt(variance + eps)."""
    return torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + EPS)


def outside(x: Tensor) -> Tensor:
    """Eps beside the root."""
    return 1 / (x.std(-1, keepdim=True, unbiased=False) + EPS)


def unbiased(x: Tensor) -> Tensor:
    """The variance with N - 1."""
    return torch.rsqrt((x - x.mean(-1, keepdim=True)).square().sum(-1, keepdim=True) / max(x.shape[-1] - 1, 1) + EPS)


def one_pass(x: Tensor) -> Tensor:
    """The variance as a difference of large numbers."""
    return torch.rsqrt((x.square().mean(-1, keepdim=True) - x.mean(-1, keepdim=True).square()).clamp(min=0) + EPS)


def rounded(x: Tensor) -> Tensor:
    """Kept in bfloat16, except for float64."""
    rstd = two_pass(x)
    return rstd if x.dtype == torch.float64 else rstd.bfloat16().to(x.dtype)


def layer_norm(
    rstd_of: Callable[[Tensor], Tensor] = two_pass,
    both: bool = True,
    db_of: Callable[[Tensor], Tensor] = lambda dy: up(dy).sum(0),
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Layer norm, which recomputes what it needs in backward."""

    class LayerNorm(Function):
        @staticmethod
        def forward(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return plain_layer_norm(x, w, b)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            ctx.save_for_backward(inputs[0], inputs[1])

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x, w = (up(t) for t in ctx.saved_tensors)
            rstd = rstd_of(x)
            n = (x - x.mean(-1, keepdim=True)) * rstd
            g = up(dy) * w
            dx = g - n * (g * n).mean(-1, keepdim=True)
            if both:
                dx = dx - g.mean(-1, keepdim=True)
            return (dx * rstd).to(dy.dtype), (up(dy) * n).sum(0).to(dy.dtype), db_of(dy).to(dy.dtype)

    return LayerNorm.apply


def plain_layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Of torch."""
    return F.layer_norm(x, w.shape, w, b, EPS)


def in_memory_order(t: Tensor) -> Tensor:
    """What a kernel reads that takes a tensor to be contiguous; NaN behind the end of its storage."""
    there = t.untyped_storage().nbytes() // t.element_size() - t.storage_offset()
    n = max(min(there, t.numel()), 0)
    read = t.new_full((t.numel(),), float("nan"))
    read[:n] = t.as_strided((n,), (1,))
    return read.view(t.shape)


def in_blocks(rows: Tensor) -> Tensor:
    """The sum over rows, in blocks of 16."""
    total = torch.zeros_like(rows[0]) if len(rows) else rows.sum(0)
    for block in rows.split(16):
        total = total + block.sum(0)
    return total


def last_block(rows: Tensor) -> Tensor:
    """What is left when every block of 16 rows writes over the sum of the one before."""
    return rows.split(16)[-1].sum(0)


def rms_mean(x: Tensor) -> Tensor:
    """The mean square of a row."""
    return x.square().mean(-1, keepdim=True)


def padded(x: Tensor) -> Tensor:
    """The mean square over a block, which is the next power of two."""
    block = 1 << max(x.shape[-1] - 1, 0).bit_length()
    return x.square().sum(-1, keepdim=True) / block


def in_float16(x: Tensor) -> Tensor:
    """The mean square, the squares in float16 where that is the dtype of the input."""
    return up(x.square()).mean(-1, keepdim=True)


def rms_norm(
    mean: Callable[[Tensor], Tensor] = rms_mean,
    total: Callable[[Tensor], Tensor] = in_blocks,
    widen: Callable[[Tensor], Tensor] = up,
    rows: slice = slice(None),
) -> Callable[[Tensor, Tensor], Tensor]:
    """RMS norm in the old style; `widen` comes before the squares, `rows` are those that the gradient is written for."""

    class RMSNorm(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return plain_rms_norm(x, w)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
            x, w = ctx.saved_tensors
            rstd = torch.rsqrt(mean(widen(x)) + EPS)
            n = up(x) * rstd
            g = up(dy) * up(w)
            dx = torch.zeros_like(n)
            dx[rows] = ((g - n * (g * n).mean(-1, keepdim=True)) * rstd)[rows]
            return dx.to(x.dtype), total(up(dy) * n).to(w.dtype)

    return RMSNorm.apply


def plain_rms_norm(x: Tensor, w: Tensor) -> Tensor:
    """Of torch."""
    return F.rms_norm(x, w.shape, w, EPS)


def of_rows(name: str, kind: str, reference: Callable[..., Tensor], gradient: Callable[..., Tensor], *caught_by: str) -> Fault:
    """A fault of softmax or log_softmax."""
    fn = along_rows(reference, gradient)
    return Fault(name=name, family="softmax", kind=kind, inputs="x: B N", fn=fn, reference=reference, caught_by=caught_by)


def of_norm(name: str, kind: str, fn: Callable[..., Tensor], *caught_by: str) -> Fault:
    """A fault of a norm; the name tells which."""
    layer = name.startswith("layer")
    reference = plain_layer_norm if layer else plain_rms_norm
    inputs = LAYER if layer else RMS
    return Fault(name=name, family="norm", kind=kind, inputs=inputs, fn=fn, reference=reference, caught_by=caught_by)


def of_entropy(name: str, fn: Callable[..., Tensor], *caught_by: str) -> Fault:
    """A fault of cross entropy."""
    return Fault(
        name=name,
        family="softmax",
        kind="value",
        inputs="x: B N, t: B N",
        fn=fn,
        reference=cross_entropy,
        caught_by=caught_by,
    )


FAULTS = [
    of_rows("softmax gradient without the sum", "value", softmax, without_sum, "gradient_value"),
    of_rows("softmax gradient sums over columns", "value", softmax, over_columns, "gradient_value"),
    of_rows("softmax gradient drops the last of odd rows", "shape", softmax, pairs_of_rows, "sizes", "gradient_value"),
    of_rows("log_softmax gradient overflows", "range", log_softmax, without_max, "values"),
    of_rows("log_softmax gradient sums the first row", "value", log_softmax, sum_of_first_row, "gradient_value"),
    of_entropy("cross entropy takes targets to sum to 1", entropy(normalized=True), "gradient_value"),
    of_entropy("cross entropy divides twice", entropy(lambda rows: 1 / max(rows, 1) ** 2), "gradient_value"),
    Fault(
        name="softmax overflows",
        family="softmax",
        kind="range",
        inputs="x: B N",
        fn=along_rows(lambda x: (up(x).exp() / up(x).exp().sum(-1, keepdim=True)).to(x.dtype), softmax_gradient),
        reference=softmax,
        caught_by=("values",),
    ),
    of_norm("layer_norm gradient without the mean", "value", layer_norm(both=False), "gradient_value"),
    of_norm("layer_norm gradient with eps outside", "value", layer_norm(outside), "gradient_value", "values"),
    of_norm("layer_norm gradient with N - 1", "value", layer_norm(unbiased), "gradient_value"),
    of_norm("layer_norm gradient by one pass", "range", layer_norm(one_pass), "values"),
    of_norm("layer_norm gradient by rounded deviations", "precision", layer_norm(rounded), "dtypes"),
    of_norm(
        "layer_norm db takes the cotangent to be contiguous",
        "layout",
        layer_norm(db_of=lambda dy: up(in_memory_order(dy)).sum(0)),
        "cotangent_layout",
    ),
    of_norm("rms_norm dw of the last 16 rows", "shape", rms_norm(total=last_block), "sizes"),
    of_norm("rms_norm mean over the padded row", "shape", rms_norm(padded), "sizes", "gradient_value"),
    of_norm("rms_norm gradient without the last row", "shape", rms_norm(rows=slice(0, -1)), "gradient_value"),
    of_norm("rms_norm squares overflow in float16", "precision", rms_norm(in_float16, widen=lambda t: t), "dtypes", "values"),
]

TWINS = [
    Twin(
        name="softmax",
        family="softmax",
        inputs="x: B N",
        fn=along_rows(softmax, softmax_gradient),
        reference=softmax,
    ),
    Twin(
        name="log_softmax",
        family="softmax",
        inputs="x: B N",
        fn=along_rows(log_softmax, log_softmax_gradient),
        reference=log_softmax,
    ),
    Twin(
        name="cross entropy",
        family="softmax",
        inputs="x: B N, t: B N",
        fn=entropy(),
        reference=cross_entropy,
    ),
    Twin(name="layer_norm", family="norm", inputs=LAYER, fn=layer_norm(), reference=plain_layer_norm),
    Twin(name="rms_norm in blocks", family="norm", inputs=RMS, fn=rms_norm(), reference=plain_rms_norm),
]
