"""The pytest plugin of bptoolkit, as pytest loads it in every run: options, a mark and a fixture, and nothing imported.

It is a module of its own, since importing anything of the package `bptoolkit` imports torch. What the options, the mark
`gradients` and the fixture `gradient_verifier` do is in `bptoolkit.verify.pytest_plugin`, which is imported when one is used.
"""

from __future__ import annotations

import pytest

MARK = (
    "gradients(inputs=None, *, reference=None, contract=None, properties=None, ...): the test returns a function; "
    "each property of its gradients is one test. See bptoolkit.verify.check for the arguments."
)


def pytest_addoption(parser):
    group = parser.getgroup("bptoolkit", "gradients (bptoolkit)")
    group.addoption(
        "--gradients",
        choices=("quick", "default", "long"),
        default="default",
        help="how long gradients are searched for mistakes, by the mark `gradients` and the fixture `gradient_verifier`",
    )
    group.addoption("--gradients-seed", type=int, default=0, metavar="N", help="the seed of that search")


def pytest_configure(config):
    config.addinivalue_line("markers", MARK)


def pytest_generate_tests(metafunc):
    mark = metafunc.definition.get_closest_marker("gradients")
    if mark is not None:
        from bptoolkit.verify import pytest_plugin

        pytest_plugin.one_test_a_property(metafunc, mark)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    mark = pyfuncitem.get_closest_marker("gradients")
    if mark is None:
        return None
    from bptoolkit.verify import pytest_plugin

    return pytest_plugin.judge(pyfuncitem, mark)


@pytest.fixture
def gradient_verifier(request):
    """`gradient_verifier(fn, inputs, reference=..., ...)`: `bptoolkit.verify.assert_correct` under the options of this run.

    The report is returned, and is a section of the test's report.
    """
    from bptoolkit.verify import pytest_plugin

    return pytest_plugin.verifier(request)
