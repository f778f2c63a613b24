"""What `swap` says it did: a table of modules, each with what happened to it and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple


class Entry(NamedTuple):
    """What happened to one module."""

    name: str  # as in named_modules; "" is the model itself
    type: str  # the name of its class before
    what: str  # "swapped", "already", "adjusted" or "left alone"
    why: str


@dataclass(frozen=True, repr=False)
class SwapReport:
    """What `swap` did, module by module; `print` it for a table.

    Attributes:
        entries: one `Entry` per module, in the order of `named_modules`.
    """

    entries: tuple[Entry, ...]

    @property
    def swapped(self) -> dict[str, str]:
        """Name -> the op that runs now, of the modules this call swapped."""
        return self._of("swapped")

    @property
    def already(self) -> dict[str, str]:
        """Name -> reason, of the modules that were bptoolkit's before."""
        return self._of("already")

    @property
    def adjusted(self) -> dict[str, str]:
        """Name -> what changed, of torch's modules that keep their class but had a fast path turned off."""
        return self._of("adjusted")

    @property
    def left(self) -> dict[str, str]:
        """Name -> reason, of the modules that are as they were."""
        return self._of("left alone")

    def _of(self, what: str) -> dict[str, str]:
        return {e.name: e.why for e in self.entries if e.what == what}

    def __str__(self) -> str:
        rows = [("module", "type", "what", "why"), *((e.name or "(model)", *e[1:]) for e in self.entries)]
        widths = [max(len(row[k]) for row in rows) for k in range(3)]
        table = [" ".join(cell.ljust(w + 1) for cell, w in zip(row, widths)) + row[3] for row in rows]
        return "\n".join([*(line.rstrip() for line in table), self.summary()])

    __repr__ = __str__

    def summary(self) -> str:
        """The counts, in one line."""
        parts = []
        for what in ("swapped", "already", "adjusted", "left alone"):
            kinds = Counter("container" if e.why.startswith("container") else e.type for e in self.entries if e.what == what)
            if kinds or what == "swapped":
                detail = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
                parts.append(f"{kinds.total()} {what}" + (f" ({detail})" if detail else ""))
        return "; ".join(parts)
