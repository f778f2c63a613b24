"""Forward and backward of a recurrent layer piece by piece, as a plan of `bptt_plan` says.

Letters   see `recurrent` and `bptt_run`
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bptoolkit.ops.bptt import slack
from bptoolkit.ops.bptt_plan import Pieces, pieces_of, sizes_of, without_end
from bptoolkit.ops.recurrent import before, last, within


class Core(NamedTuple):
    """A cell: its loops, and its products over all steps. Where it has no c or G they are None."""

    name: str
    kind: str  # "lstm", "gru" or "rnn"
    loop: Callable[..., Any]  # (pre, h0, c0, wh, bh, wr, lengths, xi, reverse, cut) -> y, c, G, with slack
    fast: Callable[..., Any]  # (pre, h0, c0, wh, bh, wr, lengths, reverse, keep) -> y, c, G, in place
    node: Callable[..., Any]  # the same, as a node of a graph
    back: Callable[..., Any]  # (fast, dy, dc, G, y, c, h0, c0, wh, wr, lengths, xi, reverse, cut) -> da, dh0, dc0
    squares: Callable[..., Tensor]  # (da, dy, dc, G, y, c, h0, c0, wh, wr, lengths, xi, reverse, cut): see `grad_norms.squares`
    products: Callable[..., Any]  # (need, dy, da, x, hp, c, G, wi, wh, wr, xi, reverse, cut) -> dx, dwi, dwh, db, dbh, dwr
    gates: Callable[..., Any] | None = None  # (x, hp, wi, wh, b, bh) -> G
    cells: Callable[..., Any] | None = None  # (G, c0, C, lengths, reverse, K) -> c, from every K-th


class Kept(NamedTuple):
    """One piece of a plan after it has been run: where it started, and its steps if they were kept."""

    h: Tensor
    c: Tensor | None
    steps: tuple[Any, Any, Any] | None  # y, c, G


class Job(NamedTuple):
    """The backward of one layer in one direction."""

    core: Core
    x: Tensor
    weights: tuple[Any, ...]  # wi wh b bh wr
    lengths: Tensor | None
    reverse: bool
    xi: Tensor | None
    cut: bool
    squares: Tensor | None = None  # T B: of what each row sends back at each step, if somebody asks for them

    def at(self, lo: int, hi: int) -> tuple[slice, Tensor | None]:
        """The place of steps lo … hi - 1 of the recurrence, and the rows' lengths within it."""
        T = self.x.shape[0]
        place = slice(T - hi, T - lo) if self.reverse else slice(lo, hi)
        return place, None if self.lengths is None else (self.lengths - place.start).clamp(0, hi - lo)

    def run(self, lo: int, hi: int, h: Tensor, c: Tensor | None, keep: bool, node: bool = False) -> tuple[Any, Any, Any]:
        """Forward over steps lo … hi - 1: y, c, G."""
        wi, wh, b, bh, wr = self.weights
        place, n = self.at(lo, hi)
        pre = F.linear(within(self.x[place], n), wi, b)
        return (self.core.node if node else self.core.fast)(pre, h, c, wh, bh, wr, n, self.reverse, keep)

    def end(self, lo: int, hi: int, h: Tensor, c: Tensor | None, y: Tensor, cs: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The states after them."""
        n = self.at(lo, hi)[1]
        return last(h, y, n, self.reverse), None if c is None else last(c, cs, n, self.reverse)  # type: ignore[arg-type]


# --- forward ---------------------------------------------------------------------------------------------------------------


def _rows(kept: list[Any], like: Tensor | None, x: Tensor) -> Tensor:
    """What is kept, along time: n B ·."""
    if like is None:
        return x.new_empty(0)
    return torch.cat(kept) if kept else like.new_empty(0, *like.shape[1:])


def run_plan(core, x, h0, c0, wi, wh, b, bh, wr, lengths, reverse, memory):
    """Forward: y, the last cell, and what is kept along time, H, C, G."""
    job = Job(core, x, (wi, wh, b, bh, wr), lengths, reverse, None, False)
    h, c, lo = h0, c0, 0
    ys, H, C, G = [], [], [], []
    pieces = plan_of(core, x, h0, c0, memory)
    stored = len(without_end(pieces))
    for k, p in enumerate(pieces):
        hi, keep = lo + p.steps, p.again is None
        y, cs, g = job.run(lo, hi, h, c, keep, node=True)
        h, c = job.end(lo, hi, h, c, y, cs)
        ys.append(y)
        if keep or k < stored:
            H.append(y if keep else h.unsqueeze(0))
            C.append(cs if keep or c is None else c.unsqueeze(0))
            G += [g] if keep else []
        lo = hi
    y = torch.cat(ys[::-1] if reverse else ys)
    return y, c, _rows(H, h0.unsqueeze(0), x), _rows(C, None if c0 is None else c0.unsqueeze(0), x), _rows(G, g, x)


def plan_of(core: Core, x: Tensor, h0: Tensor, c0: Tensor | None, memory: int) -> Pieces:
    """The pieces of √T segments, or within a budget."""
    H = h0.shape[-1] if c0 is None else c0.shape[-1]
    a, b = sizes_of(core.kind, int(x.shape[1]), int(H), int(h0.shape[-1]), x.element_size())
    return pieces_of(core.kind, int(x.shape[0]), memory, a, b)


# --- backward --------------------------------------------------------------------------------------------------------------


def at_last(d: Tensor, T: int, lengths: Tensor | None, reverse: bool) -> Tensor:
    """The cotangent of a last state at the step that made it, zeros elsewhere: B · -> T B ·."""
    steps = torch.arange(T, device=d.device).view(T, 1, 1)
    if lengths is None:
        return torch.where(steps == (0 if reverse else T - 1), d, 0)
    n = lengths.view(1, -1, 1)
    return torch.where((steps == (0 if reverse else n - 1)) & (n > 0), d, 0)


def of_empty(d: Tensor | None, dn: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    """The gradient of a first state, and what comes straight from the last where a row has no step between."""
    if d is None or dn is None or lengths is None:
        return d
    return d + torch.where((lengths == 0).unsqueeze(-1), dn, 0)


def added(a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else a + b


def go_back(job: Job, need: Any, fast: bool, lo: int, hi: int, h: Any, c: Any, steps: Any, dy: Any, dh: Any, dc: Any) -> Any:
    """Over steps lo … hi - 1 whose states are known: the gradients of x, h, c, and of the weights."""
    core, (wi, wh, _, _, wr) = job.core, job.weights
    (place, n), (y, cs, g) = job.at(lo, hi), steps
    x, dy, xi = within(job.x[place], n), within(dy[place], n), None if job.xi is None else job.xi[place]
    dy = dy if dh is None else dy + at_last(dh, hi - lo, n, job.reverse)
    dcs = None if dc is None else at_last(dc, hi - lo, n, job.reverse)
    of_steps = (dy, dcs, g, y, cs, h, c, wh, wr, n, xi, job.reverse, job.cut)
    da, dh0, dc0 = core.back(fast, *of_steps)
    if job.squares is not None:
        job.squares[place] = core.squares(da, *of_steps)
    hp = before(h, y, n, job.reverse)
    hp = hp if fast else slack(hp, xi, job.cut)
    dx, *dw = core.products(need, dy, da, x, hp, cs, g, wi, wh, wr, xi, job.reverse, job.cut)
    return dx, of_empty(dh0, dh, n), of_empty(dc0, dc, n), dw


def ahead(job: Job, pieces: Pieces, lo: int, h: Any, c: Any) -> list[Kept]:
    """Run a plan again, but for a last piece of which nothing is kept."""
    out = []
    for k, p in enumerate(pieces):
        start, hi, keep = (h, c), lo + p.steps, p.again is None
        steps = None
        if keep or k < len(pieces) - 1:
            y, cs, g = job.run(lo, hi, h, c, keep)
            h, c = job.end(lo, hi, h, c, y, cs)
            steps = (y, cs, g) if keep else None
        out.append(Kept(*start, steps))
        lo = hi
    return out


def behind(job: Job, pieces: Pieces, lo: int, kept: list[Kept], dy: Any, dh: Any, dc: Any, need: Any, dx: Any, dw: Any) -> Any:
    """Go back over a plan that has been run, freeing piece by piece: the gradients of its first states."""
    hi = lo + sum(p.steps for p in pieces)
    for p in reversed(pieces):
        h, c, steps = kept.pop()
        lo = hi - p.steps
        if p.again is None:
            part, dh, dc, more = go_back(job, need, True, lo, hi, h, c, steps, dy, dh, dc)
            if dx is not None:
                dx[job.at(lo, hi)[0]] = part
            dw[:] = map(added, dw, more)
        else:
            dh, dc = behind(job, p.again, lo, ahead(job, p.again, lo, h, c), dy, dh, dc, need, dx, dw)
        del h, c, steps
        hi = lo
    return dh, dc


def kept_by_forward(job: Job, pieces: Pieces, h: Any, c: Any, H: Tensor, C: Tensor, G: Tensor) -> list[Kept]:
    """What forward kept, piece by piece."""
    out, lo, row, gate = [], 0, 0, 0
    for k, p in enumerate(pieces):
        start, hi = (h, c), lo + p.steps
        if p.again is None:
            at = slice(row, row + p.steps)
            y, cs, g = H[at], None if c is None else C[at], G[gate : gate + p.steps] if G.dim() > 1 else None
            row, gate, steps = at.stop, gate + p.steps, (y, cs, g)
            h, c = job.end(lo, hi, h, c, y, cs)
        else:
            steps = None
            if k < len(pieces) - 1:
                h, c, row = H[row], None if c is None else C[row], row + 1
        out.append(Kept(*start, steps))
        lo = hi
    return out
