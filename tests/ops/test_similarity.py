"""What is special to cosine similarity and distances: zero vectors, small norms, every p, broadcasting, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bptoolkit as bp

f = bp.functional
INF, NAN = float("inf"), float("nan")


def both(ours, theirs, *tensors, **kw):
    found = []
    for fn in (ours, theirs):
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = fn(*leaves, **kw)
        grads = torch.autograd.grad(y, leaves, y.detach().cos() + 2, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in grads), leaves, allow_unused=True, materialize_grads=True)
        found.append((y.detach(), *(g.detach() for g in (*grads, *second))))
    return found


@pytest.mark.parametrize("eps", [1e-8, 0.5, 100.0])
def test_cosine_below_eps(eps):
    """Below eps torch divides by eps and differentiates as if it had not; second derivatives too."""
    x1, x2 = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    x1[0], x1[1], x2[1] = 0.01 * x1[0], 0.1 * x1[1], 0.1 * x2[1]
    got, want = both(f.cosine_similarity, F.cosine_similarity, x1, x2, eps=eps)
    torch.testing.assert_close(got, want)


def test_cosine_of_zero_and_nan():
    x1 = torch.tensor([[0.0, 0.0], [1.0, 2.0], [NAN, 1.0]], dtype=torch.float64)
    x2 = torch.tensor([[1.0, 2.0], [0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    got, want = both(f.cosine_similarity, F.cosine_similarity, x1, x2)
    torch.testing.assert_close(got[:3], want[:3], equal_nan=True)


@pytest.mark.parametrize(
    "shapes, dim", [(((3, 1, 5), (4, 5)), 2), (((3, 4), (4,)), 0), (((2, 3), (2, 3)), -2), (((1, 3), (4, 1)), 1)]
)
def test_cosine_broadcasts(shapes, dim):
    tensors = [torch.randn(s, dtype=torch.float64) for s in shapes]
    torch.testing.assert_close(*both(f.cosine_similarity, F.cosine_similarity, *tensors, dim=dim))


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 7.0, INF])
def test_distances(p):
    """Every kind of norm, with differences of zero, ties of the largest, and equal vectors."""
    x2 = torch.zeros(5, 4, dtype=torch.float64)
    x1 = torch.tensor(
        [[1.0, -2.0, 2.0, 0.5], [0, 0, 0, 0], [0, 3, 0, -1], [-4, 4, 4, 1], [1e-3, 2e3, 1, -1]], dtype=torch.float64
    )
    found, unused = [], {"allow_unused": True, "materialize_grads": True}  # torch's norm of p = 0 is not connected to e
    for fn in (f.pairwise_distance, F.pairwise_distance):
        a, b = x1.clone().requires_grad_(), x2.clone().requires_grad_()
        y = fn(a, b, p, 0.0)
        found.append((y.detach(), *torch.autograd.grad(y, (a, b), torch.arange(1.0, 6.0, dtype=torch.float64), **unused)))
    torch.testing.assert_close(*found)
    away = torch.randn(5, 4, dtype=torch.float64)
    if p:
        torch.testing.assert_close(*both(f.pairwise_distance, F.pairwise_distance, x1, away, p=p, eps=1e-3))


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, INF])
def test_distances_of_nan_and_infinity(p):
    x1 = torch.tensor([[NAN, 1.0], [INF, 1.0], [1.0, 2.0]])
    found = []
    for fn in (f.pairwise_distance, F.pairwise_distance):
        a = x1.clone().requires_grad_()
        y = fn(a, torch.zeros(2), p)
        found.append((y.detach(), torch.autograd.grad(y.sum(), a)[0]))
    torch.testing.assert_close(*found, equal_nan=True)


def test_modules():
    x1, x2 = torch.randn(3, 4), torch.randn(3, 4)
    for ours, theirs in (
        (bp.nn.CosineSimilarity(0, 0.1), nn.CosineSimilarity(0, 0.1)),
        (bp.nn.PairwiseDistance(3.0, 0.1, True), nn.PairwiseDistance(3.0, 0.1, True)),
    ):
        assert repr(ours) == repr(theirs) and not ours.state_dict()
        torch.testing.assert_close(ours(x1, x2), theirs(x1, x2))
        ours.backend = "triton"
        with pytest.raises(ValueError, match="triton"):
            ours(x1, x2)


def test_errors():
    x = torch.ones(2, 3)
    for fn, name in ((f.cosine_similarity, "cosine_similarity"), (f.pairwise_distance, "pairwise_distance")):
        with pytest.raises(ValueError, match=rf"{name}: x1 has shape \(2, 3\) but x2 \(2,\)"):
            fn(x, torch.ones(2))
        with pytest.raises(TypeError, match=rf"{name}: x2 is torch.float64"):
            fn(x, x.double())
    with pytest.raises(ValueError, match="cosine_similarity: dim=2"):
        f.cosine_similarity(x, x, 2)


def test_what_torch_takes_too():
    """A norm of negative p, and scalars as vectors of one."""
    torch.manual_seed(0)
    for ours, theirs, shape in (
        (lambda x, y: f.pairwise_distance(x, y, -1.0), lambda x, y: F.pairwise_distance(x, y, -1.0), (2, 3)),
        (lambda x, y: f.cosine_similarity(x, y, 0), lambda x, y: F.cosine_similarity(x, y, 0), ()),
    ):
        x, y = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
        got, want = ours(x, y), theirs(x, y)
        dy = torch.randn(got.shape, dtype=torch.float64)
        torch.testing.assert_close((got, torch.autograd.grad(got, (x, y), dy)), (want, torch.autograd.grad(want, (x, y), dy)))
