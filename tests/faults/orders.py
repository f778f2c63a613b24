"""Faults of second order, forward mode, vmap, compilation and recomputation: the first gradient is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from faults.record import Fault, Twin


def sine(
    backward: Callable[[Any, Tensor], Tensor],
    save: Callable[[Tensor, Tensor], Tensor] = lambda x, y: x,
    jvp: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Callable[[Tensor], Tensor]:
    """The sine, with a backward that autograd can look into."""
    differentiate, keep = backward, save

    class Sine(Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.sin()

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
            ctx.save_for_backward(keep(inputs[0], output))
            ctx.save_for_forward(inputs[0])

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return differentiate(ctx, dy)

    if jvp is not None:
        push = jvp
        Sine.jvp = staticmethod(lambda ctx, t: push(ctx.saved_tensors[0], t))
    return Sine.apply


def composite(ctx: Any, dy: Tensor) -> Tensor:
    """In differentiable operations."""
    (x,) = ctx.saved_tensors
    return dy * x.cos()


def constant_slope(ctx: Any, dy: Tensor) -> Tensor:
    """From a cosine of which autograd knows no origin."""
    (c,) = ctx.saved_tensors
    return dy * c


def slope_without_grad(ctx: Any, dy: Tensor) -> Tensor:
    """The cosine under no_grad."""
    (x,) = ctx.saved_tensors
    with torch.no_grad():
        c = x.cos()
    return dy * c


def cut_cotangent(ctx: Any, dy: Tensor) -> Tensor:
    """The graph to the cotangent is cut."""
    (x,) = ctx.saved_tensors
    return dy.detach() * x.cos()


def through(twice: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[[Any, Tensor], Tensor]:
    """A backward that is a Function itself, with a double backward `(g, dy, x) -> ddy, dx` written by hand."""

    class SineBackward(Function):
        @staticmethod
        def forward(ctx: Any, dy: Tensor, x: Tensor) -> Tensor:
            ctx.save_for_backward(dy, x)
            return dy * x.cos()

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
            return twice(g, *ctx.saved_tensors)

    return lambda ctx, dy: SineBackward.apply(dy, *ctx.saved_tensors)


def product(
    backward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    jvp: Callable[[Tensor, Tensor, Any, Any], Tensor] | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """`x * w`."""
    differentiate = backward

    class Product(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor, w: Tensor) -> Tensor:
            return x * w

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
            return differentiate(dy, *ctx.saved_tensors)

    if jvp is not None:
        push = jvp
        Product.jvp = staticmethod(lambda ctx, tx, tw: push(*ctx.saved_tensors, tx, tw))
    return Product.apply


def softmax(keep: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Softmax over the last dimension from its saved output."""

    class Softmax(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            y = torch.softmax(x, -1)
            ctx.save_for_backward(keep(y))
            return y

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            (y,) = ctx.saved_tensors
            wide = y.float() if y.dtype in (torch.float16, torch.bfloat16) else y
            g = dy * wide
            return (g - wide * g.sum(-1, keepdim=True)).to(y.dtype)

    return Softmax.apply


def centre(rule: Callable[[Any, Any, Any], Any] | None) -> Callable[[Tensor], Tensor]:
    """A row less its mean, over the last dimension, with a rule `(apply, size, dimension, x)` for vmap."""

    class Centre(Function):
        generate_vmap_rule = rule is None

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x - x.mean(-1, keepdim=True)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return dy - dy.mean(-1, keepdim=True)

    if rule is not None:
        batched = rule
        Centre.vmap = staticmethod(lambda info, in_dims, x: batched(Centre.apply, in_dims[0], x))
    return Centre.apply


def right_rule(apply: Any, at: int, x: Tensor) -> Any:
    """The batch first."""
    return apply(x.movedim(at, 0)), 0


def mixing_rule(apply: Any, at: int, x: Tensor) -> Any:
    """The mean is taken over the samples as well."""
    x = x.movedim(at, 0)
    return x - x.mean((0, -1), keepdim=True), 0


def first_rule(apply: Any, at: int, x: Tensor) -> Any:
    """Takes it that the batch comes first."""
    return apply(x), 0


def lost_rule(apply: Any, at: int, x: Tensor) -> Any:
    """The batch is in the second dimension of what comes back, which is not said."""
    y = apply(x.movedim(at, 0))
    return (y.transpose(0, 1), 0) if y.dim() > 2 else (y, 0)


def compiled_forward(x: Tensor) -> Tensor:
    """Takes another way under the compiler, for its sake: the last column stays as it was."""
    if torch.compiler.is_compiling() and x.shape[-1] > 0:
        return torch.cat((x[..., :-1].sin(), x[..., -1:]), -1)
    return x.sin()


def compiled_backward(ctx: Any, dy: Tensor) -> Tensor:
    """A short cut under the compiler."""
    (x,) = ctx.saved_tensors
    return dy * (1 - x * x / 2 if torch.compiler.is_compiling() else x.cos())


def in_backward(x: Tensor) -> Tensor:
    """Saves work when it is recomputed: an argument of one percent less."""
    if torch._C._current_graph_task_id() != -1:
        return (x * 0.99).sin()
    return x.sin()


def without_grad(x: Tensor) -> Tensor:
    """Under no_grad it takes itself to be at inference, where the scale is folded away."""
    return 2 * x.sin() if torch.is_grad_enabled() else x.sin()


class Same(Function):
    """The identity, whose gradient is the cotangent itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


def cosine_of(x: Tensor, y: Tensor) -> Tensor:
    """An intermediate, saved in place of the input."""
    return x.cos()


def right_twice(g: Tensor, dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The double backward of the sine."""
    return g * x.cos(), -g * dy * x.sin()


SINE: dict[str, Any] = {"family": "activation", "inputs": "x: B N -> B N", "reference": torch.sin}
PRODUCT: dict[str, Any] = {"family": "multi", "inputs": "x: B N, w: B N -> B N", "reference": torch.mul}
SOFTMAX: dict[str, Any] = {"family": "softmax", "inputs": "x: B N -> B N", "reference": lambda x: torch.softmax(x, -1)}
CENTRE: dict[str, Any] = {"family": "norm", "inputs": "x: B N -> B N", "reference": lambda x: x - x.mean(-1, keepdim=True)}


def _fault(name: str, fn: Any, *caught_by: str, kind: str = "second order", of: dict[str, Any] = SINE) -> Fault:
    return Fault(name=name, kind=kind, fn=fn, caught_by=caught_by, **of)


def _both(dy: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return dy * w, dy * x


FAULTS = [
    _fault("sine saves an intermediate", sine(constant_slope, cosine_of), "double_backward"),
    _fault("sine saves its input detached", sine(composite, lambda x, y: x.detach()), "double_backward"),
    _fault("sine backward computes its slope under no_grad", sine(slope_without_grad), "double_backward"),
    _fault("sine backward detaches the cotangent", sine(cut_cotangent), "double_backward"),
    _fault(
        "double backward of zeros",
        sine(through(lambda g, dy, x: (torch.zeros_like(g), torch.zeros_like(x)))),
        "double_backward",
    ),
    _fault(
        "double backward of the wrong sign", sine(through(lambda g, dy, x: (g * x.cos(), g * dy * x.sin()))), "double_backward"
    ),
    _fault(
        "double backward forgets the cotangent", sine(through(lambda g, dy, x: (g * x.cos(), -g * x.sin()))), "double_backward"
    ),
    _fault(
        "product backward detaches one factor",
        product(lambda dy, x, w: (dy * w, dy * x.detach())),
        "double_backward",
        of=PRODUCT,
    ),
    _fault("softmax saves a clone of its output", softmax(torch.clone), "double_backward", of=SOFTMAX),
    _fault("jvp by half", sine(composite, jvp=lambda x, t: 0.5 * t * x.cos()), "forward_mode", kind="transform"),
    _fault("jvp of zeros", sine(composite, jvp=lambda x, t: torch.zeros_like(x)), "forward_mode", kind="transform"),
    _fault(
        "jvp forgets the second tangent",
        product(_both, lambda x, w, tx, tw: tx * w),
        "forward_mode",
        kind="transform",
        of=PRODUCT,
    ),
    _fault("vmap rule mixes samples", centre(mixing_rule), "vmap", "per_sample_gradients", kind="transform", of=CENTRE),
    _fault("vmap rule takes the batch to come first", centre(first_rule), "vmap", kind="transform", of=CENTRE),
    _fault(
        "vmap rule names the wrong output dimension",
        centre(lost_rule),
        "vmap",
        "per_sample_gradients",
        kind="transform",
        of=CENTRE,
    ),
    _fault("forward differs when compiled", compiled_forward, "compile", kind="transform"),
    _fault("backward differs when compiled", sine(compiled_backward), "compile", kind="transform"),
    _fault("forward differs when recomputed", in_backward, "checkpoint", kind="transform"),
    Fault(
        name="forward differs under no_grad",
        family="activation",
        kind="state",
        inputs="x: B N -> B N",
        fn=without_grad,
        reference=lambda x: 2 * x.sin(),
        caught_by=("forward_value", "grad_subsets", "finite_differences"),
    ),
]

TWINS = [
    Twin(name="sine with a composite backward", fn=sine(composite), contract={"double_backward": True}, **SINE),
    Twin(name="sine with a double backward by hand", fn=sine(through(right_twice)), contract={"double_backward": True}, **SINE),
    Twin(
        name="sine with forward mode",
        fn=sine(composite, jvp=lambda x, t: t * x.cos()),
        contract={"double_backward": True, "forward_mode": True},
        **SINE,
    ),
    Twin(
        name="product with forward mode and a generated vmap rule",
        fn=product(_both, lambda x, w, tx, tw: tx * w + x * tw),
        contract={"forward_mode": True, "vmap": True},
        **PRODUCT,
    ),
    Twin(name="product with a composite backward", fn=product(_both), **PRODUCT),
    Twin(name="softmax saves its output", fn=softmax(lambda y: y), contract={"double_backward": True}, **SOFTMAX),
    Twin(name="centre with a vmap rule", fn=centre(right_rule), contract={"vmap": True}, **CENTRE),
    Twin(name="centre with a generated vmap rule", fn=centre(None), contract={"vmap": True}, **CENTRE),
    Twin(
        name="identity whose gradient is the cotangent itself",
        family="linear",
        inputs="x: B N -> B N",
        fn=Same.apply,
        reference=torch.clone,
    ),
]
