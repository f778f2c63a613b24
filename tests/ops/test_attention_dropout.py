"""Dropout of attention: replayed in every order of derivatives, under vmap, checkpointing and compilers."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.utils.checkpoint
from attending import DOUBLE, close, dropped, gradients, keep_of, qkv, sdpa
from torch.func import grad, jacrev, vmap


@pytest.mark.parametrize("causal", [False, True])
def test_dropout_in_every_order(small_tiles, causal):
    """Against plain torch with the same mask, which is made again in each pass."""
    p, m = 0.3, () if causal else (torch.randn(5, 7, dtype=DOUBLE).requires_grad_(),)
    xs = (*qkv(2, 3), *m)
    torch.manual_seed(3)
    z = keep_of(*xs[:2], p)
    assert set(z.unique().tolist()) == {0.0, 1 / (1 - p)}

    def orders(fn):
        torch.manual_seed(3)
        out = fn(*xs)
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=DOUBLE).requires_grad_()
        first = torch.autograd.grad(out, xs, dout, create_graph=True)
        scalar = sum((g.sin() * torch.arange(g.numel()).reshape(g.shape).cos()).sum() for g in first)
        second = torch.autograd.grad(scalar, (dout, *xs), create_graph=True)
        third = torch.autograd.grad(sum(g.sin().sum() for g in second), (dout, *xs))
        return out, *first, *second, *third

    def ours(*t):
        return sdpa(*t, dropout_p=p, is_causal=causal)

    close(orders(ours), orders(dropped(z, causal)))
    torch.manual_seed(3)
    tangents = tuple(t.detach().cos() for t in xs)
    _, got = torch.func.jvp(ours, tuple(t.detach() for t in xs), tangents)
    close(got, torch.func.jvp(dropped(z, causal), tuple(t.detach() for t in xs), tangents)[1])


def test_dropout_share_and_scale():
    q, k, _ = qkv(2, 4, L=150, S=600, dtype=torch.float32)
    v = torch.ones(2, 4, 600, 1)
    torch.manual_seed(0)
    z = keep_of(q, k, 0.25)
    assert abs(float((z == 0).double().mean()) - 0.25) < 0.003
    rows = (z == 0).double()
    assert abs(float((rows[0, 0] * rows[0, 1]).mean()) - 0.0625) < 0.003  # heads are independent
    assert abs(float((rows[..., :128, :] * rows[..., 1:129, :]).mean()) - 0.0625) < 0.003
    assert abs(float(sdpa(q, k, v, dropout_p=0.25).mean()) - 1) < 0.01
    assert (sdpa(q, k, v, dropout_p=1.0) == 0).all()
    assert not torch.equal(sdpa(q, k, v, dropout_p=0.5), sdpa(q, k, v, dropout_p=0.5))
    torch.manual_seed(1)
    one = sdpa(q, k, v, dropout_p=0.5)
    torch.manual_seed(1)
    assert torch.equal(one, sdpa(q, k, v, dropout_p=0.5))


def test_dropout_is_replayed_by_checkpoint():
    xs = qkv(2, 3)
    fn = functools.partial(sdpa, dropout_p=0.4)
    torch.manual_seed(2)
    want = gradients(fn, xs)
    torch.manual_seed(2)
    out = torch.utils.checkpoint.checkpoint(fn, *xs, use_reentrant=False)
    torch.rand(5)
    close(out, want[0])
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    close(torch.autograd.grad(out, xs, g), want[1])


def test_dropout_under_vmap(small_tiles):
    """randomness="same" gives every sample one mask, "different" its own; jacrev replays the forward's."""
    q, k, v = (t.detach() for t in qkv(3))
    batch = torch.stack([q, q, q])

    def f(q):
        return sdpa(q, k, v, dropout_p=0.5)

    same = vmap(f, randomness="same")(batch)
    assert torch.equal(same[0], same[1])
    different = vmap(f, randomness="different")(batch)
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(f)(batch)
    torch.manual_seed(4)
    z = keep_of(q, k, 0.5)
    torch.manual_seed(4)
    close(jacrev(f)(q), jacrev(lambda q: dropped(z)(q, k, v))(q))
    torch.manual_seed(4)
    per_sample = vmap(grad(lambda q: f(q).sin().sum()), randomness="same")(batch)
    close(per_sample[1], grad(lambda q: dropped(z)(q, k, v).sin().sum())(q))


def test_dropout_compiles():
    torch._dynamo.reset()
    xs = qkv(2, 3, dtype=torch.float32)
    fn = torch.compile(functools.partial(sdpa, dropout_p=0.5), fullgraph=True, backend="inductor")
    out, grads = gradients(fn, xs)
    v = xs[2]
    (pull,) = torch.autograd.grad((fn(*xs[:2], torch.zeros_like(v) + v) * 0).sum(), v)
    assert out.isfinite().all() and all(g.isfinite().all() for g in grads) and (pull == 0).all()
    assert not torch.equal(fn(*xs), fn(*xs))
