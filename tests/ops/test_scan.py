"""bp.scan: a user's step as a whole sequence. Cells by hand and by autograd against plain loops, transforms, refusals."""

from __future__ import annotations

import doctest
import functools
import sys

import pytest
import torch
from scanning import (
    GRU,
    GRU_AUTO,
    LEAKY_AUTO,
    OPTIONS,
    RUNS,
    T,
    args_of,
    bound,
    close,
    draw,
    flat,
    gru,
    gru_backward,
    loss,
    without,
)
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import bptoolkit as bp


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
    for steps in (3, 300):
        torch._dynamo.reset()
        nodes = []

        def count(graph, _, nodes=nodes):
            nodes.append(len(graph.graph.nodes))
            return make_boxed_func(graph.forward)

        backend = aot_autograd(fw_compiler=count, bw_compiler=count)
        args = args_of(run, steps)
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
        sizes[steps] = nodes
    assert sizes[3] == sizes[300]
    assert norms[-1].shape == (300,) and norms[-1] is not norms[-2]
    close(norms[-1], norms[-2])


def test_one_graph_for_all_lengths():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *args: GRU(*args), fullgraph=True, dynamic=True, backend=counter)
    for steps in (8, 9, 30):
        args = args_of(GRU, steps)
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
