"""What is special to the pooling ops: ties, NaN and infinity, layouts, windows that go over the edge, modules, errors."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bptoolkit as bp

f = bp.functional
INF, NAN = float("inf"), float("nan")
CL = torch.channels_last


def both(name, x, *args, dy=None, **kwargs):
    """[(outputs, dx)] of ours and torch's."""
    found = []
    for space in (f, F):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        out = getattr(space, name)(leaf, *args, **kwargs)
        y = out[0] if isinstance(out, tuple) else out
        found.append((out, torch.autograd.grad(y, leaf, torch.ones_like(y) if dy is None else dy)[0]))
    return found


@pytest.mark.parametrize("n, ceil_mode", [*itertools.product((1, 2, 3), (False, True))])
def test_every_window(n, ceil_mode):
    """All small windows that fit: kernel beside stride, padding, dilation and size, with each way to count."""
    torch.manual_seed(0)
    ranges = {1: (range(1, 7), range(1, 6), range(1, 5)), 2: ((3, 5), (1, 2, 3, 4), (1, 2, 3)), 3: ((4,), (2, 3), (1, 2))}[n]
    for X, k, s in itertools.product(*ranges):
        for p, d in itertools.product(range(k // 2 + 1), (1, 2)):
            if X + 2 * p < d * (k - 1) + 1:
                continue
            x = torch.randn(2, 2, *[X] * n, dtype=torch.float64)
            if k == 1 or d <= X:  # else see below
                torch.testing.assert_close(*both(f"max_pool{n}d", x, k, s, p, d, ceil_mode, return_indices=True))
            if d == 1:
                for include in (True, False):
                    dy = torch.randn_like(getattr(F, f"avg_pool{n}d")(x, k, s, p, ceil_mode))
                    torch.testing.assert_close(*both(f"avg_pool{n}d", x, k, s, p, ceil_mode, include, dy=dy))


def test_max_pool_of_windows_that_hold_nothing():
    """Dilation steps over the whole input: −∞ without a gradient. torch's gradient goes to an index outside the input."""
    for create_graph in (False, True):
        x = torch.randn(2, 3, 4, 2, dtype=torch.float64, requires_grad=True)
        y = f.max_pool2d(x, 2, 1, 1, (1, 3))  # in W one window, of −1 and 2
        assert torch.equal(y, F.max_pool2d(x, 2, 1, 1, (1, 3))) and y.isneginf().all()
        (dx,) = torch.autograd.grad(y, x, torch.randn_like(y), create_graph=create_graph)
        assert dx.shape == x.shape and dx.eq(0).all()


def test_max_pool_of_dilation_past_the_end():
    """With ceil_mode a window may reach past the end by more than the input's length: it holds a place at its beginning."""
    torch.manual_seed(0)
    ranges = range(1, 6), (2, 3, 4, 5), range(1, 14), range(1, 9), (0, 1, 2)
    tried = 0
    for X, k, s, d, p in itertools.product(*ranges):
        if d > X and p <= k // 2 and X + 2 * p - d * (k - 1) - 1 + s - 1 >= 0 and any(0 <= t * d - p < X for t in range(k)):
            x = torch.randn(2, 2, X, dtype=torch.float64)
            torch.testing.assert_close(*both("max_pool1d", x, k, s, p, d, True, return_indices=True))
            tried += 1
    assert tried > 100
    x = torch.randn(1, 2, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(*both("max_pool2d", x, 2, (3, 1), 0, (5, 1), True))


def test_every_adaptive_window():
    torch.manual_seed(0)
    for X, Y in itertools.product(range(1, 10), range(1, 14)):
        x, dy = torch.randn(2, 3, X, dtype=torch.float64), torch.randn(2, 3, Y, dtype=torch.float64)
        torch.testing.assert_close(*both("adaptive_avg_pool1d", x, Y, dy=dy))
        torch.testing.assert_close(*both("adaptive_max_pool1d", x, Y, return_indices=True, dy=dy))
    leaf = torch.randn(2, 3, 4, requires_grad=True)  # no windows: torch raises for the average's gradient
    for name in ("adaptive_avg_pool1d", "adaptive_max_pool1d"):
        assert torch.autograd.grad(getattr(f, name)(leaf, 0).sum(), leaf)[0].eq(0).all()
    for Y in ((None, 2), (1, None), 1, (3, 9)):
        x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
        torch.testing.assert_close(*both("adaptive_avg_pool2d", x, Y))
        torch.testing.assert_close(*both("adaptive_max_pool2d", x, Y))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ties_nan_and_infinity(dtype):
    """Of equal maxima the same one as in torch gets the gradient; NaN wins; a window of −∞ has a maximum too."""
    x = torch.tensor([[1.0, 1, 1, 0, NAN, 2, NAN, 2, -INF, -INF, -INF, INF, 0.0, -0.0]], dtype=dtype)
    for args in ((2,), (3, 1), (3, 2, 1), (2, 1, 1, 2)):
        torch.testing.assert_close(*both("max_pool1d", x, *args, return_indices=True), equal_nan=True)
    for Y in (1, 3, 5, 7):
        torch.testing.assert_close(*both("adaptive_max_pool1d", x, Y, return_indices=True), equal_nan=True)


@pytest.mark.parametrize("args", [(2,), (3, 1, 1), (3, 2, 1), (5, 1, 2)], ids=str)
def test_infinite_cotangents_stay_in_their_windows(args):
    x = torch.randn(1, 1, 12, dtype=torch.float64)
    for value in (INF, NAN):
        dy = torch.ones_like(F.avg_pool1d(x, *args))
        dy[0, 0, 2] = value
        torch.testing.assert_close(*both("avg_pool1d", x, *args, dy=dy), equal_nan=True)
        dy = torch.ones(1, 1, 5, dtype=torch.float64)
        dy[0, 0, 2] = value
        torch.testing.assert_close(*both("adaptive_avg_pool1d", x, 5, dy=dy), equal_nan=True)


@pytest.mark.parametrize("p", [1, 2.0, 3.0, 4, INF, -INF], ids=str)
def test_lp_pool_at_zero(p):
    """A window of zeros has no derivative and gives zero, in every order; other zeros do not matter."""
    x = torch.tensor([[0.0, 0, 1, 0, 0, 2, 3, 0]], dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = [f.lp_pool1d(ours, p, 2), bp.OPS["lp_pool1d"].reference(theirs, p, 2)]
    torch.testing.assert_close(*found)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), t)[0] for y, t in zip(found, (ours, theirs))))
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(f.lp_pool1d(leaf, p, 2).square().sum(), leaf, create_graph=True)
    assert torch.autograd.grad(g.sum(), leaf, allow_unused=True, materialize_grads=True)[0].isfinite().all()


def test_lp_pool_of_negative_sums_is_nan_as_in_torch():
    x = torch.tensor([[-1.0, -2, 3, 1]], dtype=torch.float64)
    torch.testing.assert_close(*both("lp_pool1d", x, 3.0, 2), equal_nan=True)


CALLS = {
    "max": ("max_pool", (3, 2, 1)),
    "avg": ("avg_pool", (2,)),
    "avg, overlapping": ("avg_pool", (3, 1, 1)),
    "adaptive avg": ("adaptive_avg_pool", (3,)),
    "global avg": ("adaptive_avg_pool", (1,)),
    "adaptive max": ("adaptive_max_pool", (3,)),
    "lp": ("lp_pool", (2.0, 2)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("n", [2, 3])
def test_channels_last(call, n):
    """Output and gradient have torch's strides, where a step in memory means anything."""
    name, args = CALLS[call]
    layout = CL if n == 2 else torch.channels_last_3d
    x = torch.rand(2, 3, *[6] * n, dtype=torch.float64).to(memory_format=layout)
    (y, dx), (want, want_dx) = both(f"{name}{n}d", x, *args)
    torch.testing.assert_close((y, dx), (want, want_dx))
    assert y.stride() == want.stride() and dx.is_contiguous(memory_format=layout)


def test_large_inputs_are_pooled_in_blocks():
    """What runs block by block equals the plain form, in both layouts, with a last block of another size."""
    x = torch.randn(5, 13, 64, 65)
    for last, dtype in ((False, torch.float32), (True, torch.float32), (False, torch.bfloat16)):
        z = x.to(dtype, memory_format=CL if last else torch.contiguous_format).requires_grad_()
        y = f.avg_pool2d(z, 3, 1, 1)
        dy = torch.randn_like(y)
        plain = torch.autograd.grad(y, z, dy, create_graph=True)[0]
        torch.testing.assert_close(torch.autograd.grad(f.avg_pool2d(z, 3, 1, 1), z, dy)[0], plain)


def kept_bytes(fn):
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        fn()
    return sum(t.nbytes for t in kept.values())


def test_what_is_kept():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    for name, args, size in (
        ("max_pool2d", (2,), 2 * 3 * 16 * 8),
        ("adaptive_max_pool2d", (2,), 2 * 3 * 4 * 8),
        ("avg_pool2d", (2,), 0),
        ("adaptive_avg_pool2d", (3,), 0),
        ("lp_pool2d", (2.0, 2), 2 * 3 * (64 + 16) * 4),
        ("lp_pool2d", (INF, 2), 2 * 3 * (64 * 4 + 16 * 8)),
    ):
        assert kept_bytes(lambda name=name, args=args: getattr(f, name)(x, *args)) == size, name


@pytest.mark.parametrize("n", [1, 2, 3])
def test_pool_and_unpool(n):
    """There and back, in channels_last too; the size that the stride leaves open comes from output_size."""
    torch.manual_seed(0)
    layouts = {1: None, 2: CL, 3: torch.channels_last_3d}
    for layout in {None, layouts[n]}:
        x = torch.randn(2, 3, *[7] * n, dtype=torch.float64)
        x = x if layout is None else x.to(memory_format=layout)
        y, i = getattr(f, f"max_pool{n}d")(x, 2, return_indices=True)
        back = getattr(f, f"max_unpool{n}d")(y, i, 2, output_size=x.shape)
        torch.testing.assert_close(back, torch.where(back == 0, 0.0, x))
        for size in (None, [7] * n):
            torch.testing.assert_close(
                *both(f"max_unpool{n}d", y, i % y[0, 0].numel() if size is None else i, 2, None, 0, size)
            )


def test_several_values_for_one_place():
    i = torch.tensor([[[1, 1, 3]]])
    x = torch.tensor([[[1.0, 2.0, 3.0]]])
    torch.testing.assert_close(*both("max_unpool1d", x, i, 2, dy=torch.arange(6.0).view(1, 1, 6)))


MODULES = [
    *(("MaxPool", a) for a in ({"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1, "return_indices": True})),
    *(("AvgPool", a) for a in ({"kernel_size": 2}, {"kernel_size": 3, "padding": 1, "count_include_pad": False})),
    ("AdaptiveAvgPool", {"output_size": 3}),
    *(("AdaptiveMaxPool", a) for a in ({"output_size": 3}, {"output_size": 1, "return_indices": True})),
    ("LPPool", {"norm_type": 2, "kernel_size": 2}),
]


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("kind, options", MODULES, ids=str)
def test_modules(kind, options, n):
    ours, theirs = getattr(bp.nn, f"{kind}{n}d"), getattr(nn, f"{kind}{n}d")
    a, b = ours(**options), theirs(**options)
    assert isinstance(a, theirs) and repr(a) == repr(b) and not a.state_dict()
    x = torch.randn(2, 3, *[6] * n, dtype=torch.float64)
    swapped = copy.deepcopy(b)
    swapped.__class__ = ours
    for m in (a, swapped, pickle.loads(pickle.dumps(a))):
        torch.testing.assert_close(m(x), b(x))
    a.backend = "triton"
    with pytest.raises(ValueError, match="triton"):
        a(x)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_unpool_modules(n):
    a, b = getattr(bp.nn, f"MaxUnpool{n}d")(2), getattr(nn, f"MaxUnpool{n}d")(2)
    y, i = getattr(F, f"max_pool{n}d")(torch.randn(2, 3, *[5] * n), 2, return_indices=True)
    torch.testing.assert_close(a(y, i, [5] * n), b(y, i, [5] * n))
    assert repr(a) == repr(b)


def test_autocast():
    """On the CPU autocast takes some of them to float32, as it does torch's own."""
    for n in (1, 2, 3):
        x = torch.randn(2, 3, *[6] * n).abs()
        i = torch.arange(6**n).reshape([6] * n).expand(2, 3, *[6] * n)
        calls = [
            ("max_pool", (2,)),
            ("adaptive_avg_pool", (3,)),
            ("adaptive_max_pool", (3,)),
            ("max_unpool", (i, 2)),
            *(((name, args)) for name, args in (("avg_pool", (2,)), ("lp_pool", (2.0, 2)), ("lp_pool", (INF, 2)))),
        ]
        for name, args in calls:
            with torch.autocast("cpu", torch.bfloat16):
                ours, theirs = (getattr(space, f"{name}{n}d")(x.bfloat16(), *args) for space in (f, F))
            assert ours.dtype == theirs.dtype, (name, n)
        for return_indices in (False, True):
            with torch.autocast("cpu", torch.bfloat16):
                got, want = (getattr(s, f"max_pool{n}d")(x.bfloat16(), 2, return_indices=return_indices) for s in (f, F))
            assert (got[0] if return_indices else got).dtype == (want[0] if return_indices else want).dtype


X2, I2 = torch.ones(1, 2, 4, 4), torch.zeros(1, 2, 4, 4, dtype=torch.int64)
ERRORS = [
    (TypeError, r"max_pool2d: input is torch.int64", lambda: f.max_pool2d(I2, 2)),
    (ValueError, r"max_pool2d: input has shape \(4,\)", lambda: f.max_pool2d(torch.ones(4), 2)),
    (ValueError, r"avg_pool1d: input has shape \(1, 2, 4, 4\); it needs 3 dimensions", lambda: f.avg_pool1d(X2, 2)),
    (ValueError, r"max_pool2d: input has shape \(1, 0, 4, 4\); only", lambda: f.max_pool2d(X2[:, :0], 2)),
    (ValueError, r"max_pool2d: kernel_size=\(2, 2, 2\) must be", lambda: f.max_pool2d(X2, (2, 2, 2))),
    (ValueError, r"max_pool2d: kernel_size=\(5, 5\) .* larger than the input \(1, 2, 4, 4\)", lambda: f.max_pool2d(X2, 5)),
    (ValueError, r"avg_pool2d: padding=\(2, 2\) is more than half of kernel_size=\(3, 3\)", lambda: f.avg_pool2d(X2, 3, 1, 2)),
    (ValueError, r"avg_pool2d: divisor_override is 0", lambda: f.avg_pool2d(X2, 2, divisor_override=0)),
    (ValueError, r"avg_pool2d: stride=0 must be an int of at least 1", lambda: f.avg_pool2d(X2, 2, 0)),
    (ValueError, r"adaptive_avg_pool2d: output_size=\(2,\) must be", lambda: f.adaptive_avg_pool2d(X2, (2,))),
    (ValueError, r"adaptive_max_pool1d: output_size=-1 must be", lambda: f.adaptive_max_pool1d(X2[0], -1)),
    (ValueError, r"lp_pool2d: norm_type=0 must be", lambda: f.lp_pool2d(X2, 0, 2)),
    (TypeError, r"max_unpool2d: indices must be a tensor of int64, not torch.float32", lambda: f.max_unpool2d(X2, X2, 2)),
    (ValueError, r"max_unpool2d: indices have shape .* but input", lambda: f.max_unpool2d(X2, I2[:, :1], 2)),
    (ValueError, r"max_unpool2d: output_size=\(4, 4\) must be", lambda: f.max_unpool2d(X2, I2, 2, output_size=(4, 4))),
    (RuntimeError, "out of bounds", lambda: f.max_unpool2d(X2, I2 + 64, 2)),
    (ValueError, r"max_pool2d: backend='cuda' is not known", lambda: f.max_pool2d(X2, 2, backend="cuda")),
]


@pytest.mark.parametrize("error, message, call", ERRORS, ids=[m[:40] for _, m, _ in ERRORS])
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call()
