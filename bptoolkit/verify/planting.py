"""How a mistake is planted into an `autograd.Function`: wrappers around its backward, its forward, its context.

The process that runs the tests loads this file and `mutants.py` by their folder, under another package's name, where bptoolkit
need not be installed or may be half imported: the two import torch and each other (relatively) alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Gradients = list[Any]


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes:
        name: of the mutant.
        group: its class, a line of the table.
        words: the mistake, in plain words.
        advice: the kind of test that notices it.
        backward: what it does to one call of backward.
        each: it is planted into one gradient at a time, all of which are tried.
        waits: it shows only in a call that tests must think of (a layout, a size); one that no test makes is a survivor. Any
            other mutant that finds nothing to spoil does not apply to the function.
        notes: backward has to know the inputs of forward.
        also: spoils forward, its context or jvp: `also(cls, say)`.
    """

    name: str
    group: str
    words: str
    advice: str
    backward: Callable[[Call], Gradients | None]
    each: bool = False
    waits: bool = False
    notes: bool = False
    also: Callable[[Any, Callable[[str], None]], None] | None = None


@dataclass
class Call:
    """One call of backward: `original` as written, what is `kept` from call to call, and `which` gradient to spoil."""

    ctx: Any
    cotangents: tuple[Any, ...]
    original: Callable[..., Any]
    kept: dict[Any, Any]
    which: int | None
    say: Callable[[str], None]
    result: Any = field(default=None)
    ran: bool = False

    def run(self, ctx: Any = None, cotangents: Sequence[Any] | None = None) -> Gradients:
        """The gradients as written, or those of another context or other cotangents."""
        out = self.original(self.ctx if ctx is None else ctx, *(self.cotangents if cotangents is None else cotangents))
        if ctx is None and cotangents is None:
            self.result, self.ran = out, True
        return list(out) if isinstance(out, tuple | list) else [out]

    def each(self, change: Callable[[Tensor], Tensor | None]) -> Gradients | None:
        """The gradients, changed (the one to spoil, or all of them); None if none of them can be."""
        grads, found = self.run(), False
        for k, g in enumerate(grads):
            if isinstance(g, Tensor) and self.which in (None, k) and (new := change(g)) is not None:
                grads[k], found = new, True
        return grads if found else None


MUTANTS: dict[str, Mutant] = {}


def mutant(group: str, words: str, advice: str, **how: Any) -> Callable[[Callable[[Call], Gradients | None]], Any]:
    """Adds a function to `MUTANTS` under its name."""

    def add(f: Callable[[Call], Gradients | None]) -> Callable[[Call], Gradients | None]:
        name = f.__name__.strip("_")
        MUTANTS[name] = Mutant(name, group, words, advice, f, **how)
        return f

    return add


def plain(t: Any) -> bool:
    """A tensor with memory of its own to read: no functorch wrapper, no fake tensor."""
    ordinary = type(t) in (Tensor, torch.nn.Parameter) and t.device.type != "meta"
    return ordinary and not torch._C._functorch.is_functorch_wrapped_tensor(t)


def on_forward(cls: Any, note: Callable[[Any, Any], None]) -> None:
    """Call `note(ctx, inputs)` before the context is filled, in either of the two styles of a Function."""
    name = "forward" if cls.setup_context is torch.autograd.Function.setup_context else "setup_context"
    original = getattr(cls, name)

    @functools.wraps(original)
    def wrapper(ctx: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            note(ctx, args if name == "forward" else args[0] if args else kwargs["inputs"])
        return original(ctx, *args, **kwargs)

    setattr(cls, name, staticmethod(wrapper))


def _note_inputs(ctx: Any, inputs: Any) -> None:
    """Layout and place of the floating-point inputs; no tensor is kept alive."""
    ctx.planted_inputs = [
        (k, t.is_contiguous() if plain(t) else True, tuple(t.shape))
        for k, t in enumerate(inputs)
        if isinstance(t, Tensor) and t.is_floating_point()
    ]


def noted(ctx: Any) -> list[tuple[int, bool, tuple[int, ...]]]:
    """Per floating-point input of forward: its place, whether it is contiguous, its shape."""
    return getattr(ctx, "planted_inputs", [])


def plant(cls: Any, name: str, which: int | None, say: Callable[[str], None]) -> None:
    """Plant one mutant into an `autograd.Function`; "harmless" changes nothing and "raises" always raises.

    `say` is told "called", "applied", "possible" (the mistake fits the function), and "gradient-N" for each that is a tensor.
    """
    chosen = MUTANTS.get(name)
    kept: dict[Any, Any] = {}
    verb = "backward" if cls.vjp is torch.autograd.Function.vjp else "vjp"
    original = getattr(cls, verb)
    if chosen is not None and chosen.notes:
        on_forward(cls, _note_inputs)

    @functools.wraps(original)
    def backward(ctx: Any, *cotangents: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(ctx, *cotangents)
        say("called")
        if name == "raises":
            raise RuntimeError("planted by bptoolkit verify --mutate: this backward raises")
        call = Call(ctx, cotangents, original, kept, which, say)
        grads = chosen.backward(call) if chosen is not None else None
        if grads is not None:
            say("applied")
            return tuple(grads)
        if not call.ran:
            call.run()
        if name == "harmless":
            for k, g in enumerate(call.result if isinstance(call.result, tuple | list) else (call.result,)):
                if isinstance(g, Tensor):
                    say(f"gradient-{k}")
        return call.result

    setattr(cls, verb, staticmethod(backward))
    if chosen is not None and chosen.also is not None:
        chosen.also(cls, say)
