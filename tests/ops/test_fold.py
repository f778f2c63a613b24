"""What is special to unfold, fold and the shuffles: they are each other's transposes, empty tensors, modules, errors."""

from __future__ import annotations

from random import Random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bptoolkit as bp
from bptoolkit.cases import Draw

f = bp.functional


@pytest.mark.parametrize("name", ["unfold", "fold", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"])
def test_gradients_are_torchs(name):
    for seed in range(20):
        case = bp.OPS[name].draw(Draw(Random(seed), sizes=(1, 2, 3)))
        x = case.args[0]
        ours, theirs = f.__dict__[name](*case.args), getattr(F, name)(*case.args)
        dy = torch.randn_like(theirs)
        torch.testing.assert_close(
            (ours, torch.autograd.grad(ours, x, dy)), (theirs, torch.autograd.grad(theirs, x, dy)), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("shape", [(0, 4, 4, 4), (2, 0, 4, 4), (2, 4, 0, 4), (4, 0, 4)], ids=str)
def test_shuffles_of_nothing(shape):
    """torch's pixel_unshuffle gives an empty tensor back as it came; ours has the shape that it should."""
    x = torch.zeros(shape, requires_grad=True)
    *B, C, H, W = shape
    y = f.pixel_unshuffle(x, 2)
    assert y.shape == (*B, C * 4, H // 2, W // 2)
    assert torch.autograd.grad(y.sum(), x)[0].shape == shape
    y = f.pixel_shuffle(x, 2)
    assert y.shape == (*B, C // 4, H * 2, W * 2)
    assert torch.autograd.grad(y.sum(), x)[0].shape == shape


def test_overlaps_of_half_are_summed_wide():
    x = torch.full((1, 25, 256), 1 + 2**-7, dtype=torch.bfloat16)
    y = f.fold(x, 20, 5)
    want = F.fold(x.double(), 20, 5)
    assert torch.equal(y, want.bfloat16())


MODULES = [
    ("Unfold", ((2, 3), 1, 1, 2), (2, 3, 5, 6)),
    ("Fold", ((4, 5), (2, 2), 1, 1, 1), (2, 8, 30)),
    ("PixelShuffle", (2,), (2, 8, 3, 3)),
    ("PixelUnshuffle", (2,), (2, 3, 4, 6)),
    ("ChannelShuffle", (3,), (2, 6, 3, 3)),
]


@pytest.mark.parametrize("name, args, shape", MODULES, ids=str)
def test_modules(name, args, shape):
    a, b = getattr(bp.nn, name)(*args), getattr(nn, name)(*args)
    assert repr(a) == repr(b) and isinstance(a, type(b))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = a(x)
    assert not kept
    dy = torch.randn_like(y)
    torch.testing.assert_close((y, torch.autograd.grad(y, x, dy)), (b(x), torch.autograd.grad(b(x), x, dy)))


X = torch.randn(2, 4, 5, 5)
ERRORS = {
    "unfold: .*kernel_size=0": lambda: f.unfold(X, 0),
    r"unfold: .*\(7, 7\) with dilation=\(1, 1\) is larger than the image \(5, 5\)": lambda: f.unfold(X, 7),
    r"unfold: input has shape \(5, 5\)": lambda: f.unfold(X[0, 0], 2),
    "fold: .* 5 rows and 16 columns": lambda: f.fold(torch.ones(1, 5, 16), 5, 2),
    r"fold: .* its 4 · 4 places": lambda: f.fold(torch.ones(1, 4, 15), 5, 2),
    "fold: output_size=0": lambda: f.fold(torch.ones(1, 4, 16), 0, 2),
    "pixel_shuffle: .* 4 channels; .* square of upscale_factor=3": lambda: f.pixel_shuffle(X, 3),
    "pixel_unshuffle: .* height 5 and width 5": lambda: f.pixel_unshuffle(X, 2),
    "channel_shuffle: .* divisible by groups=3": lambda: f.channel_shuffle(X, 3),
    "channel_shuffle: groups=0 must be an int of at least 1": lambda: f.channel_shuffle(X, 0),
    r"pixel_shuffle: input has shape \(5, 5\)": lambda: f.pixel_shuffle(X[0, 0], 1),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError, match=message):
        ERRORS[message]()
