"""Every op × every property of `bptoolkit.verify`, on calls that Hypothesis draws and shrinks."""

from __future__ import annotations

import pytest
import torch
from helpers import NAMES
from hypothesis import given
from hypothesis import strategies as st

from bptoolkit import OPS
from bptoolkit.cases import SIZES
from bptoolkit.verify import judge
from bptoolkit.verify.properties import PROPERTIES


@pytest.mark.parametrize("prop", PROPERTIES)
@pytest.mark.parametrize("name", NAMES)
@given(random=st.randoms(use_true_random=False))
def test_property(name, prop, random):
    op = OPS[name]
    problem = judge(prop, op.call, op.reference, op.draw, random, sizes=SIZES)
    assert problem is None, problem


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision(name, dtype):
    """Outputs and gradients keep the dtype, and are as near to float64 as torch's own op in that dtype is."""
    from helpers import draw_call, leaves_of, random_like

    for seed in range(3):
        c = draw_call(OPS[name], seed, dtype=dtype, sizes=(3, 7, 16, 17))
        wide = tuple(t.double() for t in c.tensors)
        exact = draw_call(OPS[name], seed, dtype=torch.float64, sizes=(3, 7, 16, 17))
        cots = random_like(c.ours(*c.tensors), seed)

        def run(fn, tensors, cots=cots):
            x = leaves_of(tensors)
            out = fn(*x)
            grads = torch.autograd.grad(out, x, [k.to(o) for k, o in zip(cots, out)], allow_unused=True, materialize_grads=True)
            return [*out, *grads]

        try:
            native = run(c.reference, c.tensors)
        except (RuntimeError, NotImplementedError):
            native = None  # torch has no kernel of this dtype for the reference; ours is held to the bound alone
        truth = run(exact.reference, wide)
        for k, (got, want) in enumerate(zip(run(c.ours, c.tensors), truth)):
            assert got.dtype == dtype
            scale = float(want.detach().abs().max()) if want.numel() else 0.0
            error = float((got.double() - want).detach().abs().max()) if want.numel() else 0.0
            theirs = float((native[k].double() - want).detach().abs().max()) if native and want.numel() else 0.0
            assert error <= max(2 * theirs, 8 * torch.finfo(dtype).eps * scale), (k, error, theirs, scale)
