"""rms_norm's kernel beside its eager rule."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from fused import DTYPES, LAYOUTS, both_rules, each_dtype, normal

import bptoolkit as bp
from bptoolkit.ops.rms_norm import RULE
from bptoolkit.triton_kernels import norms


def run(x, w, D, *, need=(True, True), eps=1e-5, errors=8, **cotangents):
    return both_rules(RULE, x, w, D, eps, need=need, cotangents=cotangents, errors=errors)


# Rows and columns: either side of a tile, one and several tiles to a program (there are three programs in the interpreter).
SIZES = [
    *product((1, 32, 33, 97, 200), (33, 64)),
    *product((1, 7), (1000, 1025)),
    *product((1, 5), (norms.HELD, norms.HELD + 1)),
    (2, 4 * norms.LONG_TILE - 1),
    (200, 1),
]


@pytest.mark.parametrize("M, N", SIZES)
def test_sizes(device, M, N):
    errors = 64  # of dw, which is a sum of up to 200 rows, of either sign
    run(normal(M, N, device=device), normal(N, device=device, seed=4), 1, errors=errors)


@each_dtype
@pytest.mark.parametrize("parameters", ["same", "float32", "none"])
@pytest.mark.parametrize("M, N", [(33, 65), (1, norms.HELD + 5)])
def test_dtypes(device, dtype, parameters, M, N):
    w = None if parameters == "none" else normal(N, dtype=DTYPES.get(parameters, dtype), device=device, seed=4)
    run(normal(M, N, dtype=dtype, device=device), w, 1, need=(True, w is not None))


@pytest.mark.parametrize("lead, shape", [((), (5,)), ((2, 3), (4, 5)), ((7,), (1, 3, 1))], ids=str)
def test_dimensions(device, lead, shape):
    run(normal(*lead, *shape, device=device), normal(*shape, device=device, seed=1), len(shape), eps=0.1)


@pytest.mark.parametrize("N", [65, norms.HELD + 7])
@pytest.mark.parametrize(
    "w, need", [(True, (True, True)), (True, (True, False)), (True, (False, True)), (False, (True, False))]
)
@pytest.mark.parametrize("cotangents", [(True, False), (True, True), (False, True)], ids=str)
def test_what_is_given_and_needed(device, N, w, need, cotangents):
    left_out = {name: None for name, given in zip(("dy", "dr"), cotangents) if not given}
    run(normal(2, N, device=device), normal(N, device=device, seed=4) if w else None, 1, need=need, **left_out)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("N", [20, norms.HELD + 20])
def test_layouts(device, layout, N):
    x, dy = (LAYOUTS[layout](normal(2, N, device=device, seed=k)) for k in range(2))
    w = normal(2 * N, 2, device=device, seed=2).t()[0, ::2]
    run(x, w, 1, dy=dy, eps=0.5)


def test_layout_that_is_no_matrix(device):
    x = normal(4, 3, 6, 5, device=device).transpose(0, 3)
    run(x, normal(6, 4, device=device).t().contiguous().t()[:, :4], 2, dy=x.cos())


@pytest.mark.parametrize("shape, D", [((0, 4), 1), ((3, 0), 1), ((0, 0), 1), ((2, 0, 3), 2), ((0, 2, 3), 2)], ids=str)
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_zero_sizes(device, shape, D, eps):
    run(normal(*shape, device=device), normal(*shape[-D:], device=device), D, eps=eps)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("N", [20, norms.HELD + 20])
def test_one_row_that_is_not_finite(device, N, bad):
    x = normal(3, N, device=device)
    x[1, 3] = bad
    run(x, normal(N, device=device), 1)


def test_rows_of_zeros_without_eps(device):
    x = normal(3, 20, device=device)
    x[1] = 0
    run(x, None, 1, eps=0.0, need=(True, False))


@each_dtype
def test_the_public_function(device, dtype):
    x, w = normal(3, 4, 5, dtype=dtype, device=device), normal(5, dtype=dtype, device=device, seed=1)
    got, want = (bp.functional.rms_norm(x, (5,), w, backend=b) for b in ("triton", "eager"))
    torch.testing.assert_close(got, want)
    wide = normal(2, norms.LONGEST + 1, device=device, dtype=dtype)
    with pytest.raises(ValueError, match=f"rms_norm: backend='triton' cannot run here: a row of {norms.LONGEST + 1} elements"):
        bp.functional.rms_norm(wide, wide.shape[1:], backend="triton")


def test_module(device):
    ours, theirs = (cls((3, 4), device=device) for cls in (bp.nn.RMSNorm, torch.nn.RMSNorm))
    ours.backend = "triton"
    x, y = (normal(5, 3, 4, device=device).requires_grad_() for _ in range(2))
    for m, t in ((ours, x), (theirs, y)):
        m(t).sin().sum().backward()
    torch.testing.assert_close((x.grad, ours.weight.grad), (y.grad, theirs.weight.grad))
