"""Rows that begin again: lstm, gru, rnn, min_gru and min_lstm with resets, beside a loop that zeroes the state step by step."""

from __future__ import annotations

import functools

import pytest
import torch

import bptoolkit as bp

close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
DOUBLE = torch.float64
GATES = {"lstm": 4, "gru": 3, "rnn": 1, "min_gru": 2, "min_lstm": 3}
RECURRENT = ("lstm", "gru", "rnn")
each = pytest.mark.parametrize("name", GATES)
T, B, I, H = 9, 5, 2, 3


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).requires_grad_()


def arguments(name, D=1, L=1):
    weights = []
    for k in range(L * D):
        shapes = [(GATES[name] * H, I if k < D else D * H), (GATES[name] * H, H), (GATES[name] * H,), (GATES[name] * H,)]
        weights += [draw(*s, seed=10 * k + j) for j, s in enumerate(shapes) if name in RECURRENT or j % 2 == 0]
    states = [draw(L * D, B, H, seed=70 + k) for k in range(2 if name == "lstm" else 1)]
    return draw(T, B, I, seed=99), states, weights


def resets(seed=0, share=0.3):
    """One row without any, one with all; the others at random."""
    r = torch.rand(T, B, generator=torch.Generator().manual_seed(seed)) < share
    r[:, 0], r[:, 1] = False, True
    return r


def call(name, x, states, weights, **options):
    """The output and the last states as a list."""
    y, last = bp.OPS[name].call(x, tuple(states) if name == "lstm" else states[0], weights, **options)
    return [y, *(last if name == "lstm" else [last])]


def one_by_one(name, x, states, weights, r, lengths, D=1):
    """One layer: a step is a call of its own, and between two steps the state is zeroed where the later one has a reset."""
    per, outputs, finals = len(weights) // D, [], []
    for d in range(D):
        ws, rows, ends = weights[d * per : (d + 1) * per], [], []
        for b in range(B):
            n = T if lengths is None else int(lengths[b])
            s, ys = [h[d : d + 1, b : b + 1] for h in states], [x.new_zeros(1, H)] * T
            for t in reversed(range(n)) if d else range(n):
                cut = r[t, b] if not d else t + 1 < n and r[t + 1, b]
                s = [0 * h if cut else h for h in s]
                y, *s = call(name, x[t : t + 1, b : b + 1], s, ws)
                ys[t] = y[0]
            rows.append(torch.stack(ys))
            ends.append(s)
        outputs.append(torch.cat(rows, 1))
        finals.append([torch.cat([e[k] for e in ends], 1) for k in range(len(states))])
    return [torch.cat(outputs, -1), *(torch.cat([f[k] for f in finals]) for k in range(len(states)))]


def pulled(out, leaves):
    """Outputs, and gradients of a loss of all of them to second order."""
    loss = sum(((k + 1) * t.sin()).sum() for k, t in enumerate(out))
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    return [*out, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]


@each
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
def test_as_a_loop(name, D, ragged):
    x, states, weights = arguments(name, D)
    lengths = torch.tensor([T, T, 0, 4, 7]) if ragged else None
    leaves = [x, *states, *weights]
    got = call(name, x, states, weights, bidirectional=D == 2, lengths=lengths, resets=resets())
    want = one_by_one(name, x, states, weights, resets(), lengths, D)
    close(pulled(got, leaves), pulled(want, leaves))


@each
def test_layers(name):
    """All layers are cut at the same steps."""
    x, states, weights = arguments(name, L=2)
    per = len(weights) // 2
    got = call(name, x, states, weights, num_layers=2, resets=resets(1))
    first = one_by_one(name, x, [s[:1] for s in states], weights[:per], resets(1), None)
    want = one_by_one(name, first[0], [s[1:] for s in states], weights[per:], resets(1), None)
    close(got, [want[0], *(torch.cat(s) for s in zip(first[1:], want[1:]))])


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("options", [{"save": "outputs"}, {"save": "segments"}, {"truncate": 20}], ids=str)
def test_ways_of_saving(name, options):
    x, states, weights = arguments(name)
    leaves = [x, *states, *weights]
    found = [pulled(call(name, x, states, weights, resets=resets(), **o), leaves) for o in ({}, options)]
    close(*found)


@each
def test_none_and_all(name):
    x, states, weights = arguments(name)
    close(call(name, x, states, weights, resets=torch.zeros(T, B, dtype=torch.bool)), call(name, x, states, weights))
    y, *_ = call(name, x, states, weights, resets=torch.ones(T, B, dtype=torch.bool))
    zero = [torch.zeros(1, T * B, H, dtype=DOUBLE) for _ in states]
    close(y.reshape(1, T * B, H), call(name, x.reshape(1, T * B, I), zero, weights)[0])


def test_nothing_crosses_a_reset():
    """Values of an earlier run, NaN among them, do not reach a later one, nor do gradients reach back."""
    x, states, weights = arguments("lstm")
    r = torch.zeros(T, B, dtype=torch.bool)
    r[4] = True
    bad = x.detach().clone()
    bad[:4] = torch.nan
    y = call("lstm", bad.requires_grad_(), [s * torch.nan for s in states], weights, resets=r)[0]
    assert y[4:].isfinite().all() and y[:4].isnan().all()
    (dx,) = torch.autograd.grad(call("lstm", x, states, weights, resets=r)[0][5].sum(), x)
    assert not dx[:4].any() and dx[4:6].any() and not dx[6:].any()


def test_little_is_padded(monkeypatch):
    """One long run beside many short ones."""
    from bptoolkit.ops import lstm as file

    taken, real = [], file.GATES.forward
    monkeypatch.setattr(file.GATES, "forward", lambda x, *a: taken.append(x.shape[0] * x.shape[1]) or real(x, *a))
    x, states, weights = arguments("lstm")
    r = torch.ones(T, B, dtype=torch.bool)
    r[:, 0] = False
    call("lstm", x, states, weights, resets=r)
    assert sum(taken) == T * B


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "MinGRU"])
def test_modules_and_layouts(kind):
    layer = getattr(bp.nn, kind)(I, H, batch_first=True).double()
    x, r = draw(B, T, I, seed=3), resets()
    y, _ = layer(x, resets=r.mT)
    layer.batch_first = False
    close(y.transpose(0, 1), layer(x.transpose(0, 1), resets=r)[0])
    close(y[2], layer(x[2], resets=r[:, 2])[0])


def test_vmap_over_the_input():
    x, states, weights = arguments("gru")
    xs = torch.stack([x.detach(), x.detach() + 1])
    r = resets()
    rows = torch.func.vmap(lambda x: call("gru", x, states, weights, resets=r)[0])(xs)
    close(rows, torch.stack([call("gru", x, states, weights, resets=r)[0] for x in xs]))


@pytest.mark.parametrize("kernel", RECURRENT)
def test_with_the_kernels(kernel):
    pytest.importorskip("triton", reason="Triton is not installed")
    from bptoolkit.triton_kernels import interpret

    x, states, weights = (
        [t.detach().float().requires_grad_() for t in ts] if isinstance(ts, list) else ts.detach().float().requires_grad_()
        for ts in arguments(kernel)
    )
    leaves, found = [x, *states, *weights], []
    with interpret():
        for backend in ("triton", "eager"):
            y, *_ = call(kernel, x, states, weights, resets=resets(), backend=backend)
            found.append((y, *torch.autograd.grad(y.sin().sum(), leaves, allow_unused=True)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"resets": torch.zeros(T, B)}, TypeError, "resets must be a bool tensor, not torch.float32"),
        ({"resets": [True]}, TypeError, "resets must be a bool tensor, not list"),
        ({"resets": torch.zeros(B, T, dtype=torch.bool)}, ValueError, r"resets has shape \(5, 9\); it needs \(9, 5\)"),
        ({"resets": resets(), "truncate": bp.ARTBP(0.5)}, ValueError, "resets and truncate=ARTBP.* do not go together"),
    ],
)
def test_errors(options, error, match):
    x, states, weights = arguments("lstm")
    with pytest.raises(error, match=f"lstm: {match}"):
        call("lstm", x, states, weights, **options)
    packed = torch.nn.utils.rnn.pack_sequence([x[:, 0]])
    with pytest.raises(ValueError, match="lstm: resets need a padded input and lengths"):
        bp.functional.lstm(packed, None, weights, resets=resets())
    with pytest.raises(ValueError, match="lstm: resets must have values that can be read"):
        torch.func.vmap(lambda r: call("lstm", x, states, weights, resets=r)[0])(torch.stack([resets()] * 2))
