"""Faults that one call alone does not show: what is written over, kept too long, shared, or drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from faults.record import Fault, Twin


def up(t: Tensor) -> Tensor:
    """To the dtype to compute in."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def slope(x: Tensor) -> Tensor:
    """The derivative of SiLU, in the dtype to compute in."""
    s = torch.sigmoid(up(x))
    return s * (1 + up(x) * (1 - s))


def kept(ctx: Any, x: Tensor, y: Tensor) -> None:
    """The input, the right way."""
    ctx.save_for_backward(x)


def plain(ctx: Any, dy: Tensor) -> Tensor:
    """The right gradient from the saved input."""
    (x,) = ctx.saved_tensors
    return (up(dy) * slope(x)).to(x.dtype)


def silu(
    backward: Callable[[Any, Tensor], Tensor] = plain,
    save: Callable[[Any, Tensor, Tensor], None] = kept,
    forward: Callable[[Tensor], Tensor] = F.silu,
) -> Callable[[Tensor], Tensor]:
    """SiLU, opaque as a kernel is."""
    compute, keep, differentiate = forward, save, backward

    class Silu(Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return compute(x)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
            keep(ctx, inputs[0], output)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return differentiate(ctx, dy)

    return Silu.apply


def softmax(shift: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Softmax over the last dimension, its input shifted first."""

    class Softmax(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            y = torch.softmax(shift(x) if x.numel() else x, -1)
            ctx.save_for_backward(y)
            return y

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            (y,) = ctx.saved_tensors
            g = up(dy) * up(y)
            return (g - up(y) * g.sum(-1, keepdim=True)).to(y.dtype)

    return Softmax.apply


def over_saved(ctx: Any, dy: Tensor) -> Tensor:
    """Writes the gradient over a saved intermediate, past the version counter."""
    (d,) = ctx.saved_tensors
    return d.data.mul_(up(dy)).to(dy.dtype)


def save_slope(ctx: Any, x: Tensor, y: Tensor) -> None:
    """An intermediate."""
    ctx.save_for_backward(slope(x))


def from_slope(ctx: Any, dy: Tensor) -> Tensor:
    """From the saved intermediate."""
    (d,) = ctx.saved_tensors
    return (up(dy) * d).to(dy.dtype)


def over_input(ctx: Any, dy: Tensor) -> Tensor:
    """Leaves the derivative where the input was."""
    (x,) = ctx.saved_tensors
    x.data.copy_(slope(x))
    return (up(dy) * up(x)).to(x.dtype)


def over_cotangent(ctx: Any, dy: Tensor) -> Tensor:
    """Reuses the cotangent's memory for the gradient."""
    (x,) = ctx.saved_tensors
    return dy.mul_(slope(x))


def over_cotangent_data(ctx: Any, dy: Tensor) -> Tensor:
    """As before, past the version counter, and only where it may."""
    g = plain(ctx, dy)
    if dy.is_contiguous():
        with torch.autograd._unsafe_preserve_version_counter(dy):  # under vmap .data crashes
            dy.copy_(g)
    return g


def clear_pitch(t: Tensor) -> None:
    """Zeros between the rows of a matrix, as a kernel does that takes the row pitch for its own padding."""
    if t.dim() == 2 and t.shape[0] > 1 and t.stride(1) == 1 and t.stride(0) > t.shape[1] > 0:
        rows, columns = t.shape
        gap = (rows - 1, t.stride(0) - columns)
        torch.as_strided(t.detach(), gap, t.stride(), t.storage_offset() + columns).zero_()


def pad_input(x: Tensor) -> Tensor:
    """Pads the rows of its input with zeros."""
    clear_pitch(x)
    return F.silu(x)


def pad_cotangent(ctx: Any, dy: Tensor) -> Tensor:
    """Pads the rows of the cotangent with zeros."""
    clear_pitch(dy)
    return plain(ctx, dy)


WORKSPACE: dict[Any, Tensor] = {}
GRADIENTS: dict[Any, Tensor] = {}
SCALES: dict[Any, Tensor] = {}
HISTORY: list[Tensor] = []
NOISE = torch.Generator().manual_seed(1)


def key(t: Tensor) -> Any:
    """What a cache goes by."""
    return tuple(t.shape), t.dtype, t.device


def save_in_workspace(ctx: Any, x: Tensor, y: Tensor) -> None:
    """The derivative, in the one buffer there is for its shape."""
    d = slope(x).detach()
    ctx.d = WORKSPACE.setdefault(key(d), torch.empty_like(d)).copy_(d)


def from_attribute(ctx: Any, dy: Tensor) -> Tensor:
    """From a derivative on ctx."""
    return (up(dy) * ctx.d).to(dy.dtype)


def reuse_gradient(ctx: Any, dy: Tensor) -> Tensor:
    """The gradient, in the one buffer there is for its shape."""
    g = plain(ctx, dy)
    return GRADIENTS.setdefault(key(g), torch.empty_like(g)).copy_(g)


def class_state() -> Callable[[Tensor], Tensor]:
    """What backward needs is on the class."""

    class Silu(Function):
        x: Tensor

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            Silu.x = x.detach()
            return F.silu(x)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return (up(dy) * slope(Silu.x)).to(dy.dtype)

    return Silu.apply


def scaled_by_first(x: Tensor) -> Tensor:
    """`x / max|x|` by the largest magnitude of the first tensor that had this shape."""
    if not x.numel():
        return x.clone()
    scale = SCALES.setdefault(key(x), x.detach().abs().amax().clamp_min(1e-3))
    return x / scale


def scaled(x: Tensor) -> Tensor:
    """`x / max|x|`, the scale a constant."""
    return x / x.detach().abs().amax().clamp_min(1e-3) if x.numel() else x.clone()


def save_attribute(ctx: Any, x: Tensor, y: Tensor) -> None:
    """The input as an attribute: nobody checks its version."""
    ctx.x = x.detach()


def from_input_attribute(ctx: Any, dy: Tensor) -> Tensor:
    """From an input on ctx."""
    return (up(dy) * slope(ctx.x)).to(dy.dtype)


def save_data(ctx: Any, x: Tensor, y: Tensor) -> None:
    """The input's data: a version counter of its own."""
    ctx.save_for_backward(x.data)


def save_output_attribute(ctx: Any, x: Tensor, y: Tensor) -> None:
    """The input saved, and the output on ctx, which holds ctx: a cycle that goes through C++."""
    ctx.save_for_backward(x)
    ctx.y = y


def save_and_log(ctx: Any, x: Tensor, y: Tensor) -> None:
    """The input saved, and the output put down in a list that nobody empties."""
    ctx.save_for_backward(x)
    HISTORY.append(y.detach())


def draw(ctx: Any, dy: Tensor) -> Tensor:
    """Draws a number that it hardly needs."""
    return plain(ctx, dy + 0 * torch.rand((), device=dy.device).to(dy.dtype))


def replaced(ctx: Any, dy: Tensor) -> Tensor:
    """Puts zeros where the gradient is not finite, so that an overflow goes unseen."""
    return plain(ctx, dy).nan_to_num(0.0, 0.0, 0.0)


def reseed(x: Tensor) -> Tensor:
    """Seeds the generator of the whole program."""
    torch.manual_seed(0)
    return F.silu(x)


def empty_tail(ctx: Any, dy: Tensor) -> Tensor:
    """A gradient of `torch.empty` of which only whole blocks of four are written."""
    g = plain(ctx, dy).reshape(-1)
    out = torch.empty(g.numel() + 64, dtype=g.dtype, device=g.device)[32 : 32 + g.numel()]
    whole = g.numel() // 4 * 4
    out[:whole] = g[:whole]
    return out.view(dy.shape)


def filled(ctx: Any, dy: Tensor) -> Tensor:
    """A gradient of `torch.empty`, all of it written."""
    g = plain(ctx, dy)
    return torch.empty_like(g).copy_(g)


def shift(order: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """`x + b`, the gradient of b summed over the rows in an order."""

    class Shift(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, b: Tensor) -> Tensor:
            return x + b

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
            total = torch.zeros(dy.shape[-1:], dtype=up(dy).dtype, device=dy.device)
            for row in order(up(dy)).unbind(0):
                total = total + row
            return dy, total.to(dy.dtype)

    return Shift.apply


def shuffled(t: Tensor) -> Tensor:
    """As blocks of a grid arrive."""
    return t[torch.randperm(t.shape[0], generator=NOISE)]


def dropout(again: bool) -> Callable[[Tensor], Tensor]:
    """Dropout of a third, its mask saved or drawn again in backward."""

    class Dropout(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            mask = torch.rand(x.shape, device=x.device) > 0.33
            ctx.save_for_backward(mask)
            return x * mask / 0.67

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            (mask,) = ctx.saved_tensors
            return dy * (torch.rand(dy.shape, device=dy.device) > 0.33 if again else mask) / 0.67

    return Dropout.apply


def subtract_in_place(x: Tensor) -> Tensor:
    """Less its largest, written over x."""
    return x.sub_(x.amax(-1, keepdim=True))


def _silu(name: str, kind: str, caught_by: tuple[str, ...], **parts: Any) -> Fault:
    return Fault(
        name=name,
        family="activation",
        kind=kind,
        inputs="x: B N -> B N",
        fn=silu(**parts),
        reference=F.silu,
        caught_by=caught_by,
    )


def dropped(x: Tensor) -> Tensor:
    """Dropout of a third, in plain torch."""
    return x * (torch.rand(x.shape, device=x.device) > 0.33) / 0.67


SILU: dict[str, Any] = {"family": "activation", "inputs": "x: B N -> B N", "reference": F.silu}
STOCHASTIC: dict[str, Any] = {
    "family": "stochastic",
    "inputs": "x: B N -> B N",
    "reference": dropped,
    "contract": {"random": True},
}
ROWS: dict[str, Any] = {"family": "softmax", "inputs": "x: B N -> B N", "reference": lambda x: torch.softmax(x, -1)}
SHIFT: dict[str, Any] = {"family": "linear", "inputs": "x: B N, b: N -> B N", "reference": lambda x, b: x + b}


def _fault(name: str, kind: str, of: dict[str, Any], fn: Callable[..., Any], *caught_by: str) -> Fault:
    return Fault(name=name, kind=kind, fn=fn, caught_by=caught_by, **of)


FAULTS = [
    _fault(
        "softmax shifts its input in place", "mutation", ROWS, softmax(subtract_in_place), "nothing_changed", "input_layout"
    ),
    _silu("silu backward writes over its saved input", "mutation", ("nothing_changed", "backward_twice"), backward=over_input),
    _silu(
        "silu backward writes over a saved intermediate", "mutation", ("backward_twice",), backward=over_saved, save=save_slope
    ),
    _silu(
        "silu backward writes over the cotangent", "mutation", ("nothing_changed", "cotangent_layout"), backward=over_cotangent
    ),
    _silu("silu backward writes over a contiguous cotangent", "mutation", ("nothing_changed",), backward=over_cotangent_data),
    _silu("silu forward writes between the rows of a view", "mutation", ("nothing_changed",), forward=pad_input),
    _silu("silu backward writes between the rows of a cotangent", "mutation", ("nothing_changed",), backward=pad_cotangent),
    _silu(
        "silu saves in a workspace that calls share",
        "state",
        ("interleaved_calls",),
        backward=from_attribute,
        save=save_in_workspace,
    ),
    _silu("silu returns its gradient in a buffer that calls share", "state", ("gradients_kept",), backward=reuse_gradient),
    _fault("silu keeps its input on the class", "state", SILU, class_state(), "interleaved_calls"),
    Fault(
        name="scale of the first call of a shape",
        family="norm",
        kind="state",
        inputs="x: B N -> B N",
        fn=scaled_by_first,
        reference=scaled,
        caught_by=("forward_value", "values"),
    ),
    _silu(
        "silu keeps its input as an attribute",
        "state",
        ("version_counter",),
        backward=from_input_attribute,
        save=save_attribute,
    ),
    _silu("silu saves the data of its input", "state", ("version_counter",), save=save_data),
    _silu("silu keeps its output on ctx", "state", ("memory",), save=save_output_attribute),
    _silu("silu logs its outputs for ever", "state", ("memory",), save=save_and_log),
    _silu("silu backward draws a number", "randomness", ("global_rng",), backward=draw),
    _silu("silu gradient hides what is not finite", "range", ("linear_in_cotangent",), backward=replaced),
    _silu("silu forward seeds the generator", "randomness", ("global_rng",), forward=reseed),
    _silu("silu gradient has an unwritten tail", "shape", ("gradient_value", "sizes", "deterministic"), backward=empty_tail),
    _fault("bias gradient sums its rows in another order every time", "randomness", SHIFT, shift(shuffled), "deterministic"),
    _fault("dropout draws its mask again in backward", "randomness", STOCHASTIC, dropout(True), "gradient_value"),
]

TWINS = [
    Twin(name="silu saves its input", fn=silu(), **SILU),
    Twin(name="silu saves an intermediate", fn=silu(from_slope, save_slope), **SILU),
    Twin(name="silu fills an empty gradient", fn=silu(filled), **SILU),
    Twin(name="softmax shifts a copy", fn=softmax(lambda x: x - x.amax(-1, keepdim=True)), **ROWS),
    Twin(name="bias gradient sums its rows in order", fn=shift(lambda t: t), **SHIFT),
    Twin(name="dropout keeps its mask", fn=dropout(False), **STOCHASTIC),
]
