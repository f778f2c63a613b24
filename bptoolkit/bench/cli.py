"""`bptoolkit bench [OP ...]`: time, saved memory and error of ops beside torch's own, in one run."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch

from bptoolkit.bench import HEADER, RedError, Row, as_dict, bench, overhead
from bptoolkit.ops import OPS
from bptoolkit.table import between, markdown

BEGIN, END = "<!-- benchmark: bptoolkit bench --markdown docs/results.md -->", "<!-- end of benchmark -->"

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv: list[str]) -> int:
    """Exit status 0; 1 if an op's checks are red; 2 for an op that does not exist."""
    parser = argparse.ArgumentParser(prog="bptoolkit bench", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help="op names; all by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing per row (default 4)")
    parser.add_argument(
        "--out",
        type=Path,
        help="a folder to write NAME.json and NAME.md to; rows of other ops that NAME.json has, of this machine, stay",
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="put the table between its two marks in FILE as well")
    parser.add_argument("--name", default="bench", help="of the files (default: bench)")
    args = parser.parse_args(argv)
    unknown = [name for name in args.ops if name not in OPS]
    if unknown:
        print(f"bptoolkit bench: there is no op {unknown[0]!r}; there are {', '.join(OPS)}")
        return 2
    torch.set_num_threads(args.threads)
    facts = where(args.device, args.dtype, args.threads)
    print("\n".join(f"{key}: {value}" for key, value in facts.items()) + "\n", flush=True)
    rows: list[Row] = []
    red: list[str] = []
    for name in args.ops or OPS:
        try:
            found = bench(OPS[name], device=args.device, dtype=DTYPES[args.dtype], seconds=args.seconds)
        except RedError as report:
            red.append(name)
            print(f"{name}: not timed, its checks are red\n{report}", flush=True)
            continue
        for row in found:
            rows.append(row)
            print(f"{row.op} {row.label}: forward+backward {row.both / row.both_torch:.2f} × torch", flush=True)
    if args.out and (args.out / f"{args.name}.json").exists():
        rows = merged(rows, json.loads((args.out / f"{args.name}.json").read_text()), facts)
    lines = markdown(HEADER, [row.cells() for row in rows])
    tiny = overhead()
    note = "tiny linear, forward + backward, 1 thread: " + ", ".join(f"{k} {v:.1f} µs" for k, v in tiny.items())
    print("\n" + lines + "\n\n" + note)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        record = {"where": facts, "rows": [as_dict(row) for row in rows], "overhead_us": tiny, "red": red}
        (args.out / f"{args.name}.json").write_text(json.dumps(record, indent=1) + "\n")
        head = "\n".join(f"- {key}: {value}" for key, value in facts.items())
        (args.out / f"{args.name}.md").write_text(f"# Benchmark\n\n{head}\n\n{lines}\n\n{note}\n")
    if args.markdown:
        facts_line = " · ".join(f"{key} {value}" for key, value in facts.items())
        fresh, _ = between(args.markdown, BEGIN, END, f"{facts_line}\n\n{lines}\n\n{note}")
        args.markdown.write_text(fresh)
    return int(bool(red))


def merged(rows: list[Row], record: dict[str, Any], facts: dict[str, str]) -> list[Row]:
    """The rows, and those of a record for other ops if it was made in the same place, in the order of the ops."""
    if record["where"] != facts:
        return rows
    measured = {row.op for row in rows}
    every = rows + [Row(**row) for row in record["rows"] if row["op"] not in measured and row["op"] in OPS]
    return sorted(every, key=lambda row: list(OPS).index(row.op))


def where(device: str, dtype: str, threads: int) -> dict[str, str]:
    """Device, versions and settings, for the head of a result."""
    on_gpu = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU, {platform.machine()}, {threads} threads",
        "dtype": dtype,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
    }
