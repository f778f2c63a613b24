"""What is special to convolution: the derived sums against the vendor's call, layouts, the kinds of padding, modules."""

from __future__ import annotations

import copy
import itertools
import pickle
from random import Random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import bptoolkit as bp
from bptoolkit.ops import conv as module

CALLS = {1: (bp.functional.conv1d, F.conv1d), 2: (bp.functional.conv2d, F.conv2d), 3: (bp.functional.conv3d, F.conv3d)}
MODULES = {1: (bp.nn.Conv1d, nn.Conv1d), 2: (bp.nn.Conv2d, nn.Conv2d), 3: (bp.nn.Conv3d, nn.Conv3d)}
each_dim = pytest.mark.parametrize("n", [1, 2, 3])
Need = module.RULE.Need


def configurations(n, count, seed=0):
    """Random (N, groups, I, O, X, K, stride, padding, dilation), every one a legal call."""
    random = Random(seed)
    for _ in range(count):
        groups, I = random.choice((1, 2, 3)), random.choice((1, 2))
        K, dilation, stride, padding = ([random.choice(c) for _ in range(n)] for c in ((1, 2, 3), (1, 2), (1, 2, 3), (0, 1, 2)))
        X = [max(d * (k - 1) + 1 - 2 * p, 1) + random.randint(0, 3) for d, k, p in zip(dilation, K, padding)]
        yield random.choice((0, 1, 2, 3)), groups, I, groups * random.choice((1, 2)), X, K, stride, padding, dilation


@each_dim
def test_the_sums_are_the_vendors(n):
    """The transposed convolution, the correlation and the sum give what convolution_backward gives, for every need."""
    for N, groups, I, O, X, K, stride, padding, dilation in configurations(n, 25):
        x = torch.randn(N, groups * I, *X, dtype=torch.float64)
        w = torch.randn(O, I, *K, dtype=torch.float64)
        tail = tuple((m + 2 * p - d * (k - 1) - 1) % s for m, p, d, k, s in zip(X, padding, dilation, K, stride))
        options = (tuple(stride), tuple(padding), tuple(dilation), tail, groups)
        dy = torch.randn_like(module.forward(x, w, None, *options))
        need = Need(True, True, True)
        with torch.no_grad():
            fast = module.backward(dy, x, w, *options, need)
        with torch.enable_grad():
            derived = module.backward(dy, x, w, *options, need)
        torch.testing.assert_close(fast, derived)
        for alone in range(3):
            need = Need(*(k == alone for k in range(3)))
            for mode in (torch.no_grad(), torch.enable_grad()):
                with mode:
                    got = module.backward(dy, x if need.w else None, w if need.x or need.w else None, *options, need)
                assert [g is not None for g in got] == list(need)
                torch.testing.assert_close(got[alone], fast[alone])


@each_dim
@pytest.mark.parametrize("kind", ["depthwise", "depthwise × 2", "pointwise"])
def test_depthwise_and_pointwise(n, kind):
    """One channel a group, and a kernel of one element: first and second order as torch."""
    C, groups, K = 4, 1 if kind == "pointwise" else 4, 1 if kind == "pointwise" else 3
    x = torch.randn(2, C, *(5,) * n, dtype=torch.float64, requires_grad=True)
    w = torch.randn(C * (1 + (kind == "depthwise × 2")), C // groups, *(K,) * n, dtype=torch.float64, requires_grad=True)
    results = []
    for fn in CALLS[n]:
        y = fn(x, w, None, 2, K // 2, 1, groups)
        g = torch.autograd.grad(y.sin().sum(), (x, w), create_graph=True)
        results.append((y, g, torch.autograd.grad(sum(t.cos().sum() for t in g), (x, w))))
    torch.testing.assert_close(*results)


def kept_by(fn, *args):
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        fn(*args)
    return seen


@each_dim
def test_keeps_what_the_gradients_use(n):
    """With a frozen weight the input is not kept; with a frozen input both are, of which the weight costs nothing."""
    for frozen, kept in (((), 2), ((0,), 2), ((1,), 1), ((0, 1), 0)):
        args = [torch.randn(2, 3, *(5,) * n), torch.randn(4, 3, *(2,) * n), torch.randn(4)]
        for k, t in enumerate(args):
            t.requires_grad_(k not in frozen)
        seen = kept_by(CALLS[n][0], *args)
        assert len(seen) == kept
        assert 1 not in frozen or all(t.shape == args[1].shape for t in seen)


@pytest.mark.parametrize("n, layout", [(2, torch.channels_last), (3, torch.channels_last_3d)])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_channels_last(n, layout, create_graph, groups):
    """What comes in channels last goes on so: the output and both gradients."""
    ours, theirs = CALLS[n]
    x = torch.randn(2, 4, *(6,) * n).to(memory_format=layout).requires_grad_()
    w = torch.randn(8, 4 // groups, *(3,) * n).to(memory_format=layout).requires_grad_()
    results = []
    for fn in (ours, theirs):
        y = fn(x, w, None, 1, 1, 1, groups)
        dx, dw = torch.autograd.grad(y.sin().sum(), (x, w), create_graph=create_graph)
        results.append((y, dx, dw))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert all(t.is_contiguous(memory_format=layout) for t in results[0][:2])
    assert create_graph or results[0][2].stride() == results[1][2].stride()


@each_dim
@pytest.mark.parametrize("kernel, dilation", list(itertools.product((1, 2, 3, 4), (1, 2, 3))))
def test_same(n, kernel, dilation):
    ours, theirs = CALLS[n]
    x = torch.randn(2, 3, *(7,) * n, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 3, kernel, *(2,) * (n - 1), dtype=torch.float64, requires_grad=True)
    results = []
    for fn in (ours, theirs):
        y = fn(x, w, padding="same", dilation=dilation)
        assert y.shape[2:] == x.shape[2:]
        results.append((y, *torch.autograd.grad(y.sin().sum(), (x, w))))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
@each_dim
def test_padding_rule(n, mode):
    """The scatter that is derived is the adjoint of torch's own padding; first and second order, uneven sides, no sides."""
    random = Random(1)
    for _ in range(12):
        X = [random.randint(1, 4 - n // 3) for _ in range(n)]
        most = [m - (mode == "reflect") if mode in ("reflect", "circular") else 3 for m in X]
        pad = tuple(random.randint(0, m) for m in reversed(most) for _ in range(2))
        x = torch.randn(2, 2, *X, dtype=torch.float64, requires_grad=True)
        results = []
        for y in (module.PAD_RULE(x, pad, mode, None), F.pad(x, pad, mode)):
            (g,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
            results.append((y, g, *torch.autograd.grad(g.cos().sum(), x)))
        torch.testing.assert_close(*results)
    x, pad = torch.randn(1, 2, *(2,) * n, dtype=torch.float64, requires_grad=True), (1,) * 2 * n
    assert gradcheck(lambda x: module.PAD_RULE(x, pad, mode, None), x, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(lambda x: module.PAD_RULE(x, pad, mode, None), x)


MODES = ("zeros", "reflect", "replicate", "circular")
SHAPES = [{"padding": 1}, {"padding": "same", "dilation": 2}, {"padding": 2, "stride": 2, "groups": 2, "bias": False}]


@each_dim
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_modules(n, mode, options):
    Ours, Theirs = MODULES[n]
    a = Ours(4, 6, 2 if options["padding"] == "same" else 3, padding_mode=mode, dtype=torch.float64, **options)
    b = Theirs(4, 6, 2 if options["padding"] == "same" else 3, padding_mode=mode, dtype=torch.float64, **options)
    b.load_state_dict(a.state_dict())
    a.load_state_dict(b.state_dict())
    assert repr(a) == repr(b) and isinstance(a, Theirs)
    swapped = copy.deepcopy(b)
    swapped.__class__ = Ours
    for x in (torch.randn(2, 4, *(5,) * n, dtype=torch.float64), torch.randn(4, *(6,) * n, dtype=torch.float64)):
        x.requires_grad_()
        results = []
        for m in (b, a, swapped, pickle.loads(pickle.dumps(a))):
            y = m(x)
            g = torch.autograd.grad(y.sin().sum(), (x, *m.parameters()), create_graph=True)
            results.append((y, g, torch.autograd.grad(sum(t.cos().sum() for t in g), (x, *m.parameters()))))
        for r in results[1:]:
            torch.testing.assert_close(r, results[0])


@pytest.mark.parametrize("mode", MODES[1:])
def test_padding_modes_compose(mode):
    """vmap, per-sample gradients, forward mode, compile and channels_last through the padding of a module."""
    a, b = bp.nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode=mode), nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode=mode)
    b.load_state_dict(a.state_dict())
    x, v = torch.randn(4, 2, 5, 5), torch.randn(4, 2, 5, 5)

    def loss(m):
        return lambda x: m(x).sin().sum()

    grad, vmap = torch.func.grad, torch.func.vmap
    close = torch.testing.assert_close
    close(vmap(grad(loss(a)))(x), torch.stack([grad(loss(b))(s) for s in x]))
    close(torch.func.jvp(a, (x,), (v,)), torch.func.jvp(b, (x,), (v,)))
    torch._dynamo.reset()
    leaf = x.to(memory_format=torch.channels_last).requires_grad_()
    compiled = torch.compile(loss(a), fullgraph=True, backend="aot_eager", dynamic=True)
    (want,) = torch.autograd.grad(loss(b)(leaf), leaf)
    close(torch.autograd.grad(compiled(leaf), leaf)[0], want)
    (got,) = torch.autograd.grad(loss(a)(leaf), leaf)
    close(got, want)
    assert got.stride() == want.stride()


def test_no_recompilation_by_size():
    """Batch and image sizes vary under dynamic=True, with a stride that leaves a tail at some of them."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    fn = torch.compile(lambda x, w: bp.functional.conv2d(x, w, None, 2, 1), fullgraph=True, dynamic=True, backend=backend)
    w = torch.randn(3, 2, 3, 3, requires_grad=True)
    for N, H in ((5, 8), (6, 9), (4, 12), (7, 11)):
        x = torch.randn(N, 2, H, H + 2)
        torch.testing.assert_close(fn(x, w), F.conv2d(x, w, None, 2, 1))
    assert len(graphs) == 1


def test_autocast():
    conv = bp.nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect")
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(torch.randn(2, 2, 5, 5))
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert conv.weight.grad.dtype == conv.bias.grad.dtype == torch.float32


@pytest.mark.parametrize("n", [2])
def test_backend_of_a_module(n):
    conv = MODULES[n][0](2, 2, 1)
    conv.backend = "triton"
    with pytest.raises(ValueError, match="conv2d: backend='triton' cannot run here"):
        conv(torch.randn(1, 2, 3, 3))


X, W = torch.randn(2, 4, 5, 5), torch.randn(6, 4, 3, 3)
ERRORS = {
    "rank": (lambda f: f(torch.randn(2, 2, 4, 5, 5), W), ValueError, r"input has shape \(2, 2, 4, 5, 5\)"),
    "rank below": (lambda f: f(torch.randn(5, 5), W), ValueError, r"input has shape \(5, 5\)"),
    "weight's rank": (lambda f: f(X, W[0]), ValueError, r"weight has shape \(4, 3, 3\)"),
    "channels": (lambda f: f(X[:, :3], W), ValueError, r"has 3 channels .* must be 4 · 1"),
    "groups": (lambda f: f(X, W, groups=2), ValueError, r"groups=2; input's must be 4 · 2"),
    "output groups": (lambda f: f(X, torch.randn(5, 2, 3, 3), groups=2), ValueError, "5 divisible by 2"),
    "no groups": (lambda f: f(X, W, groups=0), ValueError, "groups=0"),
    "bias": (lambda f: f(X, W, torch.ones(5)), ValueError, r"O is 6 in weight .* but 5 in bias"),
    "stride": (lambda f: f(X, W, stride=0), ValueError, "stride=0 must be an int of at least 1"),
    "stride's length": (lambda f: f(X, W, stride=(1, 1, 1)), ValueError, r"stride=\(1, 1, 1\) must be .* or 2 of them"),
    "dilation": (lambda f: f(X, W, dilation=-1), ValueError, "dilation=-1"),
    "padding": (lambda f: f(X, W, padding=-1), ValueError, "padding=-1 must be an int of at least 0"),
    "padding of floats": (lambda f: f(X, W, padding=0.5), ValueError, "padding=0.5"),
    "padding's name": (lambda f: f(X, W, padding="full"), ValueError, "padding='full' is not known"),
    "same with stride": (lambda f: f(X, W, padding="same", stride=2), ValueError, r"needs a stride of 1, not stride=\(2, 2\)"),
    "kernel": (lambda f: f(X, W, dilation=3), ValueError, r"kernel \(3, 3\) with dilation=\(3, 3\) is larger than the input"),
    "dtype": (lambda f: f(X, W.double()), TypeError, "weight is torch.float64 but input is torch.float32"),
    "integers": (lambda f: f(X.long(), W.long()), TypeError, "input is torch.int64"),
    "backend": (lambda f: f(X, W, backend="cudnn"), ValueError, "backend='cudnn' is not known"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_errors(error):
    call, kind, message = ERRORS[error]
    with pytest.raises(kind, match="conv2d: .*" + message):
        call(bp.functional.conv2d)


def test_errors_of_modules():
    with pytest.raises(ValueError, match=r"padding_mode='reflect' can pad dimension 3 of input .*9, 3\) by up to 2, not by 3"):
        bp.nn.Conv2d(2, 2, 3, padding=3, padding_mode="reflect")(torch.randn(1, 2, 9, 3))
    with pytest.raises(ValueError, match=r"padding_mode='circular' can pad dimension 1 of input .* by up to 3, not by 4"):
        bp.nn.Conv1d(2, 2, 3, padding=4, padding_mode="circular")(torch.randn(2, 3))
    with pytest.raises(TypeError, match=r"conv2d: input is torch\.int64"):
        bp.nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")(torch.ones(1, 2, 4, 4, dtype=torch.int64))
