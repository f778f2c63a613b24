"""Linear attention: chunks, feature maps, normalisation, memory, and what it refuses."""

from __future__ import annotations

import functools

import pytest
import torch
from attending import DOUBLE, Largest, close, gradients, orders, qkv
from torch.func import grad, hessian, jvp, vmap

import bptoolkit as bp
from bptoolkit.ops import linear_attention as module
from bptoolkit.ops.linear_attention import reference

linear_attention = bp.functional.linear_attention


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 3)


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "sums": {"normalize": False},
    "causal sums": {"normalize": False, "is_causal": True},
    "relu": {"feature_map": "relu", "is_causal": True, "eps": 0.5},
    "identity": {"feature_map": None, "is_causal": True, "normalize": False},
    "own": {"feature_map": lambda x: torch.cat((x.exp(), (-x).exp()), -1), "is_causal": True},
    "eps": {"eps": 0.3},
}


@pytest.mark.parametrize("L", [1, 3, 7])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_order_in_chunks(small_chunks, name, L):
    xs = tuple((0.5 * t.detach()).requires_grad_() for t in qkv(2, 3, L=L, S=L if "is_causal" in OPTIONS[name] else 5))
    ours, theirs = (orders(functools.partial(f, **OPTIONS[name]), xs) for f in (linear_attention, reference))
    close(ours, theirs)


def test_past_the_real_chunks():
    xs = qkv(2, L=300, S=300, E=3, Ev=2)
    ours, theirs = (orders(functools.partial(f, is_causal=True), xs, 2) for f in (linear_attention, reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-8)


def test_it_is_a_recurrent_network():
    """Algorithm 1 of the paper: a state of E × Ev and one of E, one step per position."""
    q, k, v = (t.detach() for t in qkv(L=6, S=6))
    state, total, out = torch.zeros(4, 3, dtype=DOUBLE), torch.zeros(4, dtype=DOUBLE), []
    for a, b, c in zip(torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1, v):
        state, total = state + b[:, None] * c, total + b
        out.append(a @ state / (a @ total + 1e-6))
    close(linear_attention(q, k, v, is_causal=True), torch.stack(out))


def test_nothing_comes_from_later_positions(small_chunks):
    q, k, v = qkv(L=8, S=8)
    out = linear_attention(q, k, v, is_causal=True)
    dq, dk, dv = torch.autograd.grad(out[4].sum(), (q, k, v))
    assert (dk[5:] == 0).all() and (dv[5:] == 0).all() and (dk[:5] != 0).all() and (dq[:4] == 0).all() and (dq[4] != 0).any()


def test_the_kink_and_the_far_sides_of_the_feature_map():
    """elu + 1 has slope 1 at 0 from both sides; far below it keeps its digits, far above it does not overflow."""
    x = torch.tensor([0.0, -0.0, 40.0, -40.0, 1e4, -1e4], dtype=DOUBLE, requires_grad=True)
    f = module.features(x, "elu")
    (first,) = torch.autograd.grad(f.sum(), x, create_graph=True)
    close(module.through_features(torch.ones_like(x), x, f, "elu"), first)
    close(first.detach(), torch.tensor([1, 1, 1, -40, 1, -1e4], dtype=DOUBLE).clamp_max(0).exp().where(x < 0, 1.0))
    assert f[3] > 0 and torch.autograd.grad(first.sum(), x)[0].isfinite().all()


def test_no_keys_give_zero():
    q, k, v = qkv(2, S=0)
    out, grads = gradients(linear_attention, (q, k, v))
    assert (out == 0).all() and (grads[0] == 0).all() and out.shape == (2, 5, 3)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 4e-3), (torch.float32, 4e-6)])
@pytest.mark.parametrize("name", ["causal", "causal sums"])
def test_dtypes(name, dtype, tolerance):
    xs = qkv(2, 3, L=300, S=300, E=8, Ev=8, dtype=dtype)
    wide = tuple(t.detach().double().requires_grad_() for t in xs)
    got, want = (gradients(functools.partial(f, **OPTIONS[name]), x) for f, x in ((linear_attention, xs), (reference, wide)))
    for g, w in zip((got[0], *got[1]), (want[0], *want[1])):
        assert g.dtype == dtype
        assert (g.double() - w).abs().max() <= tolerance * w.abs().max().clamp_min(1)


def test_under_transforms(small_chunks):
    q, k, v = (t.detach() for t in qkv(2, L=5, S=5))
    batch = torch.stack([q, q.cos(), q.sin()])

    def f(fn):
        return lambda q: fn(q, k, v, is_causal=True)

    close(vmap(f(linear_attention))(batch), torch.stack([f(reference)(x) for x in batch]))
    got = vmap(grad(lambda q: f(linear_attention)(q).sin().sum()))(batch)
    close(got, torch.stack([grad(lambda q: f(reference)(q).sin().sum())(x) for x in batch]))
    close(jvp(f(linear_attention), (q,), (q.cos(),))[1], jvp(f(reference), (q,), (q.cos(),))[1])
    ours, theirs = (hessian(lambda q, g=g: f(g)(q).sin().sum())(q) for g in (linear_attention, reference))
    close(ours, theirs)


@pytest.mark.parametrize("causal", [False, True])
def test_no_tensor_of_L_by_S_is_made(causal):
    """The rule, its backward and the backward's backward, with the causal product run as the operator runs it."""
    L, E = 4000, 8
    f, g, v, dy = (torch.randn(1, L, E) for _ in range(4))
    with Largest() as mode, torch.no_grad():
        if causal:
            module._product(f, g, v, False)
            module._product(v, dy, f, True)
        else:
            o, z = module.forward(f, g, v, False, "elu", True, 1e-6)
            module.backward(dy, None, f, g, v, o, z, False, "elu", True, module.RULE.Need(True, True, True))
    assert 0 < mode.most <= L * (E + 1)
    q, k, v = qkv(2, L=40, S=40)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
        out = linear_attention(q, k, v, is_causal=causal)
    assert sum(kept.values()) == q.numel() + k.numel() + v.numel() + out.numel() + 2 * 40


@pytest.mark.parametrize("shapes", [((2, 1), (1, 3), (3,)), ((), (2,), (2,))])
def test_batch_dimensions_are_broadcast(shapes):
    xs = tuple(qkv(*s)[k] for k, s in enumerate(shapes))
    close(gradients(linear_attention, xs), gradients(reference, xs))


def test_batched_cotangents_and_empty_sizes():
    """Torch's older vmap runs the loop itself, of a single chunk; a last size of 0 leaves nothing to infer a batch from."""
    q, k, v = qkv(2, L=4, S=4)
    out = linear_attention(q, k, v, is_causal=True)
    dout = torch.randn(3, *out.shape, dtype=DOUBLE)
    got = torch.autograd.grad(out, (q, k, v), dout, is_grads_batched=True)
    want = [torch.autograd.grad(reference(q, k, v, is_causal=True), (q, k, v), d) for d in dout]
    close(got, tuple(map(torch.stack, zip(*want))))
    for shape in ((0, 3, 2), (2, 0, 2), (2, 3, 0)):
        xs = tuple(torch.randn(shape, dtype=DOUBLE).requires_grad_() for _ in range(3))
        close(gradients(functools.partial(linear_attention, is_causal=True), xs)[0], reference(*xs, is_causal=True).detach())


t = torch.zeros
ERRORS = {
    "causal": (lambda: linear_attention(t(3, 5), t(4, 5), t(4, 5), True), ValueError, "3 queries and 4 keys"),
    "map": (lambda: linear_attention(t(3, 5), t(4, 5), t(4, 5), feature_map="tanh"), ValueError, "feature_map='tanh'"),
    "own map": (
        lambda: linear_attention(t(3, 5), t(4, 5), t(4, 5), feature_map=lambda x: x[:2]),
        ValueError,
        r"feature_map made \(2, 5\) of query \(3, 5\)",
    ),
    "eps": (lambda: linear_attention(t(3, 5), t(4, 5), t(4, 5), eps=-1.0), ValueError, "eps=-1.0"),
    "features": (lambda: linear_attention(t(3, 5), t(4, 6), t(4, 6)), ValueError, "E is 5 in query"),
    "batch": (lambda: linear_attention(t(2, 3, 5), t(3, 4, 5), t(3, 4, 5)), ValueError, "cannot be broadcast"),
    "backend": (lambda: linear_attention(t(3, 5), t(4, 5), t(4, 5), backend="triton"), ValueError, "no fused kernel"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message) as caught:
        call()
    assert str(caught.value).startswith("linear_attention: ")
