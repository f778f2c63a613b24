"""What is special to the activations: kinks, NaN and infinity, in-place calls, modules."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bptoolkit as bp

f = bp.functional
PAIRS = {
    "relu": (f.relu, F.relu),
    "gelu": (f.gelu, F.gelu),
    "gelu tanh": (lambda x: f.gelu(x, "tanh"), lambda x: F.gelu(x, approximate="tanh")),
    "silu": (f.silu, F.silu),
    "tanh": (f.tanh, torch.tanh),
    "sigmoid": (f.sigmoid, torch.sigmoid),
}
each = pytest.mark.parametrize("name", PAIRS)
INF, NAN = float("inf"), float("nan")


def both(name, x, dy):
    out = []
    for fn in PAIRS[name]:
        leaf = x.clone().requires_grad_()
        y = fn(leaf)
        out.append((y.detach(), torch.autograd.grad(y, leaf, dy)[0]))
    return out


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_special_values(name, dtype):
    """Kinks, both zeros, infinities and NaN are where torch has them, in the output and the gradient."""
    x = torch.tensor([0.0, -0.0, INF, -INF, NAN, -NAN, 1e-7, -1e-7, 12.0, -12.0, 60.0, -60.0], dtype=dtype)
    ours, theirs = both(name, x, torch.ones_like(x))
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_relu_blocks_infinite_cotangents_where_it_is_off(dtype):
    """sqrt(relu(x)) has a cotangent of infinity at x < 0, which must not become NaN."""
    x = torch.tensor([-1.0, 0.0, -0.0, 4.0, NAN], dtype=dtype, requires_grad=True)
    torch.testing.assert_close(
        torch.autograd.grad(f.relu(x).sqrt().sum(), x)[0][:4], torch.tensor([0, 0, 0, 0.25], dtype=dtype)
    )
    for dy in (INF, -INF, NAN):
        cotangent = torch.full_like(x, dy)
        want = torch.autograd.grad(F.relu(x), x, cotangent)[0]
        torch.testing.assert_close(torch.autograd.grad(f.relu(x), x, cotangent)[0], want, equal_nan=True)
        graph = torch.autograd.grad(f.relu(x), x, cotangent, create_graph=True)[0]
        torch.testing.assert_close(graph, want, equal_nan=True)


@each
def test_keeps_one_tensor(name):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        PAIRS[name][0](torch.randn(5, 3, requires_grad=True))
    assert [t.shape for t in kept] == [(5, 3)]


@each
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3)], ids=str)
def test_no_dimensions_and_no_elements(name, shape):
    x = torch.randn(shape, dtype=torch.float64)
    ours, theirs = both(name, x, torch.ones_like(x))
    torch.testing.assert_close(ours, theirs)


@each
def test_channels_last_stays(name):
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    (y, dx), _ = both(name, x, torch.randn_like(x))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert dx.is_contiguous(memory_format=torch.channels_last)


IN_PLACE = pytest.mark.parametrize("name", ["relu", "silu"])


@IN_PLACE
def test_in_place_is_the_input(name):
    ours, theirs = PAIRS[name]
    x = torch.randn(3, 4)
    want, at = theirs(x), x.data_ptr()
    y = ours(x, inplace=True)
    assert y is x and y.data_ptr() == at
    torch.testing.assert_close(x, want)


@IN_PLACE
@pytest.mark.parametrize("view", [False, True])
def test_in_place_gradients(name, view):
    """First and second order, through the tensor and through a view of it, as torch."""
    results = []
    for fn in PAIRS[name]:
        torch.manual_seed(0)
        x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
        h = x * 1.5
        part = h[1:, ::2] if view else h
        y = fn(part, inplace=True)
        assert y is part
        loss = (h.sin() * y.sum()).sum()
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        results.append((h.detach(), g.detach(), torch.autograd.grad(g.cos().sum(), x)[0]))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@IN_PLACE
def test_in_place_refuses_a_leaf(name):
    for fn in PAIRS[name]:
        x = torch.full((3,), -1.0, requires_grad=True)
        with pytest.raises(RuntimeError, match="leaf"):
            fn(x, inplace=True)
        assert x.tolist() == [-1.0] * 3
        with torch.no_grad():
            fn(x, inplace=True)
        assert x.tolist() != [-1.0] * 3


@IN_PLACE
def test_in_place_bumps_the_version(name):
    """A tensor that an earlier op keeps and that is then overwritten is an error, not a wrong gradient."""
    for fn in PAIRS[name]:
        h = torch.randn(3, requires_grad=True).exp()  # exp keeps its output
        fn(h, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            h.sum().backward()


@IN_PLACE
def test_in_place_under_transforms(name):
    ours, theirs = PAIRS[name]
    x = torch.randn(3, 4, dtype=torch.float64)

    def loss(fn):
        return lambda x: fn(x * 2, inplace=True).sin().sum()

    for transform in (torch.func.grad, torch.func.hessian, lambda g: torch.func.vmap(torch.func.grad(g)), torch.func.jacfwd):
        torch.testing.assert_close(transform(loss(ours))(x), transform(loss(theirs))(x))
    results = []
    for fn in (ours, theirs):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x.cos()) * 1.0
            results.append(torch.autograd.forward_ad.unpack_dual(fn(dual, inplace=True)))
    torch.testing.assert_close(tuple(results[0]), tuple(results[1]))
    torch._dynamo.reset()
    compiled = torch.compile(loss(ours), fullgraph=True, backend="aot_eager")
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(compiled(a), a), torch.autograd.grad(loss(theirs)(b), b))


def test_in_place_relu_keeps_one_buffer():
    """Input, output and what backward needs are one storage, as with torch."""
    h = torch.randn(64, requires_grad=True) * 1.0
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        f.relu(h, inplace=True)
    assert {t.data_ptr() for t in kept} == {h.data_ptr()}


MODULES = [
    (bp.nn.ReLU, nn.ReLU, {}),
    (bp.nn.ReLU, nn.ReLU, {"inplace": True}),
    (bp.nn.GELU, nn.GELU, {}),
    (bp.nn.GELU, nn.GELU, {"approximate": "tanh"}),
    (bp.nn.SiLU, nn.SiLU, {}),
    (bp.nn.SiLU, nn.SiLU, {"inplace": True}),
    (bp.nn.Tanh, nn.Tanh, {}),
    (bp.nn.Sigmoid, nn.Sigmoid, {}),
]


@pytest.mark.parametrize("ours, theirs, options", MODULES, ids=str)
def test_modules(ours, theirs, options):
    a, b = ours(**options), theirs(**options)
    assert isinstance(a, theirs) and repr(a) == repr(b) and not a.state_dict()
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    swapped = copy.deepcopy(b)
    swapped.__class__ = ours
    for m in (a, swapped, pickle.loads(pickle.dumps(a))):
        torch.testing.assert_close(m(x * 1.0), b(x * 1.0))
        torch.testing.assert_close(torch.autograd.grad(m(x * 1.0), x, dy), torch.autograd.grad(b(x * 1.0), x, dy))
    h = torch.randn(3)
    assert (a(h) is h) == options.get("inplace", False)
    a.backend = "triton"
    with pytest.raises(ValueError, match="triton"):
        a(torch.randn(3))


@each
def test_errors(name):
    fn, op = PAIRS[name][0], name.split()[0]
    with pytest.raises(TypeError, match=rf"{op}: input is torch.int64"):
        fn(torch.arange(3))
    with pytest.raises(TypeError, match=rf"{op}: input must be a tensor, not list"):
        fn([1.0])
    if name != "gelu tanh":
        with pytest.raises(ValueError, match=rf"{op}: backend='cuda' is not known"):
            fn(torch.ones(2), backend="cuda")


def test_gelu_unknown_form():
    with pytest.raises(ValueError, match="gelu: approximate='erf' is not known"):
        f.gelu(torch.ones(2), "erf")
