"""The search: which points are visited, in which order; how a failure is confirmed, shrunk and explained.

First every axis alone (so that most mistakes are found where only one thing is strange), then a pairwise covering array over
all axes, then points that Hypothesis draws. A failure of a statistical test is confirmed on fresh draws. What fails is moved
axis by axis to simpler values for as long as it fails; the axes that cannot be moved are those that matter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from random import Random
from typing import Any

from bptoolkit.verify.contract import Contract
from bptoolkit.verify.inputs import Source, clamp
from bptoolkit.verify.point import FIELDS, Axes, Point
from bptoolkit.verify.properties.values import VALUE_PROPERTIES
from bptoolkit.verify.trial import NotApplicable, Trial, Wrong, pull

Judge = Callable[[Trial], None]
MOVED = {  # property -> the fields that its own points move; sizes always do
    "some_outputs_unused": ("need", "cotangent"),
    "nothing_changed": ("layout", "cotangent", "dtype", "need"),
    "backward_twice": ("cotangent", "dtype", "need"),
    "interleaved_calls": ("layout", "dtype"),
    "gradients_kept": ("dtype", "need"),
    "version_counter": ("need", "dtype"),
    "memory": ("need", "dtype"),
    "deterministic": ("layout", "cotangent", "dtype"),
    "global_rng": ("dtype",),
    "linear_in_cotangent": ("cotangent", "layout"),
    "finite_differences": ("need", "values", "layout"),
    "double_backward": ("need", "layout", "values"),
    "forward_mode": ("layout", "values"),
    "vmap": ("values",),
    "per_sample_gradients": ("values",),
    "fake_tensors": ("layout", "dtype"),
    "checkpoint": ("layout", "dtype"),
    "devices": ("dtype", "layout", "cotangent"),
}
SHARED = frozenset(("compare_values", *VALUE_PROPERTIES))  # the shared comparison, by its own name and as one of its properties
PAST_TILES = (33, 65, 129)
ONCE = ("compile", "autocast", "registration")  # costly, or independent of most axes: the simplest points only


@dataclass
class Search:
    """One verification under way.

    Attributes:
        trial_at: makes the trial of a point.
        source: of the arguments.
        axes: what can be moved.
        contract: what the function claims.
        seed: of the search.
        deadline: on the monotonic clock.
    """

    trial_at: Callable[[Point], Trial]
    source: Source
    axes: Axes
    contract: Contract
    seed: int
    deadline: float
    calls: dict[str, int] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)

    def over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.deadline

    def rows(self, fields: Sequence[str], sizes: bool, wide: bool, quick: bool = False) -> Iterator[Point]:
        """The points of the shared comparison: sweeps, squares, pairs where `wide`, and long ones unless `quick`."""
        axes = Axes(
            {k: v if sizes else v[:1] for k, v in self.axes.sizes.items()},
            {f: v if f in fields else v[:1] for f, v in self.axes.fields.items()},
        )
        seen = set()
        for k, point in enumerate(self._ordered(axes, sizes, wide, quick)):
            point = replace(clamp(self.source, point), seed=self.seed * 1000 + k)
            key = replace(point, seed=0)
            if key not in seen:
                seen.add(key)
                yield point
        if not wide:  # a second draw of the simplest point, in case the first one happens to hide something
            yield replace(axes.base, seed=self.seed * 1000 + 999)

    def _ordered(self, axes: Axes, sizes: bool, wide: bool, quick: bool) -> Iterator[Point]:
        yield from axes.sweep()
        for square in self.source.squares() if sizes else ():
            point = axes.base
            for letter, n in square.items():
                point = point.having(letter, n)
            yield point
        if wide:
            yield from self._together(axes, sizes)
            yield from axes.pairs(Random(self.seed))
        if not quick and sizes:
            yield from (axes.base.having(*pair) for pair in self.source.long())

    def _together(self, axes: Axes, sizes: bool) -> Iterator[Point]:
        """Two axes that often need each other, all else simple, where the covering array has them amid something that hides
        it: two dimensions past a tile (a causal mask hides the keys past it from fewer queries), and a dtype's range."""
        letters = [k for k in axes.sizes if not k.startswith("*") and k != "case"] if sizes else []
        for a, b in combinations(letters[:6], 2):
            yield from (axes.base.having(a, n).having(b, n) for n in PAST_TILES)
        for dtype in axes.fields["dtype"][1:]:
            yield from (axes.base.having("dtype", dtype).having("values", v) for v in axes.fields["values"][1:])

    def own_rows(self, name: str, quick: bool) -> list[Point]:
        """The points at which a property of its own procedure is judged: few, each with something else that is strange."""
        base, fields = self.axes.base, self.axes.fields
        if name in ONCE:
            points = [base] + ([_last(base, self.axes, ("cotangent",))] if name == "registration" else [])
            if name == "autocast" and "float32" in fields["dtype"]:
                points = [base.having("dtype", "float32")]
        else:
            points = [base]
            moved = MOVED.get(name, ())
            if self.contract.random and name in ("double_backward", "forward_mode"):  # draws may follow strides: `Trial.judge`
                moved = tuple(f for f in moved if f != "layout")
            for letter, values in self.axes.sizes.items():
                strange = (
                    values[1:] if letter == "case" else [v for v in values[1:] if v in (0, 1, 17, 33, "-", "0", "1", "2x3")]
                )
                points += [base.having(letter, v) for v in (strange[:2] if quick else strange[:8])]
            for f in moved:
                values = fields[f][1:]
                points += [base.having(f, v) for v in (values[:2] if quick else values)]
            if not quick:
                random = Random(f"{self.seed} {name}")
                for _ in range(4):
                    p = base
                    for letter, values in self.axes.sizes.items():
                        p = p.having(letter, random.choice(values[:6]))
                    for f in moved:
                        p = p.having(f, random.choice(fields[f]))
                    points.append(p)
        return [replace(clamp(self.source, p), seed=self.seed * 1000 + 500 + k) for k, p in enumerate(dict.fromkeys(points))]

    def judge(self, name: str, judge: Judge, point: Point) -> Wrong | None:
        """Judge one property at one point, and count it."""
        found = attempt(judge, self.trial_at, point)
        if isinstance(found, NotApplicable):
            self.why.setdefault(name, str(found))
            return None
        self.calls[name] = self.calls.get(name, 0) + 1
        return found

    def confirmed(self, judge: Judge, point: Point, found: Wrong) -> bool:
        """Whether a failure is to be reported: certain ones are; a statistical one fails on at least two of four fresh
        draws."""
        if found.gross:
            return True
        fresh = [attempt(judge, self.trial_at, replace(point, seed=point.seed + 7777 * (k + 1))) for k in range(4)]
        return sum(isinstance(f, Wrong) for f in fresh) >= 2

    def fails(self, judge: Judge, point: Point, like: Wrong) -> Wrong | None:
        """The failure at another point, if it is of the same kind."""
        found = attempt(judge, self.trial_at, point)
        if not isinstance(found, Wrong) or (like.what and found.what and not _alike(found, like)):
            return None
        return found if self.confirmed(judge, point, found) else None

    def shrink(self, judge: Judge, point: Point, found: Wrong) -> tuple[Point, Wrong]:
        """Move each axis to the simplest value at which the failure stays, until none moves."""
        changed, until = True, time.monotonic() + 20
        while changed:
            changed = False
            for axis in self.axes.off(point):
                for value in self.axes.all[axis]:
                    if value == point.get(axis) or time.monotonic() > until:
                        break
                    simpler = point.having(axis, value)
                    again = self.fails(judge, simpler, found)
                    if again is not None:
                        point, found, changed = simpler, again, True
                        break
        return point, found

    def matters(self, judge: Judge, point: Point, found: Wrong) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
        """Per axis that is not at its simplest: the values at which it fails, and those at which it passes."""
        result: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
        until = time.monotonic() + 10
        for axis in self.axes.off(point):
            fails: list[str] = []
            passes: list[str] = []
            for value in dict.fromkeys((*self.axes.all[axis][:18], point.get(axis))):
                if time.monotonic() > until and value != point.get(axis):
                    continue
                bad = value == point.get(axis) or self.fails(judge, point.having(axis, value), found) is not None
                (fails if bad else passes).append(str(value))
            result[axis] = tuple(fails), tuple(passes)
        return result


def attempt(judge: Judge, trial_at: Callable[[Point], Trial], point: Point) -> Wrong | NotApplicable | None:
    """Judge at a point: None, what is wrong, or why it says nothing. A crash where the reference runs is a finding."""
    from bptoolkit.verify.target import Unusable

    try:
        trial = trial_at(point)
    except NotApplicable as why:
        return why
    try:
        judge(trial)
    except (Wrong, NotApplicable) as outcome:
        return outcome
    except (Unusable, KeyboardInterrupt, MemoryError):
        raise
    except Exception as crash:
        return explain_crash(trial, crash, judge)
    return None


def explain_crash(trial: Trial, crash: Exception, judge: Judge | None = None) -> Wrong | NotApplicable:
    """What an exception means: the function refuses this call, or fails where it should not.

    A call that raises by itself is a finding of the shared comparison; to the other properties it is no call to judge.
    """
    said = f"{type(crash).__name__}: {(str(crash).splitlines() or [''])[0][:300]}"
    if judge is not None and judge.__name__ not in SHARED and _raises(trial):
        return NotApplicable(f"the call itself raises {said}")
    empty = any(v.numel() == 0 for v in trial.values)
    if empty and not trial.contract.empty:
        return NotApplicable("declared: takes no tensors without elements")
    if trial.reference is not None:
        try:
            xs = [v.double().requires_grad_() for v in trial.values]
            outputs = trial.run(xs, trial.reference)
            sum((o.sum() for o in outputs if o.requires_grad), start=xs[0].new_zeros(())).backward()
        except Exception:
            return NotApplicable("the reference does not run here")
    elif empty:
        return NotApplicable(f"raises without elements: {said}")
    elif _refuses(trial):  # nothing says that it should take this call
        return NotApplicable(f"the function refuses this call: {said}")
    return Wrong(f"raised {said}", what="raised")


def _refuses(trial: Trial) -> bool:
    """Whether forward alone raises."""
    try:
        trial.run(trial.leaves())
    except Exception:
        return True
    return False


def _raises(trial: Trial) -> bool:
    """Whether the plain call raises, gradients and all."""
    try:
        xs = trial.leaves()
        outputs = trial.run(xs)
        pull(outputs, xs, trial.cotangents(outputs))
    except Exception:
        return True
    return False


def _alike(a: Wrong, b: Wrong) -> bool:
    """Whether two failures are of one kind: both of outputs, both of gradients, or both exceptions."""
    return (
        a.what == b.what
        or (a.what.startswith("output") and b.what.startswith("output"))
        or (a.what.startswith("gradient") and b.what.startswith("gradient"))
    )


def _last(point: Point, axes: Axes, fields: Sequence[str]) -> Point:
    for f in fields:
        point = point.having(f, axes.fields[f][-1])
    return point


def drawn_points(axes: Axes, seed: int, count: int) -> list[Point]:
    """Points that Hypothesis draws, structure and a seed; none if Hypothesis is not installed."""
    try:
        import hypothesis
    except ImportError:
        return []
    from bptoolkit.verify import strategies

    found: list[Point] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategies.points(axes))
    def collect(point: Any) -> None:
        found.append(point)

    if count:
        collect()
    return found


def fields_of(axes: Axes, chosen: set[str]) -> list[str]:
    """The fields among the chosen axes, in the order of `FIELDS`."""
    return [f for f in FIELDS if f in chosen]
