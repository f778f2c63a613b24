"""What is special to spectral_norm: the power iteration, torch's parametrization, and that its vectors are constants."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils import parametrizations, parametrize

import bptoolkit as bp

close = torch.testing.assert_close


@pytest.mark.parametrize(("make", "dim"), [(lambda: torch.nn.Linear(5, 4), 0), (lambda: torch.nn.ConvTranspose2d(3, 4, 2), 1)])
def test_parametrization_is_torchs(make, dim):
    """Values, gradients and the vectors' updates, over steps of training and in evaluation; states go from one to the other."""
    layers = []
    for _ in range(2):
        torch.manual_seed(0)
        layers.append(make().double())
    parametrizations.spectral_norm(layers[0], dim=dim)
    parametrize.register_parametrization(layers[1], "weight", bp.nn.SpectralNorm(layers[1].weight, dim=dim))
    layers[1].load_state_dict(layers[0].state_dict(), strict=True)
    for training in (True, True, False):
        results = []
        for layer in layers:
            layer.train(training)
            loss = layer.weight.sin().sum() + layer.weight[0].square().sum()  # two forwards before one backward
            grads = torch.autograd.grad(loss, list(layer.parameters()), allow_unused=True)
            results.append((loss, [g for g in grads if g is not None], list(layer.buffers())))
        close(*results)


def test_converges_to_the_largest_singular_value():
    w = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    u, v = torch.ones(6, dtype=torch.float64) / 6**0.5, torch.ones(4, dtype=torch.float64) / 2
    y = bp.functional.spectral_norm(w, u, v, n_power_iterations=2000, training=True)
    close(y, w / torch.linalg.matrix_norm(w, 2))
    dy = torch.randn(6, 4, dtype=torch.float64)
    close(torch.autograd.grad(y, w, dy), torch.autograd.grad(w / torch.linalg.matrix_norm(w, 2), w, dy))


def test_vectors_and_arguments():
    w, u, v = torch.randn(3, 4, 2, requires_grad=True), torch.ones(4, requires_grad=True), torch.ones(6)
    y = bp.functional.spectral_norm(w, u, v, dim=1)
    close(y, w / torch.einsum("ahb->", w))
    assert torch.autograd.grad(y.sum(), (w, u), allow_unused=True)[1] is None
    assert bp.nn.SpectralNorm(torch.randn(3))(torch.ones(4)).tolist() == [0.5] * 4
    for args, message in (((w, u, v), "do not go with"), ((w, u, v, 3), "dim=3"), ((w[0, 0], u, v), "dim=0")):
        with pytest.raises(ValueError, match=message):
            bp.functional.spectral_norm(*args)
    with pytest.raises(ValueError, match="at least 1"):
        bp.nn.SpectralNorm(w, 0)
