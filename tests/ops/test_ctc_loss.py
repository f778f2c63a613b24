"""What is special to ctc_loss: lengths, layouts, targets that do not fit, the derivative by what is not normalized."""

from __future__ import annotations

from itertools import product
from math import inf, log

import pytest
import torch
import torch.nn.functional as F

import bptoolkit as bp

close = torch.testing.assert_close
ctc = bp.functional.ctc_loss
T, N, C, S = 12, 5, 6, 4
LABELS = torch.tensor([[1, 1, 2, 3], [5, 4, 0, 0], [1, 2, 3, 4], [2, 2, 2, 2], [3, 1, 0, 0]])
FITS = (12, 9, 4, 7, 1), (4, 2, 0, 4, 1)
TIGHT = (12, 9, 0, 6, 3), (4, 2, 1, 4, 0)  # of the rows 2 and 3, no path


def logits():
    return torch.randn(T, N, C, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)


@pytest.mark.parametrize("lengths", [FITS, TIGHT])
@pytest.mark.parametrize("zero_infinity", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_equals_torch_behind_log_softmax(lengths, zero_infinity, reduction):
    results = []
    for loss, (n, m) in ((F.ctc_loss, lengths), (ctc, lengths), (ctc, tuple(map(torch.tensor, lengths)))):
        x = logits()
        l = loss(x.log_softmax(2), LABELS, n, m, 0, reduction, zero_infinity)
        results.append((l, torch.autograd.grad(l.sum(), x)))
    close(results[1], results[0], equal_nan=True)
    close(results[2], results[0], equal_nan=True)


def test_layouts():
    n, m = FITS
    rows = torch.cat([LABELS[k, :s] for k, s in enumerate(m)])
    x = logits().log_softmax(2)
    want = F.ctc_loss(x, LABELS, n, m, reduction="none")
    for targets in (LABELS, rows, rows.int(), LABELS.T.contiguous().T):
        for lengths in ((n, m), (torch.tensor(n), torch.tensor(m))):
            close(ctc(x, targets, *lengths, reduction="none"), want)
    close(ctc(x[:, 0], LABELS[0], torch.tensor(12), torch.tensor(4), reduction="none"), want[0])
    compiled = torch.compile(ctc, backend="aot_eager", dynamic=True)
    close(compiled(x, rows, torch.tensor(n), torch.tensor(m)), F.ctc_loss(x, LABELS, n, m))


def test_every_path_by_enumeration():
    """The definition: −log of the sum over all alignments that collapse to the target; and its gradient, unnormalized."""
    x = torch.randn(4, 1, 3, dtype=torch.float64, requires_grad=True)
    target, total = (1, 2), 0.0
    for path in product(range(3), repeat=4):
        merged = [c for k, c in enumerate(path) if k == 0 or c != path[k - 1]]
        if tuple(c for c in merged if c) == target:
            total = total + sum(x[t, 0, c] for t, c in enumerate(path)).exp()
    want, got = -total.log(), ctc(x, torch.tensor([target]), (4,), (2,), reduction="sum")
    close(got, want)
    first = [torch.autograd.grad(l, x, create_graph=True)[0] for l in (got, want)]
    close(*first)
    close(first[0].sum(2), -torch.ones(4, 1).double())  # shares of all paths
    close(*(torch.autograd.grad(g.sin().sum(), x)[0] for g in first))


def test_torchs_gradient_is_by_the_logits():
    """The two differ by exp(x), what log_softmax takes away."""
    grads = []
    for loss in (ctc, F.ctc_loss):
        x = logits().log_softmax(2).detach().requires_grad_()
        grads.append(torch.autograd.grad(loss(x, LABELS[:, :2], [T] * N, [2] * N, reduction="sum"), x)[0])
    close(grads[0] + x.exp(), grads[1])


def test_second_order_is_finite_where_states_are_out_of_reach():
    x = logits()
    (g,) = torch.autograd.grad(ctc(x.log_softmax(2), LABELS, *TIGHT, zero_infinity=True), x, create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), x)
    assert h.isfinite().all() and h[:, 0].abs().sum() > 0 and not h[:, 2:4].any()


def test_impossible_classes_and_small_probabilities():
    """Log-probabilities of −∞ and far below the range of exp, in float32: nothing is lost and nothing is NaN."""
    x = torch.full((6, 1, 4), -200.0)
    x[0, 0, 1] = x[5, 0, 2] = x[2, 0, 0] = 0
    x[:, 0, 3] = -inf
    x.requires_grad_()
    l = ctc(x, torch.tensor([[1, 2]]), (6,), (2,), reduction="sum")
    close(l, ctc(x.double(), torch.tensor([[1, 2]]), (6,), (2,), reduction="sum").float(), rtol=1e-6, atol=0.0)
    close(l, torch.tensor(600.0 - log(6)), rtol=1e-6, atol=0.0)
    (g,) = torch.autograd.grad(l, x)
    close(g.sum(2), -torch.ones(6, 1), rtol=0.0, atol=600 * 2.0**-23)  # exp of logarithms of size 600, each off by a rounding
    assert ctc(x, torch.tensor([[1, 3]]), (6,), (2,)) == inf


def test_labels_out_of_range_are_refused():
    """Where torch reads what lies beside the probabilities."""
    x = logits()
    for label in (C, -1):
        with pytest.raises(ValueError, match=f"label {label}"):
            ctc(x, torch.tensor([[1, label]] * N), [T] * N, [2] * N)
    ctc(x, torch.tensor([[1, C]] * N), [T] * N, [1] * N)  # past the lengths, anything


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_lengths": [T + 1] * N}, "at most T = 12"),
        ({"input_lengths": [-1] * N}, "at least 0"),
        ({"target_lengths": [5] * N}, "only 4 labels"),
        ({"target_lengths": [1] * (N - 1)}, "4 lengths for the 5 rows"),
        ({"targets": LABELS[:4]}, "4 rows for the 5"),
        ({"targets": LABELS.flatten()[:7]}, "add up to 10"),
        ({"blank": C}, "blank=6"),
        ({"reduction": "max"}, "reduction='max'"),
        ({"log_probs": torch.zeros(0, N, C)}, "must not be empty"),
    ],
)
def test_errors(change, message):
    args = {"log_probs": logits(), "targets": LABELS, "input_lengths": [T] * N, "target_lengths": [2] * N}
    with pytest.raises(ValueError, match=message):
        ctc(**(args | change))
    with pytest.raises(TypeError, match="integers"):
        ctc(**(args | {"targets": LABELS.double()}))
    with pytest.raises(TypeError, match="target_lengths"):
        ctc(**(args | {"target_lengths": 2}))


def test_module_and_swap():
    module = torch.nn.CTCLoss(2, "sum", True)
    args = logits().log_softmax(2), LABELS.where(LABELS != 2, 0), *FITS
    want = module(*args)
    bp.swap(module)
    assert type(module) is bp.nn.CTCLoss
    close(module(*args), want)


def test_half_is_computed_in_float32():
    x = logits().log_softmax(2).bfloat16().detach().requires_grad_()
    l = ctc(x, LABELS[:, :2], [T] * N, [2] * N, reduction="sum")
    close(l, ctc(x.float(), LABELS[:, :2], [T] * N, [2] * N, reduction="sum").bfloat16())
    assert torch.autograd.grad(l, x)[0].dtype == torch.bfloat16
