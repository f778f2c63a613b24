"""Attention differentiated twice through its public function: beside torch's own autograd, and in every mode."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from fused import double, near, normal
from fused_twice import by_reverse, leaves, loss_of, math_attention, ours, sdpa, tiles_of
from torch import Tensor, nn
from torch.autograd.functional import vhp
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bptoolkit as bp
from bptoolkit.ops import attention_plain as plain
from bptoolkit.triton_kernels import attention as first
from bptoolkit.triton_kernels import attention_double as file


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiles of 16 rows and columns; float32 in the form that half precision has, for the sake of exact comparisons."""
    tiles_of(monkeypatch, 16, 32)


@pytest.fixture
def ran(monkeypatch):
    """How often each of the kernels' launchers was called."""
    counts = Counter()

    def counted(name, f):
        return lambda *a: (counts.update([name]), f(*a))[1]

    for name, module in (("FORWARD", first), ("BACKWARD", first), ("DOUBLE", file)):
        monkeypatch.setattr(module, name, counted(name.lower(), getattr(module, name)))
    return counts


PRODUCTS = {
    "reverse over reverse": by_reverse,
    "torch.func": lambda attend, qkv, moves: vjp(grad(loss_of(attend), (0, 1, 2)), *qkv)[1](tuple(moves)),
    "vhp": lambda attend, qkv, moves: vhp(loss_of(attend), tuple(qkv), tuple(moves))[1],
    "forward over reverse": lambda attend, qkv, moves: jvp(grad(loss_of(attend), (0, 1, 2)), tuple(qkv), tuple(moves))[1],
}


@pytest.mark.parametrize("how", PRODUCTS)
def test_hessian_vector_products(device, ran, how):
    """Beside torch's autograd of the plain maths in float64; every pass is a kernel's, and the eager loops' none."""
    qkv = leaves(device)
    moves = [normal(*t.shape, device=device, seed=5 + n) for n, t in enumerate(qkv)]
    want = by_reverse(math_attention, double(qkv), double(moves))
    with pytest.MonkeyPatch.context() as patch:
        forbid(patch)
        got = PRODUCTS[how](ours, qkv, moves)
    for g, w in zip(got, want, strict=True):
        near(g, w, torch.float32, 60, how)
    assert ran["forward"] and ran["backward"] and ran["double"]


def forbid(patch):
    """The eager loops and whole matrices raise."""

    def no(*_):
        raise AssertionError("an eager rule ran")

    from bptoolkit.ops import attention_blocks

    for module in (plain, attention_blocks):
        for name in ("forward", "backward", "double_backward"):
            patch.setattr(module, name, no)


@pytest.mark.parametrize("dual", [False, True], ids=["torch.func", "dual numbers"])
def test_forward_mode(device, ran, dual):
    """Of o and lse, by one pass of the second order, in groups of heads."""
    qkv = leaves(device, heads=(2, 1))
    moves = [normal(*t.shape, device=device, seed=5 + n) for n, t in enumerate(qkv)]
    options = {"is_causal": True, "enable_gqa": True, "return_lse": True}
    want = jvp(lambda *t: sdpa(*t, **options, backend="eager"), tuple(double(qkv)), tuple(double(moves)))[1]
    with pytest.MonkeyPatch.context() as patch:
        forbid(patch)
        if dual:
            with forward_ad.dual_level():
                out = sdpa(*map(forward_ad.make_dual, qkv, moves), **options, backend="triton")
                got = [forward_ad.unpack_dual(t).tangent for t in out]
        else:
            got = jvp(lambda *t: sdpa(*t, **options, backend="triton"), tuple(qkv), tuple(moves))[1]
    for g, w in zip(got, want, strict=True):
        near(g, w, torch.float32, 60)
    assert ran["double"] == 1


class Block(nn.Module):
    """A transformer's, with attention by the given backend."""

    def __init__(self, E=8, H=2):
        super().__init__()
        self.H, self.qkv, self.out = H, nn.Linear(E, 3 * E), nn.Linear(E, E)
        self.mlp = nn.Sequential(nn.Linear(E, 2 * E), nn.GELU(), nn.Linear(2 * E, E))
        self.norms = nn.ModuleList(nn.LayerNorm(E) for _ in range(2))
        self.attend = None

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.H, -1)).transpose(1, 2) for t in self.qkv(self.norms[0](x)).chunk(3, -1))
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norms[1](x))


def test_a_gradient_penalty_through_a_transformer_block(device, ran):
    """The gradients of ‖∂loss/∂x‖² by all parameters, as of the plain maths."""
    torch.manual_seed(0)
    block, found = Block().to(device), []
    x = normal(1, 17, 8, device=device).requires_grad_()
    for attend in (ours, math_attention):
        block.attend = attend
        (dx,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), list(block.parameters())))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    assert ran == {"forward": 1, "backward": 2, "double": 1}
    block.attend = ours
    parameters = {n: p.detach() for n, p in block.named_parameters()}
    moves = {n: torch.ones_like(p) for n, p in parameters.items()}

    def penalty(p):
        return functional_call(block, p, (x.detach(),)).square().sum()

    first_order = jvp(penalty, (parameters,), (moves,))[1]
    torch.testing.assert_close(first_order, sum(g.sum() for g in grad(penalty)(parameters).values()), rtol=1e-5, atol=1e-5)


def three_orders(fn, inputs, backend, most=3):
    """The gradients of a value, theirs, and theirs, with the same draws for either backend."""
    torch.manual_seed(0)
    found, grads = [], [fn(*inputs, backend=backend)]
    for order in range(1, most + 1):
        grads = torch.autograd.grad(sum(g.sin().sum() for g in grads), inputs, create_graph=order < most)
        found += [g.detach() for g in grads]
    return found


def alike(found):
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_a_mask_that_needs_a_gradient(device, ran):
    """Whose second order the eager loops do; the third is done in whole matrices."""
    inputs = [t.requires_grad_() for t in (*leaves(device, L=6), normal(1, 1, 6, 6, device=device))]
    alike([three_orders(sdpa, inputs, backend) for backend in ("triton", "eager")])
    assert ran["backward"] and not ran["double"]


@pytest.mark.parametrize("options", [{"is_causal": True}, {"window": (5, 3), "softcap": 2.0}], ids=str)
def test_dropout(device, ran, options):
    """The same bits in every pass, and in the eager loops; in groups of heads."""
    inputs = [t.requires_grad_() for t in leaves(device, heads=(2, 1), L=18)]

    def dropped(*qkv, backend):
        return sdpa(*qkv, dropout_p=0.3, enable_gqa=True, **options, backend=backend)

    alike([three_orders(dropped, inputs, backend, 2) for backend in ("triton", "eager")])
    assert ran["double"]


def test_dropout_under_vmap(device):
    """Over cotangents, of a call outside of it: each sample has the mask of the call."""
    q, k, v = leaves(device, L=5)
    found = []
    for backend in ("triton", "eager"):
        torch.manual_seed(0)
        pull = vjp(lambda *t, b=backend: sdpa(*t, dropout_p=0.4, backend=b), q, k, v)[1]
        found.append(vmap(pull)(torch.stack([v, -2 * k])))
    alike(found)


PACKED = [{}, {"is_causal": True, "causal_align": "bottom_right"}, {"window": (9, 4), "softcap": 3.0, "dropout_p": 0.2}]


@pytest.mark.parametrize("options", PACKED, ids=str)
def test_packed_sequences(device, ran, options):
    """Of several lengths, one empty, rows before and after them; fewer keys than queries, and more; in groups of heads."""
    cu_q, cu_k = (torch.tensor(cu, device=device) for cu in ([1, 5, 5, 23, 25], [0, 3, 8, 24, 24]))
    inputs = [t.requires_grad_() for t in (normal(26, 2, 8, device=device), *(normal(25, 1, 8, device=device) for _ in "kv"))]

    def packed(*qkv, backend):
        return bp.functional.varlen_attention(*qkv, cu_q, cu_k, enable_gqa=True, **options, backend=backend)

    alike([three_orders(packed, inputs, backend, 2) for backend in ("triton", "eager")])
    assert ran["double"]


BATCHED = {
    "vmap of a product": lambda f, q, k, v: vmap(lambda d: jvp(grad(lambda x: f(x, k, v)), (q,), (d,))[1])(
        torch.stack([q, -k])
    ),
    "vmap of a vjp": lambda f, q, k, v: vmap(vjp(grad(f), q, k, v)[1])(torch.stack([q, -k]))[0],
    "hessian": lambda f, q, k, v: hessian(lambda x: f(x, k, v))(q),
    "jacobian": lambda f, q, k, v: jacrev(grad(lambda x: f(x, k, v)))(q),
    "reverse over forward": lambda f, q, k, v: grad(lambda x: jvp(lambda y: f(y, k, v), (x,), (k,))[1])(q),
}


@pytest.mark.parametrize("how", BATCHED)
def test_batched_and_mixed(device, how):
    """Transforms over the second order run what can run, and are right; with a mask, which the kernels do not take batched."""
    q, k, v = (t[:1, :1, :3, :2] for t in leaves(device))
    m = normal(1, 1, 3, 3, device=device)
    for options in ({"is_causal": True}, {"attn_mask": m}):
        losses = (lambda *t, given={**options, "backend": b}: sdpa(*t, **given).sin().sum() for b in ("auto", "eager"))
        got, want = (BATCHED[how](loss, q, k, v) for loss in losses)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_gradients_batched_by_autograd(device):
    q, k, v = (t[:, :, :4].requires_grad_() for t in leaves(device))
    found = []
    for backend in ("triton", "eager"):
        (dq,) = torch.autograd.grad(sdpa(q, k, v, backend=backend).sin().sum(), q, create_graph=True)
        cots = normal(2, *dq.shape, device=device)
        found.append(torch.autograd.grad(dq, (q, k, v), cots, is_grads_batched=True))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_compiled(device):
    """Transforms in a compiled function; the choice there is the eager rule's."""
    torch._dynamo.reset()
    qkv = [t[:, :, :4] for t in leaves(device)]

    def product(*qkv):
        return grad(lambda *t: grad(lambda *t: sdpa(*t, is_causal=True).sin().sum())(*t).cos().sum(), (0, 1, 2))(*qkv)

    for a, b in zip(torch.compile(product, fullgraph=True, backend="aot_eager")(*qkv), product(*qkv)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_memory_is_linear(device, monkeypatch):
    """Of all that the kernels allocate, and of all that torch's operations return, nothing is as large as a matrix L × S."""
    L, E, sizes = 128, 8, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))
            return out

    class Spy:
        def __getattr__(self, name):
            return getattr(torch, name)

        def empty(self, *shape, **kw):
            out = torch.empty(*shape, **kw)
            sizes.append(out.numel())
            return out.fill_(torch.nan)

    monkeypatch.setattr(first, "torch", Spy())
    monkeypatch.setattr(file, "torch", Spy())
    tiles_of(monkeypatch, 64, 64)
    qkv = [normal(1, 1, L, E, device=device, seed=s) for s in range(3)]
    with Watch():
        PRODUCTS["reverse over reverse"](ours, qkv, qkv)
        PRODUCTS["forward over reverse"](ours, qkv, qkv)
    assert len(sizes) > 50 and max(sizes) <= L * E < L * L / 8


def test_errors_beside_torchs(device):
    """Against float64: at most twice the error of torch's own math path in float16."""
    qkv = leaves(device, torch.float16)
    moves = [normal(*t.shape, dtype=torch.float16, device=device, seed=5 + n) for n, t in enumerate(qkv)]
    exact = by_reverse(math_attention, double(qkv), double(moves))
    theirs = by_reverse(math_attention, qkv, moves)
    for o, t, e in zip(by_reverse(ours, qkv, moves), theirs, exact):
        assert (o.double() - e).norm() <= 2 * (t.double() - e).norm()


def test_without_torchs_kernel(device):
    """Torch's fused attention cannot be differentiated twice in a fused form; ours agrees with its math path."""
    qkv = leaves(device)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        want = by_reverse(lambda *t: F.scaled_dot_product_attention(*t, is_causal=True), qkv, qkv)
    for a, b in zip(by_reverse(ours, qkv, qkv), want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
