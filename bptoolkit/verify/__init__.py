"""Prove a backward right: `check(fn, inputs, reference=...)` on any callable, or `check(op)` on an op.

The properties are in `bptoolkit.verify.properties`, each with the mistakes it catches; `search` says which calls are made,
`tolerance` when a difference is more than rounding, `report` what comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from bptoolkit.op import Op
from bptoolkit.verify.contract import Contract as Contract
from bptoolkit.verify.point import Point as Point
from bptoolkit.verify.report import Failure as Failure
from bptoolkit.verify.report import Report as Report
from bptoolkit.verify.report import VerificationError as VerificationError
from bptoolkit.verify.target import Unusable as Unusable


def check(
    fn: Callable[..., Any] | Op,
    inputs: Any = None,
    *,
    reference: Callable[..., Any] | None = None,
    properties: Iterable[str] | None = None,
    contract: Contract | Mapping[str, Any] | None = None,
    seed: int = 0,
    quick: bool = False,
    examples: int | None = None,
    cases: int | None = None,
    budget: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Verify the gradients of a differentiable function.

    Args:
        fn: a function, an `autograd.Function` (the class or its `apply`), a torch.library op, an `nn.Module`, a `Rule` or an
        `Op`. inputs: a shapes string (`"x: *B I, w: O I -> *B O"`), a tuple of example arguments (of the floating-point
            tensors among them, those that require grad are differentiated by, or all if none does), or a Hypothesis strategy
            of argument tuples. Not given for an `Op`.
        reference: plain torch, a function of the same arguments. Without it everything that needs none still runs.
        properties: the names of those to judge; all by default.
        contract: what the function claims, a `Contract` or a mapping of its fields.
        seed: of all that is drawn; one seed gives one search.
        quick: fewer points, and nothing that has to import Dynamo.
        examples: how many points Hypothesis draws after the planned ones; 30 by default, 0 if quick.
        cases: how many cases of an `Op` are drawn.
        budget: seconds after which no new point is visited; 120 by default, 30 if quick. The report says so.
        progress: is called with a line on what is being done.

    Returns:
        A `Report` with `.ok`, `.failures` and a readable `str()`.

    Raises:
        ValueError: a property that does not exist, a shapes string that is none, or nothing to differentiate by.
        TypeError: `inputs` or `contract` does not fit, or `fn` returns no floating-point tensor.
    """
    from bptoolkit.verify.engine import run
    from bptoolkit.verify.target import target_of

    claims = Contract.of(contract)
    target = target_of(fn, inputs, reference, claims, seed, quick, cases)
    return run(
        target,
        inputs=inputs,
        properties=properties,
        seed=seed,
        quick=quick,
        examples=examples,
        budget=(30.0 if quick else 120.0) if budget is None else budget,
        progress=progress,
    )


def assert_correct(fn: Callable[..., Any] | Op, inputs: Any = None, **options: Any) -> Report:
    """`check`, raising `VerificationError` with the report if anything fails. Same arguments."""
    report = check(fn, inputs, **options)
    if not report.ok:
        raise VerificationError(report)
    return report


def replay(
    line: str, fn: Callable[..., Any] | Op, inputs: Any = None, *, reference: Any = None, contract: Any = None
) -> Report:
    """Judge one counterexample again: the line that a failure prints, "PROPERTY POINT".

    Returns:
        A report on that one property at that one point.

    Raises:
        ValueError: the line is none that a failure prints.
    """
    from bptoolkit.verify.engine import judge_once
    from bptoolkit.verify.target import target_of

    name, _, rest = line.strip().partition(" ")
    point = Point.parse(rest)
    target = target_of(fn, inputs, reference, Contract.of(contract), point.seed // 1000, False)
    return judge_once(target, name, point, inputs)


def gradcheck(*args: Any, **options: Any) -> bool:
    """Drop-in for `torch.autograd.gradcheck`; see `bptoolkit.verify.drop_in`."""
    from bptoolkit.verify.drop_in import gradcheck

    return gradcheck(*args, **options)


def gradgradcheck(*args: Any, **options: Any) -> bool:
    """Drop-in for `torch.autograd.gradgradcheck`; see `bptoolkit.verify.drop_in`."""
    from bptoolkit.verify.drop_in import gradgradcheck

    return gradgradcheck(*args, **options)
