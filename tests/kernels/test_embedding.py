"""embedding's backward by sorted runs beside the eager rule, which adds by index."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fused import LAYOUTS, both_rules, each_dtype, normal

import bptoolkit as bp
from bptoolkit.ops.embedding import RULE
from bptoolkit.triton_kernels import embedding as file

LENGTH = file.LENGTH


def run(i, V, E, padding=None, by_freq=False, dtype=torch.float32, errors=32, **cotangents):
    w = normal(V, E, dtype=dtype, device=str(i.device))
    _, (dw, none) = both_rules(RULE, w, i, V, padding, by_freq, False, cotangents=cotangents, errors=errors)
    assert none is None
    return dw


def drawn(V, *shape, device="cpu"):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(V)).to(device)


def runs(*lengths, device="cpu"):
    """Indices whose v-th row is looked up lengths[v] times, in an order that is no order."""
    i = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return i[torch.randperm(len(i), generator=torch.Generator().manual_seed(0))].to(device)


@pytest.mark.parametrize("E", [1, 31, 64, 65, 300, 1024, 1025, 2500])
def test_rows_of_every_length(device, E):
    run(drawn(5, 3, 7, device=device), 5, E)


LENGTHS = [
    (LENGTH,),
    (LENGTH - 1, 1, LENGTH),
    (1, 2 * LENGTH - 1, 0, LENGTH + 1),
    (1, 2 * LENGTH - 2, 3, 2 * LENGTH, LENGTH - 2),
    (0, 7, 9 * LENGTH + 5, 0, 0, 1),  # more whole chunks than a tile has places, and than there are programs
    (5, 0, LENGTH - 1),
    (0, 0, 1),
]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("by_freq", [False, True])
def test_runs_of_every_length(device, lengths, by_freq):
    """Either side of a chunk, at its ends and across; rows without a run get 0, before the first and after the last too."""
    i = runs(*lengths, device=device)
    dw = run(i, len(lengths) + 2, 20, by_freq=by_freq)
    assert dw.any(1).tolist() == [n > 0 for n in (*lengths, 0, 0)]


def test_more_rows_than_programs(device):
    run(drawn(90, 200, device=device), 90, 40)
    run(drawn(40, 60, device=device), 40, 1100)


@each_dtype
@pytest.mark.parametrize("kind", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("padding, by_freq", [(None, False), (0, True), (4, False), (4, True)])
def test_dtypes_and_options(device, dtype, kind, padding, by_freq):
    i = torch.cat([drawn(5, 60, device=device), torch.full((2 * LENGTH,), 4, device=device)]).to(kind)
    dw = run(i, 5, 12, padding, by_freq, dtype)
    assert padding is None or not dw[padding].any()


@pytest.mark.parametrize("of_dy", LAYOUTS)
@pytest.mark.parametrize("of_i", ["dense", "apart", "one for all"])
def test_layouts(device, of_dy, of_i):
    i = drawn(6, 9, 5, device=device)
    i = {"dense": i, "apart": i.repeat_interleave(2, 1)[:, ::2], "one for all": i[:1, :1].expand(9, 5)}[of_i]
    run(i, 6, 8, dy=LAYOUTS[of_dy](normal(9, 5, 8, device=device)))


def test_an_index_without_dimensions(device):
    run(torch.tensor(2, device=device), 4, 5)


@pytest.mark.parametrize("shape, V, E", [((0,), 3, 4), ((2, 0), 3, 4), ((3,), 2, 0), ((0,), 0, 4)], ids=str)
def test_zero_sizes(device, shape, V, E):
    dw = run(torch.zeros(shape, dtype=torch.int64, device=device), V, E)
    assert dw.shape == (V, E) and not dw.any()


def test_what_is_not_finite_stays_in_its_row(device):
    i = runs(3, 2 * LENGTH, 5, device=device)
    dy = normal(len(i), 6, device=device)
    dy[i == 1, 2] = torch.inf
    dy[(i == 2).nonzero()[0], 3] = torch.nan
    dw = run(i, 4, 6, dy=dy)
    assert dw.isinf().nonzero().tolist() == [[1, 2]] and dw.isnan().nonzero().tolist() == [[2, 3]]
    assert run(i, 4, 6, 2, dy=dy).isfinite().sum() == 23  # nor a padding's, which is left out


def test_a_sparse_gradient_is_eager(device):
    i, w = drawn(5, 7, device=device), normal(5, 3, device=device).requires_grad_()
    with pytest.raises(ValueError, match=r"embedding: backend='triton' cannot run here: .* a dense gradient"):
        bp.functional.embedding(i, w, sparse=True, backend="triton")
    (dw,) = torch.autograd.grad(bp.functional.embedding(i, w, sparse=True).sum(), w)
    assert dw.is_sparse


def test_module(device):
    ours, theirs = (
        cls(9, 4, padding_idx=2, scale_grad_by_freq=True, device=device) for cls in (bp.nn.Embedding, torch.nn.Embedding)
    )
    theirs.load_state_dict(ours.state_dict())
    ours.backend = "triton"
    i = drawn(9, 4, 8, device=device)
    for m in (ours, theirs):
        m(i).sin().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


def test_max_norm(device):
    """The rows are rescaled first, in place."""
    i, w = drawn(5, 7, device=device), [normal(5, 3, device=device).requires_grad_() for _ in range(2)]
    for f, t, kw in ((bp.functional.embedding, w[0], {"backend": "triton"}), (F.embedding, w[1], {})):
        f(i, t, None, 1.0, **kw).sin().sum().backward()
    torch.testing.assert_close((w[0], w[0].grad), (w[1], w[1].grad))
