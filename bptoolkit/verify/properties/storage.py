"""What a function does to memory: what it writes to, shares between calls, hides from the version counter, and keeps alive.

None of these needs a reference: a call is compared with itself, bit for bit.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from bptoolkit.verify.properties.asking import first_line
from bptoolkit.verify.properties.calls import (
    Call,
    CustomNode,
    call,
    copies,
    custom_nodes,
    donates,
    forward,
    guarded,
    memory_of,
    other_values,
    saved,
)
from bptoolkit.verify.trial import NotApplicable, Trial, Wrong, pull, same_bits


def nothing_changed(trial: Trial) -> None:
    """Inputs, other arguments, outputs, cotangents and saved tensors stay bit for bit, and so does the memory beside them.

    Catches kernels that write over what they were given (Liger#272, `.data`, out of bounds), which no version counter shows.
    What the contract names in `mutates` may change; an input that does must have its version counter bumped, and the function
    in its history. Backward leaves `.grad` alone.
    """
    xs = [guarded(x).requires_grad_(x.requires_grad) for x in trial.leaves()]
    made = call(trial, xs=xs)  # a first one fills caches
    xs = [guarded(x).requires_grad_(x.requires_grad) for x in trial.leaves()]
    passed = [x.clone() if n in trial.contract.mutates else x for n, x in zip(trial.names, xs)]
    others = {f"argument {k}": t for k, t in enumerate(_bound(trial.call))}
    watch = _Watch(trial, {f"input {n}": x for n, x in zip(trial.names, passed)} | others)
    histories = [x.grad_fn for x in passed]
    outputs = forward(trial, passed)
    watch.hold("forward")
    _hold_histories(trial, passed, histories, watch)
    cotangents = [guarded(c) for c in trial.cotangents(outputs)]
    kept = {f"saved tensor {k}": t for k, t in enumerate(saved(outputs))}
    kept |= {f"output {k}": o for k, o in enumerate(outputs)} | {f"cotangent {k}": c for k, c in enumerate(cotangents)}
    watch = _Watch(trial, watch.tensors | kept)
    earlier = [torch.ones_like(x) if x.requires_grad else None for x in xs]
    for x, e in zip(xs, earlier):
        x.grad = e
    try:
        pull(outputs, xs, cotangents, retain_graph=True)
    except RuntimeError as error:
        if not donates(error):
            raise
        pull(made.outputs, made.xs, made.cotangents)
        return
    watch.hold("backward")
    for name, x, e in zip(trial.names, xs, earlier):
        if x.grad is not e or (e is not None and not bool((e == 1).all())):
            raise Wrong(f"backward wrote to {name}.grad: what it returns is added there anyway", what=f"{name}.grad changed")


def _hold_histories(trial: Trial, passed: Sequence[Tensor], before: Sequence[Any], watch: _Watch) -> None:
    """Raise if an input that requires grad was written to and is, for autograd, what it was; unless the reference does that."""
    theirs: list[bool] | None = None
    for k, (name, x, was) in enumerate(zip(trial.names, passed, before)):
        if not x.requires_grad or was is None or x.grad_fn is not was:
            continue
        if torch.equal(memory_of(x), watch.before[f"input {name}"]):
            continue
        if theirs is None:
            theirs = _silent_writes(trial)
        if not theirs[k]:
            raise Wrong(
                f"forward writes to input {name}, and to autograd it is what it was, so that what is computed from it next "
                "gets a wrong gradient: use ctx.mark_dirty",
                what=f"history of {name}",
            )


def _silent_writes(trial: Trial) -> list[bool]:
    """Per input: whether the reference writes to it without a trace in its history (as `embedding(max_norm=...)` does)."""
    if trial.reference is None:
        return [False] * len(trial.values)
    ys = [x.double().requires_grad_(n).clone() for x, n in zip(trial.values, trial.need)]
    before = [(y.detach().clone(), y.grad_fn) for y in ys]
    trial.reference(*ys)
    return [not same_bits(y, v) and y.grad_fn is f for y, (v, f) in zip(ys, before)]


class _Watch:
    """Tensors, and the bytes of their storages when it was made."""

    def __init__(self, trial: Trial, tensors: dict[str, Tensor]) -> None:
        self.trial, self.tensors = trial, tensors
        self.before = {name: memory_of(t) for name, t in tensors.items()}
        self.versions = {name: t._version for name, t in tensors.items()}

    def hold(self, phase: str) -> None:
        """Raise if one has changed that may not."""
        mutates = self.trial.contract.mutates
        allowed = {StorageWeakRef(t.untyped_storage()).cdata for name, t in self.tensors.items() if self._declared(name)}
        for name, t in self.tensors.items():
            if torch.equal(memory_of(t), self.before[name]):
                continue
            if self._declared(name):
                if name.startswith("input") and t._version == self.versions[name]:
                    raise Wrong(
                        f"{phase} writes to {name} as declared, but its version counter does not say so: use ctx.mark_dirty",
                        what=f"{name} changed",
                    )
                continue
            if StorageWeakRef(t.untyped_storage()).cdata in allowed:
                continue  # the output that is the input, changed in place
            if "cotangents" in mutates and phase == "backward" and name.startswith(("saved", "output")):
                continue  # a backward that works in place is run once
            was = self.before[name].view(t.dtype).as_strided(t.shape, t.stride(), t.storage_offset())
            where = "memory beside the elements of " if same_bits(t.detach(), was) else ""
            raise Wrong(f"{phase} wrote over {where}{name}", what=f"{name} changed")

    def _declared(self, name: str) -> bool:
        kind, _, which = name.partition(" ")
        mutates = self.trial.contract.mutates
        return (kind == "input" and which in mutates) or (kind == "cotangent" and "cotangents" in mutates)


def _bound(fn: Callable[..., Any]) -> list[Tensor]:
    """The tensors that a function of the differentiable tensors alone holds: its other arguments."""
    cells = [c.cell_contents for c in getattr(fn, "__closure__", None) or () if _filled(c)]
    return [t for c in cells if isinstance(c, (Tensor, list, tuple)) for t in _tensors(c, 1) if type(t) is Tensor and t.is_cpu]


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # not filled yet
        return False


def gradients_kept(trial: Trial) -> None:
    """Outputs and gradients belong to the caller: a later call does not change them, and writing to them changes nothing else.

    Catches a workspace that is shared between calls or between backwards, and gradients that are the memory of an input or of a
    saved tensor: clipping or accumulating them in place then changes that one.
    """
    values = other_values(trial)
    first = call(trial)
    grads = first.pull(retain=True)
    held = {f"output {k}": o for k, o in enumerate(first.outputs)}
    held |= {f"gradient of {n}": g for n, g in zip(trial.names, grads) if g is not None}
    before = {name: t.detach().clone() for name, t in held.items()}
    later: list[Callable[[], Any]] = [
        lambda: first.pull(retain=True, salt=1),
        lambda: call(trial, values, salt=2).pull(),
        lambda: call(trial, salt=3).pull(),
    ]
    for words, run in zip(("a second backward", "a later call", "a later call"), later):
        run()
        for name, t in held.items():
            if not same_bits(t, before[name]):
                raise Wrong(f"{name} was overwritten by {words}", what=f"{name} overwritten")
    _own(trial, call(trial))


def _own(trial: Trial, made: Call) -> None:
    """Write to the gradients of a call, as clipping does: its inputs, outputs and second backward must not change."""
    grads = made.pull(retain=True)
    want = copies(grads)
    watched = {f"input {n}": x for n, x in zip(trial.names, made.xs)} | {f"output {k}": o for k, o in enumerate(made.outputs)}
    before = {name: t.detach().clone() for name, t in watched.items()}
    made.cotangents = trial.cotangents(made.outputs)  # a gradient may be the cotangent itself
    for g in grads:
        try:
            if g is not None:
                g.detach().mul_(-1.7).add_(0.37)
        except RuntimeError:  # expanded: nobody can write to it
            continue
    for name, t in watched.items():
        if not same_bits(t, before[name]):
            raise Wrong(f"a gradient shares its memory with {name}: clipping it in place changes that", what=f"{name} shared")
    shared = "the gradient of {} shares its memory with a saved tensor: once it is clipped in place, a second backward is wrong"
    try:
        again = made.pull()
    except Exception as error:  # the version counter of the saved tensor
        raise Wrong(
            "a gradient shares its memory with a saved tensor: once it is clipped in place, a second backward raises "
            f"{first_line(error)}",
            what="gradient shared",
        ) from None
    made.same(want, again, shared)


def version_counter(trial: Trial) -> None:
    """A change in place after forward is noticed: backward raises, or the change does no harm.

    Catches inputs and outputs saved past the version counter (`.data`, attributes of ctx), which give silently wrong gradients,
    and outputs that share their memory and do not say so.
    """
    if trial.point.layout == "expanded":
        raise NotApplicable("an expanded tensor cannot be written to")
    plain = call(trial)
    want = copies(plain.pull())
    places = [("input", k) for k in range(len(plain.xs))] + [("output", k) for k in range(len(plain.outputs))]
    written = False
    for kind, k in places:
        made = call(trial)
        target = made.passed[k] if kind == "input" else made.outputs[k]
        name = trial.names[k] if kind == "input" else str(k)
        if target.numel() == 0:
            continue
        others = {f"input {n}": x for n, x in zip(trial.names, made.passed)} | {
            f"output {j}": o for j, o in enumerate(made.outputs)
        }
        before = {other: (t._version, t.detach().clone()) for other, t in others.items() if t is not target}
        try:
            with torch.no_grad():
                target.mul_(-1.7).add_(0.37)
        except RuntimeError:  # torch itself does not allow it: a view of several, an expanded output
            continue
        written = True
        for other, (version, was) in before.items():
            if others[other]._version == version and not same_bits(others[other], was):
                raise Wrong(
                    f"{kind} {name} and {other} share their memory, but not their version counter: a change of one in place "
                    "changes the other, and nothing notices",
                    what=f"{kind} changed",
                )
        if kind == "output" and any(_shares(target, x) for x in made.passed):
            continue  # it has written to an input as well
        try:
            got = made.pull()
        except Exception:  # noticed
            continue
        made.cotangents = plain.cotangents
        plain.same(
            want,
            got,
            f"{kind} {name} changed in place between forward and backward, and the gradient of {{}} is silently another: save "
            "it with ctx.save_for_backward, which would have raised",
        )
    if not written:
        raise NotApplicable("there is nothing that can be written to")


def _shares(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def memory(trial: Trial) -> None:
    """Nothing outlives the graph, and what is saved is saved where hooks see it.

    Catches reference cycles between ctx and an output (pytorch#25340), tensors in global lists and class attributes, and
    tensors kept as attributes of ctx, in containers and closures too, which offloading and checkpointing miss. Random states
    (uint8) and tensors of one element may be attributes; torch's own Functions are not looked into.
    """
    _attributes(trial)
    for pulled in (False, True):
        _once(trial, pulled)  # fills caches
        enabled, thawed = gc.isenabled(), gc.get_freeze_count() == 0
        gc.disable()  # a cycle must not be collected by chance
        if thawed:
            gc.freeze()  # what there is already is neither counted nor collected below
        try:
            _rounds(trial, pulled)
        finally:
            if thawed:
                gc.unfreeze()
            if enabled:
                gc.enable()


def _attributes(trial: Trial) -> None:
    """Raise if a tensor is an attribute of a ctx."""
    made = call(trial)
    for node in custom_nodes(made.outputs):
        for name, value in vars(node).items():
            if any(t.numel() > 1 and t.dtype != torch.uint8 for t in _tensors(value)):
                raise Wrong(
                    f"ctx.{name} holds a tensor: saved-tensor hooks (offloading, checkpointing) and the version counter do not "
                    "see it, and an input or output kept there is never freed; use ctx.save_for_backward",
                    what="attribute of ctx",
                )


def _rounds(trial: Trial, pulled: bool) -> None:
    """Raise if what a call made is alive after it, or the number of tensors grows with every call."""
    when = "" if pulled else ", when backward never ran"
    counts = [_living()]
    for _ in range(3):
        held = _once(trial, pulled)
        counts.append(_living())
        alive = [name for name, tensor, storage in held if tensor() is not None or not storage.expired()]
        if alive:
            raise Wrong(f"{alive[0]} is kept alive after the graph is gone{when}: {_why(held)}", what="leak")
    if all(a < b for a, b in pairwise(counts)):
        gc.collect()
        why = "a global list, or by cycles through the graph" if _living() > counts[0] else "a reference cycle"
        raise Wrong(f"every call leaves {counts[-1] - counts[-2]} tensors behind{when}, held by {why}", what="leak")


def _once(trial: Trial, pulled: bool) -> list[tuple[str, weakref.ref[Tensor], StorageWeakRef]]:
    """One call, of which nothing is left but weak references."""
    made = call(trial)
    found = [(f"input {n}", x) for n, x in zip(trial.names, made.xs)] + [(f"output {k}", o) for k, o in enumerate(made.outputs)]
    if pulled:
        found += [(f"gradient of {n}", g) for n, g in zip(trial.names, made.pull()) if g is not None]
    return [(name, weakref.ref(t), StorageWeakRef(t.untyped_storage())) for name, t in found]


def _why(held: list[tuple[str, weakref.ref[Tensor], StorageWeakRef]]) -> str:
    gc.collect()
    if any(tensor() is not None or not storage.expired() for _, tensor, storage in held):
        return "something global holds it, or a cycle through the graph, which no garbage collector sees"
    return "a reference cycle holds it until the garbage collector runs"


def _living() -> int:
    """How many tensors and custom nodes there are that were made since `gc.freeze`."""
    return sum(issubclass(type(o), (Tensor, CustomNode)) for o in gc.get_objects())


def _tensors(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """The tensors in a value, in the containers that it is made of, and in what its functions close over."""
    if isinstance(value, Tensor):
        yield value
        return
    parts: list[Any] = []
    if isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = list(value)
    elif isinstance(value, partial):
        parts = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, FunctionType):
        parts = [c.cell_contents for c in value.__closure__ or () if _filled(c)]
    elif type(value).__module__ not in ("builtins", "torch") and not isinstance(value, type) and depth > 2:
        parts = list(getattr(value, "__dict__", {}).values())
    for part in parts if depth else ():
        yield from _tensors(part, depth - 1)
