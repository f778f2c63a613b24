"""What is special to interpolation: it is its forward's transpose in every mode, both of its sums agree, modules, errors."""

from __future__ import annotations

from random import Random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bptoolkit as bp
from bptoolkit.ops import interpolate as module

f = bp.functional


def configurations(mode, count):
    for seed in range(count):
        r = Random(seed)
        n = r.choice(module.MODES[mode])
        X = [r.randint(1, (60, 30, 8)[n - 1]) for _ in range(n)]
        kwargs = {"mode": mode}
        if r.random() < 0.5:
            kwargs["size"] = [r.randint(1, 2 * m + 3) for m in X]
        else:
            kwargs["scale_factor"] = [r.choice([s for s in (0.5, 0.33, 1.0, 1.3, 2.0, 2.4, 3.0) if int(m * s)]) for m in X]
        if "linear" in mode or "cubic" in mode:
            kwargs["align_corners"] = r.choice((None, True, False))
        if mode in ("bilinear", "bicubic"):
            kwargs["antialias"] = r.random() < 0.5
        layout = torch.channels_last if n == 2 and r.random() < 0.4 else torch.contiguous_format
        yield X, kwargs, layout


@pytest.mark.parametrize("mode", module.MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_transpose_of_forward(mode, dtype):
    """⟨dy, A x⟩ = ⟨Aᵀ dy, x⟩ for torch's own A; in rows (float32 on the CPU) and by index_add alike. Not compared with torch's
    backward, which in the nearest modes is not always the transpose of its forward."""
    tol = 1e-10 if dtype == torch.float64 else 1e-3
    for X, kwargs, layout in configurations(mode, 60):
        x = torch.randn(2, 5, *X, dtype=dtype).to(memory_format=layout).requires_grad_()
        y = f.interpolate(x, **kwargs)
        assert torch.equal(y, F.interpolate(x, **kwargs)) or (kwargs.get("antialias") and y.shape[-1] == 1)
        dy = torch.randn_like(y)
        (fast,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        (plain,) = torch.autograd.grad(y, x, dy, create_graph=True)
        close = torch.testing.assert_close
        close(fast, plain, rtol=tol, atol=tol)
        v = torch.randn_like(x)
        there, back = (dy.double() * f.interpolate(v, **kwargs).double()).sum(), (plain.double() * v.double()).sum()
        close(there, back, rtol=tol, atol=tol * y.numel() ** 0.5)


def test_whole_steps_are_what_the_kernel_does():
    """Upsampling by 2, 3 and 4 takes each source that often, at every size, so that backward may add up neighbours."""
    for s in (2, 3, 4):
        for X in (1, 7, 100, 4097):
            for mode in module.NEAREST:
                for how in ({"size": s * X}, {"scale_factor": float(s)}):
                    for dtype in (torch.float32, torch.float64):
                        x = torch.arange(X, dtype=dtype).view(1, 1, X)
                        assert torch.equal(F.interpolate(x, **how, mode=mode), x.repeat_interleave(s, 2)), (s, X, mode, how)


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic", "area"])
@pytest.mark.parametrize("size", [(40, 30), (9, 70)])
def test_infinite_cotangents_stay_where_they_are(mode, size):
    """Rows and index_add spread an infinity over the sources of its output alone."""
    x = torch.randn(2, 3, 24, 21, requires_grad=True)
    y = f.interpolate(x, size, mode=mode)
    dy = torch.ones_like(y)
    dy[0, 0, 5, 7] = float("inf")
    fast, plain = (torch.autograd.grad(y, x, dy, create_graph=g, retain_graph=True)[0] for g in (False, True))
    finite = torch.isfinite(F.interpolate(torch.ones_like(x), size, mode=mode))
    assert finite.all()
    for g in (fast, plain):
        assert 0 < (~torch.isfinite(g)).sum() <= 16 and torch.isfinite(g[1]).all()
    torch.testing.assert_close(fast, plain, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_nothing_is_kept():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        f.interpolate(torch.randn(1, 2, 3, 3, requires_grad=True), scale_factor=2, mode="bicubic")
    assert not kept


MODULES = [
    ("Upsample", {"scale_factor": 2}),
    ("Upsample", {"size": (5, 7), "mode": "bilinear", "align_corners": True}),
    ("Upsample", {"scale_factor": (1.5, 2.3), "mode": "bicubic", "recompute_scale_factor": True}),
    ("UpsamplingNearest2d", {"size": 9}),
    ("UpsamplingBilinear2d", {"scale_factor": 1.7}),
]


@pytest.mark.parametrize("name, options", MODULES, ids=str)
def test_modules(name, options):
    a, b = getattr(bp.nn, name)(**options), getattr(nn, name)(**options)
    assert repr(a) == repr(b) and isinstance(a, type(b))
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(b(x))
    torch.testing.assert_close((a(x), torch.autograd.grad(a(x), x, dy)), (b(x), torch.autograd.grad(b(x), x, dy)))


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic", "area"])
def test_bfloat16_is_rounded_once(mode):
    x = torch.randn(1, 2, 6, 6, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(1, 2, 31, 31, dtype=torch.bfloat16)
    got = torch.autograd.grad(f.interpolate(x, 31, mode=mode), x, dy)[0]
    wide = x.detach().double().requires_grad_()
    want = torch.autograd.grad(f.interpolate(wide, 31, mode=mode), wide, dy.double())[0]
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-4)


X = torch.randn(1, 2, 4, 4)
ERRORS = {
    "mode": (lambda: f.interpolate(X, 2, mode="cubic"), ValueError, "mode='cubic' is not known"),
    "rank": (lambda: f.interpolate(X, 2, mode="linear"), ValueError, "needs an input of 3 dimensions"),
    "corners": (lambda: f.interpolate(X, 2, align_corners=True), ValueError, "align_corners=True has no meaning"),
    "antialias": (lambda: f.interpolate(X, 2, antialias=True), ValueError, "antialias=True goes with"),
    "neither": (lambda: f.interpolate(X), ValueError, "give exactly one"),
    "both": (lambda: f.interpolate(X, 2, 2.0), ValueError, "give exactly one"),
    "recompute": (lambda: f.interpolate(X, 2, recompute_scale_factor=True), ValueError, "recompute_scale_factor=True has no"),
    "sizes": (
        lambda: f.interpolate(X, (2, 2, 2)),
        ValueError,
        r"size=\(2, 2, 2\) must be one number, or one for each",
    ),
    "floats": (lambda: f.interpolate(X, 2.5), TypeError, "size=2.5 must be made of ints"),
    "empty": (lambda: f.interpolate(X, scale_factor=0.1), ValueError, r"gives \(0, 0\)"),
    "integers": (lambda: f.interpolate(X.long(), 2), TypeError, "input is torch.int64"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_errors(error):
    call, kind, message = ERRORS[error]
    with pytest.raises(kind, match="interpolate: .*" + message):
        call()
