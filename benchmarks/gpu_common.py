"""What the stages of `make gpu` share: settings of the process, the ops with a kernel, one call with its gradients."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from bptoolkit import OPS
from bptoolkit.cases import Case

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TOY = 32  # what a rehearsal divides sizes by


@contextmanager
def running(device: str) -> Iterator[None]:
    """Settings of the process: no TF32 behind our back, and in a rehearsal the interpreter."""
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    if device == "cuda":
        yield
    else:
        from bptoolkit.triton_kernels import interpret

        with interpret():
            yield


def fused(run: Any) -> list[str]:
    """The ops with a kernel, of those that are asked for."""
    return [name for name, op in OPS.items() if op.kernel and (run.names is None or name in run.names)]


def widened(t: Any) -> Any:
    return t.detach().double().requires_grad_(t.requires_grad) if isinstance(t, Tensor) and t.is_floating_point() else t


def outcome(fn: Callable[..., Any], case: Case, seed: int = 0) -> list[Tensor]:
    """Values and gradients."""
    torch.manual_seed(seed)
    leaves = [t for t in tree_flatten(tuple(case))[0] if isinstance(t, Tensor) and t.requires_grad]
    out = [o for o in tree_flatten(fn(*case.args, **case.kwargs))[0] if isinstance(o, Tensor) and o.requires_grad]
    cots = [torch.arange(1, o.numel() + 1, device=o.device, dtype=torch.float64).cos().view(o.shape).to(o.dtype) for o in out]
    grads = torch.autograd.grad(out, leaves, cots, allow_unused=True, materialize_grads=True)
    return [*(o.detach() for o in out), *grads]


def in_processes(code: str, names: Sequence[str], seconds: float) -> list[bool]:
    """Run Python code with each name as its argument, many processes at a time; whether each was through in time."""
    end = time.monotonic() + seconds

    def job(name: str) -> bool:
        limit = max(5.0, end - time.monotonic())
        try:
            return not subprocess.run([sys.executable, "-c", code, name], capture_output=True, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            return False

    with ThreadPoolExecutor(max(1, min(10, (os.cpu_count() or 2) - 2))) as pool:
        return list(pool.map(job, names))
