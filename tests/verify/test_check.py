"""`bp.verify.check`: what it takes, what it says, that it is deterministic, and that what it prints can be run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

import bptoolkit as bp
from bptoolkit.verify import check
from bptoolkit.verify.point import Axes, Point
from bptoolkit.verify.properties import PROPERTIES

LINEAR = "x: B I, w: O I, b: O -> B O"
MINE = '''
import torch

class Mine(torch.autograd.Function):
    """A linear layer whose bias gradient is a mean."""

    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        return x @ w.T + b

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        db = DB
        return dy.to(x.dtype) @ w, dy.to(x.dtype).T @ x, db

def reference(x, w, b):
    return torch.nn.functional.linear(x, w, b)

def twice(x, w, b):
    return 2 * (x @ w.T + b)
'''
MEAN, STRIDE, RIGHT = "dy.mean(0)", "dy.sum(0) * (2 if dy.stride(0) == 0 and dy.shape[0] > 1 else 1)", "dy.sum(0)"


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Writes mine.py with a bias gradient and imports it from there."""

    def write(db: str):
        (tmp_path / "mine.py").write_text(MINE.replace("DB", db))
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(tmp_path))
        sys.modules.pop("mine", None)
        import mine

        return mine

    return write


def test_a_wrong_gradient_is_named_shrunk_and_explained(mine):
    report = check(mine(MEAN).Mine, LINEAR, reference=F.linear)
    (failure, *_) = report.failures
    assert failure.property == "gradient_value" and "gradient of b" in failure.message
    assert dict(failure.point.sizes)["I"] == 5 and failure.point.dtype == "float64"
    assert any("batch" in guess or "B" in guess for guess in failure.diagnosis), failure.diagnosis
    assert "--replay" in str(report)


def test_what_matters_is_found(mine):
    report = check(mine(STRIDE).Mine, LINEAR, reference=F.linear)
    (failure,) = (f for f in report.failures if f.property == "cotangent_layout")
    fails, passes = failure.matters["cotangent"]
    assert "ones" in fails and "sliced" in passes and "random" in passes
    assert list(failure.matters) == ["cotangent"]


def test_what_is_right_passes_and_everything_is_judged(mine):
    report = check(mine(RIGHT).Mine, LINEAR, reference=F.linear)
    assert report.ok, str(report)
    unjudged = {p for p in PROPERTIES if not report.calls[p]}
    old_style = {"forward_mode", "vmap", "per_sample_gradients"}  # without setup_context torch refuses these
    assert unjudged <= {*old_style, "devices", "registration", "some_outputs_unused"}
    assert all(report.skipped[p] for p in unjudged)


@pytest.mark.parametrize("db", [MEAN, STRIDE])
def test_the_snippet_reproduces_when_pasted(mine, tmp_path, db):
    module = mine(db)
    report = check(module.Mine, LINEAR, reference=module.reference)
    code = report.failures[0].code
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "AssertionError" in done.stderr and "worst at" in done.stderr, code + done.stderr
    (tmp_path / "mine.py").write_text(MINE.replace("DB", RIGHT))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, "the same code passes once the mistake is mended\n" + done.stderr


def test_replay(mine):
    module = mine(STRIDE)
    line = check(module.Mine, LINEAR, reference=F.linear, quick=True).failures[0].line
    again = bp.verify.replay(line, module.Mine, LINEAR, reference=F.linear)
    assert not again.ok and again.failures[0].property == "cotangent_layout"
    module = mine(RIGHT)
    assert bp.verify.replay(line, module.Mine, LINEAR, reference=F.linear).ok


def test_a_replay_that_is_run_as_code(mine, tmp_path):
    """What is too large to be written out is replayed."""
    module = mine("dy.sum(0) * (1 + (dy.shape[0] > 64))")
    report = check(module.Mine, LINEAR, reference=module.reference, properties=["sizes"])
    assert "replay" in report.failures[0].code and "B=65" in report.failures[0].line
    done = subprocess.run([sys.executable, "-c", report.failures[0].code], cwd=tmp_path, capture_output=True, text=True)
    assert "AssertionError" in done.stderr and "FAILED sizes" in done.stdout, done.stderr


def test_one_seed_gives_one_search(mine):
    module = mine(STRIDE)
    a, b = (check(module.Mine, LINEAR, reference=F.linear, seed=3, quick=True, budget=1e6) for _ in range(2))
    a.seconds = b.seconds = 0
    assert a.as_dict() == b.as_dict()


def test_without_a_reference(mine):
    report = check(mine(MEAN).Mine, LINEAR)
    assert "finite_differences" in {f.property for f in report.failures}
    assert report.skipped["forward_value"] == "no reference was given"
    assert check(mine(RIGHT).Mine, LINEAR).ok


@pytest.mark.parametrize("seed", [0, 2])
def test_ties_of_a_narrow_dtype_are_no_failure_without_a_reference(seed):
    """softmax of products of size 10⁴ has one winner, and in bfloat16 two; of size 10⁶ they leave float16."""
    report = check(
        lambda x, w: torch.softmax(x @ w, -1), "x: B I, w: I O -> B O", seed=seed, budget=60, properties=["values", "dtypes"]
    )
    assert report.ok, report
    assert report.calls["values"] > 50


@pytest.mark.parametrize("bad", [None, torch.bfloat16, torch.float16])
def test_a_narrow_dtype_is_judged_without_a_reference(bad):
    class Sine(torch.autograd.Function):
        """Right, but in one dtype: there its gradient has lost half of the digits in bfloat16, and is infinite in float16."""

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx, dy):
            (x,) = ctx.saved_tensors
            dx = dy * x.cos()
            if x.dtype is not bad:
                return dx
            return (dx * 8).round() / 8 if bad is torch.bfloat16 else dx / 0

    report = check(Sine.apply, "x: B N -> B N", properties=["dtypes"], quick=True)
    assert [f.property for f in report.failures] == ([] if bad is None else ["dtypes"]), report


def test_a_forward_that_is_wrong(mine):
    report = check(mine(RIGHT).Mine, LINEAR, reference=mine(RIGHT).twice, quick=True)
    assert report.failures[0].property == "forward_value"


def test_example_tensors_find_their_own_sizes():
    seen = set()

    def f(x, w, index):
        seen.add(tuple(x.shape))
        return F.linear(x, w)[index]

    examples = (torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 1]))
    report = check(f, examples, reference=f, quick=True)
    assert report.ok, str(report)
    assert {(4, 3), (33, 3), (4, 33), (4, 0)} <= seen


def test_only_what_requires_grad_is_differentiated_by():
    x, y = torch.randn(3, requires_grad=True), torch.randn(3)
    report = check(lambda x, y: x * y.detach(), (x, y), reference=torch.mul, quick=True)
    assert report.ok, str(report)
    report = check(lambda x, y: x * y.detach(), (x, y.clone().requires_grad_()), reference=torch.mul, quick=True)
    assert not report.ok


def test_a_strategy_of_arguments():
    def rows(n):
        g = torch.Generator().manual_seed(n)
        return torch.rand(n, 3, generator=g), torch.arange(n) % 3

    strategy = st.integers(1, 5).map(rows)
    ours = lambda p, t: -p[torch.arange(len(t)), t].log()  # noqa: E731
    assert check(ours, strategy, reference=lambda p, t: F.nll_loss(p.log(), t, reduction="none"), quick=True).ok
    report = check(lambda p, t: 2 * ours(p, t), strategy, reference=ours, quick=True)
    assert report.failures[0].property == "forward_value" and "case=0" in report.failures[0].line


def test_modules_are_judged_by_their_parameters_too():
    assert check(torch.nn.GroupNorm(2, 4), (torch.randn(3, 4, 5),), quick=True).ok
    right = torch.nn.Linear(4, 3)
    assert check(bp.nn.Linear(4, 3), (torch.randn(2, 4),), reference=right, quick=True).ok

    class Detached(torch.nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight, self.bias.detach())

    report = check(Detached(4, 3), (torch.randn(2, 4),), reference=right, quick=True)
    assert "bias" in report.failures[0].message, str(report)
    assert right.weight.dtype == torch.float32, "the caller's module is left as it was"


def test_a_batch_norm_in_training_is_deterministic_for_the_check():
    module = torch.nn.BatchNorm1d(4)
    before = module.running_mean.clone()
    assert check(module, (torch.randn(6, 4),), quick=True).ok
    assert torch.equal(module.running_mean, before)


def test_contracts_are_tested_as_declared():
    class Zero(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, dy):
            (x,) = ctx.saved_tensors
            return (3 * x.detach() ** 2 * dy.detach()).detach()

    cube = lambda x: x**3  # noqa: E731
    for declared in (None, {"double_backward": False}, {"double_backward": True}):
        report = check(Zero, "x: N -> N", reference=cube, contract=declared, properties=["double_backward"])
        assert not report.ok, declared
    assert check(Zero, "x: N -> N", reference=cube, contract={"double_backward": False}).contract == {"double_backward": False}

    def drop(x):
        return x * (torch.rand(x.shape, dtype=torch.float64) < 0.5).to(x)

    assert "global_rng" in {f.property for f in check(drop, "x: N -> N", quick=True).failures}
    assert check(drop, "x: N -> N", reference=drop, contract={"random": True}, quick=True).ok


def test_dtypes_that_a_function_refuses_are_noted():
    def only32(x):
        if x.dtype != torch.float32:
            raise TypeError("float32 only")
        return x.sin()

    report = check(only32, "x: *B N -> *B N", reference=torch.sin, quick=True)
    assert report.ok and any("takes no float64" in n for n in report.notes), str(report)
    report = check(only32, "x: *B N -> *B N", reference=torch.sin, quick=True, contract={"dtypes": ("float32", "float64")})
    assert not report.ok


def test_json_and_junit(mine):
    report = check(mine(MEAN).Mine, LINEAR, reference=F.linear, quick=True)
    record = json.loads(report.to_json())
    assert record["ok"] is False and record["failures"][0]["property"] == "gradient_value"
    suite = ElementTree.fromstring(report.to_junit())
    assert suite.get("failures") == str(len(report.failures))
    assert {case.get("name") for case in suite} >= {"gradient_value", "backward_twice"}


def test_the_random_state_is_left_as_it_was():
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    check(torch.sin, "x: N -> N", reference=torch.sin, quick=True)
    assert torch.equal(torch.rand(3), want)


def test_quick_is_quick(mine):
    began = time.process_time()
    check(mine(RIGHT).Mine, LINEAR, reference=F.linear, quick=True)
    assert time.process_time() - began < 30, "far over the three seconds that it takes on an idle machine"


def test_points_round_trip_and_pairs_cover():
    axes = Axes({"B": (2, 0, 1), "*L": ("2", "-", "2x3")}, {"dtype": ("float64", "float16"), "layout": ("contiguous", "step")})
    from itertools import combinations
    from random import Random

    rows = list(axes.pairs(Random(0)))
    for a, b in combinations(axes.all, 2):
        assert {(p.get(a), p.get(b)) for p in rows} == {(x, y) for x in axes.all[a] for y in axes.all[b]}
    assert len(rows) < 3 * 3 * 2 * 2
    for p in (*rows, *axes.sweep()):
        assert Point.parse(str(p)) == p


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: check(lambda x: 3, (torch.randn(2),)), TypeError, "no floating-point tensor"),
        (lambda: check(lambda x: x, (torch.tensor([1]),)), ValueError, "differentiate by"),
        (lambda: check(lambda x: x, 3), TypeError, "shapes string, a tuple"),
        (lambda: check(lambda x: x, "nonsense"), ValueError, "not a shapes string"),
        (lambda: check(lambda x: x, "x y: B -> B"), ValueError, "not a name"),
        (lambda: check(lambda x: x, (torch.randn(2),), properties=["nope"]), ValueError, "nope"),
        (lambda: check(bp.OPS["linear"], (torch.randn(2),)), TypeError, "draws its own"),
        (lambda: check(3, (torch.randn(2),)), TypeError, "must be callable"),
        (lambda: check(torch.sin, (torch.randn(2),), reference=3), TypeError, "reference must be callable"),
        (lambda: check(torch.sin, (torch.randn(2),), contract={"nope": 1}), TypeError, "nope"),
        (lambda: check(torch.sin, (torch.randn(2),), contract={"vmap": "yes"}), TypeError, "True, False or None"),
        (lambda: check(torch.sin, st.just((torch.tensor([1]),))), ValueError, "nothing to differentiate"),
        (lambda: bp.verify.replay("nonsense", torch.sin, (torch.randn(2),)), ValueError, "not a point"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_reference_of_another_shape_is_a_failure_with_both_shapes():
    report = check(torch.sin, "x: B N -> B N", reference=lambda x: x.sum(0), quick=True)
    assert "(3, 5)" in report.failures[0].message and "(5,)" in report.failures[0].message


def test_assert_correct_raises_the_report():
    with pytest.raises(bp.verify.VerificationError, match="forward_value") as raised:
        bp.verify.assert_correct(torch.sin, "x: N -> N", reference=torch.cos, quick=True)
    assert not raised.value.report.ok


def test_an_empty_mean_is_no_finding():
    """torch's own decomposition divides by the number of elements in Python; that is not the function's fault."""
    report = check(F.mse_loss, "x: B N, y: B N ->", reference=F.mse_loss, properties=["gradient_value", "sizes"])
    assert report.ok, str(report)


def test_what_is_wrong_without_gradients_alone_is_a_wrong_forward():
    def fn(x):
        return torch.sin(x) * (1.0 if torch.is_grad_enabled() else 1.01)

    (failure,) = check(fn, "x: *B -> *B", reference=torch.sin, properties=["forward_value", "gradient_value"]).failures
    assert failure.property == "forward_value" and "under torch.no_grad()" in failure.message


@pytest.mark.parametrize("block", [200, 256, 1024])
def test_what_is_wrong_past_a_large_block_alone_is_a_matter_of_sizes(block):
    class Squares(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square().sum(-1)

        @staticmethod
        def backward(ctx, dy):
            (x,) = ctx.saved_tensors
            return 2 * x * dy[..., None] * (torch.arange(x.shape[-1]) < block)

    for inputs in ("x: *B N -> *B", (torch.randn(4, 6),)):
        report = check(Squares, inputs, reference=lambda x: x.square().sum(-1), properties=["gradient_value", "sizes"])
        assert [f.property for f in report.failures] == ["sizes"], str(report)
        assert report.failures[0].point.get("N" if isinstance(inputs, str) else "n6") in (257, 1025)
