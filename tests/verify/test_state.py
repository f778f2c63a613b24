"""The properties of state: planted mistakes that each finds, and their right twins that pass; right functions pass all."""

from __future__ import annotations

import random as python_random
import threading
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from functions import (
    Both,
    Exp_,
    Identity,
    Masked,
    Matmul,
    Replayed,
    Styled,
    copies_and_writes,
    right,
    sine,
    writes_cotangent,
    writes_saved,
)
from helpers import draw_call
from torch.autograd import Function
from torch.nn import functional as F
from trials import expect, trial_of

from bptoolkit import OPS
from bptoolkit.verify.contract import Contract
from bptoolkit.verify.properties import numeric, state
from bptoolkit.verify.properties.values import compare_values
from bptoolkit.verify.trial import NotApplicable, Trial

NAMES = (*state.__all__, "linear_in_cotangent", "finite_differences")
ALL = {name: getattr(state, name, None) or getattr(numeric, name) for name in NAMES}
RIGHT = {
    "old": (sine(right), (2, 3)),
    "new": (Styled.apply, (2, 3)),
    "two outputs": (Both.apply, (2, 3)),
    "two inputs": (Matmul.apply, (2, 3), (3, 4)),
    "identity": (Identity.apply, (2, 3)),
    "torch identity": (lambda x: x, (2, 3)),
    "a view": (lambda x: x.mT, (2, 3)),
    "views": (lambda x: x.split(1, -1), (2, 3)),
    "expanded": (lambda x: x.expand(4, 2, 3), (2, 3)),
    "a sum": (torch.sum, (2, 3)),
    "scalar": (torch.tanh, ()),
    "empty": (torch.exp, (0, 3)),
    "one": (torch.exp, (1,)),
    "constant": (lambda x: x.new_ones(3), (2, 3)),
    "nan": (lambda x: x / 0.0 * 0.0, (2, 3)),
    "log": (torch.log, (2, 3)),  # NaN for some
    "softmax": (lambda x: x.softmax(-1), (17, 33)),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (3,), w, b), (2, 3), (3,), (3,)),
    "conv2d": (F.conv2d, (1, 2, 4, 4), (3, 2, 2, 2)),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), (1, 2, 4, 4)),
    "einsum": (lambda x, w: torch.einsum("bi,oi->bo", x, w), (2, 3), (4, 3)),
    "cumsum": (lambda x: x.cumsum(-1), (2, 3)),
    "gather": (lambda x: x.gather(1, torch.tensor([[0, 1], [2, 2]])), (2, 3)),
    "matmul": (torch.matmul, (17, 33), (33, 5)),
    "median": (lambda x: x.median(-1).values, (2, 3)),
    "attention": (F.scaled_dot_product_attention, (1, 2, 4, 3), (1, 2, 4, 3), (1, 2, 4, 3)),
}
POINTS = (
    {},
    {"dtype": "float32", "layout": "sliced", "cotangent": "ones"},
    {"dtype": "bfloat16"},
    {"dtype": "float16", "cotangent": "transposed"},
    {"layout": "expanded", "cotangent": "zeros"},
    {"layout": "transposed", "cotangent": "rows", "need": "01"},
)


@pytest.mark.parametrize("name", RIGHT)
def test_right_functions_pass(name):
    fn, *shapes = RIGHT[name]
    for reference in (None, fn):
        for point in POINTS:
            for judge in ALL.values():
                with suppress(NotApplicable):
                    judge(trial_of(fn, *shapes, reference=reference, **point))


@pytest.mark.parametrize("name", OPS)
def test_our_ops_pass(name):
    call = draw_call(OPS[name], 1)
    like = trial_of(lambda x: x, (1,), seed=1)
    names = tuple(f"i{k}" for k in range(len(call.tensors)))
    trial = Trial(call=call.ours, reference=call.reference, names=names, values=call.tensors, point=like.point)
    trial = replace(trial, contract=Contract(random=OPS[name].random or name == "rrelu"))
    for judge in ALL.values():
        with suppress(NotApplicable):
            judge(trial)


@pytest.mark.parametrize(
    ("fn", "contract"),
    [
        (Masked.apply, {"random": True}),
        (Replayed.apply, {"random": True}),
        (F.dropout, {"random": True}),
        (Exp_.apply, {"mutates": "x"}),
    ],
)
def test_what_is_declared_passes(fn, contract):
    for judge in ALL.values():
        with suppress(NotApplicable):
            judge(trial_of(fn, (4, 5), contract=contract))


# --- some_outputs_unused ----------------------------------------------------------------------------------------------------


def two(backward, materialize=False):
    def forward(ctx, x):
        ctx.set_materialize_grads(materialize)
        ctx.save_for_backward(x)
        return x.sin(), x.cos()

    return type("Two", (Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}).apply


def needs_both(ctx, gs, gc):
    (x,) = ctx.saved_tensors
    return gs * x.cos() - gc * x.sin()


def leaves_early(ctx, gs, gc):
    (x,) = ctx.saved_tensors
    return None if gs is None or gc is None else gs * x.cos() - gc * x.sin()


def mixes_up(ctx, gs, gc):
    (x,) = ctx.saved_tensors
    if gs is None:
        return gc * x.cos()
    return gs * x.cos() - (0 if gc is None else gc * x.sin())


def sine_and_cosine(x):
    return x.sin(), x.cos()


def test_some_outputs_unused():
    judge = state.some_outputs_unused
    expect("wrong", judge, two(needs_both), (3,), reference=sine_and_cosine, says="raised TypeError")
    expect("wrong", judge, two(leaves_early), (3,), reference=sine_and_cosine, says="output 0 alone")
    expect("wrong", judge, two(leaves_early), (3,), says="output 0 alone")  # against itself, with zeros for None
    expect("wrong", judge, two(mixes_up), (3,), reference=sine_and_cosine, says="output 1 alone")
    expect("ok", judge, two(needs_both, materialize=True), (3,), reference=sine_and_cosine)
    expect("ok", judge, Both.apply, (3,), reference=sine_and_cosine, dtype="bfloat16")
    expect("n/a", judge, torch.sin, (3,), says="one output")


# --- backward_twice ---------------------------------------------------------------------------------------------------------


def frees(ctx, g):
    z, ctx.z = ctx.z, None
    return g * z.cos()


def keeps_aside(ctx, x):
    ctx.z = x.clone()
    return x.sin()


def counts(ctx, g):
    ctx.n = getattr(ctx, "n", 0) + 1
    return g * ctx.saved_tensors[0].cos() * ctx.n


def test_backward_twice():
    judge = state.backward_twice
    expect("wrong", judge, sine(writes_saved, copies_and_writes), (3,), says="second backward")
    expect("wrong", judge, sine(writes_cotangent), (3,), says="second backward")
    expect("wrong", judge, sine(frees, keeps_aside), (3,), says="raised AttributeError")
    expect("wrong", judge, sine(counts), (3,), says="second backward")
    expect("wrong", judge, sine(counts), (3,), contract={"deterministic": False}, says="second backward")
    expect("ok", judge, sine(right), (3,))
    expect("ok", judge, sine(right), (3,), contract={"deterministic": False})


# --- interleaved_calls ------------------------------------------------------------------------------------------------------


def on_class():
    class Sine(Function):
        @staticmethod
        def forward(ctx, x):
            Sine.x = x
            return x.sin()

        @staticmethod
        def backward(ctx, g):
            return g * Sine.x.cos()

    return Sine.apply


def on_stack():
    class Sine(Function):
        stack = []  # noqa: RUF012

        @staticmethod
        def forward(ctx, x):
            if ctx.needs_input_grad[0]:
                Sine.stack.append(x.detach())
            return x.sin()

        @staticmethod
        def backward(ctx, g):
            return g * Sine.stack.pop().cos()

    return Sine.apply


def by_address():
    known = {}

    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        key = x.data_ptr(), x.shape
        if key not in known:
            known[key] = x.cos(), x
        return g * known[key][0]

    return sine(backward, forward)


def by_thread():
    local = threading.local()

    def forward(ctx, x):
        local.sign = 1.0
        ctx.save_for_backward(x)
        return x.sin()

    return sine(lambda ctx, g: g * ctx.saved_tensors[0].cos() * local.sign, forward)


def by_length():
    """A table for the last length that came by."""
    table = {}

    def forward(ctx, x):
        table["n"] = torch.arange(len(x), dtype=x.dtype) / len(x)
        ctx.save_for_backward(x)
        return x.sin() * table["n"][:, None]

    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.cos() * table["n"][: len(x), None]

    return sine(backward, forward)


def test_interleaved_calls():
    judge = state.interleaved_calls
    expect("wrong", judge, on_class(), (3,), says="with another call between")
    expect("wrong", judge, on_stack(), (3,))
    expect("wrong", judge, by_address(), (3,))
    expect("wrong", judge, by_thread(), (3,), says="another thread")
    expect(
        "wrong",
        judge,
        by_length(),
        (3, 2),
        reference=lambda x: x.sin() * (torch.arange(len(x)) / len(x))[:, None],
        says="other sizes",
    )
    expect("wrong", judge, on_class(), (3,), contract={"deterministic": False})
    expect("ok", judge, sine(right), (3,))
    expect("ok", judge, Masked.apply, (3,), contract={"random": True})


class ScatterRows(Function):
    """`x.scatter(1, index, s)` with an index that is no argument: of three rows."""

    index = torch.tensor([[0, 1], [2, 3], [1, 0]])

    @staticmethod
    def forward(ctx, x, s):
        return x.scatter(1, ScatterRows.index, s)

    @staticmethod
    def backward(ctx, g):
        return g.scatter(1, ScatterRows.index, 0.0), g.gather(1, ScatterRows.index)


def test_other_sizes_are_those_at_which_the_reference_has_gradients():
    def reference(x, s):
        return x.scatter(1, ScatterRows.index, s)

    expect("ok", state.interleaved_calls, ScatterRows.apply, (3, 5), (3, 2), reference=reference)


# --- deterministic, global_rng ----------------------------------------------------------------------------------------------


def unwritten(ctx, g):
    out = torch.empty_like(g)
    out[:-1] = (g * ctx.saved_tensors[0].cos())[:-1]
    return out


def in_any_order(ctx, g):
    order = torch.randperm(g.numel())
    return g.reshape(-1)[order].cumsum(0)[-1].expand(g.shape)


def test_deterministic():
    judge = state.deterministic
    calls = []

    def alternates(ctx, g):
        calls.append(1)
        return g * ctx.saved_tensors[0].cos() * (1 + 1e-15 * len(calls))

    expect("wrong", judge, sine(alternates), (300,), says="two runs")
    expect("wrong", judge, sine(in_any_order), (300,), says="two runs")
    for n in (3, 100_000):  # above some size, freed memory comes back as zeros
        expect("wrong", judge, sine(unwritten), (n,))
    expect("n/a", judge, sine(alternates), (300,), contract={"deterministic": False}, says="declared")
    expect("ok", judge, sine(right), (300,))
    expect("ok", judge, Masked.apply, (300,), contract={"random": True})
    assert torch.get_deterministic_debug_mode() == 0


def test_global_rng():
    judge = state.global_rng
    before = torch.get_rng_state(), python_random.getstate()
    expect("wrong", judge, Masked.apply, (3,), says="declare contract random=True")
    expect("wrong", judge, sine(lambda ctx, g: g + 0 * torch.rand(3)), (3,), says="backward draws")
    expect("wrong", judge, sine(lambda ctx, g: g * python_random.random()), (3,), says="backward draws")
    seeded = sine(lambda ctx, g: (torch.manual_seed(0), g)[1])
    expect("wrong", judge, seeded, (3,), says="backward draws")
    expect("wrong", judge, lambda x: x * python_random.random(), (3,), contract={"random": True}, says="Python")
    for fn in (Masked.apply, Replayed.apply):
        expect("ok", judge, fn, (3,), contract={"random": True})
    expect("ok", judge, sine(right), (3,))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == python_random.getstate()


@pytest.mark.parametrize("draw", [torch.rand_like, lambda x: torch.rand(x.shape, dtype=x.dtype)])
@pytest.mark.parametrize("layout", ["transposed", "channels_last", "sliced"])
def test_draws_may_follow_strides_or_positions(draw, layout):
    def forward(ctx, x):
        mask = (draw(x) > 0.3).to(x.dtype)
        ctx.save_for_backward(mask)
        return x * mask

    def reference(x):
        return x * (torch.rand_like(x) > 0.3)

    def kept(ctx, g):
        return g * ctx.saved_tensors[0]

    def halved(ctx, g):
        return g * ctx.saved_tensors[0] * 0.5

    named = {"reference": reference, "contract": {"random": True}, "layout": layout}
    expect("ok", compare_values, sine(kept, forward), (4, 5), **named)
    expect("wrong", compare_values, sine(halved, forward), (4, 5), **named)
