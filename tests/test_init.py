"""Initialisers: the distributions and matrices they promise, what they leave alone, and what they refuse."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import bptoolkit as bp
from bptoolkit import init

RECURRENT = [nn.RNN, nn.GRU, nn.LSTM, nn.RNNCell, nn.GRUCell, nn.LSTMCell, bp.nn.LSTM]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def gates(module, name):
    return [p.chunk(p.shape[0] // module.hidden_size) for n, p in module.named_parameters() if n.startswith(name)]


@pytest.mark.parametrize("shape", [(64, 400), (50, 16, 5, 5), (200, 8, 9)])
def test_lecun(shape):
    fan = math.prod(shape[1:])
    w = nn.Parameter(torch.empty(shape))
    assert init.lecun_normal_(w) is w and w.requires_grad and w.grad_fn is None
    assert w.var().item() == pytest.approx(1 / fan, rel=0.05) and w.mean().abs() < 3 / math.sqrt(fan * w.numel())
    init.lecun_uniform_(w)
    assert w.var().item() == pytest.approx(1 / fan, rel=0.05)
    assert 0.95 * math.sqrt(3 / fan) < w.abs().max() <= math.sqrt(3 / fan)
    a, b = (init.lecun_normal_(torch.empty(3, 4), torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(a, b)


def test_selu_keeps_unit_variance_with_lecun_only():
    x = torch.randn(512, 256)
    for _ in range(20):
        x = torch.selu(x @ init.lecun_normal_(torch.empty(256, 256)).mT)
    assert 0.7 < x.var() < 1.4 and abs(x.mean()) < 0.2


@pytest.mark.parametrize("cls", RECURRENT, ids=lambda c: c.__module__.split(".")[0] + "." + c.__name__)
def test_orthogonal_in_each_gate(cls):
    module = cls(3, 5)
    before = {n: p.clone() for n, p in module.named_parameters()}
    assert init.orthogonal_recurrent_(module, gain=2.0) is module
    for blocks in gates(module, "weight_hh"):
        for block in blocks:
            torch.testing.assert_close(block @ block.mT, 4 * torch.eye(5))
        assert len(blocks) < 2 or not torch.allclose(blocks[0], blocks[1])
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters() if not n.startswith("weight_hh"))


def test_orthogonal_of_weights_and_projections():
    w = init.orthogonal_recurrent_(torch.empty(12, 4))
    torch.testing.assert_close(w[4:8] @ w[4:8].mT, torch.eye(4))
    lstm = nn.LSTM(3, 5, num_layers=2, bidirectional=True, proj_size=2)
    init.orthogonal_recurrent_(lstm)
    found = gates(lstm, "weight_hh")
    assert len(found) == 4
    for blocks in found:
        assert len(blocks) == 4
        for block in blocks:  # 5 × 2: orthonormal columns
            torch.testing.assert_close(block.mT @ block, torch.eye(2))


def test_identity_keeps_a_state():
    rnn = nn.RNN(2, 4, nonlinearity="relu")
    weight = rnn.weight_ih_l0.clone()
    init.identity_recurrent_(rnn)
    assert torch.equal(rnn.weight_ih_l0, weight)
    state = torch.rand(1, 3, 4)
    _, last = rnn(torch.zeros(50, 3, 2), state)
    assert torch.equal(last, state)
    gru = init.identity_recurrent_(nn.GRUCell(2, 4), 0.5, input_std=1e-3)
    assert all(torch.equal(block, 0.5 * torch.eye(4)) for block in gates(gru, "weight_hh")[0])
    assert 0 < gru.weight_ih.std() < 5e-3 and not gru.bias_hh.any()


def test_the_forget_gates_bias_in_sum():
    """σ of the whole preactivation at zero input and state is what it should be: measured on the cell itself."""
    for module in (nn.LSTM(2, 3, num_layers=2, bidirectional=True), nn.LSTMCell(2, 3)):
        others = [(a.clone(), b.clone()) for a, b in init._biases("", module)]
        init.forget_bias_(module, 1.5)
        for (ih, hh), (a, b) in zip(init._biases("", module), others):
            assert torch.equal((ih + hh)[3:6], torch.full((3,), 1.5))
            keep = [0, 1, 2, 6, 7, 8, 9, 10, 11]
            assert torch.equal(ih[keep], a[keep]) and torch.equal(hh[keep], b[keep])
    cell = nn.LSTMCell(2, 3)
    with torch.no_grad():
        cell.bias_ih.zero_(), cell.bias_hh.zero_()
        init.forget_bias_(cell, 2.0)
        _, c = cell(torch.zeros(1, 2), (torch.zeros(1, 3), torch.ones(1, 3)))  # c' = σ(2) 1 + σ(0) tanh(0)
    torch.testing.assert_close(c, torch.full((1, 3), 2.0).sigmoid())


def test_chrono():
    lstm = init.chrono_(nn.LSTM(2, 4000, bias=True), 100)
    total = lstm.bias_ih_l0 + lstm.bias_hh_l0
    i, f, g, o = total.chunk(4)
    u = f.exp()
    assert torch.equal(i, -f) and not g.any() and not o.any()
    assert 1 <= u.min() < 1.5 and 98.5 < u.max() <= 99.01 and u.mean().item() == pytest.approx(50, rel=0.05)
    gru = init.chrono_(nn.GRUCell(2, 5), 10, torch.Generator().manual_seed(1))
    r, z, n = (gru.bias_ih + gru.bias_hh).chunk(3)
    assert not r.any() and not n.any() and (z > 0).all()
    with torch.no_grad():  # z keeps: with z near 1 the state stays
        nn.init.zeros_(gru.weight_ih), nn.init.zeros_(gru.weight_hh)
        torch.testing.assert_close(gru(torch.zeros(1, 2), torch.ones(1, 5)), z.sigmoid()[None])


def test_zero_last_makes_a_residual_the_identity():
    block = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.Dropout())
    x = torch.randn(3, 4)
    assert init.zero_last_(block) is block
    assert not block(x).any() and block[0].weight.any()
    normed = init.zero_last_(nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)))
    assert not normed(torch.randn(2, 2, 3, 3)).any() and normed[0].weight.any()


def test_fixup():
    def branch():
        return nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 300))

    branches = [branch() for _ in range(16)]
    assert init.fixup_(branches) is branches
    for b in branches:
        assert not b[4].weight.any() and not any(b[k].bias.any() for k in (0, 2, 4))
        for k in (0, 2):  # m = 3: 16^(−1/4) = 1/2 of He's
            assert b[k].weight.std().item() == pytest.approx(0.5 * math.sqrt(2 / 300), rel=0.03)
    init.fixup_([one := nn.Sequential(nn.Linear(3, 3))])
    assert not one[0].weight.any()


# --- LSUV


class Twice(nn.Module):
    """Layers used in another order than they are stated in, one of them twice, one never; and running statistics."""

    def __init__(self):
        super().__init__()
        self.last, self.first, self.unused = nn.Linear(16, 5), nn.Conv2d(3, 16, 3), nn.Linear(2, 2)
        self.norm, self.shared, self.drop = nn.BatchNorm2d(16), nn.Linear(16, 16), nn.Dropout(0.5)

    def forward(self, x, *, scale=1.0):
        h = self.drop(self.norm(self.first(x * scale)).relu()).mean((2, 3))
        return self.last(torch.tanh(self.shared(self.shared(h))))


def test_lsuv_gives_every_layer_unit_variance():
    model, x = Twice(), torch.randn(32, 3, 8, 8) * 7
    before = {n: b.clone() for n, b in model.named_buffers()}
    unused, bias = model.unused.weight.clone(), model.first.bias.clone()
    done = init.lsuv_(model, x, scale=3.0, tolerance=0.05)
    assert list(done) == ["first", "shared", "last"]
    assert all(abs(v - 1) <= 0.05 for v, _ in done.values()) and done["first"].iterations >= 1
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers()) and model.training
    assert torch.equal(model.unused.weight, unused) and torch.equal(model.first.bias, bias)
    assert not any(m._forward_hooks for m in model.modules())
    assert model.first(x * 3).var().item() == pytest.approx(1, abs=0.06)
    w = model.first.weight.flatten(1).detach()
    torch.testing.assert_close(w @ w.mT / (w @ w.mT)[0, 0], torch.eye(16), atol=1e-5, rtol=0)  # a multiple of an orthogonal one


def test_lsuv_on_deep_networks_and_swapped_models():
    model = nn.Sequential(*(m for _ in range(30) for m in (nn.Linear(32, 32), nn.ReLU())))
    x = torch.randn(64, 32)
    with torch.no_grad():
        assert model(x).var() < 1e-2
        bp.swap(model)
        done = init.lsuv_(model, x)
        assert len(done) == 30 and 0.1 < model(x).var() < 1.5


def test_lsuv_of_some_layers():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), torch.randn(20, 4)
    kept = model[0].weight.clone()
    with torch.no_grad():
        nn.init.constant_(model[1].weight, 0.3).add_(torch.randn(3, 8))
    was = model[1].weight / model[1].weight.norm()
    assert list(init.lsuv_(model, x, layers=[model[1]], orthogonal=False)) == ["1"]
    assert torch.equal(model[0].weight, kept)
    torch.testing.assert_close(model[1].weight / model[1].weight.norm(), was)


def linear_on(value):
    return nn.Sequential(nn.Linear(4, 3)), torch.full((5, 4), value)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, "lecun_normal_: the tensor has shape", lambda: init.lecun_normal_(torch.empty(3))),
        (ValueError, "lecun_uniform_: the tensor has shape", lambda: init.lecun_uniform_(torch.empty(()))),
        (ValueError, r"it needs \(gates · H, H\)", lambda: init.orthogonal_recurrent_(torch.empty(5, 2))),
        (TypeError, "not a Linear", lambda: init.orthogonal_recurrent_(nn.Linear(2, 2))),
        (TypeError, "identity_recurrent_: takes an nn.RNN", lambda: init.identity_recurrent_(nn.Linear(2, 2))),
        (TypeError, "a GRU has no forget gate", lambda: init.forget_bias_(nn.GRU(2, 2))),
        (ValueError, "forget_bias_: the LSTM has no biases", lambda: init.forget_bias_(nn.LSTM(2, 2, bias=False))),
        (TypeError, "a RNNCell has no gates", lambda: init.chrono_(nn.RNNCell(2, 2), 10)),
        (ValueError, "longest=2 must be more than 2", lambda: init.chrono_(nn.GRU(2, 2), 2)),
        (ValueError, "zero_last_: the ReLU has no", lambda: init.zero_last_(nn.ReLU())),
        (ValueError, "fixup_: branch 1, a Tanh", lambda: init.fixup_([nn.Linear(2, 2), nn.Tanh()])),
        (ValueError, "tolerance=0 must", lambda: init.lsuv_(*linear_on(1.0), tolerance=0)),
        (ValueError, "iterations=0 must", lambda: init.lsuv_(*linear_on(1.0), iterations=0)),
        (RuntimeError, "layer '0' has variance nan: its input", lambda: init.lsuv_(*linear_on(math.nan))),
        (RuntimeError, "layer '0' has variance .* after 1 iterations", lambda: init.lsuv_(*linear_on(0.0), iterations=1)),
        (ValueError, "calls no linear", lambda: init.lsuv_(nn.ReLU(), torch.ones(2))),
        (ValueError, "a Linear that is not in the model", lambda: init.lsuv_(*linear_on(1.0), layers=[nn.Linear(4, 3)])),
    ],
)
def test_refused(error, match, call):
    with pytest.raises(error, match=match):
        call()


def test_lsuv_refuses_what_it_cannot_scale():
    model = Twice()
    x = torch.randn(8, 3, 8, 8)
    with pytest.raises(ValueError, match="does not call unused"):
        init.lsuv_(model, x, layers=[model.first, model.unused])
    with pytest.raises(TypeError, match="layer 'norm' is a BatchNorm2d"):
        init.lsuv_(model, x, layers=[model.norm])
    parametrizations.weight_norm(model.shared)
    with pytest.raises(ValueError, match="weight of layer 'shared' is parametrized"):
        init.lsuv_(model, x)
