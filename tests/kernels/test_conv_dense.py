"""The dense convolutions' kernels, which run on request, beside the eager rule."""

from __future__ import annotations

from itertools import product
from random import Random

import pytest
import torch
import torch.nn.functional as F
from fused import LAYOUTS, both_rules, each_dtype, normal
from torch.utils.flop_counter import FlopCounterMode

import bptoolkit as bp
from bptoolkit.ops.conv import DENSE
from bptoolkit.triton_kernels import conv_dense as file

each_layout = pytest.mark.parametrize("last", [False, True], ids=["-", "channels last"])


def channels_last(t):
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def drawn(device, N, I, O, X, K, stride=1, padding=0, dilation=1, groups=1, *, last=True, bias=True, dtype=torch.float32):
    """All arguments of the rule; I and O of a group."""
    shapes = (N, groups * I, *X), (groups * O, I, *K), (groups * O,)
    x, w, b = (normal(*s, dtype=dtype, device=device, seed=k) for k, s in enumerate(shapes))
    s, p, d = (v if isinstance(v, tuple) else (v,) * len(K) for v in (stride, padding, dilation))
    tail = tuple((m + 2 * q - e * (k - 1) - 1) % t for m, k, t, q, e in zip(X, K, s, p, d))
    return channels_last(x) if last else x, w, b if bias else None, s, p, d, tail, groups


SIZES = [  # either side of a tile of places, of output channels, of the depth; more blocks of places than programs
    *((1, 16, 3, (1, M), (1, 1)) for M in (1, 127, 128, 129)),
    *((1, 3, O, (2, 3), (2, 2)) for O in (1, 15, 16, 17, 63, 64, 65)),
    *((1, I, 3, (3, 3), (2, 2), 1, 1) for I in (1, 2, 8, 15, 16, 17, 31, 32, 33, 64, 65, 96)),
    (5, 2, 3, (9, 8), (3, 3), 1, 1),
    (1, 3, 70, (9, 9), (7, 7), 2, 3),
    (2, 8, 9, (40,), (3,), 1, 1),
    (2, 5, 4, (3, 4, 5), (2, 3, 2), 1, 1),
]


@pytest.mark.parametrize("call", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sizes(device, call, dtype):
    both_rules(DENSE, *drawn(device, *call, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("I", [32, 64], ids=str)
def test_one_tap_a_tile_and_several(device, I, dtype):
    both_rules(DENSE, *drawn(device, 1, I, 8, (3, 4), (1, 2), 1, dtype=dtype))


@each_layout
@pytest.mark.parametrize("seed", range(24))
def test_strides_paddings_dilations_groups(device, last, seed):
    random = Random(seed)
    n, groups = random.choice(((1, 1), (2, 1), (2, 3), (3, 2)))
    K, dilation, stride, padding = (
        tuple(random.choice(c) for _ in range(n)) for c in ((1, 2, 3, 4), (1, 2, 3), (1, 2, 3, 4), (0, 1, 4))
    )
    X = tuple(max(d * (k - 1) + 1 - 2 * p, 1) + random.randint(0, 5) for d, k, p in zip(dilation, K, padding))
    I, O = random.choice(((2, 3), (8, 1), (1, 8)))
    both_rules(DENSE, *drawn(device, 2, I, O, X, K, stride, padding, dilation, groups, last=last))


@each_layout
@each_dtype
@pytest.mark.parametrize("X", [(7,), (5, 6), (3, 2, 4)], ids=["1d", "2d", "3d"])
def test_dtypes(device, X, dtype, last):
    both_rules(DENSE, *drawn(device, 2, 3, 5, X, (2,) * len(X), 2, 1, last=last, dtype=dtype))


@pytest.mark.parametrize(
    "bias, need", [(b, need) for b, *need in product((True, False), repeat=4) if any(need) and b >= need[2]], ids=str
)
def test_what_is_given_and_needed(device, bias, need):
    both_rules(DENSE, *drawn(device, 2, 3, 2, (4, 5), (2, 3), bias=bias), need=need)


@pytest.mark.parametrize("of_x, of_dy", [*zip(LAYOUTS, reversed(LAYOUTS)), *(("channels last", of_dy) for of_dy in LAYOUTS)])
def test_layouts(device, of_x, of_dy):
    x, w, b, *options = drawn(device, 2, 3, 5, (4, 5), (3, 3), 1, 1, last=False)
    x = channels_last(x) if of_x == "channels last" else LAYOUTS[of_x](x)
    w, b = w.mT.contiguous().mT, b.repeat_interleave(2)[::2]
    both_rules(DENSE, x, w, b, *options, cotangents={"dy": LAYOUTS[of_dy](normal(2, 5, 4, 5, device=device, seed=5))})


@each_layout
@pytest.mark.parametrize("X", [(7,), (5, 6), (3, 4, 2)], ids=["1d", "2d", "3d"])
def test_the_layout_goes_through(device, X, last):
    x, w, b, *options = drawn(device, 2, 3, 3, X, (3,) * len(X), 1, 1, last=last)
    for w_ in (w, channels_last(w)):
        y = file.KERNEL.forward(x, w_, b, *options)
        dx, dw, _ = file.KERNEL.backward(y, x, w_, *options, DENSE.Need(True, True, True))
        assert y.stride() == dx.stride() == x.stride() and dw.stride() == w_.stride()


@pytest.mark.parametrize("call", [(0, 3, 2, (4, 5), (3, 3)), (2, 3, 2, (4, 5), (3, 3), 1, 1)], ids=["no samples", "some"])
def test_no_samples(device, call):
    both_rules(DENSE, *drawn(device, *call))


def test_a_stride_past_the_kernel(device):
    """Classes of dx that meet no tap are 0; a stride and a dilation with a common factor leave out others."""
    x, w, b, *options = drawn(device, 1, 4, 4, (7, 9), (1, 2), 3)
    both_rules(DENSE, x, w, b, *options)
    dy = normal(1, 4, 3, 3, device=device)
    dx = file.KERNEL.backward(dy, None, w, *options, DENSE.Need(True, False, False))[0]
    assert dx[:, :, ::3].any() and not dx[:, :, 1::3].any() and not dx[:, :, 2::3].any() and not dx[:, :, :, 2::3].any()
    both_rules(DENSE, *drawn(device, 1, 4, 4, (11, 12), (3, 3), (4, 6), 1, (2, 4)))


def test_classes_of_residues():
    """Each place of dx is in one class; the taps of all classes are those that forward has, none more, none less."""
    for m, k, s, p, d in product((1, 4, 9), (1, 2, 3, 5), (1, 2, 3, 4), (0, 1, 3), (1, 2, 3)):
        J = (m + 2 * p - d * (k - 1) - 1) // s + 1
        met = [
            (a.to + u * a.apart, u * a.step + a.at + t * a.reach, a.first + t * a.every)
            for a in file.input_axes(m, k, s, p, d)
            for u in range(a.places)
            for t in range(a.taps)
        ]
        want = {(j * s + e * d - p, j, e) for j in range(J) for e in range(k) if 0 <= j * s + e * d - p < m}
        assert {i for i in met if 0 <= i[1] < J} == want and len(set(met)) == len(met)
        assert sum(a.places for a in file.input_axes(m, k, s, p, d)) == m


def test_nan_and_infinity_stay_where_they_are(device):
    """Within reach of the kernel and in their group; what fills a tile up meets none of them."""
    x, w, b, *options = drawn(device, 1, 3, 3, (9, 9), (3, 3), 1, 1, 1, 2)
    x[0, 1, 4, 4] = torch.nan
    dy = normal(1, 6, 9, 9, device=device)
    dy[0, 5, 2, 2] = torch.inf
    y = file.KERNEL.forward(x, w, b, *options)
    want = torch.zeros(9, 9, dtype=torch.bool, device=device)
    want[3:6, 3:6] = True
    assert torch.equal(y[0, :3].isnan(), want.expand(3, 9, 9)) and y[0, 3:].isfinite().all()
    dx, dw, db = file.KERNEL.backward(dy, x, w, *options, DENSE.Need(True, True, True))
    assert dx[0, :3].isfinite().all() and not dx[0, 3:, 1:4, 1:4].isfinite().any()
    assert torch.equal(dx[0, 3:].isfinite().all(0).logical_not().nonzero().amax(0).cpu(), torch.tensor([3, 3]))
    assert dw[:3, 1].isnan().all() and dw[:3, ::2].isfinite().all() and dw[3:5].isfinite().all()
    assert not dw[5].isfinite().any() and not db[5].isfinite() and db[:5].isfinite().all()


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("padding", [1, "same", "valid"])
def test_module(device, n, padding):
    ours, theirs = (getattr(m, f"Conv{n}d")(4, 6, 2, padding=padding, groups=2, device=device) for m in (bp.nn, torch.nn))
    theirs.load_state_dict(ours.state_dict())
    ours.backend = "triton"
    x = normal(2, 4, *(5, 4, 3)[:n], device=device).requires_grad_()
    results = []
    for m in (ours, theirs):
        y = m(x)
        results.append((y, *torch.autograd.grad(y.sin().sum(), (x, *m.parameters()))))
    torch.testing.assert_close(*results)


def test_flops(device):
    """Forward as torch counts it; the two gradients as much each."""
    x, w, b = (t.requires_grad_() for t in drawn(device, 2, 3, 5, (5, 6), (3, 3))[:3])
    one = 2 * 2 * 5 * 3 * 4 * 3 * 9
    with FlopCounterMode(display=False) as counter:
        y = bp.functional.conv2d(x, w, b, backend="triton")
        forward = counter.get_total_flops()
        y.sum().backward()
    assert (forward, counter.get_total_flops()) == (one, 3 * one)


def test_it_runs_on_request_alone(device, monkeypatch):
    """By name; "auto" keeps the vendor's library, and so does a module whose backend is not set."""
    ran = []
    kernel = file.KERNEL._replace(forward=lambda *a: (ran.append(a), DENSE.forward(*a))[1])
    monkeypatch.setattr(file, "KERNEL", kernel)
    x, w = normal(1, 3, 5, 5, device=device), normal(4, 3, 3, 3, device=device)
    bp.functional.conv2d(x, w)
    bp.functional.conv2d(x, w, backend="eager")
    assert not ran
    torch.testing.assert_close(bp.functional.conv2d(x, w, backend="triton"), F.conv2d(x, w))
    assert len(ran) == 1


def test_what_the_kernel_cannot_take(device):
    """By name it raises and says why."""
    with pytest.raises(ValueError, match=r"conv3d: backend='triton' cannot run here: .*float32, not float64"):
        bp.functional.conv3d(*(normal(1, 1, 2, 2, 2, dtype=torch.float64, device=device) for _ in range(2)), backend="triton")
    huge = torch.empty(1, 1, 1, 1, device=device).expand(1, 2, 2**15, 2**15)
    assert "counts its elements in 32 bits" in file.unsupported(
        huge, normal(1, 2, 1, 1), None, (1, 1), (0, 0), (1, 1), (0, 0), 1
    )
