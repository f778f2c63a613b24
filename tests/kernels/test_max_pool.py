"""max_pool's backward by gathering beside the eager rule, which scatters."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from fused import both_rules, each_dtype, normal

import bptoolkit as bp
from bptoolkit.ops.max_pool import RULE
from bptoolkit.ops.windows import layout
from bptoolkit.triton_kernels import max_pool as file


def run(x, n, kernel, stride=None, padding=0, dilation=1, ceil_mode=False, errors=8, **cotangents):
    options = [(o,) * n if isinstance(o, int) else o for o in (kernel, stride or kernel, padding, dilation)]
    return both_rules(RULE, x, *options, ceil_mode, *layout(n, x), cotangents=cotangents, errors=errors)


def last(t):
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.mark.parametrize("shape, n", [((2, 3, 7, 11), 2), ((3, 1, 31, 33), 2), ((4, 130), 1), ((2, 2, 3, 5, 4), 3)], ids=str)
@pytest.mark.parametrize(
    "kernel, stride, padding, dilation", [(2, 2, 0, 1), (3, 2, 1, 1), (3, 1, 1, 1), (2, 3, 1, 1), (2, 1, 0, 2)]
)
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_windows(device, shape, n, kernel, stride, padding, dilation, ceil_mode):
    """That lie apart, side by side, and over one another; more places than a block; without samples."""
    run(normal(*shape, device=device), n, kernel, stride, padding, dilation, ceil_mode)


def test_every_small_window(device):
    for X, k, s, d in product(range(1, 6), range(1, 5), range(1, 4), (1, 2, 3)):
        for p, ceil_mode in product(range(k // 2 + 1), (False, True)):
            if X + 2 * p - d * (k - 1) - 1 + ceil_mode * (s - 1) >= 0 and (k + s + d + p + X) % 8 == 0:
                run(normal(2, 3, X, device=device), 1, k, s, p, d, ceil_mode)


def test_options_of_each_dimension(device):
    run(normal(2, 2, 9, 8, device=device), 2, (3, 2), (1, 2), (1, 0), (2, 1))
    run(normal(2, 5, 4, 9, device=device), 3, (1, 3, 2), (2, 1, 3), (0, 1, 1), (1, 1, 2), True)
    run(normal(1, 1, 15, 15, device=device), 2, 13, 1, 6)


@each_dtype
@pytest.mark.parametrize("stride", [1, 3])
def test_dtypes(device, dtype, stride):
    run(normal(2, 3, 9, 10, dtype=dtype, device=device), 2, 3, stride, 1)


LAYOUTS = {
    "channels last": last,
    "places apart": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "turned": lambda t: t.mT.contiguous().mT,
    "one sample for all": lambda t: t[:1].expand_as(t),
    "one element for all": lambda t: t.flatten()[0].expand_as(t),
}


@pytest.mark.parametrize("of_dy", LAYOUTS)
@pytest.mark.parametrize("n", [2, 3])
def test_layouts(device, of_dy, n):
    """dx is channels_last where x is; i is so then, and dy any way."""
    for of_x in (lambda t: t, last, LAYOUTS["places apart"]):
        x = of_x(normal(2, 3, *(5, 6, 4)[:n], device=device))
        y = getattr(F, f"max_pool{n}d")(x, 2, 1)
        _, (dx,) = run(x, n, 2, 1, dy=LAYOUTS[of_dy](normal(*y.shape, device=device, seed=1)))
        assert dx.is_contiguous(memory_format=torch.channels_last if n == 2 else torch.channels_last_3d) == (of_x is last)


def test_ties_nan_and_infinities(device):
    """The first of equal maxima; NaN is larger than everything; a cotangent that is not finite stays where its place is."""
    x = torch.zeros(1, 2, 6, 6, device=device)
    x[0, 0, 2, 3], x[0, 1] = torch.nan, -torch.inf
    run(x, 2, 3, 1, 1)
    dy = torch.ones(1, 2, 6, 6, device=device)
    dy[0, 0, 1, 1], dy[0, 1, 2, 2] = torch.nan, torch.inf
    _, (dx,) = run(x, 2, 3, 1, 1, dy=dy)
    assert dx.isnan().sum() == 1 and dx.isinf().sum() == 1


def test_windows_that_hold_nothing(device):
    """Dilation steps over all of x, and torch's i is no place in it: no gradient. Or past its end alone: there is one."""
    for kernel, stride, padding, dilation, ceil_mode in (((2, 2), 1, 1, (1, 3), False), ((2, 2), (1, 3), 0, (1, 5), True)):
        x = normal(2, 3, 4, 2 if padding else 4, device=device)
        _, (dx,) = run(x, 2, kernel, stride, padding, dilation, ceil_mode)
        assert bool(dx.any()) == (not padding)


def test_no_samples(device):
    x = normal(0, 3, 4, 4, device=device)
    y, i = file.KERNEL.forward(x, (2, 2), (2, 2), (0, 0), (1, 1), False, (4, 4), False)
    assert file.KERNEL.backward(y, i, (2, 2), (2, 2), (0, 0), (1, 1), (4, 4), False).shape == x.shape


def test_addresses_of_64_bits(device, monkeypatch):
    """As where there are more elements than an int32 counts."""
    monkeypatch.setattr(file, "INT32", 100)  # more than a plane has, less than all of them
    run(normal(2, 3, 9, 10, device=device), 2, 3, 2, 1)


def test_too_many_places():
    """A plane of 2³¹ places and more is the eager rule's."""
    x = torch.empty(1, 1, 1 << 16, 1 << 15, device="meta")
    reason = file.unsupported(x, (2, 2), (2, 2), (0, 0), (1, 1), False, tuple(x.shape[2:]), False)
    assert "are too many" in reason


def test_the_public_functions(device):
    """Gradients by name of the backend are torch's; with return_indices too."""
    for n in (1, 2, 3):
        x, t = (normal(2, 3, *(7, 6, 5)[:n], device=device).requires_grad_() for _ in range(2))
        y, i = getattr(bp.functional, f"max_pool{n}d")(x, 3, 2, 1, return_indices=True, backend="triton")
        z, j = getattr(F, f"max_pool{n}d")(t, 3, 2, 1, return_indices=True)
        y.sin().sum().backward(), z.sin().sum().backward()
        torch.testing.assert_close((y, i, x.grad), (z, j, t.grad))
