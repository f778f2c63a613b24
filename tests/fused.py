"""What the kernels' tests share: the fused rules beside the eager ones, and layouts that are odd in every way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
EPS32 = torch.finfo(torch.float32).eps


def normal(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def ragged(device: str, T: int, B: int) -> Tensor:
    """Lengths that are T, 0, 1, and in between."""
    return torch.tensor([(T, 0, 1, T - 1, T // 2)[k % 5] for k in range(B)], device=device, dtype=torch.int64).clamp(0)


def double(args: Any) -> list[Any]:
    return [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in args]


def near(got: Any, want: Any, dtype: torch.dtype, errors: float = 8, what: str = "") -> None:
    """got, in dtype, is the float64 value rounded once, up to `errors` roundings of float32 of the largest element's size."""
    assert (got is None) == (want is None), what
    if got is None:
        return
    assert got.dtype == dtype, f"{what} is {got.dtype}, the eager rule's is {dtype}"
    assert got.shape == want.shape, what
    if not got.is_floating_point():
        assert torch.equal(got, want), what
        return
    size = float(want[want.isfinite()].abs().max()) if want.isfinite().any() else 0.0
    rtol = torch.finfo(dtype).eps
    torch.testing.assert_close(
        got.double(), want, rtol=rtol, atol=errors * EPS32 * size, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def both_rules(
    rule: Any,
    *args: Any,
    need: Sequence[bool] | None = None,
    cotangents: Mapping[str, Any] | None = None,
    errors: float = 8,
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The kernel's forward and backward beside the eager rule's in float64, at the same values; compares all of it.

    Also: dtypes and shapes are those of the eager rule, a second run gives the same bits, and no input is written to.

    Args:
        rule: the Rule; its kernel is what is tested.
        args: its inputs and options.
        need: which inputs need a gradient; by default all that are of floating point.
        cotangents: "dy" and so on -> a tensor, or None for an output that nothing flows into; normal ones by default.
        errors: roundings of float32 that are allowed, of the size of the largest element.

    Returns:
        The kernel's outputs and gradients.
    """
    kernel, n = rule.kernel(), len(rule.inputs)
    assert kernel.unsupported(*args) is None
    inputs, options = args[:n], args[n:]
    before = [t.clone() if isinstance(t, Tensor) else t for t in inputs]
    out, like, exact = (_tuple(f(*a)) for f, a in ((kernel.forward, args), (rule.forward, args), (rule.forward, double(args))))
    assert len(out) == len(exact)
    for letter, got, want, e in zip(rule.outputs, out, exact, like):
        near(got, want, e.dtype, errors, letter)
    _same(out, _tuple(kernel.forward(*args)))
    given = cotangents or {}
    cots = []
    for k, (letter, o) in enumerate(zip(rule.outputs, out)):
        default = None if letter in rule.constants else normal(*o.shape, dtype=o.dtype, device=str(o.device), seed=7 + k)
        cots.append(given.get("d" + letter, default))
    if need is None:
        need = [isinstance(t, Tensor) and t.is_floating_point() for t in inputs]
    letters = dict(zip((*rule.inputs, *rule.outputs), (*inputs, *out)))
    used = frozenset().union(*(rule._uses[i] for i, wanted in zip(rule.inputs, need) if wanted))
    saved = [letters[s] if s in used else None for s in rule.saved]
    needed = rule.Need(*need)
    kept = [t.clone() if isinstance(t, Tensor) else t for t in (*cots, *saved)]
    pool = (*cots, *saved, *options, needed)
    grads = _tuple(kernel.backward(*rule.arrange(pool)))
    want = _tuple(rule.backward(*rule.arrange((*double(cots), *double(saved), *options, needed))))
    for letter, g, e, wanted, t in zip(rule.inputs, grads, want, need, inputs):
        if wanted and not (e is None and g is None):
            near(g, torch.zeros_like(t).double() if e is None else e, t.dtype, errors, "d" + letter)
    _same(grads, _tuple(kernel.backward(*rule.arrange(pool))))
    for t, old in zip((*inputs, *cots, *saved), (*before, *kept)):
        if isinstance(t, Tensor):
            assert torch.equal(t.nan_to_num(), old.nan_to_num()), "a tensor that was only to be read has been written to"
    return out, grads


def by_name(op: Any) -> Callable[..., Any]:
    """The op's function, its kernel asked for by name."""
    return lambda *a, **kw: op.call(*a, **kw, backend="triton")


def takes(op: Any, case: Any) -> bool:
    """Whether the kernel takes the call."""
    try:
        by_name(op)(*case.args, **case.kwargs)
    except ValueError as error:
        if "backend='triton' cannot run here" not in str(error):
            raise
        return False
    return True


def _tuple(out: Any) -> tuple[Any, ...]:
    return tuple(out) if isinstance(out, (tuple, list)) else (out,)


def _same(a: Sequence[Any], b: Sequence[Any]) -> None:
    for s, t in zip(a, b):
        if isinstance(s, Tensor):
            assert torch.equal(s.nan_to_num(), t.nan_to_num()), "another run gives other bits"


GIVEN_AND_NEEDED = [
    (w, b, need)
    for w, b, *need in product((True, False), repeat=5)
    if any(need) and w >= need[1] and b >= need[2]  # x always, w and b if they are given
]
"""For a norm of x with w and b: whether each of the two is given, and what needs a gradient."""


LAYOUTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "columns two apart": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "rows three apart": lambda t: t.repeat_interleave(3, 0)[::3],
    "transposed": lambda t: t.mT.contiguous().mT,
    "one row for all": lambda t: t[:1].expand_as(t),
    "one element for all": lambda t: t.flatten()[0].expand_as(t),
    "off by one element": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view_as(t),
}
"""Matrices, two dimensions or more, in other layouts; the second, third and last keep the values."""
