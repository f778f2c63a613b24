"""Hessian-vector products through time in segments: beside autograd of the plain loop, and how much memory they take."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bptoolkit as bp
from bptoolkit.ops import bptt_run

close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-10)
DOUBLE, GATES = torch.float64, {"lstm": 4, "gru": 3, "rnn": 1}
each = pytest.mark.parametrize("name", GATES)
each_way = pytest.mark.parametrize(
    ("name", "save"), [*((name, save) for name in GATES for save in ("segments", 2000)), ("lstm", "sparse")]
)


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def arguments(name, T=11, B=3, I=2, H=3, P=0):
    n, states = GATES[name] * H, ((P or H), H) if name == "lstm" else (H,)
    shapes = [(T, B, I), *((1, B, s) for s in states), (n, I), (n, P or H), (n,), (n,), *([(P, H)] if P else [])]
    return [draw(*s, seed=k) for k, s in enumerate(shapes)]


def function(name, save, P=0, **options):
    """The outputs and last states as a function of the tensors of `arguments`."""
    n = 2 if name == "lstm" else 1
    options |= {"proj_size": P} if P else {}
    op = bp.OPS[name]

    def run(x, *rest):
        hx, weights = (tuple(rest[:2]) if n == 2 else rest[0]), list(rest[n:])
        y, last = (op.reference if save is None else op.call)(
            x, hx, weights, **({} if save is None else {"save": save}), **options
        )
        return [y, *(last if n == 2 else [last])]

    return run


def loss(run):
    return lambda *args: sum(((k + 1) * t.sin()).sum() for k, t in enumerate(run(*args)))


def hvp(run, args, v):
    """Reverse over reverse."""
    args = [t.clone().requires_grad_() for t in args]
    first = torch.autograd.grad(loss(run)(*args), args, create_graph=True)
    return torch.autograd.grad(sum((g * t).sum() for g, t in zip(first, v)), args)


def directions(args):
    return [draw(*t.shape, seed=50 + k) for k, t in enumerate(args)]


@pytest.fixture
def counted(monkeypatch):
    """How often the segments were used."""
    calls, real = [], bptt_run.in_segments
    monkeypatch.setattr(bptt_run, "in_segments", lambda *a: calls.append(1) or real(*a))
    return calls


@each_way
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
def test_reverse_over_reverse(name, save, ragged, counted):
    args = arguments(name)
    options = {"lengths": torch.tensor([11, 0, 6])} if ragged else {}
    close(
        hvp(function(name, save, **options), args, directions(args)),
        hvp(function(name, None, **options), args, directions(args)),
    )
    assert counted


@each
@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 9, 10])
def test_lengths_either_side_of_a_square(name, T):
    args = arguments(name, T)
    close(hvp(function(name, "segments"), args, directions(args)), hvp(function(name, None), args, directions(args)))


def test_projection_and_two_directions(counted):
    args = arguments("lstm", P=2)
    close(*(hvp(function("lstm", save, P=2), args, directions(args)) for save in ("segments", None)))
    x, *rest = arguments("gru")
    args = [x, torch.cat([rest[0], rest[0] + 1]), *rest[1:], *(t - 0.3 for t in rest[1:])]
    lengths = torch.tensor([7, 11, 1])
    runs = [function("gru", save, bidirectional=True, lengths=lengths) for save in ("segments", None)]
    close(*(hvp(run, args, directions(args)) for run in runs))
    assert len(counted) == 3


@each_way
def test_forward_over_reverse(name, save, counted):
    args = tuple(arguments(name))
    at = tuple(range(len(args)))
    found = [
        torch.func.jvp(torch.func.grad(loss(function(name, s)), argnums=at), args, tuple(directions(args)))[1]
        for s in (save, None)
    ]
    close(*found)
    assert counted


@each
def test_a_hessian_by_columns(name):
    """vmap over the second pass."""
    x, h0, *rest = arguments(name, T=5, B=1, I=1, H=2)

    def of(h, save):
        return loss(function(name, save))(x, h, *rest)

    found = [torch.func.hessian(of)(h0, save) for save in ("segments", None)]
    close(*found)
    rows = torch.func.vmap(
        lambda v, save: torch.func.vjp(torch.func.grad(lambda h: of(h, save)), h0)[1](v)[0], in_dims=(0, None)
    )
    basis = torch.eye(h0.numel(), dtype=DOUBLE).view(-1, *h0.shape)
    close(rows(basis, "segments").reshape(found[1].shape), found[1])


@each
def test_third_order(name):
    """Autograd of the plain loop."""
    args = [t.requires_grad_() for t in arguments(name, T=4, B=2)]

    def third(save):
        first = torch.autograd.grad(loss(function(name, save))(*args), args, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), args, create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in second), args)

    close(third("segments"), third(None))


@each
@pytest.mark.parametrize("k", range(5))
def test_one_input_alone(name, k):
    """Only one of x, the states and the weights has a gradient."""
    args = arguments(name)

    def second(save):
        at = args[k].clone().requires_grad_()
        given = [*args[:k], at, *args[k + 1 :]]
        (first,) = torch.autograd.grad(loss(function(name, save))(*given), at, create_graph=True)
        return torch.autograd.grad(first.sin().sum(), at)

    close(second("segments"), second(None))


def test_truncated_backward_is_no_gradient_of_anything(counted):
    """Its derivatives are those of the truncated formulas, not a Hessian's."""
    args = [t.requires_grad_() for t in arguments("lstm")]
    run = function("lstm", "segments", truncate=(2, 3))
    first = torch.autograd.grad(loss(run)(*args), args, create_graph=True)
    torch.autograd.grad(sum(g.sum() for g in first), args)
    assert not counted


MEASURED = """
import torch, bptoolkit as bp
torch.set_num_threads(1)
T, B, H = 1200, 8, 64
weights = [(torch.randn(s) * 0.1).requires_grad_() for s in ((4 * H, H), (4 * H, H), (4 * H,), (4 * H,))]
def hvp(x, save):
    y, _ = bp.functional.lstm(x, None, weights, save=save)
    first = torch.autograd.grad(y[-1].square().sum(), weights, create_graph=True)
    return torch.autograd.grad(sum(g.sum() for g in first), weights)
def status(name):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(name))
def added(save):
    open("/proc/self/clear_refs", "w").write("5")  # the highest resident size from here on
    before = status("VmRSS")
    result = hvp(x, save)
    return status("VmHWM") - before, result
x = torch.randn(T, B, H)
hvp(x[:9], "segments"); hvp(x[:9], "gates")
(segments, a), (whole, b) = added("segments"), added("gates")
assert all(torch.allclose(s, t, rtol=1e-3, atol=1e-4) for s, t in zip(a, b))
print(segments, whole, T * B * 4 * H * 4 / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the highest resident size is Linux's")
def test_memory():
    """MiB that a Hessian-vector product adds to a process: in segments about its states, otherwise many times its gates."""
    out = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    segments, whole, gates = (float(n) for n in out.stdout.split())
    assert segments < 4 * gates < whole, out.stdout
