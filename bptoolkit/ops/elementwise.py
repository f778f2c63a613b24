"""What elementwise ops share: a choice per element, calls in place, the checks of their options, the Op of one input.

`torch.where` takes a branch per element on the CPU and `bool` results are slow to write there, together ten times what the
rest of an activation costs. Where nothing watches, a condition is therefore kept as 0 and 1 in the tensor's own dtype, and a
choice is integer arithmetic on the bits: b + m (a − b) with m = 0 or 1, exact whatever a and b are, infinite and NaN too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule, unwatched
from bptoolkit.op import Op
from bptoolkit.transforms import _transforms_active

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def holds(compare: Callable[..., Tensor], t: Tensor, bound: float, *others: Tensor) -> Tensor:
    """compare(t, bound), for an `either` with others: bool, or 0 and 1 in t's dtype where that is faster. + is or, * is and."""
    if t.device.type == "cpu" and unwatched(t, *others):
        return compare(t, bound, out=torch.empty_like(t))
    return compare(t, bound)


def either(on: Tensor, a: Tensor | float, b: Tensor | float, *, over: bool = False) -> Tensor:
    """A where `on`, else b; `on` is from `holds` and is used up; a tensor of the two has its dtype.

    With `over`, a is a tensor of the caller's own of on's shape, and may be written over too.
    """
    if on.dtype is torch.bool:
        return torch.where(on, a, b)
    bits = BITS[on.element_size()]
    m = on.view(bits)
    if isinstance(b, Tensor) and not isinstance(a, Tensor) and a == 0:
        return m.eq_(0).mul_(b.view(bits)).view(on.dtype)
    m.ne_(0)
    if not isinstance(b, Tensor) and b == 0 and isinstance(a, Tensor):
        return m.mul_(a.view(bits)).view(on.dtype)
    a, b = (t.view(bits) if isinstance(t, Tensor) else torch.full((), t, dtype=on.dtype).view(bits) for t in (a, b))
    return (a.sub_(b).mul_(m) if over else m.mul_(a - b)).add_(b).view(on.dtype)


class OverInput(torch.autograd.Function):
    """y over x, for eager autograd and rules that keep y: one buffer holds input, output and what backward needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rule: Rule, write: Callable[..., Any], *options: Any) -> Tensor:
        ctx.mark_dirty(x)
        write(x, *options)
        ctx.save_for_backward(x)
        ctx.call = rule, options
        return x

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        rule, options = ctx.call
        dx = rule.backward(*rule.arrange((*cotangents, *ctx.saved_tensors, *options, rule.Need(True))))
        return dx, None, None, *(None,) * len(options)


def in_place(op: Op, rule: Rule, x: Tensor, *options: Any, backend: str, write: Callable[..., Any] | None = None) -> Tensor:
    """The rule's y written over x, which is returned. `write(x, *options)` does so in torch, for a rule that keeps y alone."""
    refuse_leaf(op.name, x)
    watched = torch.compiler.is_compiling() or _transforms_active() or forward_ad._current_level >= 0
    if write is not None and not watched:
        OverInput.apply(x, rule, write, *options)
        return x
    keeps = x.clone() if "x" in rule.saved and torch.is_grad_enabled() else x  # backward needs what is about to be lost
    out = rule(keeps, *options, backend=backend)
    return x.copy_(out if isinstance(out, Tensor) else out[0])


def refuse_leaf(name: str, x: Tensor) -> None:
    """Raise, before any work, where autograd would after it."""
    if x.requires_grad and x.is_leaf and torch.is_grad_enabled():
        raise RuntimeError(f"{name}: inplace=True on a leaf tensor that requires grad: its value would be lost")


def check_numbers(op: str, **options: Any) -> None:
    """Raise TypeError unless every option is a number."""
    for name, value in options.items():
        if not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
            raise TypeError(f"{op}: {name} must be a number, not {type(value).__name__} ({value!r})")


def case(draw: Draw) -> Case:
    return Case((draw.tensor(*draw.batch(), draw.size(), scale=2.0),), {})


def bench(draw: Draw) -> Case:
    return Case((draw.tensor(64, 128, 512),), {})


def case_with(*options: dict[str, Any], scale: float = 2.0) -> Callable[[Draw], Case]:
    """A case with one of the options."""
    return lambda draw: Case((draw.tensor(*draw.batch(), draw.size(), scale=scale),), draw.choice(options))


def unary(call: Callable[..., Tensor], reference: Any, rules: Any, module: Any, source: str, **kw: Any) -> Op:
    """The Op of a function of one tensor, named as the function."""
    return Op(
        name=call.__name__,
        call=call,
        reference=reference,
        rules=rules if isinstance(rules, tuple) else (rules,),
        module=(module,),
        replaces=(module.__base__,),
        shapes="input: *B -> *B",
        source=source,
        **{"case": case, "bench": bench, **kw},
    )
