"""The cells that the tests of bp.scan share, by hand and by autograd, and their arguments."""

from __future__ import annotations

import functools

import pytest
import torch

import bptoolkit as bp

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
