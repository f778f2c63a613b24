"""Loops over time or blocks, as one node of a graph.

torch.compile and export unroll a Python loop: 155 s of compiling for an LSTM of 64 steps. `Opaque` registers the loop as an
operator, `bptoolkit::<name>`, which graphs keep whole, and its vjp as a second one, `bptoolkit::<name>_vjp`, so that a rule can
call the loop and still be differentiated again. On every device the operator runs the loop's own plain torch.

A loop may give its vjp by hand (attention does, to stay linear in memory); otherwise autograd of the loop gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bptoolkit.function import _Apart, plain_apply
from bptoolkit.transforms import (
    _legacy_batched,
    _transforms_active,
    primals,
    refuse_nested_forward_mode,
    unwrap_dead,
    whole,
)

_LIBRARY = torch.library.Library("bptoolkit", "DEF")
_KEY = "CompositeExplicitAutograd"
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


class Opaque:
    """A function that graphs see as one node.

    Args:
        name: the operator's name.
        loop: the function, with annotated parameters: tensors (`Tensor`, `Tensor | None`) first, then options (`int`, `float`,
            `bool`, `str`, `list[int]`...). It returns new tensors, one (`-> Tensor`) or several (`-> tuple[Tensor, Tensor]`),
            that share no memory with each other or the inputs.
        fake: the same parameters -> empty outputs of the right shapes; must not loop.
        vmap: `vmap(call, batch, *args)`, where every tensor of args is batched in its first dimension, or has been left out of
            the batch (see `batched`); or "leading" if the loop takes any leading dimensions; or None: one call per sample.
        vjp: `vjp(cotangents, need, *args)` -> a gradient or None per tensor of args, or None to derive it. A cotangent may be
            None. `need` is a list of bools, one per tensor.
        jvp: `jvp(tangents, *args)` -> the outputs' tangents; or None to derive it by transposing the vjp. It may return
            NotImplemented for a call: then it is derived.
        fast: the same function as `loop`, free to work in place; the operator runs it, while derivatives are those of `loop`.
        fast_vjp: the same function as `vjp`, or as autograd of `loop`, free to work in place; the vjp's operator runs it. It
            may return NotImplemented for a call.
    """

    def __init__(
        self,
        name: str,
        loop: Callable[..., Any],
        fake: Callable[..., Any],
        *,
        vmap: Callable[..., Any] | str | None = None,
        vjp: Callable[..., Any] | None = None,
        jvp: Callable[..., Any] | None = None,
        fast: Callable[..., Any] | None = None,
        fast_vjp: Callable[..., Any] | None = None,
    ) -> None:
        self.name, self.loop, self.fake, self.vmap, self.hand_vjp, self.hand_jvp = name, loop, fake, vmap, vjp, jvp
        self.fast_vjp = fast_vjp
        schema = torch.library.infer_schema(loop, mutates_args=())
        self.op = _define(name, schema, fast or loop, fake, self._vmap)
        arguments = self.op._schema.arguments
        self.tensors = sum(str(a.type) in ("Tensor", "Optional[Tensor]") for a in arguments)
        if any(str(a.type) in ("Tensor", "Optional[Tensor]") for a in arguments[self.tensors :]):
            raise TypeError(f"{name}: the tensors must come first in {schema}")
        self.single = len(self.op._schema.returns) == 1
        vjp_schema = f"(Tensor?[] cotangents, bool[] need, {schema[1:].split(' -> ')[0]} -> Tensor[]"
        self.vjp_op = _define(name + "_vjp", vjp_schema, self._vjp_kernel, self._vjp_fake, self._vmap_vjp)
        self.function, self.vjp_function = _function(self), _vjp_function(self)

    def __call__(self, *args: Any) -> Any:
        """Run the loop. Differentiable, and batched by vmap."""
        if torch.is_grad_enabled() or _transforms_active():
            return self._apply(self.function, *args)
        return self.run(*args)

    def _apply(self, function: type[torch.autograd.Function], *args: Any) -> Any:
        if _transforms_active():
            return function.apply(*whole(args))
        return plain_apply(function)(*unwrap_dead(args))

    def run(self, *args: Any) -> Any:
        """The operator; under the batching of is_grads_batched=True, which knows no list arguments, the loop itself."""
        return (self.loop if _legacy_batched(args) else self.op)(*args)

    def run_vjp(self, cotangents: Sequence[Tensor | None], need: Sequence[bool], *args: Any) -> list[Tensor]:
        """The same for the vjp; a gradient that is not needed comes back empty."""
        run = self._vjp_kernel if _legacy_batched((*cotangents, *args)) else self.vjp_op
        return run(list(cotangents), list(need), *args)

    def vjp(self, cotangents: Sequence[Tensor | None], need: Sequence[bool], *args: Any) -> tuple[Tensor | None, ...]:
        """The gradients of the tensors of args: None where need is False. Differentiable."""
        if torch.is_grad_enabled() or _transforms_active():
            grads = self._apply(self.vjp_function, len(cotangents), tuple(need), *cotangents, *args)
        else:
            grads = self.run_vjp(cotangents, need, *args)
        return tuple(g if n else None for g, n in zip(grads, need))

    def eager_vjp(self, cotangents: Sequence[Tensor | None], need: Sequence[bool], *args: Any) -> list[Tensor | None]:
        """The same in plain torch, loop and all."""
        if self.hand_vjp is not None:
            return list(self.hand_vjp(cotangents, need, *args))
        tensors, options = args[: self.tensors], args[self.tensors :]
        at = [k for k, n in enumerate(need) if n]
        live = [k for k, c in enumerate(cotangents) if c is not None]

        def of_needed(*needed: Tensor) -> tuple[Tensor, ...]:
            filled = list(tensors)
            for k, t in zip(at, needed):
                filled[k] = t
            out = self.loop(*filled, *options)
            out = (out,) if self.single else out
            return tuple(out[k] for k in live)

        with torch.enable_grad():
            pulled = torch.func.vjp(of_needed, *(tensors[k] for k in at))[1](tuple(cotangents[k] for k in live))
        grads: list[Tensor | None] = [None] * len(tensors)
        for k, g in zip(at, pulled):
            grads[k] = g
        return grads

    def _vjp_kernel(self, cotangents: Any, need: Any, *args: Any) -> list[Tensor]:
        grads: Any = NotImplemented
        if self.fast_vjp is not None and not _legacy_batched((*cotangents, *args)):
            with _differentiating():
                grads = self.fast_vjp(cotangents, need, *args)
        if grads is not NotImplemented:
            pass
        elif self.hand_vjp is not None:
            grads = self.hand_vjp(cotangents, need, *args)
        else:
            grads = self._autograd_vjp(cotangents, need, *args)
        like = next(c for c in cotangents if c is not None)
        return [like.new_empty(0) if g is None else g.contiguous() for g in grads]

    def _autograd_vjp(self, cotangents: Any, need: Any, *args: Any) -> list[Tensor | None]:
        """The vjp by autograd of the loop, inside the operator."""
        with _differentiating(), torch.enable_grad():
            tensors = [t.detach().requires_grad_(n) if t is not None else None for t, n in zip(args, need)]
            out = self.loop(*tensors, *args[self.tensors :])
            pairs = zip((out,) if self.single else out, cotangents)
            live = [(o, c) for o, c in pairs if c is not None and o.requires_grad]
            at: Any = [t for t, n in zip(tensors, need) if n]
            if not live:  # no output depends on what needs a gradient
                return [torch.zeros_like(t) if n and t is not None else None for t, n in zip(tensors, need)]
            outs, cots = zip(*live)
            pulled = iter(torch.autograd.grad(outs, at, cots, allow_unused=True, materialize_grads=True))
        return [next(pulled) if n else None for n in need]

    def _vjp_fake(self, cotangents: Any, need: Any, *args: Any) -> list[Tensor]:
        like = next(c for c in cotangents if c is not None)
        return [t.new_empty(t.shape) if n else like.new_empty(0) for t, n in zip(args[: self.tensors], need)]

    def _vmap(self, info: Any, dims: Any, *args: Any) -> Any:
        if callable(self.vmap):
            return self.vmap(self.op, info.batch_size, dims, *args)
        if self.vmap == "leading":
            out = self.op(*(front(t, d, info.batch_size) for t, d in zip(args, dims)))
        else:
            out = per_sample(self.op, info.batch_size, dims, args)
        return out, (0 if self.single else (0,) * len(out))

    def _vmap_vjp(self, info: Any, dims: Any, cotangents: Any, need: Any, *args: Any) -> Any:
        flat = (*cotangents, *args)
        flat_dims = (*(dims[0] if isinstance(dims[0], (list, tuple)) else [None] * len(cotangents)), *dims[2:])
        n = len(cotangents)

        def call(*flat: Any) -> tuple[Tensor, ...]:
            return tuple(self.vjp_op(list(flat[:n]), list(need), *flat[n:]))

        if self.vmap == "leading":
            out = call(*(front(t, d, info.batch_size) for t, d in zip(flat, flat_dims)))
            out = tuple(g if w else g.new_empty(info.batch_size, 0) for g, w in zip(out, need))
        else:
            out = per_sample(call, info.batch_size, flat_dims, flat)
        return list(out), [0] * len(out)


def _differentiating() -> Any:
    """Inside an operator, what makes autograd work: whatever dispatch keys the caller excluded are restored."""
    keys = torch._C.DispatchKeySet
    include = keys(torch._C.DispatchKey.BackendSelect) | keys(torch._C.DispatchKey.ADInplaceOrView)
    exclude = keys(torch._C.DispatchKey.AutocastCPU) | keys(torch._C.DispatchKey.AutocastCUDA)
    return torch._C._ForceDispatchKeyGuard(include, exclude)


def front(t: Any, dim: int | None, batch: int) -> Any:
    """A tensor with the batch dimension in front, expanded where it had none; anything else as it is."""
    if not isinstance(t, Tensor):
        return t
    return t.expand(batch, *t.shape) if dim is None else t.movedim(dim, 0)


def per_sample(call: Callable[..., Any], batch: int, dims: Sequence[int | None], args: Sequence[Any]) -> Any:
    """One call per sample, stacked."""
    if batch == 0:
        raise ValueError("vmap over a dimension of size 0 is not supported here")
    samples = [
        call(*(t.select(d, k) if isinstance(t, Tensor) and d is not None else t for t, d in zip(args, dims)))
        for k in range(batch)
    ]
    if isinstance(samples[0], Tensor):
        return torch.stack(samples)
    return tuple(torch.stack(s) for s in zip(*samples))


def _define(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], vmap: Callable[..., Any]) -> Any:
    def run(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd(), _Apart():
            return kernel(*args)

    _LIBRARY.define(name + schema, tags=_TAGS)
    _LIBRARY.impl(name, run if not name.endswith("_vjp") else kernel, _KEY)
    torch.library.register_fake(f"bptoolkit::{name}", fake, lib=_LIBRARY)
    torch.library.register_vmap(f"bptoolkit::{name}", vmap, lib=_LIBRARY)
    return getattr(torch.ops.bptoolkit, name).default


def _function(opaque: Opaque) -> type[torch.autograd.Function]:
    """The operator, for autograd: its vjp is the second operator."""
    n = opaque.tensors

    class F(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Any:
            return opaque.run(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.options = inputs[n:]
            ctx.save_for_forward(*inputs[:n])
            ctx.save_for_backward(*inputs[:n])
            ctx.like = [(o.shape, o.dtype, o.device) for o in ((output,) if opaque.single else output)]
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            need = ctx.needs_input_grad[:n]
            if all(c is None for c in cotangents):
                return (None,) * (n + len(ctx.options))
            saved = unwrap_dead(ctx.saved_tensors)
            return *opaque.vjp(unwrap_dead(cotangents), need, *saved, *ctx.options), *(None,) * len(ctx.options)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            refuse_nested_forward_mode(opaque.name)
            args = (*primals(ctx.saved_tensors), *ctx.options)
            if opaque.hand_jvp is not None:
                out = opaque.hand_jvp(tangents[:n], *args)
                if out is not NotImplemented:
                    return out
            need = [t is not None for t in tangents[:n]]
            zeros = [torch.zeros(s, dtype=d, device=v) for s, d, v in ctx.like]

            def transpose(*us: Any) -> Any:
                return tuple(g for g in opaque.vjp(us, need, *args) if g is not None)

            pushed = torch.func.vjp(transpose, *zeros)[1](tuple(t for t in tangents[:n] if t is not None))
            return pushed[0] if opaque.single else pushed

    F.__name__ = F.__qualname__ = opaque.name
    return F


def _vjp_function(opaque: Opaque) -> type[torch.autograd.Function]:
    """The vjp operator, for autograd: its derivatives are those of the plain loop."""

    def split(flat: Any) -> tuple[int, Any, Any, Any]:
        count, need, *rest = flat
        return count, need, rest[:count], rest[count:]

    class F(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*flat: Any) -> Any:
            _, need, cotangents, args = split(flat)
            return tuple(opaque.run_vjp(cotangents, need, *args))

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.count, ctx.need, cotangents, args = split(inputs)
            tensors, ctx.options = args[: opaque.tensors], args[opaque.tensors :]
            ctx.save_for_forward(*cotangents, *tensors)
            ctx.save_for_backward(*cotangents, *tensors)
            ctx.like = [(o.shape, o.dtype, o.device) for o in output]
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, *seconds: Any) -> Any:
            wanted = [k for k, w in enumerate(ctx.needs_input_grad[2 : 2 + ctx.count + opaque.tensors]) if w]
            saved = unwrap_dead(ctx.saved_tensors)
            return None, None, *_pull(ctx, saved, unwrap_dead(seconds), wanted), *(None,) * len(ctx.options)

        @staticmethod
        def jvp(ctx: Any, _: Any, __: Any, *tangents: Any) -> Any:
            refuse_nested_forward_mode(opaque.name)
            saved = primals(ctx.saved_tensors)
            wanted = [k for k, t in enumerate(tangents) if isinstance(t, Tensor)]
            zeros = [torch.zeros(s, dtype=d, device=v) if w else None for (s, d, v), w in zip(ctx.like, ctx.need)]
            live = [z for z in zeros if z is not None]

            def transpose(*us: Any) -> Any:
                it = iter(us)
                pulled = _pull(ctx, saved, [None if z is None else next(it) for z in zeros], wanted)
                return tuple(pulled[k] for k in wanted)

            it = iter(torch.func.vjp(transpose, *live)[1](tuple(tangents[k] for k in wanted)))
            return tuple(torch.zeros(s, dtype=d, device=v) if z is None else next(it) for z, (s, d, v) in zip(zeros, ctx.like))

    def _pull(ctx: Any, saved: Any, seconds: Any, wanted: Sequence[int]) -> list[Any]:
        """The vjp of the plain vjp, by autograd."""
        live = [k for k, (s, w) in enumerate(zip(seconds, ctx.need)) if s is not None and w]

        def of_wanted(*chosen: Tensor) -> tuple[Tensor, ...]:
            filled = list(saved)
            for k, t in zip(wanted, chosen):
                filled[k] = t
            cotangents, tensors = filled[: ctx.count], filled[ctx.count :]
            grads = opaque.eager_vjp(cotangents, ctx.need, *tensors, *ctx.options)
            return tuple(grads[k] for k in live)  # type: ignore[misc]

        out: list[Any] = [None] * len(saved)
        if live:
            pulled = torch.func.vjp(of_wanted, *(saved[k] for k in wanted))[1](tuple(seconds[k] for k in live))
            for k, g in zip(wanted, pulled):
                out[k] = g
        return out

    F.__name__ = F.__qualname__ = opaque.name + "_vjp"
    return F
