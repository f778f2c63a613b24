"""What is special to peephole_lstm, layer_norm_lstm and zoneout_lstm: plain loops, random masks, lengths, half precision."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import bptoolkit as bp
from bptoolkit.bench import saved_bytes

close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
DOUBLE = torch.float64
KINDS = ("PeepholeLSTM", "LayerNormLSTM", "ZoneoutLSTM")
ALL = {"zoneout": (0.2, 0.4), "recurrent_dropout": 0.3, "variational_dropout": 0.25}
each = pytest.mark.parametrize("kind", KINDS)


def make(kind, *args, dtype=DOUBLE, **kw):
    """A module, every parameter of it random."""
    torch.manual_seed(0)
    module = getattr(bp.nn, kind)(*args, dtype=dtype, **kw)
    for k, p in enumerate(module.parameters()):
        p.data = draw(*p.shape, seed=20 + k, dtype=dtype).detach() * 0.6
    return module


def draw(*shape, seed=1, dtype=DOUBLE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype).requires_grad_()


def orders(out, inputs):
    """Outputs, their gradients, and the gradients of those."""
    y, (h, c) = out
    total = sum((t * draw(*t.shape, seed=9).detach()).sum() for t in (y, h, c))
    first = torch.autograd.grad(total, inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.sin().sum() for g in first), inputs, allow_unused=True, materialize_grads=True)
    return y, h, c, *first, *second


def rows_alone(module, x, hx, lengths):
    """The module in evaluation, a row and a step at a time, with torch.nn.functional's linear and layer_norm."""
    D, H, names = 1 + module.bidirectional, module.hidden_size, dict(module.named_parameters())
    zone_h, zone_c = module.zoneout if isinstance(module.zoneout, tuple) else (module.zoneout,) * 2
    ys, hs, cs = [], [], []
    for b, n in enumerate(lengths):
        seq, ends = list(x[:n, b]), []
        for layer in range(module.num_layers):
            directions = []
            for d in range(D):

                def of(name, at=f"_l{layer}" + "_reverse" * d):
                    return names.get(name + at)

                h, c = (s[layer * D + d, b] for s in hx)
                out = {}
                for t in range(n)[:: -1 if d else 1]:
                    u, v = F.linear(seq[t], of("weight_ih")), F.linear(h, of("weight_hh"))
                    if of("gain_ih") is not None:
                        u = F.layer_norm(u, (4 * H,), of("gain_ih"), of("bias_ih"), module.eps)
                        v = F.layer_norm(v, (4 * H,), of("gain_hh"), of("bias_hh"), module.eps)
                    elif module.bias:
                        u, v = u + of("bias_ih"), v + of("bias_hh")
                    i, f, g, o = (u + v).chunk(4)
                    pi, pf, po = (0, 0, 0) if of("weight_ch") is None else of("weight_ch").chunk(3)
                    new = torch.sigmoid(f + pf * c) * c + torch.sigmoid(i + pi * c) * torch.tanh(g)
                    seen = new if of("gain_c") is None else F.layer_norm(new, (H,), of("gain_c"), of("bias_c"), module.eps)
                    m = torch.sigmoid(o + po * new) * torch.tanh(seen)
                    h, c = zone_h * h + (1 - zone_h) * m, zone_c * c + (1 - zone_c) * new
                    out[t] = h
                directions.append(out)
                ends.append((h, c))
            seq = [torch.cat([out[t] for out in directions]) for t in range(n)]
        past = x.new_zeros(x.shape[0] - n, D * H)
        ys.append(torch.cat([torch.stack(seq), past]) if n else past)
        hs.append(torch.stack([e[0] for e in ends]))
        cs.append(torch.stack([e[1] for e in ends]))
    return torch.stack(ys, 1), (torch.stack(hs, 1), torch.stack(cs, 1))


@each
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kw", "lengths"),
    [({}, (4, 4, 4)), ({"num_layers": 2, "bidirectional": True}, (4, 2, 0)), ({"bidirectional": True}, (1, 4, 3))],
    ids=["plain", "deep", "ragged"],
)
@pytest.mark.parametrize("zoneout", [0.0, (0.3, 0.6)])
def test_as_rows_alone(kind, bias, kw, lengths, zoneout):
    """In first and second order, in evaluation: zoneout is its expectation and dropout is nothing."""
    kw = kw | ALL | {"zoneout": zoneout} | ({"eps": 0.1} if kind == "LayerNormLSTM" and zoneout else {})
    module = make(kind, 3, 5, bias=bias, **kw).eval()
    L = module.num_layers * (1 + module.bidirectional)
    x, hx = draw(4, 3, 3), (draw(L, 3, 5, seed=2), draw(L, 3, 5, seed=3))
    inputs = [x, *hx, *module.parameters()]
    got = orders(module(x, hx, torch.tensor(lengths)), inputs)
    close(got, orders(rows_alone(module, x, hx, lengths), inputs))


@pytest.mark.parametrize("kind", ["PeepholeLSTM", "ZoneoutLSTM"])
@pytest.mark.parametrize("kw", [{}, {"num_layers": 3, "bidirectional": True, "batch_first": True, "dropout": 0.5}])
@pytest.mark.parametrize("bias", [True, False])
def test_without_what_is_special_it_is_torchs_lstm(kind, kw, bias):
    """Its parameters are taken by strict=False; the dropout between layers draws the same; unbatched and packed input too."""
    theirs = nn.LSTM(3, 4, bias=bias, dtype=DOUBLE, **kw)
    ours = getattr(bp.nn, kind)(3, 4, bias=bias, dtype=DOUBLE, **kw)
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("weight_ch") for name in missing)
    for name in missing:
        nn.init.zeros_(ours.get_parameter(name))
    first = "batch_first" in kw
    whole, lengths = draw(*((3, 5) if first else (5, 3)), 3), [5, 2, 4]
    for form, x in (("whole", whole), ("unbatched", draw(5, 3)), ("packed", whole)):
        results = []
        for module in (ours, theirs):
            torch.manual_seed(3)
            packed = form == "packed"
            module.train(not packed)  # torch drops of packed rows what it drops of no others
            fed = pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=False) if packed else x
            y, states = module(fed)
            y = pad_packed_sequence(y, batch_first=first)[0] if packed else y
            parameters = [module.get_parameter(name) for name in theirs.state_dict()]
            results.append((y, states, torch.autograd.grad(y.sin().sum() + states[1].cos().sum(), [x, *parameters])))
        close(*results)


def test_peephole_by_hand():
    """Two steps of one unit, written out with Python's floats."""
    from math import exp, tanh

    def s(a):
        return 1 / (1 + exp(-a))

    wi, wh, b, (pi, pf, po) = (0.5, -0.3, 0.8, 0.2), (0.1, 0.4, -0.6, 0.7), (0.05, 0.1, -0.2, 0.3), (0.9, -0.8, 0.6)
    h = c = 0.0
    for x in (1.5, -0.7):
        i, f, g, o = (p * x + q * h + r for p, q, r in zip(wi, wh, b))
        c = s(f + pf * c) * c + s(i + pi * c) * tanh(g)
        h = s(o + po * c) * tanh(c)
    weights = [torch.tensor(w, dtype=DOUBLE).reshape(shape) for w, shape in ((wi, (4, 1)), (wh, (4, 1)), (b, (4,)))]
    weights += [torch.zeros(4, dtype=DOUBLE), torch.tensor((pi, pf, po), dtype=DOUBLE)]
    y, (hn, cn) = bp.functional.peephole_lstm(torch.tensor([[1.5], [-0.7]], dtype=DOUBLE), None, weights)
    close(torch.stack([y[-1, 0], hn[0, 0], cn[0, 0]]), torch.tensor([h, h, c], dtype=DOUBLE))


# --- the random masks -----------------------------------------------------------------------------------------------------


def seeded(module, *args):
    torch.manual_seed(5)
    return module(*args)


@each
def test_zoneout_in_training_keeps_states_and_has_its_expectation(kind):
    """Of 20000 equal rows the right share keeps each state, h and c apart, and the mean is what evaluation gives."""
    module = make(kind, 3, 4, zoneout=(0.2, 0.6))
    n, (x, h0, c0) = 20000, (draw(*s, seed=k).detach() for k, s in enumerate(((1, 1, 3), (1, 1, 4), (1, 1, 4))))
    hx = (h0.expand(1, n, 4).contiguous(), c0.expand(1, n, 4).contiguous())
    _, new = seeded(module, x.expand(1, n, 3), hx)
    _, want = module.eval()(x, (h0, c0))
    for got, old, mean, p in zip(new, hx, want, (0.2, 0.6)):
        same = (got == old).to(DOUBLE)
        assert ((same.mean(1) - p).abs() < 4 * (p * (1 - p) / n) ** 0.5).all()
        assert ((got.mean(1) - mean[:, 0]).abs() < 4 * got.std(1) / n**0.5).all()
    assert ((new[0] == hx[0]) & (new[1] != hx[1])).any() and ((new[0] != hx[0]) & (new[1] == hx[1])).any()


@each
def test_zoneout_of_1_keeps_everything(kind):
    module = make(kind, 3, 4, zoneout=(1.0, 1.0))
    x, hx = draw(5, 2, 3), (draw(1, 2, 4, seed=2), draw(1, 2, 4, seed=3))
    for mode in (True, False):
        y, states = module.train(mode)(x, hx)
        close(states, hx)
        dx, dh, dc = torch.autograd.grad(y.sum() + states[1].sum(), [x, *hx])
        close((dx, dh, dc), (0 * x, 5 + 0 * dh, 1 + 0 * dc))


@each
def test_recurrent_dropout_has_its_expectation_and_new_masks_at_each_step(kind):
    module = make(kind, 3, 4, recurrent_dropout=0.4)
    n, x = 20000, draw(2, 1, 3).detach()
    _, (_, c) = seeded(module, x[:1].expand(1, n, 3))
    _, (_, want) = module.eval()(x[:1])
    assert ((c.mean(1) - want[:, 0]).abs() < 4 * c.std(1) / n**0.5).all()
    assert (((c == 0).to(DOUBLE).mean(1) - 0.4).abs() < 4 * (0.24 / n) ** 0.5).all()  # c0 is 0, and i g is dropped
    for name, p in module.train().named_parameters():
        if name.startswith(("bias_ih", "bias_hh")):
            p.data[4:8] = -1e4  # f is 0: c is i g alone
    x = draw(6, 50, 3)
    off = torch.stack([seeded(module, x[:t])[1][1][0] for t in range(1, 7)]) == 0
    assert abs(off.double().mean() - 0.4) < 0.06 and (off[1:] != off[:-1]).any(0).double().mean() > 0.8


@each
def test_variational_dropout_takes_the_same_units_at_all_steps(kind):
    module = make(kind, 40, 30, variational_dropout=(0.3, 0.0))
    x = draw(6, 50, 40)
    (dx,) = torch.autograd.grad(seeded(module, x)[0].square().sum(), x)
    off = dx == 0
    assert (off == off[0]).all() and abs(off[0].double().mean() - 0.3) < 0.04
    assert (off[0] != off[0, 0]).any()  # each row has its own
    module = make(kind, 40, 30, variational_dropout=(0.0, 0.3))
    h0 = draw(1, 50, 30)
    y, _ = seeded(module, x[:1], (h0, torch.zeros_like(h0)))
    (dh,) = torch.autograd.grad(y.square().sum(), h0)
    assert abs((dh == 0).double().mean() - 0.3) < 0.04


@each
def test_masks_come_again(kind):
    """In a second backward, a checkpoint and a copy; another seed gives others; nothing but the seed is kept for them."""
    module = make(kind, 3, 4, num_layers=2, bidirectional=True, **ALL)
    x = draw(5, 2, 3)
    y, _ = seeded(module, x)
    first = torch.autograd.grad(y.sum(), module.parameters(), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(y.sum(), module.parameters())))
    again, _ = seeded(lambda x: checkpoint(module, x, use_reentrant=False), x)
    close((again, torch.autograd.grad(again.sum(), module.parameters())), (y, first))
    close(seeded(copy.deepcopy(module), x)[0], y)
    torch.manual_seed(6)
    assert (module(x)[0] - y).abs().max() > 0.01
    assert (module.eval()(x)[0] - y).abs().max() > 0.01
    kept = saved_bytes(lambda: module.train()(x))
    assert kept - saved_bytes(lambda: module.eval()(x)) <= 4 * 16  # four seeds


@each
def test_saved_bytes(kind):
    """The input, the outputs, the cells and the weights; nothing of the gates."""
    module = make(kind, 64, 64, dtype=torch.float32, **ALL)
    x = torch.randn(50, 16, 64, requires_grad=True)
    weights = sum(p.numel() for p in module.parameters()) * 4
    assert saved_bytes(lambda: module(x)) <= 3 * 4 * x.numel() + weights + 4 * 16 * 64 * 4


@each
def test_vmap_draws_the_same_or_others(kind):
    module = make(kind, 3, 4, **ALL)
    xs = draw(3, 5, 2, 3).detach()
    xs[1] = xs[0]

    def loss(x):
        return module(x)[0].sin().sum()

    same = seeded(lambda: vmap(grad(loss), randomness="same")(xs))
    close(same, torch.stack([seeded(lambda x: grad(loss)(x), x) for x in xs]))
    different = seeded(lambda: vmap(grad(loss), randomness="different")(xs))
    assert (different[0] - different[1]).abs().max() > 0.01
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(loss)(xs)


def test_compiles_whole():
    module = make("LayerNormLSTM", 3, 4, dtype=torch.float32, zoneout=0.2).eval()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = draw(5, 2, 3, dtype=torch.float32)
    results = []
    for m in (module, compiled):
        y, states = m(x)
        results.append((y, states, torch.autograd.grad(y.sum() + states[1].sum(), [x, *module.parameters()])))
    torch.testing.assert_close(*results)
    y, _ = torch.compile(module.train(), fullgraph=True, backend="aot_eager")(x)
    y.sum().backward()
    assert x.grad.isfinite().all() and (y - compiled(x)[0]).any()


# --- lengths, special values, half precision, modules -------------------------------------------------------------------------


@each
@pytest.mark.parametrize("training", [True, False])
def test_what_lies_past_a_length_is_never_read(kind, training):
    """NaN in the padding, of the input and of the cotangent, changes nothing, in first and second order."""
    module = make(kind, 3, 4, bidirectional=True, **ALL).train(training)
    lengths = torch.tensor([2, 4, 0])
    past = (torch.arange(4)[:, None] >= lengths)[..., None]
    results = []
    for garbage in (0.0, float("nan")):
        x = draw(4, 3, 3).detach().masked_fill(past, garbage).requires_grad_()
        y, states = seeded(module, x, None, lengths)
        assert not y.masked_select(past).any()
        g = torch.ones_like(y).masked_fill(past, garbage)
        first = torch.autograd.grad(y, [x, *module.parameters()], g, create_graph=True)
        second = torch.autograd.grad(sum(t.square().sum() for t in first), [x, *module.parameters()])
        results.append((y, *states, *first, *second))
    close(*results)
    assert all(t.isfinite().all() for t in results[1])


@each
def test_special_values_stay_in_their_row(kind):
    module = make(kind, 3, 4, bidirectional=True, **ALL)
    x = draw(4, 3, 3).detach()
    bad = x.clone()
    bad[1, 0, 0], bad[2, 1, 1] = float("nan"), 1e200 if kind != "LayerNormLSTM" else 1e100
    results = []
    for t in (x, bad):
        t = t.clone().requires_grad_()
        y, _ = seeded(module, t)
        results.append((y, *torch.autograd.grad(y[:, 1:].sum(), t)))
    (y, dx), (yb, dxb) = results
    close((y[:, 2], dx[:, 2]), (yb[:, 2], dxb[:, 2]))
    assert yb[:, 0].isnan().any() and yb[:, 1].isfinite().all() and dxb[:, 1].isfinite().all()


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kind, dtype):
    """As exact as its rounding: half against the same numbers in double."""
    half = make(kind, 6, 8, dtype=dtype, bidirectional=True, **ALL)
    double = copy.deepcopy(half).double()
    x = draw(7, 4, 6, dtype=dtype)
    results = []
    for module, t in ((half, x), (double, x.detach().double().requires_grad_())):
        y, _ = seeded(module, t)
        assert y.dtype == t.dtype
        results.append((y, *torch.autograd.grad(y.sum(), [t, *module.parameters()])))
    for a, b in zip(*results):
        assert (a - b).norm() / b.norm() < (0.04 if dtype == torch.bfloat16 else 0.006)


@each
def test_autocast_computes_in_its_dtype(kind):
    module, x = make(kind, 3, 4, dtype=torch.float32, **ALL), draw(5, 2, 3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, (h, c) = seeded(module, x)
    assert {y.dtype, h.dtype, c.dtype} == {torch.bfloat16}
    torch.testing.assert_close(y.float(), seeded(module, x)[0], rtol=0.1, atol=0.05)
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


@each
def test_modules(kind):
    """Names, initial values, what is printed, pickles, class of bptoolkit for swap."""
    torch.manual_seed(0)
    module = getattr(bp.nn, kind)(3, 4, 2, bidirectional=True, zoneout=0.1, dropout=0.2)
    more = {"PeepholeLSTM": ["weight_ch"], "LayerNormLSTM": ["gain_ih", "gain_hh", "gain_c", "bias_c"], "ZoneoutLSTM": []}[kind]
    plain = list(nn.LSTM(3, 4, 2, bidirectional=True).state_dict())
    assert set(module.state_dict()) == {*plain, *(n.replace("weight_ih", m) for n in plain for m in more if "weight_ih" in n)}
    assert all((p == 1).all() for n, p in module.named_parameters() if n.startswith("gain"))
    assert all(p.unique().numel() > 1 for n, p in module.named_parameters() if n.startswith(("weight", "bias_ih", "bias_hh")))
    assert repr(module) == f"{kind}(3, 4, num_layers=2, dropout=0.2, bidirectional=True, zoneout=0.1)"
    torch.save(module.eval(), file := io.BytesIO())
    x = torch.randn(5, 2, 3)
    close(torch.load(io.BytesIO(file.getvalue()), weights_only=False)(x), module(x))
    assert not bp.swap(module).swapped
    assert module(x[:, :0])[0].shape == (5, 0, 8)


def test_errors():
    x, weights = draw(4, 2, 3), list(bp.nn.PeepholeLSTM(3, 5, dtype=DOUBLE).parameters())
    peephole, norm = bp.functional.peephole_lstm, bp.functional.layer_norm_lstm
    with pytest.raises(
        ValueError, match=r"peephole_lstm: weights has 4 tensors; 1 layers in 1 directions, with weight_ih, .*ch each"
    ):
        peephole(x, None, weights[:4])
    with pytest.raises(ValueError, match=r"peephole_lstm: weight_ch_l0 has shape \(5,\); it needs \(15,\)"):
        peephole(x, None, [*weights[:4], draw(5)])
    with pytest.raises(TypeError, match=r"weight_ch_l0 is torch.float32 but input is torch.float64"):
        peephole(x, None, [*weights[:4], weights[4].float()])
    with pytest.raises(ValueError, match=r"layer_norm_lstm: gain_c_l0 has shape \(20,\); it needs \(5,\)"):
        norm(x, None, [*weights[:4], *(draw(20) for _ in range(4))])
    with pytest.raises(ValueError, match=r"peephole_lstm: zoneout=1.5; a probability"):
        peephole(x, None, weights, zoneout=1.5)
    with pytest.raises(ValueError, match=r"peephole_lstm: variational_dropout=\(0.1,\); it must be one"):
        peephole(x, None, weights, variational_dropout=(0.1,))
    with pytest.raises(ValueError, match=r"peephole_lstm: h_0 has shape \(1, 3, 5\)"):
        peephole(x, (draw(1, 3, 5), draw(1, 2, 5)), weights)
    with pytest.raises(ValueError, match="LayerNormLSTM: zoneout=-1"):
        bp.nn.LayerNormLSTM(3, 4, zoneout=-1)
