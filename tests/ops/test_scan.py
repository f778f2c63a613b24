"""bp.scan: a user's step as a whole sequence. Cells by hand and by autograd against plain loops, and everything it offers."""

from __future__ import annotations

import doctest
import functools
import gc
import sys
import weakref

import pytest
import torch
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import bptoolkit as bp
from bptoolkit.bench import saved_bytes

close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
DOUBLE = torch.float64
T, B, I, H = 7, 3, 2, 4


def gru(x, h, wi, wh, b):
    """A GRU with one bias, gates r z n."""
    (ri, zi, ni), (rh, zh, nh) = (x @ wi.mT + b).chunk(3, -1), (h @ wh.mT).chunk(3, -1)
    r, z = torch.sigmoid(ri + rh), torch.sigmoid(zi + zh)
    n = torch.tanh(ni + r * nh)
    new_h = n + z * (h - n)
    return new_h, new_h


def gru_backward(dh, dy, x, h, wi, wh, b, need):
    (ri, zi, ni), (rh, zh, nh) = (x @ wi.mT + b).chunk(3, -1), (h @ wh.mT).chunk(3, -1)
    r, z = torch.sigmoid(ri + rh), torch.sigmoid(zi + zh)
    n = torch.tanh(ni + r * nh)
    g = dh + dy
    dn = g * (1 - z) * (1 - n * n)
    dz, dr = g * (h - n) * z * (1 - z), dn * nh * r * (1 - r)
    di, dhh = torch.cat([dr, dz, dn], -1), torch.cat([dr, dz, dn * r], -1)
    return (
        di @ wi if need.x else None,
        g * z + dhh @ wh,
        di.mT @ x if need.wi else None,
        dhh.mT @ h if need.wh else None,
        di.sum(0) if need.b else None,
    )


def leaky(x, state, w):
    """Two inputs, two states of other shapes, an output that is neither."""
    (u, v), (h, c) = x, state
    new_c = 0.5 * c + torch.tanh(u @ w.mT) * v.unsqueeze(-1)
    new_h = torch.sin(h + new_c.sum(-1))
    return (new_h, new_c), new_c * new_h.unsqueeze(-1) + u.sum(-1, keepdim=True)


def leaky_backward(dstate, dy, x, state, w, new_state):
    (dh, dc), (u, v), (h, _), (new_h, new_c) = dstate, x, state, new_state
    dh = dh + (dy * new_c).sum(-1)
    da = dh * torch.cos(h + new_c.sum(-1))
    dc = dc + dy * new_h.unsqueeze(-1) + da.unsqueeze(-1)
    t = torch.tanh(u @ w.mT)
    dt = dc * v.unsqueeze(-1) * (1 - t * t)
    return (dt @ w + dy.sum(-1, keepdim=True), (dc * t).sum(-1)), (da, 0.5 * dc), dt.mT @ u


GRU, GRU_AUTO = bp.scan(gru, gru_backward), bp.scan(gru, name="gru_by_autograd")
LEAKY, LEAKY_AUTO = bp.scan(leaky, leaky_backward), bp.scan(leaky)
RUNS = pytest.mark.parametrize("run", [GRU, GRU_AUTO, LEAKY, LEAKY_AUTO], ids=["gru", "gru auto", "two", "two auto"])
OPTIONS = {
    "plain": {},
    "reverse": {"reverse": True},
    "every 3rd": {"checkpoint": 3},
    "sqrt": {"checkpoint": "sqrt", "reverse": True},
    "lengths": {"lengths": torch.tensor([3, 7, 0])},
    "lengths, reverse, every 2nd": {"lengths": torch.tensor([3, 7, 0]), "reverse": True, "checkpoint": 2},
    "longer than T": {"checkpoint": 100},
}


def draw(*shape, seed=1, dtype=DOUBLE):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE) * 0.7).to(dtype).requires_grad_()


def args_of(run, T=T):
    if run in (GRU, GRU_AUTO):
        return draw(T, B, I), draw(B, H, seed=2), draw(3 * H, I, seed=3), draw(3 * H, H, seed=4), draw(3 * H, seed=5)
    return (draw(T, B, I), draw(T, B, seed=2)), (draw(B, seed=3), draw(B, H, seed=4)), draw(H, I, seed=5)


def flat(args):
    return [t for a in args for t in (a if isinstance(a, tuple) else (a,)) if isinstance(t, torch.Tensor)]


def bound(run, args, **kw):
    """A function of the flat tensors, giving flat outputs."""
    shape = [len(a) if isinstance(a, tuple) else 0 for a in args]

    def call(*tensors):
        it = iter(tensors)
        return tuple(flat(run(*(tuple(next(it) for _ in range(n)) if n else next(it) for n in shape), **kw)))

    return call


def loss(out):
    return sum((o.sin() * torch.arange(1, o.numel() + 1, dtype=o.dtype).cos().reshape(o.shape)).sum() for o in out)


def without(kw, *names):
    return {k: v for k, v in kw.items() if k not in names}


@RUNS
@pytest.mark.parametrize("option", OPTIONS)
def test_as_a_plain_loop(run, option):
    """Values, gradients, gradients of gradients, forward mode."""
    kw, args = OPTIONS[option], args_of(run)
    ours, theirs = bound(run, args, **kw), bound(run.plain, args, **without(kw, "checkpoint"))
    leaves, results = flat(args), []
    for fn in (ours, theirs):
        out = fn(*leaves)
        first = torch.autograd.grad(loss(out), leaves, create_graph=True)
        second = torch.autograd.grad(sum((g * g).sum() for g in first), leaves)
        tangents = tuple(draw(*t.shape, seed=9).detach() for t in leaves)
        results.append((out, first, second, jvp(fn, tuple(t.detach() for t in leaves), tangents)[1]))
    close(*results)


@RUNS
@pytest.mark.parametrize("T", [0, 1])
def test_no_step_and_one(run, T):
    args = args_of(run, T)
    leaves = flat(args)
    out = bound(run, args)(*leaves)
    assert out[0].shape[0] == T
    grads = torch.autograd.grad(loss(out), leaves)
    assert [g.shape for g in grads] == [t.shape for t in leaves]
    if T:
        close(grads, torch.autograd.grad(loss(bound(run.plain, args)(*leaves)), leaves))
    else:
        close(out[1:], tuple(flat(args[1:2])))


@RUNS
def test_only_the_last_state_is_used(run):
    args = args_of(run)
    leaves = flat(args)
    results = [torch.autograd.grad(loss(bound(fn, args)(*leaves)[1:]), leaves) for fn in (run, run.plain)]
    close(*results)


@RUNS
def test_transforms(run):
    args = args_of(run)
    leaves = tuple(t.detach() for t in flat(args))
    for kw in ({}, {"checkpoint": 2, "lengths": torch.tensor([7, 2, 4])}):
        ours, theirs = bound(run, args, **kw), bound(run.plain, args, **without(kw, "checkpoint"))
        samples = tuple(torch.stack([t, 0.5 * t, -t]) for t in leaves)
        close(vmap(ours)(*samples), vmap(theirs)(*samples))
        close(vmap(vmap(ours))(*(t[None] for t in samples)), vmap(vmap(theirs))(*(t[None] for t in samples)))
        which = tuple(range(len(leaves)))
        dims = (0,) * (len(leaves) - 1) + (None,)
        for d in ((0,) * len(leaves), dims):
            given = tuple(s if k == 0 else t for s, t, k in zip(samples, leaves, d))
            per_sample = [vmap(grad(lambda *t, fn=fn: loss(fn(*t)), which), in_dims=d)(*given) for fn in (ours, theirs)]
            close(*per_sample)
    last = len(leaves) - 1
    for transform in (lambda f: jacrev(f, last), lambda f: jacfwd(f, last), lambda f: jacfwd(jacrev(f, last), last)):
        close(transform(lambda *t: loss(ours(*t)))(*leaves), transform(lambda *t: loss(theirs(*t)))(*leaves))
    with pytest.raises(NotImplementedError, match="forward mode over forward mode"):
        jacfwd(jacfwd(lambda *t: loss(ours(*t)), last), last)(*leaves)
    out = ours(*(t.requires_grad_() for t in leaves))[0]
    many = torch.stack([torch.ones_like(out), 2 * torch.ones_like(out)])
    (batched,) = torch.autograd.grad(out, leaves[0], many, is_grads_batched=True, retain_graph=True)
    close(batched[1], 2 * torch.autograd.grad(out, leaves[0], many[0])[0])


@pytest.mark.parametrize("run", [GRU, GRU_AUTO], ids=["hand", "auto"])
@pytest.mark.parametrize("lengths", [(7, 3, 1), (2, 7, 4)], ids=["sorted", "unsorted"])
def test_packed_sequences_and_what_lies_past(run, lengths):
    """A packed sequence gives what lengths give; NaN past them is not read, nor in the cotangent."""
    x, *rest = args_of(run)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=lengths == (7, 3, 1))
    ys, last = run(packed, *rest)
    assert isinstance(ys, PackedSequence)
    padded = pad_packed_sequence(ys, total_length=T)[0]
    past = torch.arange(T)[:, None, None] >= torch.tensor(lengths)[:, None]
    filled = x.detach().masked_fill(past, torch.nan).requires_grad_()
    ys2, last2 = run(filled, *rest, lengths=torch.tensor(lengths))
    want = run.plain(x, *rest, lengths=torch.tensor(lengths))
    close((padded, last), want)
    close((ys2, last2), want)
    cotangent = draw(*ys2.shape, seed=8).detach()
    wanted = torch.autograd.grad(want[0], (x, *rest), cotangent, retain_graph=True)
    close(torch.autograd.grad(padded, (x, *rest), cotangent), wanted)
    close(torch.autograd.grad(ys2, (filled, *rest), cotangent.masked_fill(past, torch.nan)), wanted)


def truncated_by_hand(run, args, k1, k2, lengths=None):
    """Gradients window by window: from a state without history, k2 steps, the losses of the newest k1."""
    x, h0, *params = args
    total, states = [torch.zeros_like(t) for t in (x, h0, *params)], [h0]
    T = x.shape[0]
    for t in range(T):
        states.append(
            run.plain(x[t : t + 1], states[-1], *params, lengths=None if lengths is None else (lengths - t).clamp(0, 1))[1]
        )
    ends = [*range(k1, T, k1), T]
    for begin, end in zip([0, *ends], ends):
        oldest = max(end - k2, 0)
        start = h0 if oldest == 0 else states[oldest].detach()
        at = None if lengths is None else (lengths - oldest).clamp(0, end - oldest)
        ys, last = run.plain(x[oldest:end], start, *params, lengths=at)
        whole = weights(T, *ys.shape[1:])
        value = (ys[begin - oldest :].sin() * whole[begin:end]).sum() + (last.cos().sum() if end == T else 0)
        for a, g in zip(total, torch.autograd.grad(value, (x, h0, *params), allow_unused=True)):
            a += 0 if g is None else g
    return total


def weights(*shape):
    return draw(*shape, seed=11).detach()


@pytest.mark.parametrize("run", [GRU, GRU_AUTO], ids=["hand", "auto"])
@pytest.mark.parametrize("window", [1, 3, 7, 20, (1, 1), (1, 4), (2, 3), (3, 100), (2, 7)], ids=str)
@pytest.mark.parametrize(
    "kw", [{}, {"checkpoint": 2}, {"lengths": torch.tensor([7, 2, 5])}], ids=["all", "checkpoint", "lengths"]
)
def test_truncation(run, window, kw):
    args = args_of(run)
    k1, k2 = (window, window) if isinstance(window, int) else window
    ys, last = run(*args, truncate=window, **kw)
    got = torch.autograd.grad((ys.sin() * weights(*ys.shape)).sum() + last.cos().sum(), args)
    close(list(got), truncated_by_hand(run, args, k1, k2, kw.get("lengths")))


def test_truncation_is_not_differentiated_again():
    args = args_of(GRU)
    first = torch.autograd.grad(GRU(*args, truncate=3)[0].sum(), args, create_graph=True)
    with pytest.raises(NotImplementedError, match="truncated gradient is an estimate"):
        torch.autograd.grad(first[0].sum(), args)
    with pytest.raises(NotImplementedError, match="truncated gradient is an estimate"):
        jvp(lambda x: GRU(x, *args[1:], truncate=3), (args[0],), (args[0],))
    ours = grad(lambda w: GRU(*args[:3], w, args[4], truncate=3)[0].sum())(args[3])  # first order by torch.func is fine
    close(ours, torch.autograd.grad(GRU(*args, truncate=3)[0].sum(), args[3])[0])


@RUNS
@pytest.mark.parametrize("kw", [{}, {"checkpoint": 3}, {"reverse": True}, {"truncate": (2, 4)}], ids=str)
def test_gradient_norms(run, kw):
    """Against autograd's gradient of every state of a plain loop."""
    args, seen = args_of(run), []
    out = run(*args, grad_norms=seen.append, **kw)
    assert not seen
    torch.autograd.grad(loss(flat(out)), flat(args))
    (norms,) = seen
    assert norms.shape == (T,)
    if "truncate" in kw:
        whole = run(*args, grad_norms=True)
        torch.autograd.grad(loss(flat(whole)), flat(args))
        close(norms[6], run.grad_norms[6])
        assert float((norms[3:5] - run.grad_norms[3:5]).abs().min()) > 1e-6
        return
    x, state, *params = args
    wanted, ys, states = [None] * T, [None] * T, [None] * T
    for t in reversed(range(T)) if "reverse" in kw else range(T):
        state = tuple(s * 1 for s in state) if isinstance(state, tuple) else state * 1
        states[t] = state
        state, ys[t] = run.cell_forward(tuple(u[t] for u in x) if isinstance(x, tuple) else x[t], state, *params)
    value = loss([torch.stack(ys), *flat((state,))])
    for t in range(T):
        parts = torch.autograd.grad(value, flat((states[t],)), retain_graph=True)
        wanted[t] = torch.sqrt(sum((p * p).sum() for p in parts))
    close(norms, torch.stack(wanted))


def test_recorders_are_let_go():
    class Recorder:
        def __call__(self, norms):
            self.norms = norms

    recorder, args = Recorder(), args_of(GRU)
    there = weakref.ref(recorder)
    out = GRU(*args, grad_norms=recorder)[0]
    del recorder
    gc.collect()
    assert there() is not None  # the graph holds it
    out.sum().backward()
    assert there().norms.shape == (T,)
    del out
    gc.collect()
    assert there() is None


def test_what_is_kept():
    """All states, or every K-th: with K = 8 of 64 steps the states cost an eighth."""
    run, args = GRU, args_of(GRU, 64)
    state, x = B * H * 8, 64 * B * I * 8
    params = sum(p.numel() for p in args[2:]) * 8
    assert saved_bytes(lambda: run(*args)) <= 64 * state + x + params
    assert saved_bytes(lambda: run(*args, checkpoint=8)) <= 8 * state + x + params
    assert saved_bytes(lambda: run(*args, checkpoint="sqrt")) <= 8 * state + x + params
    assert saved_bytes(lambda: run.plain(*args)) > 8 * saved_bytes(lambda: run(*args, checkpoint=8))


def test_need_is_honoured():
    seen = []

    def back(dh, dy, x, h, w, need):
        seen.append(need)
        return None if not need.x else (dh + dy) * w, (dh + dy) * 0.5, ((dh + dy) * x).sum(0) if need.w else None

    run = bp.scan(lambda x, h, w: (0.5 * h + x * w, 0.5 * h + x * w), back)
    x, h, w = draw(3, 2, 4), draw(2, 4), draw(4)
    for wanted in ((x,), (w,), (x, w)):
        seen.clear()
        flags = [any(t is u for u in wanted) for t in (x, w)]
        y = run(*(t if any(t is u for u in wanted) else t.detach() for t in (x, h, w)))[0]
        got = torch.autograd.grad(y.sin().sum(), wanted)
        assert [(n.x, n.w) for n in seen] == [tuple(flags)] * 3
        close(got, torch.autograd.grad(run.plain(x, h, w)[0].sin().sum(), wanted))


def test_integer_inputs():
    """Tokens: xs without a gradient."""

    def cell(x, h, table):
        new_h = torch.tanh(table[x] + 0.5 * h)
        return new_h, new_h

    def back(dh, dy, x, h, table, y):
        da = (dh + dy) * (1 - y * y)
        return None, 0.5 * da, torch.zeros_like(table).index_add(0, x, da)

    x, h, table = torch.randint(0, 5, (6, 3)), draw(3, 4), draw(5, 4)
    for run in (bp.scan(cell, back), bp.scan(cell)):
        got = torch.autograd.grad(run(x, h, table)[0].sin().sum(), (h, table))
        close(got, torch.autograd.grad(run.plain(x, h, table)[0].sin().sum(), (h, table)))


@pytest.mark.parametrize("run", [GRU, LEAKY_AUTO], ids=["gru", "two auto"])
def test_compile_is_one_node(run):
    """fullgraph, forward and backward, for T = 3 and T = 300; norms and truncation inside; func.grad, vmap."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    sizes, norms = {}, []
    for T in (3, 300):
        torch._dynamo.reset()
        nodes = []

        def count(graph, _, nodes=nodes):
            nodes.append(len(graph.graph.nodes))
            return make_boxed_func(graph.forward)

        backend = aot_autograd(fw_compiler=count, bw_compiler=count)
        args = args_of(run, T)
        kw = {"checkpoint": 2, "lengths": torch.tensor([3, 1, 2])}
        for fn in (run, functools.partial(run, truncate=2), functools.partial(run, grad_norms=True, **kw)):
            call = bound(fn, args)
            out = torch.compile(call, fullgraph=True, backend=backend)(*flat(args))
            want = call(*flat(args))
            close(out, want)
            grads = []
            for o in (out, want):
                grads.append(torch.autograd.grad(loss(o), flat(args)))
                norms.append(run.grad_norms)
            close(*grads)
        per_sample = grad(lambda *t: loss(bound(run, args)(*t)))  # noqa: B023
        leaves = tuple(t.detach() for t in flat(args))
        close(torch.compile(per_sample, fullgraph=True, backend=backend)(*leaves), per_sample(*leaves))
        sizes[T] = nodes
    assert sizes[3] == sizes[300]
    assert norms[-1].shape == (300,) and norms[-1] is not norms[-2]
    close(norms[-1], norms[-2])


def test_one_graph_for_all_lengths():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *args: GRU(*args), fullgraph=True, dynamic=True, backend=counter)
    for T in (8, 9, 30):
        args = args_of(GRU, T)
        out = compiled(*args)
        close(out, GRU(*args))
        out[0].sum().backward()
    assert counter.frame_count == 1


def test_verify_finds_nothing_and_finds_a_mistake():
    args = draw(3, 2, 1), draw(2, 2, seed=2), draw(6, 1, seed=3), draw(6, 2, seed=4), draw(6, seed=5)
    judged = ["forward_value", "gradient_value", "memory", "version_counter", "double_backward", "forward_mode", "vmap"]
    report = bp.verify.check(GRU, args, reference=GRU.plain, quick=True, properties=judged, budget=5)
    assert report.ok and report.calls["double_backward"], report

    def forgets_the_carry(dh, dy, x, h, wi, wh, b, need):
        return gru_backward(torch.zeros_like(dh), dy, x, h, wi, wh, b, need)

    wrong = bp.scan(gru, forgets_the_carry)
    report = bp.verify.check(wrong, args, reference=wrong.plain, quick=True, budget=5, properties=["gradient_value"])
    assert not report.ok and {f.property for f in report.failures} == {"gradient_value"}


def test_the_example_in_the_docstring():
    result = doctest.testmod(sys.modules["bptoolkit.scan"])
    assert result.failed == 0 and result.attempted >= 8


def test_refusals():
    args = args_of(GRU)

    def f(x, h, w):
        return h, h

    with pytest.raises(TypeError, match=r"cell_backward asks for 'c'; it can have dh, dy, x, h, w, new_h, y, need"):
        bp.scan(f, lambda dh, c: None)
    with pytest.raises(TypeError, match="must name its parameters one by one"):
        bp.scan(lambda x, h, *params: (h, h))
    with pytest.raises(TypeError, match="dy would mean two things"):
        bp.scan(lambda x, h, dy: (h, h))
    with pytest.raises(TypeError, match=r"gru: 2 parameters given; the cell has 3"):
        GRU(*args[:4])
    with pytest.raises(TypeError, match=r"gru: b must be a tensor, not float"):
        GRU(*args[:4], 1.0)
    with pytest.raises(ValueError, match=r"truncate=\(3, 2\)"):
        GRU(*args, truncate=(3, 2))
    with pytest.raises(ValueError, match="checkpoint=0"):
        GRU(*args, checkpoint=0)
    with pytest.raises(ValueError, match="lengths go from 2 to 9"):
        GRU(*args, lengths=torch.tensor([2, 9, 3]))
    with pytest.raises(
        ValueError, match=r"the new state is torch.float64 \(3, 5\), the state it came from torch.float64 \(3, 4\)"
    ):
        bp.scan(lambda x, h: (torch.cat([h, h[:, :1]], -1), h))(args[0], args[1])
    with pytest.raises(TypeError, match="must return"):
        bp.scan(lambda x, h: h)(args[0], args[1])
    x, h, w = draw(3, 2, 4), draw(2, 4), draw(4)

    def good(x, h, w):
        return h + x * w, h

    with pytest.raises(TypeError, match="must return a gradient for each of x, h, w; got 2 values"):
        bp.scan(good, lambda dh, dy: (dh, dh))(x, h, w)[0].sum().backward()
    with pytest.raises(ValueError, match=r"a gradient of shape \(2, 4\) for w, which has \(4,\)"):
        bp.scan(good, lambda dh, dy: (dh, dh, dh))(x, h, w)[0].sum().backward()


def test_cells_that_would_be_silently_wrong():
    x, h = draw(3, 2, 4), draw(2, 4)
    with pytest.raises(RuntimeError, match="draws random numbers"):
        bp.scan(lambda x, h: (torch.dropout(h + x, 0.5, True), h))(x, h)
    with pytest.raises(RuntimeError, match="writes over its arguments"):
        bp.scan(lambda x, h: (h.mul_(0.5) + x, h))(x.detach(), h.detach())
    with torch.inference_mode():
        y, _ = bp.scan(lambda x, h: (h + x, h))(torch.ones(3, 2), torch.ones(2))
    assert y.tolist() == [[1, 1], [2, 2], [3, 3]]


def test_half_precision_sums_the_steps_in_float32():
    """A parameter's gradient over 500 steps of bfloat16: one rounding, not 500."""
    run = bp.scan(
        lambda x, h, w: (0.5 * h + x * w,) * 2, lambda dh, dy, x, h, w: ((dh + dy) * w, (dh + dy) / 2, ((dh + dy) * x).sum(0))
    )
    x, h, w = torch.rand(500, 2, 3).bfloat16(), torch.zeros(2, 3).bfloat16(), torch.ones(3).bfloat16().requires_grad_()
    got = torch.autograd.grad(run(x, h, w)[0].sum(), w)[0]
    want = torch.autograd.grad(run(x.double(), h.double(), w.double())[0].sum(), w)[0]
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-2, atol=0)


def test_the_example_of_the_derivations():
    """docs/derivations/scan.md: s = 2 s + x over three steps."""
    run = bp.scan(lambda x, s, w: (w * s + x,) * 2, lambda ds, dy, x, s, w: (ds + dy, (ds + dy) * w, ((ds + dy) * s).sum()))
    x, s, w = torch.zeros(3, 1).requires_grad_(), torch.zeros(1), torch.tensor(2.0)
    (dx,) = torch.autograd.grad(run(x, s, w, grad_norms=True)[0][2].sum(), x)
    assert dx.flatten().tolist() == [4, 2, 1] and run.grad_norms.tolist() == [8, 4, 2]
    (dx,) = torch.autograd.grad(run(x, s, w, truncate=(1, 2))[0][2].sum(), x)
    assert dx.flatten().tolist() == [0, 2, 1]
