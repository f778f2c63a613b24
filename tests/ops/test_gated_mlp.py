"""What is special to gated_mlp and mlp: the memory they save, their module, their errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bptoolkit as bp
from bptoolkit.bench import saved_bytes
from bptoolkit.ops import gated_mlp as gated
from bptoolkit.ops import mlp

f = bp.functional


def tensors(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", gated.GATES)
def test_what_gated_mlp_keeps(activation, dtype):
    """x, g and u: D + 2 H elements a row, where autograd has D + 4 H, for relu D + 3 H. Weights aside."""
    D, H = 64, 172
    x, *w = tensors((32, D), (H, D), (H, D), (D, H), dtype=dtype)
    ours, theirs = (saved_bytes(lambda c=c: c(x, *w, activation), but=w) for c in (f.gated_mlp, gated.reference))
    assert ours == 32 * (D + 2 * H) * dtype.itemsize
    assert theirs == 32 * (D + (3 if activation == "relu" else 4) * H) * dtype.itemsize
    assert activation == "relu" or ours <= 0.7 * theirs, ours / theirs


@pytest.mark.parametrize("activation", ["gelu", "silu", "gelu_tanh"])
def test_what_mlp_keeps(activation):
    """x and u: D + 4 D elements a row, where autograd has D + 8 D."""
    D, H = 64, 256
    x, *w = tensors((32, D), (H, D), (H,), (D, H), (D,))
    ours, theirs = (saved_bytes(lambda c=c: c(x, *w, activation), but=w) for c in (f.mlp, mlp.reference))
    assert ours == 32 * (D + H) * 4
    assert ours <= 0.7 * theirs, ours / theirs


def test_frozen_weights():
    """Without a gradient for them, x is not kept; for w_down alone, u and g are."""
    x, *w = tensors((32, 64), (172, 64), (172, 64), (64, 172))
    frozen = [t.detach() for t in w]
    assert saved_bytes(lambda: f.gated_mlp(x, *frozen), but=frozen) == 32 * 2 * 172 * 4
    assert saved_bytes(lambda: f.gated_mlp(x.detach(), *frozen[:2], w[2])) == 32 * 2 * 172 * 4
    x, w1, b1, w2, b2 = tensors((32, 64), (256, 64), (256,), (64, 256), (64,))
    assert saved_bytes(lambda: f.mlp(x.detach(), w1.detach(), b1.detach(), w2.detach(), b2)) == 0


@pytest.mark.parametrize("activation", gated.GATES)
def test_third_order_through_what_is_kept(activation):
    """Cotangents of g and u reach their inputs: the gradient of a gradient's gradient."""
    args = tensors((3, 4), (5, 4), (5, 4), (2, 5), dtype=torch.float64)

    def third(call):
        total = call(*args, activation).sin().sum()
        for _ in range(2):
            grads = torch.autograd.grad(total, args, create_graph=True)
            total = sum((g.cos() * g).sum() for g in grads)
        return torch.autograd.grad(total, args)

    torch.testing.assert_close(third(f.gated_mlp), third(gated.reference), rtol=1e-9, atol=1e-9)


def test_infinite_cotangents_where_relu_is_off():
    g, u = torch.tensor([-1.0, 0.0, 2.0]), torch.ones(3)
    dh = torch.full((3,), float("inf"))
    assert gated.elementwise(dh, None, None, g, u, "relu", (True, False, False))[0].tolist() == [0, 0, float("inf")]
    assert mlp.elementwise(dh, None, g, "relu", (True, False, False))[0].tolist() == [0, 0, float("inf")]


class LlamaMLP(nn.Module):
    def __init__(self, D, H):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(D, H, bias=False), nn.Linear(D, H, bias=False)
        self.down_proj = nn.Linear(H, D, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def test_module():
    """Llama's names; the weights load; values and gradients agree."""
    theirs, ours = LlamaMLP(6, 10), bp.nn.GatedMLP(6, 10)
    ours.load_state_dict(theirs.state_dict())
    results = []
    for m in (ours, theirs):
        torch.manual_seed(0)
        x = torch.randn(2, 3, 6, requires_grad=True)
        y = m(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in m.parameters())])
    torch.testing.assert_close(*results)
    assert bp.nn.GatedMLP(6).up_proj.weight.shape == (16, 6)
    assert "activation='gelu'" in repr(bp.nn.GatedMLP(6, 4, "gelu"))
    assert bp.nn.GatedMLP(6, dtype=torch.bfloat16).up_proj.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="GatedMLP: activation='tanh' is not known; choose from 'silu', 'gelu', 'gelu_tanh'"):
        bp.nn.GatedMLP(6, 4, "tanh")


def test_autocast():
    x, *w = tensors((3, 4), (5, 4), (5, 4), (4, 5))
    with torch.autocast("cpu", torch.bfloat16):
        y, z = f.gated_mlp(x, *w), f.mlp(x, w[0], None, w[2], None)
    assert y.dtype == z.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.sum() + z.sum(), (x, *w)))


o = torch.ones
ERRORS = [
    (
        lambda: f.gated_mlp(o(2, 3), o(4, 3), o(5, 3), o(3, 4)),
        ValueError,
        r"gated_mlp: H is 4 in w_gate \(4, 3\) but 5 in w_up",
    ),
    (lambda: f.gated_mlp(o(2, 3), o(4, 3), o(4, 3), o(3, 5)), ValueError, r"gated_mlp: H is 4 in w_gate .* but 5 in w_down"),
    (lambda: f.gated_mlp(o(2, 3), o(4, 3), None, o(3, 4)), TypeError, "gated_mlp: w_up must be a tensor, not NoneType"),
    (
        lambda: f.gated_mlp(o(2, 3), *[o(3, 3)] * 3, "mish"),
        ValueError,
        "gated_mlp: activation='mish' is not known; choose from",
    ),
    (lambda: f.mlp(o(2, 3), o(4, 3), o(3), o(3, 4), None), ValueError, r"mlp: H is 4 in w1 \(4, 3\) but 3 in b1 \(3,\)"),
    (lambda: f.mlp(o(2, 3), o(4, 3), None, None, None), TypeError, "mlp: w2 must be a tensor, not NoneType"),
    (lambda: f.mlp(o(2, 3), *[o(3, 3), None] * 2, None), ValueError, "mlp: activation=None is not known"),
    (lambda: f.mlp(o(2, 3), o(4, 3).double(), None, o(3, 4), None), TypeError, "mlp: w1 is torch.float64 but input is"),
]


@pytest.mark.parametrize("call, error, message", ERRORS)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
