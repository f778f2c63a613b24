"""`make gpu`: everything that needs a GPU, in one command of under nine minutes.

    python benchmarks/gpu.py --out FOLDER      writes FOLDER/gpu.jsonl as it goes, and FOLDER/gpu.md at the end

Stages, by priority, each under its own budget of seconds: what the machine is and can do; every kernel's tests, compiled; every
op in three dtypes beside float64; speed, memory and traffic of the kernels beside torch's; attention differentiated twice;
convolutions as shares of a matrix product's rate; tensors of over 2³¹ elements; the cost of a call, and whether a new batch
size compiles anything; torch.compile; attention by each of its paths; compute-sanitizer. Each result is appended at once, with
a hash of the code it is of; another run, given the folder by `--resume`, leaves out what is there. Needs Python, torch, triton,
numpy, pytest and hypothesis; nothing need be installed of this project, and there is no network.

Without a GPU it says so and exits with 2. `--rehearse` runs the same code on the CPU, in Triton's interpreter, at toy sizes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 520  # seconds for all of it


def assemble() -> Path:
    """A folder in which `import bptoolkit` finds this checkout, kernels and recipes in place: no installation is needed."""
    site = Path(tempfile.mkdtemp(prefix="bptoolkit-"))
    shutil.copytree(ROOT / "bptoolkit", site / "bptoolkit")
    for folder in ("triton_kernels", "recipes"):
        shutil.copytree(ROOT / folder, site / "bptoolkit" / folder)
    shutil.copy(ROOT / "bptoolkit_pytest.py", site)
    sys.path.insert(0, str(site))
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(site), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    return site


def code_hash() -> str:
    """Of the code that is measured, and of what measures it."""
    digest = hashlib.sha256()
    folders = ("bptoolkit", "triton_kernels", "tests/kernels")
    files = [f for folder in folders for f in sorted((ROOT / folder).rglob("*.py"))]
    for file in (*files, *sorted((ROOT / "benchmarks").glob("gpu*.py")), ROOT / "tests/fused.py"):
        digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()[:12]


class Ledger:
    """Results, appended to a file at once; those of earlier runs of the same code on the same device count as done."""

    def __init__(self, out: Path, resume: Path | None, code: str, device: str) -> None:
        self.path, self.stamp = out / "gpu.jsonl", {"code": code, "device": device}
        self.records: list[dict[str, Any]] = []
        for path in dict.fromkeys(p for p in ((resume or out) / "gpu.jsonl", self.path) if p.exists()):
            for line in path.read_text().splitlines():
                record = json.loads(line)
                if {k: record.get(k) for k in self.stamp} == self.stamp and record["status"] != "out of time":
                    self.records.append(record)
        self.done = {(r["stage"], r["name"]) for r in self.records}
        out.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(json.dumps(r) + "\n" for r in self.records))

    def add(self, stage: str, name: str, status: str, **figures: Any) -> None:
        record = {"stage": stage, "name": name, "status": status, **self.stamp, **figures}
        self.records.append(record)
        self.done.add((stage, name))
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        said = " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in figures.items())
        print(f"[{stage}] {name}: {status} {said}"[:400], flush=True)


class Run:
    """What a stage is given.

    Attributes:
        device: "cuda", or "cpu" in a rehearsal.
        rehearse: toy sizes, no claims.
        names: the ops to look at; None for all.
        ledger: where results go; `todo(stage, names)` are those that are not there yet.
        out: the folder of the results.
    """

    def __init__(self, device: str, rehearse: bool, names: list[str] | None, ledger: Ledger, out: Path, end: float) -> None:
        self.device, self.rehearse, self.names, self.ledger, self.out, self.end = device, rehearse, names, ledger, out, end
        self.stage_end = end

    def left(self) -> float:
        """Seconds that this stage still has."""
        return min(self.stage_end, self.end) - time.monotonic()

    def todo(self, stage: str, names: Any) -> Iterator[str]:
        """The names that have no result yet, for as long as there is time; those for which there is none are recorded so."""
        for name in names:
            if (stage, name) in self.ledger.done:
                continue
            if self.left() <= 0:
                self.ledger.add(stage, name, "out of time")
                continue
            yield name


def main(argv: list[str]) -> int:
    """Exit status 0; 1 if something that ran is wrong; 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="the folder to write to")
    parser.add_argument(
        "--resume", type=Path, default=None, help="a folder with an earlier run's gpu.jsonl (default: that of --out)"
    )
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds for all of it (default {BUDGET})")
    parser.add_argument("--stage", action="append", help="run this stage only; may be repeated")
    parser.add_argument("--op", action="append", help="look at this op only; may be repeated")
    parser.add_argument(
        "--rehearse", action="store_true", help="on the CPU, at toy sizes: tests this command, measures nothing"
    )
    args = parser.parse_args(argv)
    began = time.monotonic()
    import torch

    if not args.rehearse and not torch.cuda.is_available():
        print(f"make gpu: torch {torch.__version__} sees no GPU here; --rehearse runs the same code on the CPU at toy sizes")
        return 2
    site = assemble()
    try:
        return run(args, began)
    finally:
        shutil.rmtree(site, ignore_errors=True)


def run(args: argparse.Namespace, began: float) -> int:
    """All stages, each to the end of its budget; a stage that raises is recorded and the next one goes on."""
    import gpu_common
    import gpu_report
    import gpu_stages
    import torch

    device = "cpu" if args.rehearse else "cuda"
    ledger = Ledger(args.out, args.resume, code_hash(), "rehearsal" if args.rehearse else torch.cuda.get_device_name())
    state = Run(device, args.rehearse, args.op, ledger, args.out, began + args.budget)
    known = [stage.__name__ for stage, _ in gpu_stages.STAGES]
    for name in args.stage or []:
        if name not in known:
            print(f"make gpu: there is no stage {name!r}; there are {', '.join(known)}")
            return 2
    with gpu_common.running(device):
        for stage, seconds in gpu_stages.STAGES:
            if args.stage and stage.__name__ not in args.stage:
                continue
            state.stage_end = state.end if args.rehearse else time.monotonic() + seconds  # a rehearsal measures nothing
            try:
                stage(state)
            except Exception:
                ledger.add(stage.__name__, "the stage itself", "failed", error=traceback.format_exc()[-1500:])
            (args.out / "gpu.md").write_text(gpu_report.page(ledger.records))
    bad = [f"{r['stage']}: {r['name']}" for r in ledger.records if r["status"] == "failed"]
    print(f"\n{time.monotonic() - began:.0f} s; results in {args.out}/gpu.jsonl and gpu.md")
    print("\n".join(["failed:", *bad]) if bad else "nothing failed")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
