"""Faults of operators of torch.library and of modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faults.record import Fault, Twin


def up(t: Tensor) -> Tensor:
    """To the dtype to compute in."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def fake_right(x: Tensor, w: Tensor) -> Tensor:
    """What the operator returns, without computing it."""
    return x.new_empty(x.shape)


def save_right(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    """Both factors."""
    ctx.save_for_backward(*inputs)


def scaled_silu(
    name: str,
    fake: Callable[[Tensor, Tensor], Tensor] = fake_right,
    save: Callable[[Any, tuple[Tensor, Tensor], Tensor], None] = save_right,
    enter: Callable[[Tensor], Tensor] = lambda x: x,
    factor: float = 1.0,
) -> Any:
    """`w * silu(x)`, the two of one shape, as an operator with its gradient in an operator of its own."""

    @torch.library.custom_op(f"bpfaults::{name}_backward", mutates_args=())
    def backward_op(dy: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        dy, wide, s = up(dy), up(x), torch.sigmoid(up(x))
        dx = dy * up(w) * s * (1 + factor * wide * (1 - s))
        return dx.to(x.dtype).contiguous(), (dy * wide * s).to(w.dtype).contiguous()

    @backward_op.register_fake
    def _(dy: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.shape), w.new_empty(w.shape)

    @torch.library.custom_op(f"bpfaults::{name}", mutates_args=())
    def op(x: Tensor, w: Tensor) -> Tensor:
        x = enter(x)
        return (up(x) * torch.sigmoid(up(x)) * up(w)).to(x.dtype).contiguous()

    op.register_fake(fake)

    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        dx, dw = backward_op(dy, *ctx.saved_tensors)
        return dx if ctx.needs_input_grad[0] else None, dw if ctx.needs_input_grad[1] else None

    op.register_autograd(backward, setup_context=save)
    return op


def reference(x: Tensor, w: Tensor) -> Tensor:
    """In plain torch, rounded once."""
    return (F.silu(up(x)) * up(w)).to(x.dtype)


def save_what_is_needed(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    """The input for the weight's gradient alone: its own gradient needs it as well."""
    x, w = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else torch.zeros_like(x), w)


def negate(x: Tensor) -> Tensor:
    """Negates its input where it lies, and works on a copy."""
    y = x.clone()
    x.neg_()
    return y


class Linear(nn.Module):
    """A layer `x @ w.T + b`, through a function of its three tensors."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor], at_inference: Any = None) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(5)
        self.weight = nn.Parameter(torch.randn(3, 4, generator=g))
        self.bias = nn.Parameter(torch.randn(3, generator=g))
        self.function, self.at_inference = function, at_inference or function

    def forward(self, x: Tensor) -> Tensor:
        return (self.function if self.training else self.at_inference)(x, self.weight, self.bias)


class LinearFunction(torch.autograd.Function):
    """A layer's function with a backward of its own."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, average: bool = False) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.average = average
        return F.linear(x, weight, bias)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        flat = dy.reshape(-1, dy.shape[-1])
        db = flat.sum(0) / max(len(flat), 1) if ctx.average else flat.sum(0)
        return dy @ weight, flat.mT @ x.reshape(-1, x.shape[-1]), db, None


SILU: dict[str, Any] = {"family": "library", "inputs": "x: B N, w: B N -> B N", "reference": reference}
LAYER: dict[str, Any] = {"family": "module", "inputs": "x: B 4 -> B 3", "reference": Linear(F.linear)}
AVERAGED = Linear(lambda x, w, b: LinearFunction.apply(x, w, b, True))
RIGHT = Linear(LinearFunction.apply)

FAULTS = [
    Fault(
        name="operator whose fake has another shape",
        kind="contract",
        fn=scaled_silu("fake_shape", fake=lambda x, w: x.new_empty(x.shape[:-1])),
        caught_by=("fake_tensors", "registration", "compile"),
        **SILU,
    ),
    Fault(
        name="operator whose fake is always float32",
        kind="contract",
        fn=scaled_silu("fake_dtype", fake=lambda x, w: torch.empty(x.shape, device=x.device)),
        caught_by=("fake_tensors", "registration", "compile"),
        **SILU,
    ),
    Fault(
        name="operator whose fake squeezes a batch of one",
        kind="contract",
        fn=scaled_silu("fake_squeezed", fake=lambda x, w: x.new_empty(x.shape).squeeze(0)),
        caught_by=("fake_tensors", "registration", "compile"),
        **SILU,
    ),
    Fault(
        name="operator whose fake follows the strides of its input",
        kind="layout",
        fn=scaled_silu("fake_strides", fake=lambda x, w: torch.empty_like(x)),
        caught_by=("fake_tensors", "registration", "compile"),
        **SILU,
    ),
    Fault(
        name="operator saves its inputs in the wrong order",
        kind="value",
        fn=scaled_silu("saves_swapped", save=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[::-1])),
        caught_by=("gradient_value",),
        **SILU,
    ),
    Fault(
        name="operator saves its input for the weight alone",
        kind="contract",
        fn=scaled_silu("saves_less", save=save_what_is_needed),
        caught_by=("grad_subsets",),
        **SILU,
    ),
    Fault(
        name="operator writes over its input without saying so",
        kind="mutation",
        fn=scaled_silu("negates", enter=negate),
        caught_by=("nothing_changed", "registration"),
        **SILU,
    ),
    Fault(
        name="operator with a factor in its gradient",
        kind="value",
        fn=scaled_silu("factor", factor=0.98),
        caught_by=("gradient_value",),
        **SILU,
    ),
    Fault(
        name="layer that detaches its weight",
        kind="value",
        fn=Linear(lambda x, w, b: F.linear(x, w.detach(), b)),
        caught_by=("gradient_value",),
        **LAYER,
    ),
    Fault(
        name="layer that averages its bias gradient", kind="value", fn=AVERAGED, caught_by=("gradient_value", "sizes"), **LAYER
    ),
    Fault(
        name="layer that is wrong at inference alone",
        kind="state",
        fn=Linear(F.linear, lambda x, w, b: F.linear(x, w, b.detach())).eval(),
        caught_by=("gradient_value",),
        **LAYER,
    ),
]

TWINS = [
    Twin(
        name="operator with a fake and a gradient",
        fn=scaled_silu("right"),
        contract={"fake_tensors": True, "compile": True},
        **SILU,
    ),
    Twin(name="layer with a function of its own", fn=RIGHT, **LAYER),
    Twin(name="layer in plain torch, at inference", fn=Linear(F.linear).eval(), contract={"compile": True}, **LAYER),
]
