"""From an outcome to a `Failure` that can be read: what matters, what it looks like, where the error sits, how to see it
again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bptoolkit.verify.diagnosis import Finding, diagnose
from bptoolkit.verify.layouts import LAYOUTS
from bptoolkit.verify.picture import heat_map
from bptoolkit.verify.point import Point
from bptoolkit.verify.properties.values import truth_of
from bptoolkit.verify.report import Failure
from bptoolkit.verify.search import Search
from bptoolkit.verify.snippet import snippet
from bptoolkit.verify.trial import Trial, Wrong, pull


def failure_of(
    search: Search, target: Any, inputs: Any, name: str, judge: Callable[[Trial], None], point: Point, found: Wrong
) -> Failure:
    """The failure as the report has it. Explaining must not hide a finding: what cannot be explained is reported bare."""
    matters = search.matters(judge, point, found)
    trial = search.trial_at(point)
    line = f"{name} {point}"
    guesses, drawing = (), ""
    if isinstance(found.got, Tensor) and isinstance(found.want, Tensor) and found.got.shape == found.want.shape:
        guesses = _quietly(lambda: tuple(diagnose(_finding(trial, found, matters))), ())
        error = (found.got.double() - found.want).abs()
        drawing = _quietly(lambda: heat_map(error, found.want, found.got.dtype) if error.numel() > 1 else "", "")
    return Failure(
        property=name,
        message=str(found),
        point=point,
        matters=matters,
        diagnosis=guesses,
        heat_map=drawing,
        code=_quietly(lambda: snippet(target, inputs, line, trial, found), f"# replay: {line}"),
        line=line,
    )


def _quietly(make: Callable[[], Any], otherwise: Any) -> Any:
    try:
        return make()
    except Exception as problem:
        return (
            otherwise
            if not isinstance(otherwise, str) or not otherwise
            else f"{otherwise}  # ({type(problem).__name__}: {problem})"
        )


def _finding(trial: Trial, found: Wrong, matters: Any) -> Finding:
    """What the diagnosis looks at: the call with its tensors, the expected gradients, and a way to run it differently."""
    xs = trial.leaves()
    outputs = trial.run(xs)
    cotangents = trial.cotangents(outputs)
    n = len(xs)
    every = Trial(**{**trial.__dict__, "point": trial.point.having("need", "1")})
    wide = [t.detach().double() for t in (*xs, *cotangents)]
    expected = truth_of(every, n)(wide)[len(outputs) :]
    return Finding(
        what=found.what,
        got=found.got,
        want=found.want,
        sigma=found.sigma,
        inputs={k: x.detach() for k, x in zip(trial.names, xs)},
        outputs=tuple(o.detach() for o in outputs),
        cotangents=tuple(cotangents),
        gradients={k: g for k, g in zip(trial.names, expected) if g is not None},
        point=trial.point,
        matters=tuple(f"sizes:{a}" if a in dict(trial.point.sizes) else a for a in matters),
        rerun=_rerun(trial),
        truth=lambda inputs, given: truth_of(every, n)([*inputs, *given])[len(outputs) :],
    )


def _rerun(trial: Trial) -> Callable[..., list[Any]]:
    """The gradients of the function under test on the same call, with something changed."""

    def rerun(
        cotangents: Sequence[Tensor] | None = None, contiguous_inputs: bool = False, dtype: torch.dtype | None = None
    ) -> list[Any]:
        layout = LAYOUTS["contiguous" if contiguous_inputs else trial.point.layout]
        if trial.point.layout == "expanded":
            layout = LAYOUTS["expanded"]
        values = [v.to(dtype) if dtype else v for v in trial.values]
        xs = [layout(v.clone()).detach().requires_grad_(k) for v, k in zip(values, trial.need)]
        outputs = trial.run(xs)
        given = trial.cotangents(outputs) if cotangents is None else [c.to(o.dtype) for c, o in zip(cotangents, outputs)]
        return pull(outputs, xs, given)

    return rerun
