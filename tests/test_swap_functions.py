"""swap(also=...), classes of the user's, and swap(functions=True), what a forward calls by name."""

import copy
import pickle
import sys
from collections import Counter

import pytest
import torch
from swapping import LINEAR, same, state
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import bptoolkit as bp


class Norm(nn.Module):
    """As models write it: by products and sums."""

    def __init__(self, n):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n)), 1e-6

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class FastNorm(Norm):
    def forward(self, x):
        return bp.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Block(nn.Module):
    def __init__(self, n, broken=False):
        super().__init__()
        self.norm, self.up, self.down, self.broken = Norm(n), nn.Linear(n, 2 * n), nn.Linear(2 * n, n), broken

    def forward(self, x):
        if self.broken:
            raise RuntimeError("broken")
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, n=4, how=None):
        super().__init__()
        self.blocks, self.how = nn.ModuleList(Block(n) for _ in range(2)), how

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.how is None else checkpoint(block, x, use_reentrant=self.how == "reentrant")
        return torch.softmax(x, -1)


def build(**kwargs):
    torch.manual_seed(0)
    return Net(**kwargs).double(), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)


def gradients(model, x):
    y = model(x)
    dy = torch.arange(1, y.numel() + 1, dtype=y.dtype).cos().view(y.shape)
    return [y, *torch.autograd.grad(y, [x, *model.parameters()], dy)]


def close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# --- also


def test_also_gives_a_class_and_unswap_takes_it_back(ran):
    model, x = build()
    before, want = state(model), gradients(model, x)
    report = bp.swap(model, also={Norm: FastNorm})
    assert report.swapped["blocks.0.norm"] == "FastNorm, by also" and type(model.blocks[1].norm) is FastNorm
    assert sum(e.what == "swapped" for e in report.entries) == 6
    close(gradients(model, x), want)
    assert Counter(ran)["rms_norm"] == 2
    again = bp.swap(model, also={Norm: FastNorm})
    assert not again.swapped and again.already["blocks.0.norm"] == bp.swap(model).already["blocks.0.norm"]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)) if __name__ in sys.modules else model):
        assert type(other.blocks[0].norm) is FastNorm
        bp.unswap(other)
        assert type(other.blocks[0].norm) is Norm
    bp.unswap(model)
    same(before, state(model))


def test_also_goes_before_the_table_and_by_only():
    class Mine(nn.Linear):
        backend = "auto"

        def forward(self, x):
            return bp.functional.linear(x, self.weight, self.bias, backend=self.backend)

    model, _ = build()
    before = state(model)
    report = bp.swap(model, also={nn.Linear: Mine}, only="blocks.0", backend="eager")
    assert type(model.blocks[0].up) is Mine and model.blocks[0].up.backend == "eager" and len(report.swapped) == 2
    assert report.left["blocks.1.up"] == "not in only"
    bp.unswap(model)
    same(before, state(model))


@pytest.mark.parametrize(
    ("also", "match"),
    [
        ([Norm, FastNorm], "also is a list, not a mapping"),
        ({Norm: torch.relu}, "does not map a class of modules to another"),
        ({"Norm": FastNorm}, "does not map a class of modules to another"),
        ({Norm: LINEAR}, "Linear must be a subclass of Norm"),
        ({Norm: Norm}, "Norm must be a subclass of Norm"),
    ],
)
def test_also_refused_before_any_change(also, match):
    model, _ = build()
    before = state(model)
    with pytest.raises(TypeError, match=match):
        bp.swap(model, also=also)
    same(before, state(model))


# --- functions


@pytest.mark.parametrize("how", [None, "reentrant", "not reentrant"])
def test_functions_run_the_ops_and_unswap_takes_the_hooks_off(how, ran):
    model, x = build(how=how)
    before, want = state(model), gradients(model, x) if how != "reentrant" else gradients(build()[0], x)
    bp.swap(model, functions=True)
    bp.swap(model, functions=True)
    if how == "reentrant":  # torch.autograd.grad does not go through it
        y = model(x)
        y.backward(torch.arange(1, y.numel() + 1, dtype=y.dtype).cos().view(y.shape))
        close([y, x.grad, *(p.grad for p in model.parameters())], want)
    else:
        close(gradients(model, x), want)
    twice = 1 if how is None else 2  # a checkpointed block runs again in backward, with the same ops
    assert Counter(ran)["gelu"] == 2 * twice and Counter(ran)["softmax"] == 1 and Counter(ran)["linear"] >= 4 * twice
    count = len(ran)
    F.gelu(x)
    assert len(ran) == count  # and nothing outside of the model
    model.zero_grad()
    bp.unswap(model)
    if how != "reentrant":
        close(gradients(model, x), want)
    after = state(model)
    assert not any(held["_forward_hooks"] or held["_forward_pre_hooks"] for _, held in after.values())
    assert {n: set(held) for n, (_, held) in after.items()} == {n: set(held) for n, (_, held) in before.items()}


def test_functions_in_copies():
    model, x = build()
    bp.swap(model, functions=True)
    others = [copy.deepcopy(model)]
    if __name__ in sys.modules:
        others.append(pickle.loads(pickle.dumps(model)))
    for other in others:
        with bp.functional_calls() as calls:
            other(x)
        assert calls.replaced["gelu"] == 2
        bp.unswap(other)
        assert "GeluBackward0" in names(other(x))
    assert "GeluBackward0" not in names(model(x))


def names(y):
    """The nodes of a graph."""
    seen, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [n for n, _ in node.next_functions]
    return {type(n).__name__ for n in seen}


def test_functions_after_an_exception():
    model, x = build()
    bp.swap(model, functions=True)
    model.blocks[1].broken = True
    with pytest.raises(RuntimeError, match="broken"):
        model(x)
    assert "GeluBackward0" in names(F.gelu(x))
    model.blocks[1].broken = False
    handle = model.blocks[0].register_forward_pre_hook(lambda *_: 1 / 0, prepend=True)  # before ours: ours never entered
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            model(x)
        assert "GeluBackward0" in names(F.gelu(x))
    handle.remove()
    assert "GeluBackward0" not in names(model(x))


def test_functions_of_the_modules_chosen():
    model, x = build()
    bp.swap(model, functions=True, only="blocks.0")
    with bp.functional_calls():
        pass
    seen = names(model(x))
    assert {"GeluBackward0", "SoftmaxBackward0"} <= seen
    hooked = [n for n, m in model.named_modules() if m._forward_hooks]
    assert hooked == ["blocks.0", "blocks.0.norm"]


def test_functions_compile_whole():
    model, x = build()
    want = gradients(model, x)
    bp.swap(model, also={Norm: FastNorm}, functions=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(gradients(compiled, x), want)
