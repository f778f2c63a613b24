"""Functions that write to their arguments on purpose: said so and not, to the input and to the gradient that is there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from faults.record import Fault, Twin


class ReluInPlace(Function):
    """ReLU over its input, said so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.relu_()
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return dy * (y > 0)


class ReluUnsaid(Function):
    """ReLU over its input, of which autograd hears nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.relu_()
        ctx.save_for_backward(x > 0)
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (mask,) = ctx.saved_tensors
        return dy * mask


class SumsIntoGrad(Function):
    """A scale whose gradient goes straight to where earlier ones are, as fused accumulation does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        x, w = ctx.saved_tensors
        dw = (dy * x).sum(0)
        if w.is_leaf and w.grad is not None:
            w.grad += dw
            return dy * w, None
        return dy * w, dw


FAULTS = [
    Fault(
        name="relu writes to its input, and autograd hears nothing of it",
        family="activation",
        kind="mutation",
        inputs="x: B N -> B N",
        fn=ReluUnsaid.apply,
        reference=torch.relu,
        caught_by=("nothing_changed",),
        contract={"mutates": ("x",)},
    ),
    Fault(
        name="scale adds to the weight's .grad by itself",
        family="norm",
        kind="mutation",
        inputs="x: B N, w: N -> B N",
        fn=SumsIntoGrad.apply,
        reference=torch.mul,
        caught_by=("nothing_changed",),
    ),
]

TWINS = [
    Twin(
        name="relu in place, as declared",
        family="activation",
        inputs="x: B N -> B N",
        fn=ReluInPlace.apply,
        reference=torch.relu,
        contract={"mutates": ("x",)},
    ),
]
