"""Activations in fewer bits: error bounds, the mean of stochastic rounding, exact cases, what is not finite, sizes, errors."""

from __future__ import annotations

from math import log, prod

import numpy as np
import pytest
import torch

from bptoolkit import compress
from bptoolkit.compress import Packed, pack, pack_bits, unpack, unpack_bits

each_bits = pytest.mark.parametrize("bits", [8, 4, 2])
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def seed_of(k):
    return torch.randint(
        -(1 << 31), 1 << 31, (2,), dtype=torch.int32, generator=torch.Generator().manual_seed(k)
    )  # as randomness.draw_seed


def steps(p: Packed):
    """The step of each element, in float64."""
    return p.scale.double().repeat_interleave(p.group)[: prod(p.shape)].view(p.shape)


@each_dtype
@each_bits
@pytest.mark.parametrize("stochastic", [True, False], ids=["stochastic", "nearest"])
@pytest.mark.parametrize("spread, shift", [(1, 0), (1e-3, 1000), (1e3, -5), (1e-30, 0), (3e4, 0)])
def test_error_bound(dtype, bits, stochastic, spread, shift):
    """|x − x̂| is at most one step, or half of one, and roundings: of x − m and its quotient, which is at most B, and of x̂."""
    x = (normal(7, 333, dtype=torch.float64) * spread / 4 + shift).to(dtype)
    p = pack(x, bits, stochastic=stochastic, seed=seed_of(1))
    y = unpack(p)
    assert y.dtype == dtype and y.shape == x.shape and y.is_contiguous()
    eps, working = torch.finfo(dtype).eps / 2, torch.finfo(p.scale.dtype).eps / 2
    step, B = steps(p), 2**bits - 1
    bound = step * ((1 if stochastic else 0.5) + 2 * working * B)
    rounding = (
        eps * (x.double().abs() + bound)
        + working * x.double().abs()
        + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    )
    assert ((x.double() - y.double()).abs() <= bound + rounding).all()
    whole, groups = x.flatten().split(256), len(p.scale)
    assert groups == len(p.minimum) == len(whole) and p.minimum.dtype == dtype
    for k, part in enumerate(whole):
        assert p.minimum[k] == part.min()
        exact = float((part.double().max() - part.double().min()) / B)
        assert exact * (1 - 2**-22) <= float(p.scale[k]) <= max(exact * (1 + 2**-15), torch.finfo(p.scale.dtype).tiny)


@each_bits
def test_the_mean_is_x(bits):
    """Over R seeds: by Hoeffding's bound for every element, for all of them together, and for elements of like fractions."""
    R, n, fail = 300, 2048, 1e-9
    x = normal(n) * 3 + 1
    packed = [pack(x, bits, seed=seed_of(k)) for k in range(R)]
    step = steps(packed[0])
    error = (torch.stack([unpack(p) for p in packed]).double() - x) / step  # R n, in steps
    rounding = 1e-5 + 2**-22 * float((x.abs() / step).max())
    assert error.abs().max() <= 1 + rounding

    def bound(trials, tests):
        return (log(2 * tests / fail) / (2 * trials)) ** 0.5 + rounding

    assert error.mean(0).abs().max() <= bound(R, n)
    assert abs(error.mean()) <= bound(R * n, 1)
    up = error > 0  # of a fraction f of a step: up by 1 − f with probability f
    f = torch.where(up, 1 - error, -error).mean(0).clamp(0, 1)
    for k in range(10):
        like = (f >= k / 10) & (f < (k + 1) / 10)
        if like.any():
            share = error[:, like].gt(rounding).double().mean() - f[like].mean()
            assert abs(share) <= bound(R * int(like.sum()), 10) + 2 * rounding
    variance = error.square().mean() - (f * (1 - f)).mean()  # what f (1 − f) of a Bernoulli variable says
    assert abs(variance) <= bound(R * n, 1) + 4 * rounding


def test_elements_and_seeds_are_rounded_independently():
    """Of elements half way between two codes the number rounded up is binomial; so are agreements of neighbours, of seeds."""
    n = 1 << 14
    x = torch.full((n,), 0.5)
    x[::256], x[1::256] = 0, 3  # a step of 1, of which .5 is half
    ups = [unpack(pack(x, 2, seed=seed_of(k))) for k in (1, 2)]
    inner = x == 0.5
    m = int(inner.sum())
    a, b = ((u[inner] > 0.5) for u in ups)
    for count in (a.sum(), b.sum(), (a == b).sum(), (a[1:] == a[:-1]).sum()):
        assert abs(int(count) - m / 2) <= 6 * (m / 4) ** 0.5


@each_bits
@each_dtype
def test_what_is_exact(dtype, bits):
    """Constant groups, the smallest element, and with a step that has few bits all of a grid; −0 becomes 0."""
    for value in (0.0, -0.0, 1.1, -3e-7, 6e4):
        x = torch.full((600,), value, dtype=dtype)
        p = pack(x, bits)
        assert torch.equal(unpack(p), x) and not p.scale.any() and not p.codes.any()
        assert not unpack(pack(torch.full((3,), -0.0), bits)).signbit().any()
    grid = (torch.arange(512) % 2**bits).to(dtype) / 4 - 1
    assert torch.equal(unpack(pack(grid, bits, stochastic=False)), grid)
    assert torch.equal(unpack(pack(grid, bits)), grid)
    x = normal(256, dtype=dtype)
    k = x.argmin()
    assert all(unpack(pack(x, bits, seed=seed_of(s)))[k] == x[k] for s in range(20))


@each_bits
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [256, 511, 600])
@pytest.mark.parametrize("stochastic", [True, False])
def test_a_group_that_is_not_finite(bits, bad, place, stochastic):
    """Becomes NaN as a whole; the others are what they were, also where it is the only number of its group."""
    x = normal(601)
    x[place] = bad
    p = pack(x, bits, stochastic=stochastic)
    y, own = unpack(p), torch.arange(601) // 256 == place // 256
    assert y[own].isnan().all() and y[~own].isfinite().all()
    assert p.scale[place // 256].isnan() and p.scale.isnan().sum() == 1 and p.minimum[place // 256] == 0
    assert unpack(pack(torch.full((9,), bad), bits)).isnan().all()


@each_bits
def test_the_ends_of_the_range(bits):
    """A range beyond float32 is NaN and not something wrong; large, tiny and subnormal numbers are within a step."""
    big = torch.finfo(torch.float32).max
    assert unpack(pack(torch.tensor([-big, big, 0.0]), bits)).isnan().all()
    for values in ([0.0, big / 2, big / 3], [-big / 2, big / 4], [1e-38, 3e-38, 2e-38], [0.0, 1e-45, 1e-44], [-1e-45, 1e-45]):
        x = torch.tensor(values)
        p = pack(x, bits)
        y = unpack(p)
        assert y.isfinite().all() and ((x.double() - y.double()).abs() <= p.scale.double() * (1 + 1e-4)).all()
    for dtype in (torch.float16, torch.bfloat16):
        x = (
            torch.tensor([-1.0, 1.0, 0.5], dtype=torch.float64)
            .mul(torch.finfo(dtype).max / (1 if dtype == torch.float16 else 4))
            .to(dtype)
        )
        assert unpack(pack(x, bits)).isfinite().all()


@each_bits
@pytest.mark.parametrize("group", [8, 24, 256, 1000])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (255,), (256,), (257,), (3, 5, 17), (0,), (4, 0)], ids=str)
def test_sizes(bits, group, shape):
    x = normal(*shape)
    p = pack(x, bits, group=group)
    N = x.numel()
    assert p.codes.shape == (-(-N * bits // 8),) and p.codes.dtype == torch.uint8
    assert p.scale.shape == p.minimum.shape == (-(-N // group),)
    assert (p.shape, p.dtype, p.bits, p.group) == (x.shape, x.dtype, bits, group)
    assert p.nbytes == len(p.codes) + 8 * len(p.scale)
    y = unpack(p)
    assert y.shape == x.shape and ((y - x).abs() <= steps(p) * 1.001 + 1e-6).all()
    if N * bits % 8:
        assert p.codes[-1] >> N * bits % 8 == 0


def test_codes_by_hand():
    x = torch.tensor([3.0, 0.0, 1.0, 2.0, 1.2, 1.6])
    assert pack(x, 2, stochastic=False).codes.tolist() == [0b10_01_00_11, 0b10_01]
    assert pack(x * 5, 4, stochastic=False).codes.tolist() == [0x0F, 0xA5, 0x86]
    assert pack(x * 85, 8, stochastic=False).codes.tolist() == [255, 0, 85, 170, 102, 136]


def test_strides_seeds_and_gradients():
    """In the order of the shape; the same seed, the same bits; torch's generator where there is none; no gradients."""
    x = normal(6, 50).requires_grad_()
    for view in (x.t(), x[:, ::2], x[:1].expand(5, 50)):
        a, b = pack(view, 4, seed=seed_of(3)), pack(view.contiguous(), 4, seed=seed_of(3))
        assert all(map(torch.equal, a[:3], b[:3])) and torch.equal(unpack(a), unpack(b))
        assert not any(t.requires_grad for t in (*a[:3], unpack(a)))
    torch.manual_seed(5)
    a = pack(x, 2)
    torch.manual_seed(5)
    assert torch.equal(a.codes, pack(x, 2).codes) and not torch.equal(a.codes, pack(x, 2).codes)
    state = torch.get_rng_state()
    pack(x, 2, stochastic=False)
    pack(x, 2, seed=seed_of(1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (8,), (9,), (3, 5, 7), (0,), (4, 0)], ids=str)
def test_masks(shape):
    mask = normal(*shape) > 0.3
    bits = pack_bits(mask)
    assert bits.tolist() == np.packbits(mask.numpy().reshape(-1), bitorder="little").tolist()
    back = unpack_bits(bits, shape)
    assert back.dtype == torch.bool and torch.equal(back, mask)
    if mask.dim() > 1:
        assert torch.equal(pack_bits(mask.mT), pack_bits(mask.mT.contiguous()))


def test_compiles():
    """All four in one graph, with the bits of eager."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(x, seed):
        p = pack(x, 4, seed=seed)
        return p.codes, unpack(p), unpack_bits(pack_bits(x > 0), x.shape)

    x = normal(10, 100)
    codes, y, mask = f(x, seed_of(1))
    p = pack(x, 4, seed=seed_of(1))
    assert torch.equal(codes, p.codes) and torch.equal(y, unpack(p)) and torch.equal(mask, x > 0)


@pytest.mark.parametrize(
    "error, match, call",
    [
        (ValueError, "pack: bits=3; a code has 8, 4 or 2", lambda x: pack(x, 3)),
        (ValueError, "pack: group=12; a group is a multiple of 8", lambda x: pack(x, 4, group=12)),
        (ValueError, "pack: group=0", lambda x: pack(x, 4, group=0)),
        (TypeError, "pack: x .*int64", lambda x: pack(x.long(), 4)),
        (TypeError, "pack: seed is torch.int64; it must be torch.int32", lambda x: pack(x, 4, seed=torch.ones(2).long())),
        (ValueError, r"pack: seed has shape \(3,\) on cpu", lambda x: pack(x, 4, seed=torch.ones(3).int())),
        (TypeError, "pack_bits: mask is torch.float32", pack_bits),
        (TypeError, "unpack_bits: bits is torch.float32", lambda x: unpack_bits(x, (3,))),
        (
            ValueError,
            r"unpack_bits: bits has shape \(1,\); .* \(9,\) needs \(2,\)",
            lambda x: unpack_bits(pack_bits(x > 0), (9,)),
        ),
        (ValueError, "pack: backend='cuda' is not known", lambda x: pack(x, 4, backend="cuda")),
        (ValueError, "pack: backend='triton' cannot run here", lambda x: pack(x, 4, backend="triton")),
        (ValueError, "unpack: backend='triton' cannot run here", lambda x: unpack(pack(x, 4), backend="triton")),
        (ValueError, "pack_bits: backend='triton' cannot run here", lambda x: pack_bits(x > 0, backend="triton")),
        (
            ValueError,
            "unpack_bits: backend='triton' cannot run here",
            lambda x: unpack_bits(pack_bits(x > 0), (5,), backend="triton"),
        ),
    ],
)
def test_errors(error, match, call):
    with pytest.raises(error, match=match):
        call(torch.randn(5))


def test_scales_are_rounded_up():
    """`_rounded_up`: 16 significant bits, never less, by at most 2^−15."""
    for s in (normal(1000).abs() * 1e-3, normal(1000).abs().double()):
        up = compress._rounded_up(s)
        assert (up >= s).all() and (up <= s * (1 + 2**-15)).all()
        assert torch.equal(torch.frexp(up)[0] * 2**16, (torch.frexp(up)[0] * 2**16).round())
