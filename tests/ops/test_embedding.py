"""What is special to embeddings: padding, max_norm, sparse gradients, frequencies, what is kept; bags and their edges."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bptoolkit as bp

f = bp.functional
NAN = float("nan")


def both(ours, theirs, w, dy_of=torch.randn_like, **kw):
    """Outputs and gradients of w (and of per_sample_weights) of both."""
    found = []
    for fn in (ours, theirs):
        torch.manual_seed(0)
        leaf = w.clone().requires_grad_()
        s = kw.get("per_sample_weights")
        extra = {} if s is None else {"per_sample_weights": s.clone().requires_grad_()}
        y = fn(weight=leaf, **{**kw, **extra})
        found.append((y.detach(), *torch.autograd.grad(y, [leaf, *extra.values()], dy_of(y))))
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("padding", [None, 0, -1, 3])
@pytest.mark.parametrize("by_freq", [False, True])
def test_embedding_is_torchs(dtype, kind, padding, by_freq):
    i = torch.randint(0, 6, (4, 7), dtype=kind)
    kw = {"input": i, "padding_idx": padding, "scale_grad_by_freq": by_freq}
    torch.testing.assert_close(*both(f.embedding, F.embedding, torch.randn(6, 5, dtype=dtype), **kw))


def test_half_is_summed_in_float32():
    """1 + 2⁻⁹ + 2⁻⁹ …: in bfloat16 one by one they would all be lost."""
    dy = torch.full((257, 1), 2.0**-9, dtype=torch.bfloat16)
    dy[0] = 1
    w = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    (dw,) = torch.autograd.grad(f.embedding(torch.zeros(257, dtype=torch.int64), w), w, dy)
    assert dw.tolist() == [[1.5], [0.0]]


def test_padding_lets_nothing_through():
    """A cotangent of NaN at a padding index does not reach the table, under create_graph or not."""
    i, w = torch.tensor([0, 1, 0]), torch.randn(2, 3, requires_grad=True)
    dy = torch.ones(3, 3)
    dy[0] = NAN
    for graph in (False, True):
        (dw,) = torch.autograd.grad(f.embedding(i, w, 0), w, dy, create_graph=graph)
        assert dw.tolist() == [[0.0] * 3, [1.0] * 3]
        (dw,) = torch.autograd.grad(f.embedding_bag(i[None].mT, w, padding_idx=0, mode="sum"), w, dy, create_graph=graph)
        assert dw.tolist() == [[0.0] * 3, [1.0] * 3]


@pytest.mark.parametrize("norm_type", [2.0, 1.0])
def test_max_norm_rescales_in_place(norm_type):
    i = torch.tensor([[1, 3], [1, 0]])
    w = torch.randn(5, 4) * 3
    a, b = w.clone().requires_grad_(), w.clone().requires_grad_()
    for fn, fn2, table in ((f.embedding, f.embedding_bag, a), (F.embedding, F.embedding_bag, b)):
        y = fn(i, table, None, 1.0, norm_type)
        y.square().sum().backward()
        fn2(torch.tensor([[2, 4]]), table, None, 0.5, norm_type)
    torch.testing.assert_close((a.detach(), a.grad), (b.detach(), b.grad))
    assert (a.norm(norm_type, 1) <= 1 + 1e-6).all()


@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("bag", [False, True])
def test_sparse_gradients(padding, bag):
    """As torch's, entry by entry; SparseAdam takes them; a second derivative is refused; transforms get dense ones."""
    i = torch.tensor([[2, 0, 2], [1, 1, 4]])
    w = torch.randn(5, 3, requires_grad=True)
    ours, theirs = (f.embedding_bag, F.embedding_bag) if bag else (f.embedding, F.embedding)
    kw = {"sparse": True, "padding_idx": padding} | ({"mode": "mean"} if bag else {})
    got, want = (torch.autograd.grad(fn(i, w, **kw).sin().sum(), w)[0] for fn in (ours, theirs))
    assert got.is_sparse and got._nnz() == want._nnz()
    torch.testing.assert_close(got.to_dense(), want.to_dense())
    w.grad = got
    torch.optim.SparseAdam([w]).step()
    with pytest.raises(NotImplementedError, match="sparse=True has gradients of first order only"):
        torch.autograd.grad(ours(i, w, **kw).sin().sum(), w, create_graph=True)
    dense = torch.func.grad(lambda w: ours(i, w, **kw).sin().sum())(w.detach())
    assert not dense.is_sparse
    torch.testing.assert_close(dense, torch.autograd.grad(theirs(i, w, **{**kw, "sparse": False}).sin().sum(), w)[0])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_sorted_sum_is_the_plain_one(weighted, dtype):
    """The CPU's way of adding rows up, against the traced one under create_graph."""
    i, w = torch.randint(0, 50, (8, 40)), torch.randn(60, 7).to(dtype).requires_grad_()
    s = torch.randn(8, 40).to(dtype) if weighted else None
    for y in (f.embedding(i, w, 3, scale_grad_by_freq=True), f.embedding_bag(i, w, mode="sum", per_sample_weights=s)):
        dy = torch.randn_like(y)
        torch.testing.assert_close(
            *(torch.autograd.grad(y, w, dy, retain_graph=True, create_graph=g)[0] for g in (False, True))
        )


def test_the_table_is_not_kept():
    w = torch.randn(5, 3, requires_grad=True) * 1.0
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        f.embedding(torch.tensor([1, 2]), w)
        f.embedding_bag(torch.tensor([[1, 2]]), w)
    assert not any(t.is_floating_point() for t in kept)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 0, -1])
@pytest.mark.parametrize("last", [False, True])
def test_bags_are_torchs(mode, padding, last):
    """Empty bags first, between and last; a bag of padding alone; ties of the maximum; a bag that repeats an index."""
    i = torch.tensor([0, 0, 3, 3, 1, 2, 4, 4, 0, 1])
    offsets = torch.tensor([0, 0, 2, 2, 5, 8, *[10] * (1 + last)])
    w = torch.randn(5, 4, dtype=torch.float64).round()  # ties
    kw = {"mode": mode, "padding_idx": padding}
    torch.testing.assert_close(
        *both(f.embedding_bag, F.embedding_bag, w, input=i, offsets=offsets, include_last_offset=last, **kw)
    )
    torch.testing.assert_close(*both(f.embedding_bag, F.embedding_bag, w, input=i.reshape(2, 5).int(), **kw))


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_frequencies_of_bags(mode):
    """Row v is divided by how often v occurs. torch's own on the CPU divides by the count of another index."""
    i, w = torch.tensor([[0, 0, 3], [3, 1, 0]]), torch.randn(5, 4, dtype=torch.float64)
    got = both(f.embedding_bag, F.embedding_bag, w, input=i, mode=mode, scale_grad_by_freq=True)[0][1]
    plain = both(f.embedding_bag, F.embedding_bag, w, input=i, mode=mode)[1][1]
    torch.testing.assert_close(got, plain / torch.tensor([3.0, 1, 1, 2, 1], dtype=torch.float64)[:, None])


def test_per_sample_weights():
    s = torch.randn(2, 5, dtype=torch.float64)
    w, i = torch.randn(5, 4, dtype=torch.float64), torch.randint(0, 5, (2, 5))
    for padding in (None, 1):
        kw = {"input": i, "mode": "sum", "per_sample_weights": s, "padding_idx": padding}
        torch.testing.assert_close(*both(f.embedding_bag, F.embedding_bag, w, **kw))


def test_bags_without_indices():
    w = torch.randn(3, 2, requires_grad=True)
    for mode in ("sum", "mean", "max"):
        y = f.embedding_bag(torch.empty(0, dtype=torch.int64), w, torch.tensor([0, 0]), mode=mode)
        assert y.tolist() == [[0, 0], [0, 0]] and not torch.autograd.grad(y.sum(), w)[0].any()


def test_modules():
    i = torch.randint(0, 7, (3, 4))
    for ours, theirs, kw in (
        (bp.nn.Embedding, nn.Embedding, {"padding_idx": 1, "scale_grad_by_freq": True}),
        (bp.nn.EmbeddingBag, nn.EmbeddingBag, {"padding_idx": 1, "mode": "max"}),
        (bp.nn.EmbeddingBag, nn.EmbeddingBag, {"mode": "sum", "include_last_offset": True}),
    ):
        a, b = ours(7, 5, **kw), theirs(7, 5, **kw)
        a.load_state_dict(b.state_dict())
        swapped = copy.deepcopy(b)
        assert repr(a) == repr(b) and len(bp.swap(swapped).swapped) == 1 and type(swapped) is ours
        args = (i.reshape(-1), torch.tensor([0, 5, 12])) if "include_last_offset" in kw else (i,)
        for m in (a, swapped, b):
            m(*args).sin().sum().backward()
        torch.testing.assert_close((a.weight.grad, swapped.weight.grad), (b.weight.grad, b.weight.grad))
        a.backend = "triton"
        with pytest.raises(ValueError, match="triton"):
            a(*args)


def test_errors():
    i, w = torch.tensor([[0, 1]]), torch.randn(3, 2)
    for fn, name in ((f.embedding, "embedding"), (f.embedding_bag, "embedding_bag")):
        with pytest.raises(IndexError, match=rf"{name}: input holds 3, which is no row of weight \(3, 2\)"):
            fn(i + 2, w)
        with pytest.raises(IndexError, match=rf"{name}: input holds -1"):
            fn(i - 1, w)
        with pytest.raises(TypeError, match=rf"{name}: input is torch.float32"):
            fn(i.float(), w)
        with pytest.raises(TypeError, match=rf"{name}: weight is torch.int64"):
            fn(i, i)
        with pytest.raises(ValueError, match=rf"{name}: weight has shape \(3,\)"):
            fn(i, w[:, 0])
        with pytest.raises(ValueError, match=rf"{name}: padding_idx=-4"):
            fn(i, w, padding_idx=-4)
        with pytest.raises(ValueError, match=rf"{name}: sparse=True and scale_grad_by_freq=True"):
            fn(i, w, sparse=True, scale_grad_by_freq=True)
    bag, o = f.embedding_bag, torch.tensor([0, 1])
    for kw, says in (
        ({"input": i, "offsets": o}, "offsets must be None"),
        ({"input": i[0]}, "needs offsets"),
        ({"input": i[0], "offsets": o + 1}, "runs from 1 to 2"),
        ({"input": i[0], "offsets": 3 * o}, "runs from 0 to 3"),
        ({"input": i[None]}, r"\(1, 1, 2\)"),
        ({"input": i, "mode": "min"}, "mode='min'"),
        ({"input": i, "mode": "max", "sparse": True}, "mode='max'"),
        ({"input": i, "per_sample_weights": torch.ones(1, 2)}, "mode='sum', not 'mean'"),
        ({"input": i, "mode": "sum", "per_sample_weights": torch.ones(2)}, "per_sample_weights has shape"),
    ):
        with pytest.raises(ValueError, match=says):
            bag(weight=w, **kw)
