"""The diagnosis: every usual mistake, made on purpose, is named first; what is no usual mistake is not guessed at."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import bptoolkit as bp
from bptoolkit.verify.diagnosis import Finding, diagnose
from bptoolkit.verify.point import Point

SIZES = (("B", 4), ("I", 6), ("O", 5))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def found(change, dtype=torch.float64, sizes=SIZES, **more):
    """The gradient of w of a linear layer after a change: change(right gradient, x, w, dy) -> what the mistake gives."""
    b, i, o = (n for _, n in sizes)
    x, w, dy = normal(b, i, seed=1), normal(o, i, seed=2), normal(b, o, seed=3)
    want = dy.T @ x
    right = {"inputs": {"x": x, "w": w}, "outputs": (x @ w.T,), "cotangents": (dy,), "gradients": {"x": dy @ w, "w": want}}
    return Finding("gradient of w", change(want, x, w, dy).to(dtype), want, point=Point(sizes), **(right | more))


def first(finding):
    guesses = diagnose(finding)
    assert len(guesses) <= 3
    return guesses[0] if guesses else "no guess"


MISTAKES = {
    "mean for sum": (
        lambda g, x, w, dy: g / 4,
        "w's gradient equals the expected one divided by 4, the batch size B: mean instead",
    ),
    "sum for mean": (lambda g, x, w, dy: g * 4, "times 4, the batch size B: sum instead of mean?"),
    "mean over all": (lambda g, x, w, dy: g / 20, "divided by 20, the number of elements of the output: mean instead of sum?"),
    "size of another letter": (lambda g, x, w, dy: g / 6, "divided by 6, the size I"),
    "sign": (lambda g, x, w, dy: -g, "with the wrong sign"),
    "sign and mean": (
        lambda g, x, w, dy: -g / 4,
        "divided by 4, the batch size B: mean instead of sum? (and with the wrong sign)",
    ),
    "twice": (lambda g, x, w, dy: 2 * g, "times 2"),
    "half": (lambda g, x, w, dy: g / 2, "2"),
    "scale": (lambda g, x, w, dy: g / 6**0.5, "divided by the root of 6, the size I"),
    "a constant of its own": (lambda g, x, w, dy: 0.731 * g, "times 0.731: a constant factor"),
    "zero": (lambda g, x, w, dy: 0 * g, "zero everywhere"),
    "transposed memory": (lambda g, x, w, dy: g.mT.reshape(g.shape), "transposed"),
    "next row": (lambda g, x, w, dy: g.roll(1, 0), "shifted by +1 along dimension 0"),
    "previous column, zero filled": (
        lambda g, x, w, dy: torch.cat((g[:, 1:], torch.zeros_like(g[:, :1])), 1),
        "shifted by -1 along dimension 1",
    ),
    "reversed": (lambda g, x, w, dy: g.flip(0), "in reverse order along dimension 0"),
    "running sum": (lambda g, x, w, dy: g.cumsum(0), "running sum"),
    "the input": (lambda g, x, w, dy: w, "equals w"),
    "plus a constant": (lambda g, x, w, dy: g + 0.25, "plus the constant 0.25"),
    "weight decay left in": (lambda g, x, w, dy: g + 0.01 * w, "has the term 0.01 × w too much"),
    "last row": (lambda g, x, w, dy: torch.cat((g[:-1], 0 * g[-1:])), "zero in row 4 (the last): the last row is left out"),
    "first column": (
        lambda g, x, w, dy: torch.cat((0 * g[:, :1], g[:, 1:]), 1),
        "zero in column 0 (the first): the first column is left out",
    ),
    "NaN": (lambda g, x, w, dy: g.clone().index_fill_(0, torch.tensor([2]), float("nan")), "is NaN in row 2"),
    "bfloat16 inside": (lambda g, x, w, dy: (dy.bfloat16().T @ x.bfloat16()).double(), "is a bfloat16 number"),
    "unscaled rows": (lambda g, x, w, dy: g * normal(5, 1, seed=8).exp(), "a scale of each slice is missing"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_usual_mistake_is_named_first(mistake):
    change, said = MISTAKES[mistake]
    assert said in first(found(change))


@pytest.mark.parametrize("n, size", [(33, 32), (17, 16), (65, 64), (129, 128), (200, 128), (70, 64)])
def test_the_tail_of_a_block(n, size):
    sizes = (("B", 3), ("I", 6), ("O", n))
    guess = first(found(lambda g, x, w, dy: torch.cat((g[:size], 0 * g[size:])), sizes=sizes))
    assert f"beyond the last whole block of {size}" in guess and "zero" in guess and f"{size}" in guess


def test_a_boundary_that_is_no_tail_is_not_called_one():
    sizes = (("B", 3), ("I", 6), ("O", 65))
    guess = first(found(lambda g, x, w, dy: torch.cat((g[:16], 0 * g[16:])), sizes=sizes))
    assert "rows 16-64" in guess and "last whole block" not in guess


def test_a_factor_is_named_in_low_precision_too():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert "divided by 4, the batch size B" in first(found(lambda g, x, w, dy: g / 4, dtype))


def test_two_explanations_of_one_number_are_both_given():
    """At B = 2 a mean and a missing factor look alike: the size must not be hidden by the constant."""
    assert "the batch size B" in first(found(lambda g, x, w, dy: g / 2, sizes=(("B", 2), ("I", 3), ("O", 4))))


def test_leading_sizes_are_a_batch_too():
    x = normal(2, 3, 4, seed=1)
    want = normal(4, seed=2)
    finding = Finding("gradient of b", want / 6, want, inputs={"x": x}, point=Point((("*B", "2x3"), ("I", 4))))
    assert "divided by 6, the batch size" in first(finding)


def test_swapped_gradients():
    a, b = normal(4, 4, seed=1), normal(4, 4, seed=2)
    finding = Finding("gradient of q", b, a, gradients={"q": a, "k": b})
    assert first(finding) == "q's gradient equals the expected gradient of k: swapped?"


def test_the_cotangent_passed_through():
    x, dy = normal(4, 5, seed=1), normal(4, 5, seed=2)
    finding = Finding("gradient of x", dy, dy * x.cos(), inputs={"x": x}, outputs=(x.sin(),), cotangents=(dy,))
    assert "equals the cotangent: passed through" in first(finding)


def test_missing_sum_of_softmax():
    x, dy = normal(4, 6, seed=1), normal(4, 6, seed=2)
    y = x.softmax(-1)
    want = y * (dy - (dy * y).sum(-1, keepdim=True))
    finding = Finding(
        "gradient of x", y * dy, want, inputs={"x": x}, outputs=(y,), cotangents=(dy,), point=Point((("B", 4), ("I", 6)))
    )
    guess = first(finding)
    assert "output" in guess and "sum" in guess


def test_missing_mean_of_layer_norm():
    x, dy = normal(4, 8, seed=1), normal(4, 8, seed=2)
    x.requires_grad_()
    (want,) = torch.autograd.grad(F.layer_norm(x, (8,)), x, dy)
    got = want + dy.mean(-1, keepdim=True) / x.detach().std(-1, keepdim=True, correction=0)
    finding = Finding("gradient of x", got, want, inputs={"x": x.detach()}, cotangents=(dy,))
    assert "constant along the last dimension" in first(finding)


def test_a_weight_left_out():
    x, g, dy = normal(7, 6, seed=1), normal(6, seed=2), normal(7, 6, seed=3)
    finding = Finding("gradient of x", dy.cos() * 1.0, dy.cos() * g, inputs={"x": x, "g": g}, cotangents=(dy,))
    assert first(finding) == "x's gradient is the expected one, but not multiplied by g"


def test_shapes_not_summed_or_summed_too_far():
    big = normal(4, 5, seed=1)
    assert "is not summed over the dimensions that were broadcast" in first(Finding("gradient of b", big, big.sum(0)))
    assert "is summed over dimensions that were not broadcast" in first(Finding("gradient of x", big.sum(0), big))
    assert "transposed" in first(Finding("gradient of w", big.T, big))
    assert "right values in the wrong shape" in first(Finding("gradient of w", big.reshape(-1), big))


def relu_at_kinks():
    x, dy = normal(5, 6, seed=1), normal(5, 6, seed=2)
    x[1, 2] = x[3, 4] = x[4, 0] = 0
    want = torch.where(x > 0, dy, 0)
    return x, dy, want


def test_a_kink():
    x, dy, want = relu_at_kinks()
    got = torch.where(x >= 0, dy, 0)
    guess = first(Finding("gradient of x", got, want, inputs={"x": x}, cotangents=(dy,)))
    assert "where x is 0" in guess


def test_overflow_where_the_input_is_large():
    x = torch.linspace(-200, 1000, 13, dtype=torch.float64).view(13, 1).expand(13, 3) + normal(13, 3)
    want = torch.sigmoid(x)
    got = torch.where(x > 709, float("nan"), want)
    guess = first(Finding("gradient of x", got, want, inputs={"x": x}))
    assert "is NaN" in guess and "|x|" in guess and "overflow" in guess


def test_one_wrong_element_is_not_blamed_on_a_value():
    """Of one wrong element some input is always the largest or the smallest: that says nothing."""
    for k in range(12):
        x = normal(3, 4, seed=5)
        want = normal(3, 4, seed=6)
        got = want.clone()
        got.view(-1)[k] += 1.37
        guesses = diagnose(Finding("gradient of x", got, want, inputs={"x": x}))
        assert not any("|x|" in g for g in guesses), guesses


def linear_rerun(wrong_when):
    """A finding with a `rerun`: the gradient of x of a product by w, doubled where `wrong_when(dy)` is true."""

    def make(dy):
        x, w = normal(5, 6, seed=1), normal(5, 6, seed=2)
        run = lambda cotangents=(dy,), **_: [c * w * (3.3 * w if wrong_when(c) else 1) for c in cotangents] + [None]  # noqa: E731
        return Finding("gradient of x", run()[0], dy * w, inputs={"x": x, "w": w}, cotangents=(dy,), rerun=run)

    return make


def test_reads_past_strides():
    finding = linear_rerun(lambda c: not c.is_contiguous())(normal(1, 6, seed=3).expand(5, 6))
    assert first(finding) == "right when contiguous, wrong when the cotangent is expanded: reads past strides"
    finding = linear_rerun(lambda c: not c.is_contiguous())(normal(6, 5, seed=3).T)
    assert first(finding) == "right when contiguous, wrong when the cotangent is not contiguous: reads past strides"
    finding = linear_rerun(lambda c: True)(normal(6, 5, seed=3).T)
    assert not any("strides" in g for g in diagnose(finding))


def rounds(to):
    """A product by w whose cotangent and product are rounded, w first."""

    def make(dy, w):
        return (dy * w.to(to).double()).to(to).double() * 3 + dy.to(to).double()

    return make


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_inside(to):
    w, dy = normal(5, 6, seed=2), normal(5, 6, seed=3)
    run = rounds(to)
    finding = Finding(
        "gradient of x",
        run(dy, w),
        3 * dy * w + dy,
        inputs={"x": w},
        cotangents=(dy,),
        rerun=lambda cotangents, **_: [run(cotangents[0], w)],
    )
    assert f"the rounding of {str(to)[6:]}" in first(finding)


def test_a_small_error_of_a_formula_is_not_called_rounding():
    """A wrong formula is wrong by the same share for every cotangent; rounding is not."""
    x, dy = normal(5, 6, seed=2), normal(5, 6, seed=3)
    slope = lambda c: c * (x.cos() + 3e-3 * x.tanh())  # noqa: E731
    finding = Finding(
        "gradient of x",
        slope(dy),
        dy * x.cos(),
        inputs={"x": x},
        cotangents=(dy,),
        rerun=lambda cotangents, **_: [slope(cotangents[0])],
    )
    assert not any("rounding" in g or "precision" in g for g in diagnose(finding))


def attention(q, k, v):
    return torch.softmax(q @ k.T / 2, -1) @ v


def mistaken(change, name="q"):
    """The gradient of an attention whose backward sees a changed call: change(q, k, v, dy) -> the four it sees."""
    inputs = {"q": normal(20, 4, seed=1), "k": normal(20, 4, seed=2), "v": normal(20, 4, seed=3)}
    dy = normal(20, 4, seed=4)

    def truth(xs, cotangents):
        xs = [x.detach().requires_grad_() for x in xs]
        return torch.autograd.grad(attention(*xs), xs, cotangents[0])

    *seen, given = change(*inputs.values(), dy)
    place = list(inputs).index(name)
    gradients = dict(zip(inputs, truth(list(inputs.values()), [dy])))
    got = truth(seen, [given])[place]
    return Finding(
        f"gradient of {name}", got, gradients[name], None, inputs, (attention(*inputs.values()),), (dy,), gradients, truth=truth
    )


def keep(t, rows):
    kept = torch.zeros_like(t)
    kept[rows] = t[rows]
    return kept


CALLS = {
    "tail left out": (
        lambda q, k, v, dy: (q, k, v, keep(dy, slice(16))),
        "v",
        "without the rows of the cotangent beyond the last whole block of 16",
    ),
    "last row left out": (lambda q, k, v, dy: (q, k, v, keep(dy, slice(19))), "v", "without the last row of the cotangent"),
    "the first row for all": (
        lambda q, k, v, dy: (q, k, v, dy[:1].expand_as(dy)),
        "q",
        "with the first row of the cotangent in the place of all",
    ),
    "ones": (lambda q, k, v, dy: (q, k, v, torch.ones_like(dy)), "v", "for a cotangent of ones: ignores it"),
    "a step late": (lambda q, k, v, dy: (q, k, v, dy.roll(1, 0)), "v", "with the cotangent shifted by +1 along dimension 0"),
    "saved in the wrong order": (lambda q, k, v, dy: (k, q, v, dy), "q", "with q and k exchanged: saved in the wrong order?"),
    "saved in bfloat16": (lambda q, k, v, dy: (q.bfloat16().double(), k, v, dy), "k", "with q rounded to bfloat16"),
    "k left out": (lambda q, k, v, dy: (q, torch.ones_like(k), v, dy), "v", "with ones in the place of k: k is left out"),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_gradient_of_another_call(call):
    change, name, said = CALLS[call]
    assert said in first(mistaken(change, name))


def test_sizes_that_matter():
    dy = normal(1, 5)
    for n, said in ((1, "wrong when B is 1, a dimension of size one"), (17, "wrong at B = 17: past a block of 16?")):
        finding = Finding("gradient of x", dy + normal(1, 5, seed=2), dy, point=Point((("B", n),)), matters=("sizes:B",))
        assert said in " ".join(diagnose(finding))


def test_a_cotangent_that_is_ignored():
    x, dy = normal(5, 6, seed=1), normal(5, 6, seed=2)
    finding = Finding(
        "gradient of x", x.cos(), dy * x.cos(), inputs={"x": x}, cotangents=(dy,), rerun=lambda cotangents=(), **_: [x.cos()]
    )
    assert "does not change with the cotangent" in " ".join(diagnose(finding))


def test_a_rerun_that_raises_hides_nothing():
    def refuses(**_):
        raise AssertionError("not like this")

    dy = normal(6, 5, seed=3).T
    finding = Finding("gradient of x", -dy, dy, inputs={"x": normal(5, 6)}, cotangents=(dy,), rerun=refuses)
    assert "wrong sign" in " ".join(diagnose(finding))


def test_an_output_is_not_compared_with_itself():
    x = normal(4, 5)
    guesses = diagnose(Finding("output", x.sin() + x.cos() ** 3, x.sin(), inputs={"x": x}, outputs=(x.sin() + x.cos() ** 3,)))
    assert not any("equals the output" in g for g in guesses), guesses
    assert "the output equals x" in first(Finding("output", x, x.sin(), inputs={"x": x}, outputs=(x,)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_no_usual_mistake_is_not_guessed_at(dtype):
    """Errors without a pattern, dense or at random places, of any size above the rounding: no guess but where they sit."""
    for seed in range(40):
        wild = normal(5, 6, seed=100 + seed)
        for finding in (
            found(lambda g, x, w, dy: wild, dtype),  # noqa: B023
            found(lambda g, x, w, dy: g + 0.3 * wild, dtype),  # noqa: B023
            found(lambda g, x, w, dy: g + wild * (wild.abs() > 1.5), dtype),  # noqa: B023
        ):
            guesses = [g for g in diagnose(finding) if " in part of " not in g]
            assert not guesses, (seed, guesses)


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (2,), (1, 1, 1)])
def test_sizes_that_decide_nothing(shape):
    want = normal(*shape)
    assert diagnose(Finding("gradient of x", want * 0.731 + 0.1, want, inputs={"x": normal(*shape, seed=3)})) == []


def test_the_report_of_a_check_carries_the_diagnosis():
    class Mine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x @ w.T

        @staticmethod
        def backward(ctx, dy):
            x, w = ctx.saved_tensors
            return dy @ w, dy.T @ x / x.shape[0]

    report = bp.verify.check(
        Mine, "x: B I, w: O I -> B O", reference=F.linear, properties=["gradient_value"], quick=True, examples=0
    )
    (failure,) = report.failures
    assert "the batch size B: mean instead of sum?" in failure.diagnosis[0] and "w's gradient" in failure.diagnosis[0]
    assert "looks like" in str(report) and failure.heat_map in "\n".join(r.strip() for r in [failure.heat_map])
