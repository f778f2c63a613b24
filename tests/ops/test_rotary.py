"""What is special to rotary embedding and ALiBi: the geometry of the rotation, conventions, values of the papers."""

from __future__ import annotations

import pytest
import torch

import bptoolkit as bp

f = bp.functional
both_ways = pytest.mark.parametrize("interleaved", [False, True])


@both_ways
def test_is_multiplication_by_a_complex_number(interleaved):
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    cos, sin = f.rotary_angles(7, 8, dtype=torch.float64)
    pairs = x.unflatten(-1, (4, 2)) if interleaved else x.unflatten(-1, (2, 4)).transpose(-1, -2)
    z = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin)
    want = torch.view_as_real(z) if interleaved else torch.view_as_real(z).transpose(-1, -2)
    torch.testing.assert_close(f.rotary_embedding(x, cos, sin, interleaved), want.flatten(-2))


@both_ways
def test_scores_depend_on_the_distance_alone(interleaved):
    """⟨R_m q, R_n k⟩ is a function of m − n."""
    q, k = torch.randn(16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    cos, sin = f.rotary_angles(20, 16, dtype=torch.float64)
    a, b = f.apply_rotary(q.expand(20, 16), k.expand(20, 16), cos, sin, interleaved)
    scores = a @ b.T
    for d in range(-5, 6):
        diagonal = scores.diagonal(d)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


@both_ways
def test_backward_turns_back(interleaved):
    """The gradient is the rotation by the negative angle: norms stay, and backward undoes forward."""
    x = torch.randn(3, 5, 10, dtype=torch.float64, requires_grad=True)
    cos, sin = f.rotary_angles(5, 8, dtype=torch.float64)
    y = f.rotary_embedding(x, cos, sin, interleaved)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    torch.testing.assert_close(dx, x.detach())
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(y[..., 8:], x[..., 8:])


def test_only_the_angles_are_kept():
    x = torch.randn(3, 5, 8, requires_grad=True)
    cos, sin = f.rotary_angles(5, 8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        f.rotary_embedding(x, cos, sin)
    assert [t.shape for t in kept] == [(5, 4), (5, 4)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_is_turned_in_float32(dtype):
    x = torch.randn(3, 5, 8).to(dtype)
    cos, sin = f.rotary_angles(5, 8)
    y = f.rotary_embedding(x, cos, sin)
    assert y.dtype == dtype and torch.equal(y, f.rotary_embedding(x.float(), cos, sin).to(dtype))


def test_angles():
    cos, sin = f.rotary_angles(1000, 64, dtype=torch.float64)
    m, k = 777, 9
    theta = torch.tensor(m * 10000 ** (-2 * k / 64), dtype=torch.float64)
    torch.testing.assert_close((cos[m, k], sin[m, k]), (theta.cos(), theta.sin()))
    assert f.rotary_angles(3, 0)[0].shape == (3, 0)
    with pytest.raises(ValueError, match="size=3 is odd"):
        f.rotary_angles(2, 3)


def test_alibi():
    """The slopes that the paper prints for 8 heads; for 12 those of 8 and every other one of 16."""
    assert f.alibi_slopes(8).tolist() == [2.0**-k for k in range(1, 9)]
    sixteen = f.alibi_slopes(16)
    assert torch.equal(f.alibi_slopes(12), torch.cat((f.alibi_slopes(8), sixteen[:8:2])))
    bias = f.alibi_bias(2, 2, 4)
    assert bias[0].tolist() == [[-d / 16 for d in row] for row in ([2, 1, 0, 1], [3, 2, 1, 0])]
    assert bias.shape == (2, 2, 4) and f.alibi_bias(3, 0, 4).shape == (3, 0, 4)
    with pytest.raises(ValueError, match="heads=0"):
        f.alibi_slopes(0)


def test_errors():
    x, c = torch.ones(2, 5, 8), torch.ones(5, 4)
    for args, says in (
        ((x, c, c[:, 1:]), r"cos has shape \(5, 4\) and sin \(5, 3\)"),
        ((x[..., 1:], c, c), r"x has shape \(2, 5, 7\) and cos \(5, 4\)"),
        ((x[:, 1:], c, c), r"cos has shape \(5, 4\); it cannot be broadcast over x \(2, 4, 8\)"),
    ):
        with pytest.raises(ValueError, match=says):
            f.rotary_embedding(*args)
    with pytest.raises(TypeError, match=r"cos is torch.float64, sin torch.float64 and x torch.float32"):
        f.rotary_embedding(x, c.double(), c.double())
