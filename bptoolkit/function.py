"""From two rules to a differentiable function.

An op states `forward` and `backward` as plain functions in the letters of the maths; `Rule` derives everything else:

- reverse mode    an `autograd.Function` over the two rules;
- higher order    `backward` is plain torch over *inputs and outputs*, so autograd differentiates it again. Whatever else it
                  would like to keep (cell states, log-sum-exp, statistics) is a further output of `forward`;
- forward mode    u ↦ backward(u) is linear, with matrix Jᵀ; its own vjp is therefore J, and `jvp` is not written by hand; a
                  rule whose backward has a vjp of its own may name that (`push`);
- vmap            functorch batches both rules (`generate_vmap_rule`);
- torch.compile   Dynamo sees the one call `in_graph(...)` and leaves its inside to AOTAutograd, which traces both rules.

Only the letters that `backward` names are saved, and of those only what the needed gradients use.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections import namedtuple
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

import torch
from torch.autograd import forward_ad

from bptoolkit.choose import State, choose
from bptoolkit.grad_norms import unrecorded
from bptoolkit.transforms import (
    _legacy_batched,
    _transforms_active,
    _unwrap,
    batched_alike,
    primals,
    refuse_nested_forward_mode,
    whole,
)

_RULES: dict[str, Rule] = {}
_PYTHON_APPLY = "apply" in torch.autograd.Function.__dict__  # torch <= 2.13 binds inspect.signature on every apply
_autocast = torch._C._is_any_autocast_enabled


class Rule:
    """One differentiable function, stated by its forward and its backward.

    Args:
        name: the rule's name, unique in the process.
        forward: `forward(*inputs, *options)` -> one tensor, or a tuple with one tensor per output.
        backward: takes by name whatever it uses of `d<output>` (the cotangents), inputs, outputs, options and `need`, and
            returns one gradient (or None) per input. `need.x` says whether the gradient of `x` is wanted. With several
            outputs a cotangent may be None: nothing flowed into that output.
        inputs: the letters of the tensor inputs, in order, separated by spaces. An input may be None in a call.
        outputs: the letters of the outputs. Residuals that backward wants are outputs like the others; the public function
            that wraps the rule hides them.
        uses: input letter -> the saved letters its gradient uses; what no needed gradient uses is not saved. An input that
            is left out uses everything.
        constants: outputs without a derivative (masks, indices).
        push: `push(tangents, *args)` -> the tangents of the outputs that are not constants, from those of the inputs, each one
            or None, and the arguments of backward, with cotangents of zeros; where J can be had without running backward.
        kernel: imports and returns the `bptoolkit.triton_kernels.kernel.Kernel` that has the same two rules, fused; or None.
            (A function with the import written out, which Dynamo can follow; the first call that uses it imports Triton.)
        on_request: why backend="auto" leaves every call to the eager rules, so that the kernel runs by name alone; or None.

    Example:
        >>> square = Rule("doc_square", lambda x: x * x, lambda dy, x: 2 * x * dy, inputs="x", outputs="y")
        >>> torch.func.jacfwd(square)(torch.tensor(3.0))
        tensor(6.)
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Any],
        backward: Callable[..., Any],
        *,
        inputs: str,
        outputs: str,
        uses: Mapping[str, str] | None = None,
        constants: str = "",
        push: Callable[..., Any] | None = None,
        kernel: Callable[[], Any] | None = None,
        on_request: str | None = None,
    ) -> None:
        self.name, self.forward, self.backward, self.push = name, forward, backward, push
        self.kernel, self.on_request = kernel, on_request
        self.inputs, self.outputs, self.constants = (
            tuple(inputs.split()),
            tuple(outputs.split()),
            tuple(constants.split()),
        )
        self.Need: Any = namedtuple("Need", self.inputs)  # type: ignore[misc]
        parameters = tuple(inspect.signature(forward).parameters)
        if parameters[: len(self.inputs)] != self.inputs:
            raise TypeError(f"{name}: forward takes {parameters}, which does not begin with the inputs {self.inputs}")
        self.options = parameters[len(self.inputs) :]
        self.saved = self._read_backward()
        self._uses = self._read_uses(uses or {})
        self._by_need: dict[tuple[bool, ...], tuple[Any, Any]] = {}
        self.function = _function(self)
        self.apply = plain_apply(self.function)
        _RULES[name] = self

    def _read_backward(self) -> tuple[str, ...]:
        """What backward asks for, by name: the letters to save, and where each of its arguments comes from."""
        cotangents = tuple("d" + o for o in self.outputs)
        asked = tuple(inspect.signature(self.backward).parameters)
        saved = tuple(p for p in asked if p in self.inputs + self.outputs and p not in cotangents)
        pool = (*cotangents, *saved, *self.options, "need")
        for p in asked:
            if p not in pool:
                known = (*cotangents, *self.inputs, *self.outputs, *self.options, "need")
                raise TypeError(f"{self.name}: backward asks for '{p}'; it can have {', '.join(known)}")
        self._arguments = tuple(pool.index(p) for p in asked)
        return saved

    def arrange(self, pool: tuple[Any, ...]) -> list[Any]:
        """The arguments of backward in its own order, out of (*cotangents, *saved, *options, need)."""
        return [pool[k] for k in self._arguments]

    def _read_uses(self, uses: Mapping[str, str]) -> dict[str, frozenset[str]]:
        """Per input: which of the saved letters its gradient uses."""
        for letter, used in uses.items():
            if letter not in self.inputs or not set(used.split()) <= set(self.saved):
                raise TypeError(f"{self.name}: uses={{{letter!r}: {used!r}}} names a letter backward does not take")
        return {i: frozenset(uses[i].split() if i in uses else self.saved) for i in self.inputs}

    def needed(self, need: tuple[bool, ...]) -> tuple[Any, Callable[[tuple[Any, ...]], tuple[Any, ...]]]:
        """`need` as backward gets it, and what picks the letters to save out of (*inputs, *outputs, None)."""
        found = self._by_need.get(need)
        if found is None:
            used = frozenset().union(*(self._uses[i] for i, wanted in zip(self.inputs, need) if wanted))
            letters = self.inputs + self.outputs
            at = [letters.index(s) if s in used else len(letters) for s in self.saved]
            found = self._by_need[need] = self.Need(*need), _picker(at)
        return found

    def __call__(self, *args: Any, backend: str = "eager") -> Any:
        """Run the rule on its inputs and options, all positional.

        `backend` is what `pick` resolved: "eager" or "triton".
        """
        return in_graph(self.name, backend, *args)

    def __repr__(self) -> str:
        return f"Rule({self.name}: {' '.join(self.inputs)} -> {' '.join(self.outputs)})"


def _picker(at: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """What picks the given places out of a tuple."""
    if len(at) > 1:
        return itemgetter(*at)
    return (lambda pool: (pool[at[0]],)) if at else (lambda pool: ())


def in_graph(name: str, backend: str, *args: Any) -> Any:
    """The one call that Dynamo keeps whole (`allow_in_graph`) and AOTAutograd traces into.

    Everything that changes the result is an argument, since what is read inside is baked into the graph.
    """
    rule = _RULES[name]
    if _transforms_active():
        return rule.function.apply(backend, *whole(args))
    return rule.apply(backend, *[_unwrap(a) if isinstance(a, torch.Tensor) else a for a in args])


def plain_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` for calls outside functorch, on arguments that have been through `unwrap_dead`.

    In torch <= 2.13 the Python apply binds `inspect.signature(forward)` on every call, 18 µs; this goes past it.
    """
    return super(torch.autograd.Function, function).apply if _PYTHON_APPLY else function.apply  # type: ignore[misc]


def unwatched(*tensors: torch.Tensor | None) -> bool:
    """Whether a rule may work in place and in chunks: nothing differentiates, batches or traces what it does."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():  # compiled autograd has Dynamo read the rules
        return False
    if _transforms_active() or torch._C._len_torch_dispatch_stack():
        return False
    return all(t is None or type(t) in (torch.Tensor, torch.nn.Parameter) for t in tensors) and not _legacy_batched(tensors)


_hidden = 0  # blocks of functional_calls that are open, in any thread


def hidden(more: int) -> None:
    """While more than 0 in sum, rules run out of sight of function modes, as torch's own kernels do."""
    global _hidden
    _hidden += more


class _Apart:
    """Run a rule as its tensors are, by torch's own functions; the public function has cast and chosen already."""

    __slots__ = ("guards",)

    def __enter__(self) -> None:
        self.guards: list[Any] = []
        if _autocast():
            self.guards.append(torch._C._DisableAutocast())
        if _hidden:
            self.guards.append(torch._C.DisableTorchFunction())
        for guard in self.guards:
            guard.__enter__()

    def __exit__(self, *exc: object) -> None:
        for guard in reversed(self.guards):
            guard.__exit__(*exc)


def _function(rule: Rule) -> type[torch.autograd.Function]:
    """The autograd.Function of a rule: glue, no maths."""
    n, single = len(rule.inputs), len(rule.outputs) == 1
    constants = tuple(rule.outputs.index(c) for c in rule.constants)
    everything: Any = rule.needed((True,) * n)[1]

    nothing = (None,) * len(rule.options)  # the gradients of the options

    def again(backend: str) -> tuple[Any, Any]:
        """The backward that can be differentiated again, pushed forward and batched; and its `push`."""
        kernel = rule.kernel() if rule.kernel is not None and backend != "eager" else None
        return (rule.backward, rule.push) if kernel is None or kernel.again is None else (kernel.again, kernel.push)

    def backward_of(backend: str, cotangents: tuple[Any, ...]) -> Any:
        """Which backward runs, where the forward's backend is not the eager one."""
        assert rule.kernel is not None
        watched = _transforms_active() or _legacy_batched(cotangents)
        state = State("auto", "backward", True, True, watched, torch.is_grad_enabled(), None)
        return rule.kernel().backward if choose(state).rule == backend else again(backend)[0]

    class F(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(backend: str, *args: Any) -> Any:
            run = (rule if backend == "eager" or rule.kernel is None else rule.kernel()).forward
            if _hidden or _autocast():
                with _Apart():
                    out = run(*args)
            else:
                out = run(*args)
            return out if single or not _transforms_active() else batched_alike(out, args, constants)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            outputs = (output,) if single else tuple(output)
            letters = (*inputs[1 : n + 1], *outputs, None)
            if _transforms_active() or forward_ad._current_level >= 0:
                # Under vmap the two lists must be alike: functorch remembers one set of batch dimensions for both.
                kept = everything(letters)
                ctx.save_for_forward(*kept)
                ctx.save_for_backward(*kept)
                ctx.like = [(o.shape, o.dtype, o.device) for o in outputs]
            else:
                _, pick = rule.needed(ctx.needs_input_grad[1 : n + 1])
                ctx.save_for_backward(*pick(letters))
            ctx.call = inputs[0], inputs[n + 1 :]
            if not single:
                ctx.set_materialize_grads(False)
            if constants:
                ctx.mark_non_differentiable(*(outputs[c] for c in constants))
                # on what an inner vmap has batched the mark has no effect, and jvp has to return a tangent for it
                ctx.unmarked = [c for c in constants if torch._C._functorch.is_batchedtensor(outputs[c])]

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            if cotangents[0] is None and all(c is None for c in cotangents):
                return None, *(None,) * n, *nothing
            backend, options = ctx.call
            need, _ = rule.needed(ctx.needs_input_grad[1 : n + 1])
            args = rule.arrange((*cotangents, *ctx.saved_tensors, *options, need))
            run = rule.backward if backend == "eager" else backward_of(backend, cotangents)
            if _hidden or _autocast():
                with _Apart():
                    grads = run(*args)
            else:
                grads = run(*args)
            return (None, *grads, *nothing) if n > 1 else (None, grads, *nothing)

        @staticmethod
        def jvp(ctx: Any, _: Any, *tangents: Any) -> Any:
            refuse_nested_forward_mode(rule.name)
            need: Any = rule.Need(*[t is not None for t in tangents[:n]])
            saved = primals(ctx.saved_tensors)
            backend, options = ctx.call
            run, push = again(backend)
            live = [k for k in range(len(rule.outputs)) if k not in constants]

            def arguments(us: Any) -> list[Any]:
                cotangents: list[Any] = [None] * len(rule.outputs)
                for k, u in zip(live, us):
                    cotangents[k] = u
                return rule.arrange((*cotangents, *saved, *options, need))

            def transpose(*us: Any) -> Any:
                grads = run(*arguments(us))
                return tuple(g for g, wanted in zip(grads if n > 1 else (grads,), need) if wanted)

            like = [ctx.like[k] for k in live]
            with _Apart(), unrecorded():
                zeros = [torch.zeros(s, dtype=d, device=v) for s, d, v in like]
                if push is not None:
                    pushed = push(tangents[:n], *arguments(zeros))
                else:
                    pushed = torch.func.vjp(transpose, *zeros)[1](tuple(t for t in tangents[:n] if t is not None))
            out: list[Any] = [None] * len(rule.outputs)
            for k, p in zip(live, pushed):
                out[k] = p
            for k in ctx.unmarked if constants else ():
                shape, dtype, device = ctx.like[k]
                out[k] = torch.zeros(shape, dtype=dtype, device=device) if dtype.is_floating_point else None
            return out[0] if single else tuple(out)

    F.__name__ = F.__qualname__ = "".join(w.capitalize() for w in rule.name.split("_")) + "Function"
    F.__doc__ = f"The rules of {rule.name}, for autograd."
    return F


def _mark_for_dynamo() -> None:
    from bptoolkit.dynamo import admit_recurrent_modules

    torch.compiler.allow_in_graph(in_graph)
    admit_recurrent_modules()


class _WhenDynamoIsImported:
    """Marks `in_graph` the moment torch._dynamo has been imported: importing it here would cost seconds and Triton."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "torch._dynamo":
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            load(module)
            _mark_for_dynamo()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "torch._dynamo" in sys.modules:
    _mark_for_dynamo()
else:
    sys.meta_path.insert(0, _WhenDynamoIsImported())  # type: ignore[arg-type]
