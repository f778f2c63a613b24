"""Faults of functions with several outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from faults.record import Fault, Twin


def up(t: Tensor) -> Tensor:
    """To the dtype to compute in."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def pair(
    backward: Callable[[Tensor, Tensor | None, Tensor | None], Tensor],
    materialize: bool = True,
    forward: Callable[[Tensor], tuple[Tensor, Tensor]] = lambda x: (x.sin(), x.cos()),
    constant: bool = False,
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Sine and cosine at once, with a backward `(x, ds, dc) -> dx`; `constant`: the cosine is marked non-differentiable."""
    compute, differentiate = forward, backward

    class Pair(Function):
        @staticmethod
        def forward(x: Tensor) -> tuple[Tensor, Tensor]:
            return compute(x)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
            ctx.save_for_backward(*inputs)
            ctx.set_materialize_grads(materialize)
            if constant:
                ctx.mark_non_differentiable(output[1])

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, ds: Tensor | None, dc: Tensor | None) -> Tensor:
            (x,) = ctx.saved_tensors
            wide = [None if d is None else up(d) for d in (ds, dc)]
            return differentiate(up(x), *wide).to(x.dtype)

    return Pair.apply


def both(x: Tensor, ds: Tensor, dc: Tensor) -> Tensor:
    """From two cotangents."""
    return ds * x.cos() - dc * x.sin()


def each(x: Tensor, ds: Tensor | None, dc: Tensor | None) -> Tensor:
    """From those cotangents that there are."""
    g = torch.zeros_like(x)
    if ds is not None:
        g = g + ds * x.cos()
    if dc is not None:
        g = g - dc * x.sin()
    return g


def one_is_special(x: Tensor, ds: Tensor | None, dc: Tensor | None) -> Tensor:
    """A short cut for the sine alone, from when the function had one output."""
    return ds * (1 - x * x / 2) if dc is None else each(x, ds, dc)


def all_or_nothing(x: Tensor, ds: Tensor | None, dc: Tensor | None) -> Tensor:
    """No gradient unless both outputs are used."""
    return torch.zeros_like(x) if ds is None or dc is None else both(x, ds, dc)


def sine_cosine(x: Tensor) -> tuple[Tensor, Tensor]:
    """The reference."""
    return x.sin(), x.cos()


def products(first_only: bool) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`x * w` and `w * w`."""

    class Products(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
            ctx.save_for_backward(x, w)
            ctx.set_materialize_grads(False)
            return x * w, w * w

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dp: Tensor | None, dq: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
            x, w = ctx.saved_tensors
            if dp is None:
                return None, None if first_only or dq is None else (2 * up(dq) * up(w)).to(w.dtype)
            dw = up(dp) * up(x) if dq is None else up(dp) * up(x) + 2 * up(dq) * up(w)
            return dp * w, dw.to(w.dtype)

    return Products.apply


def rms(residual: bool | None) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """RMSNorm and its scale: differentiated (True), marked a constant (None), or dropped without a word (False)."""

    class Rms(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
            y, scale = rms_norm(x)
            ctx.save_for_backward(x)
            if residual is None:
                ctx.mark_non_differentiable(scale)
            return y, scale

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dy: Tensor, dscale: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            dy, wide = up(dy), up(x)
            scale = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-5)
            total = (dy * wide).sum(-1, keepdim=True)
            if residual:
                total = total + up(dscale)
            return (scale * dy - total * scale**3 * wide / max(x.shape[-1], 1)).to(x.dtype)

    return Rms.apply


def rms_norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """The reference, with a scale that has a gradient."""
    wide = up(x)
    scale = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-5)
    return (wide * scale).to(x.dtype), scale.to(x.dtype)


def rms_norm_constant(x: Tensor) -> tuple[Tensor, Tensor]:
    """The reference, with a scale that is a constant."""
    y, scale = rms_norm(x)
    return y, scale.detach()


def ordered(back: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Sorted values and where they were."""

    class Sort(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
            values, at = torch.sort(x, dim=-1, stable=True)
            ctx.save_for_backward(at)
            ctx.mark_non_differentiable(at)
            return values, at

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dv: Tensor, _: Tensor) -> Tensor:
            (at,) = ctx.saved_tensors
            return back(dv, at)

    return Sort.apply


def sort(x: Tensor) -> tuple[Tensor, Tensor]:
    """The reference."""
    values, at = torch.sort(x, dim=-1, stable=True)
    return values, at


def halves(forward: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """An output twice: for the layer and for the log."""

    class Twice(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
            return forward(x)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:
            return 2 * (first + second)

    return Twice.apply


def same_memory(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors, one memory."""
    y = 2 * x
    return y, y.data


PAIR: dict[str, Any] = {"family": "multi", "inputs": "x: B N -> B N", "reference": sine_cosine}
PRODUCTS: dict[str, Any] = {"family": "multi", "inputs": "x: B N, w: B N -> B N", "reference": lambda x, w: (x * w, w * w)}
RMS: dict[str, Any] = {"family": "norm", "inputs": "x: B N -> B N", "reference": rms_norm}
SORT: dict[str, Any] = {"family": "multi", "inputs": "x: B N -> B N", "reference": sort}
TWICE: dict[str, Any] = {"family": "multi", "inputs": "x: B N -> B N", "reference": lambda x: (2 * x, 2 * x)}

FAULTS = [
    Fault(
        name="pair takes a cotangent that is undefined for a tensor",
        kind="contract",
        fn=pair(both, materialize=False),
        caught_by=("some_outputs_unused",),
        **PAIR,
    ),
    Fault(
        name="pair drops the gradient of its second output",
        kind="value",
        fn=pair(lambda x, ds, dc: ds * x.cos()),
        caught_by=("gradient_value",),
        **PAIR,
    ),
    Fault(
        name="pair takes its cotangents in the wrong order",
        kind="value",
        fn=pair(lambda x, ds, dc: both(x, dc, ds)),
        caught_by=("gradient_value",),
        **PAIR,
    ),
    Fault(
        name="pair has a wrong short cut for its first output alone",
        kind="contract",
        fn=pair(one_is_special, materialize=False),
        caught_by=("some_outputs_unused",),
        **PAIR,
    ),
    Fault(
        name="pair has no gradient unless both outputs are used",
        kind="contract",
        fn=pair(all_or_nothing, materialize=False),
        caught_by=("some_outputs_unused",),
        **PAIR,
    ),
    Fault(
        name="pair marks its second output non-differentiable",
        kind="contract",
        fn=pair(both, constant=True),
        caught_by=("gradient_value",),
        **PAIR,
    ),
    Fault(
        name="products give no gradient where the first is unused",
        kind="contract",
        fn=products(True),
        caught_by=("some_outputs_unused",),
        **PRODUCTS,
    ),
    Fault(
        name="rms norm returns a scale whose gradient it drops",
        kind="contract",
        fn=rms(False),
        caught_by=("gradient_value",),
        **RMS,
    ),
    Fault(
        name="sort gathers its gradient where it should scatter",
        kind="value",
        fn=ordered(lambda dv, at: dv.gather(-1, at)),
        caught_by=("gradient_value", "sizes"),
        **SORT,
    ),
    Fault(
        name="two outputs in one memory",
        kind="mutation",
        fn=halves(same_memory),
        caught_by=("version_counter", "nothing_changed"),
        **TWICE,
    ),
]

TWINS = [
    Twin(name="pair with cotangents filled in", fn=pair(both), **PAIR),
    Twin(name="pair with undefined cotangents", fn=pair(each, materialize=False), **PAIR),
    Twin(name="products with undefined cotangents", fn=products(False), **PRODUCTS),
    Twin(name="rms norm with its scale", fn=rms(True), **RMS),
    Twin(name="rms norm with a scale that is a constant", fn=rms(None), **(RMS | {"reference": rms_norm_constant})),
    Twin(name="sort", fn=ordered(lambda dv, at: torch.zeros_like(dv).scatter(-1, at, dv)), **SORT),
    Twin(name="an output twice", fn=halves(lambda x: (2 * x, 2 * x)), **TWICE),
]
