"""What is special to dropout: the mask's statistics and replay, what is kept, options, vmap's randomness, compile, modules."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint

import bptoolkit as bp
from bptoolkit import randomness

f = bp.functional
SHAPES = {  # a shape for each function
    "dropout": (40, 50),
    "dropout1d": (8, 30, 5),
    "dropout2d": (8, 30, 3, 4),
    "dropout3d": (8, 30, 2, 3, 2),
    "alpha_dropout": (40, 50),
    "feature_alpha_dropout": (8, 30, 5),
}
each = pytest.mark.parametrize("name", SHAPES)


def seed_of(a, b):
    return torch.tensor([randomness.signed(a), randomness.signed(b)], dtype=torch.int32)


def within(count, n, p, sigmas=5.0):
    """Whether a count of n tries of probability p is within so many standard deviations."""
    return abs(count - n * p) <= sigmas * (n * p * (1 - p)) ** 0.5


# --- the mask


@pytest.mark.parametrize("p", [0.5, 0.1, 0.9, 0.003, 1e-9])
def test_rate(p):
    n = 1 << 20
    for s in ((0, 0), (1, 0), (0, 1), (-1, -1), (123456789, 987654321), (1 << 31, 1 << 31)):
        assert within(int((~randomness.keep(seed_of(*s), (n,), p)).sum()), n, p), (p, s)


def test_extremes_are_exact():
    for p, kept in ((0.0, True), (0, True), (1.0, False), (1, False)):
        assert (randomness.keep(seed_of(3, 4), (5, 1000), p) == kept).all()


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 7, 8, 16, 31, 32, 64, 128, 256, 512, 1000, 1024, 4096, 65536])
@pytest.mark.parametrize("p", [0.5, 0.1])
def test_elements_are_independent(lag, p):
    """Pairs, and the sums of three that lie a lag apart, occur as often as independent ones (χ² of 7 degrees of freedom)."""
    n = 1 << 20
    kept = randomness.keep(seed_of(2024, 77), (n + 2 * lag,), p)
    code = sum((kept[k * lag : k * lag + n].long() << k) for k in range(3))
    seen = torch.bincount(code, minlength=8).double()
    want = torch.tensor([(1 - p) ** k.bit_count() * p ** (3 - k.bit_count()) * n for k in range(8)], dtype=torch.float64)
    assert float(((seen - want) ** 2 / want).sum()) < 60  # neighbouring triples overlap, hence not the 40 of independent ones


@pytest.mark.parametrize(
    "other", [(2025, 77), (2024, 78), (2024 ^ 1 << 31, 77), (2024, 77 ^ 1 << 31), (2024, 77 ^ 1 << 16)], ids=str
)
@pytest.mark.parametrize("shift", [0, 1, -1, 100])
def test_seeds_are_independent(other, shift):
    """Masks of seeds that differ in one bit agree as often as masks that have nothing to do with each other."""
    n, p = 1 << 20, 0.3
    a, b = (randomness.keep(seed_of(*s), (n,), p).roll(k) for s, k in (((2024, 77), 0), (other, shift)))
    assert within(int((a == b).sum()), n, p * p + (1 - p) ** 2)


def test_rows_and_columns():
    """Neither the rows nor the columns of a matrix vary more or less in their counts than independent elements would."""
    n, p = 1024, 0.25
    kept = randomness.keep(seed_of(5, 6), (n, n), p).double()
    for counts in (kept.sum(0), kept.sum(1)):
        dispersion = float(((counts - n * (1 - p)) ** 2).sum() / (n * p * (1 - p)))  # χ² of n degrees of freedom
        assert abs(dispersion - n) < 5 * (2 * n) ** 0.5


def test_many_seeds_at_one_element():
    """One element, or a few, over many calls: what a dropout of few channels sees."""
    torch.manual_seed(0)
    x = torch.empty(0)
    kept = torch.stack([randomness.keep(randomness.draw_seed(x), (4,), 0.5) for _ in range(4000)]).long()
    seen = torch.bincount((kept << torch.arange(4)).sum(1), minlength=16).double()
    assert float(((seen - 250) ** 2 / 250).sum()) < 45  # χ² of 15 degrees of freedom


def test_blocks_are_the_plain_form():
    """In blocks, in place, across the end of a block; in the traced form; and by 64-bit indices beyond 2³¹."""
    for n in (0, 1, 1000, randomness.BLOCK, 2 * randomness.BLOCK + 17):
        plain = randomness.hashed(torch.arange(n, dtype=torch.int32), seed_of(8, 9)) < randomness.threshold(0.3)
        assert torch.equal(randomness.keep(seed_of(8, 9), (n,), 0.3), plain)
        with torch.enable_grad():
            assert torch.equal(randomness.keep(seed_of(8, 9), (n,), 0.3), plain)
    small = torch.arange(100)
    s = seed_of(8, 9)
    assert torch.equal(randomness.hashed(small, s), randomness.hashed(small.int(), s))
    far = [randomness.hashed(small + k, s) for k in (1 << 31, 1 << 32, 3 << 32)]
    assert len({tuple(t.tolist()) for t in far}) == 3
    wrapped = torch.arange(-(1 << 31), -(1 << 31) + 100).int()  # 2³¹ + i, as a signed number
    assert torch.equal(far[0], randomness.hashed(wrapped, s))


# --- the functions


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradient(name, dtype):
    """Kept elements are torch's kept elements, dropped ones torch's dropped ones, and the gradient is 0 or the factor."""
    p, theirs = 0.3, getattr(F, name)
    x = torch.ones(SHAPES[name], dtype=dtype, requires_grad=True)
    torch.manual_seed(1)
    y = getattr(f, name)(x, p, True)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    want = theirs(torch.ones(400, 400 if name[-1] == "t" else 1, *SHAPES[name][2:], dtype=dtype), p, True)
    torch.testing.assert_close(y.unique(), want.unique())
    kept = y == y.max() if "alpha" not in name else y > 0
    factor = y.max() if "alpha" not in name else torch.tensor(((1 - p) * (1 + p * 1.7580993408473766**2)) ** -0.5, dtype=dtype)
    torch.testing.assert_close(dx, torch.where(kept, factor, 0.0).to(dtype))
    if len(SHAPES[name]) > 2:
        assert (kept.flatten(2) == kept.flatten(2)[..., :1]).all() and 0.5 < kept.double().mean() < 0.9


@each
def test_statistics_are_kept(name):
    """The mean of x stays; alpha keeps mean 0 and variance 1 too."""
    x = torch.randn(400, 500, *SHAPES[name][2:], dtype=torch.float64)
    x = x if "alpha" in name else x + 3
    y = getattr(f, name)(x, 0.2, True)
    assert abs(float(y.mean() - x.mean())) < 0.02
    assert "alpha" not in name or abs(float(y.var()) - 1) < 0.02


@each
def test_the_seed_alone_is_kept(name):
    kept = []
    x = torch.randn(SHAPES[name], requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        getattr(f, name)(x, 0.5, True)
    assert [(t.dtype, t.shape) for t in kept] == [(torch.int32, (2,))]


@each
def test_nothing_to_do(name):
    """The input itself is returned, and no random number drawn, as in torch; p = 1 gives zeros with zero gradients."""
    fn = getattr(f, name)
    x = torch.randn(SHAPES[name], requires_grad=True)
    before = torch.get_rng_state()
    assert fn(x, 0.5, False) is x and fn(x, 0.0, True) is x and fn(x, 0, True) is x and fn(x, training=False) is x
    empty = torch.empty((0, *SHAPES[name][1:]))
    assert fn(empty, 0.5, True) is empty
    assert torch.equal(before, torch.get_rng_state())
    for p in (1, 1.0):
        y = fn(x, p, True)
        assert not y.any() and not torch.autograd.grad(y.sum(), x)[0].any()
    y = fn(torch.full(SHAPES[name], float("inf")), 1.0, True)
    assert y.isnan().all() and F.dropout(torch.tensor(float("inf")), 1.0).isnan()


def test_the_default_is_torchs():
    x = torch.ones(SHAPES["dropout3d"][:3])
    for name in SHAPES:
        identity = name in ("alpha_dropout", "feature_alpha_dropout")
        t = torch.ones(SHAPES[name])
        assert (getattr(f, name)(t) is t) == identity
    assert set(f.dropout(x).unique().tolist()) == {0.0, 2.0}


@each
def test_manual_seed_governs(name):
    fn, x = getattr(f, name), torch.randn(SHAPES[name])
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append((fn(x, 0.5, True), fn(x, 0.5, True)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert not torch.equal(*results[0]) and not torch.equal(results[0][0], results[2][0])


@each
def test_in_place(name):
    fn = getattr(f, name)
    x = torch.randn(SHAPES[name], requires_grad=True)
    torch.manual_seed(5)
    want = fn(x * 1.0, 0.5, True)
    h = x * 1.0
    torch.manual_seed(5)
    y = fn(h, 0.5, True, True)
    assert y is h and torch.equal(y, want)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(want.sum(), x)[0])
    with pytest.raises(RuntimeError, match="leaf"):
        fn(x, 0.5, True, True)


def test_unbatched_channels():
    for fn, shape in ((f.dropout1d, (200, 6)), (f.dropout3d, (200, 2, 3, 4)), (f.dropout2d, (20, 30, 4))):
        y = fn(torch.ones(shape)).flatten(2 if fn is f.dropout2d else 1)
        assert (y == y[..., :1]).all() and len(y.unique()) == 2


def test_layout_stays_and_the_mask_goes_by_index():
    x = torch.randn(4, 6, 8, 10)
    for fn in (f.dropout, f.dropout2d):
        torch.manual_seed(0)
        want = fn(x)
        torch.manual_seed(0)
        y = fn(x.to(memory_format=torch.channels_last))
        assert torch.equal(y, want) and y.is_contiguous(memory_format=torch.channels_last)


def test_large_goes_in_blocks():
    """The plain form under create_graph and the blocked one give the same bits."""
    x = torch.randn(3, 400_001, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        y = f.dropout(x.to(dtype), 0.2)
        g = torch.ones_like(y)
        (plain,) = torch.autograd.grad(y, x, g, create_graph=True)
        (blocked,) = torch.autograd.grad(y, x, g)
        assert torch.equal(plain, blocked)
        torch.testing.assert_close(y, (x.detach() * blocked).to(dtype), rtol=1e-2 if dtype.itemsize == 2 else 1e-6, atol=0)


# --- transforms


@each
def test_vmap_randomness(name):
    fn = getattr(f, name)
    x = torch.ones(6, *SHAPES[name], dtype=torch.float64)

    def loss(x):
        y = fn(x, 0.5, True)
        return (y * y).sum(), y

    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: fn(x, 0.5, True))(x)
    for randomness_, same in (("same", True), ("different", False)):
        dx, y = vmap(grad(loss, has_aux=True), randomness=randomness_)(x)
        assert all(torch.equal(y[0], t) == same for t in y[1:])
        factor = torch.where(y == y.max(), y.max(), 0) if "alpha" not in name else None
        if factor is not None:
            torch.testing.assert_close(dx, 2 * y * factor)
        else:
            a = (0.5 * (1 + 0.5 * 1.7580993408473766**2)) ** -0.5
            torch.testing.assert_close(dx, 2 * y * torch.where(y > 0, a, 0))
    unbatched = vmap(lambda _: fn(x[0], 0.5, True), randomness="different")(torch.zeros(3))
    assert unbatched.shape == (3, *SHAPES[name]) and not torch.equal(unbatched[0], unbatched[1])


def test_vmap_in_place():
    y = vmap(lambda x: f.dropout(x * 1.0, inplace=True), randomness="same")(torch.ones(4, 5))
    assert torch.equal(y[0], y[3])


@pytest.mark.parametrize("name, backend", [*((name, "aot_eager") for name in SHAPES), ("dropout", "inductor")])
def test_compiled(name, backend):
    """A graph without breaks, new numbers in every call, and a backward that replays them."""
    torch._dynamo.reset()
    step = torch.compile(lambda x: getattr(f, name)(x, 0.5, True), fullgraph=True, backend=backend)
    x = torch.ones(SHAPES[name], requires_grad=True)
    ys = [step(x) for _ in range(2)]
    assert not torch.equal(*ys)
    for y in ys:
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert torch.equal(dx != 0, y > 0) and 0.3 < float((y > 0).double().mean()) < 0.7


def test_checkpoint_replays():
    x = torch.randn(50, 40, requires_grad=True)
    results = []
    for kw in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        torch.manual_seed(9)
        x.grad = None
        y = _block(x) if kw is None else checkpoint(_block, x, **kw)
        y.sum().backward()
        results.append((y.detach(), x.grad))
    for y, dx in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(dx, results[0][1])


def _block(x):
    return f.dropout(x.sin(), 0.5).square()


# --- modules and errors


MODULES = ["Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout"]


@pytest.mark.parametrize("cls, name", list(zip(MODULES, SHAPES)), ids=str)
def test_modules(cls, name):
    ours, theirs = getattr(bp.nn, cls)(0.3), getattr(nn, cls)(0.3)
    assert isinstance(ours, type(theirs)) and repr(ours) == repr(theirs) and not ours.state_dict()
    x = torch.randn(SHAPES[name])
    swapped = copy.deepcopy(theirs)
    assert bp.swap(swapped).swapped == {"": f"op {name}"}
    for m in (ours, swapped, pickle.loads(pickle.dumps(ours))):
        assert m.train()(x).shape == x.shape and not torch.equal(m(x), x)
        assert m.eval()(x) is x
    ours.backend = "triton"
    with pytest.raises(ValueError, match="triton"):
        ours(x)


@each
def test_errors(name):
    fn, x = getattr(f, name), torch.ones(SHAPES[name])
    for p in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"{name}: p={p}"):
            fn(x, p, True)
    with pytest.raises(TypeError, match=rf"{name}: input is torch.int64"):
        fn(x.long(), 0.5, True)
    with pytest.raises(TypeError, match=rf"{name}: input must be a tensor, not list"):
        fn([1.0])
    with pytest.raises(ValueError, match=rf"{name}: backend='cuda' is not known"):
        fn(x, 0.5, True, backend="cuda")
    if name not in ("dropout", "alpha_dropout"):
        with pytest.raises(ValueError, match=rf"{name}: input has shape \(3,\)"):
            fn(torch.ones(3), 0.5, True)
    if name in ("dropout2d", "dropout3d"):
        with pytest.warns(UserWarning, match=rf"{name}: input has 2 dimensions"):
            fn(torch.ones(3, 4), 0.5, True)
    if name == "dropout1d":
        with pytest.raises(ValueError, match=r"dropout1d: input has shape \(1, 2, 3, 4\)"):
            fn(torch.ones(1, 2, 3, 4))
