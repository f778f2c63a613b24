"""What is special to bilinear: torch's values, the order of shapes, modules, errors."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bptoolkit as bp

f = bp.functional


@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_is_torchs(lead, bias):
    tensors = [torch.randn(*lead, 3), torch.randn(*lead, 5), torch.randn(4, 3, 5), *[torch.randn(4)] * bias]
    found = []
    for fn in (f.bilinear, F.bilinear):
        leaves = [t.double().requires_grad_() for t in tensors]
        y = fn(*leaves)
        found.append((y.detach(), *torch.autograd.grad(y, leaves, y.detach().cos())))
    torch.testing.assert_close(*found)


def test_modules():
    a, b = bp.nn.Bilinear(3, 5, 4), nn.Bilinear(3, 5, 4)
    a.load_state_dict(b.state_dict())
    swapped = copy.deepcopy(b)
    assert repr(a) == repr(b) and bp.swap(swapped).swapped == {"": "op bilinear"}
    x1, x2 = torch.randn(6, 3), torch.randn(6, 5)
    for m in (a, swapped):
        torch.testing.assert_close(m(x1, x2), b(x1, x2))
    a.backend = "triton"
    with pytest.raises(ValueError, match="triton"):
        a(x1, x2)


def test_errors():
    x1, x2, W = torch.randn(2, 3), torch.randn(2, 5), torch.randn(4, 3, 5)
    for args, says in (
        ((x1[:, 1:], x2, W), r"bilinear: I is 2 in input1 \(2, 2\) but 3 in weight"),
        ((x1, x2[:1], W), r"bilinear: input1 has shape \(2, 3\) but input2 \(1, 5\)"),
        ((x1, x2, W, torch.ones(3)), "bilinear: O is 4 in weight"),
    ):
        with pytest.raises(ValueError, match=says):
            f.bilinear(*args)
    with pytest.raises(TypeError, match=r"bilinear: input2 is torch.float64"):
        f.bilinear(x1, x2.double(), W)
