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
OF_RULES = {  # what a rule does with any forward and backward; every op has them in test_gradients.py
    "backward_twice",
    "interleaved_calls",
    "gradients_kept",
    "version_counter",
    "global_rng",
    "linear_in_cotangent",
    "autocast",
    "checkpoint",
}


def taken(op):
    """The op's draw of a call, again until its kernel takes the call in float32."""

    def single(t):
        return t.detach().float() if isinstance(t, torch.Tensor) and t.is_floating_point() else t

    known = {}  # whether it takes a call follows from shapes and options

    def case(draw):
        for _ in range(200):
            drawn = op.draw(draw)
            if draw.device == "meta":
                return drawn
            key = str(tree_map(lambda t: (t.shape, t.requires_grad) if isinstance(t, torch.Tensor) else t, drawn))
            if key not in known:
                known[key] = takes(op, tree_map(single, drawn))
            if known[key]:
                return drawn
        raise AssertionError(f"{op.name}: none of 200 calls is one that the kernel takes")

    return case


FUSED = [name for name, op in OPS.items() if op.kernel]


@pytest.mark.parametrize("name", [name for name in FUSED if LONG or name in SOME])
def test_verified(name, device, one_seed):
    op = OPS[name]
    kernel = replace(op, call=by_name(op), case=taken(op))
    judged = [p for p in QUICK if p not in (LEFT_OUT if LONG else LEFT_OUT | OF_RULES)]
    report = verify.assert_correct(kernel, quick=True, cases=2 if LONG else 1, properties=judged, budget=30 if LONG else 15)
    assert report.calls["forward_value"] and report.calls["gradient_value"]
    assert report.calls["dtypes"] or op.random  # which is judged in one dtype
