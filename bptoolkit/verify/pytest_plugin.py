"""What the pytest plugin does once it is used; `bptoolkit_pytest`, a module outside the package, is what pytest loads.

    @pytest.mark.gradients("x: *B N -> *B N", reference=F.silu)
    def test_silu():
        return MySilu.apply

is one test a property (`test_silu[cotangent_layout]`), so that each has its own result, and can be deselected or expected to
fail by itself. The test may use fixtures and parameters; what it returns is judged. And a fixture, within a test:

    def test_silu(gradient_verifier):
        gradient_verifier(MySilu.apply, "x: *B N -> *B N", reference=F.silu)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from bptoolkit.verify import check
from bptoolkit.verify.properties import PROPERTIES, QUICK
from bptoolkit.verify.report import Report, VerificationError

PROFILES: dict[str, dict[str, Any]] = {
    "quick": {"quick": True},
    "default": {},
    "long": {"examples": 1000, "cases": 200, "budget": 36_000.0},
}
OPTIONS = ("reference", "contract", "properties", "seed", "quick", "examples", "cases", "budget")
PARAMETER = "gradient_property"


def settings(config: pytest.Config, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `check`: the profile and seed of the command line, and over them what the test gives."""
    return {"seed": config.getoption("gradients_seed"), **PROFILES[config.getoption("gradients")], **given}


def one_test_a_property(metafunc: pytest.Metafunc, mark: pytest.Mark) -> None:
    """Parametrize a marked test by property.

    Raises:
        pytest.Collector.CollectError: the mark has arguments that it does not take.
    """
    where = f"@pytest.mark.gradients on {metafunc.definition.name}"
    unknown = [k for k in mark.kwargs if k not in (*OPTIONS, "inputs")]
    if unknown:
        raise pytest.Collector.CollectError(f"{where} has no {unknown[0]!r}; it has inputs, {', '.join(OPTIONS)}")
    if len(mark.args) > 1 or (mark.args and "inputs" in mark.kwargs):
        raise pytest.Collector.CollectError(f"{where} takes one positional argument, the inputs")
    names = mark.kwargs.get("properties")
    if names is None:
        names = QUICK if settings(metafunc.config, mark.kwargs).get("quick") else PROPERTIES
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if name not in PROPERTIES:
            raise pytest.Collector.CollectError(f"{where}: there is no property {name!r}; there are {', '.join(PROPERTIES)}")
    if PARAMETER not in metafunc.fixturenames:
        metafunc.fixturenames.append(PARAMETER)
    metafunc.parametrize(PARAMETER, names, ids=names)


def judge(item: pytest.Function, mark: pytest.Mark) -> bool:
    """Run a marked test: hold the function that it returns to one property."""
    __tracebackhide__ = True
    name = str(item.callspec.params[PARAMETER])
    wanted = item._fixtureinfo.argnames
    fn = item.obj(**{a: item.funcargs[a] for a in wanted})
    if fn is None:
        pytest.fail(f"{item.originalname} is marked gradients, and has to return the function to verify", pytrace=False)
    given = {k: v for k, v in mark.kwargs.items() if k != "inputs"} | {"properties": [name]}
    inputs = mark.args[0] if mark.args else mark.kwargs.get("inputs")
    report = check(fn, inputs, **settings(item.config, given))
    if report.failures:
        pytest.fail(str(report), pytrace=False)
    if not report.ok:
        pytest.skip(f"not applicable: {report.skipped.get(name, 'nothing to judge')}")
    _attach(item, report)
    return True


def verifier(request: pytest.FixtureRequest) -> Callable[..., Report]:
    """The fixture's value."""

    def gradient_verifier(fn: Any, inputs: Any = None, **options: Any) -> Report:
        """`bptoolkit.verify.assert_correct`, under the options of this run."""
        __tracebackhide__ = True
        report = check(fn, inputs, **settings(request.config, options))
        if not report.ok:
            raise VerificationError(report)
        _attach(request.node, report)
        return report

    return gradient_verifier


def _attach(item: Any, report: Report) -> None:
    """The report among the sections of the test's own report (shown by -rA, and kept by report plugins)."""
    item.add_report_section("call", "gradients", str(report))
