"""`bptoolkit doctor`: versions, devices, and what will run where and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import sys

import torch

from bptoolkit.choose import State, choose
from bptoolkit.kernels import runs_on
from bptoolkit.ops import OPS

PACKAGES = {
    "torch": "everything",
    "triton": "the fused kernels",
    "lightning": "recipes",
    "jsonargparse": "recipes: bptoolkit fit",
    "scikit-learn": "recipes: digits",
    "matplotlib": "the demo's plot",
    "pytest": "the tests",
    "hypothesis": "the tests",
}


def version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def reads_past_slices() -> bool:
    """Whether this torch's bfloat16 products on the CPU read past a slice (docs/findings.md): 0 · NaN comes in from outside."""
    around = torch.full((19, 8), torch.nan, dtype=torch.bfloat16)
    x = around[1:18, 1:6].fill_(1)
    return bool((x @ torch.ones(5, 64, dtype=torch.bfloat16)).isnan().any())


def main(argv: list[str]) -> int:
    """Exit status 1 if something that the package itself needs is missing or too old."""
    argparse.ArgumentParser(prog="bptoolkit doctor", description=__doc__).parse_args(argv)
    print(f"python       {platform.python_version()}  {sys.executable}")
    print(f"bptoolkit    {version('bptoolkit') or 'not installed: run pip install -e .'}")
    for package, what in PACKAGES.items():
        found = version(package)
        print(f"{package:12} {found or 'not installed':12} {'' if found else 'needed for '}{what}")
    print(f"\nCPU          {platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    if reads_past_slices():
        print(
            "             bfloat16 products read past slices, a fault of this torch on this CPU: NaN beside a slice comes in,"
        )
        print("             and verify alarms; ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 in the environment helps")
    gpu = torch.cuda.is_available()
    for k in range(torch.cuda.device_count() if gpu else 0):
        major, minor = torch.cuda.get_device_capability(k)
        print(f"GPU {k}        {torch.cuda.get_device_name(k)}, compute capability {major}.{minor}")
    if not gpu:
        print(
            f"GPU          none that this torch sees (built for {torch.version.cuda or torch.version.hip or 'the CPU alone'})"
        )
    triton = importlib.util.find_spec("triton") is not None
    print("\nWhat will run with backend='auto':")
    for device in ("cpu", "cuda"):
        if device == "cuda" and not gpu:
            print("  cuda       nothing: there is no GPU")
            continue
        for name, op in OPS.items():
            missing = None if triton or not op.kernel else "Triton is not installed"
            rule, reason = choose(State("auto", "forward", op.kernel, runs_on(device), False, False, missing))
            print(f"  {device:10} {name:32} {rule:7} {reason}")
    old = tuple(int(p) for p in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11)
    if old:
        print(f"\ntorch {torch.__version__} is older than 2.11, the oldest that is supported")
    return int(old)
