"""What lstm, gru and rnn keep for backward, and how far their gradients go back."""

from __future__ import annotations

import functools
import io
import itertools

import pytest
import torch
from torch import nn
from torch.func import grad, hessian, jvp, vmap

import bptoolkit as bp
from bptoolkit.bench import saved_bytes
from bptoolkit.ops import bptt_plan

close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
DOUBLE = torch.float64
GATES = {"lstm": 4, "gru": 3, "rnn": 1}
each = pytest.mark.parametrize("name", GATES)
SEED = torch.tensor([12345, -678], dtype=torch.int32)
SAVES = ("gates", "outputs", "sparse", "segments", "least", "half")
TRUNCATIONS = (None, 2, (2, 3), (1, 4), (3, 9), "eprop", bp.ARTBP(0.4, SEED))


def draw(*shape, seed=1, dtype=DOUBLE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype).requires_grad_()


def call(name, T=7, B=3, I=2, H=3, *, L=1, D=1, P=0, dtype=DOUBLE):
    """The arguments of one call, with initial states."""
    weights, n = [], GATES[name] * H
    for k in range(L * D):
        shapes = [(n, D * (P or H) if k >= D else I), (n, P or H), (n,), (n,), *([(P, H)] if P else [])]
        weights += [draw(*s, seed=10 * k + j, dtype=dtype) for j, s in enumerate(shapes)]
    hx = tuple(draw(L * D, B, s, seed=90 + s, dtype=dtype) for s in ((P or H), H))
    kwargs = {"num_layers": L, "bidirectional": D == 2} | ({"proj_size": P} if P else {})
    return draw(T, B, I, seed=5, dtype=dtype), hx if name == "lstm" else hx[0], weights, kwargs


def leaves(x, hx, weights):
    return [x, *(hx if isinstance(hx, tuple) else (hx,)), *weights]


def flat(out):
    return [t for o in out for t in (o if isinstance(o, tuple) else (o,))]


def cotangents(out, seed=3):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=g, dtype=DOUBLE).to(o) for o in out]


def pulled(fn, args, order=1, **kwargs):
    """Outputs, gradients, and their gradients by inputs and cotangents."""
    *args, options = args
    out, at = flat(fn(*args, **options, **kwargs)), leaves(*args)
    dys = [c.requires_grad_() for c in cotangents(out)]
    first = torch.autograd.grad(out, at, dys, create_graph=order > 1, allow_unused=True, materialize_grads=True)
    if order == 1:
        return out, first
    again = sum((g * c).sum() for g, c in zip(first, cotangents(first, 4)))
    return out, first, torch.autograd.grad(again, [*at, *dys], allow_unused=True, materialize_grads=True)


def bytes_of(save, name, T=7, B=3, H=3, P=0, dtype=DOUBLE):
    """A mode of saving, or of a share of what all gates take."""
    if save not in ("least", "half"):
        return save
    a, b = bptt_plan.sizes_of(name, B, H, P or H, dtype.itemsize)
    return a + a * -(-b // a) if save == "least" else b * T // 2


@each
@pytest.mark.parametrize("truncate", TRUNCATIONS, ids=str)
@pytest.mark.parametrize("ragged", [False, True])
def test_as_the_plain_loop(name, truncate, ragged):
    """Every way of saving gives the gradients, and their gradients, of a loop with `detach`; both directions, two layers."""
    lengths = {"lengths": torch.tensor([4, 0, 7])} if ragged else {}
    args = call(name, L=2, D=2, P=2 * (name == "lstm" and not ragged))
    reference = bp.OPS[name].reference
    want = pulled(reference, args, 2, truncate=truncate, **lengths)
    if truncate is not None and truncate != (3, 9):
        assert not torch.allclose(want[1][-2], pulled(reference, args)[1][-2])
    for save in SAVES:
        n = bytes_of(save, name, P=args[3].get("proj_size", 0))
        close(pulled(bp.OPS[name].call, args, 2, truncate=truncate, save=n, **lengths), want)
