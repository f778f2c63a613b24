"""The checker: it catches planted faults, each by a property that is right for it, and passes what is correct."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import Function

import bptoolkit as bp
from bptoolkit.verify.properties import PROPERTIES


def linear_reference(x, w, b):
    return F.linear(x, w, b)


def make(backward, forward=lambda x, w, b: x @ w.T + b, saves=lambda x, w, b, y: (x, w, y)):
    """A linear layer whose backward or forward is to be judged; grad(ctx, dy, x, w, y) -> (dx, dw, db)."""

    class L(Function):
        @staticmethod
        def forward(x, w, b):
            return forward(x, w, b)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*saves(*inputs, output))
            ctx.save_for_forward(*saves(*inputs, output))

        @staticmethod
        def backward(ctx, dy):
            return backward(ctx, dy, *ctx.saved_tensors)

        @staticmethod
        def jvp(ctx, tx, tw, tb):
            x, w, _ = ctx.saved_tensors
            return tx @ w.T + x @ tw.T + tb

        @staticmethod
        def vmap(info, dims, x, w, b):
            x = x.movedim(dims[0], 0) if dims[0] is not None else x
            return L.apply(x, w, b), 0

    return L.apply


def right(ctx, dy, x, w, y):
    return dy @ w, dy.T @ x, dy.sum(0)


def but(k, change):
    def backward(ctx, dy, x, w, y):
        grads = list(right(ctx, dy, x, w, y))
        grads[k] = change(grads[k], dy, x, w)
        return tuple(grads)

    return backward


def first_tile(g, dy, x, w):
    return torch.cat([g[:16], torch.zeros_like(g[16:])])


def raw_stride(g, dy, x, w):
    storage = dy.untyped_storage()
    flat = torch.empty(0, dtype=dy.dtype).set_(storage)[dy.storage_offset() :]
    if flat.numel() < dy.numel():
        flat = torch.nn.functional.pad(flat, (0, dy.numel() - flat.numel()))
    return flat[: dy.numel()].nan_to_num().sum(0)


WORKSPACE = {}


def workspace(ctx, dy, x, w, y):
    grads = right(ctx, dy, x, w, y)
    buffer = WORKSPACE.setdefault(grads[1].shape, torch.empty_like(grads[1]))
    return grads[0], buffer.copy_(grads[1]), grads[2]


class State:
    x = None


def class_state(x, w, b):
    State.x = x
    return x @ w.T + b


def writes_cotangent(ctx, dy, x, w, y):
    with torch.no_grad():
        dx = dy @ w
        dw, db = dy.T @ x, dy.sum(0)
        dy.mul_(0.5)
    return dx, dw, db


def writes_saved(ctx, dy, x, w, y):
    grads = right(ctx, dy, x, w, y)
    with torch.no_grad():
        x.data.mul_(0.5)
    return grads


def need_off_by_one(ctx, dy, x, w, y):
    dx, dw, db = right(ctx, dy, x, w, y)
    n = ctx.needs_input_grad
    return dx if n[0] else None, dw if n[2] else None, db if n[2] else None


FAULTS = {
    "zeros": (make(but(0, lambda g, *_: torch.zeros_like(g))), "gradient_value"),
    "all zeros": (make(lambda ctx, dy, x, w, y: tuple(torch.zeros_like(g) for g in right(ctx, dy, x, w, y))), "gradient_value"),
    "one percent": (make(but(1, lambda g, *_: g * 1.01)), "gradient_value"),
    "one part in a million": (make(but(1, lambda g, *_: g * (1 + 1e-6))), "gradient_value"),
    "sign": (make(but(2, lambda g, *_: -g)), "gradient_value"),
    "mean for sum": (make(but(2, lambda g, dy, *_: g / max(dy.shape[:-1].numel(), 1))), "gradient_value"),
    "transposed where square": (
        make(but(1, lambda g, *_: g.T if g.shape[0] == g.shape[1] else g)),
        "gradient_value",
    ),
    "one row off": (make(but(1, lambda g, *_: g.roll(1, 0))), "gradient_value"),
    "first tile only": (make(but(1, first_tile)), "gradient_value"),
    "last row dropped": (make(but(1, lambda g, *_: torch.cat([g[:-1], 0 * g[-1:]]))), "gradient_value"),
    "missing gradient": (make(but(2, lambda g, *_: None)), "gradient_value"),
    "wrong need index": (make(need_off_by_one), "grad_subsets"),
    "raw strides of the cotangent": (make(but(2, raw_stride)), "cotangent_layout"),
    "writes the cotangent": (make(writes_cotangent), "nothing_changed"),
    "writes a saved input": (make(writes_saved), "nothing_changed"),
    "shared workspace": (make(workspace), "backward_twice"),
    "state on the class": (
        make(
            lambda ctx, dy, x, w, y: (
                dy @ w,
                dy.T @ State.x,
                dy.sum(0),
            ),
            class_state,
        ),
        "backward_twice",
    ),
    "detached": (make(but(0, lambda g, *_: g.detach())), "double_backward"),
    "detached saved input": (
        make(lambda ctx, dy, x, w, y: right(ctx, dy, x.detach(), w, y)),
        "double_backward",
    ),
    "forward wrong, backward consistent": (
        make(lambda ctx, dy, x, w, y: tuple(2 * g for g in right(ctx, dy, x, w, y)), lambda x, w, b: 2 * (x @ w.T + b)),
        "forward_value",
    ),
    "forward and backward disagree": (make(right, lambda x, w, b: 1.001 * (x @ w.T) + b), "finite_differences"),
    "mixes samples": (make(but(0, lambda g, *_: g - g.mean(0, keepdim=True))), "gradient_value"),
    "garbage at size zero": (make(but(2, lambda g, dy, *_: g + (dy.numel() == 0))), "gradient_value"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(fault):
    fn, expected = FAULTS[fault]
    report = bp.verify.check(fn, "x: B I, w: O I, b: O -> B O", reference=linear_reference, properties=[expected])
    assert not report.ok
    assert report.failures[0].property == expected
    assert "got" in report.failures[0].message or report.failures[0].message


def test_the_correct_twin_passes():
    report = bp.verify.check(make(right), "x: B I, w: O I, b: O -> B O", reference=linear_reference)
    assert report.ok, str(report)
    assert set(report.calls) == set(PROPERTIES)


def test_without_a_reference():
    report = bp.verify.check(make(but(0, lambda g, *_: g * 1.5)), "x: B I, w: O I, b: O -> B O")
    assert [f.property for f in report.failures if f.property == "finite_differences"]
    assert "no reference" in report.skipped["gradient_value"]


def test_the_counterexample_reproduces():
    report = bp.verify.check(bp.OPS["linear"], reference=lambda x, w, b=None: F.linear(x, w, b) * 1.0001, calls=2)
    assert not report.ok
    code = report.failures[0].code
    printed = []
    exec(code, {"print": printed.append})  # the code of an op stands alone; with the true reference it passes
    assert printed[0].ok


def test_modules_and_example_tensors():
    module = bp.nn.Linear(4, 3)
    assert bp.verify.check(module, (torch.randn(2, 4),), reference=torch.nn.Linear.forward.__get__(module)).ok


def test_assert_correct_raises_the_report():
    with pytest.raises(bp.verify.VerificationError, match="gradient_value"):
        bp.verify.assert_correct(
            make(but(0, lambda g, *_: 0 * g)), "x: B I, w: O I, b: O -> B O", reference=linear_reference, calls=3
        )


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: bp.verify.check(lambda x: 3, (torch.randn(2),)), TypeError, "no floating-point tensor"),
        (lambda: bp.verify.check(lambda x: x, (torch.tensor([1]),)), ValueError, "differentiate by"),
        (lambda: bp.verify.check(lambda x: x, 3), TypeError, "shapes string or a tuple"),
        (lambda: bp.verify.check(lambda x: x, (torch.randn(2),), properties=["nope"]), ValueError, "nope"),
        (lambda: bp.verify.check(bp.OPS["linear"], (torch.randn(2),)), TypeError, "draws its own"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
