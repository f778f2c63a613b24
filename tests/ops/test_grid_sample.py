"""What is special to grid_sample and affine_grid: every mode beside torch's, kinks, places outside, and infinities there."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F

import bptoolkit as bp

close = torch.testing.assert_close
f = bp.functional
WAYS = [
    w
    for w in product((2, 3), ("bilinear", "nearest", "bicubic"), ("zeros", "border", "reflection"), (False, True))
    if w[:2] != (3, "bicubic")
]


def draws(*shape, scale=1.0):
    g = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=g, dtype=torch.float64) * scale).requires_grad_()


def both(x, g, *options):
    results = []
    for sample in (f.grid_sample, F.grid_sample):
        y = sample(x, g, *options)
        results.append((y, torch.autograd.grad(y.square().sum(), (x, g), allow_unused=True, materialize_grads=True)))
    close(*results)


@pytest.mark.parametrize("X", [(5, 4, 3), (1, 2, 1)])
def test_all_modes_are_torchs(X):
    for n, *options in WAYS:
        both(draws(2, 3, *X[-n:]), draws(2, *(4, 3, 2)[-n:], n, scale=1.3), *options)


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
def test_large_enough_for_parts(mode):
    """A few samples at a time, in place; the same as what is differentiated."""
    x, g = draws(9, 24, 32, 32), draws(9, 40, 40, 2, scale=0.6)
    both(x, g, mode, "zeros", False)
    y = f.grid_sample(x, g, mode, "zeros", False)
    at = (x,) if mode == "nearest" else (x, g)
    parts = torch.autograd.grad(y.sum(), at, retain_graph=True)
    close(parts, torch.autograd.grad(y.sum(), at, create_graph=True))


@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("align", [False, True])
def test_kinks_and_places_outside(padding, align):
    """Centres and edges of elements, far away, infinity and NaN."""
    x = draws(1, 2, 4, 4)
    line = torch.tensor([-1.0, 1, 0, -0.75, 0.25, 0.5, -1.25, 1.25, 3, -7, 1e6], dtype=torch.float64)
    g = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).unsqueeze(0).requires_grad_()
    for mode in ("bilinear", "nearest"):
        both(x, g, mode, padding, align)
    odd = torch.tensor([[[[torch.nan, 0.1], [torch.inf, 0.2], [-torch.inf, 0.0]]]], dtype=torch.float64, requires_grad=True)
    y = f.grid_sample(x, odd, "bilinear", padding, align)
    close(y, F.grid_sample(x, odd, "bilinear", padding, align), equal_nan=True)
    assert all(t.isfinite().all() for t in torch.autograd.grad(y.nan_to_num().sum(), x))


def test_what_is_outside_touches_nothing():
    """An infinite gradient there, or an infinite element that no place reaches, leaves the others as they are."""
    x, g = draws(1, 1, 2, 2), torch.tensor([[[[5.0, 5.0], [0.5, 0.5]]]], dtype=torch.float64, requires_grad=True)
    dy = torch.tensor([[[[torch.inf, 1.0]]]], dtype=torch.float64)
    dx, dg = torch.autograd.grad(f.grid_sample(x, g, align_corners=False), (x, g), dy)
    assert dx.isfinite().all() and dg.isfinite().all()
    close(dx, torch.autograd.grad(F.grid_sample(x, g, align_corners=False), x, dy)[0])  # torch's dg is NaN


def test_spatial_transformer_to_second_order():
    """Theta to grid to image, as one function: its hessian against finite differences of its gradient."""
    x = draws(1, 2, 5, 5).detach()
    theta = torch.tensor([[[0.9, 0.2, 0.05], [-0.1, 0.8, 0.1]]], dtype=torch.float64)

    def loss(t):
        return f.grid_sample(x, f.affine_grid(t, (1, 2, 3, 3), False), "bicubic", "zeros", False).square().sum()

    H, grad = torch.func.hessian(loss)(theta).reshape(6, 6), torch.func.grad(loss)
    steps = torch.eye(6, dtype=torch.float64).reshape(6, 1, 2, 3) * 1e-5
    close(H, torch.stack([(grad(theta + s) - grad(theta - s)).flatten() / 2e-5 for s in steps]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("align", [False, True])
def test_affine_grid(align):
    for size in ((2, 3, 4, 5), (2, 1, 1, 3), (2, 2, 3, 1, 4)):
        theta = draws(2, len(size) - 2, len(size) - 1)
        got, want = f.affine_grid(theta, size, align), F.affine_grid(theta, size, align)
        dy = draws(*want.shape).detach()
        close((got, torch.autograd.grad(got, theta, dy)), (want, torch.autograd.grad(want, theta, dy)))
    with pytest.warns(UserWarning, match="align_corners"):
        f.affine_grid(theta, size)


def test_errors():
    x, g = draws(2, 3, 4, 4), draws(2, 5, 5, 2)
    for args, message in (
        ((x, g, "cubic"), "mode='cubic'"),
        ((x, g, "bilinear", "same"), "padding_mode='same'"),
        ((x, g[:1]), r"grid \(1, 5, 5, 2"),
        ((x, draws(2, 5, 5, 3)), r"grid \(2, 5, 5, 3"),
        ((x[:, :0], g), "only the number of samples"),
        ((draws(1, 1, 2, 2, 2), draws(1, 2, 2, 2, 3), "bicubic"), "for images"),
    ):
        with pytest.raises(ValueError, match=message):
            f.grid_sample(*args, align_corners=False)
    with pytest.raises(TypeError, match=r"grid is torch\.float32"):
        f.grid_sample(x, g.float(), align_corners=False)
    with pytest.raises(ValueError, match="theta has shape"):
        f.affine_grid(draws(2, 2, 3), (1, 3, 4, 4), False)
