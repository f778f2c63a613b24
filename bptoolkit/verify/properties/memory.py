"""Memory: what a function writes over, shares between its outputs, or keeps alive."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from bptoolkit.verify.properties.state import differentiable, graph_nodes, share_memory
from bptoolkit.verify.trial import Outputs, Trial, Wrong, pull, same_bits


def nothing_changed(trial: Trial) -> None:
    """Inputs, cotangents and saved tensors are bit for bit what they were, and so is the memory between and beside their
    elements.

    Catches kernels that write over what they were given (Liger#272, `.data`, out of bounds), which no version counter shows.
    """
    _hold_declared(trial)
    xs = trial.leaves()
    watched = {f"input {n}": x for n, x in zip(trial.names, xs)}
    before = {name: _memory(t) for name, t in watched.items()}
    versions = {name: t._version for name, t in watched.items()}
    outputs = trial.run(xs)
    _unchanged(trial, watched, before, versions, "forward")
    _apart(trial, outputs)
    cotangents = trial.cotangents(outputs)
    saved = {f"saved tensor {k}": t for k, t in enumerate(_saved(outputs))}
    watched |= saved | {f"cotangent {k}": c for k, c in enumerate(cotangents)}
    watched |= {f"output {k}": o.detach() for k, o in enumerate(outputs)}
    before = {name: _memory(t) for name, t in watched.items()}
    versions = {name: t._version for name, t in watched.items()}
    pull(outputs, xs, cotangents, retain_graph=True)
    _unchanged(trial, watched, before, versions, "backward")


def _hold_declared(trial: Trial) -> None:
    """An input that forward writes to, as declared, has to say so by its version counter."""
    if not trial.contract.mutates:
        return
    xs = [x.clone() for x in trial.leaves((False,) * len(trial.values))]
    versions = [x._version for x in xs]
    trial.run(xs)
    for name, x, v, version in zip(trial.names, xs, trial.values, versions):
        if (
            name in trial.contract.mutates
            and not same_bits(x, v)
            and trial.point.layout != "expanded"
            and x._version == version
        ):
            raise Wrong(f"forward writes to {name} as declared, but its version counter does not say so: use ctx.mark_dirty")


def _apart(trial: Trial, outputs: Outputs) -> None:
    """Outputs lie in memory of their own, unless those of the reference share theirs too or torch knows of it (a view)."""
    if trial.reference is None:
        return
    want = trial.run(trial.leaves(), trial.reference)
    for k, a in enumerate(outputs):
        for j, b in enumerate(outputs[:k]):
            if not a.numel() or not b.numel() or a._is_view() or b._is_view() or not share_memory(a, b):
                continue
            if len(want) == len(outputs) and not share_memory(want[k], want[j]):
                raise Wrong(
                    f"outputs {j} and {k} lie in one memory: a change of one in place changes the other", what="outputs share"
                )


def _unchanged(
    trial: Trial, watched: dict[str, Tensor], before: dict[str, Tensor], versions: dict[str, int], phase: str
) -> None:
    for name, t in watched.items():
        if torch.equal(_memory(t), before[name]):
            continue
        kind, _, which = name.partition(" ")
        if (kind == "input" and which in trial.contract.mutates) or (
            kind != "input" and "cotangents" in trial.contract.mutates
        ):
            continue
        beside = "beside the elements of " if same_bits(t.detach(), before[name].view(t.dtype).as_strided(*_where(t))) else ""
        raise Wrong(f"{phase} wrote {'' if beside else 'over '}{beside}{name}", what=f"{name} changed")


def _memory(t: Tensor) -> Tensor:
    """All bytes of the storage under a tensor."""
    flat = torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.detach().untyped_storage())
    return flat.clone()


def _where(t: Tensor) -> tuple[Any, ...]:
    return tuple(t.shape), t.stride(), t.storage_offset()


def _saved(outputs: Sequence[Tensor]) -> list[Tensor]:
    """What the custom Functions in a graph have saved."""
    found = []
    for node in graph_nodes(outputs):
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            found += [t for t in node.saved_tensors if isinstance(t, Tensor) and type(t) in (Tensor, torch.nn.Parameter)]
    return found


def memory(trial: Trial) -> None:
    """Nothing outlives the graph, and what is saved is saved where hooks see it.

    Catches reference cycles between ctx and an output, tensors in global lists, and tensors kept as attributes of ctx, which
    offloading and checkpointing miss and which leak (pytorch#25340). Tensors of one element and random states may be
    attributes.
    """
    xs = trial.leaves()
    outputs = trial.run(xs)
    differentiable(outputs)
    for node in graph_nodes(outputs):
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            for name, value in vars(node).items():
                if any(t.numel() > 1 and t.dtype != torch.uint8 for t in _tensors(value)):
                    raise Wrong(
                        f"ctx.{name} holds a tensor: saved-tensor hooks (offloading, checkpointing) do not see it, and an "
                        "input or "
                        "output kept there is never freed; use ctx.save_for_backward",
                        what="attribute of ctx",
                    )
    node = outputs = xs = None  # type: ignore[assignment]
    _hold_storages(trial)
    for pulled in (False, True):
        xs = trial.leaves()
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            outputs = trial.run(xs)
            if pulled:
                pull(outputs, xs, trial.cotangents(outputs))
            held = [(f"input {n}", weakref.ref(x)) for n, x in zip(trial.names, xs)]
            held += [(f"output {k}", weakref.ref(o)) for k, o in enumerate(outputs)]
            del outputs, xs
            alive = [name for name, ref in held if ref() is not None]
            if alive:
                raise Wrong(
                    f"{alive[0]} is kept alive after the graph is gone{'' if pulled else ', when backward never ran'}",
                    what="leak",
                )
        finally:
            if was_enabled:
                gc.enable()


def _hold_storages(trial: Trial) -> None:
    """The memory of outputs is freed too: a detached copy in a list keeps it. A cache may hold that of one call, not of all."""
    stored = []
    for _ in range(4):
        xs = trial.leaves()
        outputs = trial.run(xs)
        pull(outputs, xs, trial.cotangents(outputs))
        stored.append([StorageWeakRef(o.untyped_storage()) for o in outputs if o.numel()])
        del xs, outputs
    alive = [sum(not ref.expired() for ref in refs) for refs in stored]
    if sum(map(bool, alive)) > 2:
        raise Wrong(
            f"the memory of the outputs of {sum(map(bool, alive))} of 4 calls is kept after the graph is gone", what="leak"
        )


def _tensors(value: Any, depth: int = 3) -> Iterator[Tensor]:
    """The tensors in a value and in the containers that it is made of."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, dict):
        for v in value.values():
            yield from _tensors(v, depth - 1)
    elif depth and isinstance(value, (list, tuple, set)):
        for v in value:
            yield from _tensors(v, depth - 1)
