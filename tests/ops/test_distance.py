"""What is special to cdist and pdist: zero distances and ties, broadcasting, products, the jacobian that torch has wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import bptoolkit as bp

close = torch.testing.assert_close
f = bp.functional
PS = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, float("inf"))


def double(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)), requires_grad=True)


@pytest.mark.parametrize("p", PS)
def test_kinks_are_torchs(p):
    """Equal rows, equal elements, and ties of the largest."""
    x = torch.tensor([[0.0, 0, 0], [1, -1, 0.5], [0, 0, 0], [1, 1, 1]], dtype=torch.float64, requires_grad=True)
    z = torch.tensor([[0.0, 0, 0], [2, 1, -1]], dtype=torch.float64, requires_grad=True)
    for ours, theirs, args in ((f.cdist, torch.cdist, (x, z)), (f.pdist, F.pdist, (x,))):
        y, want = ours(*args, p), theirs(*args, p)
        dy = torch.arange(1.0, 1 + y.numel(), dtype=torch.float64).view_as(y)
        close((y, torch.autograd.grad(y, args, dy)), (want, torch.autograd.grad(want, args, dy)))
    g = torch.autograd.grad(f.cdist(x, z, p).sin().sum(), x, create_graph=True)[0]
    if g.requires_grad:
        assert torch.autograd.grad(g.square().sum(), x)[0].isfinite().all()


def test_products_are_as_good_as_differences():
    """Where torch uses them in forward; also far from the origin, where x·x alone would lose all digits."""
    for shift in (0.0, 1e4):
        x, z = (double(1, n, 6).detach().add(shift).requires_grad_() for n in (30, 28))
        dy = double(1, 30, 28).detach()
        got = torch.autograd.grad(f.cdist(x, z), (x, z), dy)
        want = torch.autograd.grad(f.cdist(x, z, 2.0, "donot_use_mm_for_euclid_dist"), (x, z), dy)
        close(got, want, rtol=1e-6, atol=1e-5 if shift else 1e-9)
    close(got, torch.autograd.grad(torch.cdist(x, z), (x, z), dy), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, float("inf")])
def test_in_parts_is_the_same(p):
    """Large enough for the backward to take a few rows at a time."""
    x, z = double(200, 32), double(60, 32)
    args = (p, "donot_use_mm_for_euclid_dist")
    parts = torch.autograd.grad(f.cdist(x, z, *args).square().sum(), (x, z))
    close(parts, torch.autograd.grad(f.cdist(x, z, *args).square().sum(), (x, z), create_graph=True))
    (part,) = torch.autograd.grad(f.pdist(x, p).square().sum(), x)
    (whole,) = torch.autograd.grad(F.pdist(x, p).square().sum(), x)
    close(part, whole)


def test_jacobians():
    """`torch.func.jacrev(torch.cdist)` is wrong; so the definition."""
    x, z = double(3, 4).detach(), double(2, 4).detach()
    want = torch.autograd.functional.jacobian(lambda t: torch.cdist(t, z), x)
    close(torch.func.jacrev(f.cdist)(x, z), want)
    close(torch.func.jacfwd(f.cdist)(x, z), want)


def test_pairs_of_many_rows():
    from bptoolkit.ops.distance import pairs

    for N in (0, 1, 2, 3, 100, 1001):
        close(torch.stack(pairs(N, "cpu")), torch.triu_indices(N, N, 1))


def test_broadcasting_and_halves():
    x, z = double(2, 1, 3, 4), double(5, 6, 4)
    y = f.cdist(x, z)
    assert y.shape == (2, 5, 3, 6)
    close(torch.autograd.grad(y.sum(), (x, z)), torch.autograd.grad(torch.cdist(x, z).sum(), (x, z)))
    h = x[0, 0].bfloat16().detach().requires_grad_()
    assert f.pdist(h).dtype == torch.autograd.grad(f.pdist(h).sum(), h)[0].dtype == torch.bfloat16
    close(f.pdist(h), F.pdist(h.float()).bfloat16())


def test_near_and_equal_rows_far_from_the_origin():
    """Where products of float32 would leave no digit: pdist's are of float64."""
    x = torch.randn(40, 8)
    x[20:] = x[:20] + 1e-5 * torch.randn(20, 8)
    x[39] = x[0]
    x = (x + 30).requires_grad_()
    (got,) = torch.autograd.grad(f.pdist(x).sum(), x)
    close(got, torch.autograd.grad(F.pdist(x).sum(), x)[0], rtol=1e-5, atol=1e-5)


def test_errors():
    for call, message in (
        (lambda: f.cdist(double(3, 4), double(2, 4), -1), "p=-1"),
        (lambda: f.cdist(double(3, 4), double(2, 5)), "M is 4 in x1"),
        (lambda: f.cdist(double(3, 4), double(2, 4), 2.0, "mm"), "compute_mode='mm'"),
        (lambda: f.cdist(double(2, 3, 4), double(3, 2, 4)), "cannot be broadcast"),
        (lambda: f.pdist(double(2, 3, 4)), "2, 3, 4"),
        (lambda: f.pdist(double(3, 4), float("nan")), "p=nan"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_triplets_by_any_distance(swap, reduction):
    def chebyshev(x, y):
        return (x - y).abs().amax(-1)

    tensors = double(7, 5), double(1, 5), double(7, 5, 1).squeeze(2)
    for distance in (None, chebyshev, torch.nn.PairwiseDistance(p=1)):
        theirs = torch.nn.TripletMarginWithDistanceLoss(distance_function=distance, swap=swap, reduction=reduction)
        want = theirs(*tensors)
        bp.swap(theirs)
        assert type(theirs) is bp.nn.TripletMarginWithDistanceLoss
        got = theirs(*tensors)
        close((got, torch.autograd.grad(got.sum(), tensors)), (want, torch.autograd.grad(want.sum(), tensors)))
    with pytest.raises(ValueError, match="margin=0"):
        f.triplet_margin_with_distance_loss(*tensors, margin=0)
