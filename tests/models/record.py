"""Fills in the table of docs/models.md: `python tests/models/record.py` (needs transformers; `make models` installs it)."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import transformers
from zoo import ALSO, ZOO, Counts, count

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- counted: begin -->", "<!-- counted: end -->"


def listed(counter: Counter[str]) -> str:
    return ", ".join(f"{n} {name}" for name, n in sorted(counter.items(), key=lambda item: (-item[1], item[0]))) or "none"


def row(name: str, c: Counts) -> str:
    return f"| {name} | {c.swapped} / {c.layers} | {listed(c.types)} | {listed(c.calls)} | {listed(c.left)} | {c.views} |"


def table() -> str:
    titles = ("model", "modules ours / layers", "layers left", "calls ours", "arithmetic left", "views, copies, casts")
    head = f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|"
    parts = []
    for title, also in (("`bp.swap(model, functions=True)`", None), ("`bp.swap(model, functions=True, also=ALSO)`", ALSO)):
        rows = [(name, count(name, also)) for name in ZOO]
        if also:  # only the models that have such layers
            rows = [(name, c) for name, c in rows if c != count(name)]
        parts.append(f"{title}:\n\n" + "\n".join([head, *(row(*r) for r in rows)]))
    return f"Counted with transformers {transformers.__version__}.\n\n" + "\n\n".join(parts)


def filled(text: str) -> str:
    """The page with the table as counted now."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
    print(re.sub(r"(?s).*" + BEGIN, "", PAGE.read_text()).partition(END)[0])
