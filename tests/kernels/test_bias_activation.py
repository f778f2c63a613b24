"""bias_activation's kernels beside their eager rules."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from fused import LAYOUTS, both_rules, each_dtype, normal

import bptoolkit as bp
from bptoolkit.ops import bias_activation as op
from bptoolkit.triton_kernels import bias_activation as file

NAMES = ("relu", "silu", "gelu", "gelu_tanh")
each = pytest.mark.parametrize("name", NAMES)
INF, NAN = float("inf"), float("nan")


def run(name, x, b, **kw):
    return both_rules(op.RELU_RULE, x, b, **kw) if name == "relu" else both_rules(op.RULE, x, b, name, **kw)


def arguments(M, N, dtype=torch.float32, device="cpu"):
    return normal(M, N, dtype=dtype, device=device) * 2, normal(N, dtype=dtype, device=device, seed=4)


# Rows and columns: either side of a tile, one and several tiles to a program (at most six programs in the interpreter).
SIZES = [
    *product((1, 7, 8, 9, 57), (255, 256, 257)),
    *product((31, 32, 33, 97, 200), (33, 64)),
    *product((1, 3, 5), (1, 511, 513, 1000)),
    *product((2047, 2049, 6200), (1,)),
]


@pytest.mark.parametrize("M, N", SIZES)
def test_sizes(device, M, N):
    run("silu", *arguments(M, N, device=device))


@each
@each_dtype
def test_dtypes(device, name, dtype):
    run(name, *arguments(33, 65, dtype, device))
    run(name, *arguments(9, 300, dtype, device))


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (2, 1, 3, 5)], ids=str)
@each
def test_dimensions(device, name, shape):
    run(name, normal(*shape, device=device), normal(5, device=device))


@pytest.mark.parametrize("need", [(True, False), (False, True)], ids=str)
@each
def test_what_is_needed(device, name, need):
    run(name, *arguments(37, 65, device=device), need=need)


@pytest.mark.parametrize("of_x", LAYOUTS)
@pytest.mark.parametrize("of_dy", LAYOUTS)
def test_layouts(device, of_x, of_dy):
    """Strides are arguments: nothing is read as if it were dense."""
    x, dy = normal(35, 20, device=device), normal(35, 20, device=device, seed=1)
    for name in ("relu", "gelu"):
        run(name, LAYOUTS[of_x](x), normal(20, 2, device=device)[:, 0], cotangents={"dy": LAYOUTS[of_dy](dy)})


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (2, 0, 3), (0,)], ids=str)
@each
def test_zero_sizes(device, name, shape):
    _, (dx, db) = run(name, normal(*shape, device=device), normal(shape[-1], device=device))
    assert dx.shape == shape and db.shape == shape[-1:] and not db.any()


@each
def test_special_values(device, name):
    """NaN and infinities stay in their column of db, and are where the eager rule has them."""
    values = torch.tensor([0.0, -0.0, 1.5, -1.5, INF, -INF, NAN], device=device)
    x, dy = (t.flatten()[:, None].expand(49, 9) for t in torch.meshgrid(values, values, indexing="ij"))
    b = torch.cat([values, torch.tensor([1.0, 0.5], device=device)])
    run(name, x, b, cotangents={"dy": dy})
    x, dy = normal(3, 9, device=device), normal(3, 9, device=device, seed=1)
    x[1, 2] = NAN
    _, (dx, db) = run(name, x, b[:1].expand(9), cotangents={"dy": dy})
    assert db.isnan().tolist() == dx.isnan().any(0).tolist() and dx.isnan().sum() == db.isnan().sum() <= 1


def test_a_slope_that_is_not_finite_where_there_are_no_rows(device):
    """b is read in rows past the last: there f'(b) times a dy of 0 must not get into db."""
    b = torch.full((4,), 1e30, device=device)
    x = normal(3, 4, device=device) - b
    assert torch.isfinite(file.KERNEL.backward(x.cos(), x, b, "gelu_tanh", op.RULE.Need(True, True))[1]).all()


def test_sums_in_float32(device):
    """db adds up dx before it is rounded: in bfloat16 a sum of ones stops at 256."""
    x, b = (torch.full(s, 3.0, dtype=torch.bfloat16, device=device) for s in ((3000, 3), (3,)))
    for kernel, args in ((file.RELU, (x, op.RELU_RULE.Need(False, True))),):
        _, db = kernel.backward(torch.ones_like(x), *args)
        assert db.tolist() == [3008.0] * 3  # 3000 in bfloat16
    _, (_, db) = run("gelu", x, b, cotangents={"dy": torch.ones_like(x)})
    assert (db.float() - 3000).abs().max() < 16


def test_identity_has_no_kernel(device):
    x, b = arguments(3, 4, device=device)
    torch.testing.assert_close(bp.functional.bias_activation(x, b, "identity"), x + b)
    with pytest.raises(ValueError, match="bias_activation: backend='triton' cannot run here: there is no fused kernel"):
        bp.functional.bias_activation(x, b, "identity", backend="triton")
