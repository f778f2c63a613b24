"""The kernels of attention beside the eager rule."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from fused import LAYOUTS, each_dtype, normal
from fused_attention import run, run_of
from torch.utils.flop_counter import FlopCounterMode

import bptoolkit as bp
from bptoolkit.ops.attention_rule import RULE
from bptoolkit.ops.attention_tiles import CAUSAL, EVERYWHERE
from bptoolkit.triton_kernels import attention as file
from bptoolkit.triton_kernels import attention_layout as layout

sdpa = bp.functional.scaled_dot_product_attention
BOTTOM = (-1, 0, 1)  # causal, the last query at the last key


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiles of 32 rows and columns: several without many elements."""
    monkeypatch.setattr(layout, "tile", lambda *_: layout.Tile(32, 32, 4, 1))


@pytest.mark.parametrize("window", [EVERYWHERE, CAUSAL, BOTTOM], ids=["full", "causal", "bottom right"])
@pytest.mark.parametrize("L, S", [(1, 40), (32, 32), (33, 31), (65, 64), (64, 97)])
def test_sizes(device, L, S, window):
    """Either side of a tile, fewer and more queries than keys, rows that see nothing."""
    run(L, S, B=(1,), window=window, device=device)


@pytest.mark.parametrize("E, EV", [(16, 16), (1, 17), (80, 33), (256, 160), (40, 192)])
def test_features(device, E, EV):
    if max(E, EV) > 128:
        run(20, 40, E, EV, B=(1,), window=CAUSAL, device=device, dtype=torch.float16, errors=1 << 13)
    else:
        run(20, 40, E, EV, B=(1,), window=CAUSAL, device=device)


@each_dtype
def test_dtypes(device, dtype):
    """In half precision P and dS are rounded for their products, but for bfloat16 in the interpreter."""
    errors = {torch.float32: 40, torch.bfloat16: 1 << 16, torch.float16: 1 << 13}[dtype]
    run(40, 50, 24, B=(1,), window=CAUSAL, dtype=dtype, device=device, errors=errors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("causal", [False, True])
def test_errors_beside_torchs(device, dtype, causal):
    """Against float64: at most twice the error of torch's own attention in the same dtype, values and gradients."""
    tensors = [normal(1, 1, 70, 32, dtype=dtype, device=device, seed=s) for s in range(4)]

    def gradients(fn, to):
        *leaves, do = (t.to(to).requires_grad_() for t in tensors)
        o = fn(*leaves, is_causal=causal)
        return [o.detach(), *torch.autograd.grad(o, leaves, do)]

    exact = gradients(F.scaled_dot_product_attention, torch.float64)
    theirs = gradients(F.scaled_dot_product_attention, dtype)
    ours = gradients(lambda *a, **kw: sdpa(*a, **kw, backend="triton"), dtype)
    for o, t, e in zip(ours, theirs, exact):
        assert (o.double() - e).norm() <= 2 * (t.double() - e).norm()


@pytest.mark.parametrize("B, shared", [((), None), ((3,), None), ((2, 1, 2), None), ((2, 1, 3), (2, 1, 1)), ((1, 4), (1, 1))])
@pytest.mark.parametrize("window", [EVERYWHERE, CAUSAL], ids=["full", "causal"])
def test_batches(device, B, shared, window):
    """Any number of dimensions; a group of heads shares k and v, and their gradients are sums over it."""
    run(20, 30, B=B, shared=shared, window=window, device=device)


@pytest.mark.parametrize("of", LAYOUTS)
def test_layouts(device, of):
    q, k, v, do = (LAYOUTS[of](normal(2, 18, 8, device=device, seed=s)) for s in range(4))
    run_of(q, k, v, window=CAUSAL, do=do[..., : q.shape[-2], : v.shape[-1]])


def test_heads_beside_features(device):
    """(B, L, H, E) transposed, as models have it."""
    q, k, v, do = (normal(2, 18, 3, 8, device=device, seed=s).transpose(1, 2) for s in range(4))
    run_of(q, k, v, do=do)


EMPTY = [(0, 3, 4, 4, 2), (3, 0, 4, 4, 2), (3, 3, 0, 4, 1), (3, 3, 4, 0, 1), (3, 3, 4, 4, 0), (0, 0, 4, 4, 1)]


@pytest.mark.parametrize("L, S, E, EV, B", EMPTY)
def test_zero_sizes(device, L, S, E, EV, B):
    q, k, v = (normal(B, 2, n, e, device=device) for n, e in ((L, E), (S, E), (S, EV)))
    run_of(q, k, v)


@pytest.mark.parametrize("need", ["q", "k", "v", "kv", "s", "qs"])
def test_need(device, need):
    run(20, 30, B=(1, 2), need=need, slopes=normal(1, 2, device=device).abs(), window=CAUSAL, device=device)


@pytest.mark.parametrize("given", [{"do": None}, {"dlse": None}, {"do": None, "dlse": None}])
def test_missing_cotangents(device, given):
    for need in ("qkv", "v"):
        run(20, 30, B=(1,), need=need, device=device, **given)


@pytest.mark.parametrize("shape", [(1, 1, 1, 40), (2, 1, 20, 40), (1, 2, 20, 1)])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.float16], ids=str)
def test_masks(device, shape, kind):
    """Broadcast in any dimension; a row of the mask that hides all keys gives 0 and gradients 0."""
    m = normal(*shape, device=device)
    m = m > -0.5 if kind == torch.bool else m.to(kind)
    m[0, 0, 0] = False if kind == torch.bool else -math.inf
    dtype = torch.float16 if kind == torch.float16 else torch.float32
    errors = 1 << 13 if kind == torch.float16 else 40
    run(20, 40, B=(2, 2), m=m, dtype=dtype, errors=errors, device=device, dlse=None)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")  # of columns past the end
def test_masks_of_large_numbers(device):
    """A row of the lowest numbers is no hidden row: its keys have equal shares, in gradients too."""
    m = normal(1, 1, 20, 40, device=device)
    m[..., 3:5, :] = torch.finfo(torch.float32).min
    m[..., 6, 10:] = torch.finfo(torch.float32).min
    run(20, 40, m=m, device=device, dlse=None, need="v")
    (o, *_), grads = run(20, 40, m=m, device=device, dlse=None)
    assert o.isfinite().all() and all(g.isfinite().all() for g in grads[:3])


@pytest.mark.parametrize("shape", [(2, 1, 1, 20, 40), (1, 1, 2, 20, 40)])
def test_masks_of_groups(device, shape):
    run(20, 40, B=(2, 1, 2), shared=(2, 1, 1), m=normal(*shape, device=device), device=device)


@pytest.mark.parametrize("window", [(0, 0, 0), (40, -1, 0), (-1, 20, 1), (18, 18, 1)], ids=str)
def test_windows(device, window):
    run(70, 60, B=(1,), window=window, device=device)


@pytest.mark.parametrize("window", [EVERYWHERE, BOTTOM], ids=["full", "causal"])
def test_lengths_slopes_and_a_cap(device, window):
    """Together; a length of 0, one inside a tile, one past the end."""
    slopes, lengths = normal(1, 1, device=device).abs(), torch.tensor([[0], [21], [99]], device=device)
    options = {"slopes": slopes, "lengths": lengths, "cap": 1.5, "scale": 0.7}
    run(33, 40, B=(3, 1), window=window, need="qkvs", device=device, dlse=None, **options)
    run(30, 40, B=(3, 2), shared=(3, 1), window=window, device=device, lengths=lengths, dlse=None)


def test_with_a_mask_all_together(device):
    m, slopes = normal(1, 2, 33, 40, device=device), normal(1, 1, device=device)
    run(33, 40, B=(1, 2), m=m, slopes=slopes, window=(20, 3, 1), cap=2.0, need="qkvs", device=device)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_and_infinities(device):
    """They stay in the rows that meet them."""
    q, k, v = (normal(1, 40, 8, device=device, seed=s) for s in range(3))
    q[0, 3, 2], q[0, 20, 1] = torch.nan, torch.inf
    o, *_ = file.KERNEL.forward(q, k, v, *(None,) * 6, CAUSAL, None, 0.0, 0.0)
    torch.testing.assert_close(o, RULE.forward(q, k, v, *(None,) * 6, CAUSAL, None, 0.0, 0.0)[0], equal_nan=True)
    assert o.isnan().any(-1).flatten().nonzero().flatten().tolist() == [3, 20]
    v[0, 10, 0] = torch.nan
    o, *_ = file.KERNEL.forward(k, k, v, *(None,) * 6, CAUSAL, None, 0.0, 0.0)
    assert o[0, 10:, 0].isnan().all() and not o[0, :, 1:].isnan().any()


def test_large_scores(device):
    """The maximum grows from tile to tile, or falls."""
    ramp = torch.linspace(-40, 40, 70, device=device)[None, :, None].repeat(1, 1, 8)
    q, v = normal(1, 20, 8, device=device).abs(), normal(1, 70, 8, device=device)
    for k in (ramp, ramp.flip(1)):
        run_of(q, k, v, errors=400)  # an error of one rounding in a score of up to 300 is 300 roundings in its exponential


def test_probabilities_of_large_scores_sum_to_one(device):
    """In backward too, where the largest score is some thousands: dV summed over the keys is dO summed over the queries."""
    q, k, v, do = (normal(1, 40, 8, device=device, seed=s) for s in range(4))
    given, options = (100 * q, 30 * k, v, *(None,) * 6), (EVERYWHERE, None, 0.0, 0.0)
    o, _, top, l = file.KERNEL.forward(*given, *options)
    need = RULE.Need(False, False, True, *(False,) * 6)
    dv = file.KERNEL.backward(do, None, *given, o, top, l, *options, need)[2]
    assert top.max() > 5000
    torch.testing.assert_close(dv.sum(1), do.sum(1), rtol=1e-5, atol=1e-5)


def test_the_shipped_tiles(device, monkeypatch):
    monkeypatch.undo()
    run(130, 70, 64, B=(1,), window=CAUSAL, dtype=torch.float16, errors=1 << 13, device=device)  # P in float16


def test_the_public_function(device):
    """With heads in groups and all of the options, twice differentiated."""
    q, k, v = (normal(2, h, 10, 8, device=device).requires_grad_() for h in (4, 2, 2))
    options = {"enable_gqa": True, "is_causal": True, "softcap": 3.0, "return_lse": True, "causal_align": "bottom_right"}
    options |= {"alibi_slopes": bp.functional.alibi_slopes(4, device=device)}
    results = []
    for backend in ("triton", "eager"):
        o, lse = sdpa(q, k, v, **options, backend=backend)
        loss = o.sin().sum() + lse.cos().sum()
        plain = torch.autograd.grad(loss, (q, k, v), retain_graph=True)
        first = torch.autograd.grad(loss, (q, k, v), create_graph=True)
        second = torch.autograd.grad(sum(g.cos().sum() for g in first), (q, k, v))
        results.append((o, lse, *plain, *first, *second))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_operations_counted(device):
    q, k, v = (normal(2, 3, 4, 8, device=device).requires_grad_() for _ in range(3))
    with FlopCounterMode(display=False) as forward:
        o = sdpa(q, k, v, backend="triton")
    with FlopCounterMode(display=False) as backward:
        o.sum().backward()
    assert forward.get_total_flops() == 4 * 6 * 4 * 4 * 8
    assert backward.get_total_flops() == 2.5 * forward.get_total_flops()


def test_what_the_kernel_cannot_take(device):
    x = normal(1, 2, 3, 4, device=device)
    wide, half = normal(1, 2, 3, 130, device=device), normal(1, 2, 3, 300, dtype=torch.float16, device=device)
    for args, options, why in (
        ((wide, wide, x), {}, "130 features of torch.float32 is too wide for the fused kernel: at most 128"),
        ((half,) * 3, {}, "300 features of torch.float16 is too wide for the fused kernel: at most 256"),
        ((x.double(),) * 3, {}, "float32, not float64"),
    ):
        with pytest.raises(ValueError, match=f"scaled_dot_product_attention: backend='triton' cannot run here: .*{why}"):
            sdpa(*args, **options, backend="triton")
        sdpa(*args, **options)
