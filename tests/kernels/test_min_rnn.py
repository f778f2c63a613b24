"""The scans of minGRU and minLSTM beside the eager rules."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from fused import LAYOUTS, both_rules, each_dtype, normal, ragged

import bptoolkit as bp
from bptoolkit.ops.min_rnn import ACTIVATIONS, BLOCKS, GATES, OUTPUTS
from bptoolkit.triton_kernels import linear_recurrence
from bptoolkit.triton_kernels import min_rnn as file

each_kind = pytest.mark.parametrize("kind", BLOCKS)
each_way = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Fewer loads under way: the interpreter takes a millisecond a step."""
    monkeypatch.setattr(linear_recurrence, "STEPS", {linear_recurrence.WIDE: 2, linear_recurrence.NARROW: 2})


@pytest.fixture
def chunks(monkeypatch):
    """Chunks of a short sequence, of which the interpreter's three programs allow three."""
    monkeypatch.setattr(linear_recurrence, "LONG", 9)


def drawn(device, kind, T, B, H, I=3, dtype=torch.float32):
    shapes = (T, B, I), (B, H), (BLOCKS[kind] * H, I), (BLOCKS[kind] * H,)
    return tuple(normal(*s, dtype=dtype, device=device, seed=k) for k, s in enumerate(shapes))


SIZES = [  # steps either side of those under way; elements either side of a tile; more tiles than programs
    *((T, 2, 3) for T in (1, 2, 3, 4)),
    *((1, 1, H) for H in (1, 31, 32, 33)),
    (2, 3, 130),
    (2, 33, 1),
]


@each_kind
@pytest.mark.parametrize("T, B, H", SIZES)
def test_sizes(device, kind, T, B, H):
    both_rules(GATES, *drawn(device, kind, T, B, H), None, H % 2 == 0, kind, "g")
    both_rules(OUTPUTS, *drawn(device, kind, T, B, H), ragged(device, T, B), H % 2 == 1, kind, "identity")


@each_kind
@each_way
@pytest.mark.parametrize("T, rows", [(9, False), (10, True), (13, True)])
def test_chunks(device, chunks, kind, T, rows, reverse):
    if device == "cpu":
        assert linear_recurrence.plan(T, 4, 2, 4, torch.device(device)).K == 3
    lengths = ragged(device, T, 4) if rows else None
    both_rules(GATES, *drawn(device, kind, T, 4, 2), lengths, reverse, kind, "tanh")


def test_the_shipped_steps(device, monkeypatch):
    monkeypatch.undo()
    both_rules(GATES, *drawn(device, "min_gru", 3, 1, 3), None, False, "min_gru", "g")
    both_rules(GATES, *drawn(device, "min_lstm", 5, 1, 257), None, True, "min_lstm", "g")


@each_kind
@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dtypes_and_activations(device, kind, dtype, activation):
    """In half tensors pre and its gradient are rounded before they are used; the gates see the same pre in both rules."""
    args = *drawn(device, kind, 4, 2, 5, dtype=dtype), ragged(device, 4, 2), True, kind, activation
    both_rules(GATES, *args, errors={torch.float32: 8, torch.bfloat16: 1 << 16, torch.float16: 1 << 13}[dtype])
    (y, pre), like = file.GATES.forward(*args), GATES.forward(*args)
    assert torch.equal(pre, like[1])
    torch.testing.assert_close(y, like[0], rtol=torch.finfo(dtype).eps, atol=1e-6)


NEEDS = [(*need, False) for need in product((True, False), repeat=4) if any(need)]


@pytest.mark.parametrize("need", NEEDS, ids=str)
def test_what_is_needed(device, need):
    both_rules(GATES, *drawn(device, "min_lstm", 2, 2, 3), None, need[1], "min_lstm", "g", need=need)
    both_rules(OUTPUTS, *drawn(device, "min_gru", 3, 2, 3), None, need[2], "min_gru", "g", need=need)


@each_kind
@pytest.mark.parametrize("missing", ["dh", "dpre"])
def test_missing_cotangents(device, kind, missing):
    both_rules(GATES, *drawn(device, kind, 3, 2, 3), None, False, kind, "g", cotangents={missing: None})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, chunks, layout):
    x, h0, w, b = drawn(device, "min_gru", 10, 2, 3)
    odd = LAYOUTS[layout]
    dh = odd(normal(10, 2, 3, device=device, seed=5))
    args = odd(x), h0.mT.contiguous().mT, w.mT.contiguous().mT, b
    both_rules(GATES, *args, None, False, "min_gru", "g", cotangents={"dh": dh})
    both_rules(OUTPUTS, *args, ragged(device, 10, odd(x).shape[1])[: dh.shape[1]], True, "min_gru", "g", cotangents={"dh": dh})


@each_kind
@pytest.mark.parametrize("T, B, H", [(0, 2, 3), (3, 0, 2), (3, 2, 0)])
def test_no_elements(device, kind, T, B, H):
    both_rules(GATES, *drawn(device, kind, T, B, H), None, False, kind, "g")


@each_kind
@each_way
def test_what_is_past_a_length_is_not_read(device, chunks, kind, reverse):
    for T in (3, 9):
        (x, *rest), lengths = drawn(device, kind, T, 3, 2), torch.tensor([T - 2, 0, 2], device=device)
        past = torch.arange(T, device=device)[:, None] >= lengths
        x[past] = torch.nan
        dh = normal(T, 3, 2, device=device, seed=5)
        dh[past] = torch.nan
        out, grads = both_rules(GATES, x, *rest, lengths, reverse, kind, "g", cotangents={"dh": dh})
        assert all(t is None or t.isfinite().all() for t in (*out, *grads))


@each_kind
def test_far_gates(device, kind):
    """Gates at both ends, where one of them underflows, and candidates on both sides of 0."""
    x, h0, w, b = drawn(device, kind, 3, 2, 4)
    w[: w.shape[0] // BLOCKS[kind]] *= 200
    if kind == "min_lstm":
        w[4:8] *= 200
    both_rules(OUTPUTS, x, h0, w, b, None, False, kind, "g")


@each_kind
def test_nan_and_infinity_stay_in_their_row(device, kind):
    x, h0, w, b = drawn(device, kind, 4, 4, 3)
    x[1, 0, 0], h0[1, 1], h0[2, 0] = torch.nan, torch.inf, torch.nan
    (h, _), (dx, dh0, *_) = both_rules(GATES, x, h0, w, b, None, False, kind, "tanh")
    assert h[:, 3].isfinite().all() and dx[:, 3].isfinite().all() and dh0[3].isfinite().all()


@each_kind
@each_way
def test_the_public_function(device, kind, reverse):
    f = getattr(bp.functional, kind)
    make = {"min_gru": bp.nn.MinGRU, "min_lstm": bp.nn.MinLSTM}[kind]
    layer = make(3, 4, num_layers=2, bidirectional=reverse).to(device)
    x, hx = normal(5, 2, 3, device=device).requires_grad_(), normal(2 + 2 * reverse, 2, 4, device=device).requires_grad_()
    weights, found = [*layer.parameters()], []
    for backend, save in product(("triton", "eager"), ("gates", "outputs")):
        options = {"num_layers": 2, "bidirectional": reverse, "lengths": torch.tensor([5, 3]), "save": save}
        y, h = f(x, hx, weights, **options, backend=backend)
        loss = (y * normal(*y.shape, device=device, seed=3)).sum() + h.square().sum()
        found.append((y, h, *torch.autograd.grad(loss, (x, hx, *weights))))
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-5, atol=1e-5)


@each_kind
def test_second_order(device, kind):
    """The backward of the backward, through the kernels' forward and the eager rule."""
    x, h0, w, b = drawn(device, kind, 3, 2, 2)

    def second(backend, dtype):
        args = [t.to(dtype).requires_grad_() for t in (x, h0[None], w, b)]
        y, _ = getattr(bp.functional, kind)(*args[:2], args[2:], backend=backend)
        first = torch.autograd.grad(y.square().sum(), args, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), args)

    torch.testing.assert_close(
        [g.double() for g in second("triton", torch.float32)], [*second("eager", torch.float64)], rtol=1e-4, atol=1e-4
    )


def test_float64_is_refused(device):
    x, h0, w, b = (t.double() for t in drawn(device, "min_gru", 3, 2, 2))
    with pytest.raises(ValueError, match=r"min_gru: backend='triton' cannot run here: .* float32, not float64"):
        bp.functional.min_gru(x, h0[None], [w, b], backend="triton")
    assert file.OUTPUTS.unsupported(x, h0, w, b, None, False, "min_gru", "g")
