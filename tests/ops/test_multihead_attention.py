"""MultiheadAttention: the module against torch's, over its options; masks that hide everything; errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import bptoolkit as bp

close = torch.testing.assert_close


def twins(**options):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(12, 3, dtype=torch.float64, **options)
    ours = bp.nn.MultiheadAttention(12, 3, dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict())
    assert repr(ours) == repr(theirs) and list(ours.state_dict()) == list(theirs.state_dict())
    return ours, theirs


def both(ours, theirs, args, **kwargs):
    """Outputs and gradients of inputs and parameters agree."""
    results = []
    for m in (ours, theirs):
        same = {}  # one leaf for a tensor that is passed twice
        xs = tuple(same.setdefault(id(a), a.detach().clone().requires_grad_()) for a in args)
        y, a = m(*xs, **kwargs)
        outs = [t for t in (y, a) if t is not None]
        cots = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).reshape(t.shape) for t in outs]
        inputs = [*same.values(), *m.parameters()]
        results.append((outs, torch.autograd.grad(outs, inputs, cots, allow_unused=True, materialize_grads=True)))
    close(*results)


OPTIONS = [
    {},
    {"bias": False},
    {"batch_first": True},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"kdim": 7, "vdim": 5},
    {"kdim": 7, "vdim": 5, "bias": False, "batch_first": True, "add_zero_attn": True, "add_bias_kv": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("train", [True, False])
def test_options(options, train):
    ours, theirs = twins(**options)
    ours.train(train), theirs.train(train)
    L, S, N = 5, 4, 2
    shape = (lambda n, e: (N, n, e)) if options.get("batch_first") else (lambda n, e: (n, N, e))
    torch.manual_seed(1)
    q = torch.randn(shape(L, 12), dtype=torch.float64)
    k = torch.randn(shape(S, options.get("kdim", 12)), dtype=torch.float64)
    v = torch.randn(shape(S, options.get("vdim", 12)), dtype=torch.float64)
    hide = torch.zeros(L, S, dtype=torch.bool)
    hide[:, 2] = True
    per_head = torch.randn(N * 3, L, S, dtype=torch.float64)
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[1, 3] = True
    for mask, pad, weights, average in itertools.product((None, hide, per_head), (None, padding), (True, False), (True, False)):
        if pad is not None and mask is not None and mask.dtype != torch.bool:
            pad = torch.zeros_like(pad, dtype=torch.float64).masked_fill(pad, -torch.inf)
        both(ours, theirs, (q, k, v), attn_mask=mask, key_padding_mask=pad, need_weights=weights, average_attn_weights=average)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("pattern", ["qqq", "qkk", "qkv"])
def test_one_tensor_for_several(batch_first, pattern):
    ours, theirs = twins(batch_first=batch_first)
    tensors = {c: torch.randn(4, 4, 12, dtype=torch.float64) for c in "qkv"}
    both(ours, theirs, tuple(tensors[c] for c in pattern), need_weights=False)


def test_unbatched_and_causal():
    ours, theirs = twins()
    x = torch.randn(5, 12, dtype=torch.float64)
    both(ours, theirs, (x, x, x))
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    both(ours, theirs, (x, x, x), attn_mask=causal, is_causal=True, need_weights=False)
    both(ours, theirs, (x, x, x), attn_mask=causal, is_causal=True, need_weights=True)


def test_as_torch_on_its_fast_path():
    ours, theirs = twins(batch_first=True)
    ours.eval(), theirs.eval()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    with torch.inference_mode():
        close(ours(x, x, x, need_weights=False)[0], theirs(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("weights", [True, False])
def test_a_query_that_sees_nothing_gives_the_output_bias(weights):
    ours, _ = twins()
    x = torch.randn(3, 1, 12, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(3, 3, dtype=torch.bool)
    mask[1] = True
    y, _ = ours(x, x, x, attn_mask=mask, need_weights=weights)
    close(y[1, 0], ours.out_proj.bias)
    grads = torch.autograd.grad(y, [x, *ours.parameters()], torch.randn_like(y))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("weights", [True, False])
def test_autocast(weights):
    """The dtypes and, to their precision, the values of torch's."""
    results = []
    for m in twins():
        m.float()
        x = torch.linspace(-1, 1, 5 * 2 * 12).reshape(5, 2, 12).requires_grad_()
        hidden = torch.zeros(5, 5).masked_fill(torch.eye(5, dtype=torch.bool), -torch.inf)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, a = m(x, x, x, attn_mask=hidden, need_weights=weights)
        (g,) = torch.autograd.grad(y.float().square().sum(), x)
        results.append((y, *(() if a is None else (a,)), g))
    close(*results, rtol=0.05, atol=0.05)


def test_static_keys_and_values():
    """Heads that are given in place of the projections."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((5, 2, 12), (4, 2, 12), (36, 12), (6, 4, 4), (6, 4, 4), (12, 12))
    q, k, w, sk, sv, wo = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in sizes)
    results = []
    for fn in (bp.functional.multi_head_attention_forward, nn.functional.multi_head_attention_forward):
        for weights in (True, False):
            args = (q, k, k, 12, 3, w, None, None, None, True, 0.0, wo, None)
            y, a = fn(*args, static_k=sk, static_v=sv, need_weights=weights)
            results.append((y, *(() if a is None else (a,)), *torch.autograd.grad(y.sin().sum(), (q, w, sk, sv, wo))))
    close(results[:2], results[2:])


def test_dropout_zeroes_weights_and_keeps_their_mean():
    ours, _ = twins(dropout=0.5)
    x = torch.randn(40, 2, 12, dtype=torch.float64)
    _, a = ours(x, x, x, average_attn_weights=False)
    assert 0.4 < (a == 0).double().mean() < 0.6
    _, kept = ours.eval()(x, x, x, average_attn_weights=False)
    close(torch.where(a == 0, 2 * kept, a), 2 * kept)


def test_swap_takes_it_as_a_whole():
    layer = nn.TransformerEncoderLayer(12, 3, 24, batch_first=True, dropout=0.0, dtype=torch.float64)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    want = layer(x)
    bp.swap(layer)
    assert type(layer.self_attn) is bp.nn.MultiheadAttention
    close(layer(x), want)


X = torch.randn(3, 2, 12)
M = bp.nn.MultiheadAttention(12, 3)


def functional(w, k=None, v=None, p=0.0, **kwargs):
    return bp.functional.multi_head_attention_forward(
        X, X, X, 12, 3, w, None, k, v, False, p, torch.zeros(12, 12), None, **kwargs
    )


W, B, S = torch.zeros(36, 12), torch.zeros(1, 1, 12), torch.zeros(6, 3, 4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: M(X[..., :6], X, X), ValueError, "6 features; embed_dim is 12"),
        (lambda: M(X, X, X[:2]), ValueError, r"\(3, 2, 12\) and value \(2, 2, 12\)"),
        (lambda: M(X, X[:, :1], X[:, :1]), ValueError, "batch of 2.*of 1"),
        (lambda: M(X, X[0], X[0]), ValueError, "3 dimensions"),
        (lambda: M(X, X, X, is_causal=True), ValueError, "attn_mask, which is None"),
        (lambda: M(X, X, X, attn_mask=torch.zeros(2, 3)), ValueError, r"\(2, 3\); it needs \(3, 3\)"),
        (lambda: M(X, X, X, attn_mask=torch.zeros(3, 3).int()), TypeError, "int32"),
        (lambda: M(X, X, X, key_padding_mask=torch.zeros(3, 2, dtype=torch.bool)), ValueError, r"needs \(2, 3\)"),
        (lambda: M(X.double(), X, X), TypeError, "float32 but query is torch.float64"),
        (lambda: M(X.long(), X, X), TypeError, "query is torch.int64"),
        (
            lambda: bp.functional.multi_head_attention_forward(X, X, X, 12, 5, *[None] * 4, False, 0.0, None, None),
            ValueError,
            "embed_dim=12 is not divisible by num_heads=5",
        ),
        (lambda: functional(None), ValueError, "in_proj_weight is None"),
        (lambda: functional(W[:30]), ValueError, r"\(30, 12\); it needs \(36, 12\)"),
        (lambda: functional(W, use_separate_proj_weight=True), ValueError, "needs q_proj_weight"),
        (lambda: functional(W, B), ValueError, "bias_v is None"),
        (lambda: functional(W, B, B, static_k=S), ValueError, "cannot be added to static_k"),
        (lambda: functional(W, p=1.5), ValueError, "dropout_p=1.5"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
