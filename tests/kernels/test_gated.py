"""The gated units' kernels beside their eager rules."""

from __future__ import annotations

import pytest
import torch
from fused import LAYOUTS, both_rules, each_dtype, normal

import bptoolkit as bp
from bptoolkit.ops import gated as op
from bptoolkit.triton_kernels import elementwise

PAIRS = {
    "swiglu": (op.SWIGLU_RULE, ()),
    "geglu": (op.GEGLU_RULE, ("none",)),
    "geglu tanh": (op.GEGLU_RULE, ("tanh",)),
    "reglu": (op.REGLU_RULE, ()),
}
each = pytest.mark.parametrize("name", PAIRS)
INF, NAN = float("inf"), float("nan")


def pair(*shape, dtype=torch.float32, device="cpu"):
    return [normal(*shape, dtype=dtype, device=device, seed=k) * 2 for k in range(2)]


def run(name, a, b, **kw):
    rule, options = PAIRS[name]
    return both_rules(rule, a, b, *options, **kw)


def glu(x, dim, **kw):
    return both_rules(op.GLU_RULE, x, dim, **kw)


@pytest.mark.parametrize("n", [3, 2047, 2048, 2049, 9000])
@each
def test_sizes(device, name, n):
    """One row: either side of a tile, more tiles than there are programs at a time."""
    run(name, *pair(n, device=device))


@pytest.mark.parametrize("M, N", [(1, 5), (7, 1), (5, 31), (65, 32), (63, 33), (4, 511), (5, 512), (9, 513), (3, 1100)])
def test_halves_are_read_where_they_are(device, M, N, monkeypatch):
    """h.chunk(2, -1): rows of two strides, either side of a tile; nothing is copied, nor for the gradients of glu."""
    h, sizes = normal(M, 2 * N, device=device), []
    seen = torch.Tensor.reshape

    def reshape(t, *shape):
        out = seen(t, *shape)
        sizes.append(out.untyped_storage().data_ptr() == t.untyped_storage().data_ptr())
        return out

    monkeypatch.setattr(torch.Tensor, "reshape", reshape)
    run("swiglu", *h.chunk(2, -1))
    glu(h, -1)
    assert len(sizes) > 8 and all(sizes[: -len(sizes) // 2])
    a, b = h.chunk(2, -1)
    got = elementwise.matrices(normal(M, N, device=device), a, b)
    assert got[:2] == ((M, N) if M > 1 and N > 1 else (1, M * N))
    assert [t.data_ptr() for t in got[2][1:]] == [a.data_ptr(), b.data_ptr()]


@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1, -2])
def test_glu_of_any_dimension(device, dim):
    x = normal(4, 6, 2, 10, device=device)
    glu(x, dim)
    glu(x.permute(2, 0, 3, 1), dim, cotangents={"dy": op.glu(x.permute(2, 0, 3, 1), dim).cos().mT.contiguous().mT})


@each_dtype
def test_dtypes(device, dtype):
    for name in PAIRS:
        run(name, *pair(33, 20, dtype=dtype, device=device))
    glu(normal(5, 34, dtype=dtype, device=device), 1)


@pytest.mark.parametrize("of_a", LAYOUTS)
@pytest.mark.parametrize("of_b", LAYOUTS)
def test_layouts(device, of_a, of_b):
    """Strides are arguments: nothing is read as if it were dense."""
    a, b = pair(7, 20, device=device)
    run("swiglu", LAYOUTS[of_a](a), LAYOUTS[of_b](b), cotangents={"dy": LAYOUTS[of_b](a.cos())})


@pytest.mark.parametrize("of_x", LAYOUTS)
@pytest.mark.parametrize("of_dy", LAYOUTS)
@pytest.mark.parametrize("dim", [0, 1])
def test_layouts_of_glu(device, of_x, of_dy, dim):
    x, dy = normal(6, 20, device=device), normal(*((3, 20) if dim == 0 else (6, 10)), device=device, seed=1)
    glu(LAYOUTS[of_x](x), dim, cotangents={"dy": LAYOUTS[of_dy](dy)})


@pytest.mark.parametrize("shape", [(2, 4, 3, 5), (2, 4, 3, 5, 2)], ids=str)
@pytest.mark.parametrize("dim", [1, 2, 3, -1])
def test_channels_last(device, shape, dim):
    """The results are channels last as the inputs are; cotangents may be either."""
    order = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    a, b = (t.contiguous(memory_format=order) for t in pair(*shape, device=device))
    for dy in (a.cos(), a.cos().contiguous()):
        out, grads = run("swiglu", a, b, cotangents={"dy": dy})
        assert all(t.is_contiguous(memory_format=order) for t in (*out, *grads))
    run("reglu", a, b.contiguous())
    if shape[dim] % 2 == 0:
        out, grads = glu(a, dim)
        assert all(t.is_contiguous(memory_format=order) for t in (*out, *grads))
    x = normal(*(2 * n if d == dim % len(shape) else n for d, n in enumerate(shape)), device=device)
    glu(x.contiguous(memory_format=order), dim)


@pytest.mark.parametrize("need", [(True, False), (False, True)], ids=str)
@each
def test_what_is_needed(device, name, need):
    run(name, *pair(5, 40, device=device), need=need)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4), (2, 0, 6)], ids=str)
def test_zero_sizes(device, shape):
    for name in PAIRS:
        run(name, *pair(*shape, device=device))
    for dim, n in enumerate(shape):
        if n % 2 == 0:
            glu(normal(*shape, device=device), dim)
    glu(normal(4, device=device), 0)
    run("swiglu", torch.tensor(1.5, device=device), torch.tensor(-2.0, device=device))


@each
def test_special_values(device, name):
    """NaN and infinities are where the eager rule has them in float64, for every triple of a, b and dy."""
    values = torch.tensor([0.0, -0.0, 1.5, -1.5, 3.0, -3.0, INF, -INF, NAN], device=device)
    a, b, dy = (t.flatten() for t in torch.meshgrid(values, values, values, indexing="ij"))
    run(name, a, b, cotangents={"dy": dy})
    glu(torch.cat((b, a)), 0, cotangents={"dy": dy})


def test_a_row_of_a_large_tensor(device):
    """Nothing outside the halves is read or written: they are surrounded by NaN."""
    h = torch.full((6, 100), NAN, device=device)
    a, b = h[1:5, 10:41], h[1:5, 50:81]
    a.copy_(normal(4, 31, device=device))
    b.copy_(normal(4, 31, device=device, seed=1))
    out, grads = run("geglu", a, b)
    assert all(t.isfinite().all() for t in (*out, *grads))


def test_what_the_kernels_cannot_take(device):
    f, x = bp.functional, normal(2, 4, dtype=torch.float64, device=device)
    for call in (lambda **kw: f.glu(x, **kw), lambda **kw: f.geglu(x, x, "tanh", **kw), lambda **kw: f.reglu(x, x, **kw)):
        with pytest.raises(ValueError, match=r"glu: backend='triton' cannot run here: .*float32, not float64"):
            call(backend="triton")
        assert call().dtype == torch.float64
