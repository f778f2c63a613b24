"""What is special to batch_norm_relu: what it keeps, where its gradient passes, its modules."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bptoolkit as bp
from bptoolkit.bench import saved_bytes

f = bp.functional
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def parameters(C, dtype=torch.float64):
    mean, w, b = (torch.randn(C).to(dtype) for _ in range(3))
    return mean, torch.rand(C).to(dtype) + 0.5, w.requires_grad_(), b.requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_saved(dtype):
    """x and four vectors; torch keeps x and y, and the vectors."""
    C = 8
    x, (mean, var, w, b) = torch.randn(16, C, 20, 20).to(dtype).requires_grad_(), parameters(C, dtype)
    full, vector = x.numel() * x.element_size(), 8 * C
    ours = saved_bytes(lambda: f.batch_norm_relu(x, mean, var, w, b, True))
    theirs = saved_bytes(lambda: F.relu(F.batch_norm(x, mean, var, w, b, True)))
    assert full <= ours <= full + 4 * vector
    assert 2 * full <= theirs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(600, 4), (9, 4, 130, 130)], ids=str)  # and more elements than a block
def test_a_gradient_passes_where_y_is_not_zero(dtype, training, shape):
    """Exactly there; small ones of z included, which in float16 round to 0."""
    wide = torch.promote_types(dtype, torch.float32)  # db in it: a sum in float16 would overflow
    x, (mean, var, w, b) = torch.randn(shape).to(dtype).requires_grad_(), parameters(4, wide)
    with torch.no_grad():
        w *= 10 ** torch.linspace(-7, 0, 4).to(wide)
        b.zero_()
    y = f.batch_norm_relu(x, mean, var, w, b, training)
    z = f.batch_norm(x, mean, var, w, b, training)
    torch.testing.assert_close(y, torch.relu(z))
    dy = torch.rand_like(y) + 1
    for create_graph in (False, True):
        (db,) = torch.autograd.grad(y, b, dy, create_graph=True)
        want = torch.where(y != 0, dy, 0.0).double().sum((0, *range(2, x.dim())))
        torch.testing.assert_close(db.double(), want, rtol=1e-5, atol=0)
        if not training:
            (dx,) = torch.autograd.grad(y, x, dy.abs() * 100, create_graph=create_graph, retain_graph=True)
            assert not dx[y == 0].any()


@pytest.mark.parametrize("create_graph", [False, True])
def test_constant_channels(create_graph):
    """z is b to the last bit or y tells; an infinite cotangent at 0 does not pass, one of NaN does."""
    x = torch.full((5, 3), 0.3).requires_grad_()
    w, b = torch.ones(3, requires_grad=True), torch.tensor([-1.0, 0.0, 1.0], requires_grad=True)
    y = f.batch_norm_relu(x, x[0].detach().clone(), torch.ones(3), w, b)
    assert torch.equal(y, b.clamp(min=0).expand(5, 3))
    dx, dw, db = torch.autograd.grad(
        y, (x, w, b), torch.tensor([torch.inf, torch.inf, 1.0]).expand(5, 3), create_graph=create_graph
    )
    assert torch.equal(db, torch.tensor([0.0, 0, 5])) and not dx[:, :2].any() and not dw.any()
    with torch.no_grad():
        x[0, 1] = torch.nan
    y = f.batch_norm_relu(x, torch.zeros(3), torch.ones(3), w, b)
    (dx,) = torch.autograd.grad(y, x, torch.ones(5, 3), create_graph=create_graph)
    assert y.isnan().sum() == 1 and torch.equal(dx, torch.where((y != 0), (torch.ones(3) + 1e-5).rsqrt(), 0.0))


@pytest.mark.parametrize(
    "d, options", [(1, {}), (2, {"momentum": None}), (3, {"affine": False}), (2, {"track_running_stats": False})]
)
def test_modules(d, options):
    """Parameters, buffers and state_dict of BatchNorm, loaded from one; three calls in training and one in evaluation."""
    theirs = getattr(nn, f"BatchNorm{d}d")(5, dtype=torch.float64, **options)
    for p in theirs.parameters():
        nn.init.normal_(p)
    ours = getattr(bp.nn, f"BatchNormReLU{d}d")(5, dtype=torch.float64, **options)
    assert isinstance(ours, (getattr(bp.nn, f"BatchNorm{d}d")))
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
    for training in (True, True, True, False):
        results = []
        x = torch.randn(4, 5, *[3] * d, dtype=torch.float64)
        for m, act in ((ours, nn.Identity()), (theirs, nn.ReLU())):
            leaf = x.clone().requires_grad_()
            y = act(m.train(training)(leaf))
            y.sin().sum().backward()
            results.append((y.detach(), leaf.grad, [p.grad for p in m.parameters()], list(m.buffers())))
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


def test_swap_leaves_batch_norm_without_its_relu():
    """The modules here are no replacements: a BatchNorm2d stays one."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    bp.swap(model)
    assert type(model[0]) is bp.nn.BatchNorm2d


def test_layouts_and_no_samples():
    x = torch.randn(4, 3, 5, 6).to(memory_format=torch.channels_last).requires_grad_()
    y = f.batch_norm_relu(x, None, None, training=True)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (y, dx))
    mean, var = torch.ones(3), torch.ones(3)
    for training in (True, False):
        assert f.batch_norm_relu(torch.ones(0, 3, 2), mean, var, training=training).shape == (0, 3, 2)
    assert mean.eq(1).all()


def test_errors_name_the_op():
    x = torch.randn(4, 6)
    for error, message, args in (
        (ValueError, r"batch_norm_relu: running_mean has shape \(4,\)", (x, torch.ones(4), torch.ones(6))),
        (ValueError, "batch_norm_relu: .*training=False needs them", (x, None, None)),
        (ValueError, "batch_norm_relu: .*one value per channel", (x[:1], None, None, None, None, True)),
        (TypeError, "batch_norm_relu: weight is torch.float64", (x, None, None, torch.ones(6).double(), None, True)),
    ):
        with pytest.raises(error, match=message):
            f.batch_norm_relu(*args)
