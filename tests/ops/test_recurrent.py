"""What is special to lstm, gru and rnn: torch's modules, packed sequences, lengths, saving, forward mode, vmap, autocast."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import bptoolkit as bp
from bptoolkit.bench import saved_bytes

close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
close32 = functools.partial(torch.testing.assert_close, rtol=2e-4, atol=2e-5)
KINDS = ("LSTM", "GRU", "RNN")
each = pytest.mark.parametrize("kind", KINDS)
DOUBLE = torch.float64


def pair(kind, *args, dtype=DOUBLE, save=None, **kw):
    """Torch's module and ours, with the same parameters."""
    torch.manual_seed(0)
    theirs = getattr(nn, kind)(*args, dtype=dtype, **kw)
    ours = getattr(bp.nn, kind)(*args, dtype=dtype, **kw)
    ours.load_state_dict(theirs.state_dict())
    if save is not None:
        ours.save = save
    return ours, theirs


def draw(*shape, seed=1, dtype=DOUBLE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype).requires_grad_()


def flat(out):
    return [t for o in out for t in (o if isinstance(o, tuple) else (o,)) if t is not None and t.is_floating_point()]


def everything(module, *inputs, seed=3):
    """Outputs, and the gradients of inputs and parameters for random cotangents."""
    out = flat(module(*inputs))
    xs = [t for i in inputs for t in (i if isinstance(i, tuple) else (i,)) if isinstance(t, torch.Tensor) and t.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=DOUBLE).to(o) for o in out]
    return out, torch.autograd.grad(out, [*xs, *module.parameters()], cotangents)


CONFIGS = {
    "plain": {},
    "layers": {"num_layers": 3},
    "bidirectional": {"bidirectional": True, "num_layers": 2},
    "batch_first": {"batch_first": True},
    "no bias": {"bias": False, "bidirectional": True},
    "dropout": {"num_layers": 3, "dropout": 0.5},
    "relu": {"nonlinearity": "relu", "num_layers": 2},
    "projected": {"proj_size": 2, "num_layers": 2, "bidirectional": True},
    "projected, no bias": {"proj_size": 3, "bias": False},
}
ONLY = {"nonlinearity": "RNN", "proj_size": "LSTM"}
CASES = [(k, c) for k in KINDS for c, kw in CONFIGS.items() if all(ONLY.get(option, k) == k for option in kw)]


@pytest.mark.parametrize(("kind", "config"), CASES)
@pytest.mark.parametrize("save", ["gates", "outputs"])
@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_as_torchs_module(kind, config, save, initial, batched):
    kw = CONFIGS[config]
    ours, theirs = pair(kind, 3, 4, save=save, **kw)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    B = (2,) if batched else ()
    lead = (*B, 5) if kw.get("batch_first") else (5, *B)
    L = kw.get("num_layers", 1) * (1 + kw.get("bidirectional", False))
    hx = (draw(L, *B, kw.get("proj_size", 4), seed=5), draw(L, *B, 4, seed=6))
    args = (draw(*lead, 3), *([hx if kind == "LSTM" else hx[0]] if initial else []))
    results = []
    for module in (ours, theirs):
        torch.manual_seed(7)  # of the dropout between layers
        results.append(everything(module, *args))
    close(*results)
    ours.eval(), theirs.eval()
    close(everything(ours, *args), everything(theirs, *args))


def test_lstm_by_hand():
    """Two steps of one cell, written out with Python's floats."""
    from math import exp, tanh

    def s(a):
        return 1 / (1 + exp(-a))

    wi, wh, b = (0.5, -0.3, 0.8, 0.2), (0.1, 0.4, -0.6, 0.7), (0.05, 0.1, -0.2, 0.3)
    h = c = 0.0
    for x in (1.5, -0.7):
        i, f, g, o = (p * x + q * h + r for p, q, r in zip(wi, wh, b))
        c = s(f) * c + s(i) * tanh(g)
        h = s(o) * tanh(c)
    weights = [torch.tensor(w, dtype=DOUBLE).reshape(shape) for w, shape in ((wi, (4, 1)), (wh, (4, 1)), (b, (4,)))]
    x = torch.tensor([[1.5], [-0.7]], dtype=DOUBLE)
    y, (hn, cn) = bp.functional.lstm(x, None, [*weights, torch.zeros(4, dtype=DOUBLE)])
    close(torch.stack([y[-1, 0], hn[0, 0], cn[0, 0]]), torch.tensor([h, h, c], dtype=DOUBLE))


@each
@pytest.mark.parametrize("kw", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=["plain", "deep"])
@pytest.mark.parametrize("lengths", [(5, 3, 1), (2, 5, 4)], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("initial", [True, False])
def test_packed_and_lengths(kind, kw, lengths, initial):
    """A packed sequence gives what torch's module gives; lengths= gives the same, padded with zeros."""
    ours, theirs = pair(kind, 3, 4, **kw)
    first = kw.get("batch_first", False)
    x = draw(*((3, 5) if first else (5, 3)), 3)
    L = 4 if kw else 1
    hx = tuple(draw(L, 3, 4, seed=s) for s in (5, 6))
    hx = ((hx if kind == "LSTM" else hx[0]),) if initial else ()
    in_order = list(lengths) == sorted(lengths, reverse=True)
    wanted = [*[t for h in hx for t in (h if isinstance(h, tuple) else (h,))]]

    def run(module, pack):
        if pack:
            packed = pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=in_order)
            y, states = module(packed, *hx)
            assert isinstance(y, PackedSequence)
            y, n = pad_packed_sequence(y, batch_first=first, total_length=5)
            assert n.tolist() == list(lengths)
        else:
            y, states = module(x, *(hx or (None,)), torch.tensor(lengths))
        out = flat((y, states))
        cotangents = [torch.randn(o.shape, generator=torch.Generator().manual_seed(8), dtype=DOUBLE) for o in out]
        return out, torch.autograd.grad(out, [x, *wanted, *module.parameters()], cotangents)

    want = run(theirs, True)
    close(run(ours, True), want)
    close(run(ours, False), want)


@each
@pytest.mark.parametrize("save", ["gates", "outputs"])
def test_what_lies_past_a_length_is_never_read(kind, save):
    """NaN in the padding, of the input and of the cotangent, changes nothing, in first and second order."""
    ours, _ = pair(kind, 3, 4, bidirectional=True, save=save)
    lengths = torch.tensor([2, 4, 0])
    past = torch.arange(4)[:, None] >= lengths
    results = []
    for garbage in (0.0, float("nan")):
        x = draw(4, 3, 3).detach().masked_fill(past[..., None], garbage).requires_grad_()
        y, states = ours(x, None, lengths)
        assert not y[past].any()
        g = torch.ones_like(y).masked_fill(past[..., None], garbage)
        first = torch.autograd.grad(y, [x, *ours.parameters()], g, create_graph=True)
        second = torch.autograd.grad(sum(t.square().sum() for t in first), [x, *ours.parameters()])
        results.append((y, *flat((states,)), *first, *second))
    close(*results)
    assert all(t.isfinite().all() for t in results[1])


@each
def test_an_empty_row_keeps_its_initial_state(kind):
    ours, _ = pair(kind, 3, 4, num_layers=2, bidirectional=True)
    hx = tuple(draw(4, 2, 4, seed=s) for s in (5, 6))
    y, states = ours(draw(3, 2, 3), hx if kind == "LSTM" else hx[0], torch.tensor([0, 3]))
    for h, h0 in zip(flat((states,)), hx):
        close(h[:, 0], h0[:, 0])
    assert not y[:, 0].any()


# --- what is saved --------------------------------------------------------------------------------------------------------


def test_saved_bytes():
    """lstm keeps at most 45 % of what nn.LSTM keeps, 30 % with save="outputs"."""
    x = torch.randn(128, 32, 256, requires_grad=True)
    _, theirs = pair("LSTM", 256, 256, dtype=torch.float32)
    base = saved_bytes(lambda: theirs(x))
    for save, share in (("gates", 0.45), ("outputs", 0.30)):
        ours, _ = pair("LSTM", 256, 256, dtype=torch.float32, save=save)
        assert saved_bytes(lambda ours=ours: ours(x)) <= share * base


def storages(fn):
    seen = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.add(t.untyped_storage().data_ptr()), t)[1], lambda t: t):
        out = fn()
    return seen, out


@each
def test_only_what_is_needed_is_saved(kind):
    """With frozen input weights the input is not kept; without gradients nothing is."""
    ours, _ = pair(kind, 3, 4)
    x = draw(5, 2, 3).detach()
    seen, _ = storages(lambda: ours(x))
    assert x.untyped_storage().data_ptr() in seen
    ours.weight_ih_l0.requires_grad_(False)
    seen, out = storages(lambda: ours(x))
    assert seen and x.untyped_storage().data_ptr() not in seen
    flat(out)[0].sum().backward()
    assert ours.weight_ih_l0.grad is None and ours.weight_hh_l0.grad is not None
    ours.requires_grad_(False)
    assert not storages(lambda: ours(x))[0]


@each
def test_backward_twice_and_states_written_over(kind):
    ours, _ = pair(kind, 3, 4, num_layers=2)
    y, states = ours(draw(5, 2, 3))
    for h in flat((states,)):
        h.data.zero_()  # a view of what is saved would be spoilt
    first = torch.autograd.grad(y.sum(), ours.parameters(), retain_graph=True)
    second = torch.autograd.grad(y.sum(), ours.parameters())
    assert all(torch.equal(a, b) for a, b in zip(first, second))


# --- what torch's modules cannot do ----------------------------------------------------------------------------------------


@each
def test_forward_mode_in_float32(kind):
    ours, _ = pair(kind, 3, 4, num_layers=2, bidirectional=True, dtype=torch.float32)
    x, v = draw(5, 2, 3, dtype=torch.float32).detach(), torch.randn(5, 2, 3)
    pushed = jvp(lambda x: ours(x)[0], (x,), (v,))[1]
    pulled = torch.autograd.functional.vjp(lambda x: ours(x)[0], x, pushed)[1]
    close32((pushed * pushed).sum(), (pulled * v).sum())


@each
def test_vmap_over_models_and_samples(kind):
    """An ensemble, per-sample gradients, and lengths that differ per sample."""
    models = [pair(kind, 3, 4)[0] for _ in range(3)]
    for k, m in enumerate(models):
        for p in m.parameters():
            p.data.mul_(1 + k)
    params, buffers = stack_module_state(models)
    x, lengths = draw(5, 2, 3).detach(), torch.tensor([[5, 2], [1, 4]])

    def call(p, x, n):
        return functional_call(models[0], (p, buffers), (x, None, n))[0]

    close(
        vmap(call, (0, None, None))(params, x, lengths[0]),
        torch.stack([m(x, None, lengths[0])[0] for m in models]),
    )
    one = dict(models[0].named_parameters())
    close(vmap(call, (None, None, 0))(one, x, lengths), torch.stack([call(one, x, n) for n in lengths]))

    def loss(p, x, n):
        return call(p, x, n).sin().sum()

    xs = torch.stack([x, x.cos()])
    each_one = vmap(grad(loss), (None, 0, 0))(one, xs, lengths)
    loop = [grad(loss)(one, a, n) for a, n in zip(xs, lengths)]
    close(each_one, {k: torch.stack([g[k] for g in loop]) for k in one})


# --- swapping, autocast, odd sizes -----------------------------------------------------------------------------------------


@each
def test_class_reassignment_copies_and_pickles(kind):
    _, theirs = pair(kind, 3, 4, num_layers=2)
    x = draw(5, 2, 3)
    want = everything(theirs, x)
    theirs.__class__ = getattr(bp.nn, kind)
    close(everything(theirs, x), want)
    torch.save(theirs, file := io.BytesIO())
    for other in (copy.deepcopy(theirs), torch.load(io.BytesIO(file.getvalue()), weights_only=False)):
        close(everything(other, x), want)
    torch.nn.utils.parametrizations.weight_norm(theirs, "weight_hh_l0")
    x.grad = None
    theirs(x)[0].sum().backward()
    assert theirs.parametrizations.weight_hh_l0.original0.grad.any()


@each
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("wide_hx", [False, True])
def test_autocast_gives_torchs_dtypes(kind, packed, wide_hx):
    for kw in ({}, {"proj_size": 2}) if kind == "LSTM" else ({},):
        ours, theirs = pair(kind, 3, 4, dtype=torch.float32, **kw)
        hx = (torch.ones(1, 2, kw.get("proj_size", 4)), torch.ones(1, 2, 4))
        for dtype in (torch.float32, torch.bfloat16):
            x = draw(5, 2, 3, dtype=dtype)
            args = (pack_padded_sequence(x, [5, 3]) if packed else x,)
            args += ((hx if kind == "LSTM" else hx[0]),) if wide_hx else ()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                got, want = (flat((m(*args)[0][0] if packed else m(*args)[0], m(*args)[1])) for m in (ours, theirs))
            torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
            sum(t.sum() for t in got).backward()
            assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


@each
def test_sizes_of_zero_and_one(kind):
    ours, theirs = pair(kind, 3, 4, num_layers=2, bidirectional=True)
    for shape in ((5, 0, 3), (1, 2, 3), (1, 1, 3)):
        close(everything(ours, draw(*shape)), everything(theirs, draw(*shape)))
    assert ours(draw(5, 0, 3), None, torch.zeros(0, dtype=torch.int64))[0].shape == (5, 0, 8)
    with pytest.raises(ValueError, match="Expected sequence length to be larger than 0 in RNN"):
        ours(draw(0, 2, 3))
