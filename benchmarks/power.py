"""How small a mistake the error model sees: the share of planted errors that `bptoolkit.verify.tolerance` finds, measured.

    python benchmarks/power.py     writes benchmarks/results/power.json and the tables between the markers of docs/tolerances.md

A correct gradient (torch's own of a product N x 32 by 32 x 32, and of a softmax over rows of 32) is multiplied by 1 + delta,
rounded to the dtype, and judged. Everything follows from the seeds, so that a second run writes the same file.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F

from bptoolkit.verify.tolerance import compare, noise

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOW = (0.0, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2)
DELTAS = {
    "float64": (0.0, 1e-15, 1e-14, 1e-13, 1e-12, 1e-11, 1e-9, 1e-6),
    "float32": (0.0, 1e-7, 3e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4),
    "bfloat16": LOW,
    "float16": LOW,
}
ROWS = (1, 4, 16, 64, 256)
SEEDS = 20
COLUMNS = 32


def softmax(x: torch.Tensor) -> torch.Tensor:
    return F.softmax(x, -1)


def linear(x: torch.Tensor) -> torch.Tensor:
    g = torch.Generator().manual_seed(7)
    return x @ torch.randn(COLUMNS, COLUMNS, generator=g, dtype=torch.float64).to(x.dtype)


def case(f, rows: int, dtype: torch.dtype, seed: int):
    """The scale of the gradient, and torch's own gradient, of one drawn call."""
    g = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(rows, COLUMNS, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))

    def run(tensors):
        x = tensors[0].clone().requires_grad_()
        return torch.autograd.grad(f(x), x, tensors[1])

    return noise(run, [x, dy], dtype, seed=seed)[0], run([x, dy])[0]


def measure() -> list[dict]:
    """One row per function, dtype and number of elements: delta -> share of the draws in which it is seen."""
    rows = []
    for f in (linear, softmax):
        for name, dtype in DTYPES.items():
            for n in ROWS:
                drawn = [case(f, n, dtype, seed) for seed in range(SEEDS)]
                seen = {}
                for delta in DELTAS[name]:
                    wrong = [(s, g, (g.double() * (1 + delta)).to(dtype)) for s, g in drawn]
                    found = [compare(w, s, dtype, None if name == "float64" else g) for s, g, w in wrong]
                    seen[f"{delta:g}"] = sum(v is not None for v in found) / SEEDS
                rows.append({"function": f.__name__, "dtype": name, "elements": n * COLUMNS, "seen": seen})
    return rows


def table(rows: list[dict]) -> str:
    """Markdown: the share of draws in which an error of each relative size is seen, in percent."""
    lines = []
    for name in DTYPES:
        some = [r for r in rows if r["dtype"] == name]
        shown = list(some[0]["seen"])
        lines += [f"**{name}**, % seen at a relative error of", ""]
        lines += ["| gradient of | elements | " + " | ".join(shown) + " |", "|---|---|" + "---|" * len(shown)]
        lines += [
            f"| {r['function']} | {r['elements']} | " + " | ".join(f"{100 * r['seen'][d]:.0f}" for d in shown) + " |"
            for r in some
        ]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    rows = measure()
    result = {"torch": torch.__version__, "seeds": SEEDS, "columns": COLUMNS, "rows": rows}
    (ROOT / "benchmarks/results/power.json").write_text(json.dumps(result, indent=1) + "\n")
    page = ROOT / "docs/tolerances.md"
    head, _, rest = page.read_text().partition("<!-- power: python benchmarks/power.py -->\n")
    _, _, tail = rest.partition("<!-- end of power -->")
    page.write_text(f"{head}<!-- power: python benchmarks/power.py -->\n\n{table(rows)}\n<!-- end of power -->{tail}")


if __name__ == "__main__":
    main()
