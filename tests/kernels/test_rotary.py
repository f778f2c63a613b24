"""rotary_embedding's kernel beside its eager rule: both forms, leading dimensions in every layout, what stays."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from fused import LAYOUTS, both_rules, each_dtype, normal
from torch import Tensor

import bptoolkit as bp
from bptoolkit.ops.rotary import RULE
from bptoolkit.triton_kernels import rotary as file

each_form = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def angles(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor]:
    t = 3 * normal(*shape, device=device, seed=5)
    return t.cos().to(dtype), t.sin().to(dtype)


def run(x, c, s, interleaved, need=(True, False, False), **cotangents):
    return both_rules(RULE, x, c, s, interleaved, need=need, cotangents=cotangents)


# Rows and pairs on both sides of a tile; elements that stay
@each_form
@pytest.mark.parametrize(
    "M, H, rest",
    [*product((1, 3), (1, 2, 3, 16, 17), (0, 1, 5)), *product((127, 129, 400), (8,), (0, 3)), (2, 1024, 2048), (3, 2048, 0)],
)
def test_sizes(device, M, H, rest, interleaved):
    (y,), _ = run(x := normal(M, 2 * H + rest, device=device), *angles(M, H, device=device), interleaved)
    assert torch.equal(y[:, 2 * H :], x[:, 2 * H :])


@each_form
@each_dtype
@pytest.mark.parametrize("angles_in", ["same", "float32"])
def test_dtypes(device, dtype, angles_in, interleaved):
    x = normal(2, 3, 7, 20, dtype=dtype, device=device)
    run(x, *angles(7, 8, dtype=dtype if angles_in == "same" else torch.float32, device=device), interleaved)


BROADCAST = [(), (5,), (1,), (4, 5), (4, 1), (3, 1, 5), (3, 4, 1), (2, 3, 4, 5), (2, 1, 4, 1), (1, 1, 1, 1), (2, 1, 1, 5)]


@each_form
@pytest.mark.parametrize("over", BROADCAST, ids=str)
def test_broadcasting(device, over, interleaved):
    """Down to the case that no three dimensions describe, (2, 1, 4, 1)."""
    run(normal(2, 3, 4, 5, 6, device=device), *angles(*over, 2, device=device), interleaved, need=(True, True, True))


def views(x: Tensor) -> dict[str, Tensor]:
    """One (2, 3, 4, 10), in layouts."""
    return {
        "dense": x,
        "(N L H E)": x.transpose(1, 2).contiguous().transpose(1, 2),
        "(L N H E)": x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
        "a part of q, k, v": torch.stack((x, x + 1, x - 1), 3)[:, :, :, 1] - 1,
        "of a wider tensor": torch.cat((x, x), -1)[..., :10],
        "elements first": x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
        "backwards": x.transpose(0, 2).contiguous().transpose(0, 2),
    }


@each_form
@pytest.mark.parametrize("layout", views(torch.empty(2, 3, 4, 10)))
def test_layouts_of_heads(device, layout, interleaved):
    x = views(normal(2, 3, 4, 10, device=device))[layout]
    run(x, *angles(4, 4, device=device), interleaved, dy=views(normal(2, 3, 4, 10, device=device, seed=3))[layout])
    run(x, *angles(2, 1, 4, 4, device=device), interleaved)


@pytest.mark.parametrize("of_angles", LAYOUTS)
@pytest.mark.parametrize("of_x", LAYOUTS)
def test_layouts(device, of_x, of_angles):
    x, (c, s) = LAYOUTS[of_x](normal(7, 20, device=device)), angles(7, 8, device=device)
    run(x, LAYOUTS[of_angles](c), LAYOUTS[of_angles](s), False, dy=LAYOUTS[of_x](x.cos()))
    run(x, LAYOUTS[of_angles](c), s, True)  # cos and sin lie differently


def test_no_copies(device, monkeypatch):
    """Of views of queries that lie as (N, L, H, E), nor of angles that are broadcast."""
    x, (c, s) = normal(2, 4, 3, 10, device=device).transpose(1, 2), angles(4, 4, device=device)
    monkeypatch.setattr(Tensor, "contiguous", lambda t: pytest.fail("copied"))
    file.ROTATE(x, c, s, False, False)
    file.ROTATE(x, c.expand(2, 1, 4, 4), s.expand(2, 1, 4, 4), False, False)


def test_merged():
    """Dimensions that are one, of every tensor; those of size 1 have no stride that counts."""
    assert file.merged((2, 3, 4), (12, 4, 1), (0, 0, 0)) == [(24, 1, 0)]
    assert file.merged((2, 3, 4), (12, 4, 1), (0, 0, 1)) == [(6, 4, 0), (4, 1, 1)]
    assert file.merged((2, 3, 4), (12, 1, 3), (0, 0, 1)) == [(2, 12, 0), (3, 1, 0), (4, 3, 1)]
    assert file.merged((2, 1, 4), (4, 99, 1), (0, 7, 0)) == [(8, 1, 0)]
    assert file.merged((1, 1), (5, 5), (5, 5)) == file.merged((), (), ()) == []


@pytest.mark.parametrize("need", [n for n in product((True, False), repeat=3) if any(n)], ids=str)
def test_what_is_needed(device, need):
    run(normal(3, 4, 10, device=device), *angles(4, 4, device=device), True, need=need)


@each_form
@pytest.mark.parametrize(
    "shape, over", [((0, 6), (2,)), ((3, 0), (0,)), ((2, 0, 4), (0, 2)), ((3, 4), (0,)), ((6,), (3,))], ids=str
)
def test_zero_sizes_and_no_rows(device, shape, over, interleaved):
    """And x without leading dimensions, and without pairs."""
    run(normal(*shape, device=device), *angles(*over, device=device), interleaved, need=(True, True, True))


@each_form
def test_nan_and_infinity(device, interleaved):
    """They stay in their pair, in their row; in what is only copied they are copied."""
    x = normal(6, 9, device=device)
    x[1, 0], x[2, 3], x[3, 8], x[4, 8] = torch.nan, torch.inf, -torch.inf, torch.nan
    c, s = angles(6, 4, device=device)
    (y,), (dx, _, _) = run(x, c, s, interleaved, dy=x)
    pair = {0, 1} if interleaved else {0, 4}
    for t in (y, dx):
        assert set(t[1].isnan().nonzero().flatten().tolist()) == pair
        assert t[3, 8] == -torch.inf and t[4, 8].isnan()
        assert t[[0, 5]].isfinite().all() and t[3:5, :8].isfinite().all()


def test_back_and_forth(device):
    """Turned by θ and by −θ, x is what it was; it keeps its length."""
    x, (c, s) = normal(5, 4, 64, device=device), angles(4, 32, device=device)
    for interleaved in (False, True):
        y = file.ROTATE(x, c, s, interleaved, False)
        torch.testing.assert_close(file.ROTATE(y, c, s, interleaved, True), x)
        torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


def test_the_public_functions(device):
    """apply_rotary hands the backend on; a row that is too long is refused by name and runs under "auto"."""
    q, k, (c, s) = normal(2, 2, 4, 8, device=device), normal(2, 1, 4, 8, device=device), angles(4, 4, device=device)
    for got, want in zip(*(bp.functional.apply_rotary(q, k, c, s, backend=b) for b in ("triton", "eager"))):
        torch.testing.assert_close(got, want)
    wide = normal(1, file.LONGEST + 2, device=device)
    with pytest.raises(ValueError, match=f"rotary_embedding: backend='triton' cannot run here: a row of {file.LONGEST + 2}"):
        bp.functional.rotary_embedding(wide, c[:1], s[:1], backend="triton")
    bp.functional.rotary_embedding(wide, c[:1], s[:1])
    many = torch.empty(1, 2, device=device).expand(file.ROWS + 1, 2)
    assert "rows are too many" in file.unsupported(many, c[:1, :1], s[:1, :1], False)
