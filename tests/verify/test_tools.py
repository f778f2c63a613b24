"""Tools around a function: each property catches its planted faults, passes the correct twin, accepts a refusal."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import Function
from trials import expect, good_op, hides_a_write, no_fake, outcome, plain, sine, wrong_fake, wrong_strides

from bptoolkit.verify.properties import tools

ONE = "(Tensor x) -> Tensor"

# torch.compile


def test_compile_catches():
    def compiled_differently(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.cos() * (1.001 if torch.compiler.is_compiling() else 1.0)

    def by_strides(ctx, g):  # traced once, with the strides of the first cotangent
        (x,) = ctx.saved_tensors
        return g * x.cos() * (1.0 if g.is_contiguous() else 2.0)

    judge = tools.compile
    expect("wrong", judge, sine("Differently", compiled_differently), (3, 4), reference=torch.sin, says="gradient of x under")
    expect("wrong", judge, sine("Strides", by_strides), (3, 4), reference=torch.sin, says="for a cotangent that is sliced")
    expect("wrong", judge, lambda x: x.sin() + torch.compiler.is_compiling(), (3, 4), reference=torch.sin, says="output under")
    expect("ok", judge, plain, (3, 4), reference=torch.sin, cotangent="columns")


def test_compile_as_declared():
    expect("n/a", tools.compile, no_fake, (3,), reference=torch.sin, says="fake tensor call")
    expect("wrong", tools.compile, no_fake, (3,), contract={"compile": True}, says="raises")
    expect("ok", tools.compile, no_fake, (3,), contract={"compile": False})
    expect("wrong", tools.compile, torch.sin, (3,), contract={"compile": False}, says="does not raise")

    def breaks(x):
        print(end="")
        torch._dynamo.graph_break()
        return x.sin()

    expect("ok", tools.compile, breaks, (3,), reference=torch.sin)
    expect("wrong", tools.compile, breaks, (3,), contract={"compile": True}, says="raises")


def test_compile_changes_no_state():
    state, level = torch.get_rng_state(), logging.getLogger("torch._dynamo").level
    with torch.no_grad():
        outcome(tools.compile, torch.sin, (3,))
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert logging.getLogger("torch._dynamo").level == level


# autocast


class Linear(Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.T @ x


class CastLinear(Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x, w):
        return Linear.forward(ctx, x, w)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, g):
        return Linear.backward(ctx, g)


class Float32Linear(CastLinear):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, x, w):
        return Linear.forward(ctx, x, w)


def coarse(x):
    """Rounds to eight levels where autocast is on."""
    return ((x * 4).round() / 4 + (x - x.detach())).sin() if torch.is_autocast_enabled("cpu") else x.sin()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_autocast(dtype):
    judge, shapes, reference = tools.autocast, ((5, 3), (4, 3)), F.linear
    expect("wrong", judge, Linear.apply, *shapes, reference=reference, dtype=dtype, says="custom_fwd")
    expect("ok", judge, CastLinear.apply, *shapes, reference=reference, dtype=dtype)
    expect("ok", judge, Float32Linear.apply, *shapes, reference=reference, dtype=dtype)
    expect("wrong", judge, coarse, (40,), reference=torch.sin, dtype=dtype, says="under autocast")
    expect("wrong", judge, lambda x: x.sin().double(), (4,), reference=torch.sin, dtype=dtype, says="torch.float64")


def test_autocast_as_declared():
    shapes = ((5, 3), (4, 3))
    expect("n/a", tools.autocast, Linear.apply, *shapes, says="no reference")
    expect("n/a", tools.autocast, Linear.apply, *shapes, reference=F.linear, contract={"autocast": False}, says="not claimed")
    expect("wrong", tools.autocast, Linear.apply, *shapes, contract={"autocast": True}, says="backward raises")
    expect("ok", tools.autocast, CastLinear.apply, *shapes, contract={"autocast": True})
    expect("n/a", tools.autocast, F.linear, *shapes, reference=Linear.apply, says="the reference does not run")


# fake tensors


def test_fake_tensors():
    judge = tools.fake_tensors

    def other(x):  # another shape where there are no values to look at
        return x.sin() if not torch._subclasses.fake_tensor.is_fake(x) else x.sin().sum(0)

    def looks(x):
        return x.sin() if float(x.detach().sum()) > -1e9 else x

    def only_real(x):
        return x.sin().sum(0) if x.device.type == "meta" else x.sin()

    expect("wrong", judge, other, (3, 4), reference=torch.sin, says="shape")
    expect("wrong", judge, only_real, (3, 4), reference=torch.sin, says="meta device")
    expect("n/a", judge, looks, (3, 4), reference=torch.sin)
    expect("wrong", judge, looks, (3, 4), contract={"fake_tensors": True}, says="raises")
    expect("ok", judge, looks, (3, 4), contract={"fake_tensors": False})
    expect("wrong", judge, torch.sin, (3, 4), contract={"fake_tensors": False}, says="does not raise")


# other devices


def test_devices(monkeypatch):
    """A second device is played by the first one."""
    if not tools.other_devices(torch.device("cpu")):
        expect("n/a", tools.devices, torch.sin, (3,), reference=torch.sin, says="no second device")
    monkeypatch.setattr(tools, "other_devices", lambda home: [torch.device("cpu")])
    expect("ok", tools.devices, plain, (3, 4), reference=torch.sin)
    expect("ok", tools.devices, plain, (3, 4), reference=torch.sin, dtype="float32", cotangent="sliced")
    expect("wrong", tools.devices, lambda x: x.sin() * 1.01, (3, 4), reference=torch.sin, says="on cpu")
    expect("wrong", tools.devices, lambda x: x.sin().to("meta"), (3, 4), reference=torch.sin, says="meta")
    calls = []

    def fails(x):
        calls.append(x)
        raise RuntimeError("no kernel for this device")

    expect("n/a", tools.devices, fails, (3,), reference=torch.sin, says="no kernel")
    assert calls
    expect("n/a", tools.devices, F.dropout, (3,), contract={"random": True}, says="random")


# checkpointing


def counting():
    calls = []

    def fn(x):
        calls.append(1)
        return x.sin() * (1 + len(calls))

    return fn


def own_random_numbers():
    g = torch.Generator().manual_seed(0)

    def fn(x):
        return x.sin() * torch.rand(x.shape, generator=g, dtype=x.dtype)

    return fn


def by_identity():
    kept = {}

    class Identity(Function):
        @staticmethod
        def forward(ctx, x):
            y = x.cos()
            kept["pointer"] = y.data_ptr()
            ctx.save_for_backward(y)
            return x.sin()

        @staticmethod
        def backward(ctx, g):
            (y,) = ctx.saved_tensors
            return g * y if y.data_ptr() == kept["pointer"] else g * 0

    return Identity.apply


def test_checkpoint():
    judge = tools.checkpoint
    expect("wrong", judge, counting(), (3,), reference=torch.sin, says="checkpoint")
    expect("wrong", judge, own_random_numbers(), (3,), reference=torch.sin, says="checkpoint")
    expect("wrong", judge, by_identity(), (3,), reference=torch.sin, says="hooks")
    expect("ok", judge, lambda x: F.dropout(x, 0.5), (30,), contract={"random": True})
    expect("n/a", judge, own_random_numbers(), (3,), contract={"deterministic": False}, says="deterministic")
    expect("n/a", judge, plain, (3,), contract={"mutates": "x"}, says="writes to x")


# torch.library


def test_registration():
    judge = tools.registration
    expect("ok", judge, good_op, (3, 4), given=good_op)
    expect("ok", judge, lambda x: torch.ops.bptest.sine(x, 0.5), (3, 4), given=torch.ops.bptest.sine)
    expect("ok", judge, torch.ops.bptest.sine.default, (3, 4), given=torch.ops.bptest.sine.default)
    expect("wrong", judge, hides_a_write, (3, 4), given=hides_a_write, says="test_schema")
    expect("wrong", judge, wrong_fake, (3, 4), given=wrong_fake, says="opcheck")
    expect("n/a", judge, plain, (3, 4), says="not an operator")
    expect("n/a", judge, torch.sin, (3, 4), given=good_op, says="does not reach")


def test_strides_of_fake_operators():
    expect("ok", tools.fake_tensors, good_op, (3, 4), given=good_op)
    expect("wrong", tools.fake_tensors, wrong_strides, (3, 4), given=wrong_strides, says="strides")
    expect("wrong", tools.fake_tensors, wrong_fake, (3, 4), given=wrong_fake, says="shape")


def test_fake_operators_are_asked_at_other_sizes_and_strides():
    from bptoolkit.verify import check

    def operator(name, fake):
        op = torch.library.custom_op(
            f"bptoolkit_test_tools::{name}", lambda x: x.sin().contiguous(), mutates_args=(), schema=ONE
        )
        op.register_fake(fake)
        op.register_autograd(
            lambda ctx, g: g * ctx.saved_tensors[0].cos(),
            setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
        )
        return check(op, "x: B N -> B N", reference=torch.sin, properties=["fake_tensors"])

    assert operator("fake_right", lambda x: x.new_empty(x.shape)).ok
    assert not operator("fake_squeezes", lambda x: x.new_empty(x.shape).squeeze(0)).ok  # wrong for a batch of one alone
    assert not operator("fake_follows", lambda x: torch.empty_like(x)).ok  # wrong for transposed inputs alone
