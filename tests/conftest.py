"""Hypothesis profiles: derandomised by default, longer and random under `make fuzz`."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# On CPUs with AMX, torch 2.13's bfloat16 products read past slices: docs/findings.md. oneDNN asks before its first product.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

sys.path.insert(0, str(Path(__file__).parent))  # tests/helpers.py, under --import-mode=importlib

quiet = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("short", max_examples=10, derandomize=True, database=None, **quiet)
settings.register_profile("fuzz", max_examples=500, **quiet)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))


@pytest.fixture
def one_seed(request, monkeypatch):
    """In tests of an op that draws random numbers, every call draws the same ones: also under vmap, and in compiled graphs."""
    import torch

    from bptoolkit import OPS, randomness

    if OPS[request.node.callspec.params["name"]].random:
        monkeypatch.setattr(
            randomness, "draw_seed", lambda like: torch.arange(5, 7, dtype=torch.int32, device=like.device) * 0x1234567
        )


@pytest.fixture
def ran(monkeypatch):
    """The names of the rules that the test ran, in order."""
    from bptoolkit.function import Rule

    names, call = [], Rule.__call__
    monkeypatch.setattr(Rule, "__call__", lambda rule, *a, **k: (names.append(rule.name), call(rule, *a, **k))[1])
    return names


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 3 rows, 2 columns and 2 samples, so that small tensors take many, with a rest everywhere."""
    from bptoolkit.ops import attention_tiles

    monkeypatch.setattr(attention_tiles, "tile_size", lambda L, S, N, device, sides=None: (min(L, 3), min(S, 2)))
    monkeypatch.setattr(attention_tiles, "tile_samples", lambda rows, columns, device: 2)
