"""The page that `make gpu` writes of its results: one table a stage; rows that lose or fail stay in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bptoolkit.table import markdown


def page(records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of all results."""
    stages = dict.fromkeys(r["stage"] for r in records)
    parts = ["# On a GPU"]
    if records:
        parts.append(f"{records[0]['device']}, code {records[0]['code']}. Times are medians; × is ours over the other.")
    for stage in stages:
        mine = [r for r in records if r["stage"] == stage]
        counts = {s: sum(r["status"] == s for r in mine) for s in ("ok", "failed", "out of time", "none")}
        parts.append(f"## {stage}: " + ", ".join(f"{n} {s}" for s, n in counts.items() if n))
        parts.append({"speed": speeds, "compiled": speeds, "convolution": convolutions}.get(stage, plain)(mine))
    return "\n\n".join(parts) + "\n"


def plain(records: Sequence[Mapping[str, Any]]) -> str:
    """Name, verdict and figures."""
    hidden = ("stage", "name", "status", "code", "device")
    rows = [[r["name"], r["status"], "; ".join(f"{k} {shown(v)}" for k, v in r.items() if k not in hidden)] for r in records]
    return markdown(["name", "verdict", "figures"], rows)


SPEED = [
    "op",
    "case",
    "forward ms",
    "× torch",
    "× compile",
    "× Liger",
    "of copy",
    "both ms",
    "× torch",
    "× compile",
    "× Liger",
    "of copy",
]
SPEED += ["peak ×", "saved ×", "verdict"]


def speeds(records: Sequence[Mapping[str, Any]]) -> str:
    """Ours beside torch's, torch.compile's and Liger's; "of copy": the share of a copy's bandwidth, by bytes that must move."""

    def against(r: Mapping[str, Any], peer: str, what: str) -> str:
        ours, theirs = r.get(f"ours_{what}"), r.get(f"{peer}_{what}")
        return f"{ours / theirs:.2f}" if ours is not None and theirs else "–"

    rows = []
    for r in records:
        cells = list(r["name"].split(" | "))
        for what, share in (("forward_ms", "forward_of_ceiling"), ("both_ms", "both_of_ceiling")):
            cells += [shown(r.get(f"ours_{what}")), *(against(r, p, what) for p in ("torch", "compile", "liger"))]
            cells += [f"{r[share]:.0%}" if share in r else "–"]
        cells += [
            against(r, "torch", "peak_mib"),
            against(r, "torch", "saved_mib"),
            r["status"] + (f": {r['why']}" if "why" in r else ""),
        ]
        rows.append(cells)
    return markdown(SPEED, rows)


CONVOLUTION = [
    "layer",
    "pass",
    "GFLOP",
    "product TFLOP/s",
    "vendor ms",
    "of product",
    "ours ms",
    "of product",
    "× vendor",
    "verdict",
]


def convolutions(records: Sequence[Mapping[str, Any]]) -> str:
    """A pass of a layer a row; "of product": the share of the rate of a matrix product that was timed in turns with it."""
    rows = []
    for r in records:
        if "ours_ms" not in r:
            continue
        cells = [*r["name"].split(" | "), shown(r["gflop"]), shown(r["product_tflops"])]
        for who in ("vendor", "ours"):
            cells += [shown(r[f"{who}_ms"]), f"{r[f'{who}_of_product']:.1%}"]
        rows.append([*cells, f"{r['ours_ms'] / r['vendor_ms']:.2f}", r["status"]])
    rest = [r for r in records if "ours_ms" not in r]
    return "\n\n".join([*([markdown(CONVOLUTION, rows)] if rows else []), *([plain(rest)] if rest else [])])


def shown(value: Any) -> str:
    text = f"{value:.3g}" if isinstance(value, float) else "–" if value is None else str(value)
    return text.replace("\n", " ").replace("|", "/")[:200]
