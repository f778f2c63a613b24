"""mlp's kernel beside its eager rule: the whole in float32, the elementwise part in every dtype and layout."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from fused import LAYOUTS, both_rules, double, each_dtype, near, normal

from bptoolkit.ops import mlp as op
from bptoolkit.triton_kernels import mlp as file

each = pytest.mark.parametrize("name", op.GATES)
NEEDS = [n for n in product((True, False), repeat=5) if any(n)]


def run(x, I, H, O, name, biases=(True, True), **kw):
    device = str(x.device)
    w1, w2 = normal(H, I, device=device) / 4, normal(O, H, device=device, seed=1) / 4
    b1, b2 = (normal(n, device=device, seed=2) if b else None for n, b in zip((H, O), biases))
    return both_rules(op.RULE, x, w1, b1, w2, b2, name, errors=32, **kw)


def part(dh, cu, u, name, wanted):
    """The kernel's elementwise part beside the eager one in float64."""
    before = [t.clone() for t in (dh, cu, u) if t is not None]
    got = file.elementwise(dh, cu, u, name, wanted)
    want = op.elementwise(*double((dh, cu, u)), name, wanted)
    for g, w, asked in zip(got, want, wanted):
        if asked:
            near(g, w, u.dtype)
    assert all(map(torch.equal, before, [t for t in (dh, cu, u) if t is not None]))


def three(*shape, dtype=torch.float32, device="cpu"):
    return [normal(*shape, dtype=dtype, device=device, seed=k) * 2 for k in range(3)]


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5), (5,)], ids=str)
@pytest.mark.parametrize("biases", list(product((True, False), repeat=2)), ids=str)
@each
def test_the_whole(device, name, shape, biases):
    run(normal(*shape, device=device), 5, 33, 4, name, biases)


@pytest.mark.parametrize("need", NEEDS, ids=str)
@pytest.mark.parametrize("cotangents", [(True, False), (True, True), (False, True)])
def test_what_is_given_and_needed(device, need, cotangents):
    given = {d: None for d, there in zip(("dy", "du"), cotangents) if not there}
    run(normal(6, 5, device=device), 5, 9, 4, "gelu", need=need, cotangents=given)


@pytest.mark.parametrize("sizes", [(0, 5, 7, 4), (6, 0, 7, 4), (6, 5, 0, 4), (6, 5, 7, 0)], ids=str)
def test_zero_sizes(device, sizes):
    M, I, H, O = sizes
    run(normal(M, I, device=device), I, H, O, "gelu")


@pytest.mark.parametrize("M, N", [*product((1, 7, 57), (255, 257)), *product((31, 33, 97), (64,)), (2, 1), (6200, 1)])
def test_sizes_of_the_elementwise_part(device, M, N):
    part(*three(M, N, device=device), "silu", (True, True, True))


@each
@each_dtype
def test_dtypes_of_the_elementwise_part(device, name, dtype):
    dh, cu, u = three(33, 65, dtype=dtype, device=device)
    for wanted in product((True, False), repeat=3):
        if wanted[0] or wanted[2]:
            part(dh, cu if wanted[1] else None, u, name, wanted)
        if any(wanted):
            part(None, cu, u, name, wanted)


@pytest.mark.parametrize("of_dh", LAYOUTS)
@pytest.mark.parametrize("of_u", LAYOUTS)
def test_layouts_of_the_elementwise_part(device, of_dh, of_u):
    dh, cu, u = three(7, 20, device=device)
    part(LAYOUTS[of_dh](dh), LAYOUTS[of_dh](cu), LAYOUTS[of_u](u), "silu", (True, True, True))
