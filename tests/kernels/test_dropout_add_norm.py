"""The kernels of dropout_add_layer_norm and dropout_add_rms_norm beside their eager rules, and the two ops themselves."""

from __future__ import annotations

import pytest
import torch
from fused import DTYPES, LAYOUTS, both_rules, each_dtype, normal

import bptoolkit as bp
from bptoolkit import randomness
from bptoolkit.ops import dropout_add_norm as op
from bptoolkit.triton_kernels import norms

each = pytest.mark.parametrize("rule", [op.RULE, op.RMS_RULE], ids=lambda rule: rule.name)
SEED = torch.tensor([123456789, -987654321], dtype=torch.int32)


def run(rule, x, a, w, b, *, p=0.5, D=1, need=None, eps=1e-5, errors=8, **cotangents):
    parameters = (w, b) if rule is op.RULE else (w,)
    need = need or [True, True, *(t is not None for t in (w, b))]
    need = [*need[: len(rule.inputs) - 1], False]
    args = (x, a, *parameters, SEED.to(x.device), p, D, eps)
    return both_rules(rule, *args, need=need, cotangents=cotangents, errors=errors)


def coarse(*shape, **kw):
    """Values for which x/(1 − p) + a is exact in every dtype: the rounding of s is no part of what is compared."""
    return (normal(*shape, **kw) * 4).round().clamp(-8, 8) / 4


SIZES = [(1, 33), (97, 64), (5, 1025), (4, norms.HELD_MASKED), (2, norms.HELD_MASKED + 1), (2, norms.HELD), (1, norms.HELD + 1)]


@each
@pytest.mark.parametrize("M, N", SIZES)
def test_sizes(device, rule, M, N):
    x, a, w, b = (normal(*s, device=device, seed=k) for k, s in enumerate(((M, N), (M, N), (N,), (N,))))
    (_, s, *_), (dx, da, *_) = run(rule, x, a, w, b, p=0.3)
    kept = randomness.keep(SEED.to(x.device), x.shape, 0.3)
    assert torch.equal(s[~kept], a[~kept]) and not dx[~kept].any() and torch.equal(dx[kept] == 0, da[kept] == 0)


@each
@pytest.mark.parametrize("p", [0.01, 0.9, 1.0])
def test_shares(device, rule, p):
    x, a, w, b = (normal(*s, device=device, seed=k) for k, s in enumerate(((20, 30), (20, 30), (30,), (30,))))
    run(rule, x, a, w, b, p=p)


@each
@each_dtype
@pytest.mark.parametrize("parameters", ["same", "float32", "none"])
@pytest.mark.parametrize("M, N", [(33, 65), (1, norms.HELD + 5)])
def test_dtypes(device, rule, dtype, parameters, M, N):
    w, b = (normal(N, dtype=DTYPES.get(parameters, dtype), device=device, seed=k) for k in (4, 5))
    w, b = (None, None) if parameters == "none" else (w, b)
    run(rule, *(coarse(M, N, dtype=dtype, device=device, seed=k) for k in range(2)), w, b)


@each
@pytest.mark.parametrize("lead, shape", [((), (5,)), ((2, 3), (4, 5))], ids=str)
def test_dimensions(device, rule, lead, shape):
    x, a, w, b = (normal(*s, device=device, seed=k) for k, s in enumerate(((*lead, *shape), (*lead, *shape), shape, shape)))
    run(rule, x, a, w, b, D=len(shape), eps=0.1)


@each
@pytest.mark.parametrize(
    "need",
    [[True, True, True, True], [True, False, False, False], [False, True, True, False], [False, False, True, True]],
    ids=str,
)
@pytest.mark.parametrize("given", [("dy",), ("ds",), ("dy", "ds"), ("ds", "dr"), ("dy", "ds", "dm", "dr")], ids="+".join)
def test_what_is_given_and_needed(device, rule, need, given):
    N = 65
    x, a, w, b = (normal(*s, device=device, seed=k) for k, s in enumerate(((2, N), (2, N), (N,), (N,))))
    run(rule, x, a, w, b, need=need, **{name: None for name in ("dy", "ds", "dm", "dr") if name not in given})


@each
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("N", [20, norms.HELD + 20])
def test_layouts(device, rule, layout, N):
    w, b = normal(2 * N, 2, device=device, seed=2).t()[:, ::2]
    x, a, dy, ds = (normal(3 if N == 20 else 1, N, device=device, seed=k) for k in range(4))
    odd = LAYOUTS[layout]
    run(rule, odd(x), a, w, b, eps=0.5, dy=dy, ds=odd(ds))
    run(rule, x, odd(a), w, b, eps=0.5, dy=odd(dy), ds=ds)


@each
def test_infinities_that_are_dropped(device, rule):
    """0 · ∞ is NaN, as in dropout."""
    x, a = (normal(3, 40, device=device, seed=k) for k in range(2))
    x[1] = torch.nan if rule is op.RULE else torch.inf
    run(rule, x, a, None, None)


@each
@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_the_public_function(device, rule, backend):
    """The mask is that of the seed that is drawn; without training, and at p = 0, add_norm; 0 elements; what is refused."""
    f = getattr(bp.functional, rule.name)
    plain = getattr(bp.functional, rule.name.removeprefix("dropout_"))
    x, a, w = (normal(*s, device=device, seed=k).requires_grad_() for k, s in enumerate(((4, 6, 50), (4, 6, 50), (50,))))
    torch.manual_seed(3)
    y, s = f(x, a, (50,), w, p=0.25, backend=backend)
    torch.manual_seed(3)
    dropped = bp.functional.dropout(x, 0.25, backend="eager")
    for got, want in zip((y, s), plain(dropped, a, (50,), w, backend="eager")):
        torch.testing.assert_close(got, want)
    grads = torch.autograd.grad((y * s.sin()).sum(), (x, a, w))
    torch.manual_seed(3)
    y2, s2 = plain(bp.functional.dropout(x, 0.25, backend="eager"), a, (50,), w, backend="eager")
    torch.testing.assert_close(grads, torch.autograd.grad((y2 * s2.sin()).sum(), (x, a, w)), rtol=1e-4, atol=1e-4)
    state = torch.get_rng_state()
    for off in ({"p": 0.0}, {"training": False}):
        for got, want in zip(f(x, a, (50,), w, **off, backend=backend), plain(x, a, (50,), w, backend=backend)):
            assert torch.equal(got, want)
    assert f(x[:0], a[:0], (50,), w, backend=backend)[0].shape == (0, 6, 50)
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match=f"{rule.name}: p=1.5; the probability"):
        f(x, a, (50,), w, p=1.5, backend=backend)
    with pytest.raises(ValueError, match=f"{rule.name}: residual has shape"):
        f(x, a[0], (50,), w, backend=backend)


@each
def test_what_is_kept(device, rule):
    """The sum, the parameters, the statistics and 8 bytes of seed."""
    kept = {}
    x, w = normal(64, 32, device=device).requires_grad_(), normal(32, device=device).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        getattr(bp.functional, rule.name)(x, x, (32,), w, backend="triton")
    assert sum(t.numel() for t in kept.values()) == 64 * 32 + 32 + (2 if rule is op.RULE else 1) * 64 + 2
