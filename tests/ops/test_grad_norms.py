"""lstm, gru and rnn: the norms of gradients through time, beside autograd of a plain loop."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch

import bptoolkit as bp
from bptoolkit.ops.bptt import factors

GATES = {"lstm": 4, "gru": 3, "rnn": 1}
T, B, I, H = 7, 3, 2, 4
each = pytest.mark.parametrize("name", GATES)
MODULES = {"lstm": bp.nn.LSTM, "gru": bp.nn.GRU, "rnn": bp.nn.RNN}


def arguments(name, L=1, D=1, T=T, dtype=torch.float64, proj=0):
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    P = proj or H
    hx = (draw(L * D, B, P), draw(L * D, B, H)) if name == "lstm" else draw(L * D, B, H)
    weights = []
    for k in range(L * D):
        n = GATES[name] * H
        weights += [draw(n, I if k < D else D * P), draw(n, P), draw(n), draw(n), *([draw(P, H)] if proj else [])]
    return draw(T, B, I), hx, weights


def flat(*args):
    return [t for a in args for t in (flat(*a) if isinstance(a, (tuple, list)) else [a])]


def loss(y, last):
    return sum((t * torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in flat(y, last))


def step(name, x, states, ws, cut=False):
    a = x @ ws[0].mT + ws[2]
    h = states[0]
    u = (h.detach() if cut else h) @ ws[1].mT + ws[3]
    if name == "rnn":
        return ((a + u).tanh(),)
    if name == "gru":
        (ar, az, an), (ur, uz, un) = a.chunk(3, -1), u.chunk(3, -1)
        z = (az + uz).sigmoid()
        return ((1 - z) * (an + (ar + ur).sigmoid() * un).tanh() + z * h,)
    i, f, g, o = (a + u).chunk(4, -1)
    c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
    m = o.sigmoid() * c.tanh()
    return (m @ ws[4].mT if len(ws) > 4 else m), c


def wanted(name, args, lengths=None, reverse=False, resets=None, cut=False, xi=None):
    """Of one layer in one direction, by autograd of a plain loop."""
    x, hx, ws = args
    states = [s[0] for s in flat(hx)]
    begun, ys, on = [None] * T, [None] * T, [None] * T
    order = range(T)[::-1] if reverse else range(T)
    for t in order:
        if resets is not None:
            there = resets[t + 1] if reverse and t + 1 < T else resets[t] if not reverse else torch.zeros(B, dtype=torch.bool)
            there = there if lengths is None else there & (t + reverse < lengths)
            states = [torch.where(there[:, None], 0, s) for s in states]
            on[t] = ~there
        begun[t] = [s * 1 for s in states]
        take = torch.ones(B, 1, dtype=torch.bool) if lengths is None else (t < lengths)[:, None]
        on[t] = take[:, 0] if on[t] is None else on[t] & take[:, 0]
        from_ = begun[t] if xi is None else [s + (xi[t] - 1) * (s - s.detach()) for s in begun[t]]
        new = step(name, x[t], from_, ws, cut)
        ys[t] = torch.where(take, new[0], 0)
        states = [torch.where(take, n, s) for n, s in zip(new, begun[t])]
    value = loss(torch.stack(ys), [s.unsqueeze(0) for s in states])
    norms = []
    for t in range(T):
        parts = torch.autograd.grad(value, begun[t], retain_graph=True, allow_unused=True, materialize_grads=True)
        norms.append(sum((p[on[t]] ** 2).sum() for p in parts).sqrt())
    return torch.stack(norms)


def recorded(name, args, **options):
    """What backward hands over: {layer and direction: norms}; and the gradients."""
    seen = {}
    x, hx, ws = args
    out = bp.OPS[name].call(x, hx, ws, grad_norms=seen.__setitem__, **options)
    assert not seen
    return seen, torch.autograd.grad(loss(*out), flat(*args))


WAYS = [
    *({"save": save} for save in ("gates", "outputs", "sparse", "segments", 3000)),
    {"save": "outputs", "truncate": (T, T)},
    {"save": "segments", "truncate": bp.ARTBP(0.0)},
]


@each
@pytest.mark.parametrize("lengths", [None, [5, 0, 7]], ids=["full", "ragged"])
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_beside_a_plain_loop(name, options, lengths):
    lengths = None if lengths is None else torch.tensor(lengths)
    args = arguments(name)
    seen, grads = recorded(name, args, lengths=lengths, **options)
    torch.testing.assert_close(seen[0], wanted(name, args, lengths))
    plain = torch.autograd.grad(loss(*bp.OPS[name].call(*args, lengths=lengths, **options)), flat(*args))
    assert all(torch.equal(a, b) for a, b in zip(grads, plain))


@each
@pytest.mark.parametrize("save", ["gates", "segments"])
def test_directions_and_layers(name, save):
    """Each direction of the last layer as if it were alone, its input being what it is."""
    lengths = torch.tensor([5, 1, 7])
    args = arguments(name, L=2, D=2)
    seen, _ = recorded(name, args, num_layers=2, bidirectional=True, lengths=lengths, save=save)
    assert sorted(seen) == [0, 1, 2, 3] and all(n.shape == (T,) and n.dtype == torch.float64 for n in seen.values())
    x, hx, ws = args
    first = [h[:2] for h in hx] if name == "lstm" else hx[:2]
    middle = bp.OPS[name].call(x, first, ws[:8], bidirectional=True, lengths=lengths)[0].detach()

    def value(d):
        state = tuple(h[2 + d : 3 + d] for h in hx) if name == "lstm" else hx[2 + d : 3 + d]
        return middle, state, ws[4 * (2 + d) : 4 * (3 + d)]

    y, last = bp.OPS[name].call(*args, num_layers=2, bidirectional=True, lengths=lengths)
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)
    ends = [torch.linspace(0.5, 1.5, s.numel(), dtype=s.dtype).view_as(s) for s in flat(last)]
    for d in (0, 1):
        x_, state, w = value(d)
        got = {}
        if d == 0:
            out = bp.OPS[name].call(x_, state, w, lengths=lengths, grad_norms=got.__setitem__)
        else:  # a reverse direction is the second of two; the first gets no gradient of this loss
            both = [s.repeat(2, 1, 1) for s in flat(state)]
            both = tuple(both) if name == "lstm" else both[0]
            out = bp.OPS[name].call(x_, both, [*w, *w], bidirectional=True, lengths=lengths, grad_norms=got.__setitem__)
            out = (out[0][..., H:], [s[1:] for s in flat(out[1])])
        mine = (out[0] * weights[..., d * H : (d + 1) * H]).sum()
        mine = mine + sum((s * e[2 + d : 3 + d]).sum() for s, e in zip(flat(out[1]), ends))
        torch.autograd.grad(mine, flat(state), allow_unused=True)
        torch.testing.assert_close(seen[2 + d], got[d])


@each
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_resets(name, reverse, ragged):
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[0, 0] = resets[3, 0] = resets[2, 1] = resets[3, 1] = resets[6, 1] = True
    lengths = torch.tensor([7, 5, 3]) if ragged else None
    x, hx, ws = arguments(name)
    if not reverse:
        seen, _ = recorded(name, (x, hx, ws), resets=resets, lengths=lengths)
        torch.testing.assert_close(seen[0], wanted(name, (x, hx, ws), lengths, resets=resets))
        return
    both = tuple(torch.cat([h, h]) for h in hx) if name == "lstm" else torch.cat([hx, hx])
    seen = {}
    y, last = bp.OPS[name].call(
        x, both, [*ws, *ws], bidirectional=True, resets=resets, lengths=lengths, grad_norms=seen.__setitem__
    )
    torch.autograd.grad(loss(y[..., H:], [s[1:] for s in flat(last)]), x)
    torch.testing.assert_close(seen[1], wanted(name, (x, hx, ws), lengths, True, resets))


@each
def test_truncated(name):
    """The newest steps of a window have the norms of a sequence that begins where it begins."""
    args = arguments(name)
    seen, _ = recorded(name, args, truncate=(2, 4), save="outputs")
    again, _ = recorded(name, args, truncate=(2, 4), save="segments")
    torch.testing.assert_close(seen[0], again[0])
    x, hx, ws = args
    y, _ = bp.OPS[name].call(x, hx, ws)
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)
    got = {}
    out = bp.OPS[name].call(x[:4], hx, ws, grad_norms=got.__setitem__)[0]  # the window of steps 2 and 3 begins at 0
    torch.autograd.grad((out[2:] * weights[2:4]).sum(), x)
    torch.testing.assert_close(seen[0][2:4], got[0][2:])
    whole, _ = recorded(name, args)
    assert float((whole[0][:5] - seen[0][:5]).abs().min()) > 1e-6


@each
def test_eprop(name):
    """What is cut is not sent: of a simple recurrence all of it."""
    args = arguments(name)
    seen, _ = recorded(name, args, truncate="eprop")
    torch.testing.assert_close(seen[0], wanted(name, args, cut=True))
    assert (seen[0] == 0).all() if name == "rnn" else (seen[0] > 0).all()


@each
@pytest.mark.parametrize("lengths", [None, [5, 0, 7]], ids=["full", "ragged"])
def test_artbp(name, lengths):
    """What is sent is multiplied by the factor of the way back."""
    args, lengths = arguments(name), None if lengths is None else torch.tensor(lengths)
    seed = torch.tensor([3, 4], dtype=torch.int32)
    xi = factors(seed, 0.4, T, B, lengths, False, torch.float64)
    assert {0.0, 1.0} < {float(f) for f in xi.unique()}
    for save in ("outputs", "segments"):
        seen, _ = recorded(name, args, truncate=bp.ARTBP(0.4, seed), save=save, lengths=lengths)
        torch.testing.assert_close(seen[0], wanted(name, args, lengths, xi=xi))


def test_projected():
    args = arguments("lstm", proj=3)
    for save in ("gates", "outputs", "segments"):
        seen, _ = recorded("lstm", args, proj_size=3, save=save)
        torch.testing.assert_close(seen[0], wanted("lstm", args))


@each
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_neither_overflow_nor_underflow(name, scale):
    """Gradients of 1e-30 in float32, whose squares float32 does not hold."""
    args, found = arguments(name, dtype=torch.float32), []
    for s in (1.0, scale):
        seen = {}
        y = bp.OPS[name].call(*args, grad_norms=seen.__setitem__)[0]
        (y.sum() * s).backward()
        found.append(seen[0] / s)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=0)


@each
def test_under_vmap(name):
    """Of all samples together, be their weights shared or not."""
    x, hx, ws = (t.detach() if isinstance(t, torch.Tensor) else [s.detach() for s in t] for t in arguments(name))
    hx = tuple(hx) if name == "lstm" else hx
    xs, few = torch.stack([x, 2 * x]), {}

    def grad(x, w, out=few):
        def value(x, w):
            return loss(*bp.OPS[name].call(x, hx, [ws[0], w, *ws[2:]], grad_norms=out.__setitem__))

        return torch.func.grad(value)(x, w)

    singly = []
    for k, x in enumerate(xs):
        one = {}
        grad(x, ws[1] * (1 + k), one)
        singly.append(one[0])
    torch.func.vmap(grad)(xs, torch.stack([ws[1], 2 * ws[1]]))
    torch.testing.assert_close(few[0], torch.stack(singly).square().sum(0).sqrt())
    one, two = {}, {}
    grad(xs[0], ws[1], one)
    grad(xs[1], ws[1], two)
    torch.func.vmap(grad, (0, None))(xs, ws[1])
    torch.testing.assert_close(few[0], (one[0] ** 2 + two[0] ** 2).sqrt())


@each
@pytest.mark.parametrize("save", ["gates", "outputs", "segments"])
def test_forward_mode_is_no_backward(name, save):
    """It runs backward's operators, but there is no loss whose gradient they would send."""
    x, hx, ws = arguments(name)
    seen = []

    def value(x):
        y = bp.OPS[name].call(x, hx, ws, save=save, grad_norms=lambda k, norms: seen.append(norms))[0]
        return (y * y).sum()

    torch.func.jvp(value, (x,), (x,))
    assert not seen
    torch.func.grad(value)(x)
    torch.func.jvp(torch.func.grad(value), (x,), (x,))
    assert len(seen) == 2
    torch.testing.assert_close(*seen)


@each
def test_second_order_is_as_without(name):
    args = arguments(name)
    found = []
    for fn in (None, lambda k, norms: None):
        grads = torch.autograd.grad(loss(*bp.OPS[name].call(*args, grad_norms=fn)), flat(*args), create_graph=True)
        found.append(torch.autograd.grad(sum((g * g).sum() for g in grads), flat(*args)))
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize(("name", "compiled"), [("lstm", False), ("gru", False), ("rnn", False), ("gru", True)])
def test_module(name, compiled):
    torch.manual_seed(0)
    layer = MODULES[name](I, H, num_layers=2, bidirectional=True)
    x = torch.randn(T, B, I)
    assert layer.grad_norms is None
    layer.keep_grad_norms()
    assert layer.grad_norms is None and "kept" not in str(layer.state_dict().keys())
    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    seen = {}
    options = {"num_layers": 2, "bidirectional": True}
    bp.OPS[name].call(x, None, list(layer.parameters()), grad_norms=seen.__setitem__, **options)[0].sum().backward()
    want = torch.stack([seen[k] for k in range(4)])
    run(x)[0].sum().backward()
    torch.testing.assert_close(layer.grad_norms, want)
    run(2 * x[:4])[0].sum().backward()
    assert layer.grad_norms.shape == (4, 4) and layer.grad_norms.isfinite().all()
    torch.autograd.grad(run(x)[0].sum(), [layer.weight_hh_l1])
    assert layer.grad_norms.shape[1] == T and layer.grad_norms[2].isfinite().all()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.grad_norms is None
        other(x)[0].sum().backward()
        torch.testing.assert_close(other.grad_norms, want)
    layer.keep_grad_norms(False)
    assert layer.grad_norms is None
    run(x)[0].sum().backward()
    assert layer.grad_norms is None


def test_a_layer_without_gradient_has_none():
    layer = bp.nn.LSTM(I, H, num_layers=2)
    layer.keep_grad_norms()
    for p in (layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0):
        p.requires_grad_(False)
    layer(torch.randn(T, B, I))[0].sum().backward()
    assert layer.grad_norms[0].isnan().all() and layer.grad_norms[1].isfinite().all()


@each
def test_packed(name):
    args, lengths = arguments(name), torch.tensor([5, 2, 7])
    x, hx, ws = args
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    seen, like = {}, {}
    y, _ = bp.OPS[name].call(packed, hx, ws, grad_norms=seen.__setitem__)
    y.data.sum().backward()
    bp.OPS[name].call(x, hx, ws, lengths=lengths, grad_norms=like.__setitem__)[0].sum().backward()
    torch.testing.assert_close(seen[0], like[0])


def test_let_go_with_the_graph():
    class Norms(dict):
        pass

    seen, (x, hx, ws) = Norms(), arguments("gru")
    there = weakref.ref(seen)
    y = bp.OPS["gru"].call(x, hx, ws, grad_norms=seen.__setitem__)[0]
    del seen
    gc.collect()
    assert there() is not None
    y.sum().backward()
    assert there()[0].shape == (T,)
    del y
    gc.collect()
    assert there() is None


@each
def test_errors(name):
    x, hx, ws = arguments(name)
    with pytest.raises(TypeError, match=rf"{name}: grad_norms=3 must be a function of \(k, norms\), or None"):
        bp.OPS[name].call(x, hx, ws, grad_norms=3)
    with pytest.raises(Exception, match=f"{name}: a graph calls no function of yours"):
        torch.compile(lambda x: bp.OPS[name].call(x, hx, ws, grad_norms=print)[0], backend="eager", fullgraph=True)(x)
