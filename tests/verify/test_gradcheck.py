"""`bp.verify.gradcheck` and `gradgradcheck`: torch's signatures and meaning, held against torch's own on the same functions."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.gradcheck import GradcheckError as TorchsError

from bptoolkit.verify import VerificationError, drop_in, gradcheck, gradgradcheck
from bptoolkit.verify.drop_in import GradcheckError


def normal(*shape, seed=0, **options):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_(options.get("requires_grad", True))


def product(backward):
    """x * w by hand, with a backward of its own: backward(dy, x, w) -> (dx, dw)."""

    class Product(Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx, dy):
            return backward(dy, *ctx.saved_tensors)

    return Product.apply


def raw(dy):
    """What a kernel sees that reads the storage of dy in order."""
    enough = dy.untyped_storage().nbytes() >= 8 * (dy.storage_offset() + dy.numel())
    return torch.as_strided(dy, dy.shape, torch.empty(dy.shape).stride()) if enough else torch.zeros_like(dy)


right = product(lambda dy, x, w: (dy * w, dy * x))
PAIR = (normal(3, 4), normal(3, 4, seed=1))


@pytest.mark.parametrize("name", ["gradcheck", "gradgradcheck"])
def test_the_signature_is_torchs(name):
    """Names, order, kinds and defaults: a call of one is a call of the other."""
    ours, torchs = (
        [(p.name, p.kind, p.default) for p in inspect.signature(getattr(m, name)).parameters.values()]
        for m in (drop_in, torch.autograd)
    )
    assert ours == torchs


RIGHT = {
    "a hand-written product": (right, PAIR),
    "a tensor that is no tuple": (torch.sin, normal(3)),
    "several outputs": (lambda x, w: (x * w, x.sum(0)), PAIR),
    "an integer output beside": (lambda x: x.max(-1), (normal(3, 4),)),
    "a closure over options": (lambda x: F.softmax(x, dim=-1), (normal(3, 4),)),
    "other arguments": (lambda x, n, flag: x.reshape(n, -1) if flag else x, (normal(3, 4), 6, True)),
    "an integer tensor": (lambda w, i: F.embedding(i, w), (normal(5, 3), torch.tensor([0, 4, 4]))),
    "one that is not differentiated": (lambda x, w: x * w, (normal(3, 4), normal(3, 4, seed=1, requires_grad=False))),
    "sizes that are fixed": (lambda x: x.reshape(2, 6) @ torch.ones(6, 3, dtype=x.dtype), (normal(3, 4),)),
    "a module's call": (torch.nn.Linear(4, 2, dtype=torch.float64), (normal(3, 4),)),
    "a scalar": (lambda x: x.exp().sum(), (normal(4),)),
    "sizes that have to be even": (lambda x: x.view(-1, 2).prod(-1), (normal(3, 4),)),
    "positive values": (torch.log, ((normal(3, 4).detach().abs() + 0.5).requires_grad_(),)),
}


@pytest.mark.parametrize("case", RIGHT)
def test_what_is_right_passes_both(case):
    func, inputs = RIGHT[case]
    assert torch.autograd.gradcheck(func, inputs)
    assert gradcheck(func, inputs, fast_mode=True) is True


WRONG = {
    "swapped": product(lambda dy, x, w: (dy * x, dy * w)),
    "a factor": product(lambda dy, x, w: (dy * w, 2 * dy * x)),
    "zeros": product(lambda dy, x, w: (dy * w, torch.zeros_like(x))),
    "a drift torch lets through": product(lambda dy, x, w: (dy * w * (1 + 1e-4), dy * x)),
    "a cotangent taken to be contiguous": product(lambda dy, x, w: (raw(dy) * w, dy * x)),
    "a cotangent written to": product(lambda dy, x, w: (dy.mul_(w), dy / w * x)),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_fails(case):
    with pytest.raises(GradcheckError) as caught:
        gradcheck(WRONG[case], PAIR, fast_mode=True)
    assert "FAILED" in str(caught.value) and caught.value.report.failures
    assert gradcheck(WRONG[case], PAIR, fast_mode=True, raise_exception=False) is False


def test_the_error_is_torchs_error_and_ours():
    """Tests catch RuntimeError, torch's GradcheckError or AssertionError."""
    for kind in (RuntimeError, TorchsError, AssertionError, VerificationError):
        with pytest.raises(kind, match=r"FAILED finite_differences: .*(input1|of w).*a factor of 2"):
            gradcheck(WRONG["a factor"], PAIR, fast_mode=True)


def test_gradients_that_are_not_asked_for_are_not_judged():
    x, w = PAIR
    assert gradcheck(WRONG["a factor"], (x, w.detach()), fast_mode=True)
    with pytest.raises(GradcheckError):
        gradcheck(WRONG["a factor"], (x.detach(), w), fast_mode=True)


def test_inputs_are_left_as_they_are():
    x, w = (t.detach().clone().requires_grad_() for t in PAIR)
    before = x.detach().clone(), w.detach().clone()
    gradcheck(right, (x, w), fast_mode=True)
    assert torch.equal(x, before[0]) and torch.equal(w, before[1]) and x.grad is None and w.grad is None


def test_forward_mode_has_to_be_there_when_it_is_asked_for():
    assert gradcheck(torch.sin, normal(3), check_forward_ad=True, fast_mode=True)
    with pytest.raises(GradcheckError, match="forward_mode"):
        gradcheck(right, PAIR, check_forward_ad=True, fast_mode=True)  # no jvp was written


def test_forward_mode_alone():
    class Opaque(Function):
        @staticmethod
        def forward(x):
            return x.sin()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_forward(*inputs)

        @staticmethod
        def jvp(ctx, tx):
            (x,) = ctx.saved_tensors
            return tx * x.cos() * (1 if right_jvp else 2)

        @staticmethod
        def backward(ctx, dy):
            raise NotImplementedError

    right_jvp = True
    assert gradcheck(Opaque.apply, normal(3, 4), check_forward_ad=True, check_backward_ad=False, fast_mode=True)
    right_jvp = False
    with pytest.raises(GradcheckError):
        gradcheck(Opaque.apply, normal(3, 4), check_forward_ad=True, check_backward_ad=False, fast_mode=True)


def test_undefined_gradients():
    class Pair(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(x)
            return x.sin(), x.cos()

        @staticmethod
        def backward(ctx, da, db):
            (x,) = ctx.saved_tensors
            return da * x.cos() - db * x.sin()  # None is not expected

    with pytest.raises(GradcheckError, match="some_outputs_unused"):
        gradcheck(Pair.apply, normal(3, 4), fast_mode=True)
    assert gradcheck(Pair.apply, normal(3, 4), check_undefined_grad=False, fast_mode=True)


def test_nondeterminism_has_to_be_allowed():
    class Noisy(Function):
        @staticmethod
        def forward(ctx, x):
            return 3 * x

        @staticmethod
        def backward(ctx, dy):
            return 3 * dy * (1 + 1e-15 * torch.randn(dy.shape, dtype=dy.dtype))

    with pytest.raises(RuntimeError):
        gradcheck(Noisy.apply, normal(3, 4), fast_mode=True)
    assert gradcheck(Noisy.apply, normal(3, 4), fast_mode=True, nondet_tol=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"check_forward_ad": False, "check_backward_ad": False},
        {"check_batched_grad": True, "check_backward_ad": False, "check_forward_ad": True},
        {"check_batched_forward_grad": True},
    ],
)
def test_options_that_contradict_each_other_raise_as_in_torch(options):
    for check in (torch.autograd.gradcheck, gradcheck):
        with pytest.raises((AssertionError, ValueError), match="check_"):
            check(torch.sin, normal(3), **options)


@pytest.mark.parametrize(
    "inputs, options, said",
    [
        (torch.randn(3, dtype=torch.complex128, requires_grad=True), {}, "complex128"),
        (torch.eye(3, dtype=torch.float64).to_sparse().requires_grad_(), {}, "sparse"),
        (torch.zeros(3, dtype=torch.float64, requires_grad=True), {"masked": True}, "masked"),
        ((torch.zeros(3, dtype=torch.float64), 2), {}, "requires grad"),
        ((), {}, "requires grad"),
    ],
)
def test_what_it_cannot_judge_is_refused(inputs, options, said):
    for check in (gradcheck, gradgradcheck):
        with pytest.raises(ValueError, match=said):
            check(lambda x, *rest: x, inputs, **options)


def test_second_derivatives():
    assert gradgradcheck(lambda x, w: (x * w).sin(), PAIR, fast_mode=True)
    assert gradgradcheck(right, PAIR, grad_outputs=normal(3, 4, seed=2), gen_non_contig_grad_outputs=True, fast_mode=True)


LOST = {
    "detached": product(lambda dy, x, w: (dy * w.detach(), dy * x)),
    "refused": product(lambda dy, x, w: refuse() if torch.is_grad_enabled() else (dy * w, dy * x)),
    "wrong": product(lambda dy, x, w: (dy * w + 0 * x, dy.detach() * x)),
}


def refuse():
    raise RuntimeError("no double backward")


@pytest.mark.parametrize("case", LOST)
def test_second_derivatives_that_are_lost_or_refused(case):
    """The first derivatives are right; torch's gradgradcheck fails as ours does."""
    assert gradcheck(LOST[case], PAIR, fast_mode=True)
    with pytest.raises(GradcheckError, match="double_backward"):
        gradgradcheck(LOST[case], PAIR, fast_mode=True)
    assert gradgradcheck(LOST[case], PAIR, fast_mode=True, raise_exception=False) is False
    with pytest.raises(RuntimeError):
        torch.autograd.gradgradcheck(LOST[case], PAIR)
