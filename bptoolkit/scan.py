"""`bp.scan`: one step of a recurrence and its backward, as plain functions; whole-sequence BPTT from the two.

Maths     sₙ, yₙ = cell(xₙ, sₙ₋₁, θ)              n = 1 … T
          backward, n = T … 1, with the carry ds from step n+1:
          dxₙ, ds, dθₙ = cell_backward(ds, dyₙ, xₙ, sₙ₋₁, θ)      dθ = Σₙ dθₙ
          ds₀ is the carry that is left
Letters   T steps, B batch; x, y: T B ·; s, a tensor or several: B ·
Saving    x and every K-th state: all (K = 1), or those that `checkpoint` keeps, from which the steps between are run again
Source    Werbos 1990; Williams & Peng 1990 (truncation); Chen et al., arXiv 1604.06174, and Gruslys et al., arXiv 1606.03401
          (checkpoints)
"""

from __future__ import annotations

import inspect
from collections import namedtuple
from collections.abc import Callable, Sequence
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from bptoolkit.function import in_graph
from bptoolkit.grad_norms import KEYS, Recorder
from bptoolkit.ops.bptt import ARTBP, truncation
from bptoolkit.ops.recurrent import check_lengths, order, repack, unpack
from bptoolkit.scan_loops import Bptt, Ranks
from bptoolkit.shapes import check_floating

_SCANS: dict[int, Scan] = {}


def scan(cell_forward: Callable[..., Any], cell_backward: Callable[..., Any] | None = None, *, name: str | None = None) -> Scan:
    """A recurrence from one step and its backward. See `Scan`, which it returns; make it once, at module level.

    Args:
        cell_forward: `cell_forward(x, state, *params) -> (new_state, y)`, in plain torch, without anything random or in place.
            x is xs at one step, state a tensor or a tuple of tensors, y one tensor. Its parameters' names are the letters.
        cell_backward: takes by name whatever it uses. With a cell `f(x, h, w, b)`, these are `dh`, the cotangent of the new
            state, and `dy`; `x`, `h`, `w`, `b`; the results `new_h` and `y`; and `need`, of which `need.x` says whether x's
            gradient is wanted. Where the state is a tuple, `h`, `dh` and `new_h` are too. It returns one gradient, or None for
            zero, per parameter of the cell, in their order: that of `h` is a tuple where h is, that of `x` where xs is. Plain
            torch that autograd can differentiate, or second order raises. None: autograd's of the step.
        name: for errors and reports; cell_forward's name by default.

    Raises:
        TypeError: the cells do not take what is described here.
    """
    return Scan(cell_forward, cell_backward, name=name)


class Scan:
    """A recurrence, `run(xs, state, *params) -> (ys, last_state)`: differentiable again and again, and one node of a graph.

    Double backward, forward mode, vmap and `torch.compile` are derived as for every rule: second order is autograd of
    cell_backward. Autocast is off inside: the cell works in the dtypes that it is given. `plain` is the same as a loop that
    autograd differentiates, to verify against. What does not need the state belongs before the scan: `xs @ w.mT` is one product
    for all steps there, and so is w's gradient.

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
        >>> example = torch.randn(3, 2, 2), torch.zeros(2, 2), torch.randn(2, 2), torch.rand(2)
        >>> bp.verify.check(run, example, reference=run.plain, quick=True, budget=5, contract={"kinks": "any"}).ok
        True

        A backward that forgets what step t+1 sends back:

        >>> wrong = bp.scan(indrnn, lambda dh, dy, x, h, w, u, y: indrnn_backward(0 * dh, dy, x, h, w, u, y))
        >>> report = bp.verify.check(wrong, example, reference=wrong.plain, properties=["gradient_value"])
        >>> [failure.property for failure in report.failures]
        ['gradient_value']

    Attributes:
        grad_norms: after the backward of a call with `grad_norms=True`, its norms: (T,).
    """

    def __init__(
        self, cell_forward: Callable[..., Any], cell_backward: Callable[..., Any] | None = None, *, name: str | None = None
    ) -> None:
        self.name: str = name or getattr(cell_forward, "__name__", None) or type(cell_forward).__name__
        self.__name__ = self.__qualname__ = self.name
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
        self.key = next(KEYS)
        self._own = Recorder(self._keep_norms)
        self._rules: dict[Ranks, str] = {}
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
            truncate: k, or (k1, k2) with k2 ≥ k1: the losses of every k1 steps (those of y; of the last state too at a row's
                last step) go back through at most k2 steps, to the beginning of the window that ends with them, as in `lstm`;
                k is (k, k). Every loss is counted once. Steps are counted from the first that the scan takes. An estimate of
                the gradient, so that it cannot be differentiated again, nor pushed forward: both raise.
            checkpoint: keep every K-th state only, K or "sqrt" for √T, and run the steps between again in backward.
            grad_norms: True, and `self.grad_norms` has, after backward, at each step the norm of the gradient that the step
                sent back to the state it started from; or a callable that is given this tensor, (T,). Nothing waits for it.
                If truncated, from the window whose newest steps have the step.

        Returns:
            ys (T, ...), or a PackedSequence; and the last state, as `state`.

        Raises:
            ValueError: shapes, lengths or devices disagree, or an option is out of range.
            TypeError: an argument, or what the cell returns, is not of its kind.
            RuntimeError: the cell writes over its arguments, or draws random numbers (on the CPU's generator).
        """
        packed = xs if isinstance(xs, PackedSequence) else None
        index: Any = None
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
        if isinstance(truncate, (str, ARTBP)):
            raise ValueError(f"{self.name}: truncate={truncate!r}; a scan takes None, k or (k1, k2)")
        k1, k2 = (0, 0) if truncate is None else truncation(self.name, truncate)[:2]
        every = self._every(checkpoint, T)
        ranks = Ranks(
            _rank(x), not isinstance(xs, Tensor), _rank(s), not isinstance(state, Tensor), tuple(p.dim() for p in params)
        )
        record = self._record(grad_norms)
        name = _rule_of(self.key, *ranks)
        out = in_graph(name, "eager", *x, *s, *params, lengths, reverse, every, k1, k2, record)
        y, ends = out[0], out[1 + len(s) :]
        if packed is not None:
            if packed.unsorted_indices is not None:
                ends = [e.index_select(0, packed.unsorted_indices) for e in ends]
            y = repack(packed, y, index)
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
        return Recorder(grad_norms)

    # --- one step ---

    def step(self, x: Any, s: Sequence[Tensor], params: Sequence[Tensor], many: Ranks) -> tuple[list[Tensor], Tensor]:
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
        many: Ranks,
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
                shape = tuple(g.shape)
                raise ValueError(
                    f"{self.name}: cell_backward returns a gradient of shape {shape} for {name}, which has {tuple(t.shape)}"
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


def _rule_of(key: int, *ranks: Any) -> str:
    """The name of the rule for calls of these ranks, which is made at the first."""
    of = Ranks(*ranks)
    self = _SCANS[key]
    if of not in self._rules:
        self._rules[of] = Bptt(self, of, len(self._rules)).rule.name
    return self._rules[of]


_rule_of._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo calls it, and what it returns is a constant


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
