"""What backpropagation through time keeps, holds and costs: lstm, gru and rnn in every way of saving and truncating.

    python benchmarks/bptt.py      writes benchmarks/results/bptt.json and bptt.md

Per row, beside torch's own op at the same size: the bytes between forward and backward without inputs and weights; the most
bytes allocated at any moment of forward and backward, inputs and weights not counted; and the time of both, as the ratio of
medians of runs that alternate in both orders. A row whose gradients disagree with the plain loop is not timed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

import torch

import bptoolkit as bp
from bptoolkit.bench import compare, saved_bytes
from bptoolkit.bench.cli import DTYPES, where
from bptoolkit.cases import Draw
from bptoolkit.ops.recurrent_reference import wide
from bptoolkit.table import markdown

RESULTS = Path(__file__).resolve().parent / "results"
GATES = {"lstm": 4, "gru": 3, "rnn": 1}
HEADER = [
    "op",
    "save",
    "truncate",
    "kept bytes a step",
    "kept H",
    "kept ×",
    "peak MiB",
    "peak ×",
    "steps again",
    "time ms",
    "time ×",
]


def ways(name: str, T: int, B: int, H: int, dtype: torch.dtype) -> list[tuple[str, object, str, object]]:
    """The rows of an op: a label and what it stands for, of saving and of truncating."""
    whole = bp.bptt_plan(name, T, B, H, "gates", dtype=dtype).saved
    saves: list[tuple[str, object]] = [(s, s) for s in ("gates", "outputs", "sparse", "segments")]
    saves += [(f"{share:.0%} of gates", int(share * whole)) for share in (0.5, 0.25, 0.1)]
    k = max(1, T // 8)
    cuts: list[tuple[str, object]] = [(str(k), k), (f"({k}, {2 * k})", (k, 2 * k)), ("eprop", "eprop")]
    cuts += [(f"ARTBP(1/{k})", bp.ARTBP(1 / k))]
    rows: list[tuple[str, object, str, object]] = [(*s, "", None) for s in saves]
    return rows + [(*s, *c) for s in (saves[0], saves[3]) for c in cuts]


def peak(fn, device: str) -> int:
    """The most bytes allocated at any moment of fn, above what there was before."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        fn()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        fn()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for e in sorted(events, key=lambda e: e.start_ns()):
        held += e.nbytes()
        most = max(most, held)
    return most


def right(name: str, save: object, truncate: object, gates: int) -> bool:
    """Whether the gradients are those of the plain loop, at a small size, with the same share of the budget."""
    x, _, weights = wide(Draw(Random(1), dtype=torch.float64), gates, 9, 2, 3)
    if not isinstance(save, str):
        save = bp.bptt_plan(name, 9, 2, 3, "gates", dtype=torch.float64).saved // 2
    grads = []
    for fn, options in ((bp.OPS[name].call, {"save": save}), (bp.OPS[name].reference, {})):
        torch.manual_seed(0)
        y, _ = fn(x, None, weights, truncate=truncate, **options)
        grads.append(torch.autograd.grad(y.sin().sum(), [x, *weights]))
    return all(torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in zip(*grads))


def measure(name: str, T: int, B: int, H: int, dtype: torch.dtype, device: str, seconds: float) -> list[dict[str, object]]:
    """All rows of an op."""
    op = bp.OPS[name]
    args = wide(Draw(Random(0), dtype=dtype, device=device), GATES[name], T, B, H)
    at = [args[0], *args[2]]
    dy = torch.randn(T, B, H, device=device, dtype=dtype)

    def both(fn, **options):
        return lambda: torch.autograd.grad(fn(*args, **options)[0], at, dy)

    theirs = both(op.peer)
    kept_torch, peak_torch = saved_bytes(lambda: op.peer(*args), at), peak(theirs, device)
    rows = []
    for save_label, save, truncate_label, truncate in ways(name, T, B, H, dtype):
        if not right(name, save, truncate, GATES[name]):
            print(f"{name} save={save_label} truncate={truncate_label}: not timed, its gradients are wrong", flush=True)
            continue
        options = {"save": save, "truncate": truncate}
        ours = both(op.call, **options)
        kept = saved_bytes(lambda options=options: op.call(*args, **options), at)
        time, time_torch = compare(ours, theirs, seconds)
        row = {
            "op": name,
            "save": save_label,
            "truncate": truncate_label,
            "kept": kept,
            "kept_torch": kept_torch,
            "kept_a_step": kept / T,
            "kept_H": kept / (T * B * H * dtype.itemsize),
            "peak": peak(ours, device),
            "peak_torch": peak_torch,
            "steps_again": bp.bptt_plan(name, T, B, H, save, dtype=dtype).recomputed,
            "time": time,
            "time_torch": time_torch,
        }
        rows.append(row)
        print(" ".join(cells(row)), flush=True)
    return rows


def cells(row: dict) -> list[str]:
    """The row of the table."""
    return [
        row["op"],
        row["save"],
        row["truncate"] or "–",
        f"{row['kept_a_step']:.0f}",
        f"{row['kept_H']:.2f}",
        f"{row['kept'] / row['kept_torch']:.2f}",
        f"{row['peak'] / 2**20:.2f}",
        f"{row['peak'] / row['peak_torch']:.2f}",
        str(row["steps_again"]),
        f"{row['time']:.2f}",
        f"{row['time'] / row['time_torch']:.2f}",
    ]


def main() -> None:
    """Measure, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing per row")
    parser.add_argument("--shape", type=int, nargs=3, default=(128, 32, 256), metavar=("T", "B", "H"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    T, B, H = args.shape
    facts = where(args.device, args.dtype, args.threads) | {"shape": f"T={T} B={B} I=H={H}"}
    rows = [r for name in GATES for r in measure(name, T, B, H, DTYPES[args.dtype], args.device, args.seconds)]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "bptt.json").write_text(json.dumps({"where": facts, "rows": rows}, indent=1) + "\n")
    head = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    note = (
        "Kept: between forward and backward, without inputs and weights; H counts blocks of B × H elements a step. Peak: the "
        "most allocated at any moment of forward and backward. × is ours over torch's own op; times are medians of alternating "
        "runs of forward and backward."
    )
    (args.out / "bptt.md").write_text(
        f"# Backpropagation through time\n\n{head}\n\n{note}\n\n{markdown(HEADER, [cells(r) for r in rows])}\n"
    )


if __name__ == "__main__":
    main()
