"""Backpropagation through time with less memory or a shorter reach: what lstm, gru and rnn share of it.

The ops' default is their own two rules. Everything else (`save="sparse"`, "segments", a budget, any truncation) is one pair of
rules per cell, made here: forward keeps what the plan says, backward is one operator, so that graphs hold no loop. The operator
is stated twice. `plainly` is its meaning: from the inputs alone it runs the plain loop, with `slack` wherever a path is cut, and
goes back; its derivatives are those of the op's backward. `quickly` computes the same from what was kept.

Letters   see `recurrent`; inputs x h0 c0 wi wh b bh wr lengths s, of which a cell may have no c0, bh or wr; s the seed of ARTBP;
          outputs y and the last cell cn; H, C, G what is kept: states, cells, gates, in the order in which they were run
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bptoolkit.function import Rule
from bptoolkit.op import Op
from bptoolkit.opaque import Opaque
from bptoolkit.ops.bptt import factors, seeds_of, slack, truncation, windows
from bptoolkit.ops.bptt_plan import Pieces, check_save, every, pieces_of, sizes_of, without_end
from bptoolkit.ops.recurrent import before, last, within

INPUTS = "x h0 c0 wi wh b bh wr lengths s"
PARTS = 8  # of the inputs, those with a gradient


class Core(NamedTuple):
    """A cell: its loops, and its products over all steps. Where it has no c or G they are None."""

    name: str
    kind: str  # "lstm", "gru" or "rnn"
    loop: Callable[..., Any]  # (pre, h0, c0, wh, bh, wr, lengths, xi, reverse, cut) -> y, c, G, with slack
    fast: Callable[..., Any]  # (pre, h0, c0, wh, bh, wr, lengths, reverse, keep) -> y, c, G, in place
    node: Callable[..., Any]  # the same, as a node of a graph
    back: Callable[..., Any]  # (fast, dy, dc, G, y, c, h0, c0, wh, wr, lengths, xi, reverse, cut) -> da, dh0, dc0
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


def _forward_plan(core, x, h0, c0, wi, wh, b, bh, wr, lengths, reverse, memory):
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


def _added(a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else a + b


def _go_back(job: Job, need: Any, fast: bool, lo: int, hi: int, h: Any, c: Any, steps: Any, dy: Any, dh: Any, dc: Any) -> Any:
    """Over steps lo … hi - 1 whose states are known: the gradients of x, h, c, and of the weights."""
    core, (wi, wh, _, _, wr) = job.core, job.weights
    (place, n), (y, cs, g) = job.at(lo, hi), steps
    x, dy, xi = within(job.x[place], n), within(dy[place], n), None if job.xi is None else job.xi[place]
    dy = dy if dh is None else dy + at_last(dh, hi - lo, n, job.reverse)
    dcs = None if dc is None else at_last(dc, hi - lo, n, job.reverse)
    da, dh0, dc0 = core.back(fast, dy, dcs, g, y, cs, h, c, wh, wr, n, xi, job.reverse, job.cut)
    hp = before(h, y, n, job.reverse)
    hp = hp if fast else slack(hp, xi, job.cut)
    dx, *dw = core.products(need, dy, da, x, hp, cs, g, wi, wh, wr, xi, job.reverse, job.cut)
    return dx, of_empty(dh0, dh, n), of_empty(dc0, dc, n), dw


def _ahead(job: Job, pieces: Pieces, lo: int, h: Any, c: Any) -> list[Kept]:
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


def _behind(
    job: Job, pieces: Pieces, lo: int, kept: list[Kept], dy: Any, dh: Any, dc: Any, need: Any, dx: Any, dw: list
) -> Any:
    """Go back over a plan that has been run, freeing piece by piece: the gradients of its first states."""
    hi = lo + sum(p.steps for p in pieces)
    for p in reversed(pieces):
        h, c, steps = kept.pop()
        lo = hi - p.steps
        if p.again is None:
            part, dh, dc, more = _go_back(job, need, True, lo, hi, h, c, steps, dy, dh, dc)
            if dx is not None:
                dx[job.at(lo, hi)[0]] = part
            dw[:] = map(_added, dw, more)
        else:
            dh, dc = _behind(job, p.again, lo, _ahead(job, p.again, lo, h, c), dy, dh, dc, need, dx, dw)
        del h, c, steps
        hi = lo
    return dh, dc


def _kept_by_forward(job: Job, pieces: Pieces, h: Any, c: Any, H: Tensor, C: Tensor, G: Tensor) -> list[Kept]:
    """What forward kept, piece by piece."""
    out, lo, row, gate = [], 0, 0, 0
    for k, p in enumerate(pieces):
        start, hi = (h, c), lo + p.steps
        if p.again is None:
            at = slice(row, row + p.steps)
            y, cs, g = H[at], None if c is None else C[at], G[gate : gate + p.steps] if G.numel() else None
            row, gate, steps = at.stop, gate + p.steps, (y, cs, g)
            h, c = job.end(lo, hi, h, c, y, cs)
        else:
            steps = None
            if k < len(pieces) - 1:
                h, c, row = H[row], None if c is None else C[row], row + 1
        out.append(Kept(*start, steps))
        lo = hi
    return out


def _through_windows(job: Job, need: Any, fast: bool, k1: int, k2: int, h0: Any, c0: Any, steps: Any, dy: Any, dcn: Any) -> Any:
    """The windows of (k1, k2), all at once. `steps` are the states and gates of the whole sequence; G may be missing."""
    core, (wi, wh, b, bh, wr), (T, B, _) = job.core, job.weights, job.x.shape
    w, (y, c, G) = windows(T, B, k1, k2, job.lengths, job.reverse, job.x.device), steps
    x, h = w.take(job.x), w.starts(h0, y)
    s = None if c0 is None else w.starts(c0, c)
    dyw, dc = w.owned_only(w.take(dy)), None if dcn is None else w.at_last(dcn)
    if fast:
        y, c = w.take(y), None if c is None else w.take(c)
        hp = before(h, y, w.lengths, False)
        G = w.take(G) if G is not None else core.gates and within(core.gates(x, hp, wi, wh, b, bh), w.lengths)
    else:
        y, c, G = core.loop(F.linear(x, wi, b), h, s, wh, bh, wr, w.lengths, None, False, False)
        hp = before(h, y, w.lengths, False)
    da, dh, ds = core.back(fast, dyw, dc, G, y, c, h, s, wh, wr, w.lengths, None, False, False)
    dx, *dw = core.products(need, dyw, da, x, hp, c, G, wi, wh, wr, None, False, False)
    dx = None if dx is None else w.put(dx)
    return dx, w.of_start(dh), None if ds is None else of_empty(w.of_start(ds), dcn, job.lengths), dw


def backward_operator(core: Core) -> Opaque:
    """The backward of a cell, as one operator."""

    def plainly(
        dy: Tensor | None,
        dcn: Tensor | None,
        x: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        wi: Tensor,
        wh: Tensor,
        b: Tensor | None,
        bh: Tensor | None,
        wr: Tensor | None,
        lengths: Tensor | None,
        s: Tensor | None,
        y: Tensor | None,
        H: Tensor,
        C: Tensor,
        G: Tensor,
        need: list[bool],
        reverse: bool,
        memory: int,
        k1: int,
        k2: int,
        p: float,
        cut: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        T, B, _ = x.shape
        xi = factors(s, p, T, B, lengths, reverse, x.dtype)
        job = Job(core, within(x, lengths), (wi, wh, b, bh, wr), lengths, reverse, xi, cut)
        dy = _or_zeros(dy, x, h0)
        pre = F.linear(job.x, wi, b)
        if k1:
            fixed = [None if t is None else t.detach() for t in (pre, h0, c0, wh, bh, wr)]
            steps = core.loop(*fixed, lengths, None, reverse, False)
            found = _through_windows(job, _need(need), False, k1, k2, h0, c0, steps, dy, dcn)
        else:
            steps = core.loop(pre, h0, c0, wh, bh, wr, lengths, xi, reverse, cut)
            found = _go_back(job, _need(need), False, 0, T, h0, c0, steps, dy, None, dcn)
        return _in_order(x, need, found)

    def quickly(dy, dcn, x, h0, c0, wi, wh, b, bh, wr, lengths, s, y, H, C, G, need, reverse, memory, k1, k2, p, cut):
        T, B, _ = x.shape
        wants = _need(need)
        xi = factors(s, p, T, B, lengths, reverse, x.dtype)
        job = Job(core, within(x, lengths), (wi, wh, b, bh, wr), lengths, reverse, xi, cut)
        dy = _or_zeros(dy, x, h0)
        steps: Any
        if y is not None:
            G = G if G.numel() else None
            if G is None and core.gates is not None and not (k1 and C.shape[0] == T):
                hp = before(h0, y, lengths, reverse)
                G = within(core.gates(job.x, hp, wi, wh, b, bh), lengths)
            c = None if c0 is None else C if C.shape[0] == T else core.cells(G, c0, C, lengths, reverse, every(T))  # type: ignore[misc]
            steps = (y, c, G)
        elif k1:
            steps = job.run(0, T, h0, c0, True)
        else:
            pieces = plan_of(core, x, h0, c0, memory)
            kept = _kept_by_forward(job, pieces, h0, c0, H, C, G)
            dx, dw = torch.empty_like(x) if wants.x else None, [None] * 5
            dh, dc = _behind(job, pieces, 0, kept, dy, None, dcn, wants, dx, dw)
            return _in_order(x, need, (dx, dh, dc, dw))
        if k1:
            return _in_order(x, need, _through_windows(job, wants, True, k1, k2, h0, c0, steps, dy, dcn))
        return _in_order(x, need, _go_back(job, wants, True, 0, T, h0, c0, steps, dy, None, dcn))

    def fake(dy, dcn, x, h0, c0, wi, wh, b, bh, wr, lengths, s, y, H, C, G, need, reverse, memory, k1, k2, p, cut):
        return tuple(x.new_empty(t.shape if n else (0,)) for t, n in zip((x, h0, c0, wi, wh, b, bh, wr), need))

    return Opaque(f"{core.name}_again", plainly, fake, fast=quickly)


class _Need(NamedTuple):
    x: bool
    h0: bool
    c0: bool
    wi: bool
    wh: bool
    b: bool
    bh: bool
    wr: bool


def _need(need: list[bool]) -> _Need:
    return _Need(*need)


def _or_zeros(dy: Tensor | None, x: Tensor, h0: Tensor) -> Tensor:
    return x.new_zeros(*x.shape[:2], h0.shape[-1]) if dy is None else dy


def _in_order(x: Tensor, need: list[bool], found: Any) -> tuple[Tensor, ...]:
    """The gradients in the order of the inputs, contiguous; empty where they are not wanted."""
    dx, dh, dc, (dwi, dwh, db, dbh, dwr) = found
    grads = (dx, dh, dc, dwi, dwh, db, dbh, dwr)
    return tuple(g.contiguous() if n else x.new_empty(0) for g, n in zip(grads, need))


# --- the rules -------------------------------------------------------------------------------------------------------------


class Rules(NamedTuple):
    """The two rules of a cell: y is kept, or it is not."""

    core: Core
    kept_y: Rule
    planned: Rule


def rules(core: Core) -> Rules:
    """Make the operator and the rules of a cell."""
    again = backward_operator(core)

    def forward_y(x, h0, c0, wi, wh, b, bh, wr, lengths, s, reverse, save, k1, k2, p, cut):
        T, pre = x.shape[0], F.linear(within(x, lengths), wi, b)
        y, c, G = core.node(pre, h0, c0, wh, bh, wr, lengths, reverse, save == "gates")
        G = x.new_empty(0) if G is None or save != "gates" else G
        if c is None:
            return y, x.new_empty(0), x.new_empty(0), G
        cn = last(c0, c, lengths, reverse)
        if save == "sparse":
            ends = range(every(T) - 1, T - 1, every(T))
            at = torch.tensor([T - 1 - t if reverse else t for t in ends], dtype=torch.int64, device=x.device)
            some = c.index_select(0, at)
            if reverse and lengths is not None:  # a row that has not begun is still at its first state
                some = torch.where((at.unsqueeze(-1) < lengths).unsqueeze(-1), some, c0)
            c = some
        return y, cn, c, G

    def forward_plan(x, h0, c0, wi, wh, b, bh, wr, lengths, s, reverse, memory, k1, k2, p, cut):
        y, cn, H, C, G = _forward_plan(core, x, h0, c0, wi, wh, b, bh, wr, lengths, reverse, memory)
        return y, x.new_empty(0) if cn is None else cn, H, C, G

    def grads(dy, dcn, inputs, y, H, C, G, reverse, memory, k1, k2, p, cut, need):
        need = list(need[:PARTS])
        dcn = None if inputs[2] is None else dcn
        out = again(dy, dcn, *inputs, y, H, C, G, need, reverse, memory, k1, k2, p, cut)
        return *(g if n else None for g, n in zip(out, need)), None, None

    def backward_y(dy, dcn, x, h0, c0, wi, wh, b, bh, wr, lengths, s, y, C, G, reverse, k1, k2, p, cut, need):
        inputs = (x, h0, c0, wi, wh, b, bh, wr, lengths, s)
        return grads(dy, dcn, inputs, y.detach(), G.new_empty(0), C, G, reverse, -1, k1, k2, p, cut, need)

    def backward_plan(dy, dcn, x, h0, c0, wi, wh, b, bh, wr, lengths, s, H, C, G, reverse, memory, k1, k2, p, cut, need):
        inputs = (x, h0, c0, wi, wh, b, bh, wr, lengths, s)
        return grads(dy, dcn, inputs, None, H, C, G, reverse, memory, k1, k2, p, cut, need)

    cn = "" if core.kind == "lstm" else "cn "
    return Rules(
        core,
        Rule(f"{core.name}_y", forward_y, backward_y, inputs=INPUTS, outputs="y cn C G", constants=f"{cn}C G"),
        Rule(f"{core.name}_plan", forward_plan, backward_plan, inputs=INPUTS, outputs="y cn H C G", constants=f"{cn}H C G"),
    )


class Way:
    """How a call saves and truncates, parsed once for all its layers and directions.

    Args:
        op: the op.
        made: the rules of its cell.
        save, truncate, backend: as in the public function.
        like: a tensor on the device of the call.
        n: how many layers and directions there are.
    """

    def __init__(self, op: Op, made: Rules, save: Any, truncate: Any, backend: str, like: Tensor, n: int) -> None:
        check_save(op.name, save)
        self.op, self.made, self.save, self.backend = op, made, save, backend
        self.how = truncation(op.name, truncate)
        own = truncate is None and (save in ("gates", "outputs") or (save == "sparse" and made.core.cells is None))
        self.own = own or not torch.is_grad_enabled()  # the op's own rules do
        self.seeds = [] if self.own else seeds_of(truncate, like, n)

    def run(self, reverse: bool, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        """One layer in one direction, of x h0 c0 wi wh b bh wr lengths: y and the last cell."""
        planned = not isinstance(self.save, str) or self.save == "segments"
        kept = (0 if self.save == "segments" else self.save) if planned else self.save
        rule = self.made.planned if planned else self.made.kept_y
        args = (*inputs, self.seeds.pop(0), reverse, kept, *self.how)
        y, cn, *_ = rule(*args, backend=self.op.pick(rule, self.backend, *args))
        return y, cn
