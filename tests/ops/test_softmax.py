"""What is special to softmax and log_softmax: extreme values, the deprecated dim, dtype, large inputs in blocks, modules."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bptoolkit as bp

f = bp.functional
PAIRS = {"softmax": (f.softmax, F.softmax), "log_softmax": (f.log_softmax, F.log_softmax)}
each = pytest.mark.parametrize("name", PAIRS)
INF = float("inf")


def run(fn, x, *args, cotangent=None, **kw):
    leaf = x.clone().requires_grad_(x.is_floating_point())
    y = fn(leaf, *args, **kw)
    generator = torch.Generator().manual_seed(3)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(cotangent or y.dtype).to(y.dtype)
    return y.detach(), torch.autograd.grad(y, leaf, dy)[0] if leaf.requires_grad else None


@each
def test_extreme_values(name):
    """Large logits do not overflow; −∞ is a probability of 0 with a gradient of 0; a row of −∞ alone is NaN, as in torch."""
    x = torch.tensor([[1e4, 0.0, -1e4], [-INF, 2.0, -INF], [-INF, -INF, -INF], [INF, 0.0, 1.0]], dtype=torch.float64)
    ours, theirs = (run(fn, x, -1) for fn in PAIRS[name])
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert ours[0][:2].isfinite().any() and f.softmax(x, -1)[1].tolist() == [0, 1, 0]


def test_gradient_of_a_masked_logit_is_zero():
    x = torch.tensor([[-INF, 1.0, 3.0]], requires_grad=True)
    (dx,) = torch.autograd.grad(f.softmax(x, -1)[0, 2], x)
    assert dx[0, 0] == 0 and dx.isfinite().all()


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_saturated_rows_in_half_precision(name, dtype):
    """Where one probability is almost 1 the gradient is a difference of near equals; it is as good as torch's."""
    torch.manual_seed(0)
    x = (torch.randn(64, 33, dtype=torch.float64) * 6).to(dtype)
    ours, theirs = (run(fn, x, -1)[1] for fn in PAIRS[name])
    truth = run(PAIRS[name][1], x.double(), -1, cotangent=dtype)[1]
    rounding = 8 * torch.finfo(torch.float32).eps * truth.abs().max()  # of the steps in between, in every dtype
    assert (ours - truth).abs().max() <= (theirs - truth).abs().max() + rounding


@each
@pytest.mark.parametrize("dim", [0, 1, 2, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_larger_than_a_block(name, dim, dtype):
    x = torch.randn(17, 130, 257).to(dtype)
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.01}
    torch.testing.assert_close(*(run(fn, x, dim) for fn in PAIRS[name]), **tolerance)


@each
@pytest.mark.parametrize("shape", [(), (3,), (3, 4), (2, 3, 4), (2, 3, 2, 2)], ids=str)
def test_dim_none(name, shape):
    x = torch.randn(shape, dtype=torch.float64)
    with pytest.warns(UserWarning, match=f"Implicit dimension choice for {name} has been deprecated") as caught:
        ours = run(PAIRS[name][0], x)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="Implicit dimension"):
        torch.testing.assert_close(ours, run(PAIRS[name][1], x))


@each
def test_dtype(name):
    x = torch.randn(3, 4, dtype=torch.float16)
    ours, theirs = (run(fn, x, 1, dtype=torch.float64) for fn in PAIRS[name])
    assert ours[0].dtype == torch.float64 and ours[1].dtype == torch.float16
    torch.testing.assert_close(ours, theirs)
    ours, theirs = (run(fn, torch.arange(4), 0, dtype=torch.float32) for fn in PAIRS[name])
    torch.testing.assert_close(ours[0], theirs[0])
    with torch.autocast("cpu", torch.bfloat16):
        for want in (None, torch.float32):
            a, b = (fn(torch.randn(2, 3).bfloat16(), 1, dtype=want) for fn in PAIRS[name])
            assert a.dtype == b.dtype


@each
def test_keeps_the_output_alone(name):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = PAIRS[name][0](torch.randn(5, 3, requires_grad=True), 1)
    assert [t.data_ptr() for t in kept] == [y.data_ptr()]


@pytest.mark.parametrize("ours, theirs", [(bp.nn.Softmax, nn.Softmax), (bp.nn.LogSoftmax, nn.LogSoftmax)], ids=str)
def test_modules(ours, theirs):
    x = torch.randn(4, 5, dtype=torch.float64)
    for options in ({"dim": 1}, {"dim": 0}, {}):
        a, b = ours(**options), theirs(**options)
        assert repr(a) == repr(b) and isinstance(a, theirs) and not a.state_dict()
        swapped = copy.deepcopy(b)
        swapped.__class__ = ours
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore" if not options else "error", "Implicit dimension")
            for m in (a, swapped, pickle.loads(pickle.dumps(a))):
                torch.testing.assert_close(m(x), b(x))
    a = ours(dim=-1)
    a.backend = "triton"
    with pytest.raises(ValueError, match="triton"):
        a(torch.randn(3, 4, 5, 6))


@each
def test_errors(name):
    fn = PAIRS[name][0]
    for dim in (2, -3):
        with pytest.raises(ValueError, match=rf"{name}: dim={dim} is outside \[-2, 1\], .*\(2, 3\)"):
            fn(torch.ones(2, 3), dim)
    with pytest.raises(ValueError, match="dim=1 is outside"):
        fn(torch.tensor(1.0), 1)
    with pytest.raises(TypeError, match=rf"{name}: dim=0.5 is not an int"):
        fn(torch.ones(2), 0.5)
    with pytest.raises(TypeError, match=rf"{name}: input is torch.int64"):
        fn(torch.arange(3), 0)
    with pytest.raises(TypeError, match=rf"{name}: dtype=torch.int32 is not of floating point"):
        fn(torch.ones(3), 0, dtype=torch.int32)
    with pytest.raises(TypeError, match=rf"{name}: input must be a tensor, not list"):
        fn([1.0], 0, dtype=torch.float32)
    with pytest.raises(ValueError, match=rf"{name}: backend='gpu' is not known"):
        fn(torch.ones(3), 0, backend="gpu")
