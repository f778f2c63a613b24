"""gated_mlp's kernel beside its eager rule: the whole in float32, the elementwise part in every dtype and layout."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from fused import LAYOUTS, both_rules, double, each_dtype, near, normal

from bptoolkit.ops import gated_mlp as op
from bptoolkit.triton_kernels import gated_mlp as file

each = pytest.mark.parametrize("name", op.GATES)
NEEDS = [n for n in product((True, False), repeat=4) if any(n)]


def run(x, I, H, O, name, **kw):
    device = str(x.device)
    w = [normal(*s, device=device, seed=k) / 4 for k, s in enumerate(((H, I), (H, I), (O, H)))]
    return both_rules(op.RULE, x, *w, name, errors=32, **kw)


def part(tensors, name, wanted):
    """The kernel's elementwise part beside the eager one in float64; tensors: dh, cg, cu, g, u."""
    before = [None if t is None else t.clone() for t in tensors]
    got = file.elementwise(*tensors, name, wanted)
    want = op.elementwise(*double(tensors), name, wanted)
    for g, w, asked in zip(got, want, wanted):
        if asked:
            near(g, w, tensors[3].dtype)
    for t, old in zip(tensors, before):
        assert t is None or torch.equal(t, old)


def five(*shape, dtype=torch.float32, device="cpu"):
    return [normal(*shape, dtype=dtype, device=device, seed=k) * 2 for k in range(5)]


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5), (5,), (1, 1, 5)], ids=str)
@each
def test_the_whole(device, name, shape):
    run(normal(*shape, device=device), 5, 33, 4, name)


@pytest.mark.parametrize("need", NEEDS, ids=str)
@pytest.mark.parametrize("cotangents", [(True, False, False), (True, True, True), (False, True, True), (True, False, True)])
def test_what_is_given_and_needed(device, need, cotangents):
    given = {d: None for d, there in zip(("dy", "dg", "du"), cotangents) if not there}
    run(normal(6, 5, device=device), 5, 9, 4, "silu", need=need, cotangents=given)


@pytest.mark.parametrize("only", ["dy", "dg", "du"])
def test_one_cotangent_alone(device, only):
    run(normal(6, 5, device=device), 5, 9, 4, "gelu", cotangents={d: None for d in ("dy", "dg", "du") if d != only})


@pytest.mark.parametrize("sizes", [(0, 5, 7, 4), (6, 0, 7, 4), (6, 5, 0, 4), (6, 5, 7, 0)], ids=str)
def test_zero_sizes(device, sizes):
    M, I, H, O = sizes
    run(normal(M, I, device=device), I, H, O, "silu")


@pytest.mark.parametrize("n", [3, 2047, 2049, 9000])
@each
def test_sizes_of_the_elementwise_part(device, name, n):
    part(five(n, device=device), name, (True, True, True))


@each
@each_dtype
def test_dtypes_of_the_elementwise_part(device, name, dtype):
    dh, cg, cu, g, u = five(9, 65, dtype=dtype, device=device)
    part((dh, None, None, g, u), name, (True, True, True))
    part((dh, cg, cu, g, u), name, (True, True, True))
    part((None, cg, cu, g, u), name, (True, True, True))
    for wanted in ((True, False, False), (True, False, True), (False, True, True), (True, True, False)):
        part((dh, cg, None, g, u), name, wanted)
    part((dh, None, cu, g, None), name, (False, True, False))


@pytest.mark.parametrize("of_dh", LAYOUTS)
@pytest.mark.parametrize("of_g", LAYOUTS)
def test_layouts_of_the_elementwise_part(device, of_dh, of_g):
    dh, cg, cu, g, u = five(7, 20, device=device)
    g, u, cg, dh = LAYOUTS[of_g](g), LAYOUTS[of_dh](u), LAYOUTS[of_dh](cg), LAYOUTS[of_dh](dh)
    part((dh, cg, cu, g, u), "silu", (True, True, True))


def test_special_values_of_the_elementwise_part(device):
    inf, nan = float("inf"), float("nan")
    values = torch.tensor([0.0, -0.0, 1.5, -1.5, inf, -inf, nan], device=device)
    dh, g, u = (t.flatten().nan_to_num(nan=nan, posinf=inf, neginf=-inf) for t in torch.meshgrid(values, values, values))
    for name in op.GATES:
        got = file.elementwise(dh, None, None, g, u, name, (True, True, True))
        want = op.elementwise(*double((dh, None, None, g, u)), name, (True, True, True))
        torch.testing.assert_close([t.double() for t in got], list(want), equal_nan=True, rtol=1e-5, atol=1e-6)
