"""What is special to padding: every mode and sign against torch, infinities, autocast, modules, errors."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bptoolkit as bp
from bptoolkit.ops import pad as module

f = bp.functional
BORDERS = ("reflect", "replicate", "circular")


@pytest.mark.parametrize("mode", module.MODES)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_every_sign(n, mode):
    """First and second order as torch, for all of −2 … 3 on either side of the last dimension."""
    for lo, hi in itertools.product(range(-2, 4), repeat=2):
        if mode == "circular" and max(lo, hi) > 5 + min(lo, 0) + min(hi, 0):
            continue
        pad = (lo, hi, 1, 2, 0, 1)[: 2 * n]
        x = torch.randn(2, 2, *(3,) * (n - 1), 5, dtype=torch.float64, requires_grad=True)
        results = []
        for fn in (f.pad, F.pad):
            y = fn(x, pad, mode)
            (g,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
            results.append((y, g, *torch.autograd.grad(g.cos().sum(), x)))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("mode", module.MODES)
def test_infinite_cotangents_stay_where_they_are(mode):
    x = torch.randn(1, 1, 4, 5, requires_grad=True)
    results = []
    for fn in (f.pad, F.pad):
        y = fn(x, (2, 1, 1, 1), mode)
        dy = torch.ones_like(y)
        dy[0, 0, 2, 3], dy[0, 0, 0, 0] = float("inf"), float("nan")
        results.append(torch.autograd.grad(y, x, dy)[0])
    torch.testing.assert_close(*results, equal_nan=True)


def test_sums_of_half_are_rounded_once():
    x = torch.zeros(1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    y = f.pad(x, (300, 300), "replicate")
    assert torch.autograd.grad(y.sum(), x)[0].item() == 600  # 601 in bfloat16; adding one by one stops at 256


def test_autocast():
    x = torch.randn(1, 2, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        for mode in module.MODES:
            assert f.pad(x, (1, 1), mode).dtype == F.pad(x, (1, 1), mode).dtype, mode


@pytest.mark.parametrize("ours", module.MODULES)
def test_modules(ours):
    n, theirs = int(ours.__name__[-2]), getattr(nn, ours.__name__)
    args = (1, 2.5) if ours.__name__.startswith("Constant") else (1,)
    a, b = ours(*args), theirs(*args)
    assert isinstance(a, theirs) and repr(a) == repr(b)
    for x in (torch.randn(2, 3, *(4,) * n), torch.randn(3, *(4,) * n)):
        x.requires_grad_()
        dy = torch.randn_like(b(x))
        torch.testing.assert_close((a(x), torch.autograd.grad(a(x), x, dy)), (b(x), torch.autograd.grad(b(x), x, dy)))


@pytest.mark.parametrize("mode", BORDERS)
def test_channels_last(mode):
    x = torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    y = f.pad(x, (1, 1, 2, 0), mode)
    (g,) = torch.autograd.grad(y, x, torch.randn(y.shape).to(memory_format=torch.channels_last))
    assert g.is_contiguous(memory_format=torch.channels_last)


X = torch.randn(2, 3, 4)
ERRORS = {
    "mode": (lambda: f.pad(X, (1, 1), "edge"), ValueError, "mode='edge' is not known"),
    "odd": (lambda: f.pad(X, (1, 1, 1)), ValueError, r"pad=\(1, 1, 1\) must be an even number"),
    "floats": (lambda: f.pad(X, (1.0, 1.0)), ValueError, "must be an even number of ints"),
    "too many": (lambda: f.pad(X, (1,) * 8), ValueError, "up to 3 dimensions"),
    "value": (lambda: f.pad(X, (1, 1), "reflect", 1.0), ValueError, "value=1.0 has no meaning"),
    "rank": (lambda: f.pad(X[0, 0], (1, 1), "reflect"), ValueError, r"input has shape \(4,\)"),
    "reflect": (lambda: f.pad(X, (4, 1), "reflect"), ValueError, "by up to 3, not by"),
    "circular": (lambda: f.pad(X, (0, 5), "circular"), ValueError, "by up to 4, not by"),
    "cut": (lambda: f.pad(X, (-3, -2)), ValueError, r"cuts more off dimension 2 of input \(2, 3, 4\)"),
    "integers": (lambda: f.pad(X.long(), (1, 1)), TypeError, "input is torch.int64"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_errors(error):
    call, kind, message = ERRORS[error]
    with pytest.raises(kind, match="pad: .*" + message):
        call()
