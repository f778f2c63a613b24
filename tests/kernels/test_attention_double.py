"""The kernels of attention's second order beside the eager rule."""

from __future__ import annotations

import math

import pytest
import torch
from fused import LAYOUTS, double, each_dtype, normal
from fused_twice import ALL, BOTTOM, GIVEN, by_reverse, leaves, ours, run, run_of, tiles_of
from torch import Tensor
from torch.library import opcheck
from torch.utils._pytree import tree_map

from bptoolkit.ops import attention_plain as plain
from bptoolkit.ops.attention_rule import double_fast
from bptoolkit.ops.attention_tiles import CAUSAL, EVERYWHERE
from bptoolkit.triton_kernels import attention_double as file
from bptoolkit.triton_kernels.operator import REGISTERED as registered


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiles of 16 rows and columns; float32 in the form that half precision has, for the sake of exact comparisons."""
    tiles_of(monkeypatch, 16, 32)


@pytest.mark.parametrize("window", [EVERYWHERE, CAUSAL, BOTTOM], ids=["full", "causal", "bottom right"])
@pytest.mark.parametrize("L, S", [(1, 20), (16, 16), (17, 15), (33, 32), (16, 33)])
def test_sizes(device, L, S, window):
    """Either side of a tile, fewer and more queries than keys, rows that see nothing."""
    run(L, S, window=window, device=device)


@pytest.mark.parametrize("E, EV", [(16, 16), (1, 17), (40, 33)])
def test_features(device, E, EV):
    run(10, 20, E, EV, window=CAUSAL, device=device)


@each_dtype
def test_dtypes(device, dtype):
    """In half precision what enters a product is rounded, but for bfloat16 in the interpreter."""
    errors = {torch.float32: 40, torch.bfloat16: 1 << 16, torch.float16: 1 << 13}[dtype]
    run(20, 25, 24, window=CAUSAL, dtype=dtype, device=device, errors=errors)


@pytest.mark.parametrize("B, of", [((), None), ((2, 1, 2), None), ((2, 1, 2), (2, 1, 1)), ((1, 3), (1, 1))])
def test_batches(device, B, of):
    """Any number of dimensions; a group of heads shares k and v, b and c, and their gradients are sums over it."""
    run(10, 18, B=B, of=of, window=CAUSAL, device=device)


@pytest.mark.parametrize("of", LAYOUTS)
def test_layouts(device, of):
    run(8, 18, lay=LAYOUTS[of], laid="qva" if of.startswith("one") else "qkvdabc", window=CAUSAL, device=device)


@pytest.mark.parametrize("given", ["a", "b", "c", "ab", "bc", "ac", "abc"])
@pytest.mark.parametrize("need", ["o", "l", "q", "k", "v", "qk", "ov", "olqkv"])
def test_given_and_needed(device, given, need):
    run(17, 18, given=given, need=need, dlse="a" in given, device=device)


FORMS = [(True, 0), (False, 16), (True, 16)]  # launches of their own for g_dO and gV; features at a time


@pytest.mark.parametrize("split, part", FORMS)
def test_forms(device, monkeypatch, split, part):
    tiles_of(monkeypatch, 16, 32, split, part)
    run(20, 18, 24, 17, window=CAUSAL, device=device)
    run(8, 12, 17, given="c", need="okv", device=device)
    run(12, 8, 33, given="a", need="oqv", cap=1.0, device=device)


EMPTY = [(0, 3, 4, 4, 2), (3, 0, 4, 4, 2), (3, 3, 0, 4, 1), (3, 3, 4, 0, 1), (3, 3, 4, 4, 0), (0, 0, 4, 4, 1)]


@pytest.mark.parametrize("L, S, E, EV, B", EMPTY)
def test_zero_sizes(device, L, S, E, EV, B):
    q, k, v, do = (normal(B, 2, n, e, device=device, seed=e) for n, e in ((L, E), (S, E), (S, EV), (L, EV)))
    options = {"m": None, "slopes": None, "lengths": None, "window": EVERYWHERE, "scale": None, "cap": 0.0}
    run_of(q, k, v, do, (q.cos(), k.cos(), v.cos(), None), GIVEN, ALL, 40, True, **options)


@pytest.mark.parametrize(
    "kind, shape", [(torch.bool, (1, 1, 1, 20)), (torch.float32, (2, 1, 10, 20)), (torch.float32, (1, 2, 10, 1))], ids=str
)
def test_masks(device, shape, kind):
    """Constants, broadcast in any dimension; a row of the mask that hides all keys gives 0."""
    m = normal(*shape, device=device)
    m = m > -0.5 if kind == torch.bool else m.to(kind)
    m[0, 0, 0] = False if kind == torch.bool else -math.inf
    run(10, 20, B=(2, 2), m=m, device=device, dlse=False)


@pytest.mark.parametrize("window", [(1, 0, 0), (20, -1, 0), (-1, 10, 1), (9, 9, 1)], ids=str)
def test_windows(device, window):
    run(34, 30, window=window, device=device)


@pytest.mark.parametrize("given, window", [("abcf", BOTTOM), ("af", EVERYWHERE), ("f", BOTTOM), ("c", EVERYWHERE)], ids=str)
def test_lengths_slopes_and_a_cap(device, window, given):
    """Together; a length of 0, one inside a tile, one past the end."""
    slopes, lengths = normal(1, 1, device=device).abs(), torch.tensor([[0], [21], [99]], device=device)
    options = {"slopes": slopes, "lengths": lengths, "cap": 1.5, "scale": 0.7}
    run(17, 23, B=(3, 1), window=window, given=given, need="olqkvs", device=device, dlse=False, **options)


def test_with_a_mask_all_together(device):
    m, slopes = normal(1, 2, 1, 18, 20, device=device), normal(1, 1, 1, device=device)
    options = {"m": m, "slopes": slopes, "window": (12, 3, 1), "cap": 2.0, "given": "abcf", "need": "olqkvs"}
    run(18, 20, B=(1, 2, 2), of=(1, 2, 1), device=device, **options)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")  # of columns past the end
def test_masks_of_large_numbers(device):
    """A row of the lowest numbers is no hidden row: its keys have equal shares."""
    m = normal(1, 10, 20, device=device)
    m[..., 3:5, :] = torch.finfo(torch.float32).min
    got = run(10, 20, m=m, device=device, dlse=False)
    assert all(g.isfinite().all() for g in got if g is not None)


def test_large_scores(device):
    """Of some hundreds, one rounding of which is some hundred of its exponential: the errors are no larger than the loops'."""
    q, k, v, do, a, b, c = (normal(1, 20, 8, device=device, seed=s) for s in range(7))
    none, options = (None,) * 6, ([-1, -1, 0], None, 0.0, 0.0)
    q, k = 20 * q, 10 * k
    o, _, top, l = plain.forward(*double([q, k, v]), *none, *options)
    args = do, None, q, k, v, *none, o.float(), top.float(), l.float(), *options, "qkv"
    exact = double_fast(*double([a, b, c]), None, None, ALL, double(args))
    theirs, got = double_fast(a, b, c, None, None, ALL, args), file._double(a, b, c, None, None, ALL, args)
    for g, t, e in zip(got[:5], theirs, exact):
        assert (g - e).norm() <= 1.5 * (t - e).norm()


def test_the_shipped_tiles(device, monkeypatch):
    monkeypatch.undo()
    run(70, 40, 64, window=CAUSAL, dtype=torch.float16, errors=1 << 13, device=device)


def test_operators(device):
    """Schema, fake kernels and tracing of the operator, and of the node that calls it."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file, "DOUBLE", (lambda op: lambda *a: (seen.append((op, a)), op(*a))[1])(file.DOUBLE))
        run(10, 12, given="abcf", need="olqkvs", slopes=normal(1, device=device), device=device)
        run(10, 12, given="c", need="ov", device=device)
        run(10, 12, B=(1, 2), of=(1, 1), given="ab", need="qk", device=device)
    with pytest.MonkeyPatch.context() as patch:
        node = file.AGAIN
        patch.setattr(node, "run", lambda *a: (seen.append((node.op, a)), node.op(*a))[1])
        by_reverse(ours, leaves(device, L=6), leaves(device, L=6))
    assert {op for op, _ in seen} == {registered["triton_attention_double"], file.AGAIN.op}
    for op, args in seen:
        args = tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, args)
        opcheck(
            op, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        )
