"""The stages of `make gpu`, by priority; each records what it finds as it goes. See gpu.py."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import gpu_timing as timing
import torch
from gpu_common import DTYPES, fused, outcome, widened
from gpu_conv import convolution
from gpu_speed import compiled, paths, speed, twice, warm
from torch import Tensor
from torch.utils._pytree import tree_map

import bptoolkit as bp
from bptoolkit import OPS
from bptoolkit.cases import Case, Draw

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests/kernels"


# ---- the machine


def machine(run: Any) -> None:
    """Device, driver, versions; bandwidth of a copy and rate of a product, as measured."""
    for name in run.todo("machine", ["versions", "ceilings"]):
        if name == "versions":
            import triton

            query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit", "--format=csv,noheader"]
            smi = subprocess.run(query, capture_output=True, text=True) if shutil.which("nvidia-smi") else None
            said = smi.stdout.strip() if smi else "no nvidia-smi"
            figures = {
                "torch": torch.__version__,
                "triton": triton.__version__,
                "python": sys.version.split()[0],
                "driver": said,
            }
            run.ledger.add("machine", name, "ok", cuda=str(torch.version.cuda), **figures)
        else:
            n = 4096 if run.rehearse else 1 << 31
            figures = {"copy_gbs": timing.copy_bandwidth(run.device, n)}
            for label, dtype in DTYPES.items():
                figures[f"{label}_tflops"] = timing.matrix_rate(run.device, 64 if run.rehearse else 8192, dtype)
            run.ledger.add("machine", name, "ok", **figures)


# ---- the kernels' tests


def kernels(run: Any) -> None:
    """tests/kernels on the device, a process a file: tile edges, dtypes, layouts, empty tensors, bit-repeat runs, all of it."""
    files = [p.stem for p in sorted(TESTS.glob("test_*.py")) if p.stem not in ("test_gate", "test_contract", "test_verified")]
    jobs = {stem: [str(TESTS / f"{stem}.py")] for stem in files if run.names is None or stem.removeprefix("test_") in run.names}
    for name in fused(run):
        jobs[f"contract {name}"] = [str(TESTS / "test_contract.py"), "-k", f"-{name}- or -{name}] or [{name}"]
    which = "interpreter" if run.rehearse else "cuda"
    todo = list(run.todo("kernels", jobs))
    if run.rehearse:
        todo = todo[:2]

    def job(name: str) -> tuple[str, float, int, str]:
        began = time.monotonic()
        path, *more = jobs[name]
        chosen = [*more[:1], f"({more[1]}) and {which}"] if more else ["-k", which]
        line = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", path, *chosen]
        limit = max(5.0, run.left())
        try:
            done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=limit, env=dict(os.environ))
        except subprocess.TimeoutExpired:
            return name, time.monotonic() - began, -1, ""
        return name, time.monotonic() - began, done.returncode, done.stdout + done.stderr

    with ThreadPoolExecutor(max(1, min(12, (os.cpu_count() or 2) - 2))) as pool:
        for name, seconds, code, text in pool.map(job, todo):
            if code == -1:
                run.ledger.add("kernels", name, "out of time", seconds=seconds)
                continue
            last = text.strip().splitlines()[-1] if text.strip() else ""
            status = "ok" if code == 0 else "none" if code == 5 else "failed"
            figures = {"said": last} if status != "failed" else {"said": last, "error": text[-1500:]}
            run.ledger.add("kernels", name, status, seconds=round(seconds, 1), **figures)


# ---- every op


def ops(run: Any) -> None:
    """Every op at drawn sizes: values and gradients in three dtypes beside float64, and beside torch's own error."""
    names = [name for name in OPS if run.names is None or name in run.names]
    for name in run.todo("ops", names[:4] if run.rehearse and run.names is None else names):
        figures: dict[str, Any] = {}
        wrong = []
        try:
            for label, dtype in DTYPES.items():
                for seed in range(1 if run.rehearse else 3):
                    ours, theirs = errors(OPS[name], dtype, run.device, seed, (3, 5, 9) if run.rehearse else (17, 33, 64))
                    figures[label] = max(figures.get(label, 0.0), ours)
                    if not ours <= max(3 * theirs, 64 * torch.finfo(dtype).eps):  # NaN is wrong too
                        wrong.append(f"{label} seed {seed}: {ours:.1e}, torch's {theirs:.1e}")
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}"[:400])
        run.ledger.add("ops", name, "failed" if wrong else "ok", **figures, **({"error": "; ".join(wrong)} if wrong else {}))


def errors(op: Any, dtype: torch.dtype, device: str, seed: int, sizes: tuple[int, ...]) -> tuple[float, float]:
    """The largest error of values and gradients against float64, of the tensor's size: ours, and the reference's in dtype."""
    case = op.draw(Draw(Random(seed), dtype=dtype, sizes=sizes, device=device))
    wide = tree_map(lambda t: widened(t), tuple(case))
    truth = outcome(op.reference, Case(*wide), seed)

    def error(got: list[Tensor]) -> float:
        worst = 0.0
        for g, t in zip(got, truth, strict=True):
            if g.numel():
                gap = (g.double() - t).abs().nan_to_num(nan=torch.inf)
                gap = torch.where(g.double() == t, 0.0, torch.where(g.isnan() & t.isnan(), 0.0, gap))
                size = t[t.isfinite()].abs().max() if bool(t.isfinite().any()) else t.new_ones(())
                worst = max(worst, float(gap.max() / size.clamp_min(1e-30)))
        return worst

    return error(outcome(op.call, case, seed)), error(outcome(op.reference, case, seed))


# ---- tensors of more than 2³¹ elements

LARGE = {  # op -> the call on a tensor (M, N), row by row
    "layer_norm": lambda op, x: op(x, x.shape[1:]),
    "rms_norm": lambda op, x: op(x, x.shape[1:]),
    "softmax": lambda op, x: op(x, -1),
    "log_softmax": lambda op, x: op(x, -1),
    "gelu": lambda op, x: op(x),
    "silu": lambda op, x: op(x),
    "relu": lambda op, x: op(x),
    "swiglu": lambda op, x: op(x[:, ::2], x[:, 1::2]),
    "glu": lambda op, x: op(x),
    "bias_activation": lambda op, x: op(x, x.new_ones(x.shape[1]), "gelu"),
    "cross_entropy": lambda op, x: op(x, torch.arange(len(x), device=x.device) % x.shape[1], reduction="none"),
    "rotary_embedding": lambda op, x: op(x, x.new_ones(x.shape[1] // 2), x.new_ones(x.shape[1] // 2)),
}


def large(run: Any) -> None:
    """More than 2³¹ elements: the first and the last rows are those of a call on these rows alone, forward and backward."""
    M, N = (24, 512) if run.rehearse else ((1 << 31) // 8192 + 64, 8192)
    for name in run.todo("large", [n for n in fused(run) if n in LARGE]):
        kernel, on_rows = partial(OPS[name].call, backend="triton"), LARGE[name]
        x = torch.empty(M, N, dtype=torch.bfloat16, device=run.device).normal_()
        y = on_rows(kernel, x.requires_grad_())
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        wrong = []
        for part in (slice(0, 16), slice(M - 16, M)):
            z = x.detach()[part].clone().requires_grad_()
            k = torch.arange(M, device=x.device)[part] % N
            alone = kernel(z, k, reduction="none") if name == "cross_entropy" else on_rows(kernel, z)
            (dz,) = torch.autograd.grad(alone, z, torch.ones_like(alone))
            if not (torch.equal(y[part], alone) and torch.equal(dx[part], dz)):
                wrong.append(f"rows {part.start} to {part.stop} differ")
        run.ledger.add(
            "large", name, "failed" if wrong else "ok", elements=M * N, **({"error": "; ".join(wrong)} if wrong else {})
        )
        del x, y, dx


# ---- the cost of a call


def host(run: Any) -> None:
    """Microseconds of the processor a tiny call, beside torch's; and whether a new batch size compiles a kernel."""
    names = [n for n in ("layer_norm", "rms_norm", "softmax", "swiglu", "gelu", "cross_entropy") if n in fused(run)]
    for name in run.todo("host", names[:1] if run.rehearse else names):
        op = OPS[name]
        case = op.draw(Draw(Random(0), dtype=torch.bfloat16, sizes=(16, 32), device=run.device))
        peer = op.peer or op.reference
        with torch.no_grad():
            ours = timing.host(lambda op=op, case=case: op.call(*case.args, **case.kwargs))
            theirs = timing.host(lambda peer=peer, case=case: peer(*case.args, **case.kwargs))
        run.ledger.add("host", name, "ok", ours_us=ours, torch_us=theirs, more_us=ours - theirs)
    for _ in run.todo("host", ["new batch sizes"]):
        from bptoolkit.triton_kernels.norms import forward_kernel

        def compiled() -> int:
            caches = getattr(forward_kernel, "device_caches", {})
            return sum(len(c[0]) for c in caches.values())

        counts = []
        for M in (7, 8, 16, 33, 1024) if not run.rehearse else (2, 3):
            bp.functional.layer_norm(torch.randn(M, 64, device=run.device), (64,), backend="triton")
            counts.append(compiled())
        fine = len(set(counts)) == 1
        run.ledger.add(
            "host",
            "new batch sizes",
            "ok" if fine else "failed",
            kernels=counts,
            **({} if fine else {"error": "compiled again"}),
        )


# ---- memory errors


def sanitizer(run: Any) -> None:
    """compute-sanitizer memcheck over small calls of every kernel, where the machine has it."""
    for name in run.todo("sanitizer", ["memcheck"]):
        tool = shutil.which("compute-sanitizer")
        if tool is None or run.rehearse:
            run.ledger.add("sanitizer", name, "none", why="not available")
            continue
        code = "import gpu_stages; gpu_stages.small_calls()"
        line = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", code]
        env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            done = subprocess.run(line, capture_output=True, text=True, timeout=max(5.0, run.left()), env=env)
        except subprocess.TimeoutExpired:
            run.ledger.add("sanitizer", name, "out of time")
            continue
        text = done.stdout + done.stderr
        summary = re.findall(r"ERROR SUMMARY: .*", text)
        status = "ok" if done.returncode == 0 else "failed"
        run.ledger.add("sanitizer", name, status, said=str(summary[-1:]), **({} if status == "ok" else {"error": text[-1500:]}))


def small_calls(device: str = "cuda") -> None:
    """Forward and backward of every kernel at sizes that straddle a tile."""
    for op in (op for op in OPS.values() if op.kernel):
        for seed in range(2):
            case = op.draw(Draw(Random(seed), dtype=torch.float32, sizes=(3, 17, 33), device=device))
            outcome(op.call, case)


STAGES = (
    (machine, 15),
    (kernels, 140),
    (ops, 60),
    (warm, 60),
    (speed, 90),
    (twice, 20),
    (convolution, 40),
    (large, 40),
    (host, 15),
    (compiled, 50),
    (paths, 40),
    (sanitizer, 40),
)
