"""Attention of packed and of nested sequences: equal to one call per sequence, in every order and transform."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from attending import DOUBLE, close, gradients, orders, qkv, sdpa
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, hessian, jvp, vmap

import bptoolkit as bp
from bptoolkit.ops.attention import reference
from bptoolkit.ops.attention_varlen import reference as one_by_one

varlen = bp.functional.varlen_attention


def pack(lengths_q, lengths_k, H=4, Hk=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0) for n in (lengths_q, lengths_k))
    shapes = ((sum(lengths_q), H, 4), (sum(lengths_k), Hk, 4), (sum(lengths_k), Hk, 3))
    return tuple(torch.randn(s, generator=generator, dtype=DOUBLE).requires_grad_() for s in shapes), cu_q, cu_k


PACKED = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window": (1, 2), "causal_align": "bottom_right"},
    "all": {
        "is_causal": True,
        "window": (2, -1),
        "causal_align": "bottom_right",
        "softcap": 1.2,
        "alibi_slopes": torch.tensor([0.2, 0.4, 0.1, 0.9], dtype=DOUBLE),
        "return_lse": True,
    },
}


@pytest.mark.parametrize("Hk", [4, 2])
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences_equal_one_by_one(small_tiles, name, same, Hk):
    lengths = [4, 0, 5, 1]
    xs, cu_q, cu_k = pack(lengths, lengths if same else [6, 2, 0, 3], Hk=Hk)
    options = PACKED[name] | {"enable_gqa": Hk == 2}
    names = ["alibi_slopes"] if "alibi_slopes" in options else []
    more = tuple(options[n].clone().requires_grad_() for n in names)

    def call(fn):
        return lambda q, k, v, *t: fn(q, k, v, cu_q, None if same else cu_k, **{**options, **dict(zip(names, t))})

    close(orders(call(varlen), (*xs, *more)), orders(call(one_by_one), (*xs, *more)))


def test_rows_outside_every_sequence(small_tiles):
    """0 with gradients 0, in the loops and in the plain form: as if they were cut off."""
    (q, k, v), *_ = pack([9], [9])
    cu = torch.tensor([2, 5, 7])

    def cut(q, k, v):
        o = varlen(q[2:7], k[2:7], v[2:7], cu - 2, is_causal=True)
        return torch.cat((o.new_zeros(2, 4, 3), o, o.new_zeros(2, 4, 3)))

    got = orders(lambda *t: varlen(*t, cu, is_causal=True), (q, k, v))
    close(got, orders(cut, (q, k, v)))
    assert (got[1][:2] == 0).all() and (got[2][7:] == 0).all() and (got[1][3:7] != 0).any()


def test_packed_sequences_under_transforms(small_tiles):
    (q, k, v), cu, _ = pack([4, 0, 5], [4, 0, 5])
    q, k, v = (t.detach() for t in (q, k, v))
    batch = torch.stack([q, q.cos(), q.sin()])

    def f(fn):
        return lambda q: fn(q, k, v, cu, is_causal=True, softcap=1.5)

    close(vmap(f(varlen))(batch), torch.stack([f(one_by_one)(q) for q in batch]))
    got = vmap(grad(lambda q: f(varlen)(q).sin().sum()))(batch)
    close(got, torch.stack([grad(lambda q: f(one_by_one)(q).sin().sum())(q) for q in batch]))
    close(jvp(f(varlen), (q,), (q.cos(),))[1], jvp(f(one_by_one), (q,), (q.cos(),))[1])
    small = (q[:4, :1], k[:4, :1], v[:4, :1])

    def loss(fn):
        return lambda q: fn(q, *small[1:], torch.tensor([0, 3, 4]), softcap=1.5).sin().sum()

    close(hessian(loss(varlen))(small[0]), hessian(loss(one_by_one))(small[0]))
    with pytest.raises(NotImplementedError, match="vmap over cu_seqlens that differ"):
        vmap(lambda c: varlen(q, k, v, c))(torch.tensor([[0, 4, 9], [0, 5, 9]]))


def nested(lengths, H=2, E=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(n, H, E, generator=generator, dtype=DOUBLE) for n in lengths]
    return torch.nested.nested_tensor(parts, layout=torch.jagged).requires_grad_()


def test_nested_tensors():
    """(B, H, L*, E), as of torch's own modules: equal to one call per sequence, to the second order."""
    q, k = nested([3, 5, 2], H=4), nested([4, 1, 6], seed=1)
    v = torch.nested.nested_tensor_from_jagged(nested([4, 1, 6], E=3, seed=2).values().detach(), k.offsets()).requires_grad_()

    def ours(q, k, v):
        o, lse = sdpa(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, softcap=2.0, enable_gqa=True, return_lse=True)
        assert o.shape[:2] == (3, 4) and o.layout is torch.jagged and lse.shape == o.shape[:3]
        return o.transpose(1, 2).values(), lse.transpose(1, 2).values()

    def theirs(*xs):
        parts = (
            reference(*(t.transpose(0, 1) for t in x), is_causal=True, softcap=2.0, enable_gqa=True, return_lse=True)
            for x in zip(*xs)
        )
        return tuple(torch.cat([t.transpose(0, 1) for t in ts]) for ts in zip(*parts))

    apart = [[p.detach().requires_grad_() for p in t.unbind()] for t in (q, k, v)]
    got, want = ours(q, k, v), theirs(*apart)
    close(got, want)
    first = torch.autograd.grad(sum(o.sin().sum() for o in got), (q, k, v), create_graph=True)
    leaves = list(itertools.chain(*apart))
    wanted = torch.autograd.grad(sum(o.sin().sum() for o in want), leaves, create_graph=True)
    close([p for t in first for p in t.detach().unbind()], list(wanted))
    second = torch.autograd.grad(sum(g.values().sin().sum() for g in first), (q, k, v))
    wanted = torch.autograd.grad(sum(g.sin().sum() for g in wanted), leaves)
    close([p for t in second for p in t.unbind()], list(wanted))
    x = q.transpose(1, 2)
    assert (sdpa(x, x, x) + x).shape == x.shape  # of the same lengths, by the same offsets


def test_packed_sequences_compile_once():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(functools.partial(varlen, is_causal=True), fullgraph=True, backend=counter, dynamic=True)
    for cuts in ([0, 4, 4, 6, 6, 9], [0, 20, 33], [0, 6, 7, 8, 31]):
        xs = tuple(t.transpose(0, 1).detach().requires_grad_() for t in qkv(2, L=cuts[-1], S=cuts[-1], dtype=torch.float32))
        cu = torch.tensor(cuts)
        got, want = (
            gradients(lambda *t, fn=fn, cu=cu: fn(*t, cu), xs) for fn in (compiled, functools.partial(varlen, is_causal=True))
        )
        torch.testing.assert_close(got, want)
    assert counter.frame_count == 1


# Errors --------------------------------------------------------------------------------------------------------------------

t = torch.zeros
cu = torch.tensor
HEADS = (t(2, 6, 3, 5), t(2, 6, 4, 5), t(2, 6, 4, 5))
P = (t(4, 2, 3),) * 3
ERRORS = {
    "rank": (lambda: varlen(t(4, 2), *P[1:], cu([0, 4])), ValueError, r"query has shape \(4, 2\)"),
    "heads": (lambda: varlen(t(4, 6, 3), *P[1:], cu([0, 4])), ValueError, "query has 6 heads, key 2 and value 2"),
    "groups": (
        lambda: varlen(t(4, 5, 3), *P[1:], cu([0, 4]), enable_gqa=True),
        ValueError,
        "query has 5 heads, key 2 and value 2; query's must be a multiple",
    ),
    "cu type": (lambda: varlen(*P, [0, 4]), TypeError, "cu_seqlens_q is list"),
    "cu dtype": (lambda: varlen(*P, cu([0.0, 4.0])), TypeError, "cu_seqlens_q is torch.float32"),
    "cu shape": (lambda: varlen(*P, cu([[0, 4]])), ValueError, r"cu_seqlens_q has shape \(1, 2\)"),
    "cu numbers": (lambda: varlen(*P, cu([0, 4]), cu([0, 1, 4])), ValueError, "1 sequences and cu_seqlens_k of 2"),
    "cu falls": (lambda: varlen(*P, cu([0, 3, 2])), ValueError, "sequence 1 is rows 3 to 2"),
    "cu past the end": (lambda: varlen(*P, cu([0, 5])), ValueError, "rows 0 to 5 of query.*which have 4 and 4"),
    "dropout": (lambda: varlen(*P, cu([0, 4]), dropout_p=2), ValueError, "dropout_p=2"),
    "window": (lambda: varlen(*P, cu([0, 4]), window=(-3, 0)), ValueError, r"window=\(-3, 0\)"),
}
NESTED = {
    "one nested": (lambda: sdpa(nested([2, 3]).transpose(1, 2), *HEADS[1:]), TypeError, "key is torch.strided"),
    "nested rank": (lambda: sdpa(*(nested([2, 3]),) * 3), ValueError, "query is nested, of 4 dimensions"),
    "nested mask": (
        lambda: sdpa(*(nested([2]).transpose(1, 2),) * 3, t(2, 2)),
        ValueError,
        "attn_mask cannot be given with nested",
    ),
    "nested lengths": (
        lambda: sdpa(*(nested([2]).transpose(1, 2),) * 3, key_lengths=cu([2])),
        ValueError,
        "key_lengths cannot be given with nested",
    ),
}


@pytest.mark.parametrize("name", [*ERRORS, *NESTED])
def test_errors(name):
    call, kind, message = (ERRORS | NESTED)[name]
    with pytest.raises(kind, match=message) as caught:
        call()
    assert str(caught.value).startswith("varlen_attention: " if name in ERRORS else "scaled_dot_product_attention: ")
