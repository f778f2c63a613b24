"""Every op, by the one checker of the house: a short, fixed search here, a long and random one under `make fuzz`."""

from __future__ import annotations

from random import SystemRandom

import pytest
from helpers import LONG, NAMES, SOME

from bptoolkit import OPS, verify
from bptoolkit.verify.properties import PROPERTIES

TOOLS = ("compile", "fake_tensors", "registration")  # seconds each; tests/test_composition.py has them by transform
ELSEWHERE = ("forward_mode",)  # slow, as its rounding is measured anew; test_composition.py has every op's


@pytest.mark.parametrize("name", NAMES)
def test_short_search(name):
    if LONG:
        pytest.skip("the long search visits all of it and more")
    judged = [p for p in PROPERTIES if p not in (*TOOLS, *ELSEWHERE)]
    cases = 6 if name in SOME else 3  # ops of one file share much of it
    report = verify.assert_correct(OPS[name], quick=True, properties=judged, cases=cases, budget=90)
    left_out = {p for p in judged if not report.calls[p]}
    # one device; one output; one input; masks that vmap draws otherwise, and another dtype (test_composition fixes the seed)
    drawn = {"vmap", "per_sample_gradients", "dtypes"} if OPS[name].random else set()
    assert left_out <= {"devices", "some_outputs_unused", "grad_subsets"} | drawn, report.skipped


@pytest.mark.skipif(not LONG, reason="minutes an op: make fuzz")
@pytest.mark.parametrize("name", NAMES)
def test_long_search(name):
    seed = SystemRandom().randrange(10**6)
    verify.assert_correct(OPS[name], seed=seed, cases=100, examples=500, budget=600)
