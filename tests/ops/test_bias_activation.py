"""What is special to bias_activation: what it keeps, its roundings, its errors."""

from __future__ import annotations

import pytest
import torch

import bptoolkit as bp
from bptoolkit.bench import saved_bytes

f = bp.functional


@pytest.mark.parametrize(
    "activation, kept", [("relu", "y"), ("identity", ""), ("gelu", "x"), ("silu", "x"), ("gelu_tanh", "x")]
)
def test_what_is_kept(activation, kept):
    """Relu: its output, which the next layer keeps too; identity: nothing; the others: the input and the bias."""
    x, b = torch.randn(64, 32, requires_grad=True), torch.randn(32, requires_grad=True)
    found = []

    def pack(t):
        found.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = f.bias_activation(x, b, activation)
    assert [t.data_ptr() for t in found] == [t.data_ptr() for t in {"y": (y,), "": (), "x": (x, b)}[kept]]
    assert saved_bytes(lambda: f.bias_activation(x, b, activation), but=(x, b)) == (y.nbytes if kept == "y" else 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounded_once(dtype):
    """y and db of half tensors are the float64 values, rounded; in two steps of half they would not be."""
    x, b, dy = (torch.randn(s, dtype=torch.float64).to(dtype) for s in ((300, 20), (20,), (300, 20)))
    results = []
    for t in (dtype, torch.float64):
        leaves = [a.to(t).requires_grad_() for a in (x, b)]
        y = f.bias_activation(*leaves, "gelu")
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy.to(t))])
    for got, want in zip(*results):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps / 1.9, atol=1e-5)


def test_autocast():
    x, b = torch.randn(3, 4), torch.randn(4)
    with torch.autocast("cpu", torch.bfloat16):
        assert f.bias_activation(x.bfloat16(), b).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "args, error, message",
    [
        ((torch.ones(2, 3), torch.ones(4)), ValueError, r"bias_activation: N is 3 in input \(2, 3\) but 4 in bias \(4,\)"),
        ((torch.ones(2, 3), torch.ones(3).double()), TypeError, "bias_activation: bias is torch.float64 but input is"),
        ((torch.ones(2, 3), torch.ones(3), "mish"), ValueError, "bias_activation: activation='mish' is not known; choose from"),
        ((torch.ones(2, 3), None), TypeError, "bias_activation: bias must be a tensor, not NoneType"),
        ((torch.ones(()), torch.ones(3)), ValueError, "bias_activation: input has shape"),
    ],
)
def test_errors(args, error, message):
    with pytest.raises(error, match=message):
        f.bias_activation(*args)
