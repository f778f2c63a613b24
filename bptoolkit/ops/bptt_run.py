"""Backpropagation through time with less memory or a shorter reach: what lstm, gru and rnn share of it.

The ops' default is their own two rules. Everything else (`save="sparse"`, "segments", a budget, any truncation) is one pair of
rules per cell, made here: forward keeps what the plan says, backward is one operator, so that graphs hold no loop. The operator
is stated twice. `plainly` is its meaning: from the inputs alone it runs the plain loop, with `slack` wherever a path is cut,
and goes back; its derivatives are those of the op's backward. `quickly` computes the same from what was kept.

Letters   see `recurrent`; inputs x h0 c0 wi wh b bh wr lengths s, of which a cell may have no c0, bh or wr; s ARTBP's seed;
          outputs y and the last cell cn; H, C, G what is kept: states, cells, gates, in the order in which they were run
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bptoolkit.function import Rule
from bptoolkit.grad_norms import Recorder, deliver, key_of
from bptoolkit.op import Op
from bptoolkit.opaque import Opaque
from bptoolkit.ops.bptt import ARTBP, Windows, factors, seeds_of, truncation, windows
from bptoolkit.ops.bptt_pieces import Core, Job, added, behind, go_back, kept_by_forward, of_empty, plan_of, run_plan
from bptoolkit.ops.bptt_plan import check_saving, every
from bptoolkit.ops.bptt_second import in_segments, symmetric
from bptoolkit.ops.recurrent import before, last, within

INPUTS = "x h0 c0 wi wh b bh wr lengths s"
PARTS = 8  # of the inputs, those with a gradient


def through_windows(job: Job, need: Any, fast: bool, w: Windows, h0: Any, c0: Any, steps: Any, dy: Any, dcn: Any) -> Any:
    """Back through windows of (k1, k2), side by side. `steps` are the states and gates of the whole sequence.

    Returns:
        The gradient of x in the windows; those of h0, c0 and the weights.
    """
    core, (wi, wh, b, bh, wr), (y, c, G) = job.core, job.weights, steps
    x, h, s = w.take(job.x), w.starts(h0, y), None if c0 is None else w.starts(c0, c)
    dyw, dc = w.owned_only(w.take(dy)), None if dcn is None else w.at_last(dcn)
    if fast:
        y, c = w.take(y), None if c is None else w.take(c)
        G = w.take(G) if G is not None else core.gates and core.gates(x, before(h, y, w.lengths, False), wi, wh, b, bh)
        G = within(G, w.lengths)
    else:
        y, c, G = core.loop(F.linear(x, wi, b), h, s, wh, bh, wr, w.lengths, None, False, False)
    of_steps = (dyw, dc, G, y, c, h, s, wh, wr, w.lengths, None, False, False)
    da, dh, ds = core.back(fast, *of_steps)
    if job.squares is not None:
        owned = w.owned_only(core.squares(da, *of_steps).unsqueeze(-1))
        job.squares.copy_(w.put(owned, job.squares.unsqueeze(-1)).squeeze(-1))
    hp = before(h, y, w.lengths, False)
    dx, *dw = core.products(need, dyw, da, x, hp, c, G, wi, wh, wr, None, False, False)
    return dx, w.of_start(dh), None if ds is None else w.of_start(ds), dw


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
        record: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        T, B, _ = x.shape
        xi = factors(s, p, T, B, lengths, reverse, x.dtype)
        job = Job(core, within(x, lengths), (wi, wh, b, bh, wr), lengths, reverse, xi, cut)
        dy = _or_zeros(dy, x, h0)
        pre = F.linear(job.x, wi, b)
        if k1:
            fixed = [None if t is None else t.detach() for t in (pre, h0, c0, wh, bh, wr)]
            steps = core.loop(*fixed, lengths, None, reverse, False)
            (w,) = windows(x, k1, k2, lengths, reverse)
            dx, dh, dc, dw = through_windows(job, _need(need), False, w, h0, c0, steps, dy, dcn)
            found = None if dx is None else w.put(dx, torch.zeros_like(x)), dh, of_empty(dc, dcn, lengths), dw
        else:
            steps = core.loop(pre, h0, c0, wh, bh, wr, lengths, xi, reverse, cut)
            found = go_back(job, _need(need), False, 0, T, h0, c0, steps, dy, None, dcn)
        return _in_order(x, need, found)  # type: ignore[return-value]

    def quickly(dy, dcn, x, h0, c0, wi, wh, b, bh, wr, lengths, s, y, H, C, G, need, reverse, memory, k1, k2, p, cut, record):
        T, B, _ = x.shape
        squares = torch.zeros(T, B, dtype=torch.float64, device=x.device) if record else None
        xi = factors(s, p, T, B, lengths, reverse, x.dtype)
        job = Job(core, within(x, lengths), (wi, wh, b, bh, wr), lengths, reverse, xi, cut, squares)
        found = _quickly(job, _or_zeros(dy, x, h0), dcn, h0, c0, y, H, C, G, _need(need), memory, k1, k2)
        if squares is not None:
            deliver(record, squares)
        return _in_order(x, need, found)

    def _quickly(job, dy, dcn, h0, c0, y, H, C, G, wants, memory, k1, k2):
        x, lengths, reverse, (wi, wh, b, bh, _), T = job.x, job.lengths, job.reverse, job.weights, job.x.shape[0]
        steps: Any
        if y is not None:
            G = G if G.dim() > 1 else None
            if G is None and core.gates is not None and not (k1 and C.shape[0] == T):
                hp = before(h0, y, lengths, reverse)
                G = within(core.gates(x, hp, wi, wh, b, bh), lengths)
            c = None if c0 is None else C if C.shape[0] == T else core.cells(G, c0, C, lengths, reverse, every(T))  # type: ignore[misc]
            steps = (y, c, G)
        elif k1:
            steps = job.run(0, T, h0, c0, True)
        else:
            pieces = plan_of(core, x, h0, c0, memory)
            kept = kept_by_forward(job, pieces, h0, c0, H, C, G)
            dx, dw = torch.empty_like(x) if wants.x else None, [None] * 5
            dh, dc = behind(job, pieces, 0, kept, dy, None, dcn, wants, dx, dw)
            return dx, dh, dc, dw
        if k1:
            dx, dh, dc, dw = torch.zeros_like(x) if wants.x else None, None, None, [None] * 5
            group = math.isqrt(-(-T // k1))  # what is copied for the windows is a small part of the whole
            for w in windows(x, k1, k2, lengths, reverse, group):
                part, h, c, more = through_windows(job, wants, True, w, h0, c0, steps, dy, dcn)
                dx = None if dx is None else w.put(part, dx)
                dh, dc, dw = added(dh, h), added(dc, c), list(map(added, dw, more))
            return dx, dh, of_empty(dc, dcn, lengths), dw
        return go_back(job, wants, True, 0, T, h0, c0, steps, dy, None, dcn)

    def fake(dy, dcn, x, h0, c0, wi, wh, b, bh, wr, lengths, s, y, H, C, G, need, reverse, memory, k1, k2, p, cut, record):
        return tuple(x.new_empty(t.shape if n else (0,)) for t, n in zip((x, h0, c0, wi, wh, b, bh, wr), need))

    def second(cotangents, need, *args):
        dy, dcn, x, h0, c0, *weights, lengths, s, _, _, _, _, asked, reverse, _, k1, _, _, cut, _ = args
        v = [c if a else None for c, a in zip(cotangents, asked)]
        if not symmetric(s, k1, cut) or any(need[2 + PARTS :]) or all(t is None for t in v) or not x.shape[0]:
            return NotImplemented
        job = Job(core, within(x, lengths), tuple(weights), lengths, reverse, None, False)
        found = in_segments(core, v, _need(need[2 : 2 + PARTS]), any(need[:2]), job, _or_zeros(dy, x, h0), dcn, h0, c0)
        return [*(g if n else None for g, n in zip(found, need)), *[None] * (len(need) - 2 - PARTS)]

    def push(tangents, *args):
        dy, dcn, s, k1, cut, asked = args[0], args[1], args[11], args[-5], args[-2], args[16]
        ddy, ddcn, *others = tangents[: 2 + PARTS]
        if not symmetric(s, k1, cut):
            return NotImplemented
        out = None
        if ddy is not None or ddcn is not None:
            zero = torch.zeros_like(dcn) if ddcn is None and dcn is not None else ddcn
            out = again(torch.zeros_like(dy) if ddy is None and dy is not None else ddy, zero, *args[2:-1], 0)
        if any(t is not None for t in others):
            need = [False, False, *asked, *(False,) * 6]
            more = again.vjp(others, need, *args[:16], [t is not None for t in others], *args[17:])[2 : 2 + PARTS]
            more = [t if t is not None else args[2].new_empty(0) for t in more]
            out = more if out is None else [a + b for a, b in zip(out, more)]
        return tuple(out)

    again = Opaque(f"{core.name}_again", plainly, fake, fast=quickly, fast_vjp=second, jvp=push)
    return again


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


class Pair(NamedTuple):
    """Forward and backward of a rule."""

    forward: Any
    backward: Any


def both(core: Core) -> tuple[Pair, Pair]:
    """Forward and backward of the two rules of a cell, its y kept or not. Makes the operator."""
    again = backward_operator(core)

    def forward_y(x, h0, c0, wi, wh, b, bh, wr, lengths, s, reverse, save, k1, k2, p, cut, record):
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

    def forward_plan(x, h0, c0, wi, wh, b, bh, wr, lengths, s, reverse, memory, k1, k2, p, cut, record):
        y, cn, H, C, G = run_plan(core, x, h0, c0, wi, wh, b, bh, wr, lengths, reverse, memory)
        return y, x.new_empty(0) if cn is None else cn, H, C, G

    def grads(dy, dcn, inputs, y, H, C, G, reverse, memory, k1, k2, p, cut, record, need):
        need = list(need[:PARTS])
        dcn = None if inputs[2] is None else dcn
        out = again(dy, dcn, *inputs, y, H, C, G, need, reverse, memory, k1, k2, p, cut, key_of(record))
        return *(g if n else None for g, n in zip(out, need)), None, None

    def backward_y(dy, dcn, x, h0, c0, wi, wh, b, bh, wr, lengths, s, y, C, G, reverse, k1, k2, p, cut, record, need):
        inputs = (x, h0, c0, wi, wh, b, bh, wr, lengths, s)
        return grads(dy, dcn, inputs, y.detach(), G.new_empty(0), C, G, reverse, -1, k1, k2, p, cut, record, need)

    def backward_plan(
        dy, dcn, x, h0, c0, wi, wh, b, bh, wr, lengths, s, H, C, G, reverse, memory, k1, k2, p, cut, record, need
    ):
        inputs = (x, h0, c0, wi, wh, b, bh, wr, lengths, s)
        return grads(dy, dcn, inputs, None, H, C, G, reverse, memory, k1, k2, p, cut, record, need)

    return Pair(forward_y, backward_y), Pair(forward_plan, backward_plan)


def rules(core: Core) -> Rules:
    """The rules of a cell; the kernels' are in `triton_kernels.bptt`."""
    cn = "" if core.kind == "lstm" else "cn "
    of_y, of_plan = both(core)

    def kernel_y():
        from bptoolkit.triton_kernels.bptt import KERNELS

        return KERNELS[core.name].kept_y

    def kernel_plan():
        from bptoolkit.triton_kernels.bptt import KERNELS

        return KERNELS[core.name].planned

    return Rules(
        core,
        Rule(f"{core.name}_y", *of_y, inputs=INPUTS, outputs="y cn C G", constants=f"{cn}C G", kernel=kernel_y),
        Rule(f"{core.name}_plan", *of_plan, inputs=INPUTS, outputs="y cn H C G", constants=f"{cn}H C G", kernel=kernel_plan),
    )


class Way:
    """How a call saves and truncates, parsed once for all its layers and directions.

    Args:
        op: the op.
        made: the rules of its cell.
        save, truncate, backend: as in the public function.
        weights, resets: of the call; `sequence` checks them.
        n: how many layers and directions there are.
    """

    def __init__(self, op: Op, made: Rules, save: Any, truncate: Any, backend: str, weights: Any, n: int, resets: Any) -> None:
        check_saving(op.name, save)
        self.op, self.made, self.save, self.backend = op, made, save, backend
        self.how = truncation(op.name, truncate)
        own = truncate is None and (save in ("gates", "outputs") or (save == "sparse" and made.core.cells is None))
        self.own = own or not torch.is_grad_enabled()  # the op's own rules do
        there = isinstance(weights, (list, tuple)) and len(weights) > 0
        drawn = isinstance(truncate, ARTBP) and not self.own
        if drawn and resets is not None:
            raise ValueError(f"{op.name}: resets and truncate={truncate!r} do not go together")
        self.seeds = seeds_of(truncate, weights[0], n) if there and drawn else []

    def run(self, reverse: bool, record: Recorder | int, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        """One layer in one direction, of x h0 c0 wi wh b bh wr lengths: y and the last cell."""
        planned = not isinstance(self.save, str) or self.save == "segments"
        kept = (0 if self.save == "segments" else self.save) if planned else self.save
        rule = self.made.planned if planned else self.made.kept_y
        args = (*inputs, self.seeds.pop(0) if self.seeds else None, reverse, kept, *self.how, record)
        y, cn, *_ = rule(*args, backend=self.op.pick(rule, self.backend, *args))
        return y, cn
