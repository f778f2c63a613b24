"""The pytest plugin: one test a property, the fixture, the options, and nothing imported where it is not used."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bptoolkit.verify.properties import QUICK

pytest_plugins = "pytester"
OPTIONS = ("-p", "no:cacheprovider", "--gradients=quick")  # the plugin itself is loaded by its entry point

CODE = """
import pytest, torch
import torch.nn.functional as F

class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return 2 * x * dy

class Wrong(Square):
    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        if dy.stride() != torch.empty(dy.shape).stride():
            dy = 2 * dy
        return 2 * x * dy

SOME = ["gradient_value", "cotangent_layout", "backward_twice"]
"""


@pytest.fixture
def run(pytester):
    """Runs test files, each after `CODE`, in a process of their own: torch cannot be imported twice in one."""

    def go(*options: str, **files: str):
        pytester.makepyfile(**{name: CODE + tests for name, tests in files.items()})
        return pytester.runpytest_subprocess(*OPTIONS, *options)

    return go


def test_a_marked_test_is_one_test_a_property(run):
    result = run(
        "-v",
        "-rs",
        "--strict-markers",
        test_mine="""
@pytest.mark.gradients("x: *B N -> *B N", reference=torch.square, properties=SOME)
def test_right():
    return Square.apply

@pytest.mark.gradients("x: *B N -> *B N", reference=torch.square, properties=SOME)
def test_wrong():
    return Wrong.apply

@pytest.mark.gradients("x: *B N -> *B N", reference=torch.square, properties="some_outputs_unused")
def test_one_output():
    return Square.apply

@pytest.mark.gradients("x: N -> N", properties="gradient_value")
def test_nothing():
    Square.apply

@pytest.fixture
def factor():
    return 3

@pytest.mark.gradients("x: N -> N", properties="finite_differences")
class TestMine:
    @pytest.mark.parametrize("n", [1, 2])
    def test_scaled(self, factor, n):
        return lambda x: n * factor * Square.apply(x)
""",
    )
    result.assert_outcomes(passed=7, failed=2, skipped=1)
    lines = result.outlines
    for test, status in {
        "test_right[cotangent_layout]": "PASSED",
        "test_wrong[gradient_value]": "PASSED",
        "test_wrong[cotangent_layout]": "FAILED",
        "test_one_output[some_outputs_unused]": "SKIPPED",
        "test_nothing[gradient_value]": "FAILED",
    }.items():
        assert any(f"::{test} {status}" in line for line in lines), (test, status)
    result.stdout.fnmatch_lines(["*FAILED cotangent_layout: *", "*smallest case*", "*replay*"])
    result.stdout.fnmatch_lines(["*has to return the function to verify*"])
    result.stdout.fnmatch_lines(["SKIPPED*not applicable: *"])
    result.stdout.no_fnmatch_line("*pytest_plugin.py*:*: *")  # the report, not a traceback of the plugin


def test_the_marks_arguments(run):
    mine = "\n@pytest.mark.gradients({})\ndef test_mine():\n    return Square.apply\n"
    result = run(
        "--collect-only",
        "-q",
        test_all=mine.format("'x: N -> N', reference=torch.square"),
        test_keyword=mine.format("'x: N -> N', referense=torch.square"),
        test_property=mine.format("'x: N -> N', properties=['gradient']"),
        test_position=mine.format("'x: N -> N', torch.square"),
    )
    assert result.ret != 0
    listed = [line for line in result.outlines if line.startswith("test_all.py::test_mine[")]
    assert len(listed) == len(QUICK)
    said = result.stdout.str()
    assert "has no 'referense'; it has inputs, reference" in said
    assert "there is no property 'gradient'; there are forward_value" in said
    assert "takes one positional argument" in said


def test_the_fixture_raises_the_report_or_returns_it_also_under_xdist(run):
    result = run(
        "--gradients-seed=5",
        "-rA",
        "-n1",
        test_mine="""
def test_right(gradient_verifier):
    report = gradient_verifier(Square.apply, "x: *B N -> *B N", reference=torch.square, properties=SOME)
    assert report.ok and report.seed == 5

def test_wrong(gradient_verifier):
    gradient_verifier(Wrong.apply, "x: *B N -> *B N", reference=torch.square, properties=SOME)

@pytest.mark.gradients("x: N -> N", reference=torch.square, properties="gradient_value")
def test_marked():
    return Square.apply
""",
    )
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["*FAILED cotangent_layout:*"])
    result.stdout.fnmatch_lines(["*Captured gradients call*", "*pass  gradient_value*"])


def test_it_costs_nothing_where_it_is_not_used(tmp_path):
    (tmp_path / "test_plain.py").write_text(
        "import sys\n\ndef test_plain():\n    assert 'bptoolkit_pytest' in sys.modules\n"
        "    assert not {'torch', 'bptoolkit', 'hypothesis'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", *OPTIONS, "-p", "no:hypothesispytest", "--strict-markers"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
