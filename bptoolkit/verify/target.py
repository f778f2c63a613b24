"""What is verified: any callable, as a function of the tensors to differentiate by alone."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from bptoolkit.function import Rule
from bptoolkit.op import Op
from bptoolkit.verify.contract import Contract
from bptoolkit.verify.inputs import Arguments, FromExamples, FromOp, FromShapes, FromStrategy, Source
from bptoolkit.verify.point import Point
from bptoolkit.verify.trial import NotApplicable, Outputs, Trial


class Unusable(TypeError):
    """The function does not return what can be verified."""


@dataclass
class Target:
    """What is verified, ready to be called.

    Attributes:
        name: for the report.
        fn, reference: as functions of the arguments; a module is called with its parameters as further arguments.
        source: makes the arguments.
        contract: what is claimed.
        given: the function as the caller gave it.
        wide: it takes float64.
    """

    name: str
    fn: Callable[..., Any]
    reference: Callable[..., Any] | None
    source: Source
    contract: Contract
    given: Any
    modules: tuple[Any, Any] = (None, None)
    wide: bool = True

    def trial(self, point: Point) -> Trial:
        """The trial of a point.

        Raises:
            NotApplicable: the source has no such call.
        """
        made = self.source.make(point)
        names = self.source.names_at(point) if isinstance(self.source, FromOp) else self.source.names
        if not made.where:
            raise NotApplicable("this case has nothing to differentiate by")
        values = tuple(made.flat[k].detach().contiguous() for k in made.where)
        parameters = _parameters(self.modules[0], point)
        call = _bind(self.fn, made, len(values), self.modules[0], parameters)
        reference = None
        if self.reference is not None:
            reference = _bind(self.reference, made, len(values), self.modules[1], parameters)
        return Trial(
            call=call,
            reference=reference,
            names=(*names, *parameters),
            values=(*values, *parameters.values()),
            point=point,
            contract=self.contract,
            fn=self.given,
            wide=self.wide,
        )


def target_of(
    fn: Any, inputs: Any, reference: Any, contract: Contract, seed: int, quick: bool, cases: int | None = None
) -> Target:
    """The target for what the caller gave.

    Raises:
        TypeError: fn is not callable, or inputs is nothing that arguments can be made of.
        ValueError: a shapes string that is none, or nothing to differentiate by.
    """
    if isinstance(fn, Op):
        if inputs is not None:
            raise TypeError(f"verify: {fn.name} is an Op and draws its own inputs; leave inputs out")
        count = cases or (8 if quick else 24)
        claims: dict[str, Any] = {
            "double_backward": fn.twice,
            "forward_mode": True,
            "vmap": True,
            "compile": True,
            "autocast": True,
        }
        contract = replace(
            contract, random=contract.random or fn.random, **{k: v for k, v in claims.items() if getattr(contract, k) is None}
        )
        return Target(fn.name, fn.call, reference or fn.reference, FromOp(fn, seed, count), contract, fn.call)
    given = fn
    if isinstance(fn, type) and issubclass(fn, torch.autograd.Function):
        fn = fn.apply
    if not callable(fn):
        raise TypeError(f"verify: fn must be callable, not {type(fn).__name__} ({fn!r})")
    if reference is not None and not callable(reference):
        raise TypeError(f"verify: reference must be callable, not {type(reference).__name__} ({reference!r})")
    if isinstance(reference, type) and issubclass(reference, torch.autograd.Function):
        reference = reference.apply
    name = name_of(given)
    asked = reference if inspect.isfunction(reference) else _forward_of(given) or fn
    source: Source
    if isinstance(inputs, str):
        source = FromShapes(inputs, quick)
    elif _is_strategy(inputs):
        source = FromStrategy(inputs, asked, seed, 40)
    else:
        if isinstance(inputs, Tensor):
            inputs = (inputs,)
        if not isinstance(inputs, (tuple, list)):
            raise TypeError(
                f"verify: inputs of {name} must be a shapes string, a tuple of arguments or a Hypothesis strategy, "
                f"not {type(inputs).__name__} ({inputs!r})"
            )
        source = FromExamples(inputs, asked, quick)
        if not source.where and not isinstance(fn, nn.Module):
            raise ValueError(f"verify: there is no floating-point tensor to differentiate by among the inputs of {name}")
    modules = (fn if isinstance(fn, nn.Module) else None, _module_behind(reference, fn))
    target = Target(name, fn, reference, source, contract, given, modules)
    if isinstance(source, FromExamples):
        probe = replace(target, fn=reference or fn, reference=None, modules=(modules[1] if reference else modules[0], None))
        source.probe(lambda point: _runs(probe, point))
    return target


def _forward_of(given: Any) -> Any:
    """The forward of an `autograd.Function` as a function of what `apply` takes, for the names of its arguments; else None."""
    owner = given if isinstance(given, type) else getattr(given, "__self__", None)
    if not (isinstance(owner, type) and issubclass(owner, torch.autograd.Function)):
        return None
    if owner.setup_context is not torch.autograd.Function.setup_context:
        return owner.forward
    return functools.partial(owner.forward, None)  # its first argument is ctx


def name_of(fn: Any) -> str:
    """What to call a callable in a report."""
    if isinstance(fn, Rule):
        return fn.name
    owner = getattr(fn, "__self__", None)
    if getattr(fn, "__name__", "") == "apply" and isinstance(owner, type):
        return owner.__qualname__
    return str(
        getattr(fn, "__qualname__", None) or getattr(fn, "_qualname", None) or getattr(fn, "_name", None) or type(fn).__name__
    )


def _is_strategy(inputs: Any) -> bool:
    """Whether it is a Hypothesis strategy, without importing Hypothesis."""
    return any(c.__name__ == "SearchStrategy" and c.__module__.startswith("hypothesis") for c in type(inputs).__mro__)


def _runs(target: Target, point: Point) -> bool:
    """Whether a call at a point runs, gradients and all."""
    try:
        trial = target.trial(point)
        xs = trial.leaves()
        outputs = trial.run(xs)
        trial.gradients(outputs, xs, trial.cotangents(outputs))
    except Exception:
        return False
    return True


def _module_behind(reference: Any, fn: Any) -> Any:
    """The module whose parameters a reference uses: itself, the one it is a method of, or the one under test."""
    if isinstance(reference, nn.Module):
        return reference
    if isinstance(getattr(reference, "__self__", None), nn.Module):
        return reference.__self__
    return fn if isinstance(fn, nn.Module) and reference is not None else None


def _parameters(module: Any, point: Point) -> dict[str, Tensor]:
    """The parameters of a module that require grad, in the dtype of a point; its own values at the first draw, others later."""
    if not isinstance(module, nn.Module):
        return {}
    g = torch.Generator().manual_seed(point.seed)
    found = {}
    for name, p in module.named_parameters():
        if p.requires_grad and p.is_floating_point():
            value = p.detach().to(point.torch_dtype).contiguous().clone()
            noise = torch.randn(value.shape, generator=g, dtype=torch.float64).to(value)
            found[name] = value if point.seed % 1000 == 0 else value + 0.3 * noise
    return found


class _Holder(nn.Module):
    """Calls any function while the parameters of a module are exchanged: `functional_call` exchanges those of what it calls."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, fn: Any, args: Any, kwargs: Any) -> Any:
        return fn(*args, **kwargs)


def _bind(fn: Any, made: Arguments, n: int, module: Any, parameters: dict[str, Tensor]) -> Callable[..., Outputs]:
    """The function of its differentiable tensors (then the module's parameters) alone, giving its floating-point outputs."""
    flat, spec, where = made
    holder = None if module is None else _Holder(module)  # made once: Dynamo refuses modules that are made inside a call

    def bound(*tensors: Tensor) -> Outputs:
        dtype, device = tensors[0].dtype, tensors[0].device
        filled = [_follow(t, dtype, device) for t in flat]
        for k, t in zip(where, tensors):
            filled[k] = t
        args, kwargs = tree_unflatten(filled, spec)
        if holder is None:
            out = fn(*args, **kwargs)
        else:
            state = {f"module.{name}": _follow(b.clone(), dtype, device) for name, b in module.named_buffers()}
            frozen = {
                f"module.{name}": p.detach().to(device, dtype) for name, p in module.named_parameters() if not p.requires_grad
            }
            own = {f"module.{name}": p for name, p in zip(parameters, tensors[n:])}
            out = torch.func.functional_call(holder, {**state, **frozen, **own}, (fn, args, kwargs))
        found = tuple(o for o in tree_flatten(out)[0] if isinstance(o, Tensor) and o.is_floating_point())
        if not found:
            raise Unusable(f"verify: {name_of(fn)} returned {type(out).__name__}, with no floating-point tensor in it")
        return found

    return bound


def _follow(t: Any, dtype: torch.dtype, device: Any) -> Any:
    """The other arguments go with the tensors to differentiate by, in dtype and device."""
    if not isinstance(t, Tensor):
        return t
    return t.to(device, dtype) if t.is_floating_point() else t.to(device)
