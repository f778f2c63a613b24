"""What is special to layer_norm: known values, the form in blocks, mixed precision, third order, modules, errors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bptoolkit as bp
from bptoolkit.ops import layer_norm as file

f = bp.functional
close = torch.testing.assert_close


def gradients(fn, x, w, b, shape, eps=1e-5, dtype=None):
    """Output and gradients, for a cotangent that is rounded to dtype (by default the output's)."""
    leaves = [None if t is None else t.clone().requires_grad_() for t in (x, w, b)]
    y = fn(leaves[0], shape, leaves[1], leaves[2], eps)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype or y.dtype).to(y.dtype)
    return y.detach(), torch.autograd.grad(y, [t for t in leaves if t is not None], dy)


def test_known_values():
    """x = (1, 2, 3, 6): m = 3, variance 3.5; with eps = 0.5, r = 1/2."""
    x = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64, requires_grad=True)
    w, b = torch.tensor([[1.0, 2.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    y = f.layer_norm(x, (4,), w, b, eps=0.5)
    assert y.tolist() == [-1.0, -1.0, 1.0, 1.5]
    (dx,) = torch.autograd.grad(y, x, torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    # g = (0, 2, 0, 0), mean(g) = 1/2, x̂ = (−1, −1/2, 0, 3/2), mean(g x̂) = −1/4
    assert dx.tolist() == [-0.375, 0.6875, -0.25, -0.0625]


@pytest.mark.parametrize("given", ["wb", "w", "b", ""])
@pytest.mark.parametrize("shape", [(0,), (1,), (5,), (3, 4), (2, 0), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("batch", [(), (0,), (4,), (2, 3)], ids=str)
def test_as_torch(given, shape, batch):
    x, w, b = (torch.randn(s, dtype=torch.float64) for s in ((*batch, *shape), shape, shape))
    args = (x, w if "w" in given else None, b if "b" in given else None, shape)
    close(gradients(f.layer_norm, *args), gradients(F.layer_norm, *args))


@pytest.mark.parametrize("need", [(True, w, b) for w in (True, False) for b in (True, False)], ids=str)
@pytest.mark.parametrize("given", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("M, shape, block", [(1, (6,), 4), (7, (6,), 12), (7, (6,), 13), (8, (2, 3), 1000), (9, (1,), 2)])
def test_in_blocks_is_backward(need, given, M, shape, block):
    """Blocks of one row, of some rows with a rest, and one block of all; rows that are no multiple of anything."""
    x, dy = torch.randn(2, M, *shape, dtype=torch.float64) + 3
    w, b = torch.randn(2, *shape, dtype=torch.float64) if given else (None, None)
    need = file.RULE.Need(*need if given else (True, False, False))
    _, m, r = file.forward(x, w, b, len(shape), 1e-5)
    plain = file.backward(dy, None, None, x, w, b, m, r, len(shape), need)
    close(file.in_blocks(dy, x, w, b, m, r, len(shape), need, block=block), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_larger_than_a_block(dtype):
    """Through the public function, with strides that are not dense: the same as torch in float64, to the dtype's precision."""
    x, w, b = (torch.randn(s).to(dtype) for s in ((500, 3, 1001), (1001,), (1001,)))
    x = x.transpose(0, 1)[::2] + 2
    ours, theirs = (gradients(fn, x, w, b, (1001,)) for fn in (f.layer_norm, F.layer_norm))
    exact = gradients(F.layer_norm, x.double(), w.double(), b.double(), (1001,), dtype=dtype)
    for g, t, e in zip((ours[0], *ours[1]), (theirs[0], *theirs[1]), (exact[0], *exact[1])):
        assert g.dtype == dtype
        assert (g - e).norm() <= max(1.5 * (t - e).norm(), torch.finfo(dtype).eps * e.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_input_with_float32_parameters(dtype):
    """As torch's CPU kernel takes it: output in the input's dtype, gradients in each tensor's own; float32 ones to float32."""
    x, w, b = torch.randn(5, 7).to(dtype), torch.randn(7), torch.randn(7)
    (y, ours), (z, theirs) = (gradients(fn, x, w, b, (7,)) for fn in (f.layer_norm, F.layer_norm))
    assert y.dtype == dtype and [g.dtype for g in ours] == [g.dtype for g in theirs] == [dtype, torch.float32, torch.float32]
    close((y, ours[0]), (z, theirs[0]))
    exact = gradients(F.layer_norm, x.double(), w.double(), b.double(), (7,), dtype=dtype)[1]
    close([g.double() for g in ours[1:]], list(exact[1:]), rtol=1e-5, atol=1e-6)
    tangent = torch.func.jvp(lambda *t: f.layer_norm(t[0], (7,), t[1], t[2]), (x, w, b), (x, w, b))[1]
    assert tangent.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cpu_autocast_leaves_it_alone(dtype):
    x, w, b = torch.randn(5, 7).to(dtype), torch.randn(7), torch.randn(7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = (gradients(fn, x, w, b, (7,)) for fn in (f.layer_norm, F.layer_norm))
    assert ours[0].dtype == theirs[0].dtype == dtype
    assert [g.dtype for g in ours[1]] == [g.dtype for g in theirs[1]] == [dtype, torch.float32, torch.float32]
    close(ours[0], theirs[0])


def test_statistics_of_half_inputs_are_float32():
    """Rows whose mean is large beside their spread: half statistics would be off by a tenth of it."""
    x = (torch.randn(4, 64) + 30).half()
    _, m, r = file.forward(x, None, None, 1, 1e-5)
    assert m.dtype == r.dtype == torch.float32
    close(f.layer_norm(x, (64,)), F.layer_norm(x.double(), (64,)).half(), rtol=1e-3, atol=1e-3)


def test_third_order_where_torch_is_wrong():
    """Central differences of the second derivative: ours agrees, torch's own layer_norm drops the terms of mean and rstd."""
    c, x, v = torch.randn(3, 2, 4, dtype=torch.float64)

    def second(fn, x):
        x = x.requires_grad_() if x.is_leaf else x
        (g,) = torch.autograd.grad((fn(x, (4,)).sin() * c).sum(), x, create_graph=True)
        return torch.autograd.grad(g.sin().sum(), x, create_graph=True)[0]

    def along(fn):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad((second(fn, leaf) * v).sum(), leaf)[0]

    h = 1e-5
    basis = torch.eye(8, dtype=torch.float64).reshape(8, 2, 4) * h
    truth = torch.stack([((second(F.layer_norm, x + e) - second(F.layer_norm, x - e)) * v).sum() / (2 * h) for e in basis])
    close(along(f.layer_norm).flatten(), truth.detach(), rtol=1e-5, atol=1e-6)


def test_what_is_saved():
    """A frozen layer keeps nothing but x, w, m and r; the bias alone keeps not even x."""
    x, w, b = torch.randn(64, 32), torch.randn(32), torch.randn(32, requires_grad=True)

    def saved(x, w, b):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
            f.layer_norm(x, (32,), w, b)
        return sum(t.numel() for t in kept.values())

    assert saved(x, w, b) == 32
    assert saved(x.requires_grad_(), w, b.detach()) == 64 * 32 + 32 + 2 * 64


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 0.1}], ids=str)
def test_module(options):
    theirs = nn.LayerNorm((3, 4), dtype=torch.float64, **options)
    ours = bp.nn.LayerNorm((3, 4), dtype=torch.float64, **options)
    for p in theirs.parameters():
        nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict())
    assert repr(ours) == repr(theirs) and list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    for m in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        m.zero_grad()
        close(m(x), theirs(x))
        if options.get("elementwise_affine", True):
            theirs.zero_grad()
            (m(x).sin().sum() + theirs(x).sin().sum()).backward()
            close([p.grad for p in m.parameters()], [p.grad for p in theirs.parameters()])


X, W = torch.randn(3, 4), torch.randn(4)


@pytest.mark.parametrize(
    "error, message, call",
    [
        (ValueError, r"input has shape \(3, 4\); it needs \(\*, 3\)", lambda: f.layer_norm(X, (3,))),
        (ValueError, r"input has shape \(4,\); it needs \(\*, 3, 4\)", lambda: f.layer_norm(W, (3, 4))),
        (ValueError, r"normalized_shape is \(\)", lambda: f.layer_norm(X, ())),
        (TypeError, "normalized_shape must be a tuple or list of sizes, not 4", lambda: f.layer_norm(X, 4)),
        (ValueError, r"weight has shape \(3,\) but normalized_shape is \(4,\)", lambda: f.layer_norm(X, (4,), W[:3])),
        (ValueError, r"bias has shape \(1, 4\) but", lambda: f.layer_norm(X, (4,), W, W[None])),
        (TypeError, "input is torch.int64", lambda: f.layer_norm(X.long(), (4,))),
        (TypeError, "weight is torch.int64", lambda: f.layer_norm(X, (4,), W.long())),
        (TypeError, "weight is torch.float64 but input is torch.float32", lambda: f.layer_norm(X, (4,), W.double())),
        (TypeError, "weight is torch.float16 but input is torch.bfloat16", lambda: f.layer_norm(X.bfloat16(), (4,), W.half())),
        (TypeError, "bias is torch.float16 but weight is torch.float32", lambda: f.layer_norm(X.half(), (4,), W, W.half())),
        (ValueError, "weight is on meta but input is on cpu", lambda: f.layer_norm(X, (4,), W.to("meta"))),
        (ValueError, "backend='cuda' is not known", lambda: f.layer_norm(X, (4,), backend="cuda")),
        (TypeError, "input must be a tensor, not list", lambda: f.layer_norm([1.0], (1,))),
    ],
)
def test_errors(error, message, call):
    with pytest.raises(error, match=f"layer_norm: .*{message}"):
        call()
