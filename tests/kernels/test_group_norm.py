"""group_norm's kernel beside its eager rule."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fused import DTYPES, GIVEN_AND_NEEDED, LAYOUTS, both_rules, each_dtype, normal

import bptoolkit as bp
from bptoolkit.ops.group_norm import RULE
from bptoolkit.triton_kernels import group_norm as file


def run(x, w, b, G, *, need=(True, True, True), eps=1e-5, errors=16, **cotangents):
    return both_rules(RULE, x, w, b, G, eps, need=need, cotangents=cotangents, errors=errors)


# N, C, G, positions. Groups that are held whole, on both sides of a tile in channels and positions; then longer ones:
# one tile of many channels, many tiles of one, several in both directions with rests.
SIZES = [
    *((2, 6, G, (5, 7)) for G in (1, 2, 6)),
    (3, 4, 2, ()),
    (1, 33, 3, (1,)),
    (2, 8, 2, (64,)),
    (1, 5, 1, (1025,)),
    (1, 2, 1, (file.HELD // 2,)),
    (1, 2, 1, (file.HELD // 2 + 1,)),
    (2, 70, 1, (11, 13)),
    (1, 18, 1, (file.TILE // 8 - 3,)),
    (1, 6, 2, (file.TILE + 5,)),
]


@pytest.mark.parametrize("N, C, G, inner", SIZES)
def test_sizes(device, N, C, G, inner):
    w, b = (normal(C, device=device, seed=k) for k in (4, 5))
    run(normal(N, C, *inner, device=device) + 1, w, b, G)


LONG = (1, 4, 2, (file.TILE + 9,))
SHORT = (3, 4, 2, (5,))


@each_dtype
@pytest.mark.parametrize("parameters", ["same", "float32", "none"])
@pytest.mark.parametrize("N, C, G, inner", [SHORT, LONG], ids=["short", "long"])
def test_dtypes(device, dtype, parameters, N, C, G, inner):
    w, b = (normal(C, dtype=DTYPES.get(parameters, dtype), device=device, seed=k) for k in (4, 5))
    w, b = (None, None) if parameters == "none" else (w, b)
    run(normal(N, C, *inner, dtype=dtype, device=device) + 2, w, b, G, need=(True, w is not None, b is not None))


@pytest.mark.parametrize("N, C, G, inner", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("w, b, need", GIVEN_AND_NEEDED, ids=str)
@pytest.mark.parametrize("cotangents", [(True, False, False), (True, True, True), (False, True, False), (False, False, True)])
def test_what_is_given_and_needed(device, N, C, G, inner, w, b, need, cotangents):
    x = normal(N, C, *inner, device=device) + 1
    w, b = (normal(C, device=device, seed=k) if given else None for k, given in ((4, w), (5, b)))
    run(x, w, b, G, need=need, **{name: None for name, given in zip(("dy", "dm", "dr"), cotangents) if not given})


@pytest.mark.parametrize("of_dy", LAYOUTS)
@pytest.mark.parametrize("of_x", LAYOUTS)
def test_layouts(device, of_x, of_dy):
    x, dy = (LAYOUTS[of](normal(2, 6, 4, 5, device=device, seed=k)) for k, of in enumerate((of_x, of_dy)))
    w, b = normal(12, 2, device=device, seed=2).t()[:, ::2]
    run(x, w, b, 3, dy=dy, eps=0.5)


@pytest.mark.parametrize("N, C, G, inner", [(2, 6, 2, (4, 5)), (1, 6, 2, (50, 90))], ids=["short", "long"])
@pytest.mark.parametrize("of_x, of_dy", [(True, True), (True, False), (False, True)])
def test_channels_last(device, N, C, G, inner, of_x, of_dy):
    x, dy = (normal(N, C, *inner, device=device, seed=k) for k in range(2))
    x, dy = (
        t.contiguous(memory_format=torch.channels_last) if last else t.transpose(2, 3).contiguous().transpose(2, 3)
        for t, last in ((x, of_x), (dy, of_dy))
    )
    run(x, normal(C, device=device, seed=4), normal(C, device=device, seed=5), G, dy=dy)


@pytest.mark.parametrize("shape, G", [((0, 4), 2), ((3, 4, 0), 2), ((0, 4, 5), 4), ((2, 4, 3, 0), 1)], ids=str)
def test_zero_sizes(device, shape, G):
    w = normal(4, device=device)
    run(normal(*shape, device=device), w, w, G)


@pytest.mark.parametrize("C, G, I", [(4, 2, 300), (3, 1, file.TILE + 1)])
def test_large_mean(device, C, G, I):
    x = normal(1, C, I, device=device) + 1000
    y, m, r = file.KERNEL.forward(x, None, None, G, 1e-5)
    dx = file.KERNEL.backward(x.cos(), None, None, x, None, None, m, r, G, RULE.Need(True, False, False))[0]
    x2 = x.double().requires_grad_()
    y2 = F.group_norm(x2, G)
    for got, want in ((y, y2), (dx, torch.autograd.grad(y2, x2, x.cos().double())[0])):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2 * 1000 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_first_tile_far_from_the_others(device, shift):
    """What it is measured from is then far from the mean, which costs bits; the variance is as large, which saves them."""
    x = normal(1, 6, file.TILE, device=device)
    x[:, 0] += shift
    run(x, None, None, 1, need=(True, False, False), errors=64)


def test_constant_groups_without_eps(device):
    """A variance of 0 is not a negative one by rounding."""
    x = torch.full((1, 3, file.TILE + 1), 0.1, device=device)
    _, _, r = file.KERNEL.forward(x, None, None, 1, 0.0)
    assert not r.isnan().any()


@pytest.mark.parametrize("inner", [(20,), (file.TILE + 20,)])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_one_group_that_is_not_finite(device, inner, bad):
    x = normal(2, 6, *inner, device=device)
    x[1, 2, 3] = bad
    y, m, r = file.KERNEL.forward(x, None, None, 3, 1e-5)
    dx = file.KERNEL.backward(x.cos(), None, None, x, None, None, m, r, 3, RULE.Need(True, False, False))[0]
    want = torch.zeros_like(x, dtype=torch.bool)
    want[1, 2:4] = True
    assert torch.equal(y.isnan(), want) and torch.equal(dx.isnan(), want)


def test_module_and_public_function(device):
    ours, theirs = (cls(2, 4, device=device) for cls in (bp.nn.GroupNorm, torch.nn.GroupNorm))
    ours.backend = "triton"
    x, y = (normal(5, 4, 3, 4, device=device).requires_grad_() for _ in range(2))
    for m, t in ((ours, x), (theirs, y)):
        m(t).sin().sum().backward()
    got, want = ((t.grad, m.weight.grad, m.bias.grad) for m, t in ((ours, x), (theirs, y)))
    torch.testing.assert_close(got, want)
    long = normal(1, 1, 1, device=device).expand(1, 1, file.LONGEST + 1)
    with pytest.raises(ValueError, match=f"group_norm: backend='triton' cannot run here: a group of {file.LONGEST + 1}"):
        bp.functional.group_norm(long, 1, backend="triton")
