"""causal_conv1d's kernels beside their eager rules."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from fused import LAYOUTS, both_rules, each_dtype, normal
from torch.utils.flop_counter import FlopCounterMode

import bptoolkit as bp
from bptoolkit.ops.causal_conv1d import RULE, SILU_RULE
from bptoolkit.triton_kernels import causal_conv1d as file

PIECE = file.PIECE
each_rule = pytest.mark.parametrize("rule", [RULE, SILU_RULE], ids=lambda rule: rule.name)
each_layout = pytest.mark.parametrize("last", [False, True], ids=["-", "channels last"])


@pytest.fixture(autouse=True)
def pieces(monkeypatch):
    """Several pieces in a short sequence: the interpreter takes milliseconds a position."""
    monkeypatch.setattr(file, "PIECE", 16)


def channels_last(t):
    return t.mT.contiguous().mT


def drawn(device, B, D, L, K, last=False, dtype=torch.float32):
    x, w, c = (normal(*s, dtype=dtype, device=device, seed=k) for k, s in enumerate(((B, D, L), (D, K), (D,))))
    return channels_last(x) if last else x, w, c


SIZES = [  # lengths either side of K, of a step, of a piece; more pieces than programs; every K; one tile of channels and more
    *((1, 2, L, 4) for L in (1, 3, 4, 8, 9, 16, 17, 33)),
    *((1, 2, 5, K) for K in (2, 3, 5, 6, 7, file.LONGEST)),
    *((1, 2, L, file.LONGEST) for L in (23, 24)),
    (4, 3, 3, 3),
    (1, 129, 3, 2),
    (1, 257, 3, 2),
]


@each_layout
@pytest.mark.parametrize("B, D, L, K", SIZES)
def test_sizes(device, last, B, D, L, K):
    both_rules(SILU_RULE, *drawn(device, B, D, L, K, last))


@each_rule
@each_layout
def test_the_shipped_piece(device, rule, last, monkeypatch):
    monkeypatch.setattr(file, "PIECE", PIECE)
    both_rules(rule, *drawn(device, 1, 1, PIECE + 3, 4, last))


@each_rule
@each_layout
@each_dtype
def test_dtypes(device, rule, last, dtype):
    both_rules(rule, *drawn(device, 1, 2, 19, 3, last, dtype))


NEEDS = [need for need in product((True, False), repeat=3) if any(need)]


@each_rule
@pytest.mark.parametrize("need", NEEDS, ids=str)
def test_what_is_given_and_needed(device, rule, need):
    x, w, c = drawn(device, 2, 2, 5, 3)
    both_rules(rule, x, w, c, need=need)
    if any(need[:2]):
        both_rules(rule, x, w, None, need=(*need[:2], False))


@pytest.mark.parametrize("of_x, of_dy", [*zip(LAYOUTS, reversed(LAYOUTS)), *(("channels last", of_dy) for of_dy in LAYOUTS)])
def test_layouts(device, of_x, of_dy):
    x, w, c = drawn(device, 2, 3, 5, 3)
    x = channels_last(x) if of_x == "channels last" else LAYOUTS[of_x](x)
    dy = LAYOUTS[of_dy](normal(2, 3, 5, device=device, seed=5))
    w, c = w.mT.contiguous().mT, c.repeat_interleave(2)[::2]
    both_rules(SILU_RULE, x, w, c, cotangents={"dy": dy})


@each_layout
def test_the_layout_goes_through(device, last):
    x, w, c = drawn(device, 2, 3, 5, 4, last)
    y = file.SILU.forward(x, w, c)
    dx, dw, _ = file.SILU.backward(y, x, w, c, SILU_RULE.Need(True, True, True))
    assert y.stride() == dx.stride() == x.stride() and dw.is_contiguous()


@each_rule
@pytest.mark.parametrize("B, D, L", [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_no_elements(device, rule, B, D, L):
    both_rules(rule, *drawn(device, B, D, L, 4))


@each_layout
def test_nan_and_infinity_stay_where_they_are(device, last):
    """In their channel, and within K − 1 positions: those behind in forward, those before too in backward."""
    x, w, c = drawn(device, 1, 3, 40, 4, last)
    x[0, 1, 20], x[0, 2, 17] = torch.nan, torch.inf
    (y,), (dx, _, _) = both_rules(SILU_RULE, x, w, c)
    assert y[0, 0].isfinite().all() and dx[0, 0].isfinite().all()
    assert y[0, 1].isnan().nonzero().flatten().tolist() == list(range(20, 24))
    assert dx[0, 1].isnan().nonzero().flatten().tolist() == list(range(17, 24))


def test_an_infinite_cotangent_without_an_activation(device):
    x, w, c = drawn(device, 1, 2, 20, 3)
    dy = normal(1, 2, 20, device=device)
    dy[0, 1, 8] = torch.inf
    both_rules(RULE, x, w, c, need=(True, False, False), cotangents={"dy": dy})


@each_layout
def test_chunks_of_a_sequence(device, last):
    """The state of one call goes into the next: values and gradients of the whole."""
    x, w, c = (t.requires_grad_() for t in drawn(device, 2, 3, 21, 4, last))

    def chunked(f, x):
        y0, state = f(x[..., :2], w, c, "silu", None, True)
        y1, state = f(x[..., 2:11], w, c, "silu", state, True)
        return torch.cat((y0, y1, f(x[..., 11:], w, c, "silu", state)), 2)

    weights = normal(2, 3, 21, device=device, seed=9)
    want = F.silu(F.conv1d(x, w[:, None], c, padding=3, groups=3)[..., :21])
    for got in (chunked(lambda *a: bp.functional.causal_conv1d(*a, backend="triton"), x),):
        torch.testing.assert_close(got, want)
        grads = (torch.autograd.grad(t, (x, w, c), weights, retain_graph=True) for t in (got, want))
        torch.testing.assert_close(*grads)


def test_flops(device):
    """Those of torch's convolution cut to length, and in backward of z once more."""
    x, w, c = (t.requires_grad_() for t in drawn(device, 2, 3, 8, 4))
    one = 2 * 2 * 3 * 8 * 4
    for activation, again in ((None, 0), ("silu", 1)):
        with FlopCounterMode(display=False) as counter:
            y = bp.functional.causal_conv1d(x, w, c, activation, backend="triton")
            forward = counter.get_total_flops()
            y.sum().backward()
        assert (forward, counter.get_total_flops()) == (one, (3 + again) * one)


@pytest.mark.parametrize("K, reason", [(1, "kernels of 2 to 8 elements"), (9, "kernels of 2 to 8 elements, .*, not 9")])
def test_what_the_kernel_cannot_take(device, K, reason):
    x, w, c = drawn(device, 1, 2, 5, K)
    with pytest.raises(ValueError, match=f"causal_conv1d: backend='triton' cannot run here: .*{reason}"):
        bp.functional.causal_conv1d(x, w, c, backend="triton")
    bp.functional.causal_conv1d(x, w, c)
