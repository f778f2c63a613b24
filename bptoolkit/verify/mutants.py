"""The mistakes that `bptoolkit verify --mutate` plants, one at a time.

A mutant is a function of one `Call` of backward. It returns the gradients to hand on, or None where this call gives it nothing
to spoil.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .planting import Call, Gradients, mutant, noted, on_forward, plain  # relative: see there

# --- values ---


@mutant(
    "values", "one gradient is 1 % too large", "compare this gradient with float64 autograd of plain torch, tightly", each=True
)
def drift(call: Call) -> Gradients | None:
    return call.each(lambda g: g * 1.01)


@mutant("values", "every gradient is twice what it should be", "compare the gradients with autograd of plain torch")
def double(call: Call) -> Gradients | None:
    return call.each(lambda g: g * 2)


@mutant("values", "every gradient has the wrong sign", "compare the gradients with autograd of plain torch")
def sign(call: Call) -> Gradients | None:
    return call.each(lambda g: -g)


@mutant("values", "the gradients are divided by the batch size", "use a batch of more than one, and compare values", notes=True)
def mean(call: Call) -> Gradients | None:
    batch = next((shape[0] for _, _, shape in noted(call.ctx) if shape), 1)
    return call.each(lambda g: g / batch) if batch > 1 else None


@mutant("values", "one gradient is zeros", "compare this gradient with a reference, with a random cotangent", each=True)
def zero(call: Call) -> Gradients | None:
    return call.each(lambda g: g * 0)


@mutant("values", "all gradients are zeros", "compare the gradients with a reference; a loose absolute tolerance passes zeros")
def all_zero(call: Call) -> Gradients | None:
    return call.each(lambda g: g * 0)


@mutant("values", "a gradient is None where it should be a tensor", "assert that every input gets a gradient", each=True)
def none(call: Call) -> Gradients | None:
    grads = call.run()
    if call.which is None or call.which >= len(grads) or grads[call.which] is None:
        return None
    grads[call.which] = None
    return grads


@mutant("values", "the gradients carry noise of 0.1 %", "compare tightly, or compare two runs for equal bits")
def noise(call: Call) -> Gradients | None:
    return call.each(lambda g: g * (1 + 1e-3 * torch.randn_like(g)) if g.is_floating_point() else None)


@mutant(
    "values", "the gradients are rounded to bfloat16", "compare float32 or float64 gradients with a tolerance of their dtype"
)
def rounded(call: Call) -> Gradients | None:
    return call.each(lambda g: g.bfloat16().to(g.dtype) if g.dtype in (torch.float32, torch.float64) else None)


# --- places ---


@mutant("places", "two gradients of equal shape are swapped", "use different values in inputs of equal shape, and compare each")
def swap(call: Call) -> Gradients | None:
    grads = call.run()
    live = [k for k, g in enumerate(grads) if isinstance(g, Tensor)]
    for a in live:
        for b in live:
            if a < b and grads[a].shape == grads[b].shape and grads[a].dtype == grads[b].dtype:
                grads[a], grads[b] = grads[b], grads[a]
                return grads
    return None


@mutant("places", "a square gradient is transposed", "compare a square gradient element by element, not by its norm")
def transpose(call: Call) -> Gradients | None:
    return call.each(lambda g: g.mT if g.dim() > 1 and g.shape[-1] == g.shape[-2] > 1 else None)


@mutant("places", "the last row of each gradient is zero", "compare every element, with a random cotangent")
def last_row(call: Call) -> Gradients | None:
    def cut(g: Tensor) -> Tensor | None:
        return torch.cat((g[:-1], g[-1:] * 0)) if g.dim() and g.shape[0] > 1 else None

    return call.each(cut)


@mutant("places", "each gradient is shifted by one row", "compare every element, with a random cotangent and random inputs")
def roll(call: Call) -> Gradients | None:
    return call.each(lambda g: g.roll(1, 0) if g.dim() and g.shape[0] > 1 else None)


def _cut(g: Tensor, end: int) -> Tensor:
    return torch.cat((g[..., :end], g[..., end:] * 0), -1)


@mutant(
    "sizes",
    "what is left over after whole blocks of 16 is dropped",
    "test a size that 16 does not divide, such as 17",
    waits=True,
)
def tail(call: Call) -> Gradients | None:
    def cut(g: Tensor) -> Tensor | None:
        n = g.shape[-1] if g.dim() else 0
        return _cut(g, n - n % 16) if n > 16 and n % 16 else None

    return call.each(cut)


@mutant("sizes", "only the first block of 32 is computed", "test a size over 32, such as 33 or 65", waits=True)
def first_block(call: Call) -> Gradients | None:
    return call.each(lambda g: _cut(g, 32) if g.dim() and g.shape[-1] > 32 else None)


@mutant("sizes", "the gradients are wrong where a size is 1", "test inputs of which one size is 1", waits=True, notes=True)
def size_one(call: Call) -> Gradients | None:
    return call.each(lambda g: g * 2) if any(1 in shape for _, _, shape in noted(call.ctx)) else None


# --- layouts ---


def _raw(t: Any) -> Any:
    """What a kernel reads that takes the memory for contiguous."""
    if not plain(t) or t.is_contiguous() or t.numel() == 0:
        return t
    flat = t.as_strided((t.untyped_storage().nbytes() // t.element_size() - t.storage_offset(),), (1,))
    return flat[torch.arange(t.numel(), device=t.device) % flat.numel()].view(t.shape)


@mutant(
    "layouts",
    "backward ignores the strides of the cotangent",
    "pass an expanded (y.sum()) and a transposed cotangent",
    waits=True,
)
def cotangent_strides(call: Call) -> Gradients | None:
    """Where all elements are equal a wrapped read finds the same; a real one runs past the end, so that case is doubled."""
    if all(not plain(c) or c.is_contiguous() for c in call.cotangents):
        return None
    raw = [_raw(c) for c in call.cotangents]
    same = all(r is c or torch.equal(r, c) for r, c in zip(raw, call.cotangents))
    return call.each(lambda g: g * 2) if same else call.run(cotangents=raw)


@mutant("layouts", "backward takes its inputs for contiguous", "pass transposed and sliced inputs", waits=True, notes=True)
def input_strides(call: Call) -> Gradients | None:
    if all(contiguous for _, contiguous, _ in noted(call.ctx)):
        return None
    return call.each(lambda g: g.reshape(-1).roll(1).view(g.shape) if g.numel() > 1 else None)


# --- state ---


def _writable(t: Tensor) -> bool:
    """No two elements share memory."""
    return all(stride or size == 1 for size, stride in zip(t.shape, t.stride()))


@mutant(
    "state", "backward writes over the cotangent", "keep the cotangent that you pass, and compare it with a copy afterwards"
)
def writes_cotangent(call: Call) -> Gradients | None:
    grads = call.run()
    call.say("possible")
    for c in call.cotangents:
        if plain(c) and c.is_floating_point() and c.numel() and _writable(c):
            c.data.mul_(2)
            return grads
    return None


@mutant("state", "backward writes over a saved tensor", "compare the inputs with copies after backward, or run backward twice")
def writes_saved(call: Call) -> Gradients | None:
    grads = call.run()
    for s in getattr(call.ctx, "saved_tensors", ()):
        if plain(s) and s.is_floating_point() and s.numel() and _writable(s):
            s.data.mul_(2)
            return grads
    return None


@mutant(
    "state",
    "gradients are returned in a buffer that the next call overwrites",
    "keep a gradient, run backward again, compare it",
)
def workspace(call: Call) -> Gradients | None:
    if torch.is_grad_enabled():  # a copy into a buffer would lose the graph too, which is another mistake
        return None

    def reuse(g: Tensor) -> Tensor | None:
        if not plain(g):
            return None
        buffer = call.kept.setdefault((len(seen), g.shape, g.dtype), g.clone())
        seen.append(0)
        buffer.copy_(g)
        return buffer.detach()  # an alias of its own, which autograd takes over without a copy

    seen: list[int] = []
    return call.each(reuse)


@mutant("state", "a second backward through the same graph is wrong", "run backward twice under retain_graph=True", waits=True)
def second_backward(call: Call) -> Gradients | None:
    call.ctx.planted_runs = getattr(call.ctx, "planted_runs", 0) + 1
    return call.each(lambda g: g * 2) if call.ctx.planted_runs > 1 else None


def _remember_last(cls: Any, say: Callable[[str], None]) -> None:
    on_forward(cls, lambda ctx, inputs: _LAST.__setitem__(0, ctx))


_LAST: list[Any] = [None]


@mutant(
    "state",
    "backward uses what the latest forward saved (state on the class)",
    "run forward twice on inputs of one shape, then backward of the first",
    waits=True,
    also=_remember_last,
)
def last_call(call: Call) -> Gradients | None:
    last = _LAST[0]
    if last is None or last is call.ctx or type(last) is not type(call.ctx):
        return None
    return call.run(ctx=last)


def _save_data(cls: Any, say: Callable[[str], None]) -> None:
    def note(ctx: Any, inputs: Any) -> None:
        mine = {id(t) for t in inputs if plain(t)}
        save = ctx.save_for_backward

        def save_for_backward(*tensors: Any) -> None:
            if any(id(t) in mine for t in tensors):
                say("applied")
            save(*[t.data if id(t) in mine else t for t in tensors])

        ctx.save_for_backward = save_for_backward

    on_forward(cls, note)


@mutant(
    "state",
    "inputs are saved by .data: a change after forward is not noticed",
    "change an input in place after forward, and expect backward to raise; or differentiate twice",
    also=_save_data,
)
def saved_data(call: Call) -> Gradients | None:
    return None  # what it does is done in forward


# --- which gradients, which derivatives ---


@mutant(
    "subsets",
    "needs_input_grad is read at the next input: a gradient is skipped when its neighbour needs none",
    "let some inputs alone require grad, every subset of them",
    notes=True,
)
def need_shifted(call: Call) -> Gradients | None:
    places = [k for k, _, _ in noted(call.ctx)]
    if len(places) < 2:
        return None
    call.say("possible")
    need, grads, found = call.ctx.needs_input_grad, call.run(), False
    for k, following in zip(places, places[1:] + places[:1]):
        if k < len(grads) and isinstance(grads[k], Tensor) and not need[following]:
            grads[k], found = None, True
    return grads if found else None


@mutant("subsets", "backward raises if an output was not used", "differentiate through one output of several")
def unused_output(call: Call) -> Gradients | None:
    if len(call.cotangents) < 2:
        return None
    call.say("possible")
    if any(c is None or (plain(c) and c.numel() and not c.any()) for c in call.cotangents):
        call.say("applied")
        raise TypeError("planted by bptoolkit verify --mutate: unsupported operand of type NoneType")
    return None


@mutant(
    "derivatives", "the gradients are detached: second derivatives are lost", "differentiate twice (gradgradcheck)", waits=True
)
def detached(call: Call) -> Gradients | None:
    if not torch.is_grad_enabled():
        return None
    return call.each(lambda g: g.detach() if g.requires_grad else None)


def _zero_jvp(cls: Any, say: Callable[[str], None]) -> None:
    if cls.jvp is torch.autograd.Function.jvp:
        return
    original = cls.jvp

    @functools.wraps(original)
    def jvp(ctx: Any, *tangents: Any) -> Any:
        say("applied")
        out = original(ctx, *tangents)
        zeros = [t * 0 if isinstance(t, Tensor) else t for t in (out if isinstance(out, tuple) else (out,))]
        return tuple(zeros) if isinstance(out, tuple) else zeros[0]

    cls.jvp = staticmethod(jvp)
    say("possible")


@mutant("derivatives", "jvp returns zeros", "compare torch.func.jvp with a reference", also=_zero_jvp)
def jvp_zero(call: Call) -> Gradients | None:
    return None  # what it does is done in jvp


def _scale_forward(cls: Any, say: Callable[[str], None]) -> None:
    original = cls.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        if torch.compiler.is_compiling():
            return out
        given = {t.untyped_storage().data_ptr() for t in args if plain(t)}
        for y in out if isinstance(out, tuple | list) else (out,):
            if plain(y) and y.is_floating_point() and y.untyped_storage().data_ptr() not in given:
                y.data.mul_(1.01)
                say("applied")
        return out

    cls.forward = staticmethod(forward)


@mutant(
    "forward",
    "forward is 1 % too large, and backward with it",
    "compare the value of forward with a reference",
    also=_scale_forward,
)
def forward_drift(call: Call) -> Gradients | None:
    return call.each(lambda g: g * 1.01)
