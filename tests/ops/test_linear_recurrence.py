"""linear_recurrence: blocks and steps, lengths, resets, layouts, accuracy, what is saved, what is refused."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.func import jvp, vmap

import bptoolkit as bp
from bptoolkit.bench import saved_bytes
from bptoolkit.function import unwatched
from bptoolkit.ops import linear_recurrence as family

close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
F, reference = bp.functional.linear_recurrence, family.reference
DOUBLE = torch.float64
SIZES = [(1, 1), (2, 3), (31, 1), (32, 1), (33, 2), (36, 3), (37, 5), (100, 512), (100, 513), (1025, 2), (2051, 513)]


def draw(*shape, seed=1, dtype=DOUBLE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


def decays(*shape, seed=2, low=-1.0, high=1.0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE) * (high - low) + low


def with_gradients(fn, *tensors, seed=5, **kw):
    """Output and gradients for a random cotangent."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = fn(*leaves, **kw)
    return out.detach(), *torch.autograd.grad(out, leaves, draw(*out.shape, seed=seed).to(out))


@pytest.mark.parametrize(("T", "N"), SIZES)
@pytest.mark.parametrize("reverse", [False, True])
def test_blocks_and_steps(T, N, reverse):
    """Either side of every size at which the loop changes its way, its segments and its blocks that are not full."""
    args = decays(T, 1, N), draw(T, 1, N), draw(1, N, seed=3)
    close(with_gradients(F, *args, reverse=reverse), with_gradients(reference, *args, reverse=reverse))


@pytest.mark.parametrize("reverse", [False, True])
def test_no_steps_send_nothing_back(reverse):
    """The gradient of h0 is zero, not h0."""
    h0 = draw(2, 3).requires_grad_()
    h = F(draw(0, 2, 3), draw(0, 2, 3), h0, reverse=reverse)
    assert torch.equal(torch.autograd.grad(h.sum(), h0)[0], torch.zeros(2, 3, dtype=DOUBLE))


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("T", "N"), [(1, 2), (5, 2), (50, 2), (50, 600), (1030, 520)])
def test_the_loop_in_place_is_the_readable_one(T, N, reverse, shift):
    a, b, h0 = decays(T, 1, N), draw(T, 1, N), None if shift else draw(1, N)
    assert unwatched(a) is False
    with torch.no_grad():
        close(family.loop_fast(a, b, h0, reverse, shift), family.loop(a, b, h0, reverse, shift))


def test_a_long_sequence_in_segments(monkeypatch):
    """Blocks inside segments, the last one too short for blocks."""
    monkeypatch.setattr(family, "SEGMENT", 40)
    a, b, h0 = decays(131, 1, 1), draw(131, 1, 1), draw(1, 1)
    for reverse in (False, True):
        close(with_gradients(F, a, b, h0, reverse=reverse), with_gradients(reference, a, b, h0, reverse=reverse))


@pytest.mark.parametrize("reverse", [False, True])
def test_lengths_are_rows_of_their_own(reverse):
    """Each row as if it were alone and short; NaN past its end is not read, forward or backward."""
    T, lengths = 40, torch.tensor([40, 7, 0, 33])
    past = (torch.arange(T)[:, None] >= lengths)[..., None]
    a, b, h0 = decays(T, 4, 2), draw(T, 4, 2), draw(4, 2, seed=9)
    cotangent = draw(T, 4, 2, seed=5)
    leaves = [t.clone().requires_grad_() for t in (a.masked_fill(past, torch.nan), b.masked_fill(past, torch.nan), h0)]
    out = F(*leaves, reverse=reverse, lengths=lengths)
    grads = torch.autograd.grad(out, leaves, cotangent.masked_fill(past, torch.nan))
    assert bool((out[past.expand_as(out)] == 0).all()) and not any(g.isnan().any() for g in grads)
    for k, n in enumerate(lengths.tolist()):
        row = [t.clone().requires_grad_() for t in (a[:n, k], b[:n, k], h0[k])]
        if not n:
            close(grads[2][k], torch.zeros(2, dtype=DOUBLE))
            continue
        want = reference(*row, reverse=reverse)
        close(out[:n, k], want)
        wanted = torch.autograd.grad(want, row, cotangent[:n, k])
        close((grads[0][:n, k], grads[1][:n, k], grads[2][k]), wanted)


def test_resets_cut():
    """Two sequences one after the other, a reset between, are two calls; resets of (T,), (T, B) and the whole shape."""
    a, b, h0 = decays(50, 3, 2), draw(50, 3, 2), draw(3, 2)
    resets = torch.zeros(50, dtype=torch.bool)
    resets[20] = True
    whole = with_gradients(F, a, b, h0, resets=resets)
    first, second = with_gradients(F, a[:20], b[:20], h0, seed=5), with_gradients(F, a[20:], b[20:])
    close(whole[0], torch.cat([first[0], second[0]]))
    assert bool((whole[1][20] == 0).all())
    close(F(a, b, h0, resets=resets[:, None].expand(50, 3)), whole[0])
    close(F(a, b, h0, resets=resets[:, None, None].expand(50, 3, 2)), whole[0])


def test_zero_decays_are_resets():
    a, b = decays(64, 2, 3), draw(64, 2, 3)
    a[17] = 0
    close(F(a, b)[17:], F(a[17:], b[17:]))
    close(F(torch.zeros_like(a), b), b)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_any_dimension_and_layout(dim):
    shape = (40, 33, 35)
    a, b = decays(*shape[::-1]).permute(2, 1, 0), draw(*shape)
    close(with_gradients(F, a, b, dim=dim), with_gradients(reference, a, b, dim=dim))
    flat = decays(70), draw(70), draw(1).squeeze()
    close(with_gradients(F, *flat), with_gradients(reference, *flat))


def test_a_broadcast_decay():
    a, b = decays(3), draw(40, 2, 3)
    close(with_gradients(F, a, b), with_gradients(lambda a, b: reference(a.expand_as(b), b), a, b))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.999, 1.0), (-1.0, -0.99), (0.9, 1.02)])
@pytest.mark.parametrize("N", [4, 600])
def test_accuracy_against_float64(dtype, bound, low, high, N):
    """|a| near 1 and above: errors are a few roundings of the largest h, whichever way the loop goes."""
    a, b = decays(700, 1, N, low=low, high=high).to(dtype), draw(700, 1, N, dtype=dtype)
    got, want = with_gradients(F, a, b), with_gradients(reference, a.double(), b.double())
    for g, w in zip(got, want):
        assert g.dtype is dtype
        scale = w.abs().amax()
        assert float((g.double() - w).abs().amax() / scale) < bound * (20 if g is got[1] else 4)


def test_products_of_large_decays_overflow_where_no_state_does():
    """1e30 · 1e30 · … from zero is zero, and with b it is what the steps say, infinities and NaN too."""
    a, b = torch.full((64, 1, 1), 1e30), torch.zeros(64, 1, 1)
    close(F(a, b), b)
    b[60] = 1.0
    want = reference(a, b)
    assert bool(want.isinf().any())
    torch.testing.assert_close(F(a, b), want, equal_nan=True)
    b[10] = torch.nan
    torch.testing.assert_close(F(a * 0 + 0.5, b), reference(a * 0 + 0.5, b), equal_nan=True)


@pytest.mark.parametrize("T", [100, 4])
def test_what_is_saved(T):
    """A and h, not b: two of three."""
    a, b = decays(T, 8, 16).requires_grad_(), draw(T, 8, 16).requires_grad_()
    whole = a.numel() * 8
    assert saved_bytes(lambda: F(a, b)) <= 2 * whole + 2 * 8 * 16 * 8
    assert saved_bytes(lambda: F(a.detach(), b)) <= whole + 8 * 16 * 8


def test_transforms_across_blocks():
    a, b, h0 = decays(3, 40, 1, 2), draw(3, 40, 1, 2), draw(3, 1, 2)
    close(vmap(F)(a, b, h0), torch.stack([reference(*x) for x in zip(a, b, h0)]))
    args = (a[0], b[0], h0[0])
    tangents = tuple(draw(*t.shape, seed=7) for t in args)
    close(jvp(F, args, tangents), jvp(reference, args, tangents))
    leaves = [t.requires_grad_() for t in args]

    def second(fn):
        grads = torch.autograd.grad(fn(*leaves).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in grads), leaves)

    close(second(F), second(reference))


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_scan_by_finite_differences(shift, reverse):
    """Both forms, to second order and in forward mode: a backward is a scan of the other form."""
    a, b, h0 = (t.requires_grad_() for t in (decays(4, 1, 2), draw(4, 1, 2), draw(1, 2)))
    tensors = (a, b) if shift else (a, b, h0)

    def run(a, b, h0=None):
        return family.scan(a, b, h0, reverse, shift)

    assert torch.autograd.gradcheck(run, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, tensors)


def test_refusals():
    a = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"a has shape \(4, 2\), which does not broadcast to that of b, \(3, 2\)"):
        F(torch.ones(4, 2), a)
    with pytest.raises(ValueError, match=r"h0 has shape \(3,\); .* needs \(2,\)"):
        F(a, a, torch.ones(3))
    with pytest.raises(ValueError, match="dim=2 is out of range"):
        F(a, a, dim=2)
    with pytest.raises(TypeError, match=r"a is torch.float64 but b is torch.float32"):
        F(a.double(), a)
    with pytest.raises(TypeError, match=r"resets must be a bool tensor, not torch.float32"):
        F(a, a, resets=a)
    with pytest.raises(ValueError, match=r"resets has shape \(2,\)"):
        F(a, a, resets=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="lengths go from 2 to 4"):
        F(a, a, lengths=torch.tensor([2, 4]))
    with pytest.raises(TypeError, match=r"b is torch.int64"):
        F(a, a.long())
