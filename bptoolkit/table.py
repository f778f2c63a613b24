"""`bptoolkit ops`: the table of ops and what each supports; `--markdown FILE` writes it between two marks in a file."""

from __future__ import annotations

import argparse
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from bptoolkit.op import Op
from bptoolkit.ops import OPS

HEADER = ["op", "module", "double backward", "forward mode", "vmap", "compile", "autocast", "Triton kernel", "source"]
BEGIN, END = "<!-- ops table: bptoolkit ops --markdown README.md -->", "<!-- end of ops table -->"


def cells(op: Op) -> list[str]:
    """The row of an op. Every op is tested for every column, so a column says yes unless its record says otherwise."""
    casts = {v: [k for k in op.autocast if op.autocast[k] == v] for v in op.autocast.values()}
    autocast = "; ".join(f"{v} ({', '.join(k)})" for v, k in casts.items()) or "unchanged"
    modules = ", ".join(f"`{m.__name__}`" for m in op.module) or "–"
    return [
        f"`{op.name}`",
        modules,
        "yes" if op.twice else "raises",
        "yes",
        "yes",
        "yes",
        autocast,
        "yes" if op.kernel else "–",
        op.source,
    ]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned Markdown table."""
    widths = [max([len(header[k]), 3, *(_width(r[k]) for r in rows)]) for k in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(c + " " * (w - _width(c)) for c, w in zip(row, widths)) + " |"

    return "\n".join([line(header), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows)])


def _width(text: str) -> int:
    return sum(not unicodedata.combining(c) for c in text)


def main(argv: list[str]) -> int:
    """Print the table, or put it into a file; with --check, exit 1 if the file's table is stale."""
    parser = argparse.ArgumentParser(prog="bptoolkit ops", description=__doc__)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table between its two marks in FILE")
    parser.add_argument("--check", action="store_true", help="with --markdown: change nothing, exit 1 if it is stale")
    args = parser.parse_args(argv)
    table = markdown(HEADER, [cells(op) for op in OPS.values()])
    if args.markdown is None:
        print(table)
        return 0
    try:
        fresh, stale = between(args.markdown, BEGIN, END, table)
    except ValueError as error:
        print(f"bptoolkit ops: {error}")
        return 2
    if args.check:
        print(f"stale: run bptoolkit ops --markdown {args.markdown}" if stale else "up to date")
        return int(stale)
    args.markdown.write_text(fresh)
    return 0


def between(path: Path, begin: str, end: str, text: str) -> tuple[str, bool]:
    """A file's content with a text put between two marks, and whether that changes it.

    Raises:
        ValueError: the file has no such marks.
    """
    old = path.read_text()
    if begin not in old or end not in old:
        raise ValueError(f"{path} has no marks {begin} and {end}")
    new = old[: old.index(begin) + len(begin)] + "\n\n" + text + "\n\n" + old[old.index(end) :]
    return new, new != old
