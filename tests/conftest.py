"""Hypothesis profiles: derandomised by default, longer and random under `make fuzz`."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))  # tests/helpers.py, under --import-mode=importlib

quiet = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("short", max_examples=10, derandomize=True, database=None, **quiet)
settings.register_profile("fuzz", max_examples=500, **quiet)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))


@pytest.fixture
def ran(monkeypatch):
    """The names of the rules that the test ran, in order."""
    from bptoolkit.function import Rule

    names, call = [], Rule.__call__
    monkeypatch.setattr(Rule, "__call__", lambda rule, *a, **k: (names.append(rule.name), call(rule, *a, **k))[1])
    return names
