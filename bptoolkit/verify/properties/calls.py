"""A call with its inputs and cotangents, results held to each other bit for bit, and the memory under tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bptoolkit.verify.properties.asking import hold_alike, nodes
from bptoolkit.verify.properties.values import truth_of
from bptoolkit.verify.trial import NotApplicable, Outputs, Trial, Wrong, pull, same_bits

CustomNode = torch.autograd.function.BackwardCFunction


@dataclass
class Call:
    """One forward, and what is needed to pull its gradients back.

    Attributes:
        trial: whose call it is.
        xs: the leaves.
        passed: what the function got: the leaves, or copies of those that it writes to.
        outputs, cotangents: one for each output.
    """

    trial: Trial
    xs: list[Tensor]
    passed: list[Tensor]
    outputs: Outputs
    cotangents: list[Tensor]

    def pull(self, *, retain: bool = False, salt: int | None = None) -> list[Tensor | None]:
        """The gradients; by other cotangents if a `salt` is given."""
        cotangents = self.cotangents if salt is None else self.trial.cotangents(self.outputs, salt=salt)
        return pull(self.outputs, self.xs, cotangents, retain_graph=retain)

    def same(self, want: Sequence[Tensor | None], got: Sequence[Tensor | None], words: str, *, rounding: bool = False) -> None:
        """Raise unless two lists of gradients are the same bits, where the function is deterministic.

        Args:
            want, got: the gradients.
            words: what is wrong if they differ; `{}` is the name of the input.
            rounding: let them be apart by rounding errors all the same.
        """
        for name, w, g in zip(self.trial.names, want, got):
            if (w is None) == (g is None) and (w is None or g is None or same_bits(w, g)):
                continue
            if w is None or g is None:
                raise Wrong(f"{words.format(name)}: it is there in one of the two alone", what=f"gradient of {name} varies")
            if rounding or not self.trial.contract.deterministic:
                self._alike(want, got, words)
                return
            raise Wrong(f"{words.format(name)}: {_apart(w, g)}", what=f"gradient of {name} varies")

    def _alike(self, want: Sequence[Tensor | None], got: Sequence[Tensor | None], words: str) -> None:
        what = ["output"] * len(self.outputs) + [words.format(n) for n in self.trial.names]
        none = [None] * len(self.outputs)
        inputs = [*(x.detach() for x in self.xs), *self.cotangents]
        hold_alike(self.trial, what, [*none, *got], [*none, *want], truth_of(self.trial, len(self.xs)), inputs, "the first one")


def call(trial: Trial, values: Sequence[Tensor] | None = None, *, salt: int = 0, xs: list[Tensor] | None = None) -> Call:
    """Run forward, on the trial's values or others.

    Raises:
        NotApplicable: no output requires grad.
    """
    if values is not None:
        trial = replace(trial, values=tuple(values))
    xs = trial.leaves() if xs is None else xs
    passed = [x.clone() if n in trial.contract.mutates else x for n, x in zip(trial.names, xs)]  # a leaf cannot be written to
    outputs = forward(trial, passed)
    if not any(o.requires_grad for o in outputs):
        raise NotApplicable("no output requires grad")
    return Call(trial, xs, passed, outputs, trial.cotangents(outputs, salt=salt))


def forward(trial: Trial, passed: Sequence[Tensor]) -> Outputs:
    """The outputs, of these very tensors: `Trial.run` copies those that the function writes to."""
    if trial.contract.random:
        torch.manual_seed(trial.point.seed)
    return trial.call(*passed)


def copies(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """What tensors are now."""
    return [None if t is None else t.detach().clone() for t in tensors]


def other_values(trial: Trial) -> Outputs:
    """Values that the function takes as well, other ones if there are any."""
    halved = tuple(v * 0.5 + 0.25 for v in trial.values)
    turned = tuple(v.flip(-1) if v.dim() else v for v in trial.values)
    for values in (halved, turned):
        try:
            trial.run([v.clone() for v in values])
        except Exception:  # outside the function's domain
            continue
        return values
    return trial.values


def other_sizes(trial: Trial) -> Outputs | None:
    """Values of a longer leading dimension, if the reference takes them, gradients and all."""
    if trial.reference is None or not trial.values or not trial.values[0].dim():
        return None
    lead = trial.values[0].shape[0]
    values = tuple(torch.cat([v, 0.5 * v]) if v.dim() and v.shape[0] == lead else v for v in trial.values)
    try:
        xs = [v.double().requires_grad_(n) for v, n in zip(values, trial.need)]
        outputs = trial.run(xs, trial.reference)
        pull(outputs, xs, trial.cotangents(outputs))  # an index that stays as it is may be too short for the gradient alone
        trial.run([v.clone() for v in values])
    except Exception:
        return None
    return values


def custom_nodes(outputs: Sequence[Tensor]) -> Iterator[Any]:
    """The nodes of custom Functions in a graph; torch's own (checkpoint, compiled graphs) are left out."""
    for node in nodes(outputs):
        owner = getattr(type(node), "_forward_cls", None)
        if isinstance(node, CustomNode) and not str(getattr(owner, "__module__", "")).startswith("torch."):
            yield node


def saved(outputs: Sequence[Tensor]) -> list[Tensor]:
    """What the custom Functions of a graph have saved."""
    return [t for node in custom_nodes(outputs) for t in node.saved_tensors if type(t) in (Tensor, torch.nn.Parameter)]


def memory_of(t: Tensor) -> Tensor:
    """A copy of all bytes of the storage under a tensor: also those between and beside its elements."""
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.detach().untyped_storage()).clone()


def guarded(t: Tensor, room: int = 64) -> Tensor:
    """The same tensor in a storage with room before and behind, NaN, so that a write out of bounds is seen."""
    flat = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.detach().untyped_storage())
    wide = flat.new_full((flat.numel() + 2 * room,), float("nan") if t.is_floating_point() else 1)
    wide[room : room + flat.numel()] = flat
    return wide.as_strided(t.shape, t.stride(), t.storage_offset() + room)


def _apart(a: Tensor, b: Tensor) -> str:
    if a.shape != b.shape:
        return f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    return f"apart by {float((a.double() - b.double()).abs().nan_to_num(torch.inf).max()):.3g}"


def donates(error: Exception) -> bool:
    """Whether a compiled graph says that it writes over what it saved, so that backward runs once."""
    return "donated buffer" in str(error)
