"""The properties of state, memory and numbers: planted mistakes that each finds, and their right twins that pass."""

from __future__ import annotations

import random as python_random
import threading
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from helpers import draw_call
from torch.autograd import Function
from torch.nn import functional as F
from trials import expect, trial_of

from bptoolkit import OPS
from bptoolkit.verify.contract import Contract
from bptoolkit.verify.properties import numeric, state
from bptoolkit.verify.properties.values import compare_values
from bptoolkit.verify.trial import NotApplicable, Trial, Wrong

NAMES = (*state.__all__, "linear_in_cotangent", "finite_differences")
ALL = {name: getattr(state, name, None) or getattr(numeric, name) for name in NAMES}


def sine(backward, forward=None):
    """sin, by a forward and a backward of one's own."""

    def plain(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    return type("Sine", (Function,), {"forward": staticmethod(forward or plain), "backward": staticmethod(backward)}).apply


def right(ctx, g):
    return g * ctx.saved_tensors[0].cos()


class Styled(Function):
    """The newer style."""

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    backward = staticmethod(right)


class Both(Function):
    """sin and cos, with cotangents that may be undefined."""

    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        s, c = x.sin(), x.cos()
        ctx.save_for_backward(s, c)
        return s, c

    @staticmethod
    def backward(ctx, gs, gc):
        s, c = ctx.saved_tensors
        found = [g for g in (None if gs is None else gs * c, None if gc is None else -gc * s) if g is not None]
        return sum(found) if found else None


class Matmul(Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w.mT, x.mT @ g


class Identity(Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, g):
        return g


class Masked(Function):
    """Dropout that keeps its mask."""

    @staticmethod
    def forward(ctx, x):
        mask = torch.rand(x.shape) < 0.5
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


class Replayed(Function):
    """Dropout that replays its mask from the state of the generator."""

    @staticmethod
    def forward(ctx, x):
        ctx.state = torch.get_rng_state()
        return x * (torch.rand(x.shape) < 0.5)

    @staticmethod
    def backward(ctx, g):
        now = torch.get_rng_state()
        torch.set_rng_state(ctx.state)
        mask = torch.rand(g.shape) < 0.5
        torch.set_rng_state(now)
        return g * mask


class Exp_(Function):
    """In place."""

    @staticmethod
    def forward(ctx, x):
        x.exp_()
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


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


@pytest.mark.parametrize("kind", ["kinks", "zero", "constant", "huge", "tiny", "wide", "shifted", "large"])
@pytest.mark.parametrize(
    "fn", [torch.relu, torch.abs, lambda x: x.amax(-1), lambda x: x.max(-1).values, F.hardswish, torch.tanh, torch.sqrt]
)
def test_no_alarm_at_kinks(fn, kind):
    from dataclasses import replace

    from bptoolkit.verify.layouts import VALUES

    for seed in range(4):
        trial = trial_of(fn, (4, 5), seed=seed)
        trial = replace(trial, values=(VALUES[kind]((4, 5), torch.Generator().manual_seed(seed)),))
        for judge in (numeric.finite_differences, numeric.linear_in_cotangent):
            with suppress(NotApplicable):
                judge(trial)


# --- some_outputs_unused --------------------------------------------------------------------------------------------------


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


# --- nothing_changed ------------------------------------------------------------------------------------------------------


def writes_input(ctx, x):
    ctx.save_for_backward(x)
    y = x.sin()
    x.data.mul_(0.5)
    return y


def writes_cotangent(ctx, g):
    return g.mul_(ctx.saved_tensors[0].cos())


def writes_saved(ctx, g):
    (x,) = ctx.saved_tensors
    return g * x.data.cos_()


def copies_and_writes(ctx, x):
    z = x.clone()
    ctx.save_for_backward(z)
    return z.sin()


def writes_beyond(ctx, g):
    wide = g.as_strided((g.numel() + 1,), (1,), g.storage_offset())
    wide[-1] = 0.0
    return g * ctx.saved_tensors[0].cos()


def test_nothing_changed():
    judge = state.nothing_changed
    expect("wrong", judge, sine(right, writes_input), (3,), says="forward wrote over input x")
    expect("wrong", judge, sine(writes_cotangent), (3,), says="backward wrote over cotangent 0")
    expect("wrong", judge, sine(writes_saved), (3,), says="backward wrote over input x")
    expect("wrong", judge, sine(writes_saved, copies_and_writes), (3,), says="backward wrote over saved tensor 0")
    expect("wrong", judge, sine(writes_beyond), (3,), says="memory beside the elements of cotangent 0")
    expect("ok", judge, sine(right, copies_and_writes), (3,))


def test_nothing_changed_but_what_is_declared():
    judge = state.nothing_changed
    expect("ok", judge, sine(writes_cotangent), (3,), contract={"mutates": "cotangents"})
    expect("ok", judge, Exp_.apply, (3,), contract={"mutates": "x"})
    expect("wrong", judge, sine(right, writes_input), (3,), contract={"mutates": "x"}, says="mark_dirty")
    expect("wrong", judge, sine(writes_cotangent), (3,), contract={"mutates": "x"}, says="cotangent")


# --- backward_twice -------------------------------------------------------------------------------------------------------


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


# --- interleaved_calls ----------------------------------------------------------------------------------------------------


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


# --- gradients_kept -------------------------------------------------------------------------------------------------------


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
    judge = state.gradients_kept
    expect("wrong", judge, workspace(of_output=False), (3,), says="gradient of x was overwritten by a")
    expect("wrong", judge, workspace(of_output=True), (3,), says="output 0 was overwritten by a later call")
    expect(
        "wrong", judge, sine(lambda ctx, g: ctx.saved_tensors[0], made_in_forward), (3,), says="shares its memory with a saved"
    )
    expect("wrong", judge, sine(lambda ctx, g: ctx.saved_tensors[0].view_as(g)), (3,), says="shares its memory with input x")
    expect("ok", judge, sine(lambda ctx, g: g * ctx.saved_tensors[0], made_in_forward), (3,))
    expect("ok", judge, Identity.apply, (3,))  # the cotangent is the gradient
    expect("ok", judge, lambda x, w: x + w, (3,), (3,))  # of both


# --- version_counter ------------------------------------------------------------------------------------------------------


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
    judge = state.version_counter
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


# --- memory ---------------------------------------------------------------------------------------------------------------


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
    judge = state.memory
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


# --- deterministic, global_rng --------------------------------------------------------------------------------------------


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


# --- linear_in_cotangent, finite_differences ------------------------------------------------------------------------------


def test_linear_in_cotangent():
    judge = numeric.linear_in_cotangent
    for backward in (
        lambda ctx, g: (g * ctx.saved_tensors[0].cos()).clamp(-1, 1),  # clipped
        lambda ctx, g: g * ctx.saved_tensors[0].cos() + 1e-6,  # a term without the cotangent
        lambda ctx, g: g * g * ctx.saved_tensors[0].cos(),
        lambda ctx, g: g / g.norm() * ctx.saved_tensors[0].cos(),
        lambda ctx, g: torch.where(g.abs() < 1e-3, 0.0, g) * ctx.saved_tensors[0].cos(),
        lambda ctx, g: (g * ctx.saved_tensors[0].cos()).nan_to_num(0.0, 0.0, 0.0),
        lambda ctx, g: torch.where(g.isnan(), 0.0, g) * ctx.saved_tensors[0].cos(),
    ):
        for point in ({}, {"dtype": "float32"}, {"seed": 1}):
            for reference in (None, torch.sin):
                expect("wrong", judge, sine(backward), (5, 7), reference=reference, **point)
    for dtype in ("float64", "float32", "bfloat16", "float16"):
        for fn in (sine(right), torch.sqrt, lambda x: x.softmax(-1)):
            expect("ok", judge, fn, (5, 7), dtype=dtype)


@pytest.mark.parametrize("seed", range(3))
def test_finite_differences(seed):
    judge = numeric.finite_differences

    def scaled(by):
        return sine(lambda ctx, g: by * g * ctx.saved_tensors[0].cos())

    for by in (0.0, -1.0, 1.1, 1 + 1e-5, 1 - 1e-5):
        expect("wrong", judge, scaled(by), (2, 3), seed=seed)

    class OneOfTwo(Matmul):
        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            return g @ w.mT, (1 + 1e-5) * (x.mT @ g)

    expect("wrong", judge, OneOfTwo.apply, (2, 3), (3, 4), seed=seed, says="direction of w")
    expect("ok", judge, Matmul.apply, (2, 3), (3, 4), seed=seed)
    expect("ok", judge, scaled(1 + 1e-13), (2, 3), seed=seed)
    expect("n/a", judge, scaled(0.0), (2, 3), seed=seed, dtype="float32", says="float64")


def test_finite_differences_of_what_is_no_derivative_on_purpose():
    def rounds(x):
        return x + (x.round() - x).detach()

    expect("wrong", numeric.finite_differences, rounds, (4,))
    expect("n/a", numeric.finite_differences, rounds, (4,), reference=rounds, says="reference")


def test_wrong_is_certain():
    with pytest.raises(Wrong) as caught:
        state.memory(trial_of(last_on_class(), (3,)))
    assert caught.value.gross


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


def test_nothing_changed_looks_at_grad_and_history():
    judge = state.nothing_changed
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


@pytest.mark.parametrize(
    "fn",
    [
        torch.relu,
        F.hardtanh,
        torch.cumsum,
        torch.linalg.inv,
        lambda x: x.amax(-1),
        lambda x: x.sort(-1).values,
        lambda x: torch.where(x > 0, x, 0.0),
        lambda x: x.tril() @ x,
        lambda x: F.max_pool1d(x, 2),
        lambda x: x.detach() * x.sum(),
        lambda x: F.layer_norm(x, x.shape[-1:]),
        lambda x: torch.linalg.eigh(x @ x.mT).eigenvalues,
    ],
)
def test_what_is_not_finite_reaches_every_gradient_of_a_right_function(fn):
    for dtype in ("float64", "float32"):
        for cotangent in ("random", "rows", "one_hot"):
            call = (lambda x: x.cumsum(-1)) if fn is torch.cumsum else fn
            expect("ok", numeric.linear_in_cotangent, call, (4, 4), dtype=dtype, cotangent=cotangent)
