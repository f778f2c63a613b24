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
    from triton.runtime.jit import JITFunction

    modules = [m for name, m in list(sys.modules.items()) if name.startswith(("triton.language", __package__ + "."))]
    names = [(vars(m), name, f) for m in modules for name, f in list(vars(m).items()) if isinstance(f, JITFunction)]
    before = triton.knobs.runtime.interpret
    try:
        triton.knobs.runtime.interpret = True
        for space, name, f in names:
            space[name] = _interpreted(f.fn)
        return launcher(*args)
    finally:
        triton.knobs.runtime.interpret = before
        for space, name, f in names:
            space[name] = f


@cache
def _interpreted(f: Callable[..., Any]) -> Any:
    from triton.runtime.interpreter import InterpretedFunction

    return InterpretedFunction(f)


def _version(module: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])
