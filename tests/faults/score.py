"""What torch's own checkers, and the test that people usually write, say of a planted fault.

A flag counts only if the same tool does not flag the correct twin: many of these tools refuse correct functions that are opaque
to autograd, as kernels are. The twin is the closest one: of the same family, as often differentiable, in the same modes, of
the same reference and inputs. That gradcheck cannot vmap through a function is no flag either: it cannot for any kernel.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable
from functools import cache
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from bptoolkit.verify.contract import Contract
from bptoolkit.verify.inputs import FromShapes
from bptoolkit.verify.point import Point
from bptoolkit.verify.target import Target, target_of
from bptoolkit.verify.trial import Trial
from faults import TWINS
from faults.record import Fault, Twin

FLAGS = ("check_batched_grad", "check_forward_ad", "check_batched_forward_grad")
TIGHT = {"rtol": 1e-5, "atol": 1e-7}
USUAL = (8, 16, 4, 32, 2)  # the sizes of the usual test, a letter each
_number = count()


def trial_of(record: Fault | Twin, usual: bool = False) -> Trial:
    """A small call in float64; for the usual test in float32, of sizes that are powers of two."""
    target = _target(record)
    if not usual:
        return target.trial(Point(sizes=tuple((k, v[0]) for k, v in target.source.sizes.items())))
    sizes = tuple((k, v[0]) for k, v in target.source.sizes.items())
    if isinstance(target.source, FromShapes):
        sizes = tuple((k, v if k.startswith("*") else n) for (k, v), n in zip(sizes, USUAL, strict=False))
    return target.trial(Point(sizes=sizes, dtype="float32"))


def _target(record: Fault | Twin) -> Target:
    return target_of(record.fn, record.inputs, record.reference, Contract.of(record.contract), seed=0, quick=True)


def leaves(trial: Trial) -> list[Tensor]:
    """The inputs, contiguous, all requiring grad."""
    return [v.clone().requires_grad_() for v in trial.values]


def runs_gradcheck(record: Fault | Twin, **flags: Any) -> None:
    trial = trial_of(record)
    gradcheck(lambda *xs: trial.run(xs), leaves(trial), **flags)


def runs_gradgradcheck(record: Fault | Twin) -> None:
    trial = trial_of(record)
    gradgradcheck(lambda *xs: trial.run(xs), leaves(trial), gen_non_contig_grad_outputs=True)


def runs_opcheck(record: Fault | Twin) -> None:
    """On the operator itself, or on one that is made of the function: its forward, and its backward as a second operator."""
    trial = trial_of(record)
    if isinstance(record.fn, torch._library.custom_ops.CustomOpDef):
        torch.library.opcheck(record.fn, tuple(leaves(trial)))
        return
    op, back = as_operators(trial)
    torch.library.opcheck(op, tuple(leaves(trial)))
    cotangents = trial.cotangents(trial.run([v.clone() for v in trial.values]))
    given = tuple(v.clone() for v in trial.values) + tuple(cotangents)
    torch.library.opcheck(back, given, test_utils=("test_schema", "test_faketensor"))


def as_operators(trial: Trial) -> tuple[Any, Any]:
    """A function as two operators of torch.library: its forward, and its backward."""
    shapes = [o.shape for o in trial.run([v.clone() for v in trial.values])]
    n, m, k = len(trial.values), len(shapes), next(_number)

    def forward(*xs: Tensor) -> Any:
        with torch.no_grad():
            return _one(tuple(o.clone() for o in trial.run(xs)))

    def gradients(*given: Tensor) -> Any:
        xs = [x.detach().requires_grad_() for x in given[:n]]
        with torch.enable_grad():
            outputs = trial.run(xs)
        live = [(o, c) for o, c in zip(outputs, given[n:], strict=True) if o.requires_grad]
        grads = None
        if live:
            outs, cotangents = zip(*live, strict=True)
            grads = torch.autograd.grad(outs, xs, cotangents, allow_unused=True, materialize_grads=True)
        return _one(tuple(g.clone() for g in grads or map(torch.zeros_like, xs)))

    op = torch.library.custom_op(f"bpscore::f{k}", forward, mutates_args=(), schema=_schema(n, m))
    back = torch.library.custom_op(f"bpscore::f{k}_vjp", gradients, mutates_args=(), schema=_schema(n + m, n))
    op.register_fake(lambda *xs: _one(tuple(xs[0].new_empty(s) for s in shapes)))
    back.register_fake(lambda *given: _one(tuple(torch.empty_like(x) for x in given[:n])))
    op.register_autograd(
        lambda ctx, *dys: back(*ctx.saved_tensors, *dys),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    return op, back


def _one(found: tuple[Tensor, ...]) -> Any:
    return found[0] if len(found) == 1 else found


def _schema(takes: int, gives: int) -> str:
    outputs = "Tensor" if gives == 1 else f"({', '.join(['Tensor'] * gives)})"
    return f"({', '.join(f'Tensor x{k}' for k in range(takes))}) -> {outputs}"


def runs_usual_test(record: Fault | Twin) -> None:
    """Output and gradients in float32 against the reference in float32, one contiguous shape, a random cotangent."""
    trial = trial_of(record, usual=True)
    try:
        trial.run(leaves(trial), trial.reference)
    except Exception:  # not a size that this function has
        trial = _target(record).trial(trial_of(record).point.having("dtype", "float32"))
    found = []
    for fn in (trial.call, trial.reference):
        xs = leaves(trial)
        outputs = trial.run(xs, fn)
        torch.autograd.backward(outputs, trial.cotangents(outputs))
        found.append([*outputs, *(x.grad for x in xs)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def flagged(run: Callable[..., None], record: Fault | Twin, **flags: Any) -> bool:
    """Whether a tool refuses a function, in whatever way."""
    if any(f.startswith("check_batched") for f in flags):
        return _in_child(lambda: _flagged(run, record, **flags))
    return _flagged(run, record, **flags)


def _in_child(judge: Callable[[], bool]) -> bool:
    """A verdict from a process of its own: vmap through a function that writes to `.data` is a segmentation fault, no flag."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(judge())
    _, status = os.waitpid(child, 0)
    return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 1


def _flagged(run: Callable[..., None], record: Fault | Twin, **flags: Any) -> bool:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run(record, **flags)
        except Exception as why:
            return "While computing batched gradients" not in str(why)
    return False


@cache
def twin_flagged(run: Callable[..., None], name: str, **flags: Any) -> bool:
    """The same of a twin, once."""
    return flagged(run, TWINS[name], **flags)


def orders(record: Fault | Twin) -> tuple[bool, bool]:
    """Whether a function can be differentiated twice, as far as it says, and whether it has forward mode."""
    trial = trial_of(record)
    xs = leaves(trial)
    twice, forward = True, True
    try:
        outputs = trial.run(xs)
        cotangents = [c.requires_grad_() for c in trial.cotangents(outputs)]
        grads = torch.autograd.grad(outputs, xs, cotangents, create_graph=True, allow_unused=True)
        torch.autograd.backward([g.sum() for g in grads if g is not None and g.requires_grad])
    except Exception as why:
        twice = "differentiate twice" not in str(why)
    try:
        torch.func.jvp(lambda *ys: trial.run(ys), trial.values, trial.values)
    except Exception:
        forward = False
    return twice, forward


@cache
def _twin_orders(name: str) -> tuple[bool, bool]:
    return orders(TWINS[name])


def _same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, str) and a == b)


def twin_of(fault: Fault) -> Twin:
    """The closest twin."""
    mine = orders(fault)

    def near(t: Twin) -> tuple[bool, ...]:
        return (_twin_orders(t.name) == mine, t.reference is fault.reference, _same(t.inputs, fault.inputs))

    return max((t for t in TWINS.values() if t.family == fault.family), key=near)


def score(fault: Fault) -> dict[str, bool]:
    """Tool -> whether it flags the fault and passes its twin. "all flags" are those which the twin passes."""
    twin = twin_of(fault).name

    def counts(run: Callable[..., None], **flags: Any) -> bool:
        return flagged(run, fault, **flags) and not twin_flagged(run, twin, **flags)

    return {
        "gradcheck": counts(runs_gradcheck),
        "fast": counts(runs_gradcheck, fast_mode=True),
        "all flags": any(counts(runs_gradcheck, **TIGHT, **flag) for flag in ({}, *({f: True} for f in FLAGS))),
        "gradgradcheck": counts(runs_gradgradcheck),
        "opcheck": counts(runs_opcheck),
        "usual test": counts(runs_usual_test),
    }
