"""layer_norm's kernel beside its eager rule."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from fused import DTYPES, GIVEN_AND_NEEDED, LAYOUTS, both_rules, double, each_dtype, near, normal

import bptoolkit as bp
from bptoolkit.ops.layer_norm import RULE
from bptoolkit.triton_kernels import layer_norm as file
from bptoolkit.triton_kernels import norm_operators, norms


def run(x, w, b, D, *, need=(True, True, True), eps=1e-5, **cotangents):
    return both_rules(RULE, x, w, b, D, eps, need=need, cotangents=cotangents)


# Rows and columns: either side of a tile, one and several tiles to a program (there are three programs in the interpreter).
SIZES = [
    *product((1, 31, 32, 33, 97, 200), (33, 64)),
    *product((1, 2, 7, 9), (1000, 1024, 1025)),
    *product((1, 5), (31, 32, norms.HELD)),
    *product((3, 2049, 6200), (1,)),
]


@pytest.mark.parametrize("M, N", SIZES)
def test_sizes(device, M, N):
    run(normal(M, N, device=device), normal(N, device=device, seed=4), normal(N, device=device, seed=5), 1)


LONG = [(1, norms.HELD + 1), (5, 3 * norms.LONG_TILE), (1, 4 * norms.LONG_TILE - 1)]


@pytest.mark.parametrize("M, N", LONG)
@pytest.mark.parametrize("of_dy", ["columns two apart", "one element for all"])
def test_long_rows(device, M, N, of_dy):
    """Longer than what a program holds: either side of a tile, strides that are not those of dense rows."""
    x, dy = LAYOUTS["off by one element"](normal(M, N, device=device)), LAYOUTS[of_dy](normal(M, N, device=device, seed=1))
    run(x, normal(N, device=device, seed=4), normal(N, device=device, seed=5), 1, dy=dy)


@pytest.mark.parametrize("count", [20, 1000])
def test_long_rows_on_many_programs(device, monkeypatch, count):
    """Several for one tile of columns, which add up their parts of dw and db; never more than there are tiles of rows."""
    monkeypatch.setattr(norm_operators, "programs", lambda device, warps: count)
    N = norms.HELD + 1
    run(normal(9, N, device=device), normal(N, device=device, seed=4), normal(N, device=device, seed=5), 1)


def test_the_longest_row(device):
    """Forward alone: the interpreter takes its time."""
    x = normal(1, norms.LONGEST, device=device)
    y, _, r = file.KERNEL.forward(x, None, None, 1, 1e-5)
    want, _, r64 = RULE.forward(x.double(), None, None, 1, 1e-5)
    near(y, want, x.dtype)
    near(r, r64, x.dtype)


@pytest.mark.parametrize("cotangents", [(True, False, True), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("need", [(True, True, False), (False, False, True)], ids=str)
def test_long_rows_of_which_not_all_is_given_and_needed(device, need, cotangents):
    N = norms.HELD + 7
    w, b = (normal(N, device=device, seed=k) if k == 4 or need[2] else None for k in (4, 5))
    left_out = {name: None for name, given in zip(("dy", "dm", "dr"), cotangents) if not given}
    run(normal(2, N, device=device), w, b, 1, need=need, **left_out)


@each_dtype
@pytest.mark.parametrize("parameters", ["same", "float32", "none"])
@pytest.mark.parametrize("M, N", [(33, 65), (5, 1024), (1, norms.HELD + 5)])
def test_dtypes(device, dtype, parameters, M, N):
    """Without parameters too: beside float32 ones a half tensor that is not upcast on loading would be so by promotion."""
    w, b = (normal(N, dtype=DTYPES.get(parameters, dtype), device=device, seed=k) for k in (4, 5))
    w, b = (None, None) if parameters == "none" else (w, b)
    run(normal(M, N, dtype=dtype, device=device) + 2, w, b, 1, need=(True, w is not None, b is not None))


@pytest.mark.parametrize("lead, shape", [((), (5,)), ((2, 3), (4, 5)), ((7,), (1, 3, 1)), ((), (2, 3))], ids=str)
def test_dimensions(device, lead, shape):
    x, w, b = (normal(*s, device=device, seed=k) for k, s in enumerate(((*lead, *shape), shape, shape)))
    run(x, w, b, len(shape), eps=0.1)


@pytest.mark.parametrize("w, b, need", GIVEN_AND_NEEDED, ids=str)
@pytest.mark.parametrize("cotangents", [(True, False, False), (True, True, True), (False, True, False), (False, False, True)])
def test_what_is_given_and_needed(device, w, b, need, cotangents):
    w, b = (normal(65, device=device, seed=k) if given else None for k, given in ((4, w), (5, b)))
    left_out = {name: None for name, given in zip(("dy", "dm", "dr"), cotangents) if not given}
    run(normal(37, 65, device=device), w, b, 1, need=need, **left_out)


@pytest.mark.parametrize("of_dy", LAYOUTS)
@pytest.mark.parametrize("of_x", LAYOUTS)
def test_layouts(device, of_x, of_dy):
    """Strides are arguments: nothing is read as if it were dense. (A row of one value has r = 1/√eps: eps is large here.)"""
    x, dy = LAYOUTS[of_x](normal(35, 20, device=device)), LAYOUTS[of_dy](normal(35, 20, device=device, seed=1))
    w, b = normal(40, 2, device=device, seed=2).t()[:, ::2]
    run(x, w, b, 1, dy=dy, eps=0.5)


def test_layout_that_is_no_matrix(device):
    x = normal(4, 3, 6, 5, device=device).transpose(0, 3)
    run(x, normal(6, 4, device=device).t().contiguous().t(), normal(6, 4, device=device), 2, dy=x.cos())


@pytest.mark.parametrize("shape, D", [((0, 4), 1), ((3, 0), 1), ((0, 0), 1), ((2, 0, 3), 2), ((0, 2, 3), 2)], ids=str)
def test_zero_sizes(device, shape, D):
    x, w, b = (normal(*s, device=device) for s in (shape, shape[-D:], shape[-D:]))
    y, m, r = file.KERNEL.forward(x, w, b, D, 1e-5)
    assert y.shape == x.shape and m.shape == r.shape == (*shape[:-D], *(1,) * D)
    dx, dw, db = file.KERNEL.backward(y, None, None, x, w, b, m, r, D, RULE.Need(True, True, True))
    assert dx.shape == x.shape and dw.shape == db.shape == w.shape and not dw.any() and not db.any()


@pytest.mark.parametrize("N", [300, norms.HELD + 1000])
def test_large_mean(device, N):
    """The variance is that of x − mean, not the mean of squares less the square of the mean, which would be off by a tenth."""
    x = normal(4, N, device=device) + 1000
    y, m, r = file.KERNEL.forward(x, None, None, 1, 1e-5)
    dx = file.KERNEL.backward(x.cos(), None, None, x, None, None, m, r, 1, RULE.Need(True, False, False))[0]
    x2 = x.double().requires_grad_()
    y2 = F.layer_norm(x2, (N,))
    for got, want in ((y, y2), (dx, torch.autograd.grad(y2, x2, x.cos().double())[0])):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2 * 1000 * torch.finfo(torch.float32).eps)


def test_rows_of_steps(device):
    """Means that differ from tile to tile are part of the variance."""
    N = norms.HELD + 3000
    x = normal(2, N, device=device) + 100 * (torch.arange(N, device=device) // 4000)
    run(x, None, None, 1, need=(True, False, False))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("N", [20, norms.HELD + 20])
def test_one_row_of_nan(device, N, bad):
    """It stays in its row, though other rows share its tile."""
    x = normal(6, N, device=device)
    x[2, 3] = bad
    y, m, r = file.KERNEL.forward(x, None, None, 1, 1e-5)
    dx, _, _ = file.KERNEL.backward(x.cos(), None, None, x, None, None, m, r, 1, RULE.Need(True, False, False))
    for t in (y, dx):
        assert t.isnan().all(1).tolist() == t.isnan().any(1).tolist() == [k == 2 for k in range(6)]


def test_the_same_bits_every_time(device):
    x, w, b, dy = (normal(*s, device=device, seed=k) for k, s in enumerate(((300, 33), (33,), (33,), (300, 33))))
    out = file.KERNEL.forward(x, w, b, 1, 1e-5)
    runs = [file.KERNEL.backward(dy, None, None, x, w, b, *out[1:], 1, RULE.Need(True, True, True)) for _ in range(2)]
    assert all(map(torch.equal, *runs)) and all(map(torch.equal, out, file.KERNEL.forward(x, w, b, 1, 1e-5)))


@each_dtype
def test_the_public_function(device, dtype):
    """First order by the kernel, second order by the eager rule and the kernel's own backward; float64 truth."""
    shape, tensors = (5,), [normal(*s, dtype=dtype, device=device, seed=k) for k, s in enumerate(((3, 4, 5), (5,), (5,)))]
    dy, weights = normal(3, 4, 5, dtype=dtype, device=device, seed=9), normal(3, 4, 5, device=device, seed=8)

    def run(fn, tensors):
        x, w, b = leaves = [t.detach().requires_grad_() for t in tensors]
        y = fn(x, shape, w, b)
        first = torch.autograd.grad(y, leaves, dy.to(y.dtype), retain_graph=True)
        (dx,) = torch.autograd.grad(y, x, dy.to(y.dtype), create_graph=True)
        second = torch.autograd.grad((dx.to(weights.dtype).sin() * weights).sum().to(y.dtype), leaves[:2])
        return [y.detach(), *first, *second]

    got = run(lambda *a: bp.functional.layer_norm(*a, backend="triton"), tensors)
    want = run(F.layer_norm, double(tensors))
    tolerance = 20 * torch.finfo(dtype).eps
    for g, e in zip(got, want):
        assert g.dtype == dtype
        torch.testing.assert_close(g.double(), e, rtol=tolerance, atol=tolerance * float(e.abs().max()))


def test_gradients_batched_by_the_older_vmap(device):
    x = normal(4, 5, device=device).requires_grad_()
    batch = normal(3, 4, 5, device=device, seed=1)
    (got,) = torch.autograd.grad(bp.functional.layer_norm(x, (5,), backend="triton"), x, batch, is_grads_batched=True)
    want = [torch.autograd.grad(F.layer_norm(x, (5,)), x, dy)[0] for dy in batch]
    torch.testing.assert_close(got, torch.stack(want))


def test_module(device):
    """The module's `backend`, several dimensions, no bias."""
    ours, theirs = (cls((3, 4), bias=False, device=device) for cls in (bp.nn.LayerNorm, torch.nn.LayerNorm))
    ours.backend = "triton"
    x, y = (normal(5, 3, 4, device=device).requires_grad_() for _ in range(2))
    for m, t in ((ours, x), (theirs, y)):
        m(t).sin().sum().backward()
    torch.testing.assert_close((x.grad, ours.weight.grad), (y.grad, theirs.weight.grad))


def test_tensors_that_require_grad_do_not_leak_a_graph(device):
    x = normal(3, 5, device=device).requires_grad_()
    y = norm_operators.FORWARD(x, None, None, None, None, 0.0, 1, 1e-5, True)[0]
    assert y.grad_fn is None or "NotImplemented" in y.grad_fn.name() or "WarnNotImplemented" in y.grad_fn.name()


def test_what_the_kernel_cannot_take(device):
    """By name it raises and says why; "auto" runs the eager rule."""
    f = bp.functional.layer_norm
    wide = normal(2, norms.LONGEST + 1, device=device)
    fine = normal(2, 3, device=device)

    class Own(torch.Tensor):
        pass

    for reason, x in (
        ("computes in float32, not float64", fine.double()),
        (f"a row of {norms.LONGEST + 1} elements is too long", wide),
        ("takes plain tensors, not Own", fine.as_subclass(Own)),
    ):
        with pytest.raises(ValueError, match=f"layer_norm: backend='triton' cannot run here: .*{reason}"):
            f(x, x.shape[1:], backend="triton")
        torch.testing.assert_close(f(x, x.shape[1:]), F.layer_norm(x, x.shape[1:]))
