"""Code that reproduces a failure when pasted: plain torch with the tensors written out, or a replay of the point."""

from __future__ import annotations

import inspect
import os.path
import sys
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from bptoolkit.function import Rule
from bptoolkit.op import Op
from bptoolkit.ops import OPS
from bptoolkit.verify.inputs import FromOp
from bptoolkit.verify.trial import Trial, Wrong

WRITTEN_OUT = 160  # elements; a larger call is replayed


def snippet(target: Any, inputs: Any, line: str, trial: Trial, found: Wrong) -> str:
    """The code for a failure: of a value where the tensors are small enough to be read, else a replay."""
    if found.verdict is not None and isinstance(found.got, Tensor) and target.modules[0] is None:
        elements = sum(v.numel() for v in trial.values) + 2 * found.want.numel()
        whole = line.split(" ", 1)[0]
        if elements <= WRITTEN_OUT and whole in VALUES and not trial.contract.random:
            return _plain(target, line, trial, found)
    return _replay(target, inputs, line)


VALUES = frozenset(
    ("forward_value", "gradient_value", "sizes", "values", "dtypes", "input_layout", "cotangent_layout", "grad_subsets")
)


def _replay(target: Any, inputs: Any, line: str) -> str:
    """`bp.verify.replay` with everything it needs."""
    lines = ["import torch", "import bptoolkit as bp"]
    if isinstance(target.source, FromOp):
        name = target.name if target.name in OPS else None
        op = f'bp.OPS["{name}"]' if name else "op"
        lines += [] if name else [f"op = ...  # the Op {target.name}, as you have it"]
        return "\n".join([*lines, f"report = bp.verify.replay({line!r}, {op})", "print(report)", "assert report.ok"])
    fn = _named(target.given, "fn", lines)
    reference = None if target.reference is None else _named(target.reference, "reference", lines)
    if isinstance(inputs, str):
        text = repr(inputs)
    elif isinstance(inputs, Tensor):
        text = f"({_literal(inputs)},)"
    elif isinstance(inputs, (tuple, list)) and sum(t.numel() for t in inputs if isinstance(t, Tensor)) <= WRITTEN_OUT:
        text = "(" + "".join(f"{_literal(t)}, " for t in inputs) + ")"
    else:
        text = "inputs"
        lines.append("inputs = ...  # as you gave them")
    options = f", reference={reference}" if reference else ""
    declared = target.contract.declared()
    options += f", contract={declared!r}" if declared else ""
    return "\n".join(
        [*lines, f"report = bp.verify.replay({line!r}, {fn}, {text}{options})", "print(report)", "assert report.ok"]
    )


def _plain(target: Any, line: str, trial: Trial, found: Wrong) -> str:
    """Plain torch: the inputs, the call, the gradient, what is wanted."""
    point = trial.point
    lines = ["import torch"]
    fn = _named(target.given if not isinstance(target.source, FromOp) else target.fn, "fn", lines)
    if isinstance(target.given, type):
        fn += ".apply"
    if point.layout != "contiguous" or point.cotangent != "random":
        lines.append("from bptoolkit.verify.layouts import COTANGENTS, LAYOUTS")
    lines.append("")
    made = target.source.make(point)
    xs = trial.leaves()
    named = dict(zip(made.where, trial.names))
    for name, v, need in zip(trial.names, trial.values, trial.need):
        text = _literal(v)
        if point.layout != "contiguous":
            text = f'LAYOUTS["{point.layout}"]({text}).detach()'
        lines.append(f"{name} = {text}{'.requires_grad_()' if need else ''}")
    flat = [named.get(k) or _literal(t) for k, t in enumerate(made.flat)]
    args, kwargs = torch.utils._pytree.tree_unflatten([_Code(f) for f in flat], made.spec)
    call = ", ".join([*(repr(a) for a in args), *(f"{k}={v!r}" for k, v in kwargs.items())])
    lines.append(f"y = {fn}({call})")
    where = found.verdict.index if found.verdict is not None else ()
    if found.what.startswith("output"):
        k = int(found.what.split()[1]) if " " in found.what else None
        lines.append("got = y" if k is None else f"got = [t for t in y if t.is_floating_point()][{k}]")
    else:
        outputs = trial.run(xs)
        cotangents = trial.cotangents(outputs, kind="random")
        texts = [_literal(c) for c in cotangents]
        if point.cotangent != "random":
            texts = [f'COTANGENTS["{point.cotangent}"]({t})' for t in texts]
        many = len(texts) > 1
        lines.append(f"dy = {'[' + ', '.join(texts) + ']' if many else texts[0]}")
        ys = "[t for t in y if t.is_floating_point()]" if many else "y if isinstance(y, torch.Tensor) else y[0]"
        wanted = ", ".join(n for n, need in zip(trial.names, trial.need) if need)
        lines.append(f"grads = torch.autograd.grad({ys}, [{wanted}], dy, allow_unused=True, materialize_grads=True)")
        index = [n for n, need in zip(trial.names, trial.need) if need].index(found.what.removeprefix("gradient of "))
        lines.append(f"got = grads[{index}]  # {found.what}")
    error = float((found.got.double() - found.want).abs().nan_to_num(1e300, 1e300).max())
    lines.append(f"want = {_literal(found.want)}  # the reference, in float64")
    lines.append("print(got, want, sep='\\n')")
    lines.append(f"assert bool(((got.double() - want).abs() <= {error / 2:.3g}).all()), 'worst at {where}'")
    return "\n".join(lines)


class _Code(str):
    """Source text that stands for itself inside a repr."""

    def __repr__(self) -> str:
        return str(self)


def _literal(value: Any) -> str:
    """A value as source text; a tensor with every element."""
    if not isinstance(value, Tensor):
        return repr(value)
    t = value.detach().cpu()
    text = repr(t.tolist()).replace("nan", "float('nan')").replace("inf", "float('inf')")
    shape = "" if t.numel() else f".reshape({tuple(t.shape)})"
    return f"torch.tensor({text}, dtype={t.dtype}){shape}"


def _named(fn: Any, name: str, lines: list[str]) -> str:
    """An expression for a callable, with the import it needs added to the lines; or a placeholder with a word on it."""
    owner = getattr(fn, "__self__", None)
    if getattr(fn, "__name__", "") == "apply" and isinstance(owner, type):
        return _named(owner, name, lines) + ".apply"
    if isinstance(fn, type) and issubclass(fn, torch.autograd.Function):
        return _imported(fn, name, lines)
    if isinstance(fn, (Rule, Op)) or not (inspect.isroutine(fn) or isinstance(fn, type)):
        lines.append(f"{name} = ...  # {type(fn).__name__} {getattr(fn, 'name', '')}, as you have it".replace(" ,", ","))
        return name
    return _imported(fn, name, lines)


def _imported(fn: Any, name: str, lines: list[str]) -> str:
    module, qualname = getattr(fn, "__module__", None) or "", getattr(fn, "__qualname__", "")
    if qualname.isidentifier() and module and module != "__main__":
        try:
            if getattr(import_module(module), qualname, None) is fn:
                lines.append(f"from {module} import {qualname}")
                return qualname
        except ImportError:
            pass
    file = getattr(sys.modules.get(module), "__file__", None)
    if qualname.isidentifier() and file and getattr(sys.modules[module], qualname, None) is fn:
        lines += ["import runpy", f'{name} = runpy.run_path("{os.path.relpath(file)}")["{qualname}"]']
        return name
    lines.append(f"{name} = ...  # {qualname or type(fn).__name__}, as you have it")
    return name
