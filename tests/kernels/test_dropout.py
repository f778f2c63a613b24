"""dropout's kernels beside the eager rule: the same mask, bit for bit, of elements and of channels."""

from __future__ import annotations

from itertools import product
from math import prod

import pytest
import torch
import triton
import triton.language as tl
from fused import LAYOUTS, both_rules, each_dtype, normal
from triton.runtime.interpreter import InterpretedFunction

import bptoolkit as bp
from bptoolkit.ops.dropout import RULE
from bptoolkit.randomness import hashed, keep, signed, threshold
from bptoolkit.triton_kernels import dropout as file
from bptoolkit.triton_kernels import interpreter, randomness

B = file.BLOCK
each_form = pytest.mark.parametrize("alpha", [False, True], ids=["plain", "alpha"])


def seed_of(a: int, b: int, device: str = "cpu") -> torch.Tensor:
    return torch.tensor([signed(a), signed(b)], dtype=torch.int32, device=device)


def run(x, p, lead, alpha, **cotangents):
    s = seed_of(20240607, 0xC0FFEE11, x.device)
    return both_rules(RULE, x, s, p, lead, alpha, need=(True, False), cotangents=cotangents)


@each_form
@pytest.mark.parametrize("n", [1, 2, 127, B - 1, B, B + 1, 3 * B, 7 * B + 13])
def test_elements(device, n, alpha):
    run(normal(n, device=device), 0.3, 1, alpha)


@each_form
@pytest.mark.parametrize("M, N", [*product((1, 3, 65), (2, 3, 49, 64, 65)), (1, B - 1), (3, B), (3, B + 1), (2, 2 * B + 5)])
def test_channels(device, M, N, alpha):
    run(normal(M, N, device=device), 0.4, 1, alpha)


@each_form
@each_dtype
@pytest.mark.parametrize(
    "shape, lead", [((3, 4, 5), 3), ((3, 4, 5), 2), ((3, 4, 5), 1), ((3, 4, 2, 5, 1), 2), ((7, 1), 1)], ids=str
)
def test_dtypes_and_leads(device, dtype, shape, lead, alpha):
    run(normal(*shape, dtype=dtype, device=device), 0.5, lead, alpha)


@pytest.mark.parametrize("lead", [1, 2])
@pytest.mark.parametrize("of_dy", LAYOUTS)
@pytest.mark.parametrize("of_x", LAYOUTS)
def test_layouts(device, of_x, of_dy, lead):
    run(LAYOUTS[of_x](normal(7, 20, device=device)), 0.25, lead, False, dy=LAYOUTS[of_dy](normal(7, 20, device=device, seed=1)))


@each_form
@pytest.mark.parametrize("lead", [1, 2])
@pytest.mark.parametrize("p", [0.0, 1e-12, 2**-32, 1e-3, 0.5, 1 - 2**-20, 1 - 1e-12, 1.0])
def test_shares(device, p, lead, alpha):
    """The extremes are exact, and p = 0 keeps the element whose hash is the largest."""
    x = normal(50, 30, device=device)
    (y,), (dx, _) = run(x, p, lead, alpha)
    if p == 0:
        assert torch.equal(y, x)
    if p == 1:
        assert not y.any() and not dx.any()


@pytest.mark.parametrize("p", [1e-12, 0.01, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("shape, lead", [((3 * B + 5,), 1), ((70, 3, 40), 2), ((5000, 2), 1)], ids=str)
def test_the_same_mask_as_everywhere(device, shape, lead, p):
    """Where `randomness.keep` says so, forward and backward."""
    for s in (seed_of(0xFFFFFFFF, 0x80000000, device), seed_of(12, 34567, device)):
        kept = keep(s, shape[:lead], p).view(*shape[:lead], *(1,) * (len(shape) - lead)).expand(shape)
        ones = torch.ones(shape, device=device)
        assert torch.equal(file.forward(ones, s, p, lead, False) != 0, kept)
        assert torch.equal(file.backward(ones, s, p, lead, False)[0] != 0, kept)
    assert kept.any() or p > 0.9


@triton.jit
def hash_kernel(i, seed, h, k, t, N, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    I = tl.load(i + n, n < N, other=0)
    tl.store(h + n, randomness.hashed(I, seed), n < N)
    tl.store(k + n, randomness.keep(I, seed, t), n < N)


def by_kernel(i, s, t, device):
    h, k = torch.empty(len(i), dtype=torch.int32, device=device), torch.empty(len(i), dtype=torch.bool, device=device)

    def run(kernel):
        kernel[(triton.cdiv(len(i), 256),)](i, s, h, k.view(torch.uint8), t, len(i), 256)

    run(hash_kernel) if device == "cuda" else interpreter.launch(run, InterpretedFunction(hash_kernel.fn))
    return h, k


@pytest.mark.parametrize("start", [0, (1 << 31) - 300, 1 << 31, (1 << 32) - 300, 1 << 32, (5 << 32) - 1, 1 << 45])
def test_large_indices(device, start):
    """The hash itself, across 2³¹ and 2³²: as in eager, and as in Python's integers."""
    i, s, t = torch.arange(600, device=device) + start, seed_of(0x89ABCDEF, 0x12345678, device), threshold(0.3)
    h, k = by_kernel(i, s, t, device)
    assert torch.equal(h, hashed(i, s)) and torch.equal(k, hashed(i, s) < t)
    assert h.tolist()[::37] == [by_hand(int(j), 0x89ABCDEF, 0x12345678) for j in i[::37]]


def by_hand(i, k0, k1):
    mod = (1 << 32) - 1
    h = ((i & mod) * 0x9E3779B9 + k0) & mod
    h ^= h >> 17
    h = (h * 0xED5AD4BB & mod) ^ k1 ^ ((i >> 32) * 0x9E3779B9 & mod)
    h ^= h >> 11
    h = h * 0xAC4C1B51 & mod
    h ^= h >> 15
    return signed(h * 0x31848BAB & mod)


@pytest.mark.parametrize("shape, lead", [((0,), 1), ((3, 0), 2), ((3, 0), 1), ((0, 4), 1), ((), 0), ((3,), 0)], ids=str)
def test_zero_sizes_and_scalars(device, shape, lead):
    run(normal(*shape, device=device), 0.5, lead, False)


@each_form
@pytest.mark.parametrize("lead", [1, 2])
@pytest.mark.parametrize("p", [0.5, 1.0])
def test_nan_and_infinity(device, lead, p, alpha):
    """0 · ∞ is NaN, whether dropped by chance or all of it."""
    x = normal(6, 40, device=device)
    x[1, 2], x[1, 3], x[4] = torch.nan, torch.inf, -torch.inf
    (y,), _ = run(x, p, lead, alpha, dy=x)
    s = seed_of(20240607, 0xC0FFEE11, x.device)
    want = RULE.forward(x, s, p, lead, alpha)
    assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y.isinf(), want.isinf())


CALLS = {  # a shape for each function
    "dropout": (40, 50),
    "dropout1d": (8, 30, 5),
    "dropout2d": (8, 30, 3, 4),
    "dropout3d": (8, 30, 2, 3, 2),
    "alpha_dropout": (40, 50),
    "feature_alpha_dropout": (8, 30, 5),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_public_functions(device, name):
    """The same seed gives what the eager backend gives; in place too; a checkpoint's second run, the same mask again."""
    f = getattr(bp.functional, name)
    x = normal(*CALLS[name], device=device).requires_grad_()
    results = {}
    for backend in ("eager", "triton"):
        torch.manual_seed(11)
        y = f(x, 0.4, True, backend=backend)
        results[backend] = (y.detach(), *torch.autograd.grad(y.sin().sum(), x))
    for got, want in zip(results["triton"], results["eager"]):
        assert torch.equal(got == 0, want == 0)
        torch.testing.assert_close(got, want)
    torch.manual_seed(11)
    t = x.detach().clone()
    assert f(t, 0.4, True, True, backend="triton") is t and torch.equal(t, results["triton"][0])
    assert f(x, 0.4, False, backend="triton") is x and f(x, 0.0, True, backend="triton") is x
    torch.manual_seed(11)
    again = torch.utils.checkpoint.checkpoint(lambda x: f(x, 0.4, True, backend="triton"), x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.sin().sum(), x)[0], results["triton"][1])


def test_programs_and_tiles():
    for N in (1, 2, 3, 49, 64, 3136, B, 10 * B):
        for warp in (32, 64):
            BM, BN, warps = file.tile(N, warp)
            assert BM * BN == B and warps * warp * file.PER_THREAD == B and prod((BM, BN)) <= B
