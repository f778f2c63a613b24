"""Linear in the cotangent, and finite differences: planted mistakes that each finds, and right functions that pass."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from functions import Matmul, right, sine
from torch.nn import functional as F
from trials import expect, trial_of

from bptoolkit.verify.properties import numeric
from bptoolkit.verify.trial import NotApplicable


@pytest.mark.parametrize("kind", ["kinks", "zero", "constant", "huge", "tiny", "wide", "shifted", "large"])
@pytest.mark.parametrize(
    "fn", [torch.relu, torch.abs, lambda x: x.amax(-1), lambda x: x.max(-1).values, F.hardswish, torch.tanh, torch.sqrt]
)
def test_no_alarm_at_kinks(fn, kind):
    from dataclasses import replace

    from bptoolkit.verify.layouts import VALUES

    for seed in range(4):
        trial = trial_of(fn, (4, 5), seed=seed)
        trial = replace(trial, values=(VALUES[kind]((4, 5), torch.Generator().manual_seed(seed)),))
        for judge in (numeric.finite_differences, numeric.linear_in_cotangent):
            with suppress(NotApplicable):
                judge(trial)


def test_linear_in_cotangent():
    judge = numeric.linear_in_cotangent
    for backward in (
        lambda ctx, g: (g * ctx.saved_tensors[0].cos()).clamp(-1, 1),  # clipped
        lambda ctx, g: g * ctx.saved_tensors[0].cos() + 1e-6,  # a term without the cotangent
        lambda ctx, g: g * g * ctx.saved_tensors[0].cos(),
        lambda ctx, g: g / g.norm() * ctx.saved_tensors[0].cos(),
        lambda ctx, g: torch.where(g.abs() < 1e-3, 0.0, g) * ctx.saved_tensors[0].cos(),
        lambda ctx, g: (g * ctx.saved_tensors[0].cos()).nan_to_num(0.0, 0.0, 0.0),
        lambda ctx, g: torch.where(g.isnan(), 0.0, g) * ctx.saved_tensors[0].cos(),
    ):
        for point in ({}, {"dtype": "float32"}, {"seed": 1}):
            for reference in (None, torch.sin):
                expect("wrong", judge, sine(backward), (5, 7), reference=reference, **point)
    for dtype in ("float64", "float32", "bfloat16", "float16"):
        for fn in (sine(right), torch.sqrt, lambda x: x.softmax(-1)):
            expect("ok", judge, fn, (5, 7), dtype=dtype)


@pytest.mark.parametrize("seed", range(3))
def test_finite_differences(seed):
    judge = numeric.finite_differences

    def scaled(by):
        return sine(lambda ctx, g: by * g * ctx.saved_tensors[0].cos())

    for by in (0.0, -1.0, 1.1, 1 + 1e-5, 1 - 1e-5):
        expect("wrong", judge, scaled(by), (2, 3), seed=seed)

    class OneOfTwo(Matmul):
        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            return g @ w.mT, (1 + 1e-5) * (x.mT @ g)

    expect("wrong", judge, OneOfTwo.apply, (2, 3), (3, 4), seed=seed, says="direction of w")
    expect("ok", judge, Matmul.apply, (2, 3), (3, 4), seed=seed)
    expect("ok", judge, scaled(1 + 1e-13), (2, 3), seed=seed)
    expect("n/a", judge, scaled(0.0), (2, 3), seed=seed, dtype="float32", says="float64")


def test_finite_differences_of_what_is_no_derivative_on_purpose():
    def rounds(x):
        return x + (x.round() - x).detach()

    expect("wrong", numeric.finite_differences, rounds, (4,))
    expect("n/a", numeric.finite_differences, rounds, (4,), reference=rounds, says="reference")


@pytest.mark.parametrize(
    "fn",
    [
        torch.relu,
        F.hardtanh,
        torch.cumsum,
        torch.linalg.inv,
        lambda x: x.amax(-1),
        lambda x: x.sort(-1).values,
        lambda x: torch.where(x > 0, x, 0.0),
        lambda x: x.tril() @ x,
        lambda x: F.max_pool1d(x, 2),
        lambda x: x.detach() * x.sum(),
        lambda x: F.layer_norm(x, x.shape[-1:]),
        lambda x: torch.linalg.eigh(x @ x.mT).eigenvalues,
    ],
)
def test_what_is_not_finite_reaches_every_gradient_of_a_right_function(fn):
    for dtype in ("float64", "float32"):
        for cotangent in ("random", "rows", "one_hot"):
            call = (lambda x: x.cumsum(-1)) if fn is torch.cumsum else fn
            expect("ok", numeric.linear_in_cotangent, call, (4, 4), dtype=dtype, cotangent=cotangent)
