"""PyTorch's own samples (OpInfo, ModuleInfo) over every name we share with torch: outputs, gradients, second gradients, forward
mode, vmap, non-contiguous inputs, and the calls that torch refuses.

They live in torch.testing._internal, which is private: what it lacks in some version is skipped, and says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import LONG, floats, random_like
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import bptoolkit as bp

os.environ.setdefault("PYTORCH_TESTING_DEVICE_ONLY_FOR", "cpu")
methods = pytest.importorskip("torch.testing._internal.common_methods_invocations", reason="torch's samples need expecttest")
modules = pytest.importorskip("torch.testing._internal.common_modules", reason="torch's samples need expecttest")


def close(got: Any, want: Any, **kw: Any) -> None:
    torch.testing.assert_close(got, want, equal_nan=True, **{"rtol": 1e-9, "atol": 1e-10, **kw})


FLOAT32_CONSTANT = {"nn.functional.hardsigmoid", "nn.functional.celu"}
"""Torch has 1/6, or 1/alpha, in float32 whatever the tensor's dtype is."""


def bounds(name: str) -> dict[str, float]:
    return {"rtol": 1e-7, "atol": 1e-7} if name in FLOAT32_CONSTANT else {}


MOST = 1000 if LONG else 10  # samples of one op, spread evenly over all of them


def _normalized(loss: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, *args, **options: loss(x.log_softmax(-1), *args, **options)


def _ours(info: Any) -> Callable[..., Any] | None:
    short = info.name.removeprefix("nn.functional.")
    if short == "unfold" or (short in bp.OPS and bp.OPS[short].random) or short == "rrelu":
        return None  # Tensor.unfold is another function; masks differ from torch's for one seed: tests/ops has them
    ours = getattr(bp.functional, short, None)
    if short == "ctc_loss":  # torch's gradient is by the input of log_softmax, and so is right behind it
        return _normalized(ours)
    if short.startswith("fractional_max_pool"):  # the windows of one seed, as torch's samples have it
        return lambda *args, **options: methods.wrapper_set_seed(ours, *args, **options)
    if ours is not None and short.startswith("embedding"):  # torch's samples have the weight first
        return lambda weight, indices, **options: ours(indices, weight, **options)
    return ours


OPS = {f"{i.name}{'.' + i.variant_test_name if i.variant_test_name else ''}": i for i in methods.op_db if _ours(i)}
MODULES = {i.name: i for i in modules.module_db if hasattr(bp.nn, i.module_cls.__name__)}


def spread(items: Any, most: int = MOST) -> list[Any]:
    items = list(items)
    return items if len(items) <= most else [items[k * (len(items) - 1) // (most - 1)] for k in range(most)]


def samples(name: str) -> list[Any]:
    torch.manual_seed(0)
    info = OPS[name]
    made = info.sample_inputs("cpu", torch.float64, requires_grad=True)
    return spread(s for s in made if _differentiable(s) and not _draws(name, s) and not _has_no_channels(name, s))


def _has_no_channels(name: str, sample: Any) -> bool:
    """batch_norm of a vector of length 0, which torch lets pass and ours refuses."""
    return "batch_norm" in name and sample.input.dim() < 2


def _draws(name: str, sample: Any) -> bool:
    """Whether attention drops weights: torch's kernels and ours draw other random numbers for the same seed."""
    place = {"scaled_dot_product_attention": 4, "multi_head_attention_forward": 10}
    where = place.get(name.removeprefix("nn.functional.").partition(".")[0])
    if where is None:
        return False
    given = (sample.input, *sample.args)
    return (given[where] if len(given) > where else sample.kwargs.get("dropout_p", 0.0)) != 0


def _differentiable(sample: Any) -> bool:
    leaves, _ = tree_flatten((sample.input, sample.args, sample.kwargs))
    return all(not isinstance(t, Tensor) or not t.requires_grad or t.is_floating_point() for t in leaves) and any(
        isinstance(t, Tensor) and t.requires_grad for t in leaves
    )


def bind(fn: Callable[..., Any], sample: Any) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """The function of the tensors to differentiate by alone, and those tensors."""
    leaves, spec = tree_flatten(((sample.input, *sample.args), sample.kwargs))
    where = [k for k, t in enumerate(leaves) if isinstance(t, Tensor) and t.requires_grad]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(1)  # what draws random numbers draws the same
        filled = [t.clone() if isinstance(t, Tensor) else t for t in leaves]
        for k, t in zip(where, tensors):
            filled[k] = t
        args, kwargs = tree_unflatten(filled, spec)
        return floats(fn(*args, **kwargs))

    return call, tuple(leaves[k].detach() for k in where)


ATTENTION = "nn.functional.scaled_dot_product_attention"


def _math(*args: Any, **kwargs: Any) -> Tensor:
    """Torch's attention on its plain path, the only one that it differentiates twice and forward."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.nn.functional.scaled_dot_product_attention(*args, **kwargs)


def _whole(*args: Any, options: Any = None, **kwargs: Any) -> Tensor:
    """Torch's linear_cross_entropy with all logits at once: its derivatives in chunks are right to first order alone."""
    return torch.nn.functional.linear_cross_entropy(*args, **kwargs)


def _theirs(name: str) -> Callable[..., Any]:
    if "ctc_loss" in name:
        return _normalized(OPS[name].op)
    return _math if name == ATTENTION else _whole if "chunked" in name else OPS[name].op


def pairs(name: str, change: Callable[[Any], Any] = lambda s: s) -> Any:
    """Ours, torch's and the tensors, a sample at a time."""
    info = OPS[name]
    for sample in samples(name):
        sample = change(sample)
        ours, tensors = bind(_ours(info), sample)  # type: ignore[arg-type]
        theirs, _ = bind(_theirs(name), sample)
        yield ours, theirs, tensors, f"{name}: {sample.summary()}"


def grads(fn: Callable[..., Any], tensors: tuple[Tensor, ...], twice: bool = False) -> Any:
    xs = [t.clone().requires_grad_() for t in tensors]  # keeps strides
    out = fn(*xs)
    live = [o for o in out if o.requires_grad]
    first = torch.autograd.grad(
        live, xs, random_like(tuple(live)), allow_unused=True, materialize_grads=True, create_graph=twice
    )
    if not twice:
        return [o.detach() for o in out], first
    loss = sum((g.sin() * r).sum() for g, r in zip(first, random_like(first, 1)) if g.requires_grad)
    if not isinstance(loss, Tensor):
        return [torch.zeros_like(x) for x in xs]
    return torch.autograd.grad(loss, xs, allow_unused=True, materialize_grads=True)


each = pytest.mark.parametrize("name", OPS)


@each
def test_values_and_gradients(name):
    for ours, theirs, tensors, what in pairs(name):
        close(grads(ours, tensors), grads(theirs, tensors), msg=lambda m, w=what: f"{w}\n{m}", **bounds(name))


@each
def test_non_contiguous(name):
    for ours, theirs, tensors, what in pairs(name, lambda s: s.noncontiguous()):
        close(grads(ours, tensors), grads(theirs, tensors), msg=lambda m, w=what: f"{w}\n{m}", **bounds(name))


@each
def test_second_gradients(name):
    if not OPS[name].supports_gradgrad or "ctc_loss" in name:  # which raises
        pytest.skip("torch has no second derivative to compare with; tests/test_gradients.py has finite differences")
    for ours, theirs, tensors, what in pairs(name):
        close(grads(ours, tensors, True), grads(theirs, tensors, True), msg=lambda m, w=what: f"{w}\n{m}", **bounds(name))


@each
def test_forward_mode(name):
    if "max_unpool" in name:
        pytest.skip("where an index occurs twice, torch's two modes disagree; ours follow its reverse mode")
    for ours, theirs, tensors, what in pairs(name):
        tangents = random_like(tensors, 2)
        got = torch.func.jvp(ours, tensors, tangents)
        if OPS[name].supports_forward_ad:
            want = torch.func.jvp(theirs, tensors, tangents)
        else:  # ⟨u, J t⟩ = ⟨Jᵀ u, t⟩
            want, pulled = grads(theirs, tensors)
            pushed = sum((o * u).sum() for o, u in zip(got[1], random_like(tuple(want))))
            got, want = (got[0], pushed), (tuple(want), sum((g * t).sum() for g, t in zip(pulled, tangents)))
        close(got, want, msg=lambda m, w=what: f"{w}\n{m}", **bounds(name))


@each
def test_vmap(name):
    for ours, _, tensors, what in pairs(name):
        batch = tuple(torch.stack([t, t.flip(0)] if t.dim() else [t, t.clone()]) for t in tensors)
        try:
            got = torch.func.vmap(ours, randomness="same")(*batch)
        except (RuntimeError, NotImplementedError) as refused:
            assert "vmap" in str(refused), what  # says so by name
            continue
        want = [ours(*(t[k] for t in batch)) for k in range(2)]
        close(got, tuple(torch.stack(o) for o in zip(*want)), msg=lambda m, w=what: f"{w}\n{m}", **bounds(name))


@pytest.mark.parametrize("name", [n for n in OPS if OPS[n].error_inputs_func])
def test_what_torch_refuses(name):
    """A call that torch refuses is refused, by an error that names the op."""
    info = OPS[name]
    for wrong in info.error_inputs("cpu"):
        s = wrong.sample_input
        with pytest.raises((TypeError, ValueError, RuntimeError, IndexError, NotImplementedError)):
            _ours(info)(s.input, *s.args, **s.kwargs)


def module_samples(name: str) -> list[Any]:
    torch.manual_seed(0)
    info = MODULES[name]
    made = info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=True, training=True)
    return spread(made)


@pytest.mark.parametrize("name", MODULES)
def test_modules(name):
    """Same parameters, outputs and gradients, in training and in evaluation."""
    cls = MODULES[name].module_cls
    for sample in module_samples(name):
        made = []
        for kind in (cls, getattr(bp.nn, cls.__name__)):
            torch.manual_seed(3)
            args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
            made.append(kind(*args, **kwargs).double())
        made[1].load_state_dict(made[0].state_dict(), strict=True)
        for training in (True, False):
            results = []
            for module in made:
                module.train(training)
                torch.manual_seed(4)
                held = sample.forward_input
                inputs = tree_map(
                    lambda t: t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t,
                    (held.args, held.kwargs) if held is not None else ((), {}),
                )
                given, options = inputs
                if name == "nn.CTCLoss":  # as above
                    given = (given[0].log_softmax(-1), *given[1:])
                out = floats(module(*given, **options))
                xs = [t for t in tree_flatten(inputs)[0] if isinstance(t, Tensor) and t.requires_grad]
                xs += list(module.parameters())
                live = [o for o in out if o.requires_grad]
                got = torch.autograd.grad(live, xs, random_like(tuple(live)), allow_unused=True) if live and xs else ()
                results.append(([o.detach() for o in out], [g for g in got if g is not None], list(module.buffers())))
            close(*results, msg=lambda m, s=sample: f"{name} {s.desc or s.constructor_input}\n{m}")
