"""`bp.associative_scan`: all prefixes y_t = x_1 • x_2 • … • x_t of an associative operator, in about 2 log₂ T steps.

Maths     odd-even recursion, from y_1 = x_1 and positions counted from 1:
          pₖ = x₂ₖ₋₁ • x₂ₖ                    the pairs
          y₂ₖ = scan(p)ₖ                      the even positions, by the same for half as many
          y₂ₖ₊₁ = y₂ₖ • x₂ₖ₊₁                  the odd ones
          backward, with (dl, dr) = vjp(d, l, r) for l • r, from the last line to the first:
          (dl, dr) = vjp(dy₂ₖ₊₁, y₂ₖ, x₂ₖ₊₁)      dx₂ₖ₊₁ = dr      dy₂ₖ += dl
          dp = the same for scan(p), whose outputs are the y₂ₖ: nothing but the pairs is computed again
          (dx₂ₖ₋₁, dx₂ₖ) += vjp(dpₖ, x₂ₖ₋₁, x₂ₖ)
Letters   x, y: elements, any number of tensors each, T steps along dim; • the operator
Saving    with a vjp x and y; without, what autograd keeps of log₂ T levels
Source    Ladner & Fischer 1980; Blelloch 1990
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from bptoolkit.choose import State, choose
from bptoolkit.function import _RULES, Rule, in_graph
from bptoolkit.op import pick
from bptoolkit.scan_loops import named, names

_KEYS = itertools.count(1)
_RULE_OF: dict[int, str] = {}
_KEPT: dict[int, _Operator] = {}  # those that a compiled graph knows by number
_BY_FUNCTIONS: weakref.WeakKeyDictionary[Any, dict[Any, int]] = weakref.WeakKeyDictionary()


def associative_scan(
    fn: Callable[[Any, Any], Any],
    elements: Any,
    dim: int = 0,
    *,
    reverse: bool = False,
    vjp: Callable[[Any, Any, Any], tuple[Any, Any]] | None = None,
    kernel: Callable[[], tuple[Any, Any]] | None = None,
    backend: str = "auto",
) -> Any:
    """All prefixes of the elements along a dimension, combined by an associative operator, at logarithmic depth.

    Args:
        fn: `fn(left, right)`, the operator, associative and differentiable. It is given many pairs at once: left and right are
            built as the elements are, with any size along dim, and so is what it returns, of the same shapes and dtypes.
        elements: a tensor, or tensors in tuples, lists and dicts, with one size along dim.
        dim: the dimension of the scan.
        reverse: from the last element to the first: left is then the later one.
        vjp: `vjp(dout, left, right) -> (dleft, dright)`, all built as the elements are: the operator's backward. With it, the
            scan's backward is a scan of logarithmic depth too, which keeps the elements and the result alone. None: autograd.
        kernel: a function of module level that returns fn and vjp as `triton.jit` functions, when they are used. Then there is
            a fused walk over the steps, forward and backward, in float32 registers. left, right and dout are tuples of values
            there, in the order of the elements' tensors, or for one tensor a value; each element is combined by itself, so the
            tensors have one shape. It needs vjp beside it.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        The prefixes, built as the elements are. As a differentiable function it is as fn, or vjp, is.

    Raises:
        TypeError: elements are not tensors, fn or vjp returns something built otherwise or of another dtype, or kernel returns
            no such pair, or is there without vjp.
        ValueError: sizes along dim differ, dim is out of range, fn or vjp returns another shape, or the named backend cannot
            run the call.

    Example:
        >>> import torch, bptoolkit as bp
        >>> def after(f, g):  # two affine maps x -> a x + b, f first
        ...     return g[0] * f[0], g[0] * f[1] + g[1]
        >>> a, b = torch.tensor([0.5, 2.0, 1.0]), torch.tensor([1.0, 1.0, 1.0])
        >>> bp.associative_scan(after, (a, b))[1]  # the linear recurrence h = a h + b
        tensor([1., 3., 4.])
    """
    xs, spec = tree_flatten(elements)
    if not xs or not all(isinstance(t, Tensor) for t in xs):
        raise TypeError(f"associative_scan: elements must be tensors, not {type(elements).__name__}")
    for t in xs:
        if not -t.dim() <= dim < t.dim():
            raise ValueError(f"associative_scan: dim={dim} is out of range for an element of shape {tuple(t.shape)}")
    dims = tuple(dim % t.dim() for t in xs)
    T = xs[0].shape[dims[0]]
    for t, d in zip(xs, dims):
        if t.shape[d] != T:
            raise ValueError(f"associative_scan: dimension {dim} is {T} and {t.shape[d]} in {[tuple(x.shape) for x in xs]}")
    if kernel is not None and vjp is None:
        raise TypeError("associative_scan: kernel needs vjp beside it, for what the fused kernel cannot take")
    if T < 2:
        return elements
    if reverse:
        xs = [t.flip(d) for t, d in zip(xs, dims)]
    if vjp is None:
        choose(State(backend, "forward", False, False, False, False, None), "associative_scan")
        ys = _Operator(fn, None, spec, dims, None).scan(xs)
    else:
        if torch.compiler.is_compiling():
            operator: Any = _key_of(fn, vjp, None if isinstance(elements, Tensor) else _flat_length(elements), dims, kernel)
        else:
            operator = _Operator(fn, vjp, spec, dims, kernel)
        rule = _rule_of(len(xs))
        out = in_graph(rule, _pick(rule, backend, *xs, operator), *xs, operator)
        ys = [out] if len(xs) == 1 else list(out)
    return tree_unflatten([y.flip(d) for y, d in zip(ys, dims)] if reverse else ys, spec)


class _Operator:
    """The operator and its vjp on lists of tensors, checked; the recursions."""

    def __init__(self, fn: Any, vjp: Any, spec: Any, dims: tuple[int, ...], kernel: Any) -> None:
        self.fn, self.hand_vjp, self.spec, self.dims, self.kernel = fn, vjp, spec, dims, kernel

    def combine(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
        return self._read("fn", self.fn(self._built(left), self._built(right)), right)

    def vjp(self, d: Sequence[Tensor], left: Sequence[Tensor], right: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        grads = self.hand_vjp(self._built(d), self._built(left), self._built(right))
        if not isinstance(grads, (tuple, list)) or len(grads) != 2:
            raise TypeError(f"associative_scan: vjp must return (dleft, dright), not {type(grads).__name__}")
        return self._read("vjp", grads[0], left), self._read("vjp", grads[1], right)

    def _built(self, leaves: Sequence[Tensor]) -> Any:
        return tree_unflatten(list(leaves), self.spec)

    def _read(self, what: str, out: Any, like: Sequence[Tensor]) -> list[Tensor]:
        leaves, spec = tree_flatten(out)
        if spec != self.spec:
            raise TypeError(f"associative_scan: {what} returns something built as {spec}; the elements are {self.spec}")
        for k, (a, b) in enumerate(zip(leaves, like)):
            if not isinstance(a, Tensor) or a.dtype != b.dtype:
                got = a.dtype if isinstance(a, Tensor) else type(a).__name__
                raise TypeError(f"associative_scan: {what} returns {got} for leaf {k} of the elements, which is {b.dtype}")
            if a.shape != b.shape:
                raise ValueError(
                    f"associative_scan: {what} returns shape {tuple(a.shape)} for leaf {k}; its arguments have {tuple(b.shape)}"
                )
        return leaves

    def scan(self, x: list[Tensor]) -> list[Tensor]:
        """The prefixes; in Python's count positions 1, 3, … are those of the pairs."""
        n = self.size(x)
        if n < 2:
            return x
        y_pairs = self.scan(self.combine(self.every(x, 0, n - 1), self.every(x, 1, n)))
        first, m = self.span(x, 0, 1), (n - 1) // 2
        if not m:
            return self.interleave(first, y_pairs)
        rest = self.combine(self.span(y_pairs, 0, m), self.every(x, 2, n))
        return self.interleave(self.join(first, rest), y_pairs)

    def backward(self, dy: list[Tensor], x: list[Tensor], y: list[Tensor]) -> list[Tensor]:
        """The gradient of x from that of its prefixes y."""
        n = self.size(x)
        if n < 2:
            return dy
        m, left, right = (n - 1) // 2, self.every(x, 0, n - 1), self.every(x, 1, n)
        d_even, d_pairs, y_pairs = self.every(dy, 0, n), self.every(dy, 1, n), self.every(y, 1, n)
        if m:
            dl, dr = self.vjp(self.span(d_even, 1, m + 1), self.span(y_pairs, 0, m), self.every(x, 2, n))
            d_even = self.join(self.span(d_even, 0, 1), dr)
            d_pairs = self.plus(d_pairs, dl)
        d = self.backward(d_pairs, self.combine(left, right), y_pairs)
        d_left, d_right = self.vjp(d, left, right)
        # of what an even position has so far, all but the first's is from its own combination; the pairs' comes on top
        return self.interleave(self.plus(d_even, d_left), d_right)

    # --- along dim ---

    def size(self, x: list[Tensor]) -> int:
        return x[0].shape[self.dims[0]]

    def every(self, x: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
        return [t[(slice(None),) * d + (slice(start, stop, 2),)] for t, d in zip(x, self.dims)]

    def span(self, x: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
        return [t.narrow(d, start, stop - start) for t, d in zip(x, self.dims)]

    def join(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(pair, d) for *pair, d in zip(a, b, self.dims)]

    def plus(self, a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
        """A, and b added to as many of its first steps as b has."""
        n, m = self.size(a), self.size(b)
        if n == m:
            return [s + t for s, t in zip(a, b)]
        head = [s + t for s, t in zip(self.span(a, 0, m), b)]
        return self.join(head, self.span(a, m, n))

    def interleave(self, a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
        """a₀ b₀ a₁ b₁ …; a may be one longer."""
        n, m = self.size(a), self.size(b)
        pairs = [torch.stack(two, d + 1).flatten(d, d + 1) for *two, d in zip(self.span(a, 0, m), b, self.dims)]
        return pairs if n == m else self.join(pairs, self.span(a, m, n))


def _rule_of(n: int) -> str:
    """The name of the rule for elements of n tensors, which is made at the first call."""
    if n in _RULE_OF:
        return _RULE_OF[n]
    xs, ys = names("x", n), names("y", n)

    def forward(*args: Any) -> Any:
        out = _operator(args[n]).scan(list(args[:n]))
        return out[0] if n == 1 else tuple(out)

    def backward(*args: Any) -> Any:
        dy, x, y = args[:n], args[n : 2 * n], args[2 * n : 3 * n]
        filled = [torch.zeros_like(t) if d is None else d for d, t in zip(dy, y)]
        grads = _operator(args[3 * n]).backward(filled, list(x), list(y))
        return grads[0] if n == 1 else tuple(grads)

    rule = Rule(
        f"associative_scan_{n}",
        named(forward, [*xs, "operator"]),
        named(backward, [*("d" + y for y in ys), *xs, *ys, "operator"]),
        inputs=" ".join(xs),
        outputs=" ".join(ys),
        kernel=lambda: _kernel(n),
    )
    _RULE_OF[n] = rule.name
    return rule.name


def _pick(rule: str, backend: str, *args: Any) -> str:
    return pick("associative_scan", _RULES[rule], backend, *args)


@cache
def _kernel(n: int) -> Any:
    from bptoolkit.triton_kernels.associative_scan import of_operator

    return of_operator(n, _operator)


def _operator(given: Any) -> _Operator:
    return _KEPT[given] if isinstance(given, int) else given


def _key_of(fn: Any, vjp: Any, length: int | None, dims: tuple[int, ...], kernel: Any) -> int:
    """The number of an operator, for a graph."""
    known = _BY_FUNCTIONS.setdefault(fn, {})
    if (vjp, length, dims, kernel) not in known:
        spec = tree_flatten(torch.zeros(()) if length is None else tuple(torch.zeros(length)))[1]
        known[vjp, length, dims, kernel] = key = next(_KEYS)
        _KEPT[key] = _Operator(fn, vjp, spec, dims, kernel)
    return known[vjp, length, dims, kernel]


for _constant in (_key_of, _rule_of):  # Dynamo calls them while it traces, and takes what they return for a constant
    _constant._dynamo_marked_constant = True  # type: ignore[attr-defined, union-attr]


def _flat_length(elements: Any) -> int:
    if type(elements) is tuple and all(isinstance(t, Tensor) for t in elements):
        return len(elements)
    raise TypeError("associative_scan: under torch.compile, with a vjp, elements must be a tensor or a tuple of tensors")
