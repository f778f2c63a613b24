"""Every kernel through the checker of the house: its sizes, layouts, cotangents, dtypes and subsets of gradients."""

from __future__ import annotations

from dataclasses import replace

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


def fused(op):
    """The op's function, its kernel asked for by name; calls of a rule that has none run as they do."""

    def call(*args, **kwargs):
        try:
            return op.call(*args, backend="triton", **kwargs)
        except ValueError as error:
            if "there is no fused kernel for it" not in str(error):
                raise
            return op.call(*args, **kwargs)

    return call


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.kernel])
def test_verified(name, device, one_seed):
    op = OPS[name]
    kernel = replace(op, call=fused(op))
    judged = [p for p in QUICK if p not in LEFT_OUT]
    report = verify.assert_correct(kernel, quick=True, cases=2 if name in SOME else 1, properties=judged, budget=60)
    assert report.calls["forward_value"] and report.calls["gradient_value"]
    assert report.calls["dtypes"] or op.random  # which is judged in one dtype
