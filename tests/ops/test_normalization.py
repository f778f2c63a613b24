"""What is special to the normalizations over channels, RMS norm, the fused sums and the divisions by a norm."""

from __future__ import annotations

import copy
import functools
import pickle
from math import inf

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bptoolkit as bp
from bptoolkit.ops.channel_norm import BLOCK

f = bp.functional
close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)


def gradients(fn, *args):
    leaves = [a.detach().clone().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
    y = fn(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return y.detach(), torch.autograd.grad(y, [t for t in leaves if isinstance(t, torch.Tensor)], dy)


MODULES = [
    (nn.BatchNorm1d, {}, (6, 5)),
    (nn.BatchNorm1d, {"momentum": None}, (6, 5, 3)),
    (nn.BatchNorm2d, {"affine": False, "momentum": 0.3}, (4, 5, 3, 2)),
    (nn.BatchNorm2d, {"track_running_stats": False}, (4, 5, 3, 2)),
    (nn.BatchNorm3d, {"eps": 0.1}, (2, 5, 2, 3, 2)),
    (nn.InstanceNorm1d, {"affine": True}, (4, 5, 3)),
    (nn.InstanceNorm1d, {"track_running_stats": True}, (5, 3)),
    (nn.InstanceNorm2d, {"track_running_stats": True, "affine": True, "momentum": 0.4}, (4, 5, 3, 2)),
    (nn.InstanceNorm3d, {}, (2, 5, 2, 3, 2)),
]


@pytest.mark.parametrize("theirs, options, shape", MODULES, ids=str)
def test_modules_and_their_running_statistics(theirs, options, shape):
    """Several calls in training and one in evaluation: outputs, gradients and buffers are torch's after each."""
    a = theirs(5, dtype=torch.float64, **options)
    for p in a.parameters():
        nn.init.normal_(p)
    b = getattr(bp.nn, theirs.__name__)(5, dtype=torch.float64, **options)
    b.load_state_dict(a.state_dict())
    assert repr(a) == repr(b) and list(a.state_dict()) == list(b.state_dict())
    b = pickle.loads(pickle.dumps(copy.deepcopy(b)))
    for training in (True, True, True, False):
        a.train(training), b.train(training)
        x = torch.randn(shape, dtype=torch.float64) * 2 + 1
        results = [(gradients(m, x), [p.grad for p in m.parameters()], list(m.buffers())) for m in (b, a)]
        close(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("running", [torch.float32, None], ids=str)
def test_batch_norm_of_half_inputs(dtype, running):
    """Statistics are taken in float32, and running ones keep their dtype."""
    x = (torch.randn(64, 4, 5) + 20).to(dtype)
    mean, var = torch.zeros(4, dtype=running or dtype), torch.ones(4, dtype=running or dtype)
    exact = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    y, (dx,) = gradients(lambda x: f.batch_norm(x, mean, var, training=True), x)
    z, (dz,) = gradients(lambda x: F.batch_norm(x, *exact, training=True), x.double())
    assert y.dtype == dx.dtype == dtype and mean.dtype == (running or dtype)
    torch.testing.assert_close([t.double() for t in (y, dx, mean, var)], [z, dz, *exact], rtol=2e-2, atol=2e-2)


def test_running_statistics_under_transforms():
    """As torch: func.grad updates them, vmap refuses an update of what it does not batch, compile keeps it."""
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    buffers = [(torch.zeros(3, dtype=x.dtype), torch.ones(3, dtype=x.dtype)) for _ in range(3)]
    F.batch_norm(x, *buffers[0], training=True)
    torch.func.grad(lambda x: f.batch_norm(x, *buffers[1], training=True).sin().sum())(x)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, m, v: f.batch_norm(x, m, v, training=True).sin(), fullgraph=True, backend="aot_eager")
    compiled(x.clone().requires_grad_(), *buffers[2]).sum().backward()
    close(buffers[1:], [buffers[0]] * 2)
    with pytest.raises(RuntimeError, match=r"running_mean|vmap"):
        torch.func.vmap(lambda x: f.batch_norm(x, *buffers[0], training=True))(torch.stack([x, x]))


def test_two_forwards_before_a_backward():
    """The running statistics are no part of what backward keeps."""
    bn = bp.nn.BatchNorm1d(3, dtype=torch.float64)
    x, z = torch.randn(2, 5, 3, dtype=torch.float64).requires_grad_()
    (bn(x) * bn(z).sin()).sum().backward()


CALLS = {
    "batch_norm": (lambda m, x, w, b: m.batch_norm(x, None, None, w, b, True), 1e-5),
    "group_norm": (lambda m, x, w, b: m.group_norm(x, 4, w, b), 1e-5),
    "instance_norm": (lambda m, x, w, b: m.instance_norm(x, None, None, w, b), 1e-5),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "one sample", "rows"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_blocks_are_the_plain_form(name, layout, dtype):
    """More elements than a block: worked in place, and again by the form that is differentiated."""
    shape = {"one sample": (1, 8, 512, 200), "rows": (BLOCK // 8 + 3, 8)}.get(layout, (9, 8, 100, 100))
    if layout == "rows" and name == "instance_norm":
        shape = (BLOCK // 16 + 3, 8, 2)
    x, w, b = torch.randn(shape).to(dtype), torch.randn(8).to(dtype), torch.randn(8).to(dtype)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    y = CALLS[name][0](f, *leaves)
    dy = torch.randn_like(y)
    plain = torch.autograd.grad(y, leaves, dy, create_graph=True)
    blocks = torch.autograd.grad(y, leaves, dy)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(blocks, tuple(p.detach() for p in plain), **tolerance)
    if dtype == torch.float64:
        close(blocks, gradients_of(CALLS[name][0](F, *leaves), leaves, dy), rtol=1e-7, atol=1e-8)


def gradients_of(y, leaves, dy):
    return torch.autograd.grad(y, leaves, dy)


@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_blocks_and_eps(eps, dtype):
    x, w = (torch.randn(1100, 512) * 1e-3).to(dtype), torch.randn(512).to(dtype)
    (y, ours), (z, theirs) = (gradients(lambda x, w, m=m: m.rms_norm(x, (512,), w, eps), x, w) for m in (f, F))
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 3e-2)
    torch.testing.assert_close(y, z, rtol=tolerance, atol=tolerance)
    scale = [t.abs().max().item() for t in theirs]
    torch.testing.assert_close(
        [t / s for t, s in zip(ours, scale)], [t / s for t, s in zip(theirs, scale)], rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("name", ["layer_norm", "group_norm", "add_layer_norm"])
def test_second_order_through_vmap_over_the_weight(name):
    """The residual outputs are not batched there of themselves, and flow into the same gradients as y, which is."""
    x = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)
    W = torch.randn(3, 4, dtype=torch.float64)
    fn = {
        "layer_norm": lambda w: f.layer_norm(x, (4,), w),
        "group_norm": lambda w: f.group_norm(x, 2, w),
        "add_layer_norm": lambda w: sum(f.add_layer_norm(x, x.sin(), (4,), w)),
    }[name]

    def second(y):
        (g,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        return torch.autograd.grad(g.cos().sum(), x)[0]

    close(second(torch.func.vmap(fn)(W)), second(torch.stack([fn(w) for w in W])))


def test_what_is_saved():
    """The sum once; normalized inputs once; no running statistics."""

    def saved(call):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
            call()
        return sum(t.numel() for t in kept.values())

    x, w = torch.randn(64, 32, requires_grad=True), torch.randn(32, requires_grad=True)
    assert saved(lambda: f.add_layer_norm(x, x, (32,), w)) == 64 * 32 + 32 + 2 * 64
    assert saved(lambda: f.add_rms_norm(x, x, (32,), w)) == 64 * 32 + 32 + 64
    assert saved(lambda: f.batch_norm(x, torch.zeros(32), torch.ones(32), w, training=True)) == 64 * 32 + 3 * 32


@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, 1.5, 0.5, 0.0, inf, -inf])
def test_normalize_at_zeros_and_ties(p):
    """Rows of zeros, single zeros and ties: torch's subgradients."""
    x = torch.tensor([[0.0, 0, 0], [1, -1, 1], [0, 2, -2], [3, 1, -2]], dtype=torch.float64)
    results = [gradients(lambda x, m=m: m.normalize(x, p, 1, 0.1), x) for m in (f, F)]
    torch.testing.assert_close(*results, equal_nan=True)


def test_normalize_out():
    x, out = torch.randn(3, 4), torch.empty(0)
    assert f.normalize(x, out=out) is out
    close(out, F.normalize(x))
    with pytest.raises(RuntimeError, match="normalize: out="):
        f.normalize(x.requires_grad_(), out=out)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_norm_as_a_parametrization(dim):
    torch.manual_seed(0)
    a = nn.Linear(4, 3, dtype=torch.float64)
    b = copy.deepcopy(a)
    nn.utils.parametrizations.weight_norm(a, dim=dim)
    nn.utils.parametrize.register_parametrization(b, "weight", bp.nn.WeightNorm(dim), unsafe=True)
    b.load_state_dict(a.state_dict())
    x = torch.randn(5, 4, dtype=torch.float64)
    for m in (a, b):
        m(x).sin().sum().backward()
    close([p.grad for p in b.parameters()], [p.grad for p in a.parameters()])


@pytest.mark.parametrize("shape", [(2, 7, 3), (2, 7, 3, 2), (2, 7, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_local_response_norm_is_torchs(shape, size):
    x = torch.randn(shape, dtype=torch.float64)
    close(*(gradients(lambda x, m=m: m.local_response_norm(x, size, 0.3, 0.6, 1.5), x) for m in (f, F)))


X, C, Z = torch.randn(4, 6), torch.randn(6), torch.randn(4)


@pytest.mark.parametrize(
    "error, message, call",
    [
        (ValueError, r"batch_norm: input has shape \(6,\)", lambda: f.batch_norm(C, C, C)),
        (ValueError, r"batch_norm: running_mean has shape \(4,\) but input \(4, 6\) has 6", lambda: f.batch_norm(X, Z, C)),
        (ValueError, "batch_norm: running_var is None but the other is not", lambda: f.batch_norm(X, C, None)),
        (ValueError, "batch_norm: .*training=False needs them", lambda: f.batch_norm(X, None, None)),
        (ValueError, "batch_norm: .*one value per channel", lambda: f.batch_norm(X[:1], None, None, training=True)),
        (ValueError, "batch_norm: eps=0 must be positive", lambda: f.batch_norm(X, None, None, training=True, eps=0)),
        (TypeError, "batch_norm: weight is torch.float64 but input is", lambda: f.batch_norm(X, C, C, C.double())),
        (ValueError, r"group_norm: num_groups=4 does not divide the 6 channels", lambda: f.group_norm(X, 4)),
        (ValueError, r"group_norm: .*one value per group", lambda: f.group_norm(X[:1], 6)),
        (ValueError, r"instance_norm: .*one position", lambda: f.instance_norm(X)),
        (ValueError, "instance_norm: .*use_input_stats=False", lambda: f.instance_norm(X, use_input_stats=False)),
        (ValueError, r"rms_norm: input has shape \(4, 6\); it needs \(\*, 4\)", lambda: f.rms_norm(X, (4,))),
        (TypeError, "rms_norm: weight is torch.int64", lambda: f.rms_norm(X, (6,), C.long())),
        (ValueError, r"add_layer_norm: residual has shape \(6,\) but input \(4, 6\)", lambda: f.add_layer_norm(X, C, (6,))),
        (TypeError, "add_rms_norm: residual is torch.float64 but input", lambda: f.add_rms_norm(X, X.double(), (6,))),
        (ValueError, r"normalize: dim=2 does not name", lambda: f.normalize(X, dim=2)),
        (ValueError, r"weight_norm: g has shape \(6,\); .* needs \(4, 1\)", lambda: f.weight_norm(X, C)),
        (ValueError, r"local_response_norm: input has shape \(4, 6\)", lambda: f.local_response_norm(X, 2)),
        (ValueError, r"local_response_norm: size=0", lambda: f.local_response_norm(X[None], 0)),
        (ValueError, r"group_norm: backend='cuda' is not known", lambda: f.group_norm(X, 2, backend="cuda")),
    ],
)
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_weight_norm_in_blocks():
    """Rows enough that backward takes them block by block."""
    torch.manual_seed(0)
    v, g = (
        torch.randn(900, 800, dtype=torch.float64, requires_grad=True),
        torch.rand(900, 1, dtype=torch.float64).requires_grad_(),
    )
    dw = torch.randn(900, 800, dtype=torch.float64)
    got, want = bp.functional.weight_norm(v, g, 0), v * (g / v.norm(dim=1, keepdim=True))
    torch.testing.assert_close(torch.autograd.grad(got, (v, g), dw), torch.autograd.grad(want, (v, g), dw))
