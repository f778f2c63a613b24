"""What is special to the recurrent cells: torch's modules, loops over them, autocast, special values, errors."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import bptoolkit as bp
from bptoolkit.bench import saved_bytes

close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
DOUBLE = torch.float64
KINDS = {
    "lstm": ("LSTMCell", {}),
    "gru": ("GRUCell", {}),
    "tanh": ("RNNCell", {}),
    "relu": ("RNNCell", {"nonlinearity": "relu"}),
}
each = pytest.mark.parametrize("kind", KINDS)


def pair(kind, bias=True, dtype=DOUBLE):
    """Torch's module and ours, with the same parameters."""
    name, kw = KINDS[kind]
    torch.manual_seed(0)
    theirs, ours = (getattr(where, name)(3, 4, bias, dtype=dtype, **kw) for where in (nn, bp.nn))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def draw(*shape, seed=1, dtype=DOUBLE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype).requires_grad_()


def flat(out):
    return list(out) if isinstance(out, tuple) else [out]


@each
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(5,), (0,), ()], ids=["batch", "empty", "unbatched"])
@pytest.mark.parametrize("initial", [True, False])
def test_as_torchs_module(kind, bias, lead, initial):
    ours, theirs = pair(kind, bias)
    assert repr(ours) == repr(theirs) and list(ours.state_dict()) == list(theirs.state_dict())
    states = [draw(*lead, 4, seed=s) for s in (2, 3)][: 1 + (kind == "lstm")]
    x, hx = draw(*lead, 3), tuple(states) if kind == "lstm" else states[0]
    results = []
    for module in (ours, theirs):
        out = flat(module(x, hx) if initial else module(x))
        cotangents = [draw(*o.shape, seed=7 + k).detach() for k, o in enumerate(out)]
        inputs = [x, *(states if initial else ()), *module.parameters()]
        first = torch.autograd.grad(out, inputs, cotangents, create_graph=True, allow_unused=not initial)
        first = [g for g in first if g is not None]
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), inputs, allow_unused=True, materialize_grads=True)
        results.append((out, first, second))
    close(results[0], results[1])


@each
def test_a_loop_over_the_cell_is_the_sequence(kind):
    """Through twelve steps the cell gives what torch's sequence gives, lengths of graph and all."""
    ours, _ = pair(kind)
    name, kw = KINDS[kind]
    whole = getattr(nn, name.removesuffix("Cell"))(3, 4, dtype=DOUBLE, **kw)
    whole.load_state_dict({f"{k}_l0": v for k, v in ours.state_dict().items()})
    x, hx, ys = draw(12, 5, 3), None, []
    for t in range(12):
        hx = ours(x[t], hx)
        ys.append(flat(hx)[0])
    weights = draw(12, 5, 4, seed=9).detach()
    got = torch.autograd.grad((torch.stack(ys) * weights).sum(), [x, *ours.parameters()])
    y, _ = whole(x)
    close(torch.stack(ys), y)
    close(got, torch.autograd.grad((y * weights).sum(), [x, *whole.parameters()]))


@each
def test_swap_takes_cells(kind):
    ours, theirs = pair(kind)
    x = draw(5, 3)
    want = flat(theirs(x))
    assert bp.swap(theirs).swapped and type(theirs) is type(ours)
    close(flat(theirs(x)), want)
    bp.unswap(theirs)
    assert type(theirs).__module__.startswith("torch.")


@each
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_torchs_dtypes(kind, state, dtype):
    ours, theirs = pair(kind, dtype=torch.float32)
    x, h = draw(5, 3, dtype=dtype), None if state is None else draw(5, 4, seed=2, dtype=state)
    hx = h if h is None or kind != "lstm" else (h, h)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = flat(ours(x, hx)), flat(theirs(x, hx))
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
    sum(t.sum() for t in got).backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


@each
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_special_values(kind, value):
    """NaN, infinities and saturated gates go where torch lets them."""
    ours, theirs = pair(kind)
    x = draw(3, 3).detach()
    x[0, 0], x[1, 1] = value, -value
    results = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        out = flat(module(leaf))
        results.append((out, torch.autograd.grad([o[1:].sum() for o in out], [leaf])))
    torch.testing.assert_close(*results, equal_nan=True)


def test_relu_blocks_infinite_cotangents_where_it_is_off():
    ours, theirs = pair("relu")
    x = draw(6, 3)
    y = theirs(x)
    assert (y == 0).any() and (y > 0).any()
    dy = torch.where(y == 0, float("inf"), 1.0).detach()
    close(torch.autograd.grad(ours(x), x, dy), torch.autograd.grad(y, x, dy))


@each
def test_saves_less_than_torch(kind):
    ours, theirs = pair(kind, dtype=torch.float32)
    x, h = (torch.randn(256, n, requires_grad=True) for n in (3, 4))
    hx = (h, h.detach()) if kind == "lstm" else h
    assert saved_bytes(lambda: ours(x, hx)) <= saved_bytes(lambda: theirs(x, hx))


def test_errors():
    x, h, wi, wh = draw(5, 3), draw(5, 4), draw(16, 3), draw(16, 4)
    lstm, gru = bp.functional.lstm_cell, bp.functional.gru_cell
    with pytest.raises(TypeError, match=r"lstm_cell: hx must be a tuple \(h, c\)"):
        lstm(x, h, wi, wh)
    with pytest.raises(ValueError, match="lstm_cell: H is 4 in h"):
        lstm(x, (h, draw(5, 3)), wi, wh)
    with pytest.raises(ValueError, match="lstm_cell: B is 5 in input"):
        lstm(x, (draw(2, 4), draw(2, 4)), wi, wh)
    with pytest.raises(ValueError, match=r"lstm_cell: h has shape .4,., 1 dimensions"):
        lstm(x, (h[0], h[0]), wi, wh)
    with pytest.raises(ValueError, match="lstm_cell: I is 2 in input"):
        lstm(draw(5, 2), None, wi, wh)
    with pytest.raises(ValueError, match=r"lstm_cell: input has shape .2, 5, 3."):
        lstm(draw(2, 5, 3), None, wi, wh)
    with pytest.raises(ValueError, match=r"gru_cell: weight_hh has shape .16, 4.; it needs .3·H, H."):
        gru(x, h, wi, wh)
    with pytest.raises(TypeError, match="gru_cell: hx must be one tensor"):
        gru(x, (h, h), wi, wh)
    with pytest.raises(TypeError, match=r"rnn_tanh_cell: weight_ih is torch.float32"):
        bp.functional.rnn_tanh_cell(x, h, draw(4, 3, dtype=torch.float32), draw(4, 4))
    with pytest.raises(RuntimeError, match="Unknown nonlinearity: sin"):
        bp.nn.RNNCell(3, 4, nonlinearity="sin")(x)
