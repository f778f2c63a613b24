"""What attention has beyond torch's: windows, caps, slopes, lengths, log-sum-exp; no L × S matrix, nowhere."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from attending import DOUBLE, Largest, close, gradients, orders, qkv, sdpa
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacrev, jvp, vmap

import bptoolkit as bp
from bptoolkit import randomness
from bptoolkit.ops import attention_plain, attention_rule
from bptoolkit.ops.attention import reference
from bptoolkit.ops.attention_tiles import Terms, Tiles

varlen = bp.functional.varlen_attention
SLOPES = torch.tensor([0.3, 0.7, 0.1], dtype=DOUBLE)
ADDITIVE = torch.randn(3, 1, 7, dtype=DOUBLE, generator=torch.Generator().manual_seed(3))


OPTIONS = {
    "window": {"window": (2, 1)},
    "one number": {"window": 0},
    "left": {"window": (2, -1)},
    "right": {"window": (-1, 1)},
    "causal window": {"window": (2, 5), "is_causal": True},
    "bottom right": {"causal_align": "bottom_right", "is_causal": True},
    "softcap": {"softcap": 1.3},
    "slopes": {"alibi_slopes": SLOPES},
    "slopes, bottom right": {"alibi_slopes": SLOPES, "causal_align": "bottom_right", "window": (1, -1)},
    "lengths": {"key_lengths": torch.tensor([5, 0])},
    "lengths past the end": {"key_lengths": torch.tensor([9, 2], dtype=torch.int32), "is_causal": True},
    "mask": {"attn_mask": ADDITIVE, "softcap": 1.3, "window": (2, 2), "key_lengths": torch.tensor([7, 3])},
    "all": {
        "window": (3, -1),
        "is_causal": True,
        "causal_align": "bottom_right",
        "softcap": 2.0,
        "alibi_slopes": SLOPES,
        "key_lengths": torch.tensor([4, 6]),
        "scale": 1.1,
    },
}


def with_tensors(fn, options):
    """The function of q, k, v and the options that are differentiable; and those."""
    names = [n for n in ("alibi_slopes", "attn_mask") if n in options]

    def call(q, k, v, *tensors):
        return fn(q, k, v, **{**options, **dict(zip(names, tensors))})

    return call, tuple(options[n].clone().requires_grad_() for n in names)


@pytest.mark.parametrize("L, lse", [(5, True), (9, False)])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_order_equals_whole_matrices(small_tiles, name, L, lse):
    options = OPTIONS[name] | ({"return_lse": True} if lse else {})
    ours, more = with_tensors(sdpa, options)
    theirs, _ = with_tensors(reference, options)
    xs = (*qkv(2, 3, L=L, S=7), *more)
    got, want = orders(ours, xs), orders(theirs, xs)
    close(got, want)
    alone = name == "one number" and not lse  # one key a row: its probability is 1, whatever q and k
    assert alone or all(t.abs().max() > 0 for t in got[: len(xs)])


@pytest.mark.parametrize("name", ["causal window", "softcap", "lengths past the end", "all"])
def test_past_the_real_tiles(name):
    options = dict(OPTIONS[name])
    options |= {"window": (70, 300)} if "window" in options else {}
    options |= {"key_lengths": torch.tensor([590, 301])} if "key_lengths" in options else {}
    ours, more = with_tensors(sdpa, options)
    theirs, _ = with_tensors(reference, options)
    xs = (*qkv(2, 3, L=530, S=590, E=2, Ev=2), *more)
    close(orders(ours, xs, 2), orders(theirs, xs, 2))


@pytest.mark.parametrize("gqa", [False, True])
def test_grouped_heads_have_slopes_and_lengths_of_their_own(small_tiles, gqa):
    q, (k, v) = qkv(2, 6)[0], qkv(2, 3 if gqa else 6)[1:]
    for slopes in (torch.rand(6, dtype=DOUBLE), torch.rand(2, 6, dtype=DOUBLE), torch.rand(1, dtype=DOUBLE)):
        options = {"alibi_slopes": slopes, "key_lengths": torch.tensor([3, 7]), "enable_gqa": gqa, "return_lse": True}
        ours, more = with_tensors(sdpa, options)
        theirs, _ = with_tensors(reference, options)
        close(orders(ours, (q, k, v, *more), 2), orders(theirs, (q, k, v, *more), 2))


@pytest.mark.parametrize("kind", ["forward", "twice"])
def test_numerically(small_tiles, kind):
    """Not against a formula: against differences. All options whose derivative is a formula of its own."""

    def f(q, k, v, h, m):
        return sdpa(q, k, v, m, window=(3, 2), softcap=0.9, alibi_slopes=h, return_lse=True)

    xs = (*qkv(2, L=4, S=4, E=2, Ev=2), torch.rand(2, dtype=DOUBLE).requires_grad_())
    xs += (torch.randn(4, 4, dtype=DOUBLE).requires_grad_(),)
    if kind == "forward":
        assert gradcheck(f, xs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    else:
        assert gradgradcheck(f, xs, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True)


def test_hessians_of_caps_and_slopes(small_tiles):
    xs = tuple(t.detach() for t in (*qkv(2, 3, E=2, Ev=1), SLOPES))

    def at(fn, k):
        options = {"softcap": 0.8, "window": (2, 3)}
        return lambda t: sum(
            o.sin().square().sum()
            for o in fn(*(t if i == k else x for i, x in enumerate(xs[:3])), **options, return_lse=True, alibi_slopes=t)
        )

    q = xs[3]
    for fn in (hessian, lambda f: jacrev(jacrev(f))):
        close(fn(at(sdpa, 9))(q), fn(at(reference, 9))(q))
        theirs = at(reference, 9)
        close(fn(at(sdpa, 9))(q), jacrev(jacrev(theirs))(q))


def test_under_vmap_and_forward_mode(small_tiles):
    """Over q, slopes, and lengths; jvp of vmap and vmap of jvp."""
    q, k, v = (t.detach() for t in qkv(4, 2, 3))
    slopes, lengths = torch.rand(4, 3, dtype=DOUBLE), torch.tensor([[5, 2], [0, 7], [7, 7], [1, 3]])

    def f(fn):
        def call(q, h, n):
            return fn(q, k[0], v[0], softcap=1.2, window=(2, 4), alibi_slopes=h, key_lengths=n)

        return call

    got = vmap(f(sdpa))(q, slopes, lengths)
    close(got, torch.stack([f(reference)(*x) for x in zip(q, slopes, lengths)]))
    got = vmap(grad(lambda *x: f(sdpa)(*x).sin().sum(), (0, 1)))(q, slopes, lengths)
    want = [grad(lambda *x: f(reference)(*x).sin().sum(), (0, 1))(*x) for x in zip(q, slopes, lengths)]
    close(got, tuple(map(torch.stack, zip(*want))))

    def push(fn, q, h, n):
        return jvp(lambda q, h: f(fn)(q, h, n), (q, h), (q.cos(), h.sin()))[1]

    want = torch.stack([push(reference, *x) for x in zip(q, slopes, lengths)])
    close(vmap(functools.partial(push, sdpa))(q, slopes, lengths), want)
    outer = jvp(lambda q, h: vmap(f(sdpa))(q, h, lengths), (q, slopes), (q.cos(), slopes.sin()))[1]
    close(outer, want)


# What the options mean -----------------------------------------------------------------------------------------------------


def test_windows_as_flash_attention_counts_them():
    seen = sdpa(torch.zeros(6, 1), torch.zeros(6, 1), torch.eye(6), window=(2, 1)) > 0
    i, j = torch.arange(6)[:, None], torch.arange(6)
    assert torch.equal(seen, (j >= i - 2) & (j <= i + 1))
    last = sdpa(torch.zeros(2, 1), torch.zeros(6, 1), torch.eye(6), is_causal=True, window=2, causal_align="bottom_right") > 0
    assert torch.equal(last, torch.tensor([[0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]]).bool())
    first = sdpa(torch.zeros(2, 1), torch.zeros(6, 1), torch.eye(6), is_causal=True, window=2) > 0
    assert torch.equal(first, torch.tensor([[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]]).bool())
    for wide in (-1, (-1, -1), (9, 9)):
        xs = qkv(2, 3)
        torch.testing.assert_close(sdpa(*xs, window=wide), sdpa(*xs))


def test_slopes_are_the_bias_of_alibi():
    """With the last query at the last key, as `alibi_bias` has it."""
    xs = qkv(2, 4)
    slopes = bp.functional.alibi_slopes(4, dtype=DOUBLE)
    bias = bp.functional.alibi_bias(4, 5, 7, dtype=DOUBLE)
    close(sdpa(*xs, alibi_slopes=slopes, causal_align="bottom_right"), sdpa(*xs, bias))


def test_a_large_cap_changes_nothing_and_a_small_one_bounds():
    xs = qkv(2, 3)
    torch.testing.assert_close(sdpa(*xs, softcap=1e6), sdpa(*xs), rtol=1e-6, atol=1e-7)
    shares = sdpa(*(100 * t for t in xs[:2]), torch.eye(7, dtype=DOUBLE), softcap=0.1)
    assert (shares.amax(-1) / shares.amin(-1) <= math.exp(0.2) * (1 + 1e-12)).all()


def test_parts_of_the_keys_are_merged_by_their_lse(small_tiles):
    """exp(lse − total) weighs the parts: as in ring attention or decoding by pieces; to the second order."""

    def merged(q, k, v):
        (o1, l1), (o2, l2) = (sdpa(q, k[..., J, :], v[..., J, :], return_lse=True) for J in (slice(0, 3), slice(3, None)))
        w = torch.sigmoid(l1 - l2).unsqueeze(-1)
        return w * o1 + (1 - w) * o2, torch.logaddexp(l1, l2)

    xs = qkv(2, 3)
    close(orders(merged, xs), orders(functools.partial(reference, return_lse=True), xs))


def test_rows_that_see_nothing(small_tiles):
    """0, with lse −inf and gradients 0, also of the second order."""
    xs = qkv(2, 3, L=9, S=4)
    options = {"is_causal": True, "causal_align": "bottom_right", "softcap": 2.0, "key_lengths": torch.tensor([3, 0])}
    out, lse = sdpa(*xs, **options, return_lse=True)
    assert (out[:, :, :5] == 0).all() and (out[1] == 0).all() and (out[0, :, 5:] != 0).all()
    assert torch.equal(lse.isneginf(), (out == 0).all(-1)) and not lse.isnan().any()
    first = torch.autograd.grad(out.sin().sum() + lse[0, :, 5:].sum(), xs, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), xs)
    for g in (*first, *second):
        assert g.isfinite().all() and (g[1] == 0).all()
    assert (first[0][0, :, :5] == 0).all() and (first[1][0, :, 3] == 0).all() and (second[0][0, :, 6:] != 0).any()


@pytest.mark.parametrize("S", [0, 1])
@pytest.mark.parametrize("L", [0, 1])
@pytest.mark.parametrize("E, Ev", [(0, 2), (2, 0), (1, 1)])
def test_empty_sizes(L, S, E, Ev):
    options = {"softcap": 2.0, "window": (1, 0), "key_lengths": torch.tensor([1, 0]), "return_lse": True}
    ours, more = with_tensors(sdpa, {**options, "alibi_slopes": SLOPES})
    theirs, _ = with_tensors(reference, {**options, "alibi_slopes": SLOPES})
    xs = (*qkv(2, 3, L=L, S=S, E=E, Ev=Ev), *more)
    close(orders(ours, xs, 2), orders(theirs, xs, 2))


@pytest.mark.parametrize("name", ["softcap", "causal window", "all"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 4e-3), (torch.float32, 4e-6)])
def test_dtypes(name, dtype, tolerance):
    """The scores and lse are float32 for half inputs; the slopes stay as they are."""
    options = {n: o.float() if n == "alibi_slopes" else o for n, o in OPTIONS[name].items()}
    ours, more = with_tensors(sdpa, options)
    theirs, _ = with_tensors(reference, options)
    xs = (*qkv(2, 3, L=40, S=50, E=16, Ev=8, dtype=dtype), *more)
    wide = tuple(t.detach().double().requires_grad_() for t in xs)
    got, want = gradients(ours, xs), gradients(theirs, wide)
    for g, w, x in zip((got[0], *got[1]), (want[0], *want[1]), (xs[0], *xs)):
        assert g.dtype == x.dtype
        assert (g.double() - w).abs().max() <= tolerance * w.abs().max().clamp_min(1)
    assert sdpa(*xs[:3], return_lse=True)[1].dtype == torch.float32


# No L × S matrix -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_no_tensor_of_L_by_S_is_made(packed):
    """In none of the three loops: the operator is a black box to a mode, so they are called as it calls them."""
    L, E = 3000, 8
    q, k, v, do = (torch.randn(1, L, E) for _ in range(4))
    slopes, dlse = torch.rand(1), torch.randn(1, L)
    lengths = None if packed else torch.tensor([2900])
    cu = torch.tensor([0, 2700, L]) if packed else None
    tail = (None, slopes, lengths, None, cu, cu)
    options = ((700, 20, 1), None, 5.0, 0.0)
    with Largest() as mode, torch.no_grad():
        o, _, top, l = attention_rule._forward_fast(q, k, v, *tail, *options)
        first = attention_rule._backward_fast(do, dlse, q, k, v, *tail, o, top, l, *options, "qkvs")
        cotangents = first[0], first[1], first[2], None, first[4]
        args = do, dlse, q, k, v, *tail, o, top, l, *options, "qkvs"
        second = attention_rule.double_fast(*cotangents, "olqkvs", args)
    assert all(t.isfinite().all() for t in second if t is not None)
    assert 0 < mode.most <= 1 << 18 < L * L // 30, mode.most


def test_hidden_tiles_are_skipped():
    """The tiles' area grows with the window and the lengths, and not with L × S."""
    q = torch.empty(2, 4096, 4)

    def area(**terms):
        return sum(math.prod(tile.shape) for tile in Tiles(q, q, Terms(**terms)))

    whole = 2 * 4096 * 4096
    assert area() == whole
    assert area(window=(-1, 0, 0)) < 0.57 * whole
    assert area(window=(100, 0, 0)) < 0.2 * whole
    assert area(window=(100, 100, 1)) < 0.25 * whole
    assert area(window=(100, 0, 0), lengths=torch.tensor([512, 512])) < 0.03 * whole
    assert area(lengths=torch.tensor([1000, 1000])) <= 1024 / 4096 * whole


def test_what_is_saved():
    q, k, v = qkv(2, 3, L=40, S=50)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
        out = sdpa(q, k, v, window=(3, 3), softcap=2.0, key_lengths=torch.tensor([4, 5]), alibi_slopes=SLOPES)
    assert sum(kept.values()) == q.numel() + k.numel() + v.numel() + out.numel() + 2 * 2 * 3 * 40 + 2 + 3


# Dropout -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_dropout_goes_with_the_options(small_tiles, packed):
    """The same elements are dropped in every order; tiles that are skipped move nothing."""
    options = {"window": (2, 2), "softcap": 1.5, "return_lse": True}
    cu = torch.tensor([0, 2, 6]) if packed else None
    q, k, v = qkv(3, L=6, S=6)

    def ours(q, k, v):
        torch.manual_seed(4)
        if not packed:
            return sdpa(q, k, v, dropout_p=0.4, **options)
        o, lse = varlen(q.mT.mT.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), cu, dropout_p=0.4, **options)
        return o.transpose(0, 1), lse.mT

    torch.manual_seed(4)
    seed = randomness.draw_seed(q)
    z = attention_plain.KEEP(q.detach(), k.detach(), seed, cu, cu, 0.4)

    def theirs(q, k, v):
        s = 1.5 * torch.tanh(q @ k.mT * 0.5 / 1.5)
        i, j = torch.arange(6)[:, None], torch.arange(6)
        hidden = (i - j).abs() > 2
        hidden = hidden | ((i < 2) != (j < 2)) if packed else hidden
        s = s.masked_fill(hidden, -math.inf)
        return (s.softmax(-1) * z) @ v, s.logsumexp(-1)

    assert (z == 0).any() and (z > 1).any()
    close(orders(ours, (q, k, v)), orders(theirs, (q, k, v)))


# Compilers -----------------------------------------------------------------------------------------------------------------


def test_one_compilation_for_all_lengths():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def f(q, k, v, h, n):
        return sdpa(q, k, v, is_causal=True, window=(4, 0), softcap=3.0, alibi_slopes=h, key_lengths=n, return_lse=True)

    compiled = torch.compile(f, fullgraph=True, backend=counter, dynamic=True)
    for B, L, S in ((6, 5, 7), (9, 11, 14), (10, 130, 140)):
        xs = (*qkv(B, 2, L=L, S=S, dtype=torch.float32), torch.rand(2, requires_grad=True))
        n = torch.randint(1, S, (B,))
        got, want = (torch.autograd.grad(fn(*xs, n)[0].sin().sum(), xs) for fn in (compiled, f))
        torch.testing.assert_close(got, want)
    assert counter.frame_count == 1


# Errors --------------------------------------------------------------------------------------------------------------------

t = torch.zeros
cu = torch.tensor
Q, HEADS = (t(3, 5), t(4, 5), t(4, 5)), (t(2, 6, 3, 5), t(2, 6, 4, 5), t(2, 6, 4, 5))
ERRORS = {
    "window type": (lambda: sdpa(*Q, window=1.5), TypeError, "window=1.5"),
    "window of three": (lambda: sdpa(*Q, window=(1, 2, 3)), TypeError, r"window=\(1, 2, 3\)"),
    "window below": (lambda: sdpa(*Q, window=(-2, 1)), ValueError, r"window=\(-2, 1\)"),
    "align": (lambda: sdpa(*Q, causal_align="left"), ValueError, "causal_align='left'"),
    "cap of 0": (lambda: sdpa(*Q, softcap=0.0), ValueError, "softcap=0.0 must be positive"),
    "negative cap": (lambda: sdpa(*Q, softcap=-1.0), ValueError, "softcap=-1.0"),
    "infinite cap": (lambda: sdpa(*Q, softcap=math.inf), ValueError, "softcap=inf"),
    "slopes number": (lambda: sdpa(*HEADS, alibi_slopes=0.5), TypeError, "alibi_slopes is float"),
    "slopes dtype": (lambda: sdpa(*HEADS, alibi_slopes=t(6).double()), TypeError, "alibi_slopes is torch.float64"),
    "slopes shape": (lambda: sdpa(*HEADS, alibi_slopes=t(5)), ValueError, r"alibi_slopes is \(5,\).*\(2, 6\)"),
    "slopes without heads": (lambda: sdpa(*Q, alibi_slopes=t(5)), ValueError, r"alibi_slopes is \(5,\).*\(\)"),
    "slopes device": (lambda: sdpa(*HEADS, alibi_slopes=t(6, device="meta")), ValueError, "alibi_slopes is on meta"),
    "lengths dtype": (lambda: sdpa(*HEADS, key_lengths=t(2)), TypeError, "key_lengths is torch.float32"),
    "lengths list": (lambda: sdpa(*HEADS, key_lengths=[1, 2]), TypeError, "key_lengths is list"),
    "lengths shape": (lambda: sdpa(*HEADS, key_lengths=cu([1, 2, 3])), ValueError, r"key_lengths is \(3,\).*\(2, 6, 3, 5\)"),
    "lengths without rows": (lambda: sdpa(*Q, key_lengths=cu([1, 2, 3])), ValueError, r"key_lengths is \(3,\)"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message) as caught:
        call()
    assert str(caught.value).startswith("scaled_dot_product_attention: ")
