"""The norms of gradients on their way back through time, for whoever asked for them.

Backward runs where no object of the caller's is at hand, inside an operator and in a graph of torch.compile too. So who asks, a
`Recorder`, has a number, which rules and operators take as an option, `record`; 0 is nobody. An operator hands over a tensor
when it has one, and nothing waits for it.

Letters   T steps, B rows, *V what vmap adds; a state sₜ, of one tensor or two; L layers, D directions
Maths     nₜ = ‖∂ℓ/∂sₜ₋₁ by way of sₜ‖, the norm of what step t sends back to the state it started from, over all rows that
          take the step: a gradient that shrinks or grows as it goes back is seen step by step
Source    Pascanu, Mikolov & Bengio 2013, on the norm of ∂ℓ/∂sₜ through time
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

KEYS = itertools.count(1)
_RECORDERS: weakref.WeakValueDictionary[int, Recorder] = weakref.WeakValueDictionary()


class Recorder:
    """What is given the norms; known to operators by its number."""

    def __init__(self, fn: Callable[[Tensor], Any]) -> None:
        self.fn, self.key = fn, next(KEYS)
        _RECORDERS[self.key] = self


class unrecorded:
    """Inside, nobody is asking: forward mode runs backward too, at cotangents that are not the loss's."""

    def __enter__(self) -> None:
        self.before, _here.unrecorded = _here.unrecorded, True

    def __exit__(self, *_: object) -> None:
        _here.unrecorded = self.before


class _Here(threading.local):
    unrecorded = False


_here = _Here()


def key_of(record: Recorder | int) -> int:
    """The number of a recorder, which rules take as it is so that a graph holds it, or as its number."""
    if _here.unrecorded:
        return 0
    return record.key if isinstance(record, Recorder) else record


def deliver(key: int, norms: Tensor) -> None:
    """Hand something to a recorder, unless it is gone."""
    recorder = _RECORDERS.get(key)
    if recorder is not None:
        recorder.fn(norms)


# --- inside an operator -----------------------------------------------------------------------------------------------------


def squares(there: Tensor | None, *sent: Tensor) -> Tensor:
    """The sum of squares of what each row sends back at each step: *V T B · each -> *V T B, of float64, which holds the
    squares of all of float32. there: *V T B 1, whether the row takes the step."""
    each = [torch.linalg.vector_norm(s, dim=-1, dtype=torch.float64).square() for s in sent]
    total = each[0] if len(each) == 1 else each[0] + each[1]
    return total if there is None else torch.where(there.squeeze(-1), total, 0)


def recorded(run: Callable[..., Any], squares_of: Callable[..., Tensor]) -> Callable[..., Any]:
    """`run`, a loop back through time, that hands over the squares of what its steps send back, T by V·B.

    Args:
        run: `run(*args, record) -> da, ...`.
        squares_of: `squares_of(da, *args)`: *V T B.
    """

    def and_record(*args: Any) -> Any:
        out, record = run(*args), args[-1]
        if record:
            deliver(record, squares_of(out[0], *args[:-1]).movedim(-2, 0).flatten(1))
        return out

    return and_record


# --- around the ops -----------------------------------------------------------------------------------------------------------


def recorders(op: str, grad_norms: Any, n: int) -> Sequence[Recorder | int]:
    """One for each of n layers and directions, from the public argument.

    Raises:
        TypeError: it is no function, or is one of yours inside torch.compile.
    """
    if grad_norms is None or not torch.is_grad_enabled():
        return [0] * n
    if isinstance(grad_norms, Kept):
        return grad_norms.keys
    if not callable(grad_norms):
        raise TypeError(f"{op}: grad_norms={grad_norms!r} must be a function of (k, norms), or None")
    if torch.compiler.is_compiling():
        raise TypeError(f"{op}: a graph calls no function of yours: use the module, and its keep_grad_norms()")
    return [Recorder(partial(_norms, partial(grad_norms, k))) for k in range(n)]


def _norms(fn: Callable[[Tensor], Any], squares: Tensor) -> None:
    fn(squares.sum(-1).sqrt())


class Kept:
    """The norms of the last backward of a module of n layers and directions. A copy of it has none yet."""

    def __init__(self, n: int) -> None:
        self._recorders = [Recorder(partial(_norms, partial(self._keep, k))) for k in range(n)]
        self.keys = [r.key for r in self._recorders]
        self._rows: dict[int, Tensor] = {}

    def _keep(self, k: int, norms: Tensor) -> None:
        if k in self._rows:  # another backward
            self._rows = {}
        self._rows[k] = norms

    def norms(self) -> Tensor | None:
        if not self._rows:
            return None
        none = torch.full_like(next(iter(self._rows.values())), torch.nan)
        return torch.stack([self._rows.get(k, none) for k in range(len(self.keys))])

    def __reduce__(self) -> Any:
        return Kept, (len(self.keys),)


class KeepsGradNorms:
    """For a module of layers and directions through time: `keep_grad_norms()`, and then `grad_norms`."""

    _kept: Kept | None = None

    def keep_grad_norms(self, keep: bool = True) -> None:
        """Keep the norms of gradients through time, from the next forward on, or keep them no longer.

        They cost one product over all steps, and memory for a few tensors as large as the output.
        """
        n = self.num_layers * (1 + self.bidirectional)  # type: ignore[attr-defined]
        self._kept = Kept(n) if keep else None

    @property
    def grad_norms(self) -> Tensor | None:
        """(L·D, T), float64, of the last backward: see `grad_norms` of the function; None before the first.

        NaN for a layer or direction that it did not go through.
        """
        return None if self._kept is None else self._kept.norms()
