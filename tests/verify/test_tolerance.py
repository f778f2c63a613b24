"""The error model: correct implementations pass in every dtype, and planted errors are seen."""

import math

import pytest
import torch
import torch.nn.functional as F
from judging import DTYPES, LOW, blocked_linear, drawn, pulled, rms_norm, up, verdicts

from bptoolkit.verify.tolerance import Noise, compare, noise


def softmax(x):
    return F.softmax(x, -1)


def layer_norm(x, w, b):
    return F.layer_norm(x, x.shape[-1:], w, b)


def attention(q, k, v):
    return softmax(q @ k.mT / q.shape[-1] ** 0.5) @ v


# Other formulas for the same functions, with wide accumulators, as fused kernels have.


def exp2_softmax(x):
    e = torch.exp2((up(x) - up(x).amax(-1, keepdim=True)) * 1.4426950408889634)
    return (e / e.sum(-1, keepdim=True)).to(x.dtype)


def two_pass_layer_norm(x, w, b):
    d = up(x) - up(x).sum(-1, keepdim=True) / x.shape[-1]
    var = (d * d).sum(-1, keepdim=True) / x.shape[-1]
    return (d * torch.rsqrt(var + 1e-5) * up(w) + up(b)).to(x.dtype)


def one_pass_layer_norm(x, w, b):
    wide = up(x)
    mean = wide.mean(-1, keepdim=True)
    var = (wide * wide).mean(-1, keepdim=True) - mean * mean
    return ((wide - mean) * torch.rsqrt(var + 1e-5) * up(w) + up(b)).to(x.dtype)


def wide_attention(q, k, v):
    return F.scaled_dot_product_attention(up(q), up(k), up(v)).to(q.dtype)


def online_logsumexp(x):
    wide = up(x)
    m = wide[..., :1].detach()
    s = torch.exp(wide[..., :1] - m)
    for j in range(1, x.shape[-1]):
        new = torch.maximum(m, wide[..., j : j + 1]).detach()
        s = s * torch.exp(m - new) + torch.exp(wide[..., j : j + 1] - new)
        m = new
    return (m + s.log()).squeeze(-1).to(x.dtype)


def gelu_by_erfc(x):
    return (0.5 * up(x) * torch.erfc(-up(x) * 0.7071067811865476)).to(x.dtype)


SIZES = (1, 2, 3, 17, 64)
ALTERNATIVES = {
    "blocked linear": (F.linear, blocked_linear, lambda n, m: [(n, m), (m, m), (m,)]),
    "exp2 softmax": (softmax, exp2_softmax, lambda n, m: [(n, m)]),
    "two-pass layer_norm": (layer_norm, two_pass_layer_norm, lambda n, m: [(n, m), (m,), (m,)]),
    "one-pass layer_norm": (layer_norm, one_pass_layer_norm, lambda n, m: [(n, m + 2), (m + 2,), (m + 2,)]),
    "wide attention": (attention, wide_attention, lambda n, m: [(2, n, 8), (2, m, 8), (2, m, 8)]),
    "online logsumexp": (lambda x: x.logsumexp(-1), online_logsumexp, lambda n, m: [(n, m)]),
    "gelu by erfc": (F.gelu, gelu_by_erfc, lambda n, m: [(n, m)]),
}
NATIVE = {
    "linear": (F.linear, lambda n, m: [(n, m), (m, m), (m,)]),
    "softmax": (softmax, lambda n, m: [(n, m)]),
    "log_softmax": (lambda x: F.log_softmax(x, -1), lambda n, m: [(n, m)]),
    "rms_norm": (rms_norm, lambda n, m: [(n, m), (m,)]),
    "gelu": (F.gelu, lambda n, m: [(n, m)]),
    "silu": (F.silu, lambda n, m: [(n, m)]),
    "mish": (F.mish, lambda n, m: [(n, m)]),
    "tanh": (torch.tanh, lambda n, m: [(n, m)]),
    "softplus": (F.softplus, lambda n, m: [(n, m)]),
    "hardswish": (F.hardswish, lambda n, m: [(n, m)]),
    "mse_loss": (F.mse_loss, lambda n, m: [(n, m), (n, m)]),
    "conv1d": (
        lambda x, w: F.conv1d(x, w, padding=1),
        lambda n, m: [(min(n, 3), 3, m), (4, 3, 3)],
    ),  # torch sums larger batches in float16
    "relu between linears": (lambda x, w, v: F.relu(x @ w) @ v, lambda n, m: [(n, m), (m, m), (m, n)]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALTERNATIVES)
def test_other_formulas_pass(name, dtype):
    reference, candidate, shapes = ALTERNATIVES[name]
    for seed in range(25):
        n, m = SIZES[seed % 5], SIZES[(seed // 5) % 5]
        found = verdicts(
            reference, candidate, drawn(reference, shapes(n, m), dtype, seed, (1.0, 5.0, 1e-2)[seed % 3]), dtype, seed
        )
        assert found == [None] * len(found), (seed, [str(v) for v in found])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NATIVE)
def test_torch_itself_passes_by_the_model_alone(name, dtype):
    reference, shapes = NATIVE[name]
    flagged = 0
    for seed in range(20):
        n, m = SIZES[seed % 5], SIZES[(seed // 4) % 5]
        found = verdicts(reference, reference, drawn(reference, shapes(n, m), dtype, seed), dtype, seed, native=False)
        flagged += any(v is not None for v in found)
    assert flagged == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.0, 0.3, 50.0])
def test_equal_values_round_alike(value, dtype):
    """A constant row makes the same error in all of its elements; that is one error, not many."""
    for seed in range(20):
        (x, dy), f = (torch.full((33, 33), value + seed / 7, dtype=dtype), torch.randn(33, 33).to(dtype)), softmax
        found = verdicts(f, exp2_softmax, [x, dy], dtype, seed, native=False)
        assert found == [None, None], [str(v) for v in found]


def linear_case(dtype, seed, n=64, m=32):
    tensors = drawn(F.linear, [(n, m), (m, m), (m,)], dtype, seed)
    scales = noise(pulled(F.linear, 3), tensors, dtype, seed=seed)
    return scales[2], pulled(F.linear, 3)(tensors)[2]


def seen(fault, dtype, seeds=10, **kw):
    found = 0
    for seed in range(seeds):
        scale, dw = linear_case(dtype, seed, **kw)
        assert compare(dw, scale, dtype, dw) is None
        found += compare(fault(dw.double()).to(dtype), scale, dtype, dw) is not None
    return found


def one_wrong(t):
    t = t.clone()
    t[3, 5] += 0.5 * t.abs().max()
    return t


def zeroed_row(t):
    t = t.clone()
    t[-1] = 0
    return t


def swapped(t):
    t = t.clone()
    a, b = int(t.argmax()), int(t.argmin())
    flat = t.view(-1)
    flat[a], flat[b] = flat[b].clone(), flat[a].clone()
    return t


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "fault", [one_wrong, zeroed_row, swapped, torch.zeros_like, lambda t: -t, lambda t: t.mT, lambda t: t * 1.1]
)
def test_gross_errors_are_seen(fault, dtype):
    assert seen(fault, dtype) == 10


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [1.01, 1.005])
def test_a_factor_is_seen_far_below_one_element(factor, dtype):
    assert seen(lambda t: t * factor, dtype) >= 9


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 2), (17, 33), (128, 64)])
@pytest.mark.parametrize(("error", "least"), [(1e-6, 10), (1e-9, 9)])
def test_float64_is_tight(error, least, size):
    n, m = size
    assert seen(lambda t: t * (1 + error), torch.float64, n=n, m=m) >= least


def test_float64_sees_one_element():
    def fault(t):
        t = t.clone()
        k = t.abs().argmax()
        t.view(-1)[k] *= 1 + 1e-6
        return t

    assert seen(fault, torch.float64) == 10


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_sums_in_low_precision_are_seen(dtype):
    """A weight gradient summed over a batch of 256 in the dtype itself."""
    found = 0
    for seed in range(6):
        tensors = drawn(F.linear, [(256, 8), (8, 8), (8,)], dtype, seed)
        scale = noise(pulled(F.linear, 3), tensors, dtype, seed=seed)[2]
        dw = torch.zeros(8, 8, dtype=dtype)
        for row, dy in zip(tensors[0], tensors[3]):
            dw = dw + dy[:, None] * row[None]
        found += compare(dw, scale, dtype, pulled(F.linear, 3)(tensors)[2]) is not None
    assert found == 6


def test_truncation_is_seen():
    found = 0
    for seed in range(6):
        scale, dw = linear_case(torch.bfloat16, seed, n=64, m=64)
        cut = (scale.exact.float().view(torch.int32) & ~0xFFFF).view(torch.float32).to(torch.bfloat16)
        found += compare(cut, scale, torch.bfloat16, dw) is not None
    assert found == 6


# Kinks.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("f", "at"), [(F.relu, 0.0), (F.hardtanh, 1.0), (F.hardswish, 3.0), (lambda x: F.softshrink(x, 0.5), 0.5), (torch.abs, 0.0)]
)
def test_a_wrong_subgradient_at_an_exact_kink_is_seen(f, at, dtype):
    x = torch.linspace(-4, 4, 33, dtype=torch.float64).to(dtype)
    x[::4] = at
    dy = torch.randn(33, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    (_, scale), (_, dx) = noise(pulled(f, 1), [x, dy], dtype), pulled(f, 1)([x, dy])
    assert compare(dx, scale, dtype) is None
    assert scale.excluded is None or not scale.excluded[::4].any()
    wrong = dx.clone()
    wrong[::4] += dy[::4]  # a subgradient that is 1 off
    assert compare(wrong, scale, dtype).statistic == "max"
    assert float(scale.sigma.max()) < 64 * torch.finfo(dtype).eps  # no jump left its size behind


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_kink_of_a_computed_value_is_not_judged(dtype):
    """A constant row minus its mean is 0 up to rounding: on which side of the corner of relu, rounding decides."""
    x = torch.tensor([[0.7] * 5, [-1.0, 2.0, 0.5, 3.0, -4.0]]).to(dtype)
    dy = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    _, scale = noise(pulled(lambda x: F.relu(x - x.mean(-1, keepdim=True)), 1), [x, dy], dtype)
    assert scale.excluded[0].any() and not scale.excluded[1].any()
    assert float(scale.sigma[1].max()) < 64 * torch.finfo(dtype).eps


def test_preactivations_within_rounding_of_zero_are_not_judged():
    for seed in range(10):
        shapes = [(64, 64), (64, 64), (64, 8)]
        found = verdicts(
            lambda x, w, v: F.relu(x @ w) @ v,
            lambda x, w, v: (F.relu(x.float() @ w.float()) @ v.float()).to(x.dtype),
            drawn(lambda x, w, v: x @ w @ v, shapes, torch.bfloat16, seed),
            torch.bfloat16,
            seed,
            native=False,
        )
        assert found == [None] * 4, [str(v) for v in found]


# Non-finite values, zeros, sizes.


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_of_infinities_leaves_sigma_finite(dtype):
    """-inf is what a mask writes; perturbed it has to stay -inf, or everything behind it would pass."""
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)

    def causal(q, k):
        return softmax((q @ k.mT).masked_fill(hidden, -math.inf))

    tensors = drawn(causal, [(3, 5, 4), (3, 5, 4)], dtype, 0)
    for scale in noise(pulled(causal, 2), tensors, dtype):
        assert bool(scale.sigma.isfinite().all()) and scale.excluded is None
    dropped = [t.clone() for t in pulled(causal, 2)(tensors)]
    dropped[2][:, -1] = 0
    assert compare(dropped[2], noise(pulled(causal, 2), tensors, dtype)[2], dtype) is not None


def test_nonfinite_values():
    def judge(got, exact, dtype=torch.float16, native=None):
        exact = torch.tensor(exact, dtype=torch.float64)
        found = compare(torch.tensor(got).to(dtype), Noise(exact, exact.abs().nan_to_num(0, 0, 0) * 1e-3, None), dtype, native)
        return found and (found.statistic, found.gross)

    inf, nan = math.inf, math.nan
    assert judge([1.0, nan], [1.0, 2.0]) == ("nonfinite", True)
    assert judge([1.0, inf], [1.0, 2.0]) == ("nonfinite", True)
    assert judge([1.0, inf], [1.0, 7e4]) is None  # not representable
    assert judge([1.0, inf], [1.0, 7e4], torch.float32) == ("nonfinite", True)
    assert judge([1.0, inf], [1.0, inf]) is None
    assert judge([1.0, 5.0], [1.0, inf]) == ("nonfinite", True)
    assert judge([1.0, -inf], [1.0, inf]) == ("nonfinite", True)
    assert judge([1.0, inf], [1.0, 2.0], native=torch.tensor([1.0, inf]).half()) is None  # torch itself overflows
    assert judge([1.0, nan], [1.0, nan]) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_of_zeros_never_passes(dtype):
    for size in ((1,), (2,), (1000,)):
        (_, scale) = noise(
            pulled(torch.tanh, 1), [torch.full(size, 0.5, dtype=dtype), torch.full(size, 1e-2, dtype=dtype)], dtype
        )
        found = compare(torch.zeros(size, dtype=dtype), scale, dtype)
        assert found.statistic == "zero" and found.gross and "all zeros" in str(found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_and_empty_tensors(dtype):
    for size in ((0,), (3, 0), (), (1,)):
        x = torch.zeros(size, dtype=dtype)
        assert verdicts(F.gelu, F.gelu, [x, x], dtype) == [None, None]
    scale = noise(lambda ts: [ts[0] * 0], [torch.ones(3, dtype=dtype)], dtype)[0]
    assert compare(torch.full((3,), torch.finfo(dtype).tiny * torch.finfo(dtype).eps, dtype=dtype), scale, dtype) is None
    assert compare(torch.tensor([0.0, 1e-3, 0.0]).to(dtype), scale, dtype) is not None


def test_float16_underflow_is_rounding():
    x, dy = torch.tensor([1e-3, 2e-4]).half(), torch.tensor([1e-3, 1e-4]).half()
    found = verdicts(lambda x: x * x * 0.5, lambda x: 0.5 * x.square(), [x, dy], torch.float16, native=False)
    assert found == [None, None]


def test_what_a_formula_in_use_loses_in_its_tail_passes():
    """silu by tanh: 0.5 + 0.5 tanh(x/2) is 0 where the sigmoid is 1e-16."""
    x, dy = torch.tensor([-40.0, -36.0, 1.0]).double(), torch.tensor([0.0, 1.0, 0.0]).double()
    assert verdicts(F.silu, lambda x: x * (0.5 + 0.5 * torch.tanh(x / 2)), [x, dy], torch.float64) == [None, None]


def test_nan_where_torch_stays_finite_is_seen():
    """The formula of GELU's slope loses all digits at x = 1000 in float16, so that sigma is huge there; NaN is wrong still."""
    x, dy = torch.full((5,), 1000.0, dtype=torch.float16), torch.ones(5, dtype=torch.float16)
    f = pulled(lambda x: F.gelu(x, approximate="tanh"), 1)
    scale, native = noise(f, [x, dy], torch.float16)[1], f([x, dy])[1]
    assert float(scale.sigma.min()) > 1000
    assert compare(native, scale, torch.float16, native) is None
    assert compare(native * math.nan, scale, torch.float16, native).statistic == "nonfinite"


def test_the_sentence():
    scale, dw = linear_case(torch.bfloat16, 0)
    assert str(compare(one_wrong(dw), scale, torch.bfloat16)).startswith("largest error is ")
    assert "[3, 5]: got" in str(compare(one_wrong(dw), scale, torch.bfloat16))
    assert "off by a factor of 1.0" in str(compare((dw.double() * 1.008).bfloat16(), scale, torch.bfloat16, dw))
