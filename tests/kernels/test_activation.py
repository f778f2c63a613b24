"""The activations' kernels beside their eager rules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fused import LAYOUTS, both_rules, each_dtype, normal

import bptoolkit as bp
from bptoolkit.ops import activation as op
from bptoolkit.triton_kernels.elementwise import matrices

RULES = {
    "relu": (op.RELU_RULE, (), torch.relu),
    "tanh": (op.TANH_RULE, (), torch.tanh),
    "sigmoid": (op.SIGMOID_RULE, (), torch.sigmoid),
    "silu": (op.SILU_RULE, (), F.silu),
    "gelu": (op.GELU_RULE, ("none",), F.gelu),
    "gelu tanh": (op.GELU_RULE, ("tanh",), lambda x: F.gelu(x, approximate="tanh")),
}
each = pytest.mark.parametrize("name", RULES)
INF, NAN = float("inf"), float("nan")


def run(name, x, **kw):
    rule, options, _ = RULES[name]
    return both_rules(rule, x, *options, **kw)


@pytest.mark.parametrize("n", [3, 2047, 2048, 2049, 9000])
@each
def test_sizes(device, name, n):
    """One row: either side of a tile, more tiles than there are programs at a time."""
    run(name, normal(n, device=device) * 2)


@pytest.mark.parametrize("M, N", [(2, 1), (5, 31), (65, 32), (63, 33), (4, 511), (5, 512), (9, 513), (3, 1100)])
def test_rows_of_a_larger_tensor(device, M, N):
    x = normal(M, N + 3, device=device)[:, 1 : N + 1]
    run("gelu", x, cotangents={"dy": x.cos()})
    assert matrices(x, x)[2][1].data_ptr() == x.data_ptr()


@each_dtype
@each
def test_dtypes(device, name, dtype):
    run(name, normal(33, 20, dtype=dtype, device=device) * 3)


@pytest.mark.parametrize("of_x", LAYOUTS)
@pytest.mark.parametrize("of_dy", LAYOUTS)
def test_layouts(device, of_x, of_dy):
    """Strides are arguments: nothing is read as if it were dense."""
    x, dy = normal(7, 20, device=device), normal(7, 20, device=device, seed=1)
    for name in ("relu", "silu"):
        run(name, LAYOUTS[of_x](x), cotangents={"dy": LAYOUTS[of_dy](dy)})


def test_layouts_of_more_dimensions(device):
    x = normal(4, 3, 6, 5, device=device)
    for order in ((3, 1, 2, 0), (0, 2, 1, 3), (1, 0, 3, 2)):
        run("silu", x.permute(order), cotangents={"dy": x.cos().permute(order).contiguous()})
        run("silu", x.permute(order).contiguous(), cotangents={"dy": x.cos().permute(order)})
    run("silu", x[:, :, ::2], cotangents={"dy": x[:1, :, ::2].expand(4, 3, 3, 5)})
    run("silu", x[:, 1:2], cotangents={"dy": x[:, :1]})
    for t, n in ((x[:, 1:2], 4), (x[:, 1:], 4), (x.permute(1, 0, 2, 3), 12), (x, 1), (x[:1, 1:2], 1)):
        assert matrices(t)[0] == n


@pytest.mark.parametrize("shape", [(2, 4, 3, 5), (2, 4, 3, 5, 2)], ids=str)
@each
def test_channels_last(device, name, shape):
    """The results are channels last as x is; a cotangent may be either."""
    order = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x = normal(*shape, device=device).contiguous(memory_format=order)
    for dy in (x.cos(), x.cos().contiguous()):
        out, grads = run(name, x, cotangents={"dy": dy})
        assert all(t.is_contiguous(memory_format=order) for t in (*out, *grads))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4), ()], ids=str)
@each
def test_zero_sizes(device, name, shape):
    run(name, normal(*shape, device=device))


@each_dtype
@each
def test_special_values(device, name, dtype):
    """Kinks, both zeros, infinities and NaN are where torch has them; a relu that is off blocks any cotangent."""
    values = torch.tensor([0.0, -0.0, INF, -INF, NAN, 1e-7, -1e-7, 3.0, -3.0], dtype=dtype, device=device)
    x, dy = (t.flatten() for t in torch.meshgrid(values, values, indexing="ij"))
    run(name, x, cotangents={"dy": dy})


@each
def test_error_of_float32(device, name):
    """Over [−12, 12], against float64: at most half again of torch's own error, in values and gradients."""
    x = torch.linspace(-12, 12, 6001, device=device)
    rule, options, theirs = RULES[name]
    kernel = rule.kernel()

    def error(got, want):
        return float((got.double() - want).abs().max())

    y = kernel.forward(x, *options)
    saved = x if "x" in rule.saved else y
    dx = kernel.backward(torch.ones_like(x), saved, *options)
    found = []
    for t in (x, x.double()):
        leaf = t.clone().requires_grad_()
        out = theirs(leaf)
        found.append((out.detach(), *torch.autograd.grad(out, leaf, torch.ones_like(t))))
    for got, torchs, want in zip((y, dx), *found):
        assert error(got, want) <= max(1.5 * error(torchs, want), 1.2e-7), (error(got, want), error(torchs, want))


def test_tanh_to_the_last_places(device):
    """Relative error, where 1 − 2/(e²ˣ + 1) alone would have none of its digits right."""
    x = torch.cat([torch.logspace(-30, 1.2, 3000, device=device), torch.linspace(0.5, 0.7, 3000, device=device)])
    y = op.TANH_RULE.kernel().forward(torch.cat([x, -x])).double()
    want = torch.cat([x, -x]).double().tanh()
    assert ((y - want) / want).abs().max() < 2.5 * 2**-24 * 2


@each
def test_in_place(device, name):
    """The public functions and modules, in place too."""
    x = normal(3, 5, device=device)
    if name in ("relu", "silu"):
        fn, theirs = getattr(bp.functional, name), RULES[name][2]
        leaf = x.clone().requires_grad_()
        y = leaf * 1
        assert fn(y, inplace=True, backend="triton") is y
        torch.testing.assert_close(y, theirs(x))
        ours = torch.autograd.grad(y, leaf, x.cos())[0]
        torch.testing.assert_close(ours, torch.autograd.grad(theirs(leaf), leaf, x.cos())[0])
    module = {"relu": "ReLU", "tanh": "Tanh", "sigmoid": "Sigmoid", "silu": "SiLU"}.get(name, "GELU")
    m = getattr(bp.nn, module)(*(("tanh",) if name == "gelu tanh" else ()))
    m.backend = "triton"
    torch.testing.assert_close(m(x), RULES[name][2](x))
