"""`make demo`: verify the ops of the digits recipe, train it with torch's layers and with bptoolkit's, and compare.

1. The gradients of every op that `swap` puts into the model are verified.
2. The recipe is trained twice from one seed, as `bptoolkit fit digits` trains it. In float32 two such curves part: rounding
   differs in the last bit, and training multiplies it. Torch's own curve parts from itself as far, by 0.02 to 0.06 at its
   widest, when its first weights are scaled by 1 + 1e-7 ξ, ξ normal.
3. So both are also trained in float64, one step of each in turn: there a wrong gradient could not hide behind rounding. The
   same in float32 gives the time of a step: who goes first alternates, and the medians are compared.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import bptoolkit as bp
from bptoolkit.fit import fit, quiet
from bptoolkit.recipe import find

FOLDER = Path("runs/demo")
LAYERS = ("torch", "bptoolkit")
START = 46  # steps, 2 epochs: rounding has not grown yet
FIRST, WHOLE, DOUBLE = 1e-4, 0.2, 1e-10  # largest difference: of those steps, of all, in float64


class Row(NamedTuple):
    """A row of the table."""

    label: str
    torch: str
    bptoolkit: str
    remark: str = ""
    ok: bool = True


class SideBySide(NamedTuple):
    """Both models trained in turn: per step, the losses and the milliseconds of (torch, bptoolkit)."""

    losses: list[tuple[float, float]]
    times: list[tuple[float, float]]


def models(dtype: torch.dtype = torch.float32) -> list[Any]:
    """The recipe's module with torch's layers and with ours, from one seed."""
    from bptoolkit.recipes.digits import Digits

    made = []
    for layers in LAYERS:
        torch.manual_seed(0)
        made.append(Digits(layers).to(dtype))
    return made


def batches(n: int) -> list[tuple[Tensor, Tensor]]:
    """The first n training batches of the recipe, all of one size."""
    from bptoolkit.recipes.digits import DigitsData

    data = DigitsData()
    data.setup("fit")
    loader = data.train_dataloader()
    whole = len(loader) - 1  # the last is smaller
    return [loader.batch(k // whole, k % whole) for k in range(n)]


def verify(ops: list[str]) -> list[str]:
    """The ops that fail; prints a line per op, and what fails first."""
    bad = []
    for name in ops:
        began = time.perf_counter()
        report = bp.verify.check(bp.OPS[name], quick=True, budget=6.0)
        calls, seconds = sum(report.calls.values()), time.perf_counter() - began
        verdict = "ok" if report.ok else "FAILED"
        print(f"  {name:14} {verdict:6} {len(report.calls)} properties on {calls} calls, {seconds:.1f} s", flush=True)
        if not report.ok:
            print(f"{report.failures[0]}\n    `bptoolkit verify {name}` has the whole report")
            bad.append(f"the gradients of {name}")
    return bad


def side_by_side(dtype: torch.dtype, steps: int, warmup: int = 5) -> SideBySide:
    """Train both models, one step of each in turn, on the same batches and dropout masks."""
    both = models(dtype)
    optimizers = [torch.optim.AdamW(m.parameters(), 2e-3) for m in both]

    def step(k: int, x: Tensor, y: Tensor, seed: int) -> tuple[float, float]:
        torch.manual_seed(seed)
        began = time.perf_counter()
        loss = both[k].loss(both[k](x), y)
        optimizers[k].zero_grad()
        loss.backward()
        optimizers[k].step()
        return loss.item(), 1e3 * (time.perf_counter() - began)

    losses, times = [], []
    for n, (x, y) in enumerate(batches(steps)):
        order = (0, 1) if n % 2 else (1, 0)
        did = {k: step(k, x.to(dtype), y, n) for k in order}
        losses.append((did[0][0], did[1][0]))
        times.append((did[0][1], did[1][1]))
    return SideBySide(losses, times[warmup:])


def saved_bytes(module: nn.Module, x: Tensor, y: Tensor) -> int:
    """Bytes kept from forward to backward: every storage once, parameters not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    storages: dict[int, Any] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage()  # held, so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = module.loss(module(x), y)  # type: ignore[operator]
    total = sum(s.nbytes() for address, s in storages.items() if address not in parameters)
    del loss
    return total


def train() -> tuple[list[dict[str, Any]], list[list[float]]]:
    """`bptoolkit fit digits` with both layer sets; the results and the loss curves."""
    from bptoolkit.training import read_csv

    results, curves = [], []
    for layers in LAYERS:
        fit(find("digits"), [], layers=layers, run=f"demo-{layers}", resume="none")
        folder = Path("runs/digits", f"demo-{layers}")
        results.append(json.loads((folder / "result.json").read_text()))
        curves.append([float(row["train_loss"]) for row in read_csv(folder / "metrics.csv")])
    return results, curves


def compare(results: list[dict[str, Any]], curves: list[list[float]], double: SideBySide, single: SideBySide) -> list[Row]:
    """The rows of the table, each with whether it is as it must be."""
    rows = []
    accuracy = [r["test_acc"] for r in results]
    bound = results[0]["floor"]["bound"]
    reached = all(r["floor"]["verdict"] == "reached" for r in results)
    rows.append(Row("test accuracy", *(f"{a:.2f} %" for a in accuracy), f"floor: {bound}", reached))

    apart = [abs(a - b) for a, b in zip(*curves)]
    apart64 = [abs(a - b) for a, b in double.losses]
    checks = (
        (f"largest difference of the loss curves, {len(apart)} steps", widest(apart), WHOLE),
        (f"  of their first {START} steps", widest(apart[:START]), FIRST),
        (f"  of float64 curves, {len(apart64)} steps", widest(apart64), DOUBLE),
    )
    rows += [Row(label, "", f"{value:.1e}", f"at most {most:g}", value <= most) for label, value, most in checks]

    ms = [median(t[k] for t in single.times) for k in (0, 1)]
    rows.append(Row("time per step, one thread", *(f"{t:.2f} ms" for t in ms), f"ratio {ms[1] / ms[0]:.2f}"))
    x, y = batches(1)[0]
    kept = [saved_bytes(m, x, y) for m in models()]
    sizes = (f"{b / 2**20:.2f} MiB" for b in kept)
    rows.append(Row("saved for backward, without parameters", *sizes, f"ratio {kept[1] / kept[0]:.2f}"))
    return rows


def widest(apart: list[float]) -> float:
    """The largest; NaN if there is one, which `max` would step over."""
    return torch.tensor(apart, dtype=torch.float64).max().item()


def table(rows: list[Row]) -> str:
    """The rows, aligned."""
    cells = [("", *LAYERS, ""), *((r.label, r.torch, r.bptoolkit, r.remark + ("" if r.ok else "  MISSED")) for r in rows)]
    widths = [max(len(c[k]) for c in cells) for k in range(4)]
    lines = [f"{a:{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}   {d}".rstrip() for a, b, c, d in cells]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def plot(curves: list[list[float]], double: SideBySide, path: Path) -> None:
    """Both loss curves, and how far they are apart."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    left.plot(curves[0], color="#9ecae1", linewidth=4, label="torch's layers")
    left.plot(curves[1], color="#d94801", linewidth=0.9, label="bptoolkit's layers")
    left.set(title="digits: two trainings from one seed", xlabel="step", ylabel="training loss", yscale="log")
    for name, pairs, color in (("float32", zip(*curves), "#d94801"), ("float64, in turn", double.losses, "#31a354")):
        apart = [abs(a - b) or float("nan") for a, b in pairs]  # equal losses leave a gap
        right.plot(apart, ".", color=color, markersize=3, label=name)
    right.set(title="how far the losses are apart", xlabel="step", ylabel="|torch − bptoolkit|", yscale="log", ylim=(1e-17, 1))
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, markerscale=3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str]) -> int:
    """Run the demo.

    Returns:
        0, or 1 if an op is not verified, an accuracy misses its floor, or the curves are too far apart.
    """
    argparse.ArgumentParser(prog="python -m bptoolkit.recipes.demo", description=__doc__.splitlines()[0]).parse_args(argv)
    began = time.perf_counter()
    FOLDER.mkdir(parents=True, exist_ok=True)
    quiet()
    torch.set_num_threads(1)  # as the recipe does
    ours = models()[1]
    ops = [op.name for op in bp.OPS.values() if any(isinstance(m, op.module) for m in ours.modules())]
    print(f"1. The gradients of {', '.join(ops)}, against autograd and finite differences in float64", flush=True)
    wrong = verify(ops)
    print("\n2. The digits CNN, trained twice from one seed", flush=True)
    results, curves = train()
    print("\n3. Both in turn, on the same batches", flush=True)
    double, single = side_by_side(torch.float64, 230), side_by_side(torch.float32, 205)
    rows = compare(results, curves, double, single)
    print("\n" + table(rows) + "\n")
    plot(curves, double, FOLDER / "curves.png")
    wrong += [row.label.strip() for row in rows if not row.ok]
    record = {"ok": not wrong, "verified": ops, "rows": [row._asdict() for row in rows]}
    (FOLDER / "result.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"{time.perf_counter() - began:.0f} s; the curves are in {FOLDER / 'curves.png'}")
    print("WRONG: " + "; ".join(wrong) if wrong else "all gradients verified, all floors reached")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
