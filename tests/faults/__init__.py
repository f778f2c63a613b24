"""Planted faults and correct twins: what the verifier must catch, and what it must not alarm on.

Each module has a list `FAULTS` and a list `TWINS`; the faults of `history_*.py` are replicas of bugs that were public once,
written from their descriptions. No tolerance was set by any of them.
"""

from __future__ import annotations

from importlib import import_module

from faults.record import Fault, Twin

MODULES = (
    "history_values",
    "history_state",
    "history_more",
    "dense",
    "pointwise",
    "rows",
    "state",
    "in_place",
    "conv",
    "attention",
    "recurrent",
    "orders",
    "outputs",
    "library",
    "stochastic",
)

_modules = [import_module(f"faults.{name}") for name in MODULES]
FAULTS: dict[str, Fault] = {f.name: f for m in _modules for f in m.FAULTS}
TWINS: dict[str, Twin] = {t.name: t for m in _modules for t in m.TWINS}
