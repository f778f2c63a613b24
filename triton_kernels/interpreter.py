"""Run the kernels on the CPU, one program at a time, without starting the process with TRITON_INTERPRET=1.

`triton.jit` decides when it decorates whether a function is compiled or interpreted, and a kernel calls other such functions
(`tl.sum`). So for the time of one launch every one of them, in Triton's language and in the kernels' modules, is replaced by
its interpreted form. Outside a launch nothing is different: ahead-of-time compilation works in the same process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from bptoolkit import kernels

ALSO: set[str] = set()  # modules outside this package that have functions of a kernel


@contextmanager
def interpret() -> Iterator[None]:
    """Inside, the fused kernels run on CPU tensors, in Triton's interpreter: the same program, some milliseconds per tile.

    `backend="auto"` then takes them on the CPU as it does on a GPU.

    Raises:
        ImportError: Triton is not installed.
        RuntimeError: NumPy and Triton do not go together.
    """
    import numpy
    import triton

    if _version(triton) < (3, 7) and _version(numpy) >= (2, 4):
        raise RuntimeError(f"the interpreter of triton {triton.__version__} needs numpy < 2.4, not {numpy.__version__}")
    before, kernels.INTERPRETING = kernels.INTERPRETING, True
    try:
        yield
    finally:
        kernels.INTERPRETING = before


def launch(launcher: Callable[..., Any], *args: Any) -> Any:
    """launcher(*args), in which every launch of a kernel is interpreted."""
    import triton
    from triton import knobs
    from triton.runtime.jit import JITFunction

    core = triton.language.core
    ours = ("triton.language", __package__ + ".")
    modules = [m for name, m in list(sys.modules.items()) if name.startswith(ours) or name in ALSO]
    classes = [core.tensor, core.tensor_descriptor_base, core.dtype, core.condition]
    # The interpreter patches all of these. It restores what a kernel patched, but not what a function in a kernel did.
    before = [(space, dict(vars(space))) for space in (*modules, *classes)]
    interpreting = knobs.runtime.interpret
    try:
        knobs.runtime.interpret = True
        for module in modules:
            for name, f in list(vars(module).items()):
                if isinstance(f, JITFunction):
                    setattr(module, name, interpreted(f))
        return launcher(*args)
    finally:
        knobs.runtime.interpret = interpreting
        for space, names in before:
            for name, value in names.items():
                if vars(space).get(name) is not value:
                    setattr(space, name, value)


def interpreted(f: Any) -> Any:
    """The interpreted form of a `triton.jit` function."""
    return _interpreted(f.fn)  # a hash of f itself would be one of all that it calls


@cache
def _interpreted(f: Callable[..., Any]) -> Any:
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction, InterpreterError

    langs = [lang for lang in f.__globals__.values() if lang is tl or lang is tl.core]

    class Interpreted(InterpretedFunction):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """A call from another function. Triton's own patches its language for each, which is most of the time."""
            if any(tl.core.is_builtin(lang.load) for lang in langs):
                return super().__call__(*args, **kwargs)
            try:
                return self.rewrite()(*args, **kwargs)
            except Exception as e:
                raise InterpreterError(repr(e)) from e

    return Interpreted(f)


def _version(module: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])
