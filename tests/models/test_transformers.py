"""Whole models of `transformers`, swapped: which parts run our backward, and that loss and gradients are the same."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch.func import functional_call

pytest.importorskip("transformers", reason="transformers is not installed; `make models` installs it")
sys.path.insert(0, str(Path(__file__).parent))

import record
from zoo import ALSO, ZOO, Exact, FastLlamaRMSNorm, build, count

import bptoolkit as bp
from bptoolkit.verify.tolerance import Verdict, compare, noise

pytestmark = pytest.mark.filterwarnings("ignore")


def results(model, inputs, parameters):
    """The loss, and its gradient by every parameter."""
    parameters = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    loss = functional_call(model, parameters, kwargs=inputs).loss
    return [loss, *torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)]


def swapped(name, seed=0, also=ALSO):
    model, inputs = build(name, seed)
    bp.swap(model, also=also, functions=True)
    return model, inputs


# --- float64


def differences(name, also):
    """The largest relative difference of every result that has any derivative, over the tensor's largest element."""
    (model, inputs), (ours, _) = build(name), swapped(name, also=also)
    names = ["loss", *(n for n, _ in model.named_parameters())]
    with bp.functional_calls(), Exact():
        got = results(ours, inputs, dict(ours.named_parameters()))
    with Exact():
        want = results(model, inputs, dict(model.named_parameters()))
    found = {}
    for n, a, b in zip(names, got, want, strict=True):
        assert (a is None) == (b is None), n
        if a is not None:
            assert a.dtype == b.dtype == torch.float64 and a.isfinite().all()
            scale = max(float(b.abs().max()), 1e-4)  # a gradient that is 0 up to rounding has no digits
            found[n] = float((a - b).abs().max()) / scale
    return found


@pytest.mark.parametrize("also", [{}, ALSO], ids=["torch's layers", "and the library's"])
@pytest.mark.parametrize("name", ZOO)
def test_float64_to_ten_digits(name, also):
    found = differences(name, also)
    assert found["loss"] <= 1e-10 and max(found.values()) <= 1e-10, {n: d for n, d in found.items() if d > 1e-10}
    assert len(found) > 10


# --- bfloat16, by the error model


def verdicts(name, seed, also=ALSO):
    """Per result: what is wrong with it, or None where rounding explains the difference from the exact one."""
    (model, inputs), (ours, _) = build(name, seed), swapped(name, seed, also)
    half = {n: p.bfloat16() for n, p in model.named_parameters()}
    given = {n: x.bfloat16() if x.is_floating_point() else x for n, x in inputs.items()}
    floats = [n for n, x in given.items() if x.is_floating_point()]

    def run(tensors):
        parameters = dict(zip(half, tensors))
        widened = dict(zip(floats, tensors[len(half) :]))
        with Exact():
            return results(model, {**inputs, **widened}, parameters)

    scales = noise(run, [*half.values(), *(given[n] for n in floats)], torch.bfloat16, seed=seed)
    got = results(ours.bfloat16(), given, half)
    native = results(model.bfloat16(), given, half)
    found: dict[str, Verdict | None] = {}
    for n, g, t, s in zip(["loss", *half], got, native, scales, strict=True):
        assert (g is None) == (s is None), n
        if s is not None:
            assert g.dtype == t.dtype
            found[n] = compare(g, s, torch.bfloat16, t)
    return found


def judged(name, also=ALSO):
    """The results that are wrong: certainly, or on two of four fresh draws as well."""
    found = {n: v for n, v in verdicts(name, 0, also).items() if v is not None}
    unsure = {n for n, v in found.items() if not v.gross}
    if unsure:
        fresh = [verdicts(name, seed, also) for seed in range(1, 5)]
        for n in unsure:
            if sum(f[n] is not None for f in fresh) < 2:
                del found[n]
    return {n: str(v) for n, v in found.items()}


@pytest.mark.parametrize("name", ZOO)
def test_bfloat16_within_rounding(name):
    assert judged(name) == {}


# --- the tests above can fail


class Detached(FastLlamaRMSNorm):
    """The root mean square taken for a constant: a plausible mistake, and invisible in the loss."""

    def forward(self, x):
        r = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.variance_epsilon).detach()
        return (self.weight * (x * r.to(x.dtype))).to(x.dtype)


def test_a_wrong_gradient_is_seen():
    wrong = {theirs: ours for theirs, ours in ALSO.items() if ours is not FastLlamaRMSNorm}
    wrong[FastLlamaRMSNorm.__mro__[1]] = Detached
    found = differences("Llama", wrong)
    assert found["loss"] <= 1e-10 < max(found.values())
    assert any(v is not None and v.gross for v in verdicts("Llama", 0, wrong).values())


# --- the table


@pytest.mark.parametrize("name", ZOO)
def test_most_of_each_model_is_ours(name):
    plain, also = count(name), count(name, ALSO)
    assert also.swapped >= plain.swapped and also.left.total() <= plain.left.total()
    assert also.calls["cross_entropy"] + also.calls["nll_loss"] == 1
    if plain.calls["scaled_dot_product_attention"]:
        assert "matmul" not in plain.left and "softmax" not in plain.left
    for function in ("gelu", "silu", "softmax", "layer_norm", "linear", "addmm", "conv1d", "embedding", "relu", "tanh"):
        assert not also.left[function], also.left


def test_eager_attention_is_a_softmax_of_ours():
    model, inputs = build("Llama")
    model.set_attn_implementation("eager")
    bp.swap(model)
    with bp.functional_calls() as calls:
        model(**inputs)
    assert calls.replaced["softmax"] == 2 and calls.left["matmul", "not a product with a matrix"] == 4


def test_the_table_is_fresh():
    """The table in docs/models.md is what is counted now, with the version it names."""
    import transformers

    text = record.PAGE.read_text()
    (version,) = re.findall(r"Counted with transformers (\d[\w.]*\w)", text)
    if version != transformers.__version__:
        pytest.skip(f"the table is of transformers {version}, this is {transformers.__version__}")
    assert record.filled(text) == text, "run: python tests/models/record.py"
