"""Hypothesis profiles: derandomised by default, longer and random under `make fuzz`."""

import os
import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))  # tests/helpers.py, under --import-mode=importlib

quiet = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("short", max_examples=10, derandomize=True, database=None, **quiet)
settings.register_profile("fuzz", max_examples=500, **quiet)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))
