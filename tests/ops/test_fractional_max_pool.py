"""What is special to fractional_max_pool: where its windows lie, indices, ties and NaN, and what it draws."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import bptoolkit as bp

close = torch.testing.assert_close
CALLS = {
    2: (bp.functional.fractional_max_pool2d, F.fractional_max_pool2d),
    3: (bp.functional.fractional_max_pool3d, F.fractional_max_pool3d),
}
MODULES = {2: torch.nn.FractionalMaxPool2d, 3: torch.nn.FractionalMaxPool3d}


@pytest.mark.parametrize("n", [2, 3])
def test_draws_what_torch_draws(n):
    """For one seed the windows are torch's, by size and by ratio, batched or not; and max_unpool takes the indices."""
    for batch in ((2,), ()):
        x = torch.randn(*batch, 3, *(9, 8, 7)[-n:])
        x.requires_grad_()
        for options in ({"output_size": (4, 3, 2)[-n:]}, {"output_ratio": (0.5, 0.6, 0.4)[-n:]}):
            results = []
            for call in CALLS[n]:
                torch.manual_seed(3)
                y, i = call(x, 2, **options, return_indices=True)
                results.append((y, i, torch.autograd.grad(y.square().sum(), x), torch.rand(1)))
            close(*results)
            close(x.flatten(-n).gather(-1, i.flatten(-n)).view_as(y), y)


@pytest.mark.parametrize("n", [2, 3])
def test_module_and_swap(n):
    u = torch.rand(2, 3, n)
    module, x = MODULES[n](2, output_ratio=0.5, _random_samples=u), torch.randn(2, 3, *(8,) * n)
    want = module(x)
    bp.swap(module)
    assert type(module).__module__.startswith("bptoolkit")
    close(module(x), want)
    assert list(module.state_dict()) == ["_random_samples"]


def test_overlap_ties_and_nan():
    """Windows share elements, the first of equal ones counts, NaN wins."""
    u = torch.zeros(1, 1, 2, dtype=torch.float64)
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    x[0, 0, 1, 1], x[0, 0, 3, 3] = 1, torch.nan
    x.requires_grad_()
    results = []
    for call in CALLS[2]:
        y = call(x, 2, (3, 3), _random_samples=u)
        results.append((y, torch.autograd.grad(y, x, torch.arange(1.0, 10, dtype=torch.float64).view_as(y))))
    close(*results, equal_nan=True)
    assert results[0][1][0][0, 0, 1, 1] == 1 + 2 + 4 + 5


@pytest.mark.parametrize("n", [2, 3])
def test_plain_windows_are_the_kernels(n):
    from bptoolkit.ops.fractional_max_pool import KERNELS, plain_forward

    for Y in ((4, 3, 2)[-n:], (1, 2, 1)[-n:]):
        args = (2, 3, 2)[-n:], Y, (9, 8, 7)[-n:]
        x, u = torch.randn(2, 3, *args[2]), torch.rand(2, 3, n)
        close(plain_forward(x, u, *args), KERNELS[n](x, args[0], Y, u))


def test_errors():
    pool, x = CALLS[2][0], torch.randn(2, 3, 5, 5)
    for args, kwargs, message in (
        ((x, 2), {}, "output_size and output_ratio"),
        ((x, 3, 4), {}, "at least size 6"),
        ((x, 2, None, (0.5,)), {}, "output_ratio"),
        ((x, 2, 2), {"_random_samples": torch.rand(1, 3, 2)}, r"needs \(2, 3, 2"),
        ((x, 2, 2), {"_random_samples": torch.rand(2, 3, 2).double()}, "torch.float64"),
        ((x[:, :0], 2, 2), {}, "number of samples"),
    ):
        with pytest.raises(ValueError, match=message):
            pool(*args, **kwargs)
    with pytest.raises(ValueError, match="at least size 6"):
        CALLS[3][0](torch.randn(1, 1, 5, 5, 5), 3, 3)
