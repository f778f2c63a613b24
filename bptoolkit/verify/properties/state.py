"""What a call must not depend on: unused outputs, backwards before it, calls in between, random numbers, other memory.

But for the first, none of these needs a reference: a call is compared with itself, bit for bit. What a function does to memory
is in `storage`.
"""

from __future__ import annotations

import random as python_random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from bptoolkit.verify.properties.asking import first_line, native_of
from bptoolkit.verify.properties.calls import Call, call, copies, donates, other_sizes, other_values
from bptoolkit.verify.properties.storage import gradients_kept, memory, nothing_changed, version_counter
from bptoolkit.verify.properties.values import truth_of
from bptoolkit.verify.trial import NotApplicable, Trial, Wrong, pull, same_bits

__all__ = [
    "backward_twice",
    "deterministic",
    "global_rng",
    "gradients_kept",
    "interleaved_calls",
    "memory",
    "nothing_changed",
    "some_outputs_unused",
    "version_counter",
]


def some_outputs_unused(trial: Trial) -> None:
    """Only some of several outputs take part in the loss, and the cotangents of the others are undefined, or zero.

    Catches a cotangent that is None and is used as a tensor, an output whose gradient is dropped where another one has none
    (mamba's `return_last_state`), early exits, and cotangents that are mixed up.
    """
    outputs = call(trial).outputs
    live = [k for k, o in enumerate(outputs) if o.requires_grad]
    if len(live) < 2:
        raise NotApplicable("there is one output to differentiate")
    alone = [(k,) for k in live]
    for used in alone + [tuple(j for j in live if j != k) for k in live if len(live) > 2]:
        which = f"output {used[0]}" if len(used) == 1 else f"outputs {' and '.join(map(str, used))}"
        made = call(trial)
        zeroed = [c if k in used else torch.zeros_like(c) for k, c in enumerate(made.cotangents)]
        undefined = [c if k in used else None for k, c in enumerate(made.cotangents)]
        truth, inputs = truth_of(trial, len(made.xs)), [*(x.detach() for x in made.xs), *zeroed]
        native = native_of(truth, inputs, trial)
        for words, cotangents in (
            (f"with {which} alone in the loss", undefined),
            (f"with zero sent to all but {which}", zeroed),
        ):
            made = call(trial)
            try:
                grads = pull(made.outputs, made.xs, cotangents)
            except Exception as crash:
                raise Wrong(f"{words} backward raised {first_line(crash)}", what="raised") from None
            what = [f"output {k}" for k in range(len(outputs))] + [f"gradient of {n} {words}" for n in trial.names]
            trial.judge(what, [*(None for _ in outputs), *grads], truth, inputs, native)


def backward_twice(trial: Trial) -> None:
    """A second backward over the same graph gives the same bits.

    Catches saved tensors and cotangents that backward writes over, and buffers that it frees (axolotl PR#3892).
    """
    made = call(trial)
    try:
        first = made.pull(retain=True)
    except RuntimeError as error:
        if not donates(error):
            raise
        raise NotApplicable("compiled with donated buffers, which allow one backward") from None
    kept = copies(first)
    if "cotangents" in trial.contract.mutates:
        made.cotangents = trial.cotangents(made.outputs)
    for words in ("the second backward over the same graph", "a backward over the same graph, by a copy of the cotangent,"):
        try:
            again = made.pull(retain=True)
        except Exception as error:
            raise Wrong(f"{words} raised {first_line(error)}", what="raised") from None
        made.same(kept, again, words + " gives another gradient of {}")
        made.cotangents = trial.cotangents(made.outputs)  # the same values and strides in other memory


def interleaved_calls(trial: Trial) -> None:
    """Two calls, forward forward backward backward, each give what they give alone.

    Catches state that is kept on a class, in a module or in a cache instead of with the call, caches with the wrong key, and
    state of a thread: backward may run in another one.
    """
    values = other_values(trial)
    want_a, want_b = copies(call(trial).pull()), copies(call(trial, values, salt=1).pull())
    earlier = "the gradient of {} of a call, with another call between its forward and its backward, is not what it is alone"
    later = "the gradient of {} of a call, with an earlier one not yet pulled back, is not what it is alone"
    for first_in_first_out in (True, False):
        a, b = call(trial), call(trial, values, salt=1)
        if first_in_first_out:
            got_a, got_b = a.pull(), b.pull()
        else:
            got_b, got_a = b.pull(), a.pull()
        a.same(want_a, got_a, earlier)
        b.same(want_b, got_b, later)
    for words, between in _between(trial, values):
        a = call(trial)
        between()
        a.same(want_a, a.pull(), earlier.replace("another call", words))
    _same_memory(trial, values, want_b)
    a = call(trial)
    a.same(want_a, _in_thread(a), "the gradient of {} is another when backward runs in another thread", rounding=True)


def _between(trial: Trial, values: Sequence[Tensor]) -> list[tuple[str, Callable[[], Any]]]:
    """Calls of other kinds that may come between a forward and its backward."""

    def unwatched() -> None:
        with torch.no_grad():
            trial.run([v.clone() for v in values])

    calls: list[tuple[str, Callable[[], Any]]] = [("a call without gradients", unwatched)]
    if len(trial.values) > 1:
        first = "1" + "0" * (len(trial.values) - 1)
        calls.append(("a call that needs other gradients", lambda: _attempt(trial.at(need=first), values)))
    larger = other_sizes(trial)
    if larger is not None:
        calls.append(("a call of other sizes", lambda: _attempt(trial, larger).pull()))
    return calls


def _attempt(trial: Trial, values: Sequence[Tensor] | None) -> Any:
    try:
        return call(trial, values)
    except NotApplicable:  # nothing to differentiate there
        return call(trial)


def _same_memory(trial: Trial, values: Sequence[Tensor], want: Sequence[Tensor | None]) -> None:
    """The same tensors with new values: a cache must not know them by their address."""
    if trial.point.layout == "expanded":
        return
    a = call(trial)
    a.pull()
    fresh = replace(trial, values=tuple(values)).leaves()
    with torch.no_grad():
        for x, v in zip(a.xs, fresh):
            x.copy_(v)
    again = call(trial, xs=a.xs)
    again.cotangents = trial.cotangents(again.outputs, salt=1)
    again.same(want, again.pull(), "the gradient of {}, when the same tensors have other values, is that of the old values")


def _in_thread(made: Call) -> list[Tensor | None]:
    """The gradients, by a backward in another thread."""
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(made.pull())
        except Exception as error:
            found.append(error)

    thread = Thread(target=work)
    thread.start()
    thread.join()
    if isinstance(found[0], Exception):
        raise Wrong(f"backward in another thread than forward raised {first_line(found[0])}", what="raised")
    return list(found[0])


def deterministic(trial: Trial) -> None:
    """The same call gives the same bits.

    Catches sums in the order of arrival, random numbers in backward, and memory that is read before it is written: between
    runs, freed memory is full of junk, and in the last run `torch.empty` gives NaN.
    """
    if not trial.contract.deterministic:
        raise NotApplicable("declared non-deterministic")
    first = _results(trial)
    for junk in (float("nan"), -7.0):
        _dirty([*trial.values, *first.values()], junk)
        for name, t in _results(trial).items():
            if not same_bits(t, first[name]):
                raise Wrong(f"two runs of the same call give another {name}", what=f"{name} varies")
    before = torch.get_deterministic_debug_mode()
    filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        torch.set_deterministic_debug_mode(1)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        filled = _results(trial)
    except NotImplementedError:  # an operator that has no deterministic form
        return
    finally:
        torch.set_deterministic_debug_mode(before)
        torch.utils.deterministic.fill_uninitialized_memory = filling  # type: ignore[attr-defined]
    for name, t in filled.items():
        if bool((t.isnan() & ~first[name].isnan()).any()):
            raise Wrong(f"{name} depends on memory from torch.empty that nobody has written", what=f"{name} uninitialised")


def _dirty(tensors: Sequence[Tensor], junk: float) -> None:
    """Fill memory of these sizes with junk, and free it."""
    for t in tensors:
        [torch.full_like(t, junk) for _ in range(2)]


def _results(trial: Trial) -> dict[str, Tensor]:
    made = call(trial)
    grads = {f"gradient of {n}": g.detach().clone() for n, g in zip(trial.names, made.pull()) if g is not None}
    return {f"output {k}": o.detach().clone() for k, o in enumerate(made.outputs)} | grads


def global_rng(trial: Trial) -> None:
    """The global random number generators are left alone: by forward unless the contract says `random`, by backward always.

    Catches dropout masks that backward draws anew, and functions that change what comes after them in a program. Generators of
    Python and NumPy, which no seed of torch reaches, count as well.
    """
    device = trial.values[0].device
    at_first = _generators(device)
    try:
        call(trial).pull()  # what the first call draws once for all, it may draw
        _draw()
        xs = trial.leaves()
        if trial.contract.random:
            torch.manual_seed(trial.point.seed)
        before = _generators(device)
        outputs = trial.call(*[x.clone() if n in trial.contract.mutates else x for n, x in zip(trial.names, xs)])
        middle = _generators(device)
        for name in _moved(before, middle):
            if not (trial.contract.random and name.startswith("torch")):
                hint = "" if trial.contract.random else ": declare contract random=True"
                if not name.startswith("torch"):
                    hint = ": use torch's, which torch.manual_seed reaches"
                raise Wrong(f"forward draws from the global random number generator of {name}{hint}", what="random forward")
        cotangents = trial.cotangents(outputs)
        _draw()
        middle = _generators(device)
        pull(outputs, xs, cotangents)
        for name in _moved(middle, _generators(device)):
            raise Wrong(
                f"backward draws from the global random number generator of {name}: it cannot replay what forward drew, and "
                "changes what a program draws next",
                what="random backward",
            )
    finally:
        _restore(at_first, device)


def _generators(device: torch.device) -> dict[str, Any]:
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "Python": python_random.getstate()}
    if device.type == "cuda":
        states["torch on the device"] = torch.cuda.get_rng_state(device)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        states["NumPy"] = numpy.random.get_state()
    return states


def _draw() -> None:
    """Move on, so that a function that seeds a generator changes it, however often it has done so."""
    torch.rand(1)
    python_random.random()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.rand()


def _restore(states: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(states["torch"])
    python_random.setstate(states["Python"])
    if "torch on the device" in states:
        torch.cuda.set_rng_state(states["torch on the device"], device)
    if "NumPy" in states:
        sys.modules["numpy"].random.set_state(states["NumPy"])


def _moved(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [name for name, state in before.items() if not _equal(state, after[name])]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple):
        return all(_equal(x, y) for x, y in zip(a, b))
    return bool((a == b).all()) if hasattr(a, "all") else a == b
