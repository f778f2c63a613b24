"""The two loops of a `Scan` as operators of torch, and the rule of them.

A scan has one of these per number and rank of its tensors: operators have fixed signatures. Inside, samples that vmap adds are
counted by rank, and the loop runs under `torch.func.vmap` as often.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bptoolkit.function import Rule
from bptoolkit.grad_norms import deliver, key_of
from bptoolkit.opaque import Opaque
from bptoolkit.ops.recurrent import order
from bptoolkit.precision import wide
from bptoolkit.scan_signatures import named, names, signed


class Ranks(NamedTuple):
    """What makes two calls of a scan differ in their operator: how many tensors of how many dimensions."""

    xs: tuple[int, ...]
    xs_tuple: bool
    state: tuple[int, ...]
    state_tuple: bool
    params: tuple[int, ...]


class Bptt:
    """The two loops as operators, and the rule of them."""

    def __init__(self, scan: Any, ranks: Ranks, count: int) -> None:
        self.scan, self.ranks = scan, ranks
        self.nx, self.ns, self.np = nx, ns, np = len(ranks.xs), len(ranks.state), len(ranks.params)
        name = f"scan{scan.key}_{count}_{re.sub('[^0-9a-zA-Z_]', '', scan.name)}"
        xs, ss, ps = names("x", nx), names("s", ns), names("p", np)
        kept, ends = names("c", ns), names("e", ns)
        self.takes_new, self.takes_y = f"new_{scan.state}" in scan.asked, "y" in scan.asked
        forward_options = {"reverse": bool, "every": int}
        self.LOOP = Opaque(
            f"{name}_loop",
            signed(self._plain(self.forward, ranks.state[0], nx), [*xs, *ss, *ps], ["lengths"], forward_options, 1 + 2 * ns),
            self._fake(self.forward_fake, ranks.state[0], nx),
            vmap="leading",
            fast=self._fast(self.forward, ranks.state[0], nx),
        )
        maybe = ["dy", *("d" + e for e in ends), *("d" + k for k in kept)]
        tensors = [*xs, *kept, *ps]
        options = {
            "reverse": bool,
            "every": int,
            "k1": int,
            "k2": int,
            "need": list[bool],
            "record": int,
        }
        rank, place = ranks.state[0] + 1, len(maybe) + nx
        loop = signed(
            self._plain(self.bptt, rank, place, drop=1), maybe, tensors, options, nx + ns + np, more=[*ends, "y", "lengths"]
        )
        fast, fake = self._fast(self.bptt_fast, rank, place, drop=1), self._fake(self.bptt_fake, rank, place)
        self.BPTT = Opaque(f"{name}_bptt", loop, fake, vmap="leading", fast=fast)
        self.TRUNCATED = Opaque(f"{name}_truncated", loop, fake, vmap="leading", fast=fast, vjp=self._refuse)
        saved = [*(ends if self.takes_new else ()), *(["y"] if self.takes_y else ())]
        asked = ["dy", *("d" + e for e in ends), *("d" + k for k in kept), *xs, *kept, *ps, *saved, "lengths"]
        self.rule = Rule(
            name,
            named(self._rule_forward, [*xs, *ss, *ps, "lengths", "reverse", "every", "k1", "k2", "record"]),
            named(self._rule_backward, [*asked, "reverse", "every", "k1", "k2", "record", "need"]),
            inputs=" ".join([*xs, *ss, *ps, "lengths"]),
            outputs=" ".join(["y", *kept, *ends]),
        )

    def _refuse(self, *_: Any) -> Any:
        raise NotImplementedError(
            f"{self.scan.name}: a truncated gradient is an estimate; it is not differentiated again, nor pushed forward. "
            "Leave truncate out for second order and forward mode"
        )

    # --- the rule ---

    def _rule_forward(self, *args: Any) -> Any:
        return self.LOOP(*args[:-3])

    def _rule_backward(self, *args: Any) -> Any:
        nx, ns, np = self.nx, self.ns, self.np
        it = iter(args)
        cotangents, tensors = _take(it, 1 + 2 * ns), _take(it, nx + ns + np)
        ends = _take(it, ns) if self.takes_new else [None] * ns
        y = next(it) if self.takes_y else None
        lengths, reverse, every, k1, k2, record, need = it
        wanted = [*need[:nx], *need[nx + ns : nx + ns + np]]
        op = self.TRUNCATED if k1 else self.BPTT
        grads = op(*cotangents, *tensors, *ends, y, lengths, reverse, every, k1, k2, wanted, key_of(record))
        flags = [*wanted[:nx], *[True] * ns, *wanted[nx:]]
        return *(g if w else None for g, w in zip(grads, flags)), None

    # --- forward ---

    def forward(self, args: Any) -> list[Tensor]:
        nx, ns, np = self.nx, self.ns, self.np
        it = iter(args)
        xs, s, ps = _take(it, nx), _take(it, ns), _take(it, np)
        lengths, reverse, every = it
        T = xs[0].shape[0]
        on = _on(T, lengths)
        xs = [_zero_past(x, lengths) for x in xs]
        rows = [x.unbind(0) for x in xs]
        kept: list[list[Tensor]] = [[] for _ in s]
        ys: list[Any] = [None] * T
        for n, t in enumerate(order(T, reverse)):
            if n % every == 0:
                for k, a in zip(kept, s):
                    k.append(a)
            s, ys[t] = self.step([x[t] for x in rows], s, ps, on[t])
        y = torch.stack(ys) if T else self._no_steps(xs, s, ps)
        keep = [torch.stack(k) if k else a.new_empty(0, *a.shape) for k, a in zip(kept, s)]
        return [y, *keep, *(a.clone() for a in s)]

    def step(self, x: Any, s: Any, ps: Any, on: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """One step, of the rows that take it."""
        new, y = self.scan.step(x, s, ps, self.ranks)
        if on is None:
            return new, y
        return [_where(on, n, o) for n, o in zip(new, s)], _where(on, y, 0)

    def _no_steps(self, xs: Any, s: Any, ps: Any) -> Tensor:
        y = self.scan.step([x.new_zeros(x.shape[1:]) for x in xs], s, ps, self.ranks)[1]
        return y.new_empty(0, *y.shape)

    def forward_fake(self, args: Any) -> list[Tensor]:
        nx, ns = self.nx, self.ns
        xs, s, ps = args[:nx], args[nx : nx + ns], args[nx + ns : -3]
        every, T = args[-1], xs[0].shape[0]
        y = self.scan.step([x.new_empty(x.shape[1:]) for x in xs], s, ps, self.ranks)[1]
        n = (T + every - 1) // every
        return [y.new_empty(T, *y.shape), *(a.new_empty(n, *a.shape) for a in s), *(a.new_empty(a.shape) for a in s)]

    # --- backward through time ---

    def bptt(self, args: Any, in_place: bool = False) -> list[Tensor]:
        """The gradients of xs, of the first state and of the parameters, then the norms."""
        nx, ns, np = self.nx, self.ns, self.np
        it = iter(args)
        dy, des, dks = next(it), _take(it, ns), _take(it, ns)
        xs, kept, ps, ends = _take(it, nx), _take(it, ns), _take(it, np), _take(it, ns)
        y, lengths, reverse, every, k1, k2, need, record = it
        T = xs[0].shape[0]
        on, steps = _on(T, lengths), order(T, reverse)
        xs = [_zero_past(x, lengths) for x in xs]
        zero_s = [k.new_zeros(k.shape[1:]) for k in kept]
        dx: list[list[Any]] = [[None] * T for _ in range(nx)]
        dp = [torch.zeros_like(wide(p)) if w else None for p, w in zip(ps, need[nx:])]  # sums of T terms
        ds0, norms = list(zero_s), [zero_s[0].new_zeros(())] * T
        rows = [x.unbind(0) for x in xs]
        replay = _Replay(self, rows, kept, ends, y, ps, on, steps, every)
        dys = None if dy is None else _zero_past(dy, lengths).unbind(0)
        zero_y: Any = None
        if T and (dys is None or k1):
            zero_y = torch.zeros_like(self.scan.step([x[0] for x in rows], replay.first(), ps, self.ranks)[1])
        for newest, end, oldest in windows(T, k1, k2):
            mine = _ended(T, newest, end, lengths, reverse) if k1 else True
            ds = [z if e is None or mine is False else e if mine is True else _where(mine, e, 0) for e, z in zip(des, zero_s)]
            for n in range(end - 1, oldest - 1, -1):
                t = steps[n]
                x, s, new, yt = replay.at(n)
                dyt = zero_y if dys is None or n < newest else dys[t]
                through = ds if on[t] is None else [_where(on[t], d, 0) for d in ds]
                gx, gs, gp = self.scan.step_backward(through, dyt, x, s, new, yt, ps, need, self.ranks)
                back = [z if g is None else g for g, z in zip(gs, zero_s)]
                if on[t] is not None:
                    back = [_where(on[t], g, d) for g, d in zip(back, ds)]
                    gx = [None if g is None else _where(on[t], g, 0) for g in gx]
                ds = back
                if n % every == 0:
                    ds = [d if k is None else d + k[n // every] for d, k in zip(ds, dks)]
                if record and n >= newest:
                    norms[t] = torch.stack([torch.linalg.vector_norm(d) for d in ds]).square().sum().sqrt()
                for into, g in zip(dx, gx):
                    into[t] = g if into[t] is None else into[t] if g is None else into[t] + g
                for k, (total, g) in enumerate(zip(dp, gp)):
                    if total is not None and g is not None:
                        dp[k] = total.add_(g) if in_place else total + g
            if oldest == 0:
                ds0 = [a + d for a, d in zip(ds0, ds)]
        if not T:
            ds0 = [z if e is None else e.clone() for e, z in zip(des, zero_s)]
        none = zero_s[0]
        out = [_steps_of(d, x) if w else none.new_empty(0) for d, x, w in zip(dx, xs, need)]
        out += ds0 + [none.new_empty(0) if d is None else d.to(p.dtype) for d, p in zip(dp, ps)]
        return [*out, torch.stack(norms) if record and T else none.new_empty(0)]

    def bptt_fast(self, args: Any) -> list[Tensor]:
        return self.bptt(args, in_place=not torch._C._functorch.peek_interpreter_stack())

    def bptt_fake(self, args: Any) -> list[Tensor]:
        nx, ns, np = self.nx, self.ns, self.np
        xs, kept, ps = (
            args[1 + 2 * ns :][:nx],
            args[1 + 2 * ns + nx :][:ns],
            args[1 + 3 * ns + nx :][:np],
        )
        need, none = args[-2], kept[0]
        like = [x.new_empty(x.shape) if w else none.new_empty(0) for x, w in zip(xs, need)]
        like += [k.new_empty(k.shape[1:]) for k in kept]
        return like + [p.new_empty(p.shape) if w else none.new_empty(0) for p, w in zip(ps, need[nx:])]

    # --- as functions of what operators take ---

    def _plain(self, fn: Any, rank: int, place: int, drop: int = 0) -> Callable[..., Any]:
        """`fn` on tensors with any leading dimensions: those that the tensor at `place` has beyond its rank are vmapped."""

        def run(*args: Any) -> tuple[Tensor, ...]:
            out = _batched(fn, args[place].dim() - rank, args)
            return tuple(out[: len(out) - drop])

        return run

    def _fast(self, fn: Any, rank: int, place: int, drop: int = 0) -> Callable[..., Any]:
        """The same inside an operator, where dispatch keys are excluded that vmap and the step's autograd need."""

        def run(*args: Any) -> tuple[Tensor, ...]:
            keys = torch._C.DispatchKeySet
            include = keys(torch._C.DispatchKey.BackendSelect) | keys(torch._C.DispatchKey.ADInplaceOrView)
            exclude = keys(torch._C.DispatchKey.AutocastCPU) | keys(torch._C.DispatchKey.AutocastCUDA)
            with torch._C._ForceDispatchKeyGuard(include, exclude), torch.no_grad():
                v = args[place].dim() - rank
                before = None if drop else _marks(args)
                out = _batched(fn, v, args, fast=True)
                if before is not None:
                    self._unchanged(before, _marks(args))
                if drop and args[-1]:
                    deliver(args[-1], out[-1])
            return tuple(o.contiguous() for o in out[: len(out) - drop])

        return run

    def _unchanged(self, before: Any, after: Any) -> None:
        if before[0] != after[0]:
            raise RuntimeError(f"{self.scan.name}: the cell writes over its arguments; it must make new tensors")
        if not torch.equal(before[1], after[1]):
            raise RuntimeError(
                f"{self.scan.name}: the cell draws random numbers, which backward cannot draw again; "
                "give it its masks in xs or params"
            )

    def _fake(self, fn: Any, rank: int, place: int) -> Callable[..., Any]:
        def run(*args: Any) -> tuple[Tensor, ...]:
            return tuple(o.new_empty(o.shape) for o in _batched(fn, args[place].dim() - rank, args))

        return run


class _Replay:
    """The state that each step started from, and what it made; from the kept ones, a segment at a time."""

    def __init__(self, bptt: Bptt, rows, kept, ends, y, ps, on, steps, every) -> None:
        self.bptt, self.rows, self.ps, self.on, self.steps, self.every = bptt, rows, ps, on, steps, every
        self.kept, self.ends = [k.unbind(0) for k in kept], ends
        self.y = None if y is None else y.unbind(0)
        self.segment = -1
        self.states: list[list[Tensor]] = []
        self.ys: list[Tensor] = []

    def first(self) -> list[Tensor]:
        return [k[0] for k in self.kept]

    def at(self, n: int) -> tuple[list[Tensor], list[Tensor], Any, Any]:
        t = self.steps[n]
        x = [r[t] for r in self.rows]
        if self.every == 1:
            new = None
            if self.bptt.takes_new:
                new = [k[n + 1] for k in self.kept] if n + 1 < len(self.steps) else self.ends
            return x, [k[n] for k in self.kept], new, None if self.y is None else self.y[t]
        if n // self.every != self.segment:
            self.run(n // self.every)
        k = n % self.every
        return x, self.states[k], self.states[k + 1], self.ys[k]

    def run(self, segment: int) -> None:
        self.segment, s = segment, [k[segment] for k in self.kept]
        self.states, self.ys = [s], []
        for t in self.steps[segment * self.every : (segment + 1) * self.every]:
            s, y = self.bptt.step([r[t] for r in self.rows], s, self.ps, self.on[t])
            self.states.append(s)
            self.ys.append(y)


def windows(T: int, k1: int, k2: int) -> Iterator[tuple[int, int, int]]:
    """(newest, end, oldest), last window first: the losses of the steps from newest to end go back to oldest."""
    if not k1:
        yield 0, T, 0
        return
    for begin in reversed(range(0, T, k1)):
        yield begin, min(begin + k1, T), max(begin + k1 - k2, 0)


def _ended(T: int, newest: int, end: int, lengths: Tensor | None, reverse: bool) -> Tensor | bool:
    """Which rows take their last step in a window: the loss of their last state is its. A row without steps: the first."""
    if lengths is None:
        return end == T
    at = torch.where(lengths > 0, T - 1 if reverse else lengths - 1, 0)
    return (newest <= at) & (at < end)


# --- small things ------------------------------------------------------------------------------------------------------------


def _marks(args: Sequence[Any]) -> tuple[list[int], Tensor]:
    """The versions of the tensors, and the state of the random number generator of the CPU."""
    versions = [a._version for a in args if isinstance(a, Tensor) and not a.is_inference()]
    return versions, torch.get_rng_state()


def _take(it: Iterator[Any], n: int) -> list[Any]:
    return list(islice(it, n))


def _on(T: int, lengths: Tensor | None) -> list[Any]:
    """Which rows take step t."""
    if lengths is None:
        return [None] * T
    return [t < lengths for t in range(T)]


def _where(on: Tensor, a: Tensor, b: Any) -> Tensor:
    return torch.where(on.reshape(-1, *(1,) * (a.dim() - 1)), a, b)


def _zero_past(t: Tensor, lengths: Tensor | None) -> Tensor:
    """A sequence T B · with zeros past the lengths, whatever was there."""
    if lengths is None:
        return t
    on = torch.arange(t.shape[0], device=t.device)[:, None] < lengths
    return torch.where(on.reshape(*on.shape, *(1,) * (t.dim() - 2)), t, 0)


def _steps_of(grads: list[Any], x: Tensor) -> Tensor:
    if not grads:
        return torch.zeros_like(x)
    zero = x.new_zeros(x.shape[1:])
    return torch.stack([zero if g is None else g for g in grads])


def _batched(fn: Callable[[Any], list[Tensor]], v: int, args: Sequence[Any], fast: bool = False) -> list[Tensor]:
    """`fn` under v vmaps, over the first dimensions of all tensors.

    If `fast`, what is the same for all samples (weights, as a rule) stays out of the last one; gradients would not know of it.
    """
    if v <= 0:
        return fn(args)
    at = [k for k, a in enumerate(args) if isinstance(a, Tensor)]
    given = [args[k] for k in at]
    dims: list[int | None] = [0] * len(at)
    if fast and v == 1:
        for k, a in enumerate(given[1:], 1):
            if a.shape[0] > 1 and a.stride(0) == 0:
                given[k], dims[k] = a[0], None

    def inner(*tensors: Tensor) -> tuple[Tensor, ...]:
        filled = list(args)
        for k, t in zip(at, tensors):
            filled[k] = t
        return tuple(_batched(fn, v - 1, filled, fast))

    return list(torch.func.vmap(inner, in_dims=tuple(dims))(*given))
