"""linear_cross_entropy's kernel beside its eager rules, in both ways of making gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fused import LAYOUTS, both_rules, double, each_dtype, normal

import bptoolkit as bp
from bptoolkit.ops.linear_cross_entropy import FUSED, OP, RULE
from bptoolkit.triton_kernels import linear_cross_entropy as file

f = bp.functional.linear_cross_entropy
OPTIONS = {
    "plain": (0.0, 0.0, None),
    "smoothed": (0.1, 0.0, None),
    "z": (0.0, 0.1, None),
    "capped": (0.0, 0.0, 1.5),
    "all": (0.2, 0.1, 2.0),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """4 rows at most, that there may be several chunks, and parts of a row of 64 elements."""
    for name, value in {"CHUNK": 1, "LEAST": 4, "MOST": 4, "TILE": 2, "BLOCK": 64}.items():
        monkeypatch.setattr(file, name, value)


def tensors(N, C, I, device, dtype=torch.float32, ignored=True):
    x, w, b, v = (normal(*s, dtype=dtype, device=device, seed=n) for n, s in enumerate(((N, I), (C, I), (C,), (C,))))
    k = torch.arange(N, device=device) * 7 % C
    if ignored and N > 1:
        k[1] = -100
    return x, w, b, v.abs() + 0.25, k


def run(x, w, b, v, k, reduction="mean", options=(0.0, 0.0, None), need="xwb", **kw):
    smoothing, z_loss, softcap = options
    args = (x, w, b, v, k, -100, reduction, smoothing, False, z_loss, softcap)
    wanted = [i in need and t is not None for i, t in zip("xwbvk", (x, w, b, v, k))]
    both_rules(RULE, *args, need=wanted, errors=40, **kw)
    if reduction != "none" and any(wanted):
        letters = "".join(i for i, n in zip("xwb", wanted) if n)
        with torch.no_grad():  # the backward that is not itself differentiated, which multiplies
            both_rules(FUSED, *args, letters, need=wanted, errors=40, **kw)


SIZES = [(1, 1, 1), (2, 63, 3), (3, 64, 5), (5, 65, 2), (4, 200, 4), (8, 3, 2), (9, 2, 3), (13, 1, 1)]


@pytest.mark.parametrize("N, C, I", SIZES)
def test_sizes(device, N, C, I):
    x, w, b, _, k = tensors(N, C, I, device)
    run(x, w, b, None, k)


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "-"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_options(device, options, reduction, weighted):
    x, w, b, v, k = tensors(4, 70, 3, device)
    run(x, w, b, v if weighted else None, k, reduction, OPTIONS[options])


@pytest.mark.parametrize("need", ["x", "w", "b", "xb", "wb", "v", "xwbv"])
def test_what_is_needed(device, need):
    """By class weights too, which the eager rule does; without a bias."""
    x, w, b, v, k = tensors(4, 9, 3, device)
    run(x, w, b, v, k, "sum", OPTIONS["all"], need)
    if need in ("x", "w"):
        run(x, w, None, None, k, "mean", need=need)


@each_dtype
@pytest.mark.parametrize("N", [4, 7])
def test_dtypes(device, dtype, N):
    """Half logits and da are rounded on the way, as in the eager rule: both are off by the same, from float64 truth."""
    x, w, b, v, k = tensors(N, 5, 4, device, dtype)
    d = normal(1, dtype=dtype, seed=5, device=device)[0].abs() + 1

    def gradients(fn, leaves, v, d, **kw):
        leaves = [t.detach().requires_grad_() for t in leaves]
        l = fn(leaves[0], leaves[1], k, linear_bias=leaves[2], weight=v, label_smoothing=0.1, z_loss=0.1, softcap=3.0, **kw)
        return l.detach(), *torch.autograd.grad(l, leaves, d.to(l.dtype))

    exact = gradients(OP.reference, double((x, w, b)), v.double(), d.double())
    ours, eager = (gradients(f, (x, w, b), v, d, backend=backend) for backend in ("triton", "eager"))
    for o, e, true in zip(ours, eager, exact):
        assert o.dtype == e.dtype == dtype
        size = float(true.abs().max())
        assert (
            float((o.double() - true).abs().max())
            <= 2 * float((e.double() - true).abs().max()) + 2 * torch.finfo(dtype).eps * size
        )


def test_dtype_of_the_sum():
    """float32 where a half would round sums, or could not hold them."""
    x, w = torch.empty(4, 4, dtype=torch.bfloat16), torch.empty(9, 4, dtype=torch.bfloat16)
    assert file.sum_dtype(x, w) == torch.bfloat16
    assert file.sum_dtype(torch.empty(5, 4), w) == file.sum_dtype(x, w.half()) == file.sum_dtype(x, w.float()) == torch.float32


def test_float16_of_many_rows(device):
    """Gradients of a sum, and loss scaling: 1/N of a small p is nothing in float16, and 1/N times the scale is not."""
    x, w, _, _, k = tensors(17, 40, 2, device, torch.float16)
    x, w, scale = (x / 64).requires_grad_(), (w / 64).requires_grad_(), torch.tensor(4096.0, dtype=torch.float16)
    got = torch.autograd.grad(f(x, w, k, backend="triton"), (x, w), scale)
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    want = torch.autograd.grad(F.cross_entropy(exact[0] @ exact[1].T, k), exact, scale.double())
    for g, e in zip(got, want):
        torch.testing.assert_close(g.double(), e, rtol=5e-3, atol=2e-3 * float(e.abs().max()))


@pytest.mark.parametrize("layout", ["transposed", "columns two apart", "one row for all"])
def test_layouts(device, layout):
    x, w, b, v, k = tensors(6, 9, 4, device, ignored=False)
    x, w = LAYOUTS[layout](x), LAYOUTS["transposed" if layout == "one row for all" else layout](w)
    b, v, k = (t.repeat_interleave(2)[::2] for t in (b, v, k))
    run(x, w, b, v, k, "none")
    run(x, w, b, v, k, "mean", OPTIONS["all"])


@pytest.mark.parametrize("N, C, I", [(0, 3, 2), (3, 4, 0), (0, 2, 0)])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_zero_sizes(device, N, C, I, reduction):
    x, w, b, _, k = tensors(N, C, I, device, ignored=False)
    run(x, w, b, None, k, reduction)


def test_certain_rows(device):
    """p → 1: the gradient and the loss of a row are right to float32, though 1 − p is far below it; and logits of 5000."""
    x, w, k = torch.eye(4, device=device), torch.diag(torch.tensor([40.0, 20.0, 9.0, 0.5], device=device)), torch.arange(4)
    x.requires_grad_()
    l = f(x, w, k.to(device), reduction="sum", backend="triton")
    (g,) = torch.autograd.grad(l, x)
    rows = f(x.detach(), w, k.to(device), reduction="none", backend="triton")
    e = (-w.diagonal().double()).exp() * 3
    torch.testing.assert_close(rows.double(), torch.log1p(e), rtol=1e-5, atol=0)
    torch.testing.assert_close(g.diagonal().double(), -w.diagonal().double() * e / (1 + e), rtol=1e-5, atol=0)
    big = f(x.detach(), w + 5000, k.to(device), reduction="none", label_smoothing=0.5, backend="triton")
    want = F.cross_entropy((w + 5000).double().T, k.to(device), reduction="none", label_smoothing=0.5)
    torch.testing.assert_close(big.double(), want, rtol=1e-5, atol=1e-6)


def test_what_is_not_finite(device):
    """Rows of NaN and of infinities are those of the eager rule, and stay in their rows."""
    inf, C, k = torch.inf, 70, torch.tensor([3, 3, 3, 3, 3, 0, 69], device=device)
    x = normal(7, C, device=device)
    x[0, 3], x[1, 68], x[2, 9], x[3, :66], x[4, 3], x[5] = torch.nan, inf, torch.nan, -inf, inf, -inf
    for smoothing in (0.0, 0.1):
        for row, t in zip(x, k):  # a row at a time, by way of the bias: an infinity times 0 of W would be NaN
            for red in ("none", "sum"):
                one = [torch.zeros(1, 1, device=device), torch.zeros(C, 1, device=device), row.clone().requires_grad_()]
                made = []
                for backend in ("triton", "eager"):
                    l = f(
                        one[0], one[1], t[None], linear_bias=one[2], reduction=red, label_smoothing=smoothing, backend=backend
                    )
                    made.append((l.detach(), torch.autograd.grad(l.sum(), one[2])[0]))
                torch.testing.assert_close(*made, equal_nan=True)


def test_classes_that_do_not_exist(device):
    """On the CPU an error; on a GPU, where nobody looks, the row is NaN and nothing is read beside it."""
    x, w, _, _, k = tensors(4, 5, 3, device)
    k[2], k[3] = 5, -7
    l, gx, *_ = file.ROWS(None, x, w, None, None, k, -100, 0.0, 0.0, None, [True, True, False])
    assert l.isnan().tolist() == gx.isnan().any(1).tolist() == [False, False, True, True] and l[1] == 0 and not gx[1].any()


def test_all_ignored(device):
    x, w, _, _, k = tensors(3, 4, 2, device)
    x.requires_grad_()
    for reduction in ("mean", "sum"):
        l = f(x, w, k.fill_(-100), reduction=reduction, backend="triton")
        assert l.isnan() if reduction == "mean" else l == 0
        assert not torch.autograd.grad(l, x)[0].any()


def test_infinite_cotangent(device):
    """Nothing comes to the rows that are ignored, as in the eager rule."""
    x, w, _, _, k = tensors(3, 4, 2, device)
    x.requires_grad_()
    for reduction in ("mean", "sum"):
        (dx,) = torch.autograd.grad(
            f(x, w, k, reduction=reduction, backend="triton"), x, torch.tensor(torch.inf, device=device)
        )
        assert not dx[1].any() and not dx[[0, 2]].isfinite().any()


def test_which_rule_makes_gradients(device):
    """In forward only where they are wanted, and only those; for "none", and by class weights, in backward."""
    x, w, b, v, k = tensors(4, 5, 3, device)

    def name(*leaves, **kw):
        for t in (x, w, b, v):
            t.requires_grad_(any(t is leaf for leaf in leaves))
        node = f(x, w, k, linear_bias=b, weight=v, backend="triton", **kw).grad_fn
        return None if node is None else (node.call[1][-1] if len(node.call[1]) == 7 else "")

    assert name(x, w, b) == "xwb" and name(w) == "w" and name(x, b, reduction="sum") == "xb"
    assert name(x, reduction="none") == name(x, v) == "" and name() is None
    with torch.no_grad():
        assert name(x) is None


def test_orders_and_repeats(device):
    """Backward twice gives the same bits; a backward that is differentiated is right to third order."""
    x, w, _, _, k = tensors(5, 6, 3, device)
    kw = {"softcap": 2.0, "z_loss": 0.1, "label_smoothing": 0.1}

    def derivatives(fn, x, w):
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        l = fn(x, w, k, **kw).square()
        first = torch.autograd.grad(l, (x, w), retain_graph=True)
        again = torch.autograd.grad(l, (x, w), retain_graph=True)
        assert all(map(torch.equal, first, again))
        gx, gw = torch.autograd.grad(l, (x, w), create_graph=True)
        hx, hw = torch.autograd.grad(gx.sin().sum() + gw.cos().sum(), (x, w), create_graph=True)
        return *first, hx.detach(), hw.detach(), *torch.autograd.grad(hx.sin().sum() + hw.cos().sum(), (x, w))

    got, want = (
        derivatives(lambda *a, **o: f(*a, **o, backend="triton"), x, w),
        derivatives(OP.reference, x.double(), w.double()),
    )
    for g, e in zip(got, want):
        torch.testing.assert_close(g.double(), e, rtol=1e-4, atol=1e-5)


def test_autocast(device):
    """float32 parameters, products in bfloat16, a loss in float32."""
    x, w, b, _, k = (t.requires_grad_() if t.is_floating_point() else t for t in tensors(5, 6, 3, device))
    made = []
    for backend in ("triton", "eager"):
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            l = f(x, w, k, linear_bias=b, backend=backend)
        made.append((l.detach(), *torch.autograd.grad(l, (x, w, b))))
        assert {t.dtype for t in made[-1]} == {torch.float32}
    for g, e in zip(*made):
        torch.testing.assert_close(g, e, rtol=0.02, atol=0.02 * float(e.abs().max()))


def test_flops(device):
    from torch.utils.flop_counter import FlopCounterMode

    x, w, _, _, k = tensors(5, 6, 3, device)
    one = 2 * 5 * 6 * 3
    for need, reduction, products in (((), "mean", 1), ((x, w), "mean", 3), ((w,), "sum", 2), ((x, w), "none", 4)):
        for t in (x, w):
            t.requires_grad_(any(t is leaf for leaf in need))
        with FlopCounterMode(display=False) as count:
            l = f(x, w, k, reduction=reduction, backend="triton").sum()
            if need:
                l.backward()
        assert count.get_total_flops() == products * one


def test_chunks():
    """All alike but the last, none longer than the longest, and no more of them than it takes."""
    for N, most in ((n, file.most_rows(7, 3)) for n in (1, 3, 4, 5, 9, 12345)):
        R = file.chunk_of(N, 7, 3)
        assert 0 < R <= min(N, most) and (R == N or R % file.TILE == 0)
        assert len(range(0, N, R)) == len(range(0, N, most))
