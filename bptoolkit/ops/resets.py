"""Sequences that begin again within a row: the state before a step is zero, as where an episode of an environment ends.

A row is cut into runs, each of which starts at a step with a reset and ends before the next. Runs are rows of their own, of
some length, so that any cell, kernels included, takes them as it takes ragged rows; and they are side by side. They are put
together by length, up to 1, 2, 4, 8 … steps, a call of the cell for each: a long run would pad all short ones, and so less than
half of what a call takes is padding. All calls together take at most four times as many steps, one after the other, as the
longest run has.

Letters   T steps, B rows; R runs; x, y: T B ·
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bptoolkit.grad_norms import Recorder, deliver, key_of

Cell = Callable[[Tensor, list[Tensor], Any, Tensor | None, bool, Any], tuple[Tensor, tuple[Tensor, ...]]]


def check_resets(op: str, resets: Any, x: Tensor, batched: bool, batch_first: bool) -> Tensor:
    """Check the resets against x: T B I; returns them as T B.

    Raises:
        TypeError: they are not bool.
        ValueError: of another shape, or they cannot be read: how long the runs are decides which calls are made.
    """
    if not isinstance(resets, Tensor) or resets.dtype != torch.bool:
        got = resets.dtype if isinstance(resets, Tensor) else type(resets).__name__
        raise TypeError(f"{op}: resets must be a bool tensor, not {got}")
    T, B = x.shape[:2]
    wanted = (T,) if not batched else (B, T) if batch_first else (T, B)
    if tuple(resets.shape) != wanted:
        raise ValueError(f"{op}: resets has shape {tuple(resets.shape)}; it needs {wanted}, a step of a row each")
    if torch.compiler.is_compiling() or type(resets) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(resets):
        raise ValueError(f"{op}: resets must have values that can be read: not inside torch.compile, nor batched by vmap")
    resets = resets.detach().to(x.device)
    return resets.unsqueeze(1) if not batched else resets.mT if batch_first else resets


class Group(NamedTuple):
    """Runs of about one length, n of them, padded to t steps."""

    steps: Tensor  # t·n: where each of their steps is in T·B; one past a run's end is some step
    t: int
    lengths: Tensor  # n
    runs: Tensor  # n: their numbers


class Runs:
    """The runs of a batch of rows.

    Args:
        resets: T B bool.
        lengths: B, or None.
    """

    def __init__(self, resets: Tensor, lengths: Tensor | None) -> None:
        (self.T, self.B), device = resets.shape, resets.device
        ends = torch.full((self.B,), self.T, device=device) if lengths is None else lengths
        steps = torch.arange(self.T, device=device).unsqueeze(1)  # T 1
        begins = resets & (steps < ends)
        self.begins = begins.clone()
        self.fresh = self.begins[0]  # B: the first state of the row is not used
        begins[0] = True
        number = begins.mT.reshape(-1).cumsum(0).view(self.B, self.T).mT - 1  # T B: the run of each step, row after row
        b, t = begins.mT.nonzero().unbind(1)  # R: in this order too
        following = torch.cat([t[1:], t.new_zeros(1)])
        is_last = torch.cat([b[1:] != b[:-1], b.new_ones(1, dtype=torch.bool)])
        sizes = torch.where(is_last, ends[b], following) - t  # R
        self.row, self.first, self.last = b, number[0], number[-1]
        self.is_first, self.is_last = t == 0, is_last
        self.groups: list[Group] = []
        place, taken = torch.zeros(len(b), dtype=torch.int64, device=device), 0
        count = torch.zeros_like(place)
        longest = int(sizes.max()) if len(b) else 0
        low = 0
        while True:
            high = max(1, 2 * low)
            runs = ((sizes <= high) & ((sizes > low) | (low == 0))).nonzero().squeeze(1)
            if len(runs):
                size = min(high, max(longest, 1))
                at = t[runs] + torch.arange(size, device=device).unsqueeze(1)  # t n
                flat = at.clamp(max=self.T - 1) * self.B + b[runs]
                self.groups.append(Group(flat.reshape(-1), size, sizes[runs], runs))
                place[runs] = taken + torch.arange(len(runs), device=device)
                count[runs] = len(runs)
                taken += size * len(runs)
            low = high
            if low >= longest:
                break
        self.order = torch.cat([g.runs for g in self.groups]).argsort() if self.groups else place
        self.where = (place[number] + (steps - t[number]) * count[number]).reshape(-1).clamp(max=max(taken - 1, 0))
        self.there = (steps < ends).unsqueeze(-1)  # T B 1

    def records(self, record: Any, reverse: bool) -> list[Any]:
        """Who is given the norms of each group, and gives them on, in the places they have in T B, when it has all."""
        if not record:
            return [0] * len(self.groups)
        found: dict[int, Tensor] = {}
        begins = torch.cat([self.begins[1:], torch.zeros_like(self.begins[:1])]) if reverse else self.begins

        def take(k: int, squares: Tensor) -> None:
            if k in found:  # of a backward that went through some of them
                found.clear()
            found[k] = squares
            if len(found) == len(self.groups):
                whole = squares.new_zeros(self.T * self.B)
                for j, g in enumerate(self.groups):
                    whole.index_add_(0, g.steps, found[j].reshape(-1))  # zero past a run's end
                found.clear()
                whole = whole.view(self.T, self.B)
                deliver(key_of(record), torch.where(begins, 0, whole))  # what is sent to a reset goes nowhere

        return [Recorder(partial(take, k)) for k in range(len(self.groups))]

    def cell(self, cell: Cell) -> Cell:
        """The cell over whole rows, from one that runs each row from its start to its end."""

        def run(
            x: Tensor, start: list[Tensor], weights: Any, lengths: Tensor | None, reverse: bool, record: Any
        ) -> tuple[Tensor, tuple[Tensor, ...]]:
            # backwards, the state that is given enters at a row's last step, and the state at its first is returned
            inside = self.is_last if reverse else self.is_first & ~self.fresh[self.row]
            flat, ys, ends = x.reshape(self.T * self.B, -1), [], []
            for g, part in zip(self.groups, self.records(record, reverse)):
                rows, given = self.row[g.runs], inside[g.runs].unsqueeze(1)
                states = [torch.where(given, s.index_select(0, rows), 0) for s in start]
                some = flat.index_select(0, g.steps).view(g.t, len(g.runs), -1)
                y, last = cell(some, states, weights, g.lengths, reverse, part)
                ys.append(y.reshape(g.t * len(g.runs), -1))
                ends.append(last)
            y = torch.cat(ys).index_select(0, self.where).view(self.T, self.B, -1)
            y = torch.where(self.there, y, 0)
            returned = self.order[self.first if reverse else self.last]
            finals = tuple(torch.cat(parts).index_select(0, returned) for parts in zip(*ends))
            return y, finals

        return run
