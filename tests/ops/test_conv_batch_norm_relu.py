"""What is special to conv2d_batch_norm_relu: what it keeps, what it makes again, its module."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bptoolkit as bp
from bptoolkit.bench import saved_bytes
from bptoolkit.ops import conv
from bptoolkit.ops.conv_batch_norm_relu import RULE

f = bp.functional


def blocks(*sizes, kernel=3):
    """The same blocks, ours and torch's, (channels in, channels out, stride) each, with the same parameters."""
    ours = nn.Sequential(*(bp.nn.ConvBatchNormReLU2d(I, O, kernel, s, kernel // 2) for I, O, s in sizes))
    theirs = nn.Sequential(
        *(nn.Sequential(nn.Conv2d(I, O, kernel, s, kernel // 2, bias=False), nn.BatchNorm2d(O), nn.ReLU()) for I, O, s in sizes)
    )
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_what_one_keeps(dtype, training):
    """x, the parameters and two vectors, to the byte; torch keeps u and y as well, at most 55 % of whose bytes these are."""
    N, C, O, H = 4, 8, 8, 16
    x = torch.randn(N, C, H, H).to(dtype).requires_grad_()
    w, b, g, h = (torch.randn(s).to(dtype).requires_grad_() for s in ((O, C, 3, 3), (O,), (O,), (O,)))
    mean, var = torch.zeros(O).to(dtype), torch.ones(O).to(dtype)
    ours = saved_bytes(lambda: f.conv2d_batch_norm_relu(x, w, b, mean, var, g, h, 1, 1, training=training))
    theirs = saved_bytes(lambda: F.relu(F.batch_norm(F.conv2d(x, w, b, 1, 1), mean, var, g, h, training)))
    of_statistics = 2 * O * torch.promote_types(dtype, torch.float32).itemsize
    assert ours == (x.numel() + w.numel() + 3 * O) * dtype.itemsize + of_statistics
    assert theirs >= (x.numel() + 2 * N * O * H * H) * dtype.itemsize
    assert ours <= 0.55 * theirs


@pytest.mark.parametrize(
    "sizes",
    [
        [(3, 16, 1)] + [(16, 16, 1)] * 3,
        [(16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2)],
        [(64, 16, 1), (16, 16, 1), (16, 64, 1)],
    ],
    ids=["first layers", "strides", "bottleneck"],
)
def test_what_several_keep(sizes):
    """Each storage counted once, a block's y with the next one's x: at most 55 % of what torch keeps."""
    ours, theirs = blocks(*sizes)
    x = torch.randn(8, sizes[0][0], 24, 24)
    kept = [saved_bytes(lambda m=m: m(x), [x, *m.parameters(), *m.buffers()]) for m in (ours, theirs)]
    y, u = [], x
    for m in ours:
        u = m(u)
        y.append(4 * u.numel() + 8 * u.shape[1])
    assert kept[0] == sum(y) - 4 * u.numel()  # all y but the last, m and r
    assert kept[0] <= 0.55 * kept[1]


def test_gradients_of_several():
    ours, theirs = blocks((3, 4, 1), (4, 6, 2), kernel=3)
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    results = []
    for m in (ours.double(), theirs.double()):
        x = torch.randn(4, 3, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = m(x)
        y.sin().sum().backward()
        results.append((y, x.grad, [p.grad for p in m.parameters()], list(m.buffers())))
    torch.testing.assert_close(*results)


def test_backward_makes_the_convolution_again(monkeypatch):
    """Once, and forward runs no further; the running statistics are updated by forward alone."""
    calls = []
    monkeypatch.setattr(conv, "forward", lambda *a, real=conv.forward: (calls.append(a), real(*a))[1])
    m = bp.nn.ConvBatchNormReLU2d(2, 3, 3)
    y = m(torch.randn(2, 2, 5, 5))
    assert len(calls) == 1 and m.bn.num_batches_tracked == 1
    before = m.bn.running_mean.clone()
    y.sum().backward()
    assert len(calls) == 2 and torch.equal(m.bn.running_mean, before) and before.any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_gradient_passes_where_y_is_not_zero(dtype, training):
    x, w = torch.randn(4, 3, 9, 9).to(dtype), torch.randn(5, 3, 3, 3).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    g, h = torch.randn(5).to(wide), torch.randn(5).to(wide).requires_grad_()
    y = f.conv2d_batch_norm_relu(x, w, None, torch.zeros(5).to(wide), torch.ones(5).to(wide), g, h, training=training)
    dy = torch.rand_like(y) + 1
    (dh,) = torch.autograd.grad(y, h, dy)
    torch.testing.assert_close(dh.double(), torch.where(y != 0, dy, 0.0).double().sum((0, 2, 3)), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "padding_mode": "circular"},
        {"affine": False, "groups": 2},
        {"momentum": None, "padding": "same", "dilation": 2},
        {"track_running_stats": False, "stride": 2},
    ],
    ids=str,
)
def test_module(options):
    """Parameters, buffers and keys of Conv2d and BatchNorm2d; three calls in training and one in evaluation."""
    of_norm = {k: options[k] for k in ("affine", "momentum", "track_running_stats") if k in options}
    of_conv = {"padding": 1, "bias": False} | {k: v for k, v in options.items() if k not in of_norm}

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 6, 3, **of_conv), nn.BatchNorm2d(6, **of_norm)

        def forward(self, x):
            return torch.relu(self.bn(self.conv(x)))

    theirs = Plain().double()
    ours = bp.nn.ConvBatchNormReLU2d(4, 6, 3, **({"padding": 1} | options), dtype=torch.float64)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    ours = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
    for training in (True, True, True, False):
        x, results = torch.randn(3, 4, 6, 7, dtype=torch.float64), []
        for m in (ours, theirs):
            leaf = x.clone().requires_grad_()
            y = m.train(training)(leaf)
            y.sin().sum().backward()
            results.append((y.detach(), leaf.grad, [p.grad for p in m.parameters()], list(m.buffers())))
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


def test_swap_leaves_it_as_it_is():
    """Its layers are ours already, and not called."""
    model = nn.Sequential(bp.nn.ConvBatchNormReLU2d(2, 3, 3))
    before = [type(m) for m in model.modules()]
    bp.swap(model)
    assert [type(m) for m in model.modules()] == before


def test_layouts_and_no_samples():
    x = torch.randn(4, 3, 5, 6).to(memory_format=torch.channels_last).requires_grad_()
    w = torch.randn(8, 3, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    y = f.conv2d_batch_norm_relu(x, w, None, None, None, training=True)
    grads = torch.autograd.grad(y.sum(), (x, w))
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (y, *grads))
    mean, var = torch.ones(8), torch.ones(8)
    for training in (True, False):
        y = f.conv2d_batch_norm_relu(x[:0], w, None, mean, var, training=training)
        assert y.shape == (0, 8, 3, 4)
    assert mean.eq(1).all()
    y = f.conv2d_batch_norm_relu(x[0], w, None, mean, var)
    torch.testing.assert_close(y, f.conv2d_batch_norm_relu(x[:1], w, None, mean, var)[0])


def test_only_what_is_needed_is_kept():
    x, w, mean, var = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.zeros(4), torch.ones(4)
    assert saved_bytes(lambda: f.conv2d_batch_norm_relu(x, w, None, mean, var)) == 0
    assert RULE.inputs[-2:] == ("running_mean", "running_var")


def test_errors_name_the_op():
    x, w, one, four = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.ones(1), torch.ones(4)
    alone, double = (None, None, None, None, 1, 0, 1, 1, True), four.double()
    name = "conv2d_batch_norm_relu"
    for error, message, args in (
        (ValueError, rf"{name}: running_mean has shape \(1,\) but weight \(4, 3, 3, 3\) makes 4", (x, w, None, one, four)),
        (ValueError, rf"{name}: norm_bias has shape \(1,\)", (x, w, None, four, four, None, one)),
        (ValueError, f"{name}: .*training=False needs them", (x, w, None, None, None)),
        (ValueError, f"{name}: running_var is None but the other is not", (x, w, None, four, None)),
        (
            ValueError,
            f"{name}: .*one value per channel",
            (x[:1, :, :3, :3], w, None, *alone),
        ),
        (ValueError, f"{name}: eps=0.0 must be positive", (x, w, None, *alone, 0.1, 0.0)),
        (ValueError, f"{name}: the kernel .* is larger than the input", (x[..., :2, :2], w, None, four, four)),
        (
            TypeError,
            f"{name}: norm_weight is torch.float64 but input is torch.float32",
            (x, w, None, four, four, double),
        ),
        (TypeError, f"{name}: norm_weight must be a tensor, not float", (x, w, None, four, four, 1.0)),
    ):
        with pytest.raises(error, match=message):
            f.conv2d_batch_norm_relu(*args)
