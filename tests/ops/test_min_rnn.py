"""min_gru and min_lstm: the paper's equations, lengths and packed sequences, saving, modules, what they refuse."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import bptoolkit as bp
from bptoolkit.bench import saved_bytes

close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
DOUBLE = torch.float64
each = pytest.mark.parametrize("kind", ["MinGRU", "MinLSTM"])


def module(kind, *args, **kw):
    torch.manual_seed(0)
    return getattr(bp.nn, kind)(*args, dtype=DOUBLE, **kw)


def draw(*shape, seed=1, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE) * scale).requires_grad_()


def grads(out, xs, seed=3):
    g = torch.Generator().manual_seed(seed)
    flat = [out] if isinstance(out, torch.Tensor) else list(out)
    return torch.autograd.grad(flat, xs, [torch.randn(o.shape, generator=g, dtype=DOUBLE) for o in flat])


def test_by_hand():
    """Two steps, written out with Python's floats: Algorithms 1 and 5 of the paper, and its g."""
    from math import exp

    def s(a):
        return 1 / (1 + exp(-a))

    def g(a):
        return a + 0.5 if a >= 0 else s(a)

    w, b, xs = (0.5, -0.3, 0.8), (0.05, 0.1, -0.2), (1.5, -0.7)
    gru = lstm = 0.25
    for x in xs:
        f, i, m = (p * x + q for p, q in zip(w, b))
        gru = (1 - s(f)) * gru + s(f) * g(m)
        lstm = s(f) / (s(f) + s(i)) * lstm + s(i) / (s(f) + s(i)) * g(m)
    x, h0 = torch.tensor(xs, dtype=DOUBLE).reshape(2, 1, 1), torch.full((1, 1, 1), 0.25, dtype=DOUBLE)
    weight, bias = torch.tensor(w, dtype=DOUBLE).reshape(3, 1), torch.tensor(b, dtype=DOUBLE)
    close(bp.functional.min_lstm(x, h0, [weight, bias])[0][-1].item(), lstm)
    close(bp.functional.min_gru(x, h0, [weight[[0, 2]], bias[[0, 2]]])[0][-1].item(), gru)


@each
@pytest.mark.parametrize("save", ["gates", "outputs"])
@pytest.mark.parametrize("activation", ["g", "identity", "tanh"])
def test_long_sequences_in_every_mode(kind, save, activation):
    """T = 70 goes in blocks; both modes, all layers and directions, to second order, against the plain loop."""
    m = module(kind, 3, 2, num_layers=2, bidirectional=True, activation=activation)
    m.save = save
    op = bp.OPS["min_gru" if kind == "MinGRU" else "min_lstm"]
    x, h0 = draw(70, 2, 3), draw(4, 2, 2, seed=2)
    ours = m(x, h0)
    weights = list(m.parameters())
    plain = op.reference(x, h0, weights, activation=activation, num_layers=2, bidirectional=True)
    close(ours, plain)
    xs, results = [x, h0, *weights], []
    for y, h in (ours, plain):
        first = torch.autograd.grad(y.sin().sum() + h.cos().sum(), xs, create_graph=True)
        results.append((first, torch.autograd.grad(sum((g * g).sum() for g in first), xs)))
    close(*results)


@each
@pytest.mark.parametrize("kw", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=["plain", "deep"])
def test_lengths_and_packed_sequences(kind, kw):
    """Each row as if it were alone; NaN past its end is not read; the same packed."""
    m, lengths, T = module(kind, 3, 4, **kw), [2, 40, 7], 40
    D = 4 if kw else 1
    x, h0 = draw(T, 3, 3), draw(D, 3, 4, seed=2)
    turn = (lambda t: t.transpose(0, 1)) if kw else (lambda t: t)
    past = (torch.arange(T)[:, None] >= torch.tensor(lengths))[..., None]
    filled = x.detach().masked_fill(past, torch.nan).requires_grad_()
    y, h = m(turn(filled), h0, torch.tensor(lengths))
    params = list(m.parameters())
    got = grads((turn(y), h), [filled, h0, *params])
    packed = pack_padded_sequence(turn(x), lengths, batch_first=bool(kw), enforce_sorted=False)
    py, ph = m(packed, h0)
    assert isinstance(py, PackedSequence)
    close((pad_packed_sequence(py, total_length=T)[0], ph), (turn(y), h))
    close(grads((pad_packed_sequence(py, total_length=T)[0], ph), [x, h0, *params]), got)
    for k, n in enumerate(lengths):
        alone_y, alone_h = m(turn(x[:n, k : k + 1]), h0[:, k : k + 1])
        close((turn(y)[:n, k : k + 1], h[:, k : k + 1]), (turn(alone_y), alone_h))
        assert bool((turn(y)[n:, k] == 0).all())


def test_both_gates_may_underflow():
    """σ(f) and σ(i) are 0 in float32; their ratio is not, nor are its gradients NaN."""
    w = torch.zeros(3, 1).requires_grad_()
    b = torch.tensor([-200.0, -201.0, 1.0], requires_grad=True)
    y, _ = bp.functional.min_lstm(torch.zeros(3, 1, 1), torch.zeros(1, 1, 1), [w, b])
    z = torch.sigmoid(torch.tensor(-1.0))
    torch.testing.assert_close(y[0, 0, 0], z * 1.5)
    assert bool(torch.isfinite(torch.autograd.grad(y.sum(), b)[0]).all())


@each
def test_half_precision(kind):
    m = module(kind, 3, 4).bfloat16()
    x = draw(100, 2, 3).detach().bfloat16()
    y, _ = m(x)
    wide = module(kind, 3, 4)
    wide.load_state_dict({k: v.double() for k, v in m.state_dict().items()})
    want, _ = wide(x.double())
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.double(), want, rtol=2e-2, atol=2e-2)


@each
def test_what_is_saved(kind):
    """x, h and pre, or x and h."""
    m, blocks = module(kind, 4, 16, bias=False), 2 if kind == "MinGRU" else 3
    x = draw(64, 2, 4)
    step = 64 * 2 * 8
    fixed = (blocks * 16 * 4 + 2 * 16) * 8
    assert saved_bytes(lambda: m(x)) <= step * (4 + 16 + blocks * 16) + fixed
    m.save = "outputs"
    assert saved_bytes(lambda: m(x)) <= step * (4 + 16) + fixed


@each
def test_modules(kind):
    m = module(kind, 3, 4, num_layers=2, bidirectional=True, dropout=0.5, activation="tanh")
    assert repr(m) == f"{kind}(3, 4, num_layers=2, dropout=0.5, bidirectional=True, activation='tanh')"
    names = [f"{p}_l{k}{s}" for k in (0, 1) for s in ("", "_reverse") for p in ("weight_ih", "bias_ih")]
    assert list(m.state_dict()) == names and m.weight_ih_l1.shape[1] == 8
    x = draw(5, 3)
    torch.manual_seed(1)
    first = m(x)[0]
    assert not torch.equal(first, m(x)[0])  # dropout between the layers
    m.eval()
    close(m(x), m(x))
    close(m(x)[0], m(x[:, None])[0][:, 0])


def test_refusals():
    F, x, w = bp.functional.min_gru, torch.ones(5, 2, 3), torch.ones(8, 3)
    with pytest.raises(ValueError, match=r"weights has 1 tensors; 1 layers in 1 directions, .* need 2"):
        F(x, None, [w])
    with pytest.raises(ValueError, match=r"input has 4 features \(5, 2, 4\), but weight_ih_l0 \(8, 3\) takes 3"):
        F(torch.ones(5, 2, 4), None, [w], bias=False)
    with pytest.raises(ValueError, match=r"h_0 has shape \(2, 4\); .* needs \(1, 2, 4\)"):
        F(x, torch.ones(2, 4), [w], bias=False)
    with pytest.raises(ValueError, match="activation='relu'"):
        F(x, None, [w], bias=False, activation="relu")
    with pytest.raises(ValueError, match="save='all'"):
        F(x, None, [w], bias=False, save="all")
    with pytest.raises(ValueError, match=r"weight_ih_l0 has shape \(8, 3\); it needs \(3·H, I\)"):
        bp.functional.min_lstm(x, None, [w], bias=False)
    with pytest.raises(TypeError, match="hx must be one tensor"):
        F(x, (x, x), [w], bias=False)
