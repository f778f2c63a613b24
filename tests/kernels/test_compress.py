"""compress's kernels beside its eager functions: the same bits."""

from __future__ import annotations

import pytest
import torch
from fused import LAYOUTS, each_dtype, normal
from torch.library import opcheck

from bptoolkit import compress
from bptoolkit.compress import pack, pack_bits, unpack, unpack_bits
from bptoolkit.triton_kernels import compress as file

each_bits = pytest.mark.parametrize("bits", [8, 4, 2])


def seed_of(a: int, b: int, device: str) -> torch.Tensor:
    return torch.tensor([a, b], dtype=torch.int32, device=device)


def same(x, bits, group=256, stochastic=True, seed=(20240607, -559038737)):
    """Packs and unpacks by both; compares all the bits; returns what the kernels gave."""
    s = seed_of(*seed, x.device)
    before = x.clone()
    a, b = (pack(x, bits, group=group, stochastic=stochastic, seed=s, backend=k) for k in ("triton", "eager"))
    for letter, got, want in zip(("codes", "scale", "minimum"), a, b):
        assert got.dtype == want.dtype and got.shape == want.shape and got.is_contiguous(), letter
        assert torch.equal(got.nan_to_num(-1), want.nan_to_num(-1)), letter
        assert torch.equal(got.signbit(), want.signbit()) or got.isnan().any(), letter
    assert a[3:] == b[3:]
    got, want = unpack(a, backend="triton"), unpack(a, backend="eager")
    if x.dtype == torch.bfloat16 and x.is_cpu:  # Triton's interpreter cuts a float32 off where a GPU rounds it
        want = unpack(a._replace(dtype=torch.float32), backend="eager")
        want = (want.view(torch.int32) & -65536).view(torch.float32).bfloat16()
    assert got.dtype == x.dtype and got.shape == x.shape
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(), want.nan_to_num())
    assert torch.equal(x.nan_to_num(), before.nan_to_num())
    return a, got


# Groups: shorter, as long as and longer than a tile's width, not a power of two; tiles that are full, and the last
@each_bits
@pytest.mark.parametrize("group", [8, 24, 256, 1000])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 255, 256, 257, 2047, 2048, 2049, 7 * 2048 + 77])
def test_sizes(device, n, bits, group):
    same(normal(n, device=device), bits, group, stochastic=bool(n % 2))


@pytest.mark.parametrize("bits, group, n", [(2, file.LONGEST, 2 * file.LONGEST + 3), (8, 8184, 8184), (4, 2056, 9000)])
def test_long_groups(device, bits, group, n):
    same(normal(n, device=device), bits, group)


@each_bits
@each_dtype
@pytest.mark.parametrize("stochastic", [True, False], ids=["stochastic", "nearest"])
@pytest.mark.parametrize("spread, shift", [(1, 0), (1e-2, 1000), (1e4, -5), (1e-30, 0)])
def test_dtypes_and_values(device, dtype, bits, stochastic, spread, shift):
    same((normal(2500, device=device) * spread + shift).to(dtype), bits, stochastic=stochastic)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, layout):
    same(LAYOUTS[layout](normal(35, 20, device=device)), 4)
    mask = LAYOUTS[layout](normal(35, 20, device=device) > 0)
    bits = pack_bits(mask, backend="triton")
    assert torch.equal(bits, pack_bits(mask.contiguous(), backend="eager"))
    twice = bits.repeat_interleave(2)[::2]
    assert torch.equal(unpack_bits(twice, mask.shape, backend="triton"), mask)


@each_bits
def test_odd_strides_of_what_is_unpacked(device, bits):
    """What is packed may have been moved to another place in between."""
    p, y = same(normal(1000, device=device), bits)
    apart = p._replace(**{k: getattr(p, k).repeat_interleave(2)[::2] for k in ("codes", "scale", "minimum")})
    assert torch.equal(unpack(apart, backend="triton"), y)


@each_bits
@pytest.mark.parametrize("stochastic", [True, False], ids=["stochastic", "nearest"])
def test_what_is_not_finite_or_constant(device, bits, stochastic):
    """Groups of NaN, infinities, zeros of either sign, one value, the ends of the range, subnormal numbers."""
    big, x = torch.finfo(torch.float32).max, normal(40, 32, device=device)
    x[1, 3], x[2, 4], x[3, 5], x[4], x[5], x[6] = torch.nan, torch.inf, -torch.inf, torch.nan, torch.inf, -torch.inf
    x[7], x[8], x[9] = 0.0, -0.0, 1.1
    x[10, 0], x[11], x[12, :2], x[13] = -0.0, x[11] * big / 8, torch.tensor([-big, big]), x[13] * 1e-40
    x[14], x[15], x[16, 1] = x[14].abs() * 1e-38, 1e-45, 1e-45
    x[17], x[17, 0], x[18, 0], x[19, :2] = 1e-45, 0.0, big, torch.tensor([1e38, big])
    p, y = same(x, bits, 32, stochastic)
    assert y.isnan().all(1).equal(y.isnan().any(1)) and set(range(1, 7)) <= set(y.isnan().all(1).nonzero().flatten().tolist())
    assert torch.equal(p.scale.isnan(), y.isnan().all(1)) and torch.equal(y[7:10], x[7:10])


def test_half_way(device):
    """Of ties the nearest is the lower one; by chance about half of them go up."""
    x = torch.arange(2560, device=device).remainder(7) / 2
    _, y = same(x, 2, stochastic=False)
    assert torch.equal(y, x.floor())
    _, y = same(x, 2)
    up = (y > x)[x != x.floor()].double().mean()
    assert 0.4 < float(up) < 0.6


@pytest.mark.parametrize("n", [1, 7, 8, 9, file.BLOCK - 1, file.BLOCK, file.BLOCK + 1, 4 * file.BLOCK + 13])
def test_masks(device, n):
    mask = normal(n, device=device) > 0.2
    bits = pack_bits(mask, backend="triton")
    assert torch.equal(bits, pack_bits(mask, backend="eager"))
    for backend in ("triton", "eager"):
        assert torch.equal(unpack_bits(bits, (n,), backend=backend), mask)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3, 4)], ids=str)
def test_shapes(device, shape):
    same(normal(*shape, device=device), 4)
    mask = normal(*shape, device=device) > 0
    back = unpack_bits(pack_bits(mask, backend="triton"), shape, backend="triton")
    assert back.dtype == torch.bool and torch.equal(back, mask)


def test_operators(device):
    """Schemas, fake kernels and tracing."""
    x, s = normal(3, 100, device=device), seed_of(1, 2, device)
    codes, scale, minimum = file.KERNELS.pack(x, s, 4, 256)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for operator, args in (
        (file.KERNELS.pack, (x, s, 4, 256)),
        (file.KERNELS.pack, (x.half(), None, 2, 8)),
        (file.KERNELS.unpack, (codes, scale, minimum, [3, 100], torch.float32, 4, 256)),
        (file.KERNELS.pack_bits, (x > 0,)),
        (file.KERNELS.unpack_bits, (codes[:38], [3, 100])),
    ):
        opcheck(operator, args, test_utils=tests)


def test_compiles(device):
    """All four kernels in one graph, and "auto" takes them."""

    def f(x, seed):
        p = pack(x, 4, seed=seed)
        return *p[:3], unpack(p), unpack_bits(pack_bits(x > 0), x.shape)

    x, s = normal(10, 100, device=device), seed_of(1, 2, device)
    for got, want in zip(torch.compile(f, fullgraph=True, backend="aot_eager")(x, s), f(x, s)):
        assert torch.equal(got, want)


def test_what_the_kernels_cannot_take(device):
    """By name it raises and says why; "auto" runs the eager functions."""
    x = normal(10, device=device)
    for match, call in (
        (
            "pack: backend='triton' cannot run here: the fused kernel computes in float32",
            lambda b: pack(x.double(), 8, backend=b),
        ),
        (
            f"pack: .*a group of {file.LONGEST + 8} elements is too long",
            lambda b: pack(x, 8, group=file.LONGEST + 8, backend=b),
        ),
        ("unpack: .*computes in float32", lambda b: unpack(pack(x.double(), 8), backend=b)),
        ("unpack: .*too long", lambda b: unpack(pack(x, 8, group=file.LONGEST + 8), backend=b)),
    ):
        with pytest.raises(ValueError, match=match):
            call("triton")
        call("auto")
    with pytest.raises(ValueError, match="a functorch transform or forward mode is active"):
        torch.func.vmap(lambda m: pack_bits(m, backend="triton"))(x[None] > 0)
    assert torch.equal(torch.func.vmap(pack_bits)(x[None] > 0)[0], pack_bits(x > 0))
    assert compress.kernel() is file.KERNELS
