"""What a recurrent layer keeps for its backward, and what it runs again: √T segments, and the best plan within a budget.

A plan cuts T steps into pieces. Of a piece that is kept, all that backward wants (gates and states) is kept; of one that is
not, the state at its end alone, and backward runs it again when it comes to it, by a plan of its own.

Maths     a bytes a state, b bytes a kept step, both with the whole batch
          segments  T/K states and, while one is run again, K steps: a T/K + b K bytes, least at K* = √(a T / b). An LSTM has
                    a : b = 2H : 6H, K* = √(T/3); a GRU H : 5H, √(T/5); an RNN H : H, √T. T steps are run again
          budget    C(t, m) = steps run, the first time included, to go forward and back over t steps with m bytes: the least of
                    t                                  if b t <= m: all are kept
                    j + C(t-j, m-a) + C(j, m)          run j, store the state, do the rest, free it all, do the j again
                    j + C(t-j, m-a-bj)                 run j and keep them, do the rest; the j need no second run
                    and m bounds the states and kept steps at every moment, forward and backward
Source    Chen et al., arXiv 1604.06174 (√n); Gruslys et al., arXiv 1606.03401 (hidden and internal states, section 3); the
          first of the two recursions alone is Griewank & Walther's revolve, 2000
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

WORK = 3e7  # entries that the dynamic programme may look at; above it steps are planned in blocks
CELLS = {"lstm": (4, 2), "gru": (4, 1), "rnn": (0, 1)}  # blocks of H that a step's gates take; states


@dataclass(frozen=True)
class Piece:
    """So many steps, kept if `again` is None, else run again by that plan."""

    steps: int
    again: tuple[Piece, ...] | None = None


Pieces = tuple[Piece, ...]


@dataclass(frozen=True)
class Plan:
    """What one layer keeps in one direction, besides its input, weights and initial state.

    Attributes:
        pieces: the sequence in the order it is run; empty where nothing is run again a step at a time.
        saved: bytes between forward and backward, with the batch.
        peak: the most bytes of states and kept steps at any moment of backward.
        recomputed: steps that backward runs again, one after the other.
    """

    pieces: Pieces
    saved: int
    peak: int
    recomputed: int


def sizes_of(cell: str, B: int, H: int, P: int, itemsize: int) -> tuple[int, int]:
    """a and b: the bytes of a state and of a kept step."""
    gates, states = CELLS[cell]
    a = B * itemsize * (P + (states - 1) * H)
    return a, a + B * itemsize * gates * H


def bptt_plan(
    cell: str,
    T: int,
    B: int,
    H: int,
    save: str | int = "segments",
    *,
    dtype: torch.dtype = torch.float32,
    proj_size: int = 0,
) -> Plan:
    """What `save` keeps of one layer in one direction, and what it runs again.

    Args:
        cell: "lstm", "gru" or "rnn".
        T, B, H: steps, batch and hidden size.
        save: as in the op: "gates", "outputs", "sparse", "segments" or a number of bytes.
        dtype: of the tensors.
        proj_size: of an LSTM.

    Returns:
        The plan.

    Raises:
        ValueError: the cell or save is not known, or no plan fits the bytes.
    """
    if cell not in CELLS:
        raise ValueError(f"bptt_plan: cell={cell!r} is not known; choose {', '.join(map(repr, CELLS))}")
    check_saving("bptt_plan", save)
    P = proj_size or H
    a, b = sizes_of(cell, B, H, P, dtype.itemsize)
    if save in ("gates", "outputs"):
        saved = T * (b if save == "gates" else a)
        return Plan((), saved, T * b, 0)
    if save == "sparse":
        few = (-(-T // every(T)) - 1) * B * H * dtype.itemsize if cell == "lstm" else 0
        return Plan((), T * B * P * dtype.itemsize + few, T * b, 0)
    pieces = pieces_of("bptt_plan", T, 0 if save == "segments" else int(save), a, b)
    peak, run = cost(pieces, a, b, True)
    return Plan(pieces, sum(a if p.again is not None else b * p.steps for p in without_end(pieces)), peak, run - T)


def check_saving(op: str, save: Any) -> None:
    """Raise unless save is a known mode or a number of bytes."""
    if isinstance(save, str) and save in ("gates", "outputs", "sparse", "segments"):
        return
    if isinstance(save, str) or type(save) is not int:
        raise ValueError(
            f"{op}: save={save!r} is not known; choose 'gates', 'outputs', 'sparse', 'segments' or a number of bytes"
        )
    if save <= 0:
        raise ValueError(f"{op}: save={save} bytes; a budget is positive")


def every(T: int) -> int:
    """How many steps lie between two kept cells of save="sparse": √T."""
    return math.isqrt(max(T - 1, 0)) + 1


def without_end(pieces: Pieces) -> Pieces:
    """The pieces something is kept of: a last one that is run again leaves nothing, as nothing starts from its end."""
    return pieces[:-1] if pieces and pieces[-1].again is not None else pieces


@lru_cache(maxsize=256)
def pieces_of(op: str, T: int, budget: int, a: int, b: int) -> Pieces:
    """The pieces of √T segments (budget 0) or of the best plan within a budget.

    Raises:
        ValueError: nothing fits the budget.
    """
    if not budget:
        K = max(1, min(T, round(math.sqrt(a * T / b)))) if b else T
        return tuple(Piece(n, (Piece(n),)) for n in [K] * (T // K) + [T % K] * (T % K > 0))
    if b * T <= budget:
        return (Piece(T),)
    least = min(b * T, a + a * -(-b // a))
    if budget < least:
        raise ValueError(
            f"{op}: save={budget} bytes do not suffice for {T} steps: a state takes {a} bytes, a step with its gates {b}; "
            f"the least is {least}"
        )
    m = budget // a
    q = 1
    while (T / q) ** 2 * m > WORK and a + a * -(-b * 2 * q // a) <= budget:
        q *= 2
    return _merged(_best(-(-T // q), m, -(-b * q // a)), q, T)


def _best(n: int, m: int, r: int) -> Pieces:
    """The best pieces of n blocks with m units, where a state takes one and a kept block r. Lengths are in blocks."""
    C = torch.full((n + 1, m + 1), math.inf)
    choice = torch.zeros(n + 1, m + 1, dtype=torch.int64)  # j: store the state after j blocks; -j: keep j blocks; 0: keep all
    units = torch.arange(m + 1)
    C[0] = 0
    for t in range(1, n + 1):
        j = torch.arange(1, t).unsqueeze(-1)
        rest = C[1:t].flip(0)  # C(t-j, ·)
        store = torch.full((t - 1, m + 1), math.inf)
        store[:, 1:] = j + rest[:, :-1] + C[1:t, 1:]
        left = units - 1 - r * j
        keep = torch.where(left >= 0, j + rest.gather(1, left.clamp(min=0)), math.inf) if t > 1 else store
        both = torch.cat([store, keep])
        if t > 1:
            least, at = both.min(0)
            C[t], choice[t] = least, torch.where(at < t - 1, at + 1, -(at - t + 2))
        fits = units >= r * t
        C[t, fits], choice[t, fits] = float(t), 0

    def read(t: int, m: int) -> Pieces:
        pieces: list[Piece] = []
        while True:
            j = int(choice[t, m])
            if j == 0:
                return (*pieces, Piece(t))
            if j > 0:
                pieces.append(Piece(j, read(j, m)))
                t, m = t - j, m - 1
            else:
                pieces.append(Piece(-j))
                t, m = t + j, m - 1 + r * j

    return read(n, m)


def _merged(pieces: Pieces, q: int, T: int) -> Pieces:
    """Pieces in blocks of q steps as pieces in steps; the first block is the shorter one."""
    if q == 1:
        return pieces
    out, short = [], -T % q
    for p in pieces:
        n = p.steps * q - short
        out.append(Piece(n, None if p.again is None else _merged(p.again, q, n)))
        short = 0
    return tuple(out)


def cost(pieces: Pieces, a: int, b: int, first: bool = False) -> tuple[int, int]:
    """The most bytes held while a plan is carried out, and the steps it runs, counted by going through it.

    Args:
        pieces: the plan.
        a, b: the bytes of a state and of a kept step.
        first: it is the forward pass, which has to run the last piece in any case.
    """
    held = [a if p.again is not None else b * p.steps + a for p in pieces]
    held[-1] = 0 if pieces[-1].again is not None else b * pieces[-1].steps
    steps = sum(p.steps for p in pieces[:-1]) + (pieces[-1].steps if first or pieces[-1].again is None else 0)
    peak, total = sum(held), steps
    for k in range(len(pieces) - 1, -1, -1):
        again = pieces[k].again
        if again is not None:
            inner, run = cost(again, a, b)
            peak, total = max(peak, sum(held[:k]) + inner), total + run
    return peak, total
