"""Prove a backward right: `check(fn, inputs, reference=...)` on any callable, or `check(op)` on an op.

Every call is drawn from a seed, in float64: sizes (0, 1, odd, either side of a tile), values, which inputs require grad. The
properties are in `bptoolkit.verify.properties`, each with what it catches. Calls go from small to large, so that the first
failure of a property is the smallest one found.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from bptoolkit.cases import SIZES, Case, Draw, from_shapes
from bptoolkit.op import Op
from bptoolkit.shapes import Shapes
from bptoolkit.verify.properties import NEEDS_REFERENCE, PROPERTIES, Trial, Wrong
from bptoolkit.verify.report import Failure as Failure
from bptoolkit.verify.report import Report as Report
from bptoolkit.verify.report import VerificationError as VerificationError


class Unusable(TypeError):
    """The function does not return what can be verified."""


def rung(k: int) -> dict[str, Any]:
    """How the k-th call draws its sizes: small; then one size at a time zero, one, past a tile; then anything."""
    if k < 3:
        return {"sizes": ((1, 2), (2, 3), (1, 2, 3, 5))[k]}
    if k < 15:
        return {"sizes": (2, 3), "force": {(k - 3) % 3: (0, 1, 17, 33)[(k - 3) // 3]}}
    return {"sizes": SIZES}


def check(
    fn: Callable[..., Any] | Op,
    inputs: str | Sequence[Any] | None = None,
    *,
    reference: Callable[..., Any] | None = None,
    properties: Iterable[str] | None = None,
    calls: int = 20,
    seed: int = 0,
    budget: float = 30.0,
    double_backward: bool = True,
) -> Report:
    """Verify the gradients of a differentiable function.

    Args:
        fn: a function, an `autograd.Function`'s apply, a torch.library op, an `nn.Module`, or an `Op`.
        inputs: a shapes string (`"x: *B I, w: O I -> *B O"`), or a tuple of example arguments: the floating-point tensors among
            them are differentiated by. Not given for an `Op`.
        reference: plain torch, a function of the same arguments. Without it the properties that need one are left out.
        properties: the names of those to judge; all by default.
        calls: how many calls are drawn per property.
        seed: of all that is drawn.
        budget: seconds; no new call is drawn after them.
        double_backward: False for a function that does not claim it.

    Returns:
        A `Report` with `.ok`, `.failures` and a readable `str()`.

    Raises:
        ValueError: a property that does not exist, or nothing to differentiate by.
        TypeError: `inputs` does not fit `fn`, or `fn` returns no floating-point tensor.
    """
    name, call, reference, draw = _target(fn, inputs, reference)
    chosen = list(PROPERTIES if properties is None else properties)
    unknown = [p for p in chosen if p not in PROPERTIES]
    if unknown:
        raise ValueError(f"verify: there is no property {unknown[0]!r}; there are {', '.join(PROPERTIES)}")
    report = Report(name)
    end = time.monotonic() + budget
    for p in chosen:
        if p in NEEDS_REFERENCE and reference is None:
            report.skipped[p] = "no reference was given"
        elif p == "double_backward" and not double_backward:
            report.skipped[p] = "not claimed"
        else:
            report.calls[p] = 0
    for k in range(calls):
        for p in list(report.calls):
            if any(f.property == p for f in report.failures) or (k and time.monotonic() > end):
                continue
            report.calls[p] += 1
            message = judge(p, call, reference, draw, seed * 100_003 + k, **rung(k))
            if message is not None:
                report.failures.append(Failure(p, message, _code(fn, name, inputs, p, seed, k, calls)))
    return report


def assert_correct(fn: Callable[..., Any] | Op, inputs: Any = None, **options: Any) -> Report:
    """`check`, raising `VerificationError` with the report if anything fails. Same arguments."""
    report = check(fn, inputs, **options)
    if not report.ok:
        raise VerificationError(str(report))
    return report


def judge(
    name: str,
    call: Callable[..., Any],
    reference: Callable[..., Any] | None,
    draw: Callable[[Draw], Case],
    seed: Any,
    **sizes: Any,
) -> str | None:
    """Judge one property on one drawn call: None, or what is wrong. `seed` may be a `random.Random`."""
    random = seed if isinstance(seed, Random) else Random(seed)
    d = Draw(random, **sizes)
    case = draw(d)
    trial = trial_of(call, reference, case, random, d.generator)
    try:
        PROPERTIES[name](trial)
    except Wrong as wrong:
        problem = str(wrong)
    except Unusable:
        raise
    except Exception as crash:  # a function that crashes on a legal call is a finding, whatever it raises
        problem = f"raised {type(crash).__name__}: {crash}"
    else:
        return None
    shapes = ", ".join(str(tuple(t.shape)) for t in trial.tensors)
    return f"{problem}  [shapes {shapes}; requires grad {trial.need}]"


def trial_of(call: Any, reference: Any, case: Case, random: Random, generator: torch.Generator) -> Trial:
    """One call as functions of the tensors to differentiate by, with a drawn subset that requires grad."""
    flat, spec = tree_flatten((case.args, case.kwargs))
    where = [k for k, t in enumerate(flat) if isinstance(t, Tensor) and t.requires_grad]
    if not where:
        raise ValueError("verify: there is no floating-point tensor to differentiate by among the inputs")

    def bind(fn: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
        def bound(*tensors: Tensor) -> tuple[Tensor, ...]:
            filled = list(flat)
            for k, t in zip(where, tensors):
                filled[k] = t
            args, kwargs = tree_unflatten(filled, spec)
            out = fn(*args, **kwargs)
            found = tuple(o for o in tree_flatten(out)[0] if isinstance(o, Tensor) and o.is_floating_point())
            if not found:
                raise Unusable(f"verify: the function returned {type(out).__name__}, with no floating-point tensor in it")
            return found

        return bound

    need = tuple(random.random() < 0.75 for _ in where)
    if not any(need):
        need = (True, *need[1:])
    tensors = tuple(flat[k].detach() for k in where)
    return Trial(bind(call), bind(reference) if reference else None, tensors, need, generator)


def _target(fn: Any, inputs: Any, reference: Any) -> tuple[str, Any, Any, Callable[[Draw], Case]]:
    """The name, the function, the reference and what draws a call."""
    if isinstance(fn, Op):
        if inputs is not None:
            raise TypeError(f"verify: {fn.name} is an Op and draws its own inputs; leave inputs out")
        return fn.name, fn.call, reference or fn.reference, fn.draw
    name = getattr(fn, "__qualname__", type(fn).__name__)
    if isinstance(fn, nn.Module):
        fn = fn.double()
    if isinstance(inputs, str):
        shapes = Shapes(inputs)
        return name, fn, reference, lambda draw: from_shapes(shapes, draw)
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    if not isinstance(inputs, (tuple, list)):
        raise TypeError(
            f"verify: inputs of {name} must be a shapes string or a tuple of arguments, not {type(inputs).__name__}"
        )
    examples = tuple(inputs)

    def again(draw: Draw) -> Case:
        args = [
            draw.tensor(*t.shape, scale=float(t.detach().abs().mean()) if t.numel() else 1.0)
            if isinstance(t, Tensor) and t.is_floating_point()
            else t
            for t in examples
        ]
        return Case(tuple(args), {})

    return name, fn, reference, again


def _code(fn: Any, name: str, inputs: Any, property: str, seed: int, k: int, calls: int) -> str:
    """Lines that reproduce a failure."""
    head = "import bptoolkit as bp"
    if isinstance(fn, Op):
        return f'{head}\nprint(bp.verify.check(bp.OPS["{name}"], properties=["{property}"], seed={seed}, calls={calls}))'
    if not isinstance(inputs, str):
        shapes = ", ".join(f"torch.randn{tuple(t.shape)}" if isinstance(t, Tensor) else repr(t) for t in inputs)
        inputs_text, head = f"({shapes},)", "import torch\n" + head
    else:
        inputs_text = repr(inputs)
    call = f'bp.verify.check({name}, {inputs_text}, reference=reference, properties=["{property}"], seed={seed}, calls={calls})'
    return f"{head}\n# {name} and reference as you have them; call {k} of {calls} fails\nprint({call})"
