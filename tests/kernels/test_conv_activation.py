"""conv2d_activation's fused passes beside its eager rules."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from fused import LAYOUTS, both_rules, each_dtype, near, normal

import bptoolkit as bp
from bptoolkit.ops.conv_activation import ACTIVATIONS, FUNCTIONS, RELU_RULE, RULE
from bptoolkit.triton_kernels import conv_activation as file

OPTIONS = ((1, 1), (0, 0), (1, 1), (0, 0), 1)
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
each_layout = pytest.mark.parametrize("last", [False, True], ids=["-", "channels last"])


def drawn(device, N, C, H, W):
    """For a 1×1 convolution of one channel to C."""
    return tuple(normal(*s, device=device, seed=k) for k, s in enumerate(((N, 1, H, W), (C, 1, 1, 1), (C,))))


def run(activation, x, w, b, **kw):
    """Both rules of an activation; nothing flows into u, as in first order."""
    if activation == "relu":
        return both_rules(RELU_RULE, x, w, b, *OPTIONS, errors=32, **kw)
    kw["cotangents"] = {"du": None} | kw.get("cotangents", {})
    return both_rules(RULE, x, w, b, *OPTIONS, activation, errors=32, **kw)


def made_so(monkeypatch, last):
    """The vendor's u comes out in channels_last, or not, whatever it would choose."""
    forward, layout = file.conv.forward, torch.channels_last if last else torch.contiguous_format
    monkeypatch.setattr(file.conv, "forward", lambda *a: forward(*a).contiguous(memory_format=layout))


SIZES = [
    (1, 1, 1, 1),
    (2, 3, 4, 5),
    (3, 33, 5, 7),
    (1, 2, 33, 32),
    (4, 5, 1, 1),
    (2, 513, 1, 2),
    (2, 2, 1, 1025),
    (4, 1, 40, 33),
]


@each_layout
@pytest.mark.parametrize("N, C, H, W", SIZES)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_sizes(device, monkeypatch, activation, last, N, C, H, W):
    made_so(monkeypatch, last)
    run(activation, *drawn(device, N, C, H, W))


@each_layout
@each_dtype
@each_activation
def test_dtypes(device, activation, dtype, last):
    """The passes alone, rounded once: dx and dw are made by the vendor from a dz in dtype."""
    u, dy = (normal(2, 3, 4, 5, dtype=dtype, device=device, seed=k) for k in range(2))
    b = normal(3, dtype=dtype, device=device, seed=2)
    u = u.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    y = file.FORWARD(u, b, activation)
    kept = (y, None) if activation == "relu" else (u, b)
    dz, db = file.BACKWARD(dy, *kept, activation, [True, True])
    z = (u.double() + b.double()[:, None, None]).requires_grad_()
    want = torch.relu(z) if activation == "relu" else FUNCTIONS[activation](z)
    (slope,) = torch.autograd.grad(want, z, dy.double())
    near(y, want.detach(), dtype, what="y")
    near(dz, slope, dtype, what="dz")
    near(db, slope.sum((0, 2, 3)), torch.float32, what="db")
    assert y.stride() == dz.stride() == u.stride()


@each_activation
@pytest.mark.parametrize("need", [need for need in product((True, False), repeat=3) if any(need)], ids=str)
def test_what_is_given_and_needed(device, activation, need):
    x, w, b = drawn(device, 2, 3, 4, 5)
    run(activation, x, w, b, need=need)
    if any(need[:2]):
        run(activation, x, w, None, need=(*need[:2], False))


@pytest.mark.parametrize("missing", ["dy", "du", "none"])
def test_what_flows_into_u(device, missing):
    """In second order."""
    given = {} if missing == "none" else {missing: None}
    both_rules(RULE, *drawn(device, 2, 3, 4, 5), *OPTIONS, "silu", errors=32, cotangents=given)


@each_layout
@pytest.mark.parametrize("of_dy", LAYOUTS)
def test_layouts(device, monkeypatch, of_dy, last):
    made_so(monkeypatch, last)
    dy = LAYOUTS[of_dy](normal(2, 3, 4, 5, device=device, seed=3))
    for activation in ("relu", "silu"):
        run(activation, *drawn(device, 2, 3, 4, 5), cotangents={"dy": dy})


@each_activation
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5)])
def test_no_elements(device, activation, shape):
    """The passes alone: torch's own convolution refuses some of these."""
    u, dy = (torch.ones(shape, device=device) for _ in range(2))
    y = file.FORWARD(u, None, activation)
    dz, db = file.BACKWARD(dy, y, None, activation, [True, True])
    assert y.shape == dz.shape == shape and db.tolist() == [0, 0, 0]


@each_layout
def test_nan_and_infinity(device, last):
    """relu lets NaN through, and blocks an infinite dy where it is off; an infinite bias stays in its channel."""
    u = normal(2, 3, 4, 5, device=device)
    u[0, 0, 0, 0], u[0, 1, 0, 0] = torch.nan, -1
    u = u.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    b = torch.tensor([0.0, 0.0, torch.inf], device=device)
    y = file.FORWARD(u, b, "relu")
    assert y[0, 0, 0, 0].isnan() and y[0, 1].isfinite().all() and y[:, 2].isinf().all() and y.stride() == u.stride()
    dy = torch.ones_like(u)
    dy[0, 1, 0, 0] = torch.inf
    dz, db = file.BACKWARD(dy, y, None, "relu", [True, True])
    assert torch.equal(dz, torch.where(y <= 0, 0.0, dy)) and db.isfinite().all()
    assert file.BACKWARD(dy, u, b, "gelu", [False, True])[1][0].isnan()


def test_relu_keeps_no_more_than_its_output(device):
    """x, w and y, which is the tensor that goes on."""
    x, w, b = (t.requires_grad_() for t in drawn(device, 2, 3, 4, 5))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = bp.functional.conv2d_activation(x, w, b, backend="triton")
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), w.data_ptr(), y.data_ptr()}


@each_activation
def test_module(device, activation):
    torch.manual_seed(0)
    ours = bp.nn.ConvActivation2d(2, 3, 3, padding=1, padding_mode="reflect", activation=activation, device=device)
    theirs = torch.nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect", device=device)
    theirs.load_state_dict(ours.state_dict())
    ours.backend = "triton"
    x = normal(2, 2, 4, 5, device=device).requires_grad_()
    f = {"gelu_tanh": lambda z: F.gelu(z, approximate="tanh")}.get(activation) or getattr(F, activation)
    results = []
    for m, y in ((ours, ours(x)), (theirs, f(theirs(x)))):
        results.append((y, *torch.autograd.grad(y.sin().sum(), (x, *m.parameters()))))
    torch.testing.assert_close(*results)
    assert f"activation='{activation}'" in repr(ours)


def test_what_the_kernel_cannot_take(device):
    x, w, b = (t.double() for t in drawn(device, 1, 2, 3, 3))
    with pytest.raises(ValueError, match=r"conv2d_activation: backend='triton' cannot run here: .*float32, not float64"):
        bp.functional.conv2d_activation(x, w, b, backend="triton")
    with pytest.raises(ValueError, match="conv2d_activation: activation='elu' is not known; choose from 'relu', 'silu'"):
        bp.functional.conv2d_activation(x, w, b, activation="elu")
    with pytest.raises(ValueError, match="ConvActivation2d: activation='elu' is not known"):
        bp.nn.ConvActivation2d(1, 1, 1, activation="elu")
