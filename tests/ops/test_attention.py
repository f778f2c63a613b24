"""What is special to attention: tiles, masks, dropout, orders of derivatives, memory, and what torch accepts and refuses."""

from __future__ import annotations

import functools
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from attending import DOUBLE, MASKS, close, dropped, gradients, keep_of, qkv, sdpa, with_mask
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.func import hessian, jacrev, vmap

from bptoolkit.ops.attention import RULE, reference
from bptoolkit.ops.attention_tiles import CAUSAL, EVERYWHERE


@pytest.mark.parametrize("kind", MASKS)
def test_tiles_equal_the_reference(small_tiles, kind):
    ours, mask = with_mask(sdpa, MASKS[kind]())
    theirs, _ = with_mask(reference, MASKS[kind]())
    xs = (*qkv(2, 3), *mask)
    close(gradients(ours, xs), gradients(theirs, xs))


@pytest.mark.parametrize("N", [1, 9])
@pytest.mark.parametrize("kind", ["none", "causal", "boolean", "dropout"])
def test_lengths_past_the_real_tiles(kind, N):
    """Forward and backward cut the scores in different tiles, except with dropout, whose mask goes with them."""
    xs = qkv(N, L=530, S=590, E=2, Ev=2)
    p = 0.3 if kind == "dropout" else 0.0
    kwargs = {"causal": {"is_causal": True}, "boolean": {"attn_mask": torch.rand(530, 590) > 0.4}}.get(kind, {})
    torch.manual_seed(3)
    theirs = dropped(keep_of(*xs[:2], p)) if p else functools.partial(reference, **kwargs)

    def both_orders(fn):
        torch.manual_seed(3)
        grads = torch.autograd.grad(fn(*xs).sin().sum(), xs, create_graph=True)
        return *grads, *torch.autograd.grad(sum(g.sin().sum() for g in grads), xs)

    close(both_orders(functools.partial(sdpa, dropout_p=p, **kwargs)), both_orders(theirs))


@pytest.mark.parametrize("kind", ["none", "causal", "every", "additive", "column"])
def test_every_order_with_cotangents_into_lse(small_tiles, kind):
    """The rule itself: lse is an output with a derivative of its own."""
    kwargs = MASKS[kind]()
    m, causal = kwargs.get("attn_mask"), kind == "causal"
    m = None if m is None else m[(None,) * (4 - m.dim())]
    mask = (m.requires_grad_(),) if m is not None and m.dtype == DOUBLE else ()

    def f(q, k, v, *mask):
        o, lse, _, _ = RULE(q, k, v, *(mask or (m,)), *(None,) * 5, CAUSAL if causal else EVERYWHERE, None, 0.0, 0.0)
        return o, lse.nan_to_num(neginf=0.0)  # of rows that see nothing

    xs = (*qkv(3, L=4, S=5, E=2, Ev=1), *mask) if m is None else (*qkv(2, 3), *mask)
    fast = {"fast_mode": m is not None}
    assert gradcheck(f, xs, check_forward_ad=True, check_batched_grad=m is None, check_batched_forward_grad=m is None, **fast)
    assert gradgradcheck(f, xs, check_fwd_over_rev=True, check_rev_over_rev=True, **fast)
    q, k, *_ = xs
    s = reference(q, k, torch.eye(k.shape[-2], dtype=DOUBLE).expand(*k.shape[:-1], -1), **kwargs)  # P itself
    lse = f(*xs)[1]
    scores = q @ k.mT * q.shape[-1] ** -0.5 + (m if mask else 0)
    visible = s > 0
    close((scores - lse.unsqueeze(-1)).exp()[visible], s[visible])


@pytest.mark.parametrize("kind", ["none", "additive"])
def test_hessians(small_tiles, kind):
    """Forward over reverse, reverse over reverse, reverse over forward, and batches of them."""
    ours, mask = with_mask(sdpa, MASKS[kind]())
    theirs, _ = with_mask(reference, MASKS[kind]())
    xs = tuple(t.detach() for t in (*qkv(2, 3, E=2, Ev=1), *mask))
    for k in (0, 1, 2, 3)[: len(xs)]:

        def at(fn, k=k):
            return lambda t: fn(*xs[:k], t, *xs[k + 1 :]).sin().square().sum()

        want = jacrev(jacrev(at(theirs)))(xs[k])
        close(hessian(at(ours))(xs[k]), want)
        close(jacrev(jacrev(at(ours)))(xs[k]), want)
    batch = torch.stack([xs[0], xs[0].cos()])
    got = vmap(hessian(lambda q: ours(q, *xs[1:]).sin().sum()))(batch)
    close(got, torch.stack([hessian(lambda q: theirs(q, *xs[1:]).sin().sum())(b) for b in batch]))


def test_forward_mode_outside_a_vmap_that_does_not_batch_the_inputs():
    """Where the constant output l is not batched either, and must have no tangent."""
    q, k, v = (t.detach() for t in qkv(2))
    factors = torch.randn(3, dtype=DOUBLE)

    def f(fn):
        return torch.func.jvp(lambda q: vmap(lambda y: fn(q, k, v).sin() * y)(factors), (q,), (q.cos(),))[1]

    close(f(sdpa), f(reference))


@pytest.mark.parametrize("which", range(4))
def test_only_one_input_needs_a_gradient(small_tiles, which):
    """What is computed and saved then is less; first and second order stay right."""
    m = MASKS["additive"]()["attn_mask"]
    xs = [t.detach() for t in (*qkv(2, 3), m)]
    xs[which].requires_grad_()
    others = qkv(2, 3, seed=9)

    def second(fn):
        out = fn(xs[0], xs[1], xs[2], xs[3])
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=DOUBLE).requires_grad_()
        (g,) = torch.autograd.grad(out, xs[which], dout, create_graph=True)
        weights = torch.randn(g.shape, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
        return g, *torch.autograd.grad((g.sin() * weights).sum(), (dout, xs[which]), allow_unused=True, materialize_grads=True)

    close(second(sdpa), second(reference))
    del others


def test_what_is_saved():
    """q, k, v, o and two numbers per row; without v's letters if only v needs a gradient; never P."""

    def saved(*need):
        q, k, v = (t.detach().requires_grad_(n) for t, n in zip(qkv(2, 3, L=40, S=50), need))
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
            out = sdpa(q, k, v)
        assert out.requires_grad
        return sum(kept.values())

    q, k, v = (t.numel() for t in qkv(2, 3, L=40, S=50))
    o, row = 2 * 3 * 40 * 3, 2 * 3 * 40
    assert saved(True, True, True) == q + k + v + o + 2 * row
    assert saved(False, False, True) == q + k + 2 * row


def test_rows_that_see_nothing():
    """0 with gradients 0, in every order, as in torch; both kinds of mask."""
    keep = torch.ones(5, 7, dtype=torch.bool)
    keep[1] = keep[4] = False
    for mask in (keep, torch.zeros(5, 7, dtype=DOUBLE).masked_fill(~keep, -math.inf).requires_grad_()):
        xs = qkv(2, 3)
        out = sdpa(*xs, mask)
        assert (out[..., 1, :] == 0).all() and (out[..., 4, :] == 0).all()
        close(gradients(lambda *t, m=mask: sdpa(*t, m), xs), gradients(lambda *t, m=mask: reference(*t, m), xs))
        first = torch.autograd.grad(out.sin().sum(), xs, create_graph=True)
        for g in torch.autograd.grad(sum(t.square().sum() for t in first), xs):
            assert g.isfinite().all()
        if mask.requires_grad:
            (dm,) = torch.autograd.grad(sdpa(*xs, mask).sin().sum(), mask)
            assert (dm[1] == 0).all() and dm.isfinite().all() and dm[0].abs().sum() > 0
        assert vmap(lambda q, x=xs, m=mask: sdpa(q, x[1][0], x[2][0], m))(xs[0])[..., 1, :].abs().sum() == 0


def test_a_row_masked_by_the_lowest_number():
    """The probabilities are uniform there, also in the backward, where lse alone has lost log l."""
    mask = torch.zeros(5, 7)
    mask[1] = torch.finfo(torch.float32).min
    xs = qkv(1, 2, dtype=torch.float32)
    ours, theirs = (gradients(lambda *t, f=fn: f(*t, mask), xs) for fn in (sdpa, reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (0, 0)])
@pytest.mark.parametrize("E, Ev", [(0, 2), (2, 0), (1, 1)])
@pytest.mark.parametrize("kind", ["none", "causal", "additive"])
def test_empty_sizes(shape, E, Ev, kind):
    L, S = shape
    xs = qkv(2, L=L, S=S, E=E, Ev=Ev)
    kwargs = {"none": {}, "causal": {"is_causal": True}, "additive": {"attn_mask": torch.ones(L, S, dtype=DOUBLE)}}[kind]
    ours, theirs = (gradients(lambda *t, f=fn: f(*t, **kwargs), xs) for fn in (sdpa, reference))
    close(ours[0], theirs[0])
    for a, b, x in zip(ours[1], theirs[1], xs):
        close(torch.zeros_like(x) if a is None else a, torch.zeros_like(x) if b is None else b)
    first = torch.autograd.grad(sdpa(*xs, **kwargs).sin().sum(), xs, create_graph=True)
    assert all(g.shape == x.shape for g, x in zip(first, xs))
    torch.autograd.grad(sum(g.square().sum() for g in first), xs, allow_unused=True)


def test_no_batch_at_all():
    xs = qkv(0, 2)
    assert sdpa(*xs).shape == (0, 2, 5, 3)
    torch.autograd.grad(sdpa(*xs).sum(), xs)
    close(gradients(sdpa, qkv()), gradients(reference, qkv()))


@pytest.mark.parametrize("shapes", [((2, 1), (1, 3), (3,)), ((), (2,), (2,)), ((4, 1), (4, 1), (4, 3))])
def test_batch_dimensions_are_broadcast(shapes):
    xs = tuple(qkv(*s)[k] for k, s in enumerate(shapes))
    close(gradients(sdpa, xs), gradients(reference, xs))


@pytest.mark.parametrize("mask", [None, (1, 5, 7), (6, 5, 7), (2, 1, 1, 7)])
def test_grouped_queries(small_tiles, mask):
    q, (k, v) = qkv(2, 6)[0], qkv(2, 3)[1:]
    m = () if mask is None else (torch.randn(mask, dtype=DOUBLE).requires_grad_(),)
    xs = (q, k, v, *m)
    ours = gradients(lambda *t: sdpa(*t, enable_gqa=True), xs)
    close(ours, gradients(lambda *t: reference(*t, enable_gqa=True), xs))
    one = (q, k, qkv(2, 2)[2])  # key and value need not have as many heads as each other
    close(gradients(lambda *t: sdpa(*t, enable_gqa=True), one), gradients(lambda *t: reference(*t, enable_gqa=True), one))


# Compilers, dtypes, memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "causal", "mask"])
def test_one_compilation_for_all_lengths(kind):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def f(q, k, v, m):
        return sdpa(q, k, v, m, is_causal=kind == "causal").sin()

    compiled = torch.compile(f, fullgraph=True, backend=counter, dynamic=True)
    for B, L, S in ((6, 5, 7), (9, 11, 8), (10, 130, 140)):  # no two alike: Dynamo takes equal sizes for the same size
        xs = qkv(B, 2, L=L, S=S, dtype=torch.float32)
        m = torch.rand(L, S) > 0.3 if kind == "mask" else None
        torch.testing.assert_close(gradients(lambda *t, m=m: compiled(*t, m), xs), gradients(lambda *t, m=m: f(*t, m), xs))
    assert counter.frame_count == 1


def test_the_graph_has_one_node_per_pass():
    graphs = []
    compiler = aot_autograd(fw_compiler=lambda g, _: graphs.append(g.code) or g)
    torch._dynamo.reset()
    xs = qkv(2, 3, L=600, S=600, dtype=torch.float32)
    torch.compile(sdpa, fullgraph=True, backend=compiler)(*xs).sum().backward()
    forward, backward = graphs
    assert forward.count("torch.ops.bptoolkit") == backward.count("torch.ops.bptoolkit") == 1
    assert "bmm" not in forward + backward and "exp" not in (forward + backward).replace("expand", "")


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float32, 2e-6)])
def test_dtypes(dtype, tolerance):
    """The scores are float32 for half inputs: the error is that of rounding inputs and outputs."""
    xs = qkv(2, 3, L=40, S=50, E=16, Ev=8, dtype=dtype)
    wide = tuple(t.detach().double().requires_grad_() for t in xs)
    got, want = gradients(sdpa, xs), gradients(reference, wide)
    for g, w in zip((got[0], *got[1]), (want[0], *want[1])):
        assert g.dtype == dtype
        assert (g.double() - w).abs().max() <= tolerance * w.abs().max().clamp_min(1)
    mask = torch.randn(50, dtype=torch.float32, requires_grad=True)  # torch takes float32 masks with half queries
    out = sdpa(*xs, mask)
    assert out.dtype == dtype and torch.autograd.grad(out.float().sin().sum(), mask)[0].dtype == torch.float32


def test_autocast_casts_the_mask_too():
    xs, mask = qkv(2, 3, dtype=torch.float32), torch.randn(5, 7, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = sdpa(*xs, mask), F.scaled_dot_product_attention(*xs, mask)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    assert torch.autograd.grad(ours.float().sum(), mask)[0].dtype == torch.float32


MEMORY = """
import torch, bptoolkit as bp
torch.set_num_threads(1)
def peak(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024
def now(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) / 1024
def hvp(L):
    q, k, v = (torch.randn(1, 2, L, 16, requires_grad=True) for _ in range(3))
    loss = bp.functional.scaled_dot_product_attention(q, k, v, {options}).square().sum()
    grads = torch.autograd.grad(loss, (q, k, v), create_graph=True)
    return torch.autograd.grad(grads, (q, k, v), [torch.randn_like(g) for g in grads])
def jvp(L):
    x = tuple(torch.randn(1, 2, L, 16) for _ in range(3))
    return torch.func.jvp(lambda *t: bp.functional.scaled_dot_product_attention(*t, {options}), x, x)[1]
def fwd_over_rev(L):
    x = tuple(torch.randn(1, 2, L, 16) for _ in range(3))
    f = torch.func.grad(lambda *t: bp.functional.scaled_dot_product_attention(*t, {options}).square().sum(), (0, 1, 2))
    return torch.func.jvp(f, x, x)[1]
sizes = {hvp: 4096, **({jvp: 4096, fwd_over_rev: 4096} if {all} else {})}
for f in sizes: f(64)
before = now()
for f, L in sizes.items():
    f(L)
    print(f.__name__, peak() - before)
"""


@pytest.mark.parametrize("options", ["", "is_causal=True", "dropout_p=0.1"])
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_the_second_order_is_linear(options):
    """A Hessian-vector product at L = 4096 adds less than 150 MB; with whole matrices it adds 1.5 GB."""
    code = MEMORY.replace("{options}", options).replace("{all}", str(not options))
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert out.returncode == 0, out.stderr
    added = dict(line.split() for line in out.stdout.splitlines())
    assert "hvp" in added and all(float(mb) < 150 for mb in added.values()), added


# Errors --------------------------------------------------------------------------------------------------------------------

t = torch.zeros
ERRORS = {
    "rank": (lambda: sdpa(t(5), t(4, 5), t(4, 5)), ValueError, r"query has shape \(5,\)"),
    "features": (lambda: sdpa(t(3, 5), t(4, 6), t(4, 6)), ValueError, r"E is 5 in query \(3, 5\) but 6 in key"),
    "keys": (lambda: sdpa(t(3, 5), t(4, 5), t(6, 5)), ValueError, r"S is 4 in key \(4, 5\) but 6 in value"),
    "batch": (lambda: sdpa(t(2, 3, 5), t(3, 4, 5), t(3, 4, 5)), ValueError, r"cannot be broadcast.*\(2, 3, 5\)"),
    "integers": (lambda: sdpa(t(3, 5).long(), t(4, 5), t(4, 5)), TypeError, "query is torch.int64"),
    "mixed": (lambda: sdpa(t(3, 5), t(4, 5).double(), t(4, 5)), TypeError, "key is torch.float64 but query is torch.float32"),
    "devices": (lambda: sdpa(t(3, 5), t(4, 5, device="meta"), t(4, 5)), ValueError, "key is on meta"),
    "heads": (
        lambda: sdpa(t(6, 3, 5), t(4, 4, 5), t(4, 4, 5), enable_gqa=True),
        ValueError,
        "6 heads of query are no multiple of the 4 of key",
    ),
    "no heads": (lambda: sdpa(t(3, 5), t(1, 4, 5), t(1, 4, 5), enable_gqa=True), ValueError, "heads in dimension -3"),
    "mask shape": (lambda: sdpa(t(3, 5), t(4, 5), t(4, 5), t(3, 3)), ValueError, r"attn_mask is \(3, 3\).*\(3, 4\)"),
    "mask rank": (lambda: sdpa(t(3, 5), t(4, 5), t(4, 5), t(2, 3, 4)), ValueError, r"attn_mask is \(2, 3, 4\)"),
    "mask dtype": (lambda: sdpa(t(3, 5), t(4, 5), t(4, 5), t(3, 4).long()), TypeError, "attn_mask is torch.int64"),
    "mask wide": (lambda: sdpa(t(3, 5), t(4, 5), t(4, 5), t(3, 4).double()), TypeError, "attn_mask is torch.float64"),
    "mask device": (lambda: sdpa(t(3, 5), t(4, 5), t(4, 5), t(3, 4, device="meta")), ValueError, "attn_mask is on meta"),
    "mask type": (lambda: sdpa(t(3, 5), t(4, 5), t(4, 5), [1]), TypeError, "attn_mask must be a tensor"),
    "mask and causal": (
        lambda: sdpa(t(3, 5), t(4, 5), t(4, 5), t(3, 4), is_causal=True),
        ValueError,
        "attn_mask and is_causal=True",
    ),
    "dropout": (lambda: sdpa(t(3, 5), t(4, 5), t(4, 5), dropout_p=1.5), ValueError, "dropout_p=1.5"),
    "negative dropout": (lambda: sdpa(t(3, 5), t(4, 5), t(4, 5), dropout_p=-0.1), ValueError, "dropout_p=-0.1"),
    "backend": (lambda: sdpa(t(3, 5), t(4, 5), t(4, 5), backend="cuda"), ValueError, "backend='cuda' is not known"),
    "no kernel": (lambda: sdpa(t(3, 5), t(4, 5), t(4, 5), backend="triton"), ValueError, "cannot run here"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message) as caught:
        call()
    assert str(caught.value).startswith("scaled_dot_product_attention: ")
