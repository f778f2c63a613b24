"""Compile the kernels ahead of time, for parts that need not be there, and read off what they use.

Shared memory limits are only enforced at a launch, and registers that spill cost time and say nothing: this gate says it.
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import bptoolkit.triton_kernels
from bptoolkit.triton_kernels import spills


class Target(NamedTuple):
    """A part: how Triton names it, threads in a warp, bytes of shared memory for one program."""

    backend: str
    arch: Any
    warp: int
    shared: int


TARGETS: Mapping[str, Target] = {
    "sm_80": Target("cuda", 80, 32, 166912),
    "sm_90": Target("cuda", 90, 32, 232448),
    "sm_100": Target("cuda", 100, 32, 232448),
    "gfx942": Target("hip", "gfx942", 64, 65536),
}


class Spec(NamedTuple):
    """One compilation of a kernel.

    Attributes:
        label: what it is, for tables.
        kernel: the `triton.jit` function.
        types: argument -> its type ("*bf16", "i32", "fp32", or a tuple of them); an argument that is left out is a constant.
        constants: argument -> its value; None for a pointer that is not given, 1 for the stride of dense rows. (argument, k) is
            the k-th of a tuple.
        aligned: the arguments that 16 divides, which is what lets loads be 16 bytes wide; (argument, k) likewise.
        warps: the number of warps.
        stages: how many loads of a loop are under way at a time.
        dot: the kernel has a matrix product, which must come out as a tensor-core instruction.
        narrow: why no load need be 16 bytes wide; empty for a kernel whose loads must be.
        parts: those it is for; empty for all.
    """

    label: str
    kernel: Any
    types: Mapping[str, Any]
    constants: Mapping[Any, Any]
    aligned: tuple[Any, ...]
    warps: int
    stages: int = 3
    dot: bool = False
    narrow: str = ""
    parts: tuple[str, ...] = ()


class Usage(NamedTuple):
    """What a compiled kernel uses."""

    registers: int  # of a thread
    spilled: int  # bytes of stack, or registers on AMD
    shared: int  # bytes
    instructions: int  # lines of PTX or GCN
    wide_loads: int  # of 16 bytes
    wide_stores: int
    tensor_core: int  # matrix instructions


_PATTERNS = {
    "cuda": (
        r"^\s+(?:@%p\d+ )?[a-z][\w.:]* .*;|^\s+ret;",
        r"ld\.global\S*\.v4\.[bfu]32|ld\.global\S*\.v2\.[bfu]64|cp\.async\S*\s.*0x10|cp\.async\.bulk",
        r"st\.global\S*\.v4\.[bfu]32|st\.global\S*\.v2\.[bfu]64|cp\.async\.bulk\S*\.global\.shared",
        r"mma\.sync|wgmma\.mma|tcgen05\.mma",
    ),
    "hip": (
        r"^\t[a-z]\w+(?:\s|$)",
        r"(?:buffer|global)_load_dwordx4",
        r"(?:buffer|global)_store_dwordx4",
        r"v_mfma",
    ),
}


def modules() -> list[Any]:
    """The kernels' modules: those that have `specs`."""
    names = [m.name for m in pkgutil.iter_modules(bptoolkit.triton_kernels.__path__)]
    found = [importlib.import_module(f"bptoolkit.triton_kernels.{name}") for name in names]
    return [m for m in found if hasattr(m, "specs")]


def specs_for(module: Any, part: str) -> list[Spec]:
    """A module's kernels for a part."""
    return [spec for spec in module.specs(TARGETS[part].warp) if not spec.parts or part in spec.parts]


def compile_for(spec: Spec, target: Target) -> Usage:
    """Compile a kernel for a part, no part needed.

    Raises:
        triton.CompilationError and others: it does not compile.
    """
    compiled = compiled_for(spec, target)
    text = compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    counts = [len(re.findall(pattern, text, re.MULTILINE)) for pattern in _PATTERNS[target.backend]]
    registers, spilled = _nvidia(compiled.asm["cubin"]) if target.backend == "cuda" else _amd(text)
    return Usage(registers, spilled, compiled.metadata.shared, *counts)


def compiled_for(spec: Spec, target: Target) -> Any:
    """The compiled kernel, as Triton has it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = spec.kernel.arg_names

    def place(of: Any) -> tuple[int, ...]:
        return (names.index(of[0]), of[1]) if isinstance(of, tuple) else (names.index(of),)

    constants = {of: v for of, v in spec.constants.items() if (of[0] if isinstance(of, tuple) else of) in names}
    return triton.compile(
        ASTSource(
            fn=spec.kernel,
            signature={name: spec.types.get(name, "constexpr") for name in names},
            constexprs={place(of): value for of, value in constants.items() if of not in spec.types},
            attrs={place(of): [["tt.divisibility", 16]] for of in spec.aligned},
        ),
        target=GPUTarget(target.backend, target.arch, target.warp),
        options={"num_warps": spec.warps, "num_stages": spec.stages, "enable_fp_fusion": True},
    )


def problems(spec: Spec, target: Target, usage: Usage) -> list[str]:
    """What is wrong with a compiled kernel; nothing if it may ship."""
    import triton

    found = []
    if usage.spilled > spills.known(spec.label, target.arch, triton.__version__):
        found.append(f"registers spill ({usage.spilled})")
    if usage.shared > target.shared:
        found.append(f"{usage.shared} bytes of shared memory, {target.shared} at most")
    if not usage.wide_loads and not spec.narrow:
        found.append("no load is 16 bytes wide")
    if spec.dot and not usage.tensor_core:
        found.append("no tensor-core instruction")
    return found


def key(spec: Spec, target: Target) -> str:
    """A hash of what a compilation depends on: the kernel's source and that of what it calls, types, constants, versions."""
    import triton

    functions = [spec.kernel, *(value for value in spec.constants.values() if hasattr(value, "fn"))]
    said = (
        "".join(_source(f, set()) for f in functions),
        sorted(spec.types.items()),
        sorted(spec.constants.items(), key=str),
        spec.aligned,
    )
    everything = repr((said, spec.warps, spec.stages, target, triton.__version__))
    return hashlib.sha256(everything.encode()).hexdigest()[:16]


def _source(kernel: Any, seen: set[str]) -> str:
    """The text of a `triton.jit` function and of those it calls in this package, with the constants that they read."""
    from triton.runtime.jit import JITFunction

    seen.add(kernel.__name__)
    text, names = kernel.src, kernel.fn.__globals__
    for name in sorted(set(kernel.fn.__code__.co_names) - seen):
        value = names.get(name)
        if isinstance(value, JITFunction) and value.module.startswith(__package__):
            text += _source(value, seen)
        elif isinstance(value, (int, float, str)) or type(value).__name__ == "constexpr":
            text += f"{name} = {value!r}\n"
    return text


def _nvidia(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack; spilled registers live on the stack."""
    said = cuobjdump(cubin, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {said}")
    return int(found[1]), int(found[2])


def cuobjdump(cubin: bytes, what: str) -> str:
    """What Triton's own cuobjdump says of a kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True)
    return out.stdout + out.stderr


def _amd(text: str) -> tuple[int, int]:
    """Vector registers and how many of any kind spill."""

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise RuntimeError(f"the assembly does not say .{name}")
        return int(found[1])

    return field("vgpr_count"), field("vgpr_spill_count") + field("sgpr_spill_count")
