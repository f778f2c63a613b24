"""What a function does to memory: planted mistakes that each property finds, and their right twins that pass."""

from __future__ import annotations

import pytest
import torch
from functions import Exp_, Identity, Replayed, copies_and_writes, right, sine, writes_cotangent, writes_saved
from torch.autograd import Function
from trials import expect, trial_of

from bptoolkit.verify.properties import storage
from bptoolkit.verify.trial import Wrong

# --- nothing_changed --------------------------------------------------------------------------------------------------------


def writes_input(ctx, x):
    ctx.save_for_backward(x)
    y = x.sin()
    x.data.mul_(0.5)
    return y


def writes_beyond(ctx, g):
    wide = g.as_strided((g.numel() + 1,), (1,), g.storage_offset())
    wide[-1] = 0.0
    return g * ctx.saved_tensors[0].cos()


def adds_to_grad(ctx, g):
    (x,) = ctx.saved_tensors
    if x.grad is not None and not torch.is_grad_enabled():
        x.grad.add_(g * x.cos())
        return None
    return g * x.cos()


def forgets_to_say_so(ctx, x):
    ctx.save_for_backward(x.clone())
    with torch.no_grad():
        x.sin_()
    return x.clone()


class SineInPlace(Function):
    """Sine over its input, said so."""

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        ctx.save_for_backward(x.clone())
        return x.sin_()

    backward = staticmethod(right)


def test_nothing_changed():
    judge = storage.nothing_changed
    expect("wrong", judge, sine(right, writes_input), (3,), says="forward wrote over input x")
    expect("wrong", judge, sine(writes_cotangent), (3,), says="backward wrote over cotangent 0")
    expect("wrong", judge, sine(writes_saved), (3,), says="backward wrote over input x")
    expect("wrong", judge, sine(writes_saved, copies_and_writes), (3,), says="backward wrote over saved tensor 0")
    expect("wrong", judge, sine(writes_beyond), (3,), says="memory beside the elements of cotangent 0")
    expect("ok", judge, sine(right, copies_and_writes), (3,))


def test_nothing_changed_but_what_is_declared():
    judge = storage.nothing_changed
    expect("ok", judge, sine(writes_cotangent), (3,), contract={"mutates": "cotangents"})
    expect("ok", judge, Exp_.apply, (3,), contract={"mutates": "x"})
    expect("wrong", judge, sine(right, writes_input), (3,), contract={"mutates": "x"}, says="mark_dirty")
    expect("wrong", judge, sine(writes_cotangent), (3,), contract={"mutates": "x"}, says="cotangent")


def test_nothing_changed_looks_at_grad_and_history():
    judge = storage.nothing_changed
    expect("wrong", judge, sine(adds_to_grad), (3,), says="wrote to x.grad")
    expect("ok", judge, SineInPlace.apply, (3,), contract={"mutates": "x"})
    expect(
        "wrong", judge, sine(right, forgets_to_say_so), (3,), contract={"mutates": "x"}, says="to autograd it is what it was"
    )

    def renormed(x):
        with torch.no_grad():
            x.mul_(0.5)
        return x.sin()

    expect("ok", judge, renormed, (3,), reference=renormed, contract={"mutates": "x"})
    expect("wrong", judge, renormed, (3,), reference=lambda x: (0.5 * x).sin(), contract={"mutates": "x"})


# --- gradients_kept ---------------------------------------------------------------------------------------------------------


def workspace(of_output):
    space = {}

    def at(t):
        return space.setdefault((t.shape, t.dtype), torch.empty(t.shape, dtype=t.dtype))

    def forward(ctx, x):
        ctx.save_for_backward(x)
        return at(x).copy_(x.sin()).data if of_output else x.sin()

    def backward(ctx, g):
        value = g * ctx.saved_tensors[0].cos()
        return value if of_output else at(g).copy_(value)

    return sine(backward, forward)


def made_in_forward(ctx, x):
    ctx.save_for_backward(x.cos())
    return x.sin().sum()


def test_gradients_kept():
    judge = storage.gradients_kept
    expect("wrong", judge, workspace(of_output=False), (3,), says="gradient of x was overwritten by a")
    expect("wrong", judge, workspace(of_output=True), (3,), says="output 0 was overwritten by a later call")
    expect(
        "wrong", judge, sine(lambda ctx, g: ctx.saved_tensors[0], made_in_forward), (3,), says="shares its memory with a saved"
    )
    expect("wrong", judge, sine(lambda ctx, g: ctx.saved_tensors[0].view_as(g)), (3,), says="shares its memory with input x")
    expect("ok", judge, sine(lambda ctx, g: g * ctx.saved_tensors[0], made_in_forward), (3,))
    expect("ok", judge, Identity.apply, (3,))  # the cotangent is the gradient
    expect("ok", judge, lambda x, w: x + w, (3,), (3,))  # of both


# --- version_counter --------------------------------------------------------------------------------------------------------


def as_attribute(ctx, x):
    ctx.x = x
    return x.sin()


def past_the_counter(ctx, x):
    ctx.save_for_backward(x.data)
    return x.sin()


def one_memory(x):
    y = x * 1
    return y, y.data


def tanh_of_attribute(ctx, x):
    ctx.y = x.tanh()
    return ctx.y


def test_version_counter():
    judge = storage.version_counter
    expect("wrong", judge, sine(lambda ctx, g: g * ctx.x.cos(), as_attribute), (3,), says="input x changed in place")
    expect("wrong", judge, sine(right, past_the_counter), (3,), says="input x changed in place")
    expect("wrong", judge, sine(lambda ctx, g: g * (1 - ctx.y**2), tanh_of_attribute), (3,), says="output 0 changed in place")
    expect("wrong", judge, sine(right, past_the_counter), (3,), contract={"deterministic": False})
    expect("wrong", judge, sine(lambda ctx, g, h: g + h, lambda ctx, x: one_memory(x)), (3,), says="share their memory")
    expect("ok", judge, lambda x: x.sin().split(1), (3,))
    expect("ok", judge, sine(right), (3,))
    expect("ok", judge, sine(right, copies_and_writes), (3,))
    expect("ok", judge, torch.tanh, (3,))
    expect("n/a", judge, sine(right), (3,), layout="expanded")


# --- memory -----------------------------------------------------------------------------------------------------------------


def cycle(ctx, x):
    y = x.sin()
    ctx.save_for_backward(x)
    ctx.mine = [y[:0].view(0)]  # nothing to see for hooks, but y itself follows
    ctx.self = ctx
    return y


def hoarder(what):
    kept = []

    def forward(ctx, x):
        ctx.save_for_backward(x)
        y = x.sin()
        kept.append({"input": x, "detached": x.detach(), "copy": x * 2}[what])
        return y

    return sine(right, forward)


def last_on_class():
    class Sine(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            Sine.last = x
            return x.sin()

        backward = staticmethod(right)

    return Sine.apply


def attribute(wrap):
    def forward(ctx, x):
        ctx.kept = wrap(x * 1)
        ctx.save_for_backward(x)
        return x.sin()

    return sine(right, forward)


def made_per_call(x):
    def forward(ctx, t):
        return t.sin()

    def backward(ctx, g):
        return g * x.detach().cos()

    return sine(backward, forward)(x)


def cached_table():
    known = {}

    def table(n, dtype):
        return known.setdefault((n, dtype), torch.arange(n, dtype=dtype))

    return lambda x: x * table(x.shape[-1], x.dtype)


def test_memory():
    judge = storage.memory
    expect("wrong", judge, sine(right, cycle), (3,), says="a cycle through the graph")
    for what in ("input", "detached", "copy"):
        expect("wrong", judge, hoarder(what), (3,))
    expect("wrong", judge, hoarder("copy"), (3,), says="global list")
    expect("wrong", judge, last_on_class(), (3,), says="something global holds it")
    for wrap in (lambda t: t, lambda t: [(t,)], lambda t: {"a": t}, lambda t: lambda: t, lambda t: t > 0):
        expect("wrong", judge, attribute(wrap), (3,), says="ctx.kept holds a tensor")
    expect("wrong", judge, made_per_call, (3,), says="cycle")
    expect("ok", judge, attribute(lambda t: (t.shape, 3, "s", t.sum())), (3,))
    expect("ok", judge, Replayed.apply, (3,), contract={"random": True})
    expect("ok", judge, cached_table(), (3,))
    lstm = torch.nn.LSTM(3, 4).double()
    expect("ok", judge, lambda x: lstm(x)[0], (2, 3, 3))


def test_wrong_is_certain():
    with pytest.raises(Wrong) as caught:
        storage.memory(trial_of(last_on_class(), (3,)))
    assert caught.value.gross
