"""Outputs and gradients against the reference in float64: one comparison, and eight properties by what has to move for it to
fail.

A point that fails is shrunk axis by axis. What cannot be taken back names the property: a gradient that is wrong only when the
cotangent is expanded is a failure of `cotangent_layout`, one that is wrong at the simplest point of `gradient_value`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bptoolkit.verify.trial import Outputs, Trial, Wrong, pull, same_bits


def compare_values(trial: Trial) -> None:
    """Hold outputs and gradients of one call to the reference (or, without one, to the function itself in float64,
    contiguous)."""
    xs = trial.leaves()
    kept = [x.detach().clone() for x in xs]  # a function that writes to its inputs is another property's business
    outputs = trial.run(xs)
    _hold_metadata(trial, outputs)
    if not trial.contract.empty and any(x.numel() == 0 for x in xs):
        raise Wrong("takes tensors without elements, though the contract says that it does not")
    cotangents = trial.cotangents(outputs)
    tensors = [*kept, *(c.clone() for c in cotangents)]
    grads = pull(outputs, xs, cotangents)
    for name, x, g in zip(trial.names, xs, grads):
        if g is not None and g.dtype != x.dtype:
            raise Wrong(f"gradient of {name} is {g.dtype}, want {x.dtype}", what=f"gradient of {name}")
    what = [_output(k, len(outputs)) for k in range(len(outputs))] + [f"gradient of {n}" for n in trial.names]
    n = len(xs)
    truth = truth_of(trial, n)
    got: list[Any] = [*(o.detach() for o in outputs), *grads]
    native = None
    if trial.reference is not None and trial.point.dtype != "float64":
        native = _native(trial, tensors, n)
    trial.judge(what, got, truth, tensors, native)
    unwatched = _without_gradients(trial)
    if len(unwatched) == len(outputs) and not all(same_bits(u, o) for u, o in zip(unwatched, outputs)):
        none = [None] * len(grads)
        trial.judge([f"{w} under torch.no_grad()" for w in what], [*unwatched, *none], truth, tensors, native)


def _without_gradients(trial: Trial) -> Outputs:
    """The outputs where none is asked to be differentiable; nothing if the function refuses."""
    try:
        with torch.no_grad():
            return trial.run(trial.leaves())
    except Exception:
        return ()


def truth_of(trial: Trial, n: int) -> Callable[[Sequence[Tensor]], list[Any]]:
    """(inputs, cotangents) -> (outputs, gradients) of the oracle, on contiguous tensors."""
    need = trial.need if trial.reference is not None else (True,) * n

    def truth(tensors: Sequence[Tensor]) -> list[Any]:
        laid = [t.detach() if trial.contract.random else t.detach().contiguous() for t in tensors[:n]]  # see `Trial.judge`
        ys = [t.clone().requires_grad_(k) for t, k in zip(laid, need)]
        outputs = trial.run(ys, trial.oracle)
        grads = pull(outputs, ys, [c.detach().contiguous() for c in tensors[n:]])
        return [*(o.detach() for o in outputs), *(g if k else None for g, k in zip(grads, trial.need))]

    return truth


def _native(trial: Trial, tensors: Sequence[Tensor], n: int) -> list[Any] | None:
    """What the reference gives in the dtype of the point, where it has kernels for it."""
    try:
        return truth_of(trial, n)(tensors)
    except Exception:  # torch has no kernel of this dtype; the model alone then sets the bounds
        return None


def _hold_metadata(trial: Trial, outputs: Outputs) -> None:
    """Number, shape and dtype of the outputs, which decide whether the rest can be compared at all."""
    if trial.reference is None:
        return
    want = trial.run([v.clone() for v in trial.values], _in(trial))
    if len(outputs) != len(want):
        raise Wrong(f"{len(outputs)} floating-point outputs, the reference has {len(want)}")
    for k, (o, w) in enumerate(zip(outputs, want)):
        if o.shape != w.shape:
            raise Wrong(
                f"{_output(k, len(want))} has shape {tuple(o.shape)}, the reference's has {tuple(w.shape)}", what="output"
            )


def _in(trial: Trial) -> Callable[..., Outputs]:
    """The reference on tensors widened to float64: it always has kernels for that."""
    assert trial.reference is not None
    reference = trial.reference
    return lambda *xs: reference(*(x.double() for x in xs))


def _output(k: int, n: int) -> str:
    return "output" if n == 1 else f"output {k}"


def _named(name: str, doc: str) -> Callable[[Trial], None]:
    def judge(trial: Trial) -> None:
        compare_values(trial)

    judge.__name__, judge.__doc__ = name, doc
    return judge


VALUE_PROPERTIES = {
    name: _named(name, doc)
    for name, doc in {
        "forward_value": "The outputs equal the reference's, under `torch.no_grad()` as well. Catches a wrong forward with a "
        "consistent backward, and a path for inference that gives something else.",
        "gradient_value": "The gradient of every input equals autograd of the reference. Catches wrong factors, signs, terms, "
        "transposes, a mean for a sum, swapped and missing gradients, lost precision.",
        "sizes": "The same at sizes 0, 1, odd, on both sides of 16, 32, 64 and 128, and past 256 and 1024. Catches blocks "
        "without their rest, squeezed "
        "batches of one, empty tensors, sums that lose precision with their length.",
        "values": "The same for kinks and ties, large, small, constant and shifted values. Catches overflow, "
        "cancellation, wrong "
        "subgradients, clamps, an epsilon in the wrong place.",
        "dtypes": "The same in float32, bfloat16 and float16, within the rounding of each. Catches sums and "
        "intermediates in low "
        "precision, biased rounding, gradients that exist in one dtype only.",
        "input_layout": "The same for transposed, strided, sliced, offset and expanded inputs. Catches "
        "kernels that read past strides.",
        "cotangent_layout": "The same for cotangents that are expanded (stride 0), transposed, sliced out of "
        "a wider tensor, zero, one-"
        "hot. Catches raw-stride reads of the gradient (pytorch#194719, flash-attention#355).",
        "grad_subsets": "The same when only some inputs require grad. Catches wrong `needs_input_grad` "
        "indices and early exits.",
    }.items()
}
AXIS_PROPERTY = {
    "need": "grad_subsets",
    "cotangent": "cotangent_layout",
    "layout": "input_layout",
    "values": "values",
    "dtype": "dtypes",
}  # in the order in which they name a failure that needs several axes


def property_of(matters: Sequence[str], what: str, gross: bool = True) -> str:
    """The property that a failure of `compare_values` is one of: by the axes that have to move for it to fail."""
    if not gross and "dtype" in matters:  # just over what rounding explains: the other axes only make it so large
        return "dtypes"
    for axis, name in AXIS_PROPERTY.items():
        if axis in matters:
            return name
    if matters:
        return "sizes"
    return "forward_value" if what.startswith("output") else "gradient_value"


def axes_of(chosen: Sequence[str]) -> set[str]:
    """The axes that the chosen properties move: field names, and "sizes"."""
    fields = {axis for axis, name in AXIS_PROPERTY.items() if name in chosen}
    if "values" in chosen:
        fields.add("dtype")  # what overflows does so in the narrow dtypes first
    return fields | ({"sizes"} if "sizes" in chosen else set())
