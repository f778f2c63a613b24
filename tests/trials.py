"""Small functions, right and wrong, and trials of them, for the tests of the properties."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from bptoolkit.verify.contract import Contract
from bptoolkit.verify.point import Point
from bptoolkit.verify.trial import NotApplicable, Trial, Wrong


def trial_of(fn, *shapes, reference=None, contract=None, given=None, **point):
    point = Point(**point)
    g = torch.Generator().manual_seed(point.seed)
    values = tuple(torch.randn(s, generator=g, dtype=torch.float64).to(point.torch_dtype) for s in shapes)

    def bind(f):
        def call(*xs):
            out = f(*xs)
            return tuple(o for o in (out if isinstance(out, tuple) else (out,)) if o.is_floating_point())

        return call

    return Trial(
        call=bind(fn),
        reference=reference and bind(reference),
        names=tuple("xwb"[: len(values)]),
        values=values,
        point=point,
        contract=Contract.of(contract),
        fn=given or fn,
    )


def outcome(judge, *args, **kw):
    """ "ok", "wrong" or "n/a", and why."""
    try:
        judge(trial_of(*args, **kw))
    except Wrong as wrong:
        return "wrong", str(wrong)
    except NotApplicable as why:
        return "n/a", str(why)
    return "ok", ""


def expect(want, judge, *args, says="", **kw):
    got, why = outcome(judge, *args, **kw)
    assert got == want, why
    assert says in why


def sine(name, backward, *, save=lambda x: (x,), style="old", **more):
    """An autograd.Function of sin: what backward does with what was saved is the variable."""

    class Old(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(*save(x))
            return x.sin()

    class New(Function):
        @staticmethod
        def forward(x):
            return x.sin()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*save(inputs[0]))
            ctx.save_for_forward(*save(inputs[0]))

    base = {"old": Old, "new": New}[style]
    return type(name, (base,), {"backward": staticmethod(backward), **more}).apply


def right(ctx, g):
    (x,) = ctx.saved_tensors
    return g * x.cos()


def pushed(ctx, u):
    (x,) = ctx.saved_tensors
    return u * x.cos()


def unrecorded(ctx, g):
    (x,) = ctx.saved_tensors
    with torch.no_grad():
        return g * x.cos()


plain = sine("Plain", right)
new = sine("New", right, style="new", jvp=staticmethod(pushed), generate_vmap_rule=True)
once = sine("Once", once_differentiable(right))


def operator(name, fn, fake):
    """An operator of torch.library that computes sin(x) times its second argument, if it has one."""
    op = torch.library.custom_op(f"bptest::{name}", fn, mutates_args=())
    op.register_fake(fake)

    def setup(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.factors = inputs[1:]

    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        g = g * x.cos()
        return (g * ctx.factors[0], None) if ctx.factors else g

    op.register_autograd(backward, setup_context=setup)
    return op


def _sine(x: Tensor) -> Tensor:
    return x.sin()


def _scaled(x: Tensor, factor: float = 1.0) -> Tensor:
    return x.sin() * factor


def _writes(x: Tensor) -> Tensor:
    x.detach().add_(1)
    return x.sin()


def _raises(x):
    raise ValueError("no such thing")


good_op = operator("sine", _scaled, lambda x, factor=1.0: torch.empty_like(x))
hides_a_write = operator("hidden", _writes, torch.empty_like)
wrong_fake = operator("fake", _sine, lambda x: x.new_empty(x.shape[:-1]))
wrong_strides = operator("strides", _sine, lambda x: x.new_empty(x.shape[::-1]).mT)
no_fake = operator("nofake", _sine, _raises)
