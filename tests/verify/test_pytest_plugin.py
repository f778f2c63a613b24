"""The pytest plugin: one test a property, the fixture, the options, and nothing imported where it is not used."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest_plugins = "pytester"
LOADED = ("-p", "bptoolkit_pytest", "-p", "no:cacheprovider", "--gradients=quick")  # by name: -p and the entry point are one

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
    """Runs a test file in this process, and returns the result."""

    def go(tests: str, *options: str):
        pytester.makepyfile(CODE + tests)
        return pytester.runpytest_inprocess(*LOADED, *options)

    return go


def test_a_marked_test_is_one_test_a_property(run):
    result = run(
        """
@pytest.mark.gradients("x: *B N -> *B N", reference=torch.square, properties=SOME)
def test_right():
    return Square.apply

@pytest.mark.gradients("x: *B N -> *B N", reference=torch.square, properties=SOME)
def test_wrong():
    return Wrong.apply
""",
        "-v",
        "--strict-markers",
    )
    result.assert_outcomes(passed=5, failed=1)
    result.stdout.fnmatch_lines(
        [
            "*test_right?cotangent_layout? PASSED*",
            "*test_wrong?gradient_value? PASSED*",
            "*test_wrong?cotangent_layout? FAILED*",
        ]
    )
    result.stdout.fnmatch_lines(["*FAILED cotangent_layout:*", "*smallest case*", "*replay*"])
    result.stdout.no_fnmatch_line("*pytest_plugin.py*")  # the report, not our traceback


def test_what_does_not_apply_is_skipped_and_says_why(run):
    result = run(
        """
@pytest.mark.gradients("x: *B N -> *B N", reference=torch.square, properties="some_outputs_unused")
def test_one_output():
    return Square.apply
""",
        "-rs",
    )
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED*not applicable: *"])


def test_fixtures_parameters_and_classes_go_with_the_mark(run):
    result = run(
        """
@pytest.fixture
def factor():
    return 3

@pytest.mark.gradients("x: N -> N", properties=["gradient_value", "finite_differences"])
class TestMine:
    @pytest.mark.parametrize("n", [1, 2])
    def test_scaled(self, factor, n):
        return lambda x: n * factor * Square.apply(x)
"""
    )
    assert result.ret == 0 and sum(result.parseoutcomes().values()) == 4


def test_all_properties_by_default(run):
    result = run(
        """
@pytest.mark.gradients("x: N -> N", reference=torch.square)
def test_right():
    return Square.apply
""",
        "--collect-only",
        "-q",
    )
    from bptoolkit.verify.properties import QUICK

    assert sum("test_right[" in line for line in result.outlines) == len(QUICK)


@pytest.mark.parametrize(
    ("mark", "why"),
    [
        ("'x: N -> N', referense=torch.square", "no 'referense'"),
        ("'x: N -> N', properties=['gradient']", "no property 'gradient'"),
        ("'x: N -> N', torch.square", "one positional argument"),
    ],
)
def test_a_mark_that_says_something_else(run, mark, why):
    result = run(f"@pytest.mark.gradients({mark})\ndef test_mine():\n    return Square.apply\n")
    assert result.ret != 0
    result.stdout.fnmatch_lines([f"*{why}*"])


def test_a_marked_test_that_returns_nothing(run):
    result = run("@pytest.mark.gradients('x: N -> N', properties='gradient_value')\ndef test_mine():\n    Square.apply\n")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*has to return the function to verify*"])


def test_the_fixture_raises_the_report_or_returns_it(run):
    result = run(
        """
def test_right(gradient_verifier):
    report = gradient_verifier(Square.apply, "x: *B N -> *B N", reference=torch.square, properties=SOME)
    assert report.ok and report.seed == 5

def test_wrong(gradient_verifier):
    gradient_verifier(Wrong.apply, "x: *B N -> *B N", reference=torch.square, properties=SOME)
""",
        "--gradients-seed=5",
        "-rA",
    )
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*- gradients -*", "*pass  gradient_value*"])
    result.stdout.fnmatch_lines(["*FAILED cotangent_layout:*"])


def test_workers_of_xdist_have_it(run):
    result = run(
        """
@pytest.mark.gradients("x: N -> N", reference=torch.square, properties=SOME)
def test_right():
    return Square.apply
""",
        "-n1",
    )
    result.assert_outcomes(passed=3)


def test_it_costs_nothing_where_it_is_not_used(tmp_path):
    (tmp_path / "test_plain.py").write_text(
        "import sys\n\ndef test_plain():\n    assert 'bptoolkit_pytest' in sys.modules\n"
        "    assert not {'torch', 'bptoolkit', 'hypothesis'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", *LOADED, "-p", "no:hypothesispytest", "--strict-markers"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
