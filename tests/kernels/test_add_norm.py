"""The kernels of add_layer_norm and add_rms_norm beside their eager rules."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from fused import DTYPES, LAYOUTS, both_rules, each_dtype, normal

import bptoolkit as bp
from bptoolkit.ops import add_norm as op
from bptoolkit.triton_kernels import norms

each = pytest.mark.parametrize("rule", [op.RULE, op.RMS_RULE], ids=lambda rule: rule.name)


def run(rule, x, a, w, b, *, D=1, need=None, eps=1e-5, errors=8, **cotangents):
    parameters = (w, b) if rule is op.RULE else (w,)
    need = need or [True, True, *(t is not None for t in parameters)]
    return both_rules(rule, x, a, *parameters, D, eps, need=need[: len(rule.inputs)], cotangents=cotangents, errors=errors)


def coarse(*shape, **kw):
    """Values whose sums are exact in every dtype: the rounding of s is no part of what is compared."""
    return (normal(*shape, **kw) * 4).round().clamp(-12, 12) / 4


SIZES = [*product((1, 33, 97), (33, 64)), *product((1, 5), (1025, norms.HELD, norms.HELD + 1)), (2, 4 * norms.LONG_TILE - 1)]


@each
@pytest.mark.parametrize("M, N", SIZES)
def test_sizes(device, rule, M, N):
    x, a, w, b = (normal(*s, device=device, seed=k) for k, s in enumerate(((M, N), (M, N), (N,), (N,))))
    run(rule, x, a, w, b)


@each
@each_dtype
@pytest.mark.parametrize("parameters", ["same", "float32", "none"])
@pytest.mark.parametrize("M, N", [(33, 65), (1, norms.HELD + 5)])
def test_dtypes(device, rule, dtype, parameters, M, N):
    w, b = (normal(N, dtype=DTYPES.get(parameters, dtype), device=device, seed=k) for k in (4, 5))
    w, b = (None, None) if parameters == "none" else (w, b)
    run(rule, *(coarse(M, N, dtype=dtype, device=device, seed=k) for k in range(2)), w, b)


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("N", [40, norms.HELD + 5])
def test_the_sum_is_rounded_before_it_is_normalized(device, rule, dtype, N):
    """And y is the normalization of what is written. (The interpreter does not round to bfloat16 but cuts off.)"""
    x, a = (normal(3, N, dtype=dtype, device=device, seed=k) + 7 for k in range(2))
    y, s, *_ = rule.kernel().forward(x, a, *(None,) * (len(rule.inputs) - 2), 1, 1e-5)
    cut_off = dtype == torch.bfloat16 and device == "cpu"
    torch.testing.assert_close(s, x + a, rtol=torch.finfo(dtype).eps if cut_off else 0, atol=0)
    plain = bp.functional.layer_norm if rule is op.RULE else bp.functional.rms_norm
    torch.testing.assert_close(y, plain(s, (N,), eps=1e-5, backend="eager"))


@each
@pytest.mark.parametrize("lead, shape", [((), (5,)), ((2, 3), (4, 5)), ((7,), (1, 3, 1))], ids=str)
def test_dimensions(device, rule, lead, shape):
    x, a, w, b = (normal(*s, device=device, seed=k) for k, s in enumerate(((*lead, *shape), (*lead, *shape), shape, shape)))
    run(rule, x, a, w, b, D=len(shape), eps=0.1)


NEEDS = [(True, True, True, True), (True, False, False, False), (False, True, True, False), (False, False, True, True)]
GIVEN = [("dy",), ("ds",), ("dy", "ds"), ("ds", "dr"), ("dm",), ("dy", "ds", "dm", "dr")]
CALLS = [  # rms has neither b nor m
    (rule, N, need, given)
    for rule, needs, givens in (
        (op.RULE, [*NEEDS, (False, False, False, True)], GIVEN),
        (op.RMS_RULE, NEEDS, [g for g in GIVEN if g != ("dm",)]),
    )
    for N, chosen in ((65, needs), (norms.HELD + 7, NEEDS[:2]))  # the others are as for short rows
    for need, given in product(chosen, givens)
]


@pytest.mark.parametrize("rule, N, need, given", CALLS, ids=str)
def test_what_is_given_and_needed(device, rule, N, need, given):
    x, a, w, b = (normal(*s, device=device, seed=k) for k, s in enumerate(((2, N), (2, N), (N,), (N,))))
    run(rule, x, a, w, b, need=need, **{name: None for name in ("dy", "ds", "dm", "dr") if name not in given})


@each
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("N", [20, norms.HELD + 20])
def test_layouts(device, rule, layout, N):
    """Each of x, a, dy and ds in turn."""
    w, b = normal(2 * N, 2, device=device, seed=2).t()[:, ::2]
    x, a, dy, ds = (normal(3 if N == 20 else 1, N, device=device, seed=k) for k in range(4))
    odd = LAYOUTS[layout]
    run(rule, odd(x), a, w, b, eps=0.5, dy=dy, ds=odd(ds))
    if N == 20:
        run(rule, x, odd(a), w, b, eps=0.5, dy=odd(dy), ds=ds)


def test_layout_that_is_no_matrix(device):
    x = normal(4, 3, 6, 5, device=device).transpose(0, 3)
    w = normal(6, 4, device=device).t().contiguous().t()
    run(op.RULE, x, x.sin().contiguous(), w, w, D=2, dy=x.cos(), ds=x)


@each
@pytest.mark.parametrize("shape, D", [((0, 4), 1), ((3, 0), 1), ((0, 0), 1), ((2, 0, 3), 2), ((0, 2, 3), 2)], ids=str)
def test_zero_sizes(device, rule, shape, D):
    x, w = normal(*shape, device=device), normal(*shape[-D:], device=device)
    parameters = (w, w) if rule is op.RULE else (w,)
    y, s, *statistics = rule.kernel().forward(x, x, *parameters, D, 1e-5)
    assert y.shape == s.shape == x.shape and all(t.shape == (*shape[:-D], *(1,) * D) for t in statistics)
    kept = [y, s, *(None for _ in statistics), s, *parameters, *statistics]
    dx, da, *others = rule.kernel().backward(*kept, D, rule.Need(*(True,) * len(rule.inputs)))
    assert dx.shape == da.shape == x.shape and all(t.shape == w.shape and not t.any() for t in others)


@each
@pytest.mark.parametrize("N", [20, norms.HELD + 20])
def test_one_row_that_is_not_finite(device, rule, N):
    x, a = (normal(3, N, device=device, seed=k) for k in range(2))
    a[1, 3] = torch.nan if rule is op.RULE else torch.inf  # torch's mean of a row with ∞ is NaN
    run(rule, x, a, None, None)


@each
@each_dtype
def test_the_public_function(device, rule, dtype):
    """Values and gradients, the sum used further on, as in a block."""
    f = getattr(bp.functional, rule.name)
    tensors = [normal(*s, dtype=dtype, device=device, seed=k) for k, s in enumerate(((3, 4, 5), (3, 4, 5), (5,), (5,)))]
    tensors = tensors[: len(rule.inputs)]
    results = []
    for backend in ("triton", "eager"):
        x, a, *parameters = leaves = [t.detach().requires_grad_() for t in tensors]
        y, s = f(x, a, (5,), *parameters, backend=backend)
        results.append([y, s, *torch.autograd.grad((y * s.sin()).sum(), leaves)])
    tolerance = 4 * torch.finfo(dtype).eps
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.detach().abs().max()))


@each
def test_what_the_kernel_cannot_take(device, rule):
    wide = normal(2, norms.LONGEST + 1, device=device)
    with pytest.raises(
        ValueError, match=f"{rule.name}: backend='triton' cannot run here: a row of {norms.LONGEST + 1} elements"
    ):
        getattr(bp.functional, rule.name)(wide, wide, wide.shape[1:], backend="triton")
