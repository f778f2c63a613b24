"""Every kernel through the checker of the house: its sizes, layouts, cotangents, dtypes and subsets of gradients."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
from helpers import SOME

from bptoolkit import OPS, verify
from bptoolkit.verify.properties import QUICK

LEFT_OUT = {
    "memory",  # Triton's interpreter holds what it ran on in cycles; test_layer_norm looks on a GPU
    "double_backward",  # eager, from float64 truth in test_contract.py
    "forward_mode",
    "vmap",
    "per_sample_gradients",  # by name these raise, which test_choose.py has
}


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.kernel])
def test_verified(name, device, one_seed):
    op = OPS[name]
    kernel = replace(op, call=partial(op.call, backend="triton"))
    judged = [p for p in QUICK if p not in LEFT_OUT]
    report = verify.assert_correct(kernel, quick=True, cases=2 if name in SOME else 1, properties=judged, budget=60)
    assert report.calls["forward_value"] and report.calls["gradient_value"]
    assert report.calls["dtypes"] or op.random  # which is judged in one dtype
