"""bp.scan: truncation, checkpoints, what is kept, gradient norms."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from scanning import (
    GRU,
    GRU_AUTO,
    RUNS,
    B,
    H,
    I,
    T,
    args_of,
    close,
    draw,
    flat,
    loss,
)
from torch.func import grad, jvp

import bptoolkit as bp
from bptoolkit.bench import saved_bytes


def truncated_by_hand(run, args, k1, k2, lengths=None):
    """Gradients window by window: from a state without history, k2 steps, the losses of the newest k1."""
    x, h0, *params = args
    total, states = [torch.zeros_like(t) for t in (x, h0, *params)], [h0]
    T = x.shape[0]
    for t in range(T):
        states.append(
            run.plain(x[t : t + 1], states[-1], *params, lengths=None if lengths is None else (lengths - t).clamp(0, 1))[1]
        )
    for begin in range(0, T, k1):
        end, oldest = min(begin + k1, T), max(begin + k1 - k2, 0)
        start = h0 if oldest == 0 else states[oldest].detach()
        at = None if lengths is None else (lengths - oldest).clamp(0, end - oldest)
        ys, last = run.plain(x[oldest:end], start, *params, lengths=at)
        whole = weights(T, *ys.shape[1:])
        ended = (lengths - 1).clamp(min=0) if lengths is not None else torch.full((last.shape[0],), T - 1)
        mine = ((begin <= ended) & (ended < end)).unsqueeze(-1)
        value = (ys[begin - oldest :].sin() * whole[begin:end]).sum() + (last.cos() * mine).sum()
        for a, g in zip(total, torch.autograd.grad(value, (x, h0, *params), allow_unused=True)):
            a += 0 if g is None else g
    return total


def weights(*shape):
    return draw(*shape, seed=11).detach()


@pytest.mark.parametrize("run", [GRU, GRU_AUTO], ids=["hand", "auto"])
@pytest.mark.parametrize("window", [1, 3, 7, 20, (1, 1), (1, 4), (2, 3), (3, 100), (2, 7)], ids=str)
@pytest.mark.parametrize(
    "kw",
    [{}, {"checkpoint": 2}, {"lengths": torch.tensor([7, 2, 5])}, {"lengths": torch.tensor([7, 0, 1])}],
    ids=["all", "checkpoint", "lengths", "empty"],
)
def test_truncation(run, window, kw):
    args = args_of(run)
    k1, k2 = (window, window) if isinstance(window, int) else window
    ys, last = run(*args, truncate=window, **kw)
    got = torch.autograd.grad((ys.sin() * weights(*ys.shape)).sum() + last.cos().sum(), args)
    close(list(got), truncated_by_hand(run, args, k1, k2, kw.get("lengths")))


@pytest.mark.parametrize("window", [1, 3, (1, 4), (2, 3), (2, 7)], ids=str)
@pytest.mark.parametrize("ragged", [False, True])
def test_truncation_means_what_it_means_elsewhere(window, ragged):
    x, h0, wi, wh, b = args_of(GRU)
    lengths = torch.tensor([7, 2, 5]) if ragged else None
    both = []
    for run in (
        lambda: GRU(x, h0, wi, wh, b, truncate=window, lengths=lengths),
        lambda: bp.functional.gru(
            x, h0[None], [wi, wh, b, torch.zeros_like(b)], truncate=window, lengths=lengths, save="outputs"
        ),
    ):
        ys, last = run()
        value = (ys.sin() * weights(*ys.shape)).sum() + last.cos().sum()
        both.append((ys, torch.autograd.grad(value, (x, h0, wi, wh))))
    close(*both)


@pytest.mark.parametrize("truncate", ["eprop", bp.ARTBP(0.1)], ids=["eprop", "ARTBP"])
def test_truncations_of_the_sequence_ops_alone_are_refused(truncate):
    with pytest.raises(ValueError, match=r"a scan takes None, k or \(k1, k2\)"):
        GRU(*args_of(GRU), truncate=truncate)


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


def test_the_example_of_the_derivations():
    """docs/derivations/scan.md: s = 2 s + x over three steps."""
    run = bp.scan(lambda x, s, w: (w * s + x,) * 2, lambda ds, dy, x, s, w: (ds + dy, (ds + dy) * w, ((ds + dy) * s).sum()))
    x, s, w = torch.zeros(3, 1).requires_grad_(), torch.zeros(1), torch.tensor(2.0)
    (dx,) = torch.autograd.grad(run(x, s, w, grad_norms=True)[0][2].sum(), x)
    assert dx.flatten().tolist() == [4, 2, 1] and run.grad_norms.tolist() == [8, 4, 2]
    (dx,) = torch.autograd.grad(run(x, s, w, truncate=(1, 2))[0][2].sum(), x)
    assert dx.flatten().tolist() == [0, 2, 1]
