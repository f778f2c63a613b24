"""Every kernel through the checker of the house: its sizes, layouts, cotangents, dtypes and subsets of gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fused import by_name, takes
from helpers import LONG, SOME
from torch.utils._pytree import tree_map

from bptoolkit import OPS, verify
from bptoolkit.verify.properties import QUICK

LEFT_OUT = {
    "memory",  # Triton's interpreter holds what it ran on in cycles; test_layer_norm looks on a GPU
    "double_backward",  # eager, from float64 truth in test_contract.py
    "forward_mode",
    "vmap",
    "per_sample_gradients",  # by name these raise, which test_choose.py has
}


def taken(op):
    """The op's draw of a call, again until its kernel takes the call in float32."""

    def single(t):
        return t.detach().float() if isinstance(t, torch.Tensor) and t.is_floating_point() else t

    def case(draw):
        if not LONG:  # milliseconds a program: sizes about a tile's are in the kernel's own tests
            draw.sizes = [size for size in draw.sizes if size <= 8] or draw.sizes
        for _ in range(200):
            drawn = op.draw(draw)
            if draw.device == "meta" or takes(op, tree_map(single, drawn)):
                return drawn
        raise AssertionError(f"{op.name}: none of 200 calls is one that the kernel takes")

    return case


FUSED = [name for name, op in OPS.items() if op.kernel]


@pytest.mark.parametrize("name", [name for name in FUSED if LONG or name in SOME])
def test_verified(name, device, one_seed):
    op = OPS[name]
    kernel = replace(op, call=by_name(op), case=taken(op))
    judged = [p for p in QUICK if p not in LEFT_OUT]
    report = verify.assert_correct(kernel, quick=True, cases=2 if LONG else 1, properties=judged, budget=30 if LONG else 10)
    assert report.calls["forward_value"] and report.calls["gradient_value"]
    assert report.calls["dtypes"] or op.random  # which is judged in one dtype
