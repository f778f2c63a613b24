"""The tools around a function: torch.compile, autocast, fake tensors, other devices, checkpointing, opcheck."""

from __future__ import annotations

import contextlib
import logging
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bptoolkit.verify.properties.asking import claimed, first_line, hold_alike, plain
from bptoolkit.verify.properties.values import truth_of
from bptoolkit.verify.trial import NotApplicable, Outputs, Trial, Wrong, pull

COMPILED_COTANGENTS = ("random", "sliced", "ones", "transposed")  # the backward is compiled for the first, and gets them all


def compile(trial: Trial) -> None:
    """Outputs and gradients of `torch.compile(backend="aot_eager")` equal eager ones, for cotangents of any strides.

    Catches a backward that branches on strides while it is traced, values that are baked in, state that tracing does not see,
    fake kernels that say something else than the real one.
    """
    xs, outputs = plain(trial)
    kinds = tuple(dict.fromkeys((trial.point.cotangent, *COMPILED_COTANGENTS)))
    sets = [trial.cotangents(outputs, kind=kind) for kind in kinds]
    eager = [_results(trial.run(ys), ys, cs) for cs in sets for ys in [trial.leaves()]]

    def compiled() -> list[list[Tensor | None]]:
        import torch._dynamo

        torch._dynamo.reset()  # else the harness's own functions run into the limit of recompilations, and fall back to eager
        fn = torch.compile(_spared(trial), backend="aot_eager", fullgraph=trial.contract.compile is not None)
        got = []
        for cs in sets:
            ys = trial.leaves()
            got.append(_results(trial.run(ys, fn), ys, cs))
        return got

    with quiet():
        got = claimed(trial.contract.compile, "torch.compile", compiled)
    if got is None:
        return
    what = [*_outputs(len(outputs)), *(f"gradient of {name}" for name in trial.names)]
    truth = truth_of(trial, len(xs))
    for kind, cs, g, w in zip(kinds, sets, got, eager):
        named = [
            f"{t} under torch.compile" + (f" for a cotangent that is {kind}" if t not in what[: len(outputs)] else "")
            for t in what
        ]
        hold_alike(trial, named, g, w, truth, [*(x.detach() for x in xs), *cs], "eager mode")


def _spared(trial: Trial) -> Callable[..., Outputs]:
    """The call, with what it writes to cloned inside the graph: torch loses the gradient of a Function that writes to a graph's
    input (docs/findings.md)."""
    declared = [n in trial.contract.mutates for n in trial.names]
    return (lambda *xs: trial.call(*[x.clone() if d else x for x, d in zip(xs, declared)])) if any(declared) else trial.call


def _results(outputs: Outputs, xs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor | None]:
    return [*(o.detach() for o in outputs), *pull(outputs, xs, cotangents)]


def _outputs(n: int) -> list[str]:
    return ["output"] if n == 1 else [f"output {k}" for k in range(n)]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings and no log lines of the compiler; grad mode and the state of the random numbers as they were."""
    loggers = [logging.getLogger(f"torch.{name}") for name in ("_dynamo", "_functorch", "_inductor", "fx", "_subclasses")]
    levels, enabled = [logger.level for logger in loggers], torch.is_grad_enabled()
    states = torch.get_rng_state(), random.getstate()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
        torch.set_grad_enabled(enabled)
        torch.set_rng_state(states[0])
        random.setstate(states[1])


def autocast(trial: Trial) -> None:
    """float32 inputs, forward under `torch.autocast` in bfloat16, backward outside it, as training does: it runs where the
    reference runs, its values are within bfloat16's rounding, its gradients have the inputs' dtype.

    Catches a backward that multiplies a bfloat16 gradient by a saved float32 tensor, outputs in a dtype that nobody asked for,
    sums that lose precision because autocast lowered them.
    """
    claim = trial.contract.autocast
    if claim is False:
        raise NotApplicable("not claimed")
    if trial.reference is None and claim is None:
        raise NotApplicable("no reference to say what autocast does")
    if trial.point.dtype != "float32":
        trial = replace(trial, values=tuple(v.float() for v in trial.values), point=trial.point.having("dtype", "float32"))
    xs, _ = plain(trial)
    device, low = xs[0].device.type, torch.bfloat16

    def under(fn: Any) -> tuple[list[Tensor], Outputs]:
        ys = trial.leaves()
        with torch.autocast(device, dtype=low):
            return ys, trial.run(ys, fn)

    def pulled(ys: Sequence[Tensor], outputs: Outputs) -> tuple[list[Tensor], list[Tensor | None]]:
        cotangents = [c.to(o.dtype) for c, o in zip(trial.cotangents([o.detach().to(low) for o in outputs]), outputs)]
        return cotangents, pull(outputs, ys, cotangents)

    native: list[Tensor | None] | None = None
    if trial.reference is not None:
        try:
            zs, wanted = under(trial.reference)
            native = [*(w.detach() for w in wanted), *pulled(zs, wanted)[1]]
        except Exception as error:
            if claim is None:
                raise NotApplicable(f"the reference does not run under autocast: {first_line(error)}") from None
    stage = "forward"
    try:
        ys, outputs = under(trial.call)
        stage = "backward"
        cotangents, grads = pulled(ys, outputs)
    except Exception as error:
        raise Wrong(
            f"{stage} raises under autocast, where the reference runs: {first_line(error)}; decorate forward and backward with "
            "torch.amp.custom_fwd and custom_bwd, or cast the inputs before the function is called"
        ) from None
    names = _outputs(len(outputs))
    for k, o in enumerate(outputs):
        want = low if native is None or k >= len(wanted) else wanted[k].dtype
        if o.dtype not in (want, torch.float32, low):  # which of the two is a matter of how a formula is written
            raise Wrong(f"{names[k]} is {o.dtype} under autocast, want {want}", what=names[k])
    for name, y, g in zip(trial.names, ys, grads):
        if g is not None and g.dtype != y.dtype:
            raise Wrong(f"gradient of {name} is {g.dtype} under autocast, want {y.dtype}", what=f"gradient of {name}")
    if trial.contract.random or not (trial.reference or trial.wide):  # other random numbers in another dtype; no truth
        return
    got = [*(o.detach() for o in outputs), *grads]
    if native is not None and [n is None or n.shape for n in native] != [g is None or g.shape for g in got]:
        native = None
    what = [f"{t} under autocast" for t in (*names, *(f"gradient of {name}" for name in trial.names))]
    trial.judge(what, got, truth_of(trial, len(xs)), [*(y.detach() for y in ys), *cotangents], native, dtype=low)


def fake_tensors(trial: Trial) -> None:
    """Forward and backward on fake tensors (and on the meta device) give the shapes, dtypes and, for an operator of
    torch.library, strides of the real ones.

    Catches fake kernels that say something else than the real one, which torch.compile and torch.export then believe.
    """
    claim = trial.contract.fake_tensors
    xs, outputs = plain(trial)
    cotangents = trial.cotangents(outputs)
    real = _described(outputs, pull(outputs, xs, cotangents), strides := is_operator(trial.fn))

    def faked() -> Any:
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            ys = [mode.from_tensor(x.detach()).requires_grad_(x.requires_grad) for x in xs]
            outs = trial.call(*ys)
            _hold_described(_described(outs, [], strides), real, "fake tensors")
            cs = [mode.from_tensor(c) for c in cotangents]
            return _described(outs, pull(outs, ys, cs), strides)

    def on_meta(fn: Any) -> Any:
        ys = [x.detach().to("meta").requires_grad_(x.requires_grad) for x in xs]
        outs = fn(*ys)
        _hold_described(_described(outs, [], strides), real, "the meta device")
        return _described(outs, pull(outs, ys, [c.to("meta") for c in cotangents]), strides)

    with quiet():
        got = claimed(claim, "running on fake tensors", faked)
        if got is None:
            return
        _hold_described(got, real, "fake tensors")
        try:
            _hold_described(on_meta(trial.call), real, "the meta device")
        except Wrong:
            raise
        except Exception as error:
            if claim is not True or trial.reference is None:
                return
            try:
                on_meta(trial.reference)
            except Exception:
                return
            raise Wrong(f"raises on the meta device, where the reference runs: {first_line(error)}") from None


def _described(outputs: Sequence[Tensor], grads: Sequence[Tensor | None], strides: bool) -> list[tuple[Any, ...]]:
    """(shape, dtype, requires_grad, strides) of each; sizes of one have no stride, nor has anything without elements."""

    def line(t: Tensor) -> Any:
        return tuple(s for s, n in zip(t.stride(), t.shape) if n > 1) if strides and t.numel() else None

    found: list[tuple[Any, ...]] = [(tuple(o.shape), o.dtype, o.requires_grad, line(o)) for o in outputs]
    return found + [() if g is None else (tuple(g.shape), g.dtype, False, None) for g in grads]


def _hold_described(got: Sequence[tuple[Any, ...]], want: Sequence[tuple[Any, ...]], where: str) -> None:
    names = ("shape", "dtype", "requires_grad", "strides")
    for k, (g, w) in enumerate(zip(got, want)):
        for name, a, b in zip(names, g, w):
            if a != b:
                raise Wrong(f"result {k} has {name} {a} on {where}, really {b}", what=f"output {k}")


def is_operator(fn: Any) -> bool:
    """Whether a callable is an operator of torch.library."""
    from torch._library.custom_ops import CustomOpDef

    return isinstance(fn, (torch._ops.OpOverload, torch._ops.OpOverloadPacket, CustomOpDef))


def devices(trial: Trial) -> None:
    """On another device, and there on another stream than the default one, outputs and gradients equal the reference's here.

    Catches kernels that launch on the wrong device or stream, and code that creates its tensors on the CPU.
    """
    others = other_devices(trial.values[0].device)
    if not others:
        raise NotApplicable("there is no second device")
    if trial.contract.random:
        raise NotApplicable("draws random numbers, which are others there")
    if trial.reference is None and trial.point.dtype != "float64":
        raise NotApplicable("no reference to say how exact arithmetic is on the other device")
    ran, refusal = False, ""
    for device in others:
        moved = replace(trial, values=tuple(v.to(device) for v in trial.values))
        try:
            with another_stream(device):
                xs = moved.leaves()
                outputs = moved.run(xs)
                _hold_device(outputs, _outputs(len(outputs)), device)
                cotangents = moved.cotangents(outputs)
                got = _results(outputs, xs, cotangents)
        except Wrong:
            raise
        except Exception as error:
            refusal = refusal or f"on {device} it raises {first_line(error)}"
            continue
        ran = True
        names = [*_outputs(len(outputs)), *(f"gradient of {name}" for name in trial.names)]
        _hold_device(got, names, device)
        native = None
        if moved.reference is not None:
            with contextlib.suppress(Exception):  # what the device's own arithmetic gives (TF32, say) bounds what is asked
                native = [None if t is None else t.cpu() for t in truth_of(moved, len(xs))([*xs, *cotangents])]
        home = [t.detach().to(trial.values[0].device) for t in (*xs, *cotangents)]
        back = [None if g is None else g.to(trial.values[0].device) for g in got]
        trial.judge([f"{name} on {device}" for name in names], back, truth_of(trial, len(xs)), home, native)
    if not ran:
        raise NotApplicable(refusal)


def _hold_device(got: Sequence[Tensor | None], names: Sequence[str], device: torch.device) -> None:
    for name, g in zip(names, got):
        if g is not None and g.device != device:
            raise Wrong(f"{name} is on {g.device}, the inputs are on {device}", what=name)


def other_devices(home: torch.device) -> list[torch.device]:
    """An accelerator beside the CPU, and a second one of its kind: kernels launched without a device guard go to the first."""
    kind = torch.accelerator.current_accelerator()
    if kind is None or not torch.accelerator.is_available():
        return []
    found = [torch.device(kind.type, k) for k in range(min(torch.accelerator.device_count(), 2))]
    return [d for d in found if d != home]


@contextlib.contextmanager
def another_stream(device: torch.device) -> Iterator[None]:
    """A stream that is not the default one, on CUDA; all is done when it ends."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def checkpoint(trial: Trial) -> None:
    """Gradients under `torch.utils.checkpoint` and under saved-tensor hooks that pack to a copy equal the plain ones.

    Catches a forward that gives something else when it runs again (state, its own random numbers), a backward that needs the
    very tensors that were saved, or their strides.
    """
    from torch.utils.checkpoint import checkpoint as checkpointed

    if trial.contract.mutates:
        raise NotApplicable(f"writes to {', '.join(trial.contract.mutates)}, so that forward cannot run again")
    if not trial.contract.deterministic:
        raise NotApplicable("is not deterministic")
    xs, outputs = plain(trial)
    cotangents = trial.cotangents(outputs)
    want = _results(outputs, xs, cotangents)

    def recomputed(*ys: Tensor) -> Outputs:
        return trial.call(*ys)

    def again(ys: list[Tensor]) -> list[Tensor | None]:
        return _results(trial.run(ys, lambda *t: checkpointed(recomputed, *t, use_reentrant=False)), ys, cotangents)

    def packed(ys: list[Tensor]) -> list[Tensor | None]:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t.clone()):
            outs = trial.run(ys)
        return _results(outs, ys, cotangents)

    what = [*_outputs(len(outputs)), *(f"gradient of {name}" for name in trial.names)]
    for where, run in (("torch.utils.checkpoint", again), ("saved-tensor hooks that copy", packed)):
        try:
            with quiet():
                got = run(trial.leaves())
        except Exception as error:
            raise Wrong(f"raises under {where}: {first_line(error)}") from None
        inputs = [*(x.detach() for x in xs), *cotangents]
        hold_alike(trial, [f"{t} under {where}" for t in what], got, want, truth_of(trial, len(xs)), inputs, "a plain call")


def registration(trial: Trial) -> None:
    """`torch.library.opcheck` on an operator of torch.library, with the inputs of this call.

    Catches a schema that hides what is written to or aliased, a missing autograd registration, fake kernels that say something
    else than the real one, trouble with dynamic shapes.
    """
    if not is_operator(trial.fn):
        raise NotApplicable("not an operator of torch.library")
    if trial.contract.random or not trial.contract.deterministic:
        raise NotApplicable("opcheck compares runs bit for bit, which random operators do not give")
    xs, _ = plain(trial)
    found = _recorded(trial, xs)
    if found is None:
        raise NotApplicable("the call does not reach the operator")
    op, args, kwargs = found
    with quiet():
        results = torch.library.opcheck(op, args, kwargs, raise_exception=False)
    for test, result in results.items():
        if result != "SUCCESS":
            why = first_line(result) if isinstance(result, BaseException) else result
            raise Wrong(f"torch.library.opcheck: {test} fails: {why}", what=test)


def _recorded(trial: Trial, xs: Sequence[Tensor]) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """The operator and all its arguments, as the call reaches it; those that require grad are fresh leaves."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map_only

    wanted = getattr(trial.fn, "_opoverload", trial.fn)
    calls: list[Any] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is wanted or func.overloadpacket is wanted:
                calls.append((func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    ys = [x.detach() for x in xs]
    with Recorder():
        trial.run(ys)
    if not calls:
        return None
    op, args, kwargs = calls[0]
    need = {id(y): x.requires_grad for x, y in zip(xs, ys)}
    return op, *tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(need.get(id(t), False)), (args, kwargs))
