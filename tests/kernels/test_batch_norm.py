"""The kernels of batch_norm and batch_norm_relu beside their eager rules."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from fused import DTYPES, both_rules, each_dtype, normal

import bptoolkit as bp
from bptoolkit.ops import batch_norm, batch_norm_relu
from bptoolkit.triton_kernels import batch_norm as file

RULES = {"batch_norm": batch_norm.RULE, "relu": batch_norm_relu.RULE}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
each_mode = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def vectors(C, device, dtype=torch.float32):
    w, b, mean, var = (normal(C, dtype=dtype, device=device, seed=k) for k in range(4, 8))
    return w, b, mean, var.abs() + 0.5


def run(rule, x, training=True, *, w=None, b=None, need=(True, True, True), eps=1e-5, errors=8, **cotangents):
    mean, var = (None, None) if training else vectors(x.shape[1], x.device, x.dtype)[2:]
    need = (need[0], need[1] and w is not None, need[2] and b is not None, False, False)
    return both_rules(rule, x, w, b, mean, var, training, 0.1, eps, need=need, cotangents=cotangents, errors=errors)


def last(t):
    """Channels innermost."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


# Either side of a tile, one and several tiles to a program; few samples, few channels, few positions.
PLANES = [(5, 3, 7, 9), (9, 2, 257), (1, 5, 300), (1, 1, 2100), (2, 70, 3, 5), (40, 2, 33), (2, 1, 1, 1, 2)]
INNER = [(9, 64), (33, 65), (2100, 1), (200, 33), (2, 65, 3, 5), (1, 3, 20, 20), (3, 2, 2, 2, 2)]


@pytest.mark.parametrize("shape, inner", [*product(PLANES, [False]), *product(INNER, [True])], ids=str)
def test_sizes(device, shape, inner):
    x, (w, b, *_) = normal(*shape, device=device) + 0.5, vectors(shape[1], device)
    x = last(x) if inner else x
    assert file.innermost(x) == inner
    (y, *_), (dx, *_) = run(batch_norm_relu.RULE, x, w=w, b=b, errors=32)  # NumPy sums a column in its order
    assert y.stride() == dx.stride() == x.stride() or x.dim() == 2


@each_rule
@each_mode
def test_several_tiles_a_program(device, rule, training):
    for x in (normal(9, 2, 257, device=device), normal(200, 33, device=device)):
        w, b, *_ = vectors(x.shape[1], device)
        run(rule, x, training, w=w, b=b, errors=32)


@each_dtype
@pytest.mark.parametrize("parameters", ["same", "float32", "none"])
@pytest.mark.parametrize("shape, training", [((9, 3, 40), True), ((40, 7), True), ((9, 3, 40), False)], ids=str)
def test_dtypes(device, dtype, parameters, shape, training):
    """Without parameters too: beside float32 ones a half tensor that is not upcast on loading would be so by promotion."""
    x = normal(*shape, dtype=dtype, device=device)
    w, b, *_ = vectors(x.shape[1], device, DTYPES.get(parameters, dtype))
    w, b = (None, None) if parameters == "none" else (w, b)
    for rule in list(RULES.values())[parameters != "same" :]:
        run(rule, x, training, w=w, b=b)


@each_rule
@each_mode
@pytest.mark.parametrize("w, b", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("need", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_what_is_given_and_needed(device, rule, training, w, b, need):
    x, (weight, bias, *_) = normal(5, 3, 7, device=device), vectors(3, device)
    if need != (False, not w, not b):
        run(rule, x, training, w=weight if w else None, b=bias if b else None, need=need)


@each_rule
@each_mode
@pytest.mark.parametrize("cotangents", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)])
def test_missing_cotangents(device, rule, training, cotangents):
    x, (w, b, *_) = normal(5, 3, 7, device=device), vectors(3, device)
    missing = {name: None for name, given in zip(("dy", "dm", "dr"), cotangents) if not given}
    run(rule, x, training, w=w, b=b, **missing)


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels last": last,
    "samples apart": lambda t: t.repeat_interleave(2, 0)[::2],
    "channels apart": lambda t: t.repeat_interleave(3, 1)[:, ::3],
    "positions apart": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "positions turned": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "samples last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "one sample for all": lambda t: t[:1].expand_as(t),
    "off by one element": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view_as(t),
}


@pytest.mark.parametrize("of_dy", ["contiguous", "channels last", "one element for all"])
@pytest.mark.parametrize("of_x", LAYOUTS)
def test_layouts(device, of_x, of_dy):
    x, dy = (normal(5, 6, 3, 4, device=device, seed=k) for k in range(2))
    dy = dy.flatten()[0].expand_as(dy) if of_dy == "one element for all" else LAYOUTS[of_dy](dy)
    w, b = normal(12, 2, device=device, seed=2).t()[:, ::2]
    run(batch_norm_relu.RULE, LAYOUTS[of_x](x), w=w, b=b, dy=dy, eps=0.5)


@each_rule
@each_mode
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2, 2), (2, 0), (2, 3, 0), (2, 0, 3)], ids=str)
def test_zero_sizes(device, rule, training, shape):
    x, (w, b, mean, var) = normal(*shape, device=device), vectors(shape[1], device)
    before = mean.clone(), var.clone()
    kernel = rule.kernel()
    y, m, r = kernel.forward(x, w, b, mean, var, training, 0.1, 1e-5)
    assert y.shape == x.shape and m.shape == r.shape == w.shape
    assert torch.equal(mean, before[0]) and torch.equal(var, before[1])
    dx, dw, db, *_ = kernel.backward(y, None, None, x, w, b, m, r, training, rule.Need(True, True, True, False, False))
    assert dx.shape == x.shape and not dw.any() and not db.any()


@each_dtype
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0])
def test_running_statistics(device, dtype, momentum):
    """Those of torch after two calls; in their own dtype; none, or in evaluation, none are written."""
    for inner in (False, True):
        x = (normal(6, 3, 20, device=device) + 20).to(dtype)
        x = last(x) if inner else x
        ours, theirs = ([torch.zeros(3, dtype=t), torch.ones(3, dtype=t)] for t in (dtype, torch.float64))
        ours = [t.to(device) for t in ours]
        for _ in range(2):
            bp.functional.batch_norm_relu(x, *ours, training=True, momentum=momentum, backend="triton")
            F.batch_norm(x.double().cpu(), *theirs, training=True, momentum=momentum)
        tolerance = 2 * torch.finfo(dtype).eps
        for got, want in zip(ours, theirs):
            torch.testing.assert_close(got.double().cpu(), want, rtol=tolerance, atol=tolerance)
        before = [t.clone() for t in ours]
        bp.functional.batch_norm_relu(x, *ours, backend="triton")
        assert all(map(torch.equal, ours, before))


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("first", [1.0, 1000.0])
def test_large_mean(device, inner, first):
    """The variance is that of x − mean, and no program's sums are about a mean that is far from its own, or just a little."""
    x = normal(50, 2, 100, device=device) + 1000
    x[0] *= first
    x = last(x) if inner else x
    y, m, r = file.KERNEL.forward(x, None, None, None, None, True, 0.1, 1e-5)
    flat = x.double().transpose(0, 1).flatten(1)
    assert ((m - flat.mean(1)).abs() <= 1e-6 * (flat.mean(1) + flat.std(1))).all()
    torch.testing.assert_close(r.double(), (flat.var(1, correction=0) + 1e-5).rsqrt(), rtol=1e-5, atol=0)
    if first == 1:
        torch.testing.assert_close(y.double(), F.batch_norm(x.double(), None, None, training=True), rtol=0, atol=3e-4)


@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_the_ends_of_the_range(device, scale):
    """Nothing on the way to dx, such as r³, leaves it."""
    x, dy = normal(7, 3, 5, device=device) * scale, normal(7, 3, 5, device=device, seed=1)
    leaves = [t.requires_grad_() for t in (x.detach(), x.double())]
    y = bp.functional.batch_norm_relu(leaves[0], None, None, training=True, backend="triton")
    z = torch.relu(F.batch_norm(leaves[1], None, None, training=True))
    (dx,), (dz,) = (torch.autograd.grad(o, t, dy.to(o.dtype)) for o, t in zip((y, z), leaves))
    torch.testing.assert_close(y.double(), z, atol=1e-6, rtol=1e-6)
    assert (dx - dz).abs().max() <= 1e-5 * dz.abs().max()


@each_rule
@each_mode
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_element_that_is_not_finite(device, rule, training, value):
    """In training it spoils its channel alone, in evaluation itself; of dy as of x."""
    x, (w, b, mean, var) = normal(5, 4, 30, device=device), vectors(4, device)
    x[2, 1, 7] = value
    w = w.abs()
    args, options = (x, w, b, mean, var), (training, 0.1, 1e-5)
    out, want = (space.forward(*(t.clone() for t in args), *options) for space in (rule.kernel(), rule))
    torch.testing.assert_close(out[0], want[0], equal_nan=True)
    need = rule.Need(True, True, True, False, False)
    for dy in (torch.ones_like(x), x):
        grads = [space.backward(dy, None, None, x, w, b, *want[1:], training, need)[:3] for space in (rule.kernel(), rule)]
        torch.testing.assert_close(*grads, equal_nan=True, rtol=1e-4, atol=1e-4)


@each_dtype
@each_mode
@pytest.mark.parametrize("inner", [False, True])
def test_a_gradient_passes_where_y_is_not_zero(device, dtype, training, inner):
    """Exactly there, small ones of z included: the sign is computed twice in the same way."""
    x, mean, var = normal(60, 4, 20, device=device).to(dtype), torch.zeros(4), torch.ones(4)
    x = last(x) if inner else x
    w, b = 10 ** torch.linspace(-8, 0, 4).to(device), normal(4, device=device) * 0
    x[:5] = 0.0
    y, m, r = file.RELU.forward(x, w, b, mean.to(device), var.to(device), training, 0.1, 1e-5)
    dy = normal(60, 4, 20, device=device).abs().to(dtype) + 1
    need = batch_norm_relu.RULE.Need(True, False, True, False, False)
    dx, _, db, *_ = file.RELU.backward(dy, None, None, x, w, b, m, r, training, need)
    want = torch.where(y != 0, dy, 0.0).double().sum((0, 2))
    torch.testing.assert_close(db.double(), want, rtol=1e-5, atol=0)
    if not training:
        assert not dx[y == 0].any()


def test_the_same_bits_every_time(device):
    x, (w, b, *_) = normal(40, 3, 70, device=device), vectors(3, device)
    runs = [file.RELU.forward(x, w, b, None, None, True, 0.1, 1e-5) for _ in range(2)]
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("cls", ["BatchNorm2d", "BatchNormReLU2d"])
def test_modules(device, cls):
    """Training, then evaluation, by the module's `backend`; the running statistics flow into what comes later."""
    ours, theirs = getattr(bp.nn, cls)(3, device=device), torch.nn.BatchNorm2d(3, device=device)
    ours.backend = "triton"
    act = torch.relu if "ReLU" in cls else torch.nn.Identity()
    for training in (True, False):
        x, y = (normal(4, 3, 5, 2, device=device).requires_grad_() for _ in range(2))
        for m, t, f in ((ours, x, lambda y: y), (theirs, y, act)):
            f(m.train(training)(t)).sin().sum().backward()
        torch.testing.assert_close((x.grad, ours.weight.grad), (y.grad, theirs.weight.grad))
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_compiled_with_running_statistics(device):
    x, buffers = normal(4, 3, 5, device=device), [[torch.zeros(3), torch.ones(3)] for _ in range(2)]
    buffers = [[t.to(device) for t in pair] for pair in buffers]

    def call(x, m, v):
        return bp.functional.batch_norm_relu(x, m, v, training=True, backend="triton").sin()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(compiled(x, *buffers[0]), call(x, *buffers[1]))
    torch.testing.assert_close(*buffers)
