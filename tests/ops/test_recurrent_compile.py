"""lstm, gru and rnn as one node of a compiled graph; their loops in place against the readable ones; what they refuse."""

from __future__ import annotations

import functools
import re

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence

import bptoolkit as bp
from bptoolkit.ops import gru_loops, lstm_loops, rnn
from bptoolkit.ops.recurrent import within

close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
close32 = functools.partial(torch.testing.assert_close, rtol=1e-3, atol=1e-4)
each = pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])


def module(kind, *args, **kw):
    torch.manual_seed(0)
    return getattr(bp.nn, kind)(*args, **kw)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


@each
def test_a_long_sequence_is_one_node(kind):
    """The graph of T = 512 has as many nodes as that of T = 4, forward, backward, under func.grad and func.jvp."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    m = module(kind, 3, 4, bidirectional=True)
    params = {k: p.detach() for k, p in m.named_parameters()}

    def loss(p, x):
        return functional_call(m, p, (x,))[0].sin().sum()

    sizes = {}
    for T in (4, 512):
        torch._dynamo.reset()
        nodes = []

        def count(graph, _, nodes=nodes):
            nodes.append(len(graph.graph.nodes))
            return make_boxed_func(graph.forward)

        backend = aot_autograd(fw_compiler=count, bw_compiler=count)
        x = torch.randn(T, 2, 3, requires_grad=True)
        out = torch.compile(m, fullgraph=True, backend=backend)(x)[0]
        close32(torch.autograd.grad(out.sin().sum(), x), torch.autograd.grad(m(x)[0].sin().sum(), x))
        got = torch.compile(grad(loss), fullgraph=True, backend=backend)(params, x.detach())
        close32(got, grad(loss)(params, x.detach()))
        push = functools.partial(jvp, functools.partial(lambda x, p: functional_call(m, p, (x,))[0], x.detach()))
        got = torch.compile(push, fullgraph=True, backend=backend)((params,), (params,))
        close32(got, push((params,), (params,)))
        sizes[T] = nodes
    assert sizes[4] == sizes[512] and len(sizes[4]) >= 4


@each
def test_compile_inductor_in_seconds(kind):
    """T = 512 with inductor, forward and backward, and of func.grad and func.jvp; unrolled, T = 64 took minutes."""
    import time

    m, x = module(kind, 3, 4), torch.randn(512, 2, 3)
    params = {k: p.detach() for k, p in m.named_parameters()}
    began = time.process_time()
    out = torch.compile(m, fullgraph=True)(x)[0]
    close32(torch.autograd.grad(out.sum(), m.weight_hh_l0), torch.autograd.grad(m(x)[0].sum(), m.weight_hh_l0))
    for f in (
        grad(lambda p: functional_call(m, p, (x,))[0].sin().sum()),
        lambda p: jvp(lambda p: functional_call(m, p, (x,))[0], (p,), (p,))[1],
    ):
        close32(torch.compile(f, fullgraph=True)(params), f(params))
    assert time.process_time() - began < 30


@each
def test_no_recompilation_per_size(kind):
    """Under dynamic=True one graph serves every batch size and length, also with lengths=."""
    m = module(kind, 3, 4, num_layers=2, bidirectional=True)
    for with_lengths in (False, True):
        torch._dynamo.reset()
        counter, counts = CompileCounterWithBackend("aot_eager"), set()
        compiled = torch.compile(m, fullgraph=True, dynamic=True, backend=counter)
        for T, B in ((5, 2), (9, 3), (17, 8), (4, 5)):
            x = torch.randn(T, B, 3, requires_grad=True)
            args = (x, None, torch.arange(B) % T + 1) if with_lengths else (x,)
            (got,) = torch.autograd.grad(compiled(*args)[0].sin().sum(), x)
            (want,) = torch.autograd.grad(m(*args)[0].sin().sum(), x)
            close32(got, want)
            counts.add(counter.frame_count)
        assert len(counts) == 1


@each
def test_lengths_compile_and_vmap(kind):
    m = module(kind, 3, 4, bidirectional=True).double()
    x, lengths = torch.randn(2, 5, 3, 3, dtype=torch.float64), torch.tensor([[5, 0, 2], [1, 4, 5]])

    def run(x, n):
        return m(x, None, n)[0]

    want = torch.stack([run(a, n) for a, n in zip(x, lengths)])
    for f in (vmap(run), torch.compile(vmap(run), fullgraph=True, backend="aot_eager")):
        close(f(x, lengths), want)


def test_torchs_own_modules_stay_refused():
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(nn.LSTM(3, 4), fullgraph=True, backend="eager")(torch.randn(5, 2, 3))


# --- the loops in place ----------------------------------------------------------------------------------------------------

T, B, H, P = 5, 3, 2, 1
F64 = torch.float64


def loops():
    """Every loop: the operator, which letters its tensors have, and its options."""
    for reverse in (False, True):
        for ragged in (False, True):
            for keep in (True, False):
                yield lstm_loops.LOOP, ["T4", "b", "b", "w4", None, ragged], (reverse, keep)
                yield lstm_loops.LOOP, ["T4", "p", "b", "w4p", "wr", ragged], (reverse, keep)
                yield gru_loops.LOOP, ["T3", "b", "w3", "bias", ragged], (reverse, keep)
                yield gru_loops.LOOP, ["T3", "b", "w3", None, ragged], (reverse, keep)
            for name in ("tanh", "relu"):
                yield rnn.LOOP, ["T1", "b", "w1", ragged], (reverse, name)
            for xi, cut in ((None, False), (None, True), ("xi", False)):  # whole, without the products of h, ARTBP
                for name in ("tanh", "relu"):
                    yield rnn.BPTT, ["T1", "T1", "b", "w1", ragged], (xi, reverse, name, cut, 0)
                for dc in ("T1", None):
                    yield lstm_loops.BPTT, ["T1", dc, None, "T4", "T1", "b", "w4", None, ragged], (xi, reverse, cut, 0)
                    yield lstm_loops.BPTT, ["Tp", dc, None, "T4", "T1", "b", "w4p", "wr", ragged], (xi, reverse, cut, 0)
                yield lstm_loops.BPTT, [None, "T1", None, "T4", "T1", "b", "w4", None, ragged], (xi, reverse, cut, 0)
                yield gru_loops.BPTT, ["T1", None, "T4", "T1", "b", "w3", ragged], (xi, reverse, cut, 0)


SHAPES = {"b": (B, H), "p": (B, P), "w1": (H, H), "w3": (3 * H, H), "w4": (4 * H, H), "w4p": (4 * H, P), "wr": (P, H)}
SHAPES |= {"bias": (1, 3 * H), "Tp": (T, B, P), "T1": (T, B, H), "T3": (T, B, 3 * H), "T4": (T, B, 4 * H), "xi": (T, B, 1)}


@pytest.mark.parametrize("batched", ["none", "shared weights", "own weights", "twice"])
@pytest.mark.parametrize("chunk", [1, 1 << 18])
def test_fast_loops_equal_the_readable_ones(batched, chunk, monkeypatch):
    """In place and in chunks, also with samples folded into the batch: what the operator runs is what derivatives are of."""
    for m in (lstm_loops, gru_loops):
        monkeypatch.setattr(m, "CHUNK", chunk)
    V = {"none": (), "twice": (2, 3)}.get(batched, (3,))
    for k, (op, kinds, options) in enumerate(loops()):
        generator = torch.Generator().manual_seed(k)
        lengths = torch.randint(0, T + 1, (*V, B), generator=generator) if kinds[-1] else None

        def tensor(kind, generator=generator, lengths=lengths):
            if kind is None:
                return None
            shared = kind[0] == "w" or kind == "bias"
            if shared and batched != "own weights":
                t = torch.randn(SHAPES[kind], generator=generator, dtype=F64)
                return t.expand(*V, *t.shape)
            t = torch.rand(*V, *SHAPES[kind], generator=generator, dtype=F64)
            return within(t, lengths) if kind[0] == "T" else t

        args = [*map(tensor, kinds[:-1]), lengths, *(tensor("xi") if o == "xi" else o for o in options)]
        got, want = op.op(*args), op.loop(*args)
        close(got, want)
        fake = op.fake(*args)
        for g, f in zip(*((o,) if op.single else o for o in (got, fake))):
            assert g.shape == f.shape and g.is_contiguous()


# --- bad input -------------------------------------------------------------------------------------------------------------

X = torch.randn(5, 2, 3)
LENGTHS = torch.tensor([5, 2])
LSTM_WEIGHTS = [p.detach() for p in nn.LSTM(3, 4).parameters()]
GRU_WEIGHTS = [p.detach() for p in nn.GRU(3, 4).parameters()]
RNN_WEIGHTS = [p.detach() for p in nn.RNN(3, 4).parameters()]
H1 = torch.randn(1, 2, 4)
BAD = {
    "rank": (lambda: bp.functional.lstm(X[None], None, LSTM_WEIGHTS), ValueError, "lstm: input has shape (1, 5, 2, 3)"),
    "features": (lambda: bp.functional.gru(X[..., :2], None, GRU_WEIGHTS), ValueError, "gru: input has 2 features"),
    "h batch": (lambda: bp.functional.gru(X, H1[:, :1], GRU_WEIGHTS), ValueError, "gru: h_0 has shape (1, 1, 4)"),
    "c size": (lambda: bp.functional.lstm(X, (H1, H1[..., :3]), LSTM_WEIGHTS), ValueError, "lstm: c_0 has shape (1, 2, 3)"),
    "h alone": (lambda: bp.functional.lstm(X, H1, LSTM_WEIGHTS), TypeError, "lstm: hx must be a tuple (h_0, c_0)"),
    "h twice": (lambda: bp.functional.rnn(X, (H1, H1), RNN_WEIGHTS), TypeError, "rnn: hx must be one tensor"),
    "unbatched hx": (lambda: bp.functional.rnn(X[:, 0], H1, RNN_WEIGHTS), ValueError, "it needs (1, 4)"),
    "few weights": (lambda: bp.functional.rnn(X, None, RNN_WEIGHTS[:3]), ValueError, "rnn: weights has 3 tensors"),
    "many weights": (lambda: bp.functional.rnn(X, None, RNN_WEIGHTS, bias=False), ValueError, "need 2"),
    "no list": (lambda: bp.functional.rnn(X, None, RNN_WEIGHTS[0]), TypeError, "rnn: weights must be a list of tensors"),
    "weight shape": (
        lambda: bp.functional.gru(X, None, [GRU_WEIGHTS[0], GRU_WEIGHTS[1][:8], *GRU_WEIGHTS[2:]]),
        ValueError,
        "gru: weight_hh_l0 has shape (8, 4); it needs (12, 4)",
    ),
    "other op's": (lambda: bp.functional.lstm(X, None, [torch.randn(6, 3)] * 4), ValueError, "it needs (4·H, I)"),
    "integers": (lambda: bp.functional.gru(X.long(), None, GRU_WEIGHTS), TypeError, "gru: input is torch.int64"),
    "dtypes": (lambda: bp.functional.gru(X.double(), None, GRU_WEIGHTS), TypeError, "gru: weight_ih_l0 is torch.float32"),
    "list input": (lambda: bp.functional.gru([[1.0]], None, GRU_WEIGHTS), TypeError, "gru: input must be a tensor, not list"),
    "no steps": (lambda: bp.functional.rnn(X[:0], None, RNN_WEIGHTS), ValueError, "sequence length to be larger than 0"),
    "lengths high": (lambda: bp.functional.rnn(X, None, RNN_WEIGHTS, lengths=LENGTHS + 1), ValueError, "from 3 to 6"),
    "lengths low": (lambda: bp.functional.rnn(X, None, RNN_WEIGHTS, lengths=LENGTHS - 3), ValueError, "from -1 to 2"),
    "lengths shape": (lambda: bp.functional.rnn(X, None, RNN_WEIGHTS, lengths=LENGTHS[:1]), ValueError, "it needs (2,)"),
    "lengths dtype": (lambda: bp.functional.rnn(X, None, RNN_WEIGHTS, lengths=LENGTHS.int()), TypeError, "torch.int32"),
    "lengths list": (lambda: bp.functional.rnn(X, None, RNN_WEIGHTS, lengths=[5, 2]), TypeError, "int64 tensor, not list"),
    "lengths unbatched": (lambda: bp.functional.rnn(X[:, 0], None, RNN_WEIGHTS, lengths=LENGTHS), ValueError, "lengths"),
    "lengths twice": (
        lambda: bp.functional.rnn(pack_padded_sequence(X, [5, 2]), None, RNN_WEIGHTS, lengths=LENGTHS),
        ValueError,
        "rnn: a PackedSequence has its lengths in it",
    ),
    "save": (lambda: bp.functional.lstm(X, None, LSTM_WEIGHTS, save="all"), ValueError, "lstm: save='all' is not known"),
    "nonlinearity": (lambda: bp.functional.rnn(X, None, RNN_WEIGHTS, nonlinearity="elu"), ValueError, "'elu' is not known"),
    "backend": (lambda: bp.functional.lstm(X, None, LSTM_WEIGHTS, backend="cuda"), ValueError, "lstm: backend='cuda'"),
    "projection": (lambda: bp.functional.lstm(X, None, [*LSTM_WEIGHTS, H1[0]], proj_size=4), ValueError, "proj_size=4"),
    "layers": (lambda: bp.functional.lstm(X, None, [], num_layers=0), ValueError, "lstm: num_layers=0"),
    "dropout": (lambda: bp.functional.lstm(X, None, LSTM_WEIGHTS, dropout=1.5), ValueError, "lstm: dropout=1.5"),
    "device": (lambda: bp.functional.rnn(X.to("meta"), None, RNN_WEIGHTS), ValueError, "rnn: weight_ih_l0 is on cpu"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=re.escape(message)):
        call()
