"""The kernels of softmax, log_softmax and softmin beside their eager rules."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from fused import LAYOUTS, both_rules, each_dtype, near, normal

import bptoolkit as bp
from bptoolkit.ops.softmax import LOG_SOFTMAX_RULE, SOFTMAX_RULE, SOFTMIN_RULE
from bptoolkit.triton_kernels import softmax as file

RULES = {rule.name: rule for rule in (SOFTMAX_RULE, LOG_SOFTMAX_RULE, SOFTMIN_RULE)}
each = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)

# A C I: either side of a tile in lines and in columns, one and several tiles; strided lines, few and many; a single element
SIZES = [
    *((A, C, 1) for A, C in product((1, 31, 32, 33), (33, 64))),
    *((A, C, 1) for A, C in product((1, 3), (1, 1023, 1024, 1025))),
    (2049, 1, 1),
    *((A, C, I) for A, C, I in product((1, 3), (1, 5), (1, 2, 1025))),
    *((2, C, I) for C, I in product((64, 65), (3, 31, 33))),
]


@pytest.mark.parametrize("A, C, I", SIZES)
def test_sizes(device, A, C, I):
    both_rules(SOFTMAX_RULE, normal(A, C, I, device=device), 1)


@each
@pytest.mark.parametrize("A, C, I", [(33, 65, 1), (2, 1025, 1), (3, 5, 33)])
def test_rules(device, rule, A, C, I):
    both_rules(rule, normal(A, C, I, device=device), 1)


@pytest.fixture
def short(monkeypatch):
    """Lines of over 64 elements pass by, 64 at a time: several tiles without large ones."""
    monkeypatch.setattr(file, "HELD", 64)
    monkeypatch.setattr(file, "PASSING", 64)
    monkeypatch.setattr(file, "TILE", 64)
    monkeypatch.setattr(file, "ALONG", 4)


@each
@pytest.mark.parametrize("A, C, I", [(3, 65, 1), (2, 128, 1), (2, 129, 1), (2, 17, 4), (2, 33, 5), (1, 300, 3)])
def test_lines_that_pass_by(device, short, rule, A, C, I):
    assert not file.tile(C, I, 32)[0]
    both_rules(rule, normal(A, C, I, device=device), 1)


@pytest.mark.parametrize(
    "rule, C", [*((rule, file.HELD + n) for rule in RULES.values() for n in (0, 1)), (SOFTMAX_RULE, 1 << 18)]
)
def test_longest(device, rule, C):
    """On either side of the longest that is held, at the configurations that ship."""
    assert file.tile(C, 1, 32)[0] == (file.HELD >= C)
    both_rules(rule, normal(1, C, device=device), -1)


@each_dtype
@each
@pytest.mark.parametrize("long", [False, True], ids=["held", "looped"])
def test_dtypes(device, request, rule, dtype, long):
    if long:
        request.getfixturevalue("short")
    both_rules(rule, normal(3, 90, dtype=dtype, device=device) * 3, 1)
    both_rules(rule, normal(1, 90, 3, dtype=dtype, device=device) * 3, 1)


@pytest.mark.parametrize("dim", [-4, -3, -2, -1, 0, 3])
def test_dimensions(device, dim):
    both_rules(SOFTMAX_RULE, normal(3, 4, 5, 6, device=device), dim)


@each
def test_a_number(device, rule):
    both_rules(rule, normal(device=device), -1)


@pytest.mark.parametrize("of_y", LAYOUTS)
@pytest.mark.parametrize("of_dy", LAYOUTS)
def test_layouts(device, of_dy, of_y):
    """Strides are arguments. In backward y is no softmax here: of a constant dy the gradient would be 0 but for rounding."""
    y, dy = LAYOUTS[of_y](normal(9, 20, device=device)), LAYOUTS[of_dy](normal(9, 20, device=device, seed=1))
    for rule, dim in ((SOFTMAX_RULE, 0), (LOG_SOFTMAX_RULE, 1)):
        want = rule.backward(dy.double(), y.double(), dim)
        near(rule.kernel().backward(dy, y, dim), want, torch.float32)
        if of_dy == of_y:
            both_rules(rule, y, dim)


def test_layout_that_is_no_three_dimensions(device):
    x = normal(4, 3, 6, 5, device=device).transpose(0, 3)
    for dim in range(4):
        both_rules(SOFTMAX_RULE, x, dim, cotangents={"dy": x.cos()})


@each
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 3), (0,), (2, 3, 0)], ids=str)
def test_zero_sizes(device, rule, shape):
    for dim in range(len(shape)):
        both_rules(rule, normal(*shape, device=device), dim)


@each
@pytest.mark.parametrize("long", [False, True], ids=["held", "looped"])
@pytest.mark.parametrize("I", [1, 2])
def test_infinities(device, request, rule, long, I):
    """−∞ among others is a probability of 0; a line of it alone, of +∞ or with NaN is NaN; its neighbours are as they were."""
    if long:
        request.getfixturevalue("short")
    x = normal(7, 130, I, device=device)
    inf = -torch.inf if rule is SOFTMIN_RULE else torch.inf
    x[0, ::2] = -inf
    x[1, 3:] = -inf
    x[2, :129] = -inf
    x[3, :] = -inf
    x[4, 100] = inf
    x[5, 70] = torch.nan
    x[6, :64] = -inf
    y, _ = both_rules(rule, x, 1)
    assert y[0].isnan().flatten(1).all(1).tolist() == [False, False, False, True, True, True, False]


@each
@pytest.mark.parametrize("long", [False, True], ids=["held", "looped"])
def test_large_values(device, request, rule, long):
    """Nothing overflows, whatever the order in which a line passes by; elements far apart keep their digits."""
    if long:
        request.getfixturevalue("short")
    ramp = torch.linspace(-3e3, 3e3, 200, device=device)
    both_rules(rule, torch.stack([ramp, ramp.flip(0), 1e4 + ramp / 1e3, torch.full_like(ramp, 3e38)]), 1)


def test_log_of_what_is_almost_sure(device, short):
    """log p of a class with p near 1 is −Σ of the others, where lines pass by: log(1 + Σ) would be 0."""
    x = torch.full((1, 100), -20.0, device=device)
    x[0, 17] = 0
    (y,) = (file.LOG_SOFTMAX.forward(x, 1),)
    near(y[0, 17:18], x.double().log_softmax(1)[0, 17:18], torch.float32, 4)


def test_the_public_functions(device):
    """Modules and functions, twice differentiated, one graph."""
    x = normal(3, 4, 5, device=device).requires_grad_()
    for ours, theirs in (
        (lambda t: bp.functional.softmax(t, 1, backend="triton"), lambda t: F.softmax(t, 1)),
        (lambda t: bp.functional.log_softmax(t, 0, backend="triton"), lambda t: F.log_softmax(t, 0)),
        (lambda t: bp.functional.softmin(t, -1, dtype=torch.float32, backend="triton"), lambda t: F.softmin(t, -1)),
    ):
        results = []
        for f in (ours, theirs):
            (g,) = torch.autograd.grad(f(x).sin().sum(), x, create_graph=True)
            results.append((f(x), g, *torch.autograd.grad(g.cos().sum(), x)))
        torch.testing.assert_close(*results)
    for module in (bp.nn.Softmax(1), bp.nn.LogSoftmax(1), bp.nn.Softmin(1), bp.nn.Softmax2d()):
        module.backend = "triton"
        torch.testing.assert_close(module(x), type(module).__base__.forward(module, x))


def test_what_the_kernel_cannot_take(device):
    x = normal(2, 3, device=device).double()
    for name in RULES:
        with pytest.raises(ValueError, match=f"{name}: backend='triton' cannot run here: .*float32, not float64"):
            getattr(bp.functional, name)(x, 1, backend="triton")
