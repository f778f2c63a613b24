"""What is special to rectifiers, smooth activations and gated units: kinks, special values, in place, saved bytes, modules."""

from __future__ import annotations

import copy
import inspect
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bptoolkit as bp
from bptoolkit.bench import saved_bytes

f = bp.functional
INF, NAN = float("inf"), float("nan")
OPTIONS = {
    "leaky_relu": [(), (0.3,), (2.0,), (0.0,), (-0.5,)],
    "rrelu": [(), (-0.3, 0.3), (0.1, 0.3, True)],
    "threshold": [(0.1, -1.0), (0.1, 0.1), (0.1, 20.0), (0.0, 0.0)],
    "hardtanh": [(), (0.3, 0.7), (-0.1, 0.3)],
    "relu6": [()],
    "hardshrink": [(), (0.0,), (0.3,), (-1.0,)],
    "softshrink": [(), (0.0,), (0.3,)],
    "hardsigmoid": [()],
    "hardswish": [()],
    "elu": [(), (0.5,), (0.0,), (-1.0,)],
    "selu": [()],
    "celu": [(), (2.0,), (-2.0,)],
    "softplus": [(), (2.0,), (1.0, 1.0), (-1.0,)],
    "mish": [()],
    "logsigmoid": [()],
    "softsign": [()],
    "tanhshrink": [()],
}
CALLS = [pytest.param(name, options, id=f"{name}{options}") for name in OPTIONS for options in OPTIONS[name]]
each_call = pytest.mark.parametrize("name, options", CALLS)
each = pytest.mark.parametrize("name", [*OPTIONS, "prelu", "glu", "softmin"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
KINKS = [s * k for k in (0.0, 1e-7, 0.1, 0.3, 0.5, 0.7, 1.0, 3.0, 6.0, 12.0, 20.0, 21.0, 60.0, INF) for s in (1, -1)]


def run(fn, x, dy, graph=False):
    torch.manual_seed(0)
    leaf = x.clone().requires_grad_()
    y = fn(leaf)
    return y.detach(), torch.autograd.grad(y, leaf, dy, create_graph=graph)[0].detach()


@each_call
@DTYPES
def test_special_values(name, options, dtype):
    """At kinks and ties, both zeros and infinities, by the fast form and by the one that is differentiated."""
    if name == "rrelu" and True in options and dtype == torch.float16:
        pytest.skip("torch has no drawn slopes in float16 on the CPU")
    x = torch.tensor(KINKS, dtype=dtype)
    if name == "softsign":
        x = x[:-2]  # torch's y is NaN at infinity, and so is its gradient
    if name == "softshrink" and dtype in (torch.bfloat16, torch.float16):
        x = x[(x.abs() - 0.3).abs() > 0.01]  # torch's own gradient rounds 0.3 to half, and its y does not
    wide = name in ("softsign", "tanhshrink")  # of several ops in torch, each of which rounds
    want = run(lambda x: getattr(F, name)(x, *options), x.double() if wide else x, torch.ones_like(x))
    want = tuple(t.to(dtype) for t in want)
    for graph in (False, True):
        got = run(lambda x: getattr(f, name)(x, *options), x, torch.ones_like(x), graph)
        torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize(
    "name, options",
    [p for p in CALLS if p.values[0] in ("threshold", "hardtanh", "relu6", "hardshrink", "softshrink", "hardswish")],
)
@pytest.mark.parametrize("dy", [INF, -INF])
def test_flat_pieces_block_infinite_cotangents(name, options, dy):
    x = torch.tensor([0.0, -4.0, 7.0, 0.2, -0.2, 0.05], dtype=torch.float64)
    want = run(lambda x: getattr(F, name)(x, *options), x, torch.full_like(x, dy))
    for graph in (False, True):
        assert torch.equal(run(lambda x: getattr(f, name)(x, *options), x, torch.full_like(x, dy), graph)[1], want[1])


def test_nan():
    """NaN goes through, and its gradient does not depend on where in a tensor it is, as torch's does."""
    for name, options in ((p.values) for p in CALLS):
        for n in (1, 5, 40):
            fn = lambda x: getattr(f, name)(x, *options)  # noqa: E731, B023
            y, dx = run(fn, torch.full((n,), NAN), torch.ones(n))
            assert y.isnan().all() and (dx.isnan().all() or (dx == dx[0]).all()), name


def test_large_tensors_go_by_blocks():
    """The same bits in blocks, in a transposed tensor and at once."""
    x = torch.linspace(-7, 7, 3 * 200_001, dtype=torch.float32).reshape(3, -1)
    for name, options in ((p.values) for p in CALLS if p.values[0] != "rrelu"):
        fn = lambda x: getattr(f, name)(x, *options)  # noqa: E731, B023
        dy = x.cos()
        big = run(fn, x, dy)[1]
        torch.testing.assert_close(run(fn, x.mT, dy.mT)[1].mT, big, msg=name)
        torch.testing.assert_close(run(fn, x[:, :999], dy[:, :999])[1], big[:, :999], msg=name)


# --- what is kept

OUTPUT, INPUT = "output", "input"
KEPT = {
    ("leaky_relu", ()): OUTPUT,
    ("leaky_relu", (-0.5,)): INPUT,
    ("threshold", (0.1, -1.0)): OUTPUT,
    ("threshold", (0.1, 20.0)): INPUT,
    ("hardtanh", ()): OUTPUT,
    ("relu6", ()): OUTPUT,
    ("hardshrink", ()): OUTPUT,
    ("softshrink", ()): OUTPUT,
    ("hardsigmoid", ()): OUTPUT,
    ("hardswish", ()): INPUT,
    ("elu", ()): OUTPUT,
    ("elu", (-1.0,)): INPUT,
    ("selu", ()): OUTPUT,
    ("celu", (-2.0,)): OUTPUT,
    ("softplus", ()): INPUT,
    ("mish", ()): INPUT,
    ("logsigmoid", ()): OUTPUT,
    ("softsign", ()): INPUT,
}


@pytest.mark.parametrize("name, options", KEPT)
def test_keeps_one_tensor(name, options):
    x, kept = torch.randn(8, 5, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = getattr(f, name)(x, *options)
    assert [t.data_ptr() for t in kept] == [(y if KEPT[name, options] == OUTPUT else x).data_ptr()]


@pytest.mark.parametrize(
    "call, tensors",
    [
        (lambda x: f.rrelu(x, training=True), 1),  # the slopes
        (f.tanhshrink, 1),  # tanh x
        (lambda x: f.prelu(x, torch.ones(1)), 1 + 1 / 400),
        (f.glu, 1),
        (lambda x: f.swiglu(x, x.detach().clone()), 2),
        (lambda x: f.swiglu(x.detach().clone(), x), 1),  # the gate alone
        (lambda x: f.softmin(x, 1), 1),
    ],
)
def test_saved_bytes(call, tensors):
    x = torch.randn(20, 20, requires_grad=True)
    assert saved_bytes(lambda: call(x)) == round(tensors * x.nbytes)


# --- in place

IN_PLACE = [p for p in CALLS if "inplace" in inspect.signature(getattr(f, p.values[0])).parameters]


def signed(name, options):
    """Whether torch's call in place has a gradient."""
    return not (name in ("leaky_relu", "elu", "celu", "rrelu") and options and options[0] < 0)


@pytest.mark.parametrize("name, options", IN_PLACE)
@pytest.mark.parametrize("view", [False, True])
def test_in_place(name, options, view):
    """The result is the input; first and second derivatives are those of the call that is not in place."""
    results = []
    for inplace in (True, False):
        torch.manual_seed(0)
        x = torch.randn(4, 6, dtype=torch.float64).mul(3).requires_grad_()
        h = x * 1.5
        part = h[1:, ::2] if view else h
        y = getattr(f, name)(part, *options, inplace=inplace)
        assert (y is part) == inplace
        (g,) = torch.autograd.grad((x.sin() * (y.exp().sum() if view else y.cos())).sum(), x, create_graph=True)
        results.append((y.detach(), g.detach(), torch.autograd.grad(g.cos().sum(), x)[0]))
    torch.testing.assert_close(*results)
    leaf = torch.randn(3, requires_grad=True)
    with pytest.raises(RuntimeError, match=f"{name}: inplace=True on a leaf"):
        getattr(f, name)(leaf, *options, inplace=True)


@pytest.mark.parametrize("name, options", [p for p in IN_PLACE if signed(*p.values)])
def test_in_place_is_torch(name, options):
    """Values, version and the gradient through what was written over."""
    results = []
    for fn in (getattr(f, name), getattr(F, name)):
        torch.manual_seed(0)
        x = torch.randn(4, 6, dtype=torch.float64).mul(3).requires_grad_()
        h = x * 1.0
        fn(h[1:], *options, inplace=True)
        assert h._version >= 1
        results.append((h.detach(), torch.autograd.grad(h.sin().sum(), x)[0]))
        x = torch.randn(5)
        torch.manual_seed(0)
        with torch.no_grad():
            fn(x, *options, inplace=True)
    torch.testing.assert_close(*results)


def test_in_place_keeps_one_buffer():
    for name in ("leaky_relu", "hardtanh", "relu6", "hardsigmoid", "elu", "selu", "celu"):
        h, kept = torch.randn(64, requires_grad=True) * 1.0, []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # noqa: B023
            getattr(f, name)(h, inplace=True)
        assert {t.data_ptr() for t in kept} == {h.data_ptr()}, name


def test_in_place_under_transforms():
    x = torch.randn(3, 4, dtype=torch.float64)
    for name in ("leaky_relu", "elu", "hardswish"):
        ours, theirs = (lambda x, m=m: getattr(m, name)(x * 2, inplace=True).sin().sum() for m in (f, F))  # noqa: B023
        for transform in (torch.func.grad, torch.func.hessian, lambda g: torch.func.vmap(torch.func.grad(g))):
            torch.testing.assert_close(transform(ours)(x), transform(theirs)(x))


# --- rrelu's drawn slopes


def test_rrelu_draws_as_torch_and_keeps_the_slopes():
    x = torch.randn(40, 30, dtype=torch.float64)
    dy = torch.randn_like(x)
    got, want = run(lambda x: f.rrelu(x, 0.1, 0.4, True), x, dy), run(lambda x: F.rrelu(x, 0.1, 0.4, True), x, dy)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    slopes = got[1][x <= 0] / dy[x <= 0]
    assert 0.1 <= slopes.min() < 0.12 and 0.38 < slopes.max() <= 0.4
    torch.testing.assert_close(got[1], dy * got[0] / x)


def test_rrelu_drawn_under_transforms():
    x = torch.randn(6, 5, dtype=torch.float64)
    loss = lambda x: f.rrelu(x, 0.1, 0.4, True).square().sum()  # noqa: E731
    rows = torch.func.vmap(torch.func.grad(loss), randomness="different")(x) / (2 * x)  # r²
    assert ((rows >= 0.01 - 1e-9) & (rows <= 1 + 1e-9)).all() and (rows[x > 0] == 1).all() and rows.unique().numel() > 10
    torch.manual_seed(0)
    ratio = torch.func.jvp(lambda x: f.rrelu(x, 0.1, 0.4, True), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(ratio[1], ratio[0] / x)
    torch._dynamo.reset()
    leaf = x.clone().requires_grad_()
    y = torch.compile(lambda x: f.rrelu(x, 0.1, 0.4, True), fullgraph=True, backend="aot_eager")(leaf)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), leaf)[0], (y / x).detach())


# --- prelu


@pytest.mark.parametrize(
    "shape, weight", [((), ()), ((4,), (1,)), ((3, 5), (5,)), ((2, 3, 4, 2), (3,)), ((2, 3, 4), ()), ((0, 3), (3,))]
)
@DTYPES
def test_prelu(shape, weight, dtype):
    x, w, dy = torch.randn(shape).to(dtype), torch.rand(weight).to(dtype), torch.randn(shape).to(dtype)
    results = []
    for fn, to in ((f.prelu, dtype), (F.prelu, torch.float64)):  # torch rounds each product of dw to half
        a, b = x.to(to, copy=True).requires_grad_(), w.to(to, copy=True).requires_grad_()
        y = fn(a, b)
        results.append([t.detach().to(dtype) for t in (y, *torch.autograd.grad(y, (a, b), dy.to(to)))])
    torch.testing.assert_close(*results)


# --- gated


def test_splitting_one_tensor():
    h = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    for ours, act in ((f.swiglu, F.silu), (f.geglu, F.gelu), (f.reglu, F.relu)):
        a, b = h.chunk(2, dim=-1)
        torch.testing.assert_close(
            torch.autograd.grad(ours(*h.chunk(2, -1)).sum(), h), torch.autograd.grad((act(a) * b).sum(), h)
        )


def test_gated_halves_are_rounded_once():
    a, b = torch.randn(2, 1000).bfloat16()
    want = (F.silu(a.double()) * b.double()).bfloat16()
    assert (f.swiglu(a, b) != want).sum() <= 2 < ((F.silu(a) * b) != want).sum()


# --- accuracy of slopes that come from an output


def test_logsigmoid_far_out():
    x = torch.tensor([30.0, 60.0, 80.0], requires_grad=True)  # 1 − e^y would be 0
    torch.testing.assert_close(torch.autograd.grad(f.logsigmoid(x).sum(), x)[0], torch.sigmoid(-x.detach()), rtol=1e-5, atol=0)


def test_elu_of_half_tensors_goes_by_the_input():
    x = torch.tensor([-5.0], dtype=torch.bfloat16, requires_grad=True)
    for fn in (f.elu, f.celu):
        torch.testing.assert_close(torch.autograd.grad(fn(x), x)[0].float().log(), torch.tensor([-5.0]), atol=0.01, rtol=0)


# --- modules, signatures, errors

MODULES = [
    ("LeakyReLU", {"negative_slope": 0.2, "inplace": True}),
    ("ELU", {"alpha": 0.5}),
    ("SELU", {"inplace": True}),
    ("CELU", {"alpha": 0.5}),
    ("PReLU", {}),
    ("PReLU", {"num_parameters": 5, "init": 0.1}),
    ("RReLU", {"lower": 0.1}),
    ("Softplus", {"beta": 2.0, "threshold": 3.0}),
    ("Hardswish", {}),
    ("Hardsigmoid", {}),
    ("Hardtanh", {"min_val": -0.3}),
    ("ReLU6", {"inplace": True}),
    ("Mish", {}),
    ("LogSigmoid", {}),
    ("Softsign", {}),
    ("Tanhshrink", {}),
    ("Hardshrink", {"lambd": 0.2}),
    ("Softshrink", {"lambd": 0.2}),
    ("Threshold", {"threshold": 0.1, "value": 2.0}),
    ("GLU", {"dim": 0}),
    ("Softmin", {"dim": 1}),
]


@pytest.mark.parametrize("name, options", MODULES, ids=str)
def test_modules(name, options):
    a, b = getattr(bp.nn, name)(**options).double(), getattr(nn, name)(**options).double()
    assert isinstance(a, type(b)) and repr(a) == repr(b) and a.state_dict().keys() == b.state_dict().keys()
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    swapped = copy.deepcopy(b)
    swapped.__class__ = type(a)
    for m in (a, swapped, pickle.loads(pickle.dumps(a))):
        results = []
        for module in (m, b):
            torch.manual_seed(0)
            y = module(x * 1.0)
            results.append((y.detach(), torch.autograd.grad(y.sin().sum(), (x, *module.parameters()))))
        torch.testing.assert_close(*results)
    a.backend = "triton"
    with pytest.raises(ValueError, match="triton"):
        a(x * 1.0)


@each
def test_signatures(name):
    ours = list(inspect.signature(getattr(f, name)).parameters.values())
    assert ours[-1].name == "backend" and ours[-1].kind is inspect.Parameter.KEYWORD_ONLY
    try:
        theirs = list(inspect.signature(getattr(F, name)).parameters.values())
    except ValueError:
        return  # a builtin, without one
    if theirs[0].name == "args":
        return  # behind boolean_dispatch
    assert [(p.name, p.default) for p in ours[:-1]] == [(p.name, p.default) for p in theirs]


ERRORS = [
    (lambda: f.leaky_relu(torch.ones(2), None), TypeError, "leaky_relu: negative_slope must be a number, not NoneType"),
    (lambda: f.hardtanh(torch.ones(2), 2, 1), ValueError, "hardtanh: min_val=2 cannot be greater than max_val=1"),
    (lambda: f.softshrink(torch.ones(2), -1.0), ValueError, "softshrink: lambd=-1.0 must be 0 or more"),
    (lambda: f.celu(torch.ones(2), 0.0), ValueError, "celu: alpha=0"),
    (lambda: f.rrelu(torch.ones(2), 0.4, 0.2), ValueError, "rrelu: lower=0.4 and upper=0.2"),
    (lambda: f.rrelu(torch.ones(2), 0.4, INF), ValueError, "rrelu: lower=0.4 and upper=inf"),
    (
        lambda: f.prelu(torch.ones(2, 3), torch.ones(2)),
        ValueError,
        "prelu: weight has 2 elements but input (2, 3) has 3 channels",
    ),
    (lambda: f.prelu(torch.ones(2, 3), torch.ones(1, 1)), ValueError, "prelu: weight has shape (1, 1)"),
    (
        lambda: f.prelu(torch.ones(2, 3), torch.ones(3).double()),
        TypeError,
        "prelu: weight is torch.float64 but input is torch.float32",
    ),
    (lambda: f.glu(torch.ones(2, 3)), ValueError, "glu: dimension -1 of input (2, 3) has size 3"),
    (lambda: f.glu(torch.ones(())), ValueError, "glu: dim=-1 is not a dimension of input, whose shape is ()"),
    (lambda: f.glu(torch.ones(2), 1.0), TypeError, "glu: dim=1.0 is not an int"),
    (lambda: f.swiglu(torch.ones(2, 1), torch.ones(2)), ValueError, "swiglu: gate has shape (2, 1) but up (2,)"),
    (lambda: f.geglu(torch.ones(2), torch.ones(2), "erf"), ValueError, "geglu: approximate='erf' is not known"),
    (lambda: f.softmin(torch.ones(2), 3), ValueError, "softmin: dim=3 is outside"),
    (lambda: f.elu(torch.arange(3)), TypeError, "elu: input is torch.int64"),
    (lambda: f.mish([1.0]), TypeError, "mish: input must be a tensor, not list"),
    (lambda: f.hardswish(torch.ones(2), backend="cuda"), ValueError, "hardswish: backend='cuda' is not known"),
]


@pytest.mark.parametrize("call, kind, message", ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_errors(call, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        call()
