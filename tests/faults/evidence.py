"""`make evidence`: how many planted mistakes the verifier catches, and how often it alarms on what is right.

Every fault and every correct twin is verified with default settings and three seeds, torch's own checkers run on the same
faults, and functions of torch.nn.functional with the same three seeds. The result is a JSON record with the hash of the code
it holds for, and the tables of docs/evidence.md. `--check` only says whether the record is still of this code.

What has been checked is appended to `.evidence-<hash>.jsonl` at once: a second run goes on where the last one ended. Budgets
count the time of the processor, so that the record does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import multiprocessing
import os
import platform
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")  # see tests/conftest.py
ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "results" / "evidence.json"
PAGE = ROOT / "docs" / "evidence.md"
SEEDS = (0, 1, 2)
FUNCTION_BUDGET = 20.0  # seconds; the default of 120 would take hours for all functions on two cores


def code_hash() -> str:
    """Of all code that the evidence depends on; comments, docstrings and layout do not count."""
    digest = hashlib.sha256()
    files = sorted([*(ROOT / "bptoolkit" / "verify").rglob("*.py"), *(ROOT / "tests" / "faults").glob("*.py")])
    for file in files:
        if file.name in ("evidence.py", "cli.py", "mutate.py", "mutants.py"):
            continue
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if (
                isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
                and ast.get_docstring(node, clean=False) is not None
            ):
                node.body[0] = ast.Pass()
        digest.update(file.name.encode() + ast.dump(tree).encode())
    return digest.hexdigest()[:16]


def verify_one(job: tuple[str, str, int]) -> dict[str, Any]:
    """One full check: of a fault, a twin, or a function of torch.nn.functional."""
    kind, name, seed = job
    import torch

    import bptoolkit as bp

    torch.set_num_threads(1)
    if kind == "function":
        from faults.functional import FUNCTIONS

        fn, inputs = FUNCTIONS[name]
        reference, contract = fn, None
    else:
        from faults import FAULTS, TWINS

        record = (FAULTS if kind == "fault" else TWINS)[name]
        fn, inputs, reference, contract = record.fn, record.inputs, record.reference, record.contract
    began = time.process_time()
    try:
        budget = FUNCTION_BUDGET if kind == "function" else None
        report = bp.verify.check(fn, inputs, reference=reference, contract=contract, seed=seed, budget=budget)
        found = {f.property: f.message[:200] for f in report.failures}
        calls = sum(report.calls.values())
    except Exception as problem:
        found, calls = {"CRASH": f"{type(problem).__name__}: {problem}"}, 0
    return {
        "kind": kind,
        "name": name,
        "seed": seed,
        "found": found,
        "calls": calls,
        "seconds": round(time.process_time() - began, 2),
    }


def score_one(name: str) -> dict[str, Any]:
    """What torch's own checkers and the usual test say of one fault, and of the correct twin of its family."""
    from faults import FAULTS
    from faults.score import score

    return {"name": name, **score(FAULTS[name])}


def upper_bound(k: int, n: int, confidence: float = 0.95) -> float:
    """The Clopper-Pearson upper bound on a rate of which k of n were seen."""
    if n == 0 or k >= n:
        return 1.0
    low, high = k / n, 1.0
    for _ in range(60):
        p = (low + high) / 2
        tail = sum(math.comb(n, j) * p**j * (1 - p) ** (n - j) for j in range(k + 1))
        low, high = (p, high) if tail > 1 - confidence else (low, p)
    return high


def gather(processes: int, seeds: tuple[int, ...], only: str, minutes: float) -> dict[str, Any]:
    """Run everything, on several processes, seed after seed; after `minutes` only what has been reached counts."""
    import torch

    from faults import FAULTS, TWINS
    from faults.functional import FUNCTIONS

    names = {"fault": FAULTS, "twin": TWINS, "function": FUNCTIONS}
    jobs = [(kind, name, seed) for kind in ("fault", "twin") if only in ("", kind) for seed in seeds for name in names[kind]]
    jobs += [("function", name, seed) for seed in seeds if only in ("", "function") for name in names["function"]]
    until, done = time.monotonic() + 60 * minutes, ROOT / f".evidence-{code_hash()}.jsonl"
    rows = [json.loads(line) for line in done.read_text().splitlines()] if done.exists() else []
    before = {(r["kind"], r["name"], r["seed"]) for r in rows}
    jobs = [job for job in jobs if job not in before]
    rows = [r for r in rows if r["seed"] in seeds and only in ("", r["kind"])]
    with done.open("a") as log, multiprocessing.get_context("spawn").Pool(processes, _child, maxtasksperchild=40) as pool:
        scores = list(pool.imap(score_one, FAULTS)) if only in ("", "score") else []
        for k, row in enumerate(pool.imap_unordered(verify_one, jobs)):
            if time.monotonic() > until:
                print(f"the time is up: {k} of {len(jobs)} checks were made", flush=True)
                break
            rows.append(row)
            print(json.dumps(row), file=log, flush=True)
            if row["kind"] != "fault" and row["found"]:
                print(f"ALARM {row['kind']} {row['name']} seed {row['seed']}: {row['found']}", flush=True)
            if row["kind"] == "fault" and not set(row["found"]) & set(FAULTS[row["name"]].caught_by):
                print(f"MISSED {row['name']} seed {row['seed']}: found {list(row['found'])}", flush=True)
            if k % 10 == 9:
                print(f"{k + 1} of {len(jobs)}", flush=True)
    rows.sort(key=lambda r: (r["kind"], r["name"], r["seed"]))
    return {
        "code": code_hash(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "seeds": list(seeds),
        "checks": rows,
        "baselines": scores,
    }


def _child() -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    import torch

    from bptoolkit.verify import engine, search, variants

    torch.set_num_threads(1)
    for module in (engine, search, variants):
        module.time = SimpleNamespace(monotonic=time.process_time)  # type: ignore[attr-defined]


def table(record: dict[str, Any]) -> str:
    """The tables of the page."""
    from faults import FAULTS

    caught: dict[str, list[bool]] = defaultdict(list)
    right: dict[str, list[bool]] = defaultdict(list)
    for row in record["checks"]:
        if row["kind"] == "fault":
            caught[row["name"]].append(bool(row["found"]))
            right[row["name"]].append(bool(set(row["found"]) & set(FAULTS[row["name"]].caught_by)))
    by_name = {b["name"]: b for b in record["baselines"]}
    tools = [t for t in next(iter(by_name.values()), {}) if t != "name"]
    kinds = sorted({f.kind for f in FAULTS.values()})
    lines = [
        f"torch {record['torch']}, Python {record['python']}, default settings (functions: budget={FUNCTION_BUDGET:.0f}), "
        f"seeds {', '.join(map(str, record['seeds']))}.",
        "",
        "| class of mistake | faults | " + " | ".join(tools) + " | bptoolkit.verify | for the right property |",
        "|---" * (len(tools) + 4) + "|",
    ]
    total: Counter[str] = Counter()
    for kind in [*kinds, "all"]:
        names = [n for n, f in FAULTS.items() if kind in (f.kind, "all")]
        cells = [str(sum(bool(by_name.get(n, {}).get(t)) for n in names)) for t in tools]
        total[kind] = len(names)
        all_caught = sum(all(caught[n]) for n in names)
        all_right = sum(all(right[n]) for n in names)
        lines.append(f"| {kind} | {len(names)} | {' | '.join(cells)} | {all_caught} | {all_right} |".replace("|  |", "|"))
    historic = [n for n, f in FAULTS.items() if f.history]
    seen = sum(all(right[n]) for n in historic)
    lines += [
        "",
        f"{len(historic)} of the faults are replicas of public bugs; {seen} of them are caught for the right property.",
    ]
    lines += ["", "| judged to be right | checks | alarms | rate, 95 % upper bound | calls |", "|---|---|---|---|---|"]
    for kind, words in (("twin", "correct twins"), ("function", "functions of torch.nn.functional")):
        rows = [r for r in record["checks"] if r["kind"] == kind]
        alarms = sum(bool(r["found"]) for r in rows)
        bound = upper_bound(alarms, len(rows))
        lines.append(f"| {words} | {len(rows)} | {alarms} | {100 * bound:.2f} % | {sum(r['calls'] for r in rows)} |")
    seconds = sorted(r["seconds"] for r in record["checks"])
    lines += [
        "",
        f"A check took {seconds[len(seconds) // 2]:.1f} s in the median and {seconds[-1]:.0f} s at most, on one core.",
    ]
    return "\n".join(lines)


def write_page(record: dict[str, Any]) -> None:
    """Put the tables between the markers of the page."""
    text = PAGE.read_text()
    head, _, rest = text.partition("<!-- evidence: make evidence -->\n")
    _, _, tail = rest.partition("<!-- end of evidence -->")
    PAGE.write_text(f"{head}<!-- evidence: make evidence -->\n\n{table(record)}\n\n<!-- end of evidence -->{tail}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the record is of this code")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", default="", choices=["", "fault", "twin", "function", "score"], help="print, write nothing")
    parser.add_argument("--minutes", type=float, default=600.0, help="after these, stop and record what has been reached")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    if args.check:
        stale = json.loads(RECORD.read_text())["code"] != code_hash()
        print("the evidence is of other code: run `make evidence`" if stale else "the evidence is of this code")
        return int(stale)
    record = gather(args.processes, tuple(range(args.seeds)), args.only, args.minutes)
    if not args.only:
        RECORD.write_text(json.dumps(record, indent=None, separators=(",", ":")).replace('},{"kind"', '},\n{"kind"') + "\n")
        write_page(record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
