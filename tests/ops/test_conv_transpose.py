"""What is special to transposed convolution: the derived sums, output padding beyond the stride, output_size, errors."""

from __future__ import annotations

import copy
from random import Random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bptoolkit as bp
from bptoolkit.cases import Draw
from bptoolkit.ops import conv_transpose as module

CALLS = {n: (getattr(bp.functional, f"conv_transpose{n}d"), getattr(F, f"conv_transpose{n}d")) for n in (1, 2, 3)}
MODULES = {n: (getattr(bp.nn, f"ConvTranspose{n}d"), getattr(nn, f"ConvTranspose{n}d")) for n in (1, 2, 3)}
each_dim = pytest.mark.parametrize("n", [1, 2, 3])


@each_dim
def test_the_sums_are_the_vendors(n):
    """The convolution, the correlation and the sum give what convolution_backward gives, for every need."""
    beyond = 0
    for seed in range(90):
        x, w, _, stride, padding, extra, groups, dilation = bp.OPS[f"conv_transpose{n}d"].draw(Draw(Random(seed))).args
        x, w = x.detach(), w.detach()
        x = x if x.dim() == n + 2 else x[None]
        beyond += any(r >= s for r, s in zip(extra, stride))
        options = (tuple(stride), tuple(padding), tuple(extra), tuple(dilation), groups)
        dy = torch.randn_like(module.forward(x, w, None, *options))
        with torch.no_grad():
            fast = module.backward(dy, x, w, *options, module.RULE.Need(True, True, True))
        for need in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
            with torch.enable_grad():
                got = module.backward(dy, x, w, *options, module.RULE.Need(*need))
            assert [g is not None for g in got] == list(need)
            torch.testing.assert_close([g for g in got if g is not None], [g for g, k in zip(fast, need) if k])
    assert beyond  # some output padding reached beyond the stride


def test_third_order_with_output_padding():
    """Equal to finite differences of second order, where torch's own third derivative raises in 2.13."""
    x = torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 1, 2, dtype=torch.float64, requires_grad=True)

    def second(x, w):
        y = bp.functional.conv_transpose1d(x, w, None, 2, 0, 1)
        g = torch.autograd.grad(y.sin().sum(), (x, w), create_graph=True)
        return torch.autograd.grad(sum(t.sin().sum() for t in g), (x, w), create_graph=True)

    assert torch.autograd.gradcheck(second, (x, w))


@each_dim
def test_modules(n):
    Ours, Theirs = MODULES[n]
    options = {"stride": 3, "padding": 1, "dilation": 2, "groups": 2, "dtype": torch.float64}
    a, b = Ours(4, 6, 3, **options), Theirs(4, 6, 3, **options)
    b.load_state_dict(a.state_dict())
    assert repr(a) == repr(b) and isinstance(a, Theirs)
    swapped = copy.deepcopy(b)
    swapped.__class__ = Ours
    x = torch.randn(2, 4, *(3,) * n, dtype=torch.float64, requires_grad=True)
    smallest = b(x).shape[2:]
    for size in (None, [m + 2 for m in smallest], [2, 6, *(m + 1 for m in smallest)]):
        results = []
        for m in (b, a, swapped):
            y = m(x, size)
            g = torch.autograd.grad(y.sin().sum(), (x, *m.parameters()), create_graph=True)
            results.append((y, g, torch.autograd.grad(sum(t.cos().sum() for t in g), x)))
        assert size is None or y.shape[2:] == tuple(size[-n:])
        torch.testing.assert_close(results[1:], [results[0]] * 2)
    with pytest.raises(ValueError, match="requested an output size"):
        a(x, [m + 3 for m in smallest])


@pytest.mark.parametrize("create_graph", [False, True])
def test_channels_last(create_graph):
    x = torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    w = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    results = []
    for fn in CALLS[2]:
        y = fn(x, w, None, 2, 1)
        results.append((y, *torch.autograd.grad(y.sin().sum(), (x, w), create_graph=create_graph)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in results[0][:2])


def test_keeps_what_the_gradients_use():
    for frozen, shapes in ((0, [(4, 2, 3)]), (1, [(2, 4, 5)])):
        x, w = torch.randn(2, 4, 5), torch.randn(4, 2, 3)
        (x, w)[1 - frozen].requires_grad_()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            bp.functional.conv_transpose1d(x, w, torch.ones(2))
        want = [(2, 4, 5), (4, 2, 3)] if frozen == 0 else [(4, 2, 3)]
        assert sorted(tuple(t.shape) for t in kept) == sorted(want), shapes


X, W = torch.randn(2, 4, 5, 5), torch.randn(4, 3, 3, 3)
ERRORS = {
    "rank": (lambda f: f(X[None], W), ValueError, r"input has shape \(1, 2, 4, 5, 5\)"),
    "channels": (lambda f: f(X[:, :3], W), ValueError, r"C is 3 in input .* but 4 in weight"),
    "groups": (lambda f: f(X, W, groups=3), ValueError, "groups=3"),
    "bias": (lambda f: f(X, W, torch.ones(3), groups=2), ValueError, r"bias has shape \(3,\).* make 6 channels"),
    "stride": (lambda f: f(X, W, stride=0), ValueError, "stride=0 must be an int of at least 1"),
    "padding": (lambda f: f(X, W, padding="same"), ValueError, "padding='same' must be an int"),
    "output padding": (lambda f: f(X, W, output_padding=1), ValueError, r"output_padding=\(1, 1\) must be smaller"),
    "empty": (lambda f: f(X, W, padding=4), ValueError, r"give an output of \(-1, -1\)"),
    "dtype": (lambda f: f(X, W.double()), TypeError, "weight is torch.float64 but input is torch.float32"),
    "backend": (lambda f: f(X, W, backend="cudnn"), ValueError, "backend='cudnn' is not known"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_errors(error):
    call, kind, message = ERRORS[error]
    with pytest.raises(kind, match="conv_transpose2d: .*" + message):
        call(bp.functional.conv_transpose2d)
