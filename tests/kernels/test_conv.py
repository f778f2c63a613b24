"""conv1d's and conv2d's depthwise kernels beside the eager rule."""

from __future__ import annotations

from itertools import product
from random import Random

import pytest
import torch
import torch.nn.functional as F
from fused import LAYOUTS, both_rules, each_dtype, normal
from torch.utils.flop_counter import FlopCounterMode

import bptoolkit as bp
from bptoolkit.ops.conv import RULE
from bptoolkit.triton_kernels import conv as file

each_layout = pytest.mark.parametrize("last", [False, True], ids=["-", "channels last"])


def channels_last(t):
    return t.transpose(1, -1).contiguous().transpose(1, -1) if t.dim() == 3 else t.contiguous(memory_format=torch.channels_last)


def drawn(device, N, C, X, K, stride=1, padding=0, dilation=1, *, last=False, bias=True, dtype=torch.float32):
    """All arguments of the rule."""
    x, w, b = (normal(*s, dtype=dtype, device=device, seed=k) for k, s in enumerate(((N, C, *X), (C, 1, *K), (C,))))
    s, p, d = (v if isinstance(v, tuple) else (v,) * len(K) for v in (stride, padding, dilation))
    tail = tuple((m + 2 * q - e * (k - 1) - 1) % t for m, k, t, q, e in zip(X, K, s, p, d))
    return channels_last(x) if last else x, w, b if bias else None, s, p, d, tail, C


SIZES = [  # images either side of a tile; more tiles than programs; one channel and more than a tile of them
    *((1, 1, (1, L), (1, 3), 1, (0, 1)) for L in (1, 127, 128, 129)),
    (4, 1, (12, 13), (2, 2), 1, 1),
    (1, 130, (1, 2), (1, 2), 1, (0, 1)),
    (1, 33, (5,), (3,), 2, 1),
    (1, 3, (17,), (4,), 3, 2, 2),
    (1, 2, (9, 8), (5, 5), 2, 2),
    (1, 1, (4, 5), (7, 7), 1, 3),
    (1, 2, (3, 3), (1, 1), 2),
    (1, 2, (6, 7), (2, 3), (3, 2), (2, 5), (1, 2)),
]


@each_layout
@pytest.mark.parametrize("call", SIZES, ids=str)
def test_sizes(device, last, call):
    both_rules(RULE, *drawn(device, *call, last=last))


@each_layout
@pytest.mark.parametrize("seed", range(8))
def test_strides_paddings_dilations(device, last, seed):
    random = Random(seed)
    n = random.choice((1, 2))
    K, dilation, stride, padding = (
        tuple(random.choice(c) for _ in range(n)) for c in ((1, 2, 3), (1, 2), (1, 2, 3), (0, 1, 4))
    )
    X = tuple(max(d * (k - 1) + 1 - 2 * p, 1) + random.randint(0, 5) for d, k, p in zip(dilation, K, padding))
    both_rules(RULE, *drawn(device, 2, 3, X, K, stride, padding, dilation, last=last))


@each_layout
@each_dtype
@pytest.mark.parametrize("X", [(7,), (5, 6)], ids=["1d", "2d"])
def test_dtypes(device, X, dtype, last):
    both_rules(RULE, *drawn(device, 2, 3, X, (3,) * len(X), 1, 1, last=last, dtype=dtype))


@pytest.mark.parametrize(
    "bias, need", [(b, need) for b, *need in product((True, False), repeat=4) if any(need) and b >= need[2]], ids=str
)
def test_what_is_given_and_needed(device, bias, need):
    both_rules(RULE, *drawn(device, 2, 3, (4, 5), (2, 3), bias=bias), need=need)


@pytest.mark.parametrize("of_x, of_dy", [*zip(LAYOUTS, reversed(LAYOUTS)), *(("channels last", of_dy) for of_dy in LAYOUTS)])
def test_layouts(device, of_x, of_dy):
    x, w, b, *options = drawn(device, 2, 3, (4, 5), (3, 3), 1, 1)
    x = channels_last(x) if of_x == "channels last" else LAYOUTS[of_x](x)
    w, b = w.mT.contiguous().mT, b.repeat_interleave(2)[::2]
    both_rules(RULE, x, w, b, *options, cotangents={"dy": LAYOUTS[of_dy](normal(2, 3, 4, 5, device=device, seed=5))})


@each_layout
@pytest.mark.parametrize("X", [(7,), (5, 6)], ids=["1d", "2d"])
def test_the_layout_goes_through(device, X, last):
    x, w, b, *options = drawn(device, 2, 3, X, (3,) * len(X), 1, 1, last=last)
    y = file.KERNEL.forward(x, w, b, *options)
    dx, dw, _ = file.KERNEL.backward(y, x, w, *options, RULE.Need(True, True, True))
    assert y.stride() == dx.stride() == x.stride() and dw.is_contiguous()


@pytest.mark.parametrize("last", [False, True])
def test_no_samples(device, last):
    both_rules(RULE, *drawn(device, 0, 3, (4, 5), (3, 3), last=last))


def test_nan_and_infinity_stay_where_they_are(device):
    """In their channel, within reach of the kernel."""
    x, w, b, *options = drawn(device, 1, 3, (9, 9), (3, 3), 1, 1)
    x[0, 1, 4, 4], w[2, 0, 0, 0] = torch.nan, torch.inf
    dy = normal(1, 3, 9, 9, device=device)
    y = file.KERNEL.forward(x, w, b, *options)
    want = torch.zeros(9, 9, dtype=torch.bool, device=device)
    want[3:6, 3:6] = True
    assert torch.equal(y[0, 1].isnan(), want) and y[0, 0].isfinite().all()
    dx, dw, db = file.KERNEL.backward(dy, x, w, *options, RULE.Need(True, True, True))
    assert dx[0, :2].isfinite().all() and dw[1].isnan().all() and dw[::2].isfinite().all() and db.isfinite().all()


@pytest.mark.parametrize("X", [(8,), (5, 6)], ids=["1d", "2d"])
@pytest.mark.parametrize("padding", [1, "same", "valid"])
def test_module(device, X, padding):
    ours, theirs = (getattr(m, f"Conv{len(X)}d")(4, 4, 3, padding=padding, groups=4, device=device) for m in (bp.nn, torch.nn))
    theirs.load_state_dict(ours.state_dict())
    ours.backend = "triton"
    x = normal(2, 4, *X, device=device).requires_grad_()
    results = []
    for m in (ours, theirs):
        y = m(x)
        results.append((y, *torch.autograd.grad(y.sin().sum(), (x, *m.parameters()))))
    torch.testing.assert_close(*results)


def test_flops(device):
    """Forward as torch counts it; the two gradients as much each."""
    x, w, b, *_ = (t.requires_grad_() if isinstance(t, torch.Tensor) else t for t in drawn(device, 2, 3, (5, 6), (3, 3)))
    one = 2 * 2 * 3 * 3 * 4 * 9
    with FlopCounterMode(display=False) as counter:
        F.conv2d(x, w, b, groups=3)
    assert counter.get_total_flops() == one
    with FlopCounterMode(display=False) as counter:
        y = bp.functional.conv2d(x, w, b, groups=3, backend="triton")
        forward = counter.get_total_flops()
        y.sum().backward()
    assert (forward, counter.get_total_flops()) == (one, 3 * one)


def test_what_the_kernel_cannot_take(device):
    """By name it raises and says why; "auto" keeps the vendor's. Dense convolution has kernels of its own."""
    f, x, w = bp.functional.conv2d, normal(1, 4, 9, 9, device=device), normal(4, 1, 8, 8, device=device)
    with pytest.raises(ValueError, match=r"conv2d: backend='triton' cannot run here: .* of 49 elements at most, not 64"):
        f(x, w, groups=4, backend="triton")
    torch.testing.assert_close(f(x, w, groups=4), F.conv2d(x, w, groups=4))
    huge = torch.empty(1, 1, 1, 1, device=device).expand(1, 1, 2**15, 2**15)
    assert "counts its positions in 32 bits" in file.unsupported(
        huge, normal(1, 1, 1, 1), None, *[(1, 1)] * 2, (1, 1), (0, 0), 1
    )
