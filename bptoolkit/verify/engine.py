"""One verification from start to end: probe the dtypes, search the shared comparison, judge the other properties, explain."""

from __future__ import annotations

import textwrap
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from bptoolkit.verify.explain import failure_of
from bptoolkit.verify.inputs import clamp, is_long
from bptoolkit.verify.point import DTYPES, Axes, Point
from bptoolkit.verify.properties import PROPERTIES, QUICK
from bptoolkit.verify.properties.values import AXIS_PROPERTY, VALUE_PROPERTIES, axes_of, compare_values, property_of
from bptoolkit.verify.report import Report
from bptoolkit.verify.search import Search, attempt, drawn_points, fields_of
from bptoolkit.verify.target import Target
from bptoolkit.verify.trial import NotApplicable, Wrong

LAYOUT_ORDER = ("contiguous", "transposed", "step", "sliced", "offset", "channels_last", "expanded")
COTANGENT_ORDER = (
    "random",
    "ones",
    "rows",
    "columns",
    "sliced",
    "transposed",
    "zeros",
    "step",
    "offset",
    "channels_last",
    "one_hot",
)
RESTS_ON_VALUES = frozenset(
    (
        "some_outputs_unused",
        "linear_in_cotangent",
        "double_backward",
        "forward_mode",
        "autocast",
        "devices",
        "per_sample_gradients",
    )
)  # compared with the reference: where the gradient itself is wrong they would only say so again
RESTS_ON_MEMORY = frozenset(("vmap", "per_sample_gradients", "compile", "checkpoint"))
"""A function that writes over what it was given breaks these as well; writing to a batched tensor can end the process."""
MOST_FAILURES = 6  # of the shared comparison: shrinking each takes seconds, and the first ones tell


def run(
    target: Target,
    *,
    inputs: Any,
    properties: Iterable[str] | None,
    seed: int,
    quick: bool,
    examples: int | None,
    budget: float,
    progress: Callable[[str], None] | None,
) -> Report:
    """Verify a target; the arguments are those of `check`."""
    chosen = list(properties if properties is not None else QUICK if quick else PROPERTIES)
    for name in chosen:
        if name not in PROPERTIES:
            raise ValueError(f"verify: there is no property {name!r}; there are {', '.join(PROPERTIES)}")
    began = time.monotonic()
    report = Report(target.name, contract=target.contract.declared(), seed=seed)
    say = progress or (lambda line: None)
    random_state = torch.get_rng_state()
    try:
        with _quiet():
            _run(
                target, inputs, chosen, seed, quick, 0 if quick and examples is None else examples, began + budget, report, say
            )
    finally:
        torch.set_rng_state(random_state)
    report.failures.sort(key=lambda f: chosen.index(f.property) if f.property in chosen else -1)
    report.seconds = time.monotonic() - began
    return report


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings: drawn calls include what torch warns of, and vmap warns from C++ of operators it runs in a loop."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch._C._functorch._set_vmap_fallback_warning_enabled(False)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            # torch's default; what it was before cannot be asked
            torch._C._functorch._set_vmap_fallback_warning_enabled(True)  # type: ignore[attr-defined]


def _run(
    target: Target,
    inputs: Any,
    chosen: list[str],
    seed: int,
    quick: bool,
    examples: int | None,
    deadline: float,
    report: Report,
    say: Callable[[str], None],
) -> None:
    axes = axes_for(target, quick, report)
    search = Search(target.trial, target.source, axes, target.contract, seed, deadline)
    values = [p for p in chosen if p in VALUE_PROPERTIES]
    if target.reference is None and "forward_value" in values:
        report.skipped["forward_value"] = "no reference was given"
    if values:
        _search_values(search, target, inputs, values, quick, 30 if examples is None else examples, report, say)
    broken = [f.property for f in report.failures if f.property in ("forward_value", "gradient_value")]
    for name in chosen:
        if name in VALUE_PROPERTIES:
            continue
        if broken and name in RESTS_ON_VALUES:
            report.skipped[name] = f"{broken[0]} fails at the simplest call: that comes first"
            continue
        if name in RESTS_ON_MEMORY and any(f.property == "nothing_changed" for f in report.failures):
            report.skipped[name] = "nothing_changed fails: that comes first"
            continue
        _judge_property(search, target, inputs, name, quick, report, say)
    if broken:
        for name in values:
            search.why.setdefault(name, f"{broken[0]} fails at the simplest call: that comes first")
    report.calls = {p: search.calls.get(p, 0) for p in chosen}
    for p in chosen:
        if not report.calls[p] and p in search.why:
            report.skipped.setdefault(p, textwrap.shorten(search.why[p], 150))
    if search.over():
        report.notes.append(
            f"the time was up after {time.monotonic() - deadline:+.0f} s of the budget: not every planned point was visited"
        )


def axes_for(target: Target, quick: bool, report: Report) -> Axes:
    """What can be moved for this target; dtypes that its forward refuses are noted and left out."""
    n = len(
        target.trial(
            Point(sizes=tuple((k, v[0]) for k, v in target.source.sizes.items()), values=target.source.regimes[0])
        ).names
    )
    fields: dict[str, tuple[str, ...]] = {
        "dtype": tuple(DTYPES),
        "layout": LAYOUT_ORDER,
        "cotangent": COTANGENT_ORDER,
        "need": subsets(n),
        "values": target.source.regimes,
    }
    probe = Axes(target.source.sizes, fields).base
    taken: list[str] = []
    refused: dict[str, Exception] = {}
    for dtype in DTYPES:
        trial = target.trial(probe.having("dtype", dtype))
        try:
            trial.run(trial.leaves((False,) * n))
            taken.append(dtype)
        except TypeError as why:
            from bptoolkit.verify.target import Unusable

            if isinstance(why, Unusable):
                raise
            refused[dtype] = why
        except Exception as why:
            refused[dtype] = why
    wanted = target.contract.dtypes
    for dtype, reason in refused.items():
        if wanted is None or dtype not in wanted:
            report.notes.append(
                f"takes no {dtype}: raises {type(reason).__name__}: {(str(reason).splitlines() or [''])[0][:160]}"
            )
    if wanted is not None:
        taken = [d for d in DTYPES if d in wanted]
    if target.contract.random and len(taken) > 1:
        taken = taken[:1]
        report.notes.append(f"draws random numbers: judged in {taken[0]} alone, where the reference draws the same ones")
    fields["dtype"] = tuple(taken or DTYPES)
    target.wide = "float64" in fields["dtype"]
    if target.contract.kinks == "any":
        fields["values"] = tuple(v for v in fields["values"] if v not in ("kinks", "zero", "constant")) or ("given",)
    return Axes(target.source.sizes, fields)


def subsets(n: int) -> tuple[str, ...]:
    """Which inputs require grad, as the `need` of a point: all; each alone; all but one."""
    alone = ["".join("1" if j == k else "0" for j in range(n)) for k in range(n)]
    but = ["".join("0" if j == k else "1" for j in range(n)) for k in range(n)]
    return ("1", *dict.fromkeys((*alone, *but) if 1 < n <= 6 else alone if n > 6 else ()))


def _search_values(
    search: Search, target: Target, inputs: Any, chosen: list[str], quick: bool, examples: int, report: Report, say: Any
) -> None:
    """The shared comparison over all rows; failures are shrunk, named by the axes that matter, and recorded once each."""
    moved = axes_of(chosen)
    fields = fields_of(search.axes, moved)
    rows = list(search.rows(fields, "sizes" in moved, not quick and len(moved) > 1, quick))
    if examples and len(moved) > 1:
        drawn = Axes(
            {k: v if "sizes" in moved else v[:1] for k, v in search.axes.sizes.items()},
            {f: v if f in fields else v[:1] for f, v in search.axes.fields.items()},
        )
        found = drawn_points(drawn, search.seed, examples)
        rows += [replace(clamp(search.source, p), seed=search.seed * 1000 + p.seed % 1000) for p in found]
    explained: list[Point] = []
    found_at_base, slow = 0, False
    for k, point in enumerate(rows):
        if search.over():
            break
        if found_at_base >= 1 or len(explained) >= MOST_FAILURES:
            break
        say(f"values  {k + 1}/{len(rows)}")
        off = search.axes.off(point)
        if any(all(point.get(a) == p.get(a) for a in search.axes.off(p)) for p in explained):
            continue
        names = {AXIS_PROPERTY.get(a, "sizes") for a in off} or {"forward_value", "gradient_value"}
        if target.reference is None:
            names.discard("forward_value")
        long = is_long(point)
        if long and slow:
            continue
        started = time.monotonic()
        outcome = attempt(compare_values, search.trial_at, point)
        slow = slow or (
            long and time.monotonic() - started > 1.0
        )  # a loop over steps, say: the longest take four times as long
        if isinstance(outcome, NotApplicable):
            for name in names:
                search.why.setdefault(name, str(outcome))
            continue
        for name in names:
            search.calls[name] = search.calls.get(name, 0) + 1
        if outcome is None or not search.confirmed(compare_values, point, outcome):
            continue
        point, outcome = search.shrink(compare_values, point, outcome)
        matters = search.axes.off(point)
        explained.append(point)
        found_at_base += not matters
        name = property_of(matters, outcome.what, outcome.gross)
        if name not in chosen:
            if matters and not any(AXIS_PROPERTY.get(a, "sizes") in chosen for a in matters):
                continue  # a finding of a property that was not asked for
            name = next((p for p in ("gradient_value", *chosen) if p in chosen), chosen[0])
        if all(f.property != name for f in report.failures):
            search.calls[name] = max(search.calls.get(name, 0), 1)
            report.failures.append(failure_of(search, target, inputs, name, compare_values, point, outcome))


def _judge_property(search: Search, target: Target, inputs: Any, name: str, quick: bool, report: Report, say: Any) -> None:
    """One property at its own points, up to the first failure."""
    judge = PROPERTIES[name]
    for k, point in enumerate(search.own_rows(name, quick)):
        if search.over() and k:
            break
        say(f"{name}  {k + 1}")
        outcome = search.judge(name, judge, point)
        if outcome is None or not search.confirmed(judge, point, outcome):
            continue
        point, outcome = search.shrink(judge, point, outcome)
        report.failures.append(failure_of(search, target, inputs, name, judge, point, outcome))
        return


def judge_once(target: Target, name: str, point: Point, inputs: Any) -> Report:
    """One property at one point, as a report."""
    if name not in PROPERTIES:
        raise ValueError(f"verify: there is no property {name!r}; there are {', '.join(PROPERTIES)}")
    report = Report(target.name, contract=target.contract.declared(), seed=point.seed // 1000)
    judge = compare_values if name in VALUE_PROPERTIES else PROPERTIES[name]
    axes = axes_for(target, False, report)
    search = Search(target.trial, target.source, axes, target.contract, point.seed // 1000, time.monotonic() + 60)
    missing = {k for k, _ in point.sizes} ^ set(axes.sizes)
    if missing:
        raise ValueError(f"verify: the point has sizes {dict(point.sizes)}, the inputs have {', '.join(axes.sizes)}")
    began = time.monotonic()
    with _quiet():
        outcome = attempt(judge, search.trial_at, point)
    if isinstance(outcome, NotApplicable):
        report.calls[name], report.skipped[name] = 0, str(outcome)
    else:
        report.calls[name] = 1
        if isinstance(outcome, Wrong):
            report.failures.append(failure_of(search, target, inputs, name, judge, point, outcome))
    report.seconds = time.monotonic() - began
    return report
