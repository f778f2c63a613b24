"""conv2d_batch_norm_relu's kernels, which are batch_norm_relu's around the vendor's convolution."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from fused import LAYOUTS, both_rules, each_dtype, normal

import bptoolkit as bp
from bptoolkit.ops import batch_norm_relu, conv
from bptoolkit.ops.conv_batch_norm_relu import RULE
from bptoolkit.triton_kernels import conv_batch_norm_relu as file
from bptoolkit.triton_kernels.batch_norm import RELU

HOW = ((1, 2), (1, 0), (1, 1), (0, 1), 1)  # stride, padding, dilation, tail, groups


def drawn(device, N=3, C=2, O=4, training=True, *, bias=True, affine=True, dtype=torch.float32, X=(5, 6)):
    """All arguments of the rule."""
    x, w, b, g, h, mean = (
        normal(*s, dtype=dtype, device=device, seed=k) for k, s in enumerate(((N, C, *X), (O, C, 3, 3), *4 * ((O,),)))
    )
    running = (None, None) if training else (mean, mean.square() + 0.5)
    return x, w, b if bias else None, *((g, h) if affine else (None, None)), *running, *HOW, training, 0.1, 1e-5


NORM = batch_norm_relu.RULE.Need(True, True, True, False, False)
NEEDED = [n for n in product((True, False), repeat=5) if any(n)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("need", NEEDED, ids=str)
def test_what_is_needed(device, need, training):
    both_rules(RULE, *drawn(device, training=training), need=(*need, False, False), errors=64)


@pytest.mark.parametrize("given", [{"dy": None}, {"dm": None}, {"dm": None, "dr": None}], ids=str)
@pytest.mark.parametrize("bias, affine, training", list(product((True, False), repeat=3)))
def test_what_is_given(device, bias, affine, training, given):
    if not training:
        given = {"dm": None, "dr": None}  # m and r are constants
    args = drawn(device, training=training, bias=bias, affine=affine)
    need = [t is not None and k < 5 for k, t in enumerate(args[:7])]
    need[2] &= not training or "dm" not in given  # or db is 0 but for rounding
    both_rules(RULE, *args, need=need, cotangents=given, errors=64)


@pytest.mark.parametrize("layout", ["channels last", *LAYOUTS])
def test_layouts(device, layout):
    x, *args = drawn(device, bias=False)
    x = x.contiguous(memory_format=torch.channels_last) if layout == "channels last" else LAYOUTS[layout](x)
    need = (True, True, False, True, True, False, False)
    both_rules(RULE, x, *args, need=need, cotangents={"dm": None, "dr": None}, errors=64)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("training", [True, False])
@each_dtype
def test_the_convolution_made_again_is_the_same(device, dtype, training, last):
    """Bit for bit what batch_norm_relu's kernels give of the convolution's output, and its gradients of what they give."""
    x, w, b, g, h, mean, var, *how, training, momentum, eps = args = drawn(device, dtype=dtype, training=training)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    y, m, r = file.KERNEL.forward(x, *args[1:])
    u = conv.forward(x, w, b, *how)
    for got, want in zip((y, m, r), RELU.forward(u, g, h, mean, var, training, momentum, eps), strict=True):
        assert torch.equal(got, want)
    assert y.stride() == u.stride()
    dy, need = normal(*y.shape, dtype=dtype, device=device, seed=9), RULE.Need(*(True,) * 5, False, False)
    got = file.KERNEL.backward(dy, None, None, x, w, b, g, h, m, r, *how, training, need)
    du, dg, dh, *_ = RELU.backward(dy, None, None, u, g, h, m, r, training, NORM)
    want = (*conv.backward(du, x, w, *how, conv.DENSE.Need(True, True, True)), dg, dh, None, None)
    for a, e in zip(got, want, strict=True):
        assert (a is None and e is None) or torch.equal(a, e)


def test_no_samples(device):
    both_rules(RULE, *drawn(device, N=0), need=(True,) * 5 + (False, False))


@pytest.mark.parametrize("training", [True, False])
def test_module(device, training):
    ours = bp.nn.ConvBatchNormReLU2d(3, 4, 3, padding=1, padding_mode="reflect", bias=True, device=device).train(training)
    plain = torch.nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect", device=device), torch.nn.BatchNorm2d(4, device=device)
    theirs = torch.nn.Sequential(*plain, torch.nn.ReLU()).train(training)
    theirs.load_state_dict({k.replace("conv", "0").replace("bn", "1"): v for k, v in ours.state_dict().items()})
    ours.backend = "triton"
    results = []
    for m in (ours, theirs):
        x = normal(2, 3, 5, 4, device=device).requires_grad_()
        y = m(x)
        y.sin().sum().backward()
        results.append((y, x.grad, [p.grad for p in m.parameters()], list(m.buffers())))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
