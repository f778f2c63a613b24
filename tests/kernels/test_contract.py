"""What every fused kernel keeps to, looped over the ops: parameters, operators, orders of differentiation, refusals."""

from __future__ import annotations

import inspect
from random import Random

import pytest
import torch
from fused import by_name, double, each_dtype, takes
from helpers import draw_call, floats
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from bptoolkit import OPS
from bptoolkit.cases import Draw
from bptoolkit.function import _RULES
from bptoolkit.triton_kernels import aot, operator

FUSED = [name for name, op in OPS.items() if op.kernel]
RULES = [rule for rule in _RULES.values() if rule.kernel]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_same_two_rules(rule):
    """A kernel's rules take what the eager rules take, under the same names."""
    kernel = rule.kernel()
    assert list(inspect.signature(kernel.forward).parameters) == list(inspect.signature(rule.forward).parameters)
    assert set(inspect.signature(kernel.backward).parameters) == set(inspect.signature(rule.backward).parameters)
    assert list(inspect.signature(kernel.backward).parameters) == list(inspect.signature(rule.backward).parameters)


def test_every_file_is_used():
    """A file under triton_kernels with `specs` serves an op: its stem is the stem of an op's file, or of one of the package."""
    import bptoolkit.ops

    stems = {m.__name__.rpartition(".")[2] for m in aot.modules()}
    assert stems <= {*bptoolkit.ops.NAMES, "compress", "associative_scan"}, stems


def cases(op, count, dtype=torch.float32, device="cpu"):
    """Drawn calls that the kernel takes; there must be some."""
    found = []
    for seed in range(20 * count):
        case = op.draw(Draw(Random(seed), dtype=dtype, sizes=(1, 2, 3, 4, 5), device=device))
        if len(found) < count and takes(op, case):
            found.append(case)
    assert len(found) == count, f"{op.name}: its kernel takes {len(found)} of {20 * count} drawn calls"
    return found


class Calls(TorchDispatchMode):
    """Remembers the calls of our operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        if f in operator.REGISTERED.values():
            self.calls.append((f, args))
        return f(*args, **(kwargs or {}))


def calls_of(op, device):
    """The calls of our operators that four calls of the op make, forward and backward."""
    seen = []
    for case in cases(op, 4, device=device):
        with Calls() as mode:
            orders(by_name(op), case, most=1)
        seen += mode.calls
    return seen


@pytest.mark.parametrize("name", FUSED)
def test_operators(name, device, one_seed):
    """Schema, fake kernels and tracing of the operators that the op's calls run."""
    seen = calls_of(OPS[name], device)
    assert seen, f"{name}: backend='triton' runs no kernel"
    done = set()
    for f, args in seen:
        args = tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, args)
        sort = (f, tuple(t is None for t in args))
        if sort not in done:
            done.add(sort)
            tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
            opcheck(f, tuple(args), test_utils=tests)


def test_every_operator_is_checked(device):
    """By the test above; those that serve no op, and of a second order, in files of their own."""
    checked = {f for name in FUSED for f, _ in calls_of(OPS[name], device)}
    left = {name for name, f in operator.REGISTERED.items() if f not in checked}
    packing = {"triton_pack", "triton_unpack", "triton_pack_bits", "triton_unpack_bits"}
    others = {"triton_attention_double", "triton_associative_scan", "triton_associative_scan_backward"}
    assert left == packing | others  # test_compress.py, test_attention_double.py, test_associative_scan.py


@each_dtype
@pytest.mark.parametrize("name", FUSED)
def test_first_and_second_order(name, device, dtype, one_seed):
    """First order by the kernel; second order by the eager rule and the kernel's own backward; float64 truth."""
    op = OPS[name]
    for case in cases(op, 2, dtype, device):
        exact = tree_map(
            lambda t: double([t])[0].detach().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t, case
        )
        tolerance = 30 * torch.finfo(dtype).eps
        every = orders(op.reference, exact)
        size = max(float(t[t.isfinite()].abs().max()) for t in every if t.isfinite().any())  # what cancels in one is in another
        for got, want in zip(orders(by_name(op), case), every, strict=True):
            torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance * size, equal_nan=True)


def orders(fn, case, most=2):
    """Values, gradients, and the gradients of a sum of the gradients, with weights."""
    leaves = [t for t in tree_flatten((case.args, case.kwargs))[0] if isinstance(t, Tensor) and t.requires_grad]
    found, live = [], [o for o in floats(fn(*case.args, **case.kwargs)) if o.requires_grad]
    for order in range(1, most + 1):
        found += [o.detach() for o in live] if order == 1 else []
        weights = [torch.arange(1, o.numel() + 1, dtype=torch.float64).cos().view(o.shape).to(o) for o in live]
        options = {"allow_unused": True, "materialize_grads": True, "create_graph": order < most}
        if order < most:  # the kernel's backward runs only where nothing differentiates it again
            found += torch.autograd.grad(live, leaves, weights, retain_graph=True, allow_unused=True, materialize_grads=True)
        grads = torch.autograd.grad(live, leaves, weights, **options) if live else [torch.zeros_like(t) for t in leaves]
        found += [g.detach() for g in grads]
        live = [g for g in grads if g.requires_grad]
    return found


@pytest.mark.parametrize("name", FUSED)
def test_compiled(name, device, one_seed):
    """One graph without a break, the kernels in it, and the same values and gradients."""
    op = OPS[name]
    (case,) = cases(op, 1, device=device)
    torch._dynamo.reset()
    got = orders(torch.compile(by_name(op), fullgraph=True, backend="aot_eager", dynamic=False), case, most=1)
    for g, w in zip(got, orders(by_name(op), case, most=1), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("name", FUSED)
def test_what_no_kernel_takes(name, device):
    """By name it raises and says why; "auto" runs the eager rule."""
    op = OPS[name]
    case = op.draw(Draw(Random(1), dtype=torch.float64, sizes=(2, 3), device=device))
    with pytest.raises(ValueError, match=f"{name}: backend='triton' cannot run here: .*"):
        by_name(op)(*case.args, **case.kwargs)
    op.call(*case.args, **case.kwargs)
    (case,) = cases(op, 1, device=device)

    class Own(Tensor):
        pass

    own = tree_map(lambda t: t.detach().as_subclass(Own) if isinstance(t, Tensor) and t.is_floating_point() else t, case)
    with pytest.raises(ValueError, match="takes plain tensors, not Own"):
        by_name(op)(*own.args, **own.kwargs)


@pytest.mark.parametrize("name", FUSED)
def test_forward_mode_is_eager(name, device, one_seed):
    """Forward mode under "auto" runs the eager rule, and is right, in the process in which the kernel would run."""
    call = draw_call(OPS[name], 3, dtype=torch.float32, device=device)
    x, *rest = (t.detach() for t in call.tensors)

    def tangents(fn):
        return torch.func.jvp(lambda x: fn(x, *rest), (x,), (x.cos(),))[1]

    for got, want in zip(tangents(call.ours), tangents(call.reference), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()) if want.numel() else 0)
