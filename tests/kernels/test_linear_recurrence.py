"""linear_recurrence's kernels beside the eager rule."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from fused import LAYOUTS, both_rules, each_dtype, normal, ragged

import bptoolkit as bp
from bptoolkit.ops.linear_recurrence import RULE
from bptoolkit.triton_kernels import linear_recurrence as file

F = bp.functional.linear_recurrence
each_way = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Fewer loads under way: the interpreter takes a millisecond a step."""
    monkeypatch.setattr(file, "STEPS", {file.WIDE: 2, file.NARROW: 2})


@pytest.fixture
def chunks(monkeypatch):
    """Chunks of a short sequence, of which the interpreter's three programs allow three."""
    monkeypatch.setattr(file, "LONG", 9)


def drawn(device, T, B, N, dtype=torch.float32):
    a, b, h0 = (normal(*s, dtype=dtype, device=device, seed=k) for k, s in enumerate(((T, B, N), (T, B, N), (B, N))))
    return a.tanh(), b, h0


SIZES = [  # steps either side of those under way; elements either side of a tile; more tiles than programs, with wide loads
    *((T, 2, 3) for T in (1, 2, 3, 4)),
    *((1, 1, N) for N in (1, 31, 32, 33)),
    (2, 1, 300),
    (2, 3, 130),
    (2, 33, 1),
]


@pytest.mark.parametrize("T, B, N", SIZES)
def test_sizes(device, T, B, N):
    both_rules(RULE, *drawn(device, T, B, N), None, N % 2 == 0)
    both_rules(RULE, *drawn(device, T, B, N), ragged(device, T, B), N % 2 == 1)


@each_way
@pytest.mark.parametrize("T, rows", [(9, False), (10, True), (12, False), (13, True)])
def test_chunks(device, chunks, T, rows, reverse):
    if device == "cpu":
        assert file.plan(T, 1, 8, 4, torch.device(device)).K == 3
    both_rules(RULE, *drawn(device, T, 4, 2), ragged(device, T, 4) if rows else None, reverse)


def test_the_shipped_steps(device, monkeypatch):
    monkeypatch.undo()
    both_rules(RULE, *drawn(device, 3, 1, 3), None, False)
    both_rules(RULE, *drawn(device, 3, 1, 257), None, True)


@each_dtype
def test_dtypes(device, dtype, chunks):
    both_rules(RULE, *drawn(device, 1, 1, 600, dtype), None, False)
    both_rules(RULE, *drawn(device, 10, 2, 3, dtype), ragged(device, 10, 2), True)


NEEDS = [(*need, False) for need in product((True, False), repeat=3) if any(need)]


@pytest.mark.parametrize("need", NEEDS, ids=str)
def test_what_is_needed(device, need, chunks):
    T = 9 if need[1] else 2
    both_rules(RULE, *drawn(device, T, 2, 3), ragged(device, T, 2) if need[0] else None, need[2], need=need)


@pytest.mark.parametrize("of_a, of_b", [*zip(LAYOUTS, reversed(LAYOUTS))])
def test_layouts(device, of_a, of_b, chunks):
    a, b, h0 = drawn(device, 10, 2, 3)
    dh = LAYOUTS[of_a](normal(10, 2, 3, device=device, seed=5))
    a, b, h0 = LAYOUTS[of_a](a), LAYOUTS[of_b](b), h0.mT.contiguous().mT
    both_rules(RULE, a[:3], b[:3], h0, None, False, cotangents={"dh": dh[:3]})
    both_rules(RULE, a, b, h0, ragged(device, 10, 4)[::2], True, cotangents={"dh": dh})


@pytest.mark.parametrize("order", [(1, 0, 2), (1, 2, 0), (2, 1, 0), (2, 0, 1)])
def test_where_time_is(device, order):
    """The batch first, or time last."""
    back = [order.index(d) for d in range(3)]
    a, b, h0 = drawn(device, 2, 3, 2)
    a, b = (t.permute(order).contiguous().permute(back) for t in (a, b))
    both_rules(RULE, a, b, h0, None, False)


@pytest.mark.parametrize("shape", [(1, 1, 3), (4, 1, 1), (1, 2, 1), (1, 1, 1)])
def test_broadcast_decays(device, shape):
    a, b, h0 = drawn(device, 4, 2, 3)
    both_rules(RULE, a[tuple(slice(0, n) for n in shape)].expand(4, 2, 3), b, h0, None, False)


@each_way
@pytest.mark.parametrize("T, B, N", [(0, 2, 3), (3, 0, 2), (3, 2, 0)])
def test_no_elements(device, T, B, N, reverse):
    both_rules(RULE, *drawn(device, T, B, N), None, reverse)
    both_rules(RULE, *drawn(device, T, B, N), ragged(device, T, B), reverse)


@each_way
def test_what_is_past_a_length_is_not_read(device, reverse, chunks):
    for T in (3, 9):
        (a, b, h0), lengths = drawn(device, T, 3, 2), torch.tensor([T - 2, 0, 2], device=device)
        past = torch.arange(T, device=device)[:, None] >= lengths
        a[past], b[past] = torch.nan, torch.inf
        dh = normal(T, 3, 2, device=device, seed=5)
        dh[past] = torch.nan
        (h,), grads = both_rules(RULE, a, b, h0, lengths, reverse, cotangents={"dh": dh})
        assert h.isfinite().all() and all(g is None or g.isfinite().all() for g in grads)


@each_way
def test_nan_and_infinity_stay_in_their_element(device, reverse, chunks):
    for T in (5, 9):
        a, b, h0 = drawn(device, T, 1, 6)
        b[3, 0, 1], a[2, 0, 2], b[1, 0, 3], b[4, 0, 3], h0[0, 4] = torch.nan, torch.inf, torch.inf, -torch.inf, torch.inf
        (h,), (da, db, *_) = both_rules(RULE, a, b, h0, None, reverse)
        assert h[..., ::5].isfinite().all() and da[..., ::5].isfinite().all() and db[..., ::5].isfinite().all()


@each_way
def test_products_that_overflow_where_no_state_does(device, reverse, chunks):
    """The product of a chunk overflows, from a start of zero, of 1e-30, or from one that the local states exceed."""
    a = torch.full((12, 1, 5), 1e10, device=device)
    b, h0, dh = torch.zeros_like(a), torch.zeros(1, 5, device=device), torch.zeros_like(a)
    a[::4, 0, 1], a[1::4, 0, 1], h0[0, 1] = 1e-38, 1e-20, 1e-30
    a[..., 2] = 0.5
    b[..., 2] = 1.0
    a[::2, 0, 3] = 0.0
    b[..., 4], a[::3, 0, 4] = 1.0, 0.0
    a[..., 4] *= 1e5
    dh[..., 2:4] = 1.0
    (h,), grads = both_rules(RULE, a, b, h0, None, reverse, cotangents={"dh": dh})
    assert h.isfinite().all() and all(g is None or g.isfinite().all() for g in grads)


def test_an_element_does_not_depend_on_its_neighbours(device, chunks):
    """Bit for bit, also where a neighbour's chunks are walked again."""
    a, b, h0 = drawn(device, 12, 1, 4)
    h, other = file.KERNEL.forward(a, b, h0, None, False), a.clone()
    other[..., 0] = 1e20
    b[..., 0] = 0
    h0[0, 0] = 0
    assert torch.equal(file.KERNEL.forward(other, b, h0, None, False)[..., 1:], h[..., 1:])


@each_way
def test_the_public_function(device, reverse, chunks):
    a, b, h0 = (t.requires_grad_() for t in (torch.rand(2, 11, 3), normal(2, 11, 3), normal(2, 3)))
    args = [t.to(device) for t in (a, b, h0)]
    options = {"dim": 1, "reverse": reverse, "lengths": torch.tensor([11, 4]), "resets": torch.arange(22).view(2, 11) % 7 == 3}
    weights = normal(2, 11, 3, device=device, seed=3)
    found = []
    for backend in ("triton", "eager"):
        h = F(*args, **options, backend=backend)
        found.append((h, *torch.autograd.grad((h * weights).sum(), args)))
    torch.testing.assert_close(*found)


def test_what_the_kernel_cannot_take(device):
    args = [t.double() for t in drawn(device, 3, 2, 2)]
    with pytest.raises(ValueError, match=r"linear_recurrence: backend='triton' cannot run here: .* float32, not float64"):
        F(*args, backend="triton")
    F(*args)
