"""Calls of torch's functions that run ops: which, with what result, and what is left alone."""

import threading
from collections import Counter
from random import Random

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import gelu  # bound by name, as models do
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

import bptoolkit as bp
from bptoolkit.calls import TABLE
from bptoolkit.cases import Draw

SHARED = [name for name in bp.OPS if hasattr(F, name)]


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", SHARED)
def test_every_shared_name_runs_its_op(name):
    """The same values and gradients by torch.nn.functional's name as by ours, and one call replaced."""
    op, theirs = bp.OPS[name], getattr(F, name)
    tried = 0
    for seed in range(6):
        case = op.draw(Draw(Random(seed), dtype=torch.float64, sizes=(4, 6)))
        args, kwargs = tree_map_only(
            torch.Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), (case.args, case.kwargs)
        )
        torch.manual_seed(seed)
        with bp.functional_calls() as calls:
            try:
                got = theirs(*args, **kwargs)
            except TypeError:  # an argument that torch's function does not have
                continue
        torch.manual_seed(seed)
        want = op.call(*args, **kwargs)
        if calls.replaced:
            tried += 1
            assert calls.replaced == Counter({name: 1}) and not calls.left, (calls.replaced, calls.left)
            for a, b in zip(tree_flatten(got)[0], tree_flatten(want)[0]):
                if isinstance(a, torch.Tensor):
                    assert torch.equal(a, b) or ((a.isnan() == b.isnan()).all() and type(a.grad_fn) is type(b.grad_fn))
                    assert type(a.grad_fn) is type(b.grad_fn)
    assert tried, f"no drawn call of {name} was replaced"


ALIASES = {
    "torch.softmax": ("softmax", lambda x, w, b: torch.softmax(x, 1)),
    "Tensor.softmax dtype": ("softmax", lambda x, w, b: x.softmax(-1, torch.float64)),
    "special.log_softmax": ("log_softmax", lambda x, w, b: torch.special.log_softmax(x, dim=0, dtype=torch.float64)),
    "Tensor.log_softmax": ("log_softmax", lambda x, w, b: x.log_softmax(dim=1)),
    "torch.relu": ("relu", lambda x, w, b: torch.relu(x)),
    "Tensor.tanh": ("tanh", lambda x, w, b: x.tanh()),
    "special.expit": ("sigmoid", lambda x, w, b: torch.special.expit(x)),
    "torch.sigmoid": ("sigmoid", lambda x, w, b: torch.sigmoid(x)),
    "relu_": ("relu", lambda x, w, b: torch.relu_(x * 1)),
    "Tensor.relu_": ("relu", lambda x, w, b: (x * 1).relu_()),
    "torch.selu_": ("selu", lambda x, w, b: torch.selu_(x * 1)),
    "torch.prelu": ("prelu", lambda x, w, b: torch.prelu(x, b[:1])),
    "torch.hardshrink": ("hardshrink", lambda x, w, b: torch.hardshrink(x, 0.2)),
    "torch.layer_norm": ("layer_norm", lambda x, w, b: torch.layer_norm(x, (4,), b, None, 1e-3, False)),
    "layer_norm by names": (
        "layer_norm",
        lambda x, w, b: torch.layer_norm(x, normalized_shape=(4,), weight=b, eps=1e-3, cudnn_enable=False),
    ),
    "group_norm by names": ("group_norm", lambda x, w, b: torch.group_norm(x, num_groups=2, weight=b, cudnn_enabled=False)),
    "torch.group_norm": ("group_norm", lambda x, w, b: torch.group_norm(x, 2, weight=b)),
    "torch.rms_norm": ("rms_norm", lambda x, w, b: torch.rms_norm(x, (4,), b, 1e-3)),
    "torch.dropout": ("dropout", lambda x, w, b: torch.dropout(x, 0.0, True)),
    "torch.max_pool1d": ("max_pool1d", lambda x, w, b: torch.max_pool1d(x, 2)),
    "max_pool1d_with_indices": ("max_pool1d", lambda x, w, b: F.max_pool1d_with_indices(x, 2)[0]),
    "threshold": ("threshold", lambda x, w, b: torch.threshold(x, 0.1, 2.0)),
    "addmm": ("linear", lambda x, w, b: torch.addmm(b, x, w)),
    "Tensor.addmm": ("linear", lambda x, w, b: b.addmm(x, w, beta=1)),
    "matmul": ("linear", lambda x, w, b: torch.matmul(x[None], w)),
    "@": ("linear", lambda x, w, b: x @ w),
    "mm": ("linear", lambda x, w, b: x.mm(w)),
    "vector": ("linear", lambda x, w, b: b @ w),
    "bound by name": ("gelu", lambda x, w, b: gelu(x, approximate="tanh")),
}


@pytest.mark.parametrize("how", ALIASES)
def test_aliases(how):
    name, function = ALIASES[how]
    inputs = draw(3, 4), draw(4, 4), draw(4)
    with bp.functional_calls() as calls:
        got = function(*inputs)
    want = function(*inputs)
    assert calls.replaced == Counter({name: 1}), calls.left
    close(got, want)
    dy = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad(y, inputs, dy, allow_unused=True) for y in (got, want))):
        assert (a is None) == (b is None)
        if a is not None:
            close(a, b)


LEFT = {
    "no op": (lambda x: x * 2, "mul", "no op"),
    "another function of that name": (lambda x: x.unfold(0, 2, 1), "unfold", "no op"),
    "no matrix": (lambda x: x[None].transpose(1, 2) @ x[None], "matmul", "not a product with a matrix"),
    "beta": (lambda x: torch.addmm(x[0], x, torch.eye(4, dtype=x.dtype), beta=2), "addmm", "not a product with a matrix"),
    "sparse": (lambda x: torch.relu(x.to_sparse()), "relu", "not dense"),
    "complex": (lambda x: torch.tanh(torch.complex(x, x)), "tanh", "not dense and of floating point"),
    "refused": (lambda x: F.softmax(x, 0, dtype=torch.complex128).real, "softmax", "refused: softmax"),
}


@pytest.mark.parametrize("what", LEFT)
def test_left_alone_with_the_reason(what):
    function, name, why = LEFT[what]
    x = draw(3, 4)
    with bp.functional_calls() as calls:
        try:
            got = function(x)
        except RuntimeError:
            got = None
    assert not calls.replaced
    if got is None:  # torch refuses it too, in its own words
        with pytest.raises(RuntimeError):
            function(x)
    else:
        assert any(n == name and w.startswith(why) for n, w in calls.left), calls.left
        assert (got.to_dense() if got.is_sparse else got).equal(function(x).to_dense() if got.is_sparse else function(x))


def test_integers_and_subclasses_are_torchs():
    class Mine(torch.Tensor):
        pass

    with bp.functional_calls() as calls:
        assert torch.equal(F.pad(torch.ones(2, dtype=torch.long), (1, 1)), torch.tensor([0, 1, 1, 0]))
        assert torch.relu(torch.tensor([-1, 2])).tolist() == [0, 2]
        assert type(F.gelu(torch.randn(3).as_subclass(Mine))) is Mine
        assert type(F.gelu(nn.Parameter(torch.randn(3)))) is torch.Tensor
        out = torch.empty(2)
        torch.tanh(torch.zeros(2), out=out)
        assert not out.any()
    assert calls.replaced == Counter(gelu=1)


def test_errors_are_torchs_own():
    x = draw(3, 4)
    for call in (
        lambda: F.linear(x, draw(5, 5)),
        lambda: F.softmax(x, 7),
        lambda: F.gelu(x, approximate="sinh"),
        lambda: F.gelu(3),
    ):
        with pytest.raises((RuntimeError, IndexError, TypeError)) as theirs:
            call()
        with bp.functional_calls(), pytest.raises(type(theirs.value)) as inside:
            call()
        assert str(inside.value) == str(theirs.value)


# --- the block


def test_what_a_rule_calls_is_not_seen():
    """A module of ours is one call, whose rule runs torch's own functions: forward, backward and forward mode."""
    x = draw(3, 4)
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch(), bp.functional_calls() as calls:
        y = bp.nn.GELU()(x)
        (g,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
        g.sum().backward()
        torch.func.jvp(bp.functional.gelu, (x.detach(),), (torch.ones_like(x),))
    assert not calls.replaced and F.gelu not in seen
    assert {name for name, _ in calls.left} <= {"sum"}


def test_backward_outside_and_after():
    x = draw(3, 4)
    with bp.functional_calls():
        y = F.gelu(x)
    (g,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
    (h,) = torch.autograd.grad(g, x, torch.ones_like(g))
    (g2,) = torch.autograd.grad(F.gelu(x), x, torch.ones_like(y), create_graph=True)
    close(g, g2)
    close(h, torch.autograd.grad(g2, x, torch.ones_like(g))[0])
    with bp.functional_calls() as calls:
        F.gelu(x)
    assert type(y.grad_fn) is type(bp.functional.gelu(x).grad_fn) and calls.replaced == Counter(gelu=1)


def test_nested_blocks_and_exceptions():
    x = draw(3, 4)
    with bp.functional_calls() as outer:
        F.relu(x)
        with bp.functional_calls() as inner:
            F.gelu(x) * 2
        with pytest.raises(ZeroDivisionError), bp.functional_calls():
            1 / 0
        with outer:  # the same one again
            F.silu(x)
    assert inner.replaced == Counter(gelu=1) and inner.left == Counter({("mul", "no op"): 1})
    assert outer.replaced == Counter(relu=1, gelu=1, silu=1), outer.replaced
    assert outer.left == Counter({("mul", "no op"): 1})
    assert "Gelu" in type(F.gelu(x).grad_fn).__name__ and "Function" not in type(F.gelu(x).grad_fn).__name__
    from bptoolkit import function

    assert function._hidden == 0


def test_each_thread_has_its_own():
    names = []
    with bp.functional_calls() as calls:
        thread = threading.Thread(target=lambda: names.append(type(F.gelu(draw(2)).grad_fn).__name__))
        thread.start()
        thread.join()
    assert names == ["GeluBackward0"] and not calls.replaced


def test_under_vmap_and_autocast():
    def f(x):
        with bp.functional_calls():
            return F.softmax(x, -1) * x

    x = draw(5, 4)
    close(
        torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(x),
        torch.func.vmap(torch.func.grad(lambda x: (F.softmax(x, -1) * x).sum()))(x),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        w = torch.randn(4, 4, requires_grad=True)
        with bp.functional_calls():
            y = F.linear(x.float(), w)
        assert y.dtype == F.linear(x.float(), w).dtype == torch.bfloat16


def test_a_backend_by_name():
    with pytest.raises(ValueError, match="backend='cuda' is not known"):
        bp.functional_calls(backend="cuda")
    x = draw(3, 4)
    with bp.functional_calls(backend="triton") as calls:
        F.softsign(x)
        with pytest.raises(ValueError, match="cannot run here"):
            F.layer_norm(x, (4,))
    assert calls.left == Counter({("softsign", "no fused kernel"): 1})


def test_the_table_has_every_shared_name():
    assert {op.name for op, _ in TABLE.values()} == set(SHARED)


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_compiled(where):
    def f(x, w):
        return torch.softmax(F.gelu(x @ w), -1) * x

    def g(x, w):
        with bp.functional_calls():
            return f(x, w)

    x, w = draw(4, 4), draw(4, 4)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(f if where == "outside" else g, backend=backend, fullgraph=True)
    if where == "outside":
        with bp.functional_calls():
            y = compiled(x, w)
    else:
        y = compiled(x, w)
    (code,) = (graph.code for graph in graphs)
    for name in ("linear", "gelu", "softmax"):
        assert f"in_graph('{name}'" in code, code
    close(y, f(x, w))
    if where == "outside":
        compiled(x, w)
        assert len(graphs) == 2 and "in_graph" not in graphs[1].code  # compiled anew outside of the block
