"""`bp.scan`: one step of a recurrence and its backward, as plain functions; whole-sequence BPTT from the two.

Maths     sₙ, yₙ = cell(xₙ, sₙ₋₁, θ)              n = 1 … T
          backward, n = T … 1, with the carry ds from step n+1:
          dxₙ, ds, dθₙ = cell_backward(ds, dyₙ, xₙ, sₙ₋₁, θ)         dθ = Σₙ dθₙ
          ds₀ is the carry that is left
Letters   T steps, B batch; x, y: T B ·; s, a tensor or several: B ·
Saving    x and every K-th state: all of them (K = 1), or those that `checkpoint` keeps, from which the steps between are run again
Source    Werbos 1990; Williams & Peng 1990 (truncation); Chen et al., arXiv 1604.06174, and Gruslys et al., 1606.03401 (checkpoints)
"""

from __future__ import annotations

import inspect
import itertools
import re
import weakref
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from math import isqrt
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from bptoolkit.function import Rule, in_graph
from bptoolkit.opaque import Opaque
from bptoolkit.ops.recurrent import check_lengths, order, unpack
from bptoolkit.shapes import check_floating

_KEYS = itertools.count(1)
_SCANS: dict[int, Scan] = {}
_RECORDERS: weakref.WeakValueDictionary[int, _Recorder] = weakref.WeakValueDictionary()


def scan(
    cell_forward: Callable[..., Any], cell_backward: Callable[..., Any] | None = None, *, name: str | None = None
) -> Scan:
    """A recurrence from one step and its backward. See `Scan`, which it returns; make it once, at module level.

    Args:
        cell_forward: `cell_forward(x, state, *params) -> (new_state, y)`, in plain torch, without anything random or in place.
            x is xs at one step, state a tensor or a tuple of tensors, y one tensor. Its parameters' names are the letters.
        cell_backward: takes by name whatever it uses. With a cell `f(x, h, w, b)`, these are `dh`, the cotangent of the new state,
            and `dy`; `x`, `h`, `w`, `b`; the results `new_h` and `y`; and `need`, of which `need.x` says whether x's gradient
            is wanted. Where the state is a tuple, `h`, `dh` and `new_h` are too. It returns one gradient, or None for zero,
            per parameter of the cell, in their order: that of `h` is a tuple where h is, that of `x` where xs is. Plain torch
            that autograd can differentiate, or second order raises. None: autograd's of the step.
        name: for errors and reports; cell_forward's name by default.

    Raises:
        TypeError: the cells do not take what is described here.
    """
    return Scan(cell_forward, cell_backward, name=name)


class Scan:
    """A recurrence, `run(xs, state, *params) -> (ys, last_state)`: differentiable, any number of times, and one node of a graph.

    Double backward, forward mode, vmap and `torch.compile` are derived as for every rule: second order is autograd of
    cell_backward. Autocast is off inside: the cell works in the dtypes that it is given. `plain` is the same as a loop that
    autograd differentiates, to verify against.

    Example:
        >>> import torch, bptoolkit as bp
        >>> def indrnn(x, h, w, u):
        ...     new_h = torch.relu(x @ w.mT + u * h)
        ...     return new_h, new_h
        >>> def indrnn_backward(dh, dy, x, h, w, u, y):
        ...     da = (dh + dy) * (y > 0)
        ...     return da @ w, da * u, da.mT @ x, (da * h).sum(0)
        >>> run = bp.scan(indrnn, indrnn_backward)
        >>> ys, last = run(torch.randn(7, 2, 3), torch.zeros(2, 4), torch.randn(4, 3), torch.rand(4))
        >>> ys.shape, last.shape
        (torch.Size([7, 2, 4]), torch.Size([2, 4]))
        >>> shapes = "xs: T B I, state: B H, w: H I, u: H -> T B H, B H"
        >>> bool(bp.verify.check(run, shapes, reference=run.plain, quick=True, contract={"kinks": "any"}).ok)
        True
        >>> wrong = bp.scan(indrnn, lambda dh, dy, x, h, w, u, y: indrnn_backward(dh, 0 * dy, x, h, w, u, y))
        >>> report = bp.verify.check(wrong, shapes, reference=run.plain, quick=True, contract={"kinks": "any"})
        >>> "gradient_value" in [failure.property for failure in report.failures]
        True

    Attributes:
        grad_norms: after the backward of a call with `grad_norms=True`, its norms: (T,).
    """

    def __init__(
        self, cell_forward: Callable[..., Any], cell_backward: Callable[..., Any] | None = None, *, name: str | None = None
    ) -> None:
        self.name = name or getattr(cell_forward, "__name__", type(cell_forward).__name__)
        self.cell_forward, self.cell_backward = cell_forward, cell_backward
        letters = _letters(self.name, cell_forward)
        if len(letters) < 2:
            raise TypeError(f"{self.name}: the cell takes {letters}; it must take x, the state, and its parameters")
        self.x, self.state, *params = letters
        self.params = tuple(params)
        pool = (f"d{self.state}", "dy", *letters, f"new_{self.state}", "y", "need")
        if len(set(pool)) < len(pool):
            double = sorted({p for p in pool if pool.count(p) > 1})
            raise TypeError(f"{self.name}: {', '.join(double)} would mean two things in cell_backward; rename a parameter")
        self.asked: tuple[str, ...] = ()
        if cell_backward is not None:
            self.asked = _letters(self.name, cell_backward)
            for p in self.asked:
                if p not in pool:
                    raise TypeError(f"{self.name}: cell_backward asks for '{p}'; it can have {', '.join(pool)}")
        self.Need: Any = namedtuple("Need", letters)  # type: ignore[misc]
        self.grad_norms: Tensor | None = None
        self.key = next(_KEYS)
        self._own = _Recorder(self._keep_norms)
        self._rules: dict[_Ranks, str] = {}
        _SCANS[self.key] = self

    def _keep_norms(self, norms: Tensor) -> None:
        self.grad_norms = norms

    def __repr__(self) -> str:
        return f"Scan({self.name}: {self.x}, {self.state}{''.join(', ' + p for p in self.params)})"

    def __call__(
        self,
        xs: Tensor | tuple[Tensor, ...] | PackedSequence,
        state: Tensor | tuple[Tensor, ...],
        *params: Tensor,
        lengths: Tensor | None = None,
        reverse: bool = False,
        truncate: int | tuple[int, int] | None = None,
        checkpoint: int | str | None = None,
        grad_norms: bool | Callable[[Tensor], Any] = False,
    ) -> tuple[Any, Any]:
        """Run the cell over a sequence.

        Args:
            xs: (T, ...), a tuple of such tensors, or a PackedSequence.
            state: the state before the first step, a tensor or a tuple of them.
            params: the cell's other arguments, tensors, the same at every step.
            lengths: (B,) int64, between 0 and T, where (B, ...) is every state's, x's and y's shape at one step: rows end
                there, y past it is zero, the last state is that of the end, and a reverse direction starts there. What xs
                has past it is not read; the cell sees zeros there.
            reverse: go from the last step to the first.
            truncate: k, or (k1, k2) with k2 ≥ k1: every k1 steps the losses of the newest k1 steps (those of y; of the last
                state too at the last step) go back through at most k2 steps; k is (k, k). Every loss is counted once. An
                estimate of the gradient, so that it cannot be differentiated again, nor pushed forward: both raise.
            checkpoint: keep every K-th state only, K or "sqrt" for √T, and run the steps between again in backward.
            grad_norms: True, and `self.grad_norms` has, after backward, at each step the norm of the gradient that the step sent
                back to the state it started from; or a callable that is given this tensor, (T,). Nothing waits for it. If
                truncated, from the newest window that has the step.

        Returns:
            ys (T, ...), or a PackedSequence; and the last state, as `state`.

        Raises:
            ValueError: shapes, lengths or devices disagree, or an option is out of range.
            TypeError: an argument, or what the cell returns, is not of its kind.
        """
        packed = xs if isinstance(xs, PackedSequence) else None
        index = None
        if packed is not None:
            if lengths is not None:
                raise ValueError(f"{self.name}: a PackedSequence has its lengths in it; leave lengths out")
            if packed.data.dim() != 2:
                raise ValueError(f"{self.name}: a PackedSequence must have one dimension of features here")
            xs, lengths, index = unpack(packed, packed.data)
        x, s = _several(self.name, "xs", xs), _several(self.name, "state", state)
        if packed is not None and packed.sorted_indices is not None:
            s = tuple(t.index_select(0, packed.sorted_indices) for t in s)
        self._check(x, s, params)
        T = x[0].shape[0]
        if lengths is not None:
            if x[0].dim() < 2:
                raise ValueError(f"{self.name}: with lengths, xs must be (T, B, ...), not {tuple(x[0].shape)}")
            lengths = check_lengths(self.name, lengths, x[0], True).to(x[0].device)
        k1, k2 = self._window(truncate)
        every = self._every(checkpoint, T)
        ranks = _Ranks(
            _rank(x), not isinstance(xs, Tensor), _rank(s), not isinstance(state, Tensor), tuple(p.dim() for p in params)
        )
        record = self._record(grad_norms)
        name = _rule_of(self.key, *ranks)
        out = in_graph(name, "eager", *x, *s, *params, lengths, reverse, every, k1, k2, record)
        y, ends = out[0], out[1 + len(s) :]
        if packed is not None:
            if packed.unsorted_indices is not None:
                ends = [e.index_select(0, packed.unsorted_indices) for e in ends]
            data = y.reshape(y.shape[0] * y.shape[1], *y.shape[2:]).index_select(0, index)
            y = PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        return y, ends[0] if isinstance(state, Tensor) else tuple(ends)

    def plain(
        self, xs: Any, state: Any, *params: Tensor, lengths: Tensor | None = None, reverse: bool = False
    ) -> tuple[Tensor, Any]:
        """The same as a plain loop over cell_forward, for autograd: what a cell_backward is to agree with."""
        at = (lambda t: xs[t]) if isinstance(xs, Tensor) else (lambda t: tuple(x[t] for x in xs))
        T = (xs if isinstance(xs, Tensor) else xs[0]).shape[0]
        if not T:
            return self(xs, state, *params, lengths=lengths, reverse=reverse)
        ys: list[Any] = [None] * T
        for t in order(T, reverse):
            new, y = self.cell_forward(at(t), state, *params)
            if lengths is None:
                state, ys[t] = new, y
                continue

            def rows(new: Tensor, old: Any, on: Tensor = t < lengths) -> Tensor:
                return torch.where(on.reshape(-1, *(1,) * (new.dim() - 1)), new, old)

            ys[t] = rows(y, 0)
            state = rows(new, state) if isinstance(new, Tensor) else tuple(rows(n, o) for n, o in zip(new, state))
        return torch.stack(ys), state

    # --- the arguments ---

    def _check(self, x: tuple[Tensor, ...], s: tuple[Tensor, ...], params: tuple[Any, ...]) -> None:
        if len(params) != len(self.params):
            raise TypeError(f"{self.name}: {len(params)} parameters given; the cell has {len(self.params)}: {self.params}")
        for name, p in zip(self.params, params):
            if not isinstance(p, Tensor):
                raise TypeError(f"{self.name}: {name} must be a tensor, not {type(p).__name__}; a number belongs in the cell")
        for t in s:
            check_floating(self.name, self.state, t)
        for t in x:
            if t.dim() < 1 or t.shape[0] != x[0].shape[0]:
                raise ValueError(f"{self.name}: xs must all be (T, ...), not {[tuple(t.shape) for t in x]}")

    def _window(self, truncate: Any) -> tuple[int, int]:
        if truncate is None:
            return 0, 0
        k1, k2 = (truncate, truncate) if isinstance(truncate, int) else truncate
        if k1 < 1 or k2 < k1:
            raise ValueError(f"{self.name}: truncate={truncate}; it must be k ≥ 1, or (k1, k2) with 1 ≤ k1 ≤ k2")
        return k1, k2

    def _every(self, checkpoint: Any, T: int) -> int:
        if checkpoint == "sqrt":
            return isqrt(max(T - 1, 0)) + 1
        if checkpoint is None:
            return 1
        if not isinstance(checkpoint, int) or checkpoint < 1:
            raise ValueError(f"{self.name}: checkpoint={checkpoint!r}; it must be K ≥ 1, 'sqrt' or None")
        return checkpoint

    def _record(self, grad_norms: Any) -> Any:
        if grad_norms is False or grad_norms is None:
            return 0
        if grad_norms is True:
            return self._own.key  # a graph knows recorders by number
        if torch.compiler.is_compiling():
            raise TypeError(f"{self.name}: a graph calls no function of yours: grad_norms=True, then read .grad_norms")
        return _Recorder(grad_norms)

    # --- one step ---

    def step(self, x: Any, s: Sequence[Tensor], params: Sequence[Tensor], many: _Ranks) -> tuple[list[Tensor], Tensor]:
        """The cell on lists of tensors."""
        out = self.cell_forward(tuple(x) if many.xs_tuple else x[0], tuple(s) if many.state_tuple else s[0], *params)
        if not isinstance(out, (tuple, list)) or len(out) != 2:
            raise TypeError(f"{self.name}: the cell must return (new_{self.state}, y), not {type(out).__name__}")
        new, y = list(out[0]) if isinstance(out[0], (tuple, list)) else [out[0]], out[1]
        if not isinstance(y, Tensor):
            raise TypeError(f"{self.name}: y must be one tensor, not {type(y).__name__}")
        if len(new) != len(s):
            raise TypeError(f"{self.name}: the new state has {len(new)} tensors, the state {len(s)}")
        for a, b in zip(new, s):
            if not isinstance(a, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
                got = f"{a.dtype} {tuple(a.shape)}" if isinstance(a, Tensor) else type(a).__name__
                raise ValueError(f"{self.name}: the new state is {got}, the state it came from {b.dtype} {tuple(b.shape)}")
        return new, y

    def step_backward(
        self,
        ds: Sequence[Tensor],
        dy: Tensor,
        x: Sequence[Tensor],
        s: Sequence[Tensor],
        new: Sequence[Tensor] | None,
        y: Tensor | None,
        params: Sequence[Tensor],
        need: Sequence[bool],
        many: _Ranks,
    ) -> tuple[list[Any], list[Any], list[Any]]:
        """The gradients of one step: of xs, of the state and of the parameters; None for zero."""
        if self.cell_backward is None:
            return self._step_autograd(ds, dy, x, s, params, need, many)
        nx = len(x)
        pool = {
            f"d{self.state}": tuple(ds) if many.state_tuple else ds[0],
            "dy": dy,
            self.x: tuple(x) if many.xs_tuple else x[0],
            self.state: tuple(s) if many.state_tuple else s[0],
            f"new_{self.state}": new if new is None or many.state_tuple else new[0],
            "y": y,
            "need": self.Need(any(need[:nx]), True, *need[nx:]),
            **dict(zip(self.params, params)),
        }
        if many.state_tuple and new is not None:
            pool[f"new_{self.state}"] = tuple(new)
        grads = self.cell_backward(*(pool[p] for p in self.asked))
        letters = (self.x, self.state, *self.params)
        if not isinstance(grads, (tuple, list)) or len(grads) != len(letters):
            got = f"{len(grads)} values" if isinstance(grads, (tuple, list)) else type(grads).__name__
            raise TypeError(f"{self.name}: cell_backward must return a gradient for each of {', '.join(letters)}; got {got}")
        dx = self._spread(self.x, grads[0], x, many.xs_tuple)
        dstate = self._spread(self.state, grads[1], s, many.state_tuple)
        dparams = [self._spread(name, g, (p,), False)[0] for name, g, p in zip(self.params, grads[2:], params)]
        return dx, dstate, dparams

    def _spread(self, name: str, grad: Any, of: Sequence[Tensor], several: bool) -> list[Any]:
        grads = [None] * len(of) if grad is None else list(grad) if several else [grad]
        if len(grads) != len(of):
            raise TypeError(f"{self.name}: cell_backward returns {len(grads)} gradients for {name}, which has {len(of)}")
        for g, t in zip(grads, of):
            if g is not None and g.shape != t.shape:
                raise ValueError(
                    f"{self.name}: cell_backward returns a gradient of shape {tuple(g.shape)} for {name}, which has {tuple(t.shape)}"
                )
        return grads

    def _step_autograd(self, ds, dy, x, s, params, need, many):
        nx, ns = len(x), len(s)
        tensors = [*x, *s, *params]
        wanted = [*need[:nx], *[True] * ns, *need[nx:]]
        at = [k for k, w in enumerate(wanted) if w]

        def of_wanted(*chosen):
            filled = list(tensors)
            for k, t in zip(at, chosen):
                filled[k] = t
            new, y = self.step(filled[:nx], filled[nx : nx + ns], filled[nx + ns :], many)
            return (*new, y)

        pulled = torch.func.vjp(of_wanted, *(tensors[k] for k in at))[1]((*ds, dy))
        grads: list[Any] = [None] * len(tensors)
        for k, g in zip(at, pulled):
            grads[k] = g
        return grads[:nx], grads[nx : nx + ns], grads[nx + ns :]


class _Ranks(NamedTuple):
    """What makes two calls of a scan differ in their operator: how many tensors of how many dimensions."""

    xs: tuple[int, ...]
    xs_tuple: bool
    state: tuple[int, ...]
    state_tuple: bool
    params: tuple[int, ...]


class _Recorder:
    """What is given the norms; known to operators by its number."""

    def __init__(self, fn: Callable[[Tensor], Any]) -> None:
        self.fn, self.key = fn, next(_KEYS)
        _RECORDERS[self.key] = self


def _rule_of(key: int, *ranks: Any) -> str:
    """The name of the rule for calls of these ranks, which is made at the first."""
    of = _Ranks(*ranks)
    self = _SCANS[key]
    if of not in self._rules:
        self._rules[of] = _Bptt(self, of, len(self._rules)).rule.name
    return self._rules[of]


_rule_of._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo calls it, and what it returns is a constant


# --- the loops and the rule of calls of some ranks ---------------------------------------------------------------------------


class _Bptt:
    """The two loops as operators, and the rule of them."""

    def __init__(self, scan: Scan, ranks: _Ranks, count: int) -> None:
        self.scan, self.ranks = scan, ranks
        self.nx, self.ns, self.np = nx, ns, np = len(ranks.xs), len(ranks.state), len(ranks.params)
        name = f"scan{scan.key}_{count}_{re.sub('[^0-9a-zA-Z_]', '', scan.name)}"
        xs, ss, ps = _names("x", nx), _names("s", ns), _names("p", np)
        kept, ends = _names("c", ns), _names("e", ns)
        self.takes_new, self.takes_y = f"new_{scan.state}" in scan.asked, "y" in scan.asked
        forward_options = {"reverse": bool, "every": int}
        self.LOOP = Opaque(
            f"{name}_loop",
            _signed(self._plain(self.forward, ranks.state[0], nx), [*xs, *ss, *ps], ["lengths"], forward_options, 1 + 2 * ns),
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
        loop = _signed(
            self._plain(self.bptt, rank, place, drop=1), maybe, tensors, options, nx + ns + np, more=[*ends, "y", "lengths"]
        )
        fast, fake = self._fast(self.bptt_fast, rank, place, drop=1), self._fake(self.bptt_fake, rank, place)
        self.BPTT = Opaque(f"{name}_bptt", loop, fake, vmap="leading", fast=fast)
        self.TRUNCATED = Opaque(f"{name}_truncated", loop, fake, vmap="leading", fast=fast, vjp=self._refuse)
        saved = [*(ends if self.takes_new else ()), *(["y"] if self.takes_y else ())]
        asked = ["dy", *("d" + e for e in ends), *("d" + k for k in kept), *xs, *kept, *ps, *saved, "lengths"]
        self.rule = Rule(
            name,
            _named(self._rule_forward, [*xs, *ss, *ps, "lengths", "reverse", "every", "k1", "k2", "record"]),
            _named(self._rule_backward, [*asked, "reverse", "every", "k1", "k2", "record", "need"]),
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
        key = record.key if isinstance(record, _Recorder) else record
        grads = op(*cotangents, *tensors, *ends, y, lengths, reverse, every, k1, k2, wanted, key)
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
        dp = [torch.zeros_like(p) if w else None for p, w in zip(ps, need[nx:])]
        ds0, norms = list(zero_s), [zero_s[0].new_zeros(())] * T
        rows = [x.unbind(0) for x in xs]
        replay = _Replay(self, rows, kept, ends, y, ps, on, steps, every)
        dys = None if dy is None else _zero_past(dy, lengths).unbind(0)
        zero_y: Any = None
        if T and (dys is None or k1):
            zero_y = torch.zeros_like(self.scan.step([x[0] for x in rows], replay.first(), ps, self.ranks)[1])
        for newest, end, oldest in _windows(T, k1, k2):
            ds = [z if e is None or end < T else e for e, z in zip(des, zero_s)]
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
                for k, g in enumerate(gp):
                    if dp[k] is not None and g is not None:
                        dp[k] = dp[k].add_(g) if in_place else dp[k] + g
            if oldest == 0:
                ds0 = [a + d for a, d in zip(ds0, ds)]
        if not T:
            ds0 = [z if e is None else e.clone() for e, z in zip(des, zero_s)]
        none = zero_s[0]
        out = [_steps_of(d, x) if w else none.new_empty(0) for d, x, w in zip(dx, xs, need)]
        out += ds0 + [none.new_empty(0) if d is None else d for d in dp]
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
                out = _batched(fn, v, args, fast=True)
                if drop and args[-1]:
                    recorder = _RECORDERS.get(args[-1])
                    if recorder is not None:
                        recorder.fn(out[-1])
            return tuple(o.contiguous() for o in out[: len(out) - drop])

        return run

    def _fake(self, fn: Any, rank: int, place: int) -> Callable[..., Any]:
        def run(*args: Any) -> tuple[Tensor, ...]:
            return tuple(o.new_empty(o.shape) for o in _batched(fn, args[place].dim() - rank, args))

        return run


class _Replay:
    """The state that each step started from, and what it made; from the kept ones, a segment at a time."""

    def __init__(self, bptt: _Bptt, rows, kept, ends, y, ps, on, steps, every) -> None:
        self.bptt, self.rows, self.ps, self.on, self.steps, self.every = bptt, rows, ps, on, steps, every
        self.kept, self.ends = [k.unbind(0) for k in kept], ends
        self.y = None if y is None else y.unbind(0)
        self.segment, self.states, self.ys = -1, [], []

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


def _windows(T: int, k1: int, k2: int) -> Iterator[tuple[int, int, int]]:
    """(newest, end, oldest), last window first: the losses of the steps from newest to end go back to oldest."""
    if not k1:
        yield 0, T, 0
        return
    ends = [*range(k1, T, k1), T] if T else []
    for begin, end in reversed(list(zip([0, *ends], ends))):
        yield begin, end, max(end - k2, 0)


# --- small things ------------------------------------------------------------------------------------------------------------


def _letters(name: str, cell: Callable[..., Any]) -> tuple[str, ...]:
    if not callable(cell):
        raise TypeError(f"{name}: a cell must be callable, not {type(cell).__name__}")
    parameters = inspect.signature(cell).parameters.values()
    for p in parameters:
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.KEYWORD_ONLY):
            raise TypeError(f"{name}: a cell must name its parameters one by one; '{p}' does not")
    return tuple(p.name for p in parameters)


def _several(op: str, name: str, given: Any) -> tuple[Tensor, ...]:
    several = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    if not several or not all(isinstance(t, Tensor) for t in several):
        raise TypeError(f"{op}: {name} must be a tensor or a tuple of tensors, not {type(given).__name__}")
    return several


def _rank(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(t.dim() for t in tensors)


def _names(letter: str, n: int) -> list[str]:
    return [f"{letter}{k}" for k in range(n)]


def _take(it: Iterator[Any], n: int) -> list[Any]:
    return list(itertools.islice(it, n))


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


def _signed(fn: Any, first: list[str], second: list[str], options: dict[str, Any], returns: int, more: Any = ()) -> Any:
    """`fn` with the signature that an operator is made from; of the tensors those called as cotangents, ends or lengths may be None."""
    maybe = {"lengths", "y", *more, *(n for n in first if n.startswith("d"))}
    P = inspect.Parameter
    kinds = [(n, Optional[Tensor] if n in maybe else Tensor) for n in (*first, *second, *more)]  # noqa: UP045
    parameters = [P(n, P.POSITIONAL_OR_KEYWORD, annotation=a) for n, a in (*kinds, *options.items())]

    def run(*args: Any) -> Any:
        return fn(*args)

    run.__signature__ = inspect.Signature(parameters, return_annotation=tuple[(Tensor,) * returns])  # type: ignore[attr-defined, misc]
    return run


def _named(fn: Any, names: list[str]) -> Any:
    """`fn` with named parameters, as `Rule` reads them."""

    def run(*args: Any) -> Any:
        return fn(*args)

    P = inspect.Parameter
    run.__signature__ = inspect.Signature([P(n, P.POSITIONAL_OR_KEYWORD) for n in names])  # type: ignore[attr-defined]
    return run
