"""The recipes: what one states, how they are found, and `bptoolkit recipes`."""

from __future__ import annotations

import argparse
import ast
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

LABELS = ("Question", "Command", "Time", "Expected")


@dataclass(frozen=True)
class Floor:
    """What a run in full length must reach.

    Attributes:
        metric: the name under which the test loop logs it.
        label: the metric in words.
        bound: the floor; or the name of the figure beside it that must be reached, where the data differ between machines.
        unit: printed after the number.
        at_least: whether the metric must be at least the bound; else at most.
    """

    metric: str
    label: str
    bound: float | str
    unit: str
    at_least: bool = True

    def judge(self, result: Mapping[str, Any]) -> tuple[bool, str]:
        """Whether a result reaches the floor (NaN does not), and the floor in words."""
        bound = result["beside"][self.bound] if isinstance(self.bound, str) else self.bound
        value = result[self.metric]
        words = f"{'at least' if self.at_least else 'at most'} {bound:.4g} {self.unit}"
        words += f" ({self.bound})" if isinstance(self.bound, str) else ""
        return (value >= bound if self.at_least else value <= bound), words


@dataclass(frozen=True)
class Recipe:
    """One recipe, at the bottom of its file.

    Attributes:
        model: the LightningModule class.
        data: the LightningDataModule class; its instances have a `fingerprint` once set up.
        floor: what a run in full length must reach.
        trainer: defaults of the Trainer.
        smoke: defaults that `--smoke` puts in their place, by full name ("trainer.max_epochs").
        length: options, besides the Trainer's, that shorten the run; with another value the floor is not judged.
        threads: CPU threads, unless OMP_NUM_THREADS says; None leaves it to torch.
        beside: (data, folder) -> label and figure of what the result is printed beside.
    """

    model: type
    data: type
    floor: Floor
    trainer: Mapping[str, Any] = field(default_factory=dict)
    smoke: Mapping[str, Any] = field(default_factory=dict)
    length: tuple[str, ...] = ()
    threads: int | None = None
    beside: Callable[[Any, Path], dict[str, float]] | None = None


@dataclass(frozen=True)
class Listing:
    """What is known of a recipe without importing it: its docstring."""

    name: str
    module: str
    doc: str

    def said(self, label: str) -> str:
        """What the docstring says after a label."""
        lines = [line for line in self.doc.splitlines() if line.startswith(label + " ")]
        return lines[0][len(label) :].strip() if lines else ""

    def load(self) -> Recipe:
        """Import the recipe; it needs lightning."""
        return import_module(self.module).RECIPE


def listings() -> dict[str, Listing]:
    """Name -> recipe: every file of `bptoolkit.recipes` whose docstring asks a Question. Nothing is imported."""
    spec = find_spec("bptoolkit.recipes")
    found = {}
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("*.py")):
            listing = Listing(path.stem.replace("_", "-"), f"bptoolkit.recipes.{path.stem}", _docstring(path))
            if listing.said("Question"):
                found[listing.name] = listing
    return found


def find(name: str) -> Listing:
    """The recipe of this name.

    Raises:
        LookupError: there is none; the message lists those that exist.
    """
    known = listings()
    if name not in known:
        close = get_close_matches(name.replace("_", "-"), known, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise LookupError(f"there is no recipe {name!r}{hint}\nthe recipes are: {', '.join(known)}")
    return known[name]


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def table() -> str:
    """The recipes, as a table."""
    rows = [("recipe", *(label.lower() for label in LABELS))]
    rows += [(x.name, *(x.said(label) for label in LABELS)) for x in listings().values()]
    wide = 44  # cells longer than this go on below
    cells = [[textwrap.wrap(cell, wide) or [""] for cell in row] for row in rows]
    widths = [max(len(line) for row in cells for line in row[k]) for k in range(len(rows[0]))]
    lines = []
    for row in cells:
        for k in range(max(map(len, row))):
            lines.append("  ".join((c[k] if k < len(c) else "").ljust(w) for c, w in zip(row, widths)).rstrip())
        if row is cells[0]:
            lines.append("  ".join("-" * w for w in widths))
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Print the recipes; with a name, its whole docstring."""
    parser = argparse.ArgumentParser(
        prog="bptoolkit recipes", description="The recipes; with NAME, all that one says of itself."
    )
    parser.add_argument("name", nargs="?", metavar="NAME")
    name = parser.parse_args(argv).name
    if name is None:
        print(table())
        return 0
    try:
        print(find(name).doc)
    except LookupError as error:
        parser.exit(2, f"bptoolkit recipes: {error}\n")
    return 0
