"""Gradients of gradients, forward mode, vmap: each property catches its planted faults, passes the twin, accepts a refusal."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import Function
from trials import expect, good_op, new, once, outcome, plain, pushed, right, sine, unrecorded

from bptoolkit.verify.properties import asking, second_order, transforms


class Scale(Function):
    """Its backward is another Function, with a second-order formula of its own; `wrong` is a factor on it."""

    wrong = 1.0

    @staticmethod
    def forward(ctx, g, x):
        ctx.save_for_backward(g, x)
        return g * x.cos()

    @staticmethod
    def backward(ctx, h):
        g, x = ctx.saved_tensors
        return h * x.cos(), -Scale.wrong * h * g * x.sin()


def only_if_the_cotangent_asks(ctx, g):
    (x,) = ctx.saved_tensors
    with torch.set_grad_enabled(g.requires_grad):
        return g * x.cos()


# double backward


@pytest.mark.parametrize("reference", [torch.sin, None])
def test_double_backward_catches(reference):
    judge = transforms.double_backward
    kept = sine("Kept", lambda ctx, g: g * ctx.saved_tensors[0], save=lambda x: (x.cos(),))
    expect("wrong", judge, kept, (3, 4), reference=reference, says="cut off from x")
    expect("wrong", judge, sine("Unrecorded", unrecorded), (3, 4), reference=reference, says="cut off from x")
    penalty = sine("Penalty", only_if_the_cotangent_asks)
    expect("wrong", judge, penalty, (3, 4), reference=reference, says="cut off from x")
    nested = sine("Nested", lambda ctx, g: Scale.apply(g, *ctx.saved_tensors))
    expect("ok", judge, nested, (3, 4), reference=reference)
    Scale.wrong = 1.001
    try:
        expect("wrong", judge, nested, (3, 4), reference=reference, says="second derivative by x")
    finally:
        Scale.wrong = 1.0
    expect("ok", judge, plain, (3, 4), reference=reference)


def test_double_backward_as_declared():
    judge = transforms.double_backward
    expect("n/a", judge, once, (3,), reference=torch.sin, says="once_differentiable")
    expect("ok", judge, once, (3,), reference=torch.sin, contract={"double_backward": False})
    expect("wrong", judge, once, (3,), reference=torch.sin, contract={"double_backward": True}, says="once_differentiable")
    silent = sine("Silent", unrecorded)
    expect("wrong", judge, silent, (3,), reference=torch.sin, contract={"double_backward": False}, says="does not raise")


def test_double_backward_of_a_reference_that_has_none():
    """Then finite differences decide."""
    kept = sine("Kept", lambda ctx, g: g * ctx.saved_tensors[0], save=lambda x: (x.cos(),))
    expect("wrong", transforms.double_backward, kept, (3,), reference=once, says="finite differences")
    expect("ok", transforms.double_backward, plain, (3,), reference=once)


def test_double_backward_leaves_other_leaves_alone():
    weight = torch.nn.Parameter(torch.randn(3, dtype=torch.float64))
    expect("ok", transforms.double_backward, lambda x: (x * weight.to(x.dtype)).sin(), (3,), reference=None)
    assert weight.grad is None


def test_kinks_are_inconclusive():
    assert second_order.richardson(lambda t: (max(t, 0.0), 1.0))[1] > 0.5
    value, uncertain, _ = second_order.richardson(lambda t: (torch.tensor(0.3 + t, dtype=torch.float64).sin().item(), 1.0))
    assert abs(value - torch.tensor(0.3, dtype=torch.float64).cos().item()) < uncertain < 1e-7
    for fn in (F.relu, F.hardtanh, torch.abs):
        assert outcome(transforms.double_backward, fn, (40,), values="kinks")[0] != "wrong"


# forward mode


class Product(Function):
    """x · w with a jvp; `parts` are the factors on its two terms."""

    parts = (1.0, 1.0)

    @staticmethod
    def forward(x, w):
        return x * w

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, g * x

    @classmethod
    def with_parts(cls, *parts):
        def jvp(ctx, u, v):
            x, w = ctx.saved_tensors
            total = torch.zeros_like(x)
            if u is not None:
                total = total + parts[0] * u * w
            if v is not None:
                total = total + parts[1] * v * x
            return total

        return type("Product", (cls,), {"jvp": staticmethod(jvp)}).apply


@pytest.mark.parametrize(("reference", "dtype"), [(torch.mul, "float64"), (torch.mul, "float32"), (None, "float64")])
def test_forward_mode(reference, dtype):
    judge, shapes = transforms.forward_mode, ((3, 4), (3, 4))
    expect("ok", judge, Product.with_parts(1.0, 1.0), *shapes, reference=reference, dtype=dtype)
    for parts in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.01, 1.0)):
        expect("wrong", judge, Product.with_parts(*parts), *shapes, reference=reference, dtype=dtype)
    expect("n/a", judge, Product.apply, *shapes, reference=reference, dtype=dtype, says="jvp")


def test_forward_mode_of_old_functions_by_dual_numbers():
    def with_factor(factor):
        class Old(Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_forward(x)
                ctx.save_for_backward(x)
                return x.sin()

            backward = staticmethod(right)

            @staticmethod
            def jvp(ctx, u):
                return factor * pushed(ctx, u)

        return Old.apply

    expect("ok", transforms.forward_mode, with_factor(1.0), (3,), reference=torch.sin)
    expect("wrong", transforms.forward_mode, with_factor(0.5), (3,), reference=torch.sin, says="dual number")


def test_forward_mode_as_declared():
    judge, shapes = transforms.forward_mode, ((3,), (3,))
    expect("wrong", judge, Product.apply, *shapes, reference=torch.mul, contract={"forward_mode": True}, says="raises")
    expect("ok", judge, Product.apply, *shapes, reference=torch.mul, contract={"forward_mode": False})
    there = Product.with_parts(1.0, 1.0)
    expect("wrong", judge, there, *shapes, reference=torch.mul, contract={"forward_mode": False}, says="does not raise")


@pytest.mark.parametrize("reference", [once, plain, sine("Unrecorded", unrecorded)])
def test_forward_mode_with_a_reference_that_cannot_say(reference):
    """Neither a jvp nor a second derivative: the adjoint identity is left."""
    expect("ok", transforms.forward_mode, new, (3,), reference=reference)
    bad = sine("Bad", right, style="new", jvp=staticmethod(lambda ctx, u: 2 * pushed(ctx, u)))
    expect("wrong", transforms.forward_mode, bad, (3,), reference=reference)


# vmap


def mapped(rule):
    return sine("Mapped", right, style="new", vmap=staticmethod(rule)), (3, 4)


def softmax_with(rule):
    class Softmax(Function):
        @staticmethod
        def forward(x):
            return x.softmax(-1)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(output)

        @staticmethod
        def backward(ctx, g):
            (y,) = ctx.saved_tensors
            return y * (g - (g * y).sum(-1, keepdim=True))

        vmap = staticmethod(rule)

    return Softmax.apply


def row_wise(info, in_dims, x):
    return x.movedim(in_dims[0], 0).softmax(-1), 0


VMAP_FAULTS = {
    "in_dims are ignored": lambda info, in_dims, x: (x.softmax(-1), 0),
    "samples are mixed": lambda info, in_dims, x: (x.movedim(in_dims[0], 0).softmax(0), 0),
    "the gradient is cut off": lambda info, in_dims, x: (x.detach().movedim(in_dims[0], 0).softmax(-1), 0),
    "the batch is returned elsewhere": lambda info, in_dims, x: (x.movedim(in_dims[0], 0).softmax(-1).movedim(0, -1), 0),
}


@pytest.mark.parametrize("fault", VMAP_FAULTS)
def test_vmap_catches(fault):
    reference = lambda x: x.softmax(-1)  # noqa: E731
    expect("ok", transforms.vmap, softmax_with(row_wise), (3, 4), reference=reference)
    expect("wrong", transforms.vmap, softmax_with(VMAP_FAULTS[fault]), (3, 4), reference=reference, says="vmap")
    expect("wrong", transforms.vmap, softmax_with(VMAP_FAULTS[fault]), (3, 4), says="vmap")


def test_vmap_of_some_inputs():
    def rule(info, in_dims, x, w):  # right when both are batched
        return Product.apply(x, w), 0

    bad = type("Mapped", (Product,), {"vmap": staticmethod(rule)}).apply
    expect("wrong", transforms.vmap, bad, (3, 3), (3, 3), reference=torch.mul, says="over")
    good = type("Mapped", (Product,), {"generate_vmap_rule": True}).apply
    expect("ok", transforms.vmap, good, (3, 3), (3, 3), reference=torch.mul)


def test_vmap_as_declared():
    expect("n/a", transforms.vmap, plain, (3,), reference=torch.sin, says="setup_context")
    expect("wrong", transforms.vmap, plain, (3,), contract={"vmap": True}, says="setup_context")
    expect("ok", transforms.vmap, plain, (3,), contract={"vmap": False})
    expect("wrong", transforms.vmap, new, (3,), contract={"vmap": False}, says="does not raise")
    expect("n/a", transforms.vmap, F.dropout, (3,), contract={"random": True}, says="random")


def test_per_sample_gradients():
    judge, reference = transforms.per_sample_gradients, lambda x: x.softmax(-1)
    expect("ok", judge, softmax_with(row_wise), (3, 4), reference=reference)
    expect("wrong", judge, softmax_with(VMAP_FAULTS["samples are mixed"]), (3, 4), reference=reference, says="per-sample")
    expect("n/a", judge, plain, (3,), reference=torch.sin, says="setup_context")
    expect("n/a", judge, sine("New", right, style="new"), (3,), reference=torch.sin, says="vmap support")
    expect("n/a", judge, F.dropout, (3,), contract={"random": True}, says="random")
    expect("wrong", judge, plain, (3,), contract={"vmap": True})


def test_a_backward_that_mixes_samples_under_vmap():
    class Sum(Function):  # the backward of a shared weight: its rule sums over the samples as well
        @staticmethod
        def forward(g, x):
            return g * x.cos()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def vmap(info, in_dims, g, x):
            out = g.movedim(in_dims[0], 0) * x.movedim(in_dims[1], 0).cos() if None not in in_dims else g * x.cos()
            return out.mean(0, keepdim=True).expand(out.shape), 0

    bad = sine("Bad", lambda ctx, g: Sum.apply(g, *ctx.saved_tensors), style="new", generate_vmap_rule=True)
    expect("wrong", transforms.per_sample_gradients, bad, (3,), reference=torch.sin, says="per-sample gradient of x")


def test_operators_of_torch_library_have_no_forward_mode():
    """torch drops their tangents without a word; nothing that the operator's author could change."""
    expect("n/a", transforms.forward_mode, good_op, (3,), reference=torch.sin, says="torch.library")
    expect("wrong", transforms.forward_mode, good_op, (3,), reference=torch.sin, contract={"forward_mode": True})


def test_leaves_behind_reach_the_node_that_raises():
    x = torch.randn(3, requires_grad=True)
    c = torch.ones(3, requires_grad=True)
    (g,) = torch.autograd.grad(once(x), x, c, create_graph=True)
    assert torch.autograd.grad(g.sum(), [x, c], allow_unused=True) == (None, None)  # the trap
    with pytest.raises(RuntimeError, match="once_differentiable"):
        asking.through([g], [x, c], [torch.ones(3)])


def test_forward_mode_leaves_kinks_and_nan_alone():
    """torch's prelu takes one side at zero forward and the other one backward; a branch that is not taken overflows to NaN."""
    expect("n/a", transforms.forward_mode, F.prelu, (3, 4), (4,), values="zero", says="kink")
    branch = lambda x: torch.where(x > 700, x, (x * 1e4).exp())  # noqa: E731
    assert outcome(transforms.forward_mode, lambda x: branch(x + 1000), (3, 4))[0] != "wrong"
