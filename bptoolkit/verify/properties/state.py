"""State: whether calls stay apart from each other, from the generators of random numbers, and from later changes in place.

None of these but the first needs a reference: a call is compared with itself, bit for bit.
"""

from __future__ import annotations

import random as python_random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bptoolkit.verify.layouts import LAYOUTS
from bptoolkit.verify.properties.values import truth_of
from bptoolkit.verify.trial import NotApplicable, Outputs, Trial, Wrong, pull, same_bits


def some_outputs_unused(trial: Trial) -> None:
    """Only some of several outputs take part in the loss, and the cotangents of the others are undefined.

    Catches a cotangent that is None and is used as a tensor, an output whose gradient is dropped (mamba's
    `return_last_state`), and cotangents that are mixed up.
    """
    outputs = trial.run(trial.leaves())
    live = [k for k, o in enumerate(outputs) if o.requires_grad]
    if len(live) < 2:
        raise NotApplicable("there is one output")
    chosen = [(k,) for k in live] + [tuple(j for j in live if j != k) for k in live if len(live) > 2]
    for used in chosen:
        xs = trial.leaves()
        outputs = trial.run(xs)
        given = trial.cotangents(outputs)
        cotangents = [c if k in used else None for k, c in enumerate(given)]
        words = f"with output {' and '.join(map(str, used))} alone in the loss"
        try:
            grads = pull(outputs, xs, cotangents)
        except Exception as crash:
            raise Wrong(f"{words} backward raised {type(crash).__name__}: {str(crash)[:200]}", what="raised") from None
        full = [torch.zeros_like(c) if k not in used else c for k, c in enumerate(given)]
        truth = truth_of(trial, len(xs))
        what = [f"{words}, output {k}" for k in range(len(outputs))] + [f"{words}, gradient of {n}" for n in trial.names]
        native = None
        if trial.reference is not None and trial.point.dtype != "float64":
            native = _or_none(truth, [*xs, *full])
        trial.judge(what, [*(None for _ in outputs), *grads], truth, [*xs, *full], native)


def graph_nodes(outputs: Sequence[Tensor]) -> Iterator[Any]:
    """Every node of the graph behind some outputs."""
    todo, seen = [o.grad_fn for o in outputs if o.grad_fn is not None], set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        todo += [n for n, _ in node.next_functions if n is not None]


def backward_twice(trial: Trial) -> None:
    """A second backward over the same graph gives the same bits.

    Catches saved tensors and cotangents that backward writes over, and buffers that it frees (axolotl PR#3892).
    """
    if not trial.contract.deterministic:
        raise NotApplicable("declared non-deterministic")
    xs = trial.leaves()
    outputs = trial.run(xs)
    differentiable(outputs)
    cotangents = trial.cotangents(outputs)
    kept = [None if g is None else g.clone() for g in pull(outputs, xs, cotangents, retain_graph=True)]
    if "cotangents" in trial.contract.mutates:
        cotangents = trial.cotangents(outputs)
    again = pull(outputs, xs, cotangents, retain_graph=True)
    _same(trial, kept, again, "the second backward over the same graph gives another gradient of {}")


def interleaved_calls(trial: Trial) -> None:
    """Two calls, forward forward backward backward, each give what they give alone.

    Catches state that is kept on a class, in a module or in a cache instead of with the call.
    """
    if not trial.contract.deterministic:
        raise NotApplicable("declared non-deterministic")
    layout = LAYOUTS[trial.point.layout]

    def inputs(other: bool) -> list[Tensor]:
        values = [v * 0.5 + 0.25 if other else v for v in trial.values]
        return [layout(v.clone()).detach().requires_grad_(n) for v, n in zip(values, trial.need)]

    def alone(other: bool) -> tuple[list[Any], Outputs]:
        xs = inputs(other)
        outputs = trial.run(xs)
        differentiable(outputs)
        return [None if g is None else g.clone() for g in pull(outputs, xs, trial.cotangents(outputs, salt=other))], outputs

    want = alone(False)[0], alone(True)[0]
    a, b = inputs(False), inputs(True)
    ya, yb = trial.run(a), trial.run(b)
    got = pull(ya, a, trial.cotangents(ya)), pull(yb, b, trial.cotangents(yb, salt=1))
    for k, words in enumerate(
        ("an earlier call, with another call in between", "a call, with an earlier one not yet pulled back")
    ):
        _same(trial, want[k], got[k], "the gradient of {} of " + words + " is not what it is alone")


def gradients_kept(trial: Trial) -> None:
    """Outputs and gradients stay what they are when the function is called again.

    Catches a workspace that is shared between calls, and buffers that are returned and used again.
    """
    xs = trial.leaves()
    outputs = trial.run(xs)
    differentiable(outputs)
    grads = pull(outputs, xs, trial.cotangents(outputs), retain_graph=True)
    held = {f"output {k}": o for k, o in enumerate(outputs)} | {
        f"gradient of {n}": g for n, g in zip(trial.names, grads) if g is not None
    }
    before = {name: t.detach().clone() for name, t in held.items()}
    for salt in (1, 2):
        others = [(v * (0.5 / salt) + 0.25).requires_grad_(n) for v, n in zip(trial.values, trial.need)]
        later = trial.run(others)
        pull(later, others, trial.cotangents(later, salt=salt))
    for name, t in held.items():
        if not same_bits(t, before[name]):
            raise Wrong(f"{name} was overwritten by a later call", what=f"{name} overwritten")


def version_counter(trial: Trial) -> None:
    """A change in place after forward is noticed: backward raises, or the change does no harm.

    Catches inputs and outputs saved past the version counter (`.data`, attributes of ctx), which give silently wrong gradients.
    """
    if trial.point.layout == "expanded":
        raise NotApplicable("an expanded tensor cannot be written to")
    xs = trial.leaves()
    outputs = trial.run(xs)
    differentiable(outputs)
    want = [None if g is None else g.clone() for g in pull(outputs, xs, trial.cotangents(outputs))]
    places = [("input", k) for k in range(len(xs))] + [("output", k) for k in range(len(outputs))]
    for kind, k in places:
        xs = trial.leaves()
        outputs = trial.run(xs)
        cotangents = trial.cotangents(outputs)
        target = xs[k] if kind == "input" else outputs[k]
        name = trial.names[k] if kind == "input" else str(k)
        if target.numel() == 0 or target.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            continue
        if kind == "output" and any(share_memory(target, x) for x in xs):
            continue  # writing to it writes to an input as well
        try:
            with torch.no_grad():
                target.mul_(1.5).add_(0.5)
            got = pull(outputs, xs, cotangents)
        except RuntimeError:
            continue
        for n, g, w in zip(trial.names, got, want):
            if g is not None and w is not None and not same_bits(g, w) and not _rounding(trial, g, w):
                raise Wrong(
                    f"{kind} {name} changed in place between forward and backward, and the gradient of {n} is silently "
                    "another: "
                    "save it with ctx.save_for_backward, which would have raised",
                    what=f"{kind} changed",
                )


def share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def deterministic(trial: Trial) -> None:
    """The same call gives the same bits.

    Catches sums in the order of arrival and memory that is read before it is written: between runs, freed memory is full of
    NaN.
    """
    if not trial.contract.deterministic:
        raise NotApplicable("declared non-deterministic")
    runs = []
    for k in range(3):
        xs = trial.leaves()
        outputs = trial.run(xs)
        grads = pull(outputs, xs, trial.cotangents(outputs))
        runs.append(([o.detach().clone() for o in outputs], [None if g is None else g.clone() for g in grads]))
        junk = [
            torch.full_like(t, (float("nan"), -7.0, 3.0)[k])
            for t in (*xs, *outputs, *(g for g in grads if g is not None))
            for _ in "12"
        ]
        del junk, xs, outputs, grads
    for k in (1, 2):
        for j, (a, b) in enumerate(zip(runs[0][0], runs[k][0])):
            if not same_bits(a, b) and not (_rounding(trial, a, b) and _reference_varies(trial)):
                raise Wrong(f"two runs of the same call give two outputs {j}", what=f"output {j} varies")
        for name, g, h in zip(trial.names, runs[0][1], runs[k][1]):
            if (
                g is not None
                and h is not None
                and not same_bits(g, h)
                and not (_rounding(trial, g, h) and _reference_varies(trial))
            ):
                raise Wrong(f"two runs of the same call give two gradients of {name}", what=f"gradient of {name} varies")


def _reference_varies(trial: Trial) -> bool:
    """Whether the reference, or without one nothing that is known, gives the same bits in every run."""
    if trial.reference is None:
        return True
    runs = []
    for _ in range(4):
        xs = trial.leaves()
        outputs = trial.run(xs, trial.reference)
        runs.append([*outputs, *(g for g in pull(outputs, xs, trial.cotangents(outputs)) if g is not None)])
    return any(not same_bits(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


def global_rng(trial: Trial) -> None:
    """The global random number generators are left alone, by forward unless the contract says `random`, by backward always.

    Catches dropout masks that backward draws anew, and functions that change what comes after them in a program.
    """
    xs = trial.leaves()
    if trial.contract.random:
        torch.manual_seed(trial.point.seed)
    else:
        torch.manual_seed(trial.point.seed + 104_729)  # a state that a function which seeds the generator does not leave
        torch.rand(1)
    before, python_before = torch.get_rng_state(), python_random.getstate()
    outputs = trial.call(*xs)
    middle, python_middle = torch.get_rng_state(), python_random.getstate()
    changed = not torch.equal(before, middle) or python_before != python_middle
    if changed and not trial.contract.random:
        raise Wrong(
            "forward draws from the global random number generator: declare contract random=True", what="random forward"
        )
    pull(outputs, xs, trial.cotangents(outputs))
    if not torch.equal(middle, torch.get_rng_state()) or python_middle != python_random.getstate():
        raise Wrong(
            "backward draws from the global random number generator: it cannot replay what forward drew", what="random backward"
        )


def differentiable(outputs: Sequence[Tensor]) -> None:
    if not any(o.requires_grad for o in outputs):
        raise NotApplicable("no output requires grad")


def _same(trial: Trial, want: Sequence[Any], got: Sequence[Any], words: str) -> None:
    for name, w, g in zip(trial.names, want, got):
        if w is None or g is None or same_bits(w, g) or _rounding(trial, g, w):
            continue
        difference = (w.double() - g.double()).abs().nan_to_num(torch.inf)
        raise Wrong(f"{words.format(name)}: apart by {float(difference.max()):.3g}", what=f"gradient of {name} varies")


def _rounding(trial: Trial, a: Tensor, b: Tensor) -> bool:
    """Whether two results of one computation are apart by no more than the order of a sum: BLAS chooses it by the alignment
    of memory."""
    if a.shape != b.shape or a.dtype != b.dtype or not bool((a.isfinite() == b.isfinite()).all()):
        return False
    a, b = a.detach().double().nan_to_num(0, 0, 0), b.detach().double().nan_to_num(0, 0, 0)
    size = float(torch.maximum(a.abs(), b.abs()).max()) if a.numel() else 0.0
    return bool(((a - b).abs() <= 4 * torch.finfo(trial.point.torch_dtype).eps * size).all()) and trial.point.dtype in (
        "float64",
        "float32",
    )


def _or_none(make: Any, *args: Any) -> Any:
    try:
        return make(*args)
    except Exception:
        return None
