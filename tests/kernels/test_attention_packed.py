"""The kernels of attention on packed sequences, and with dropout, beside the eager rules."""

from __future__ import annotations

import pytest
import torch
from fused import normal
from fused_attention import run, run_of
from helpers import LONG

import bptoolkit as bp
from bptoolkit import randomness
from bptoolkit.ops.attention_rule import PACKED_RULE
from bptoolkit.ops.attention_tiles import CAUSAL, EVERYWHERE
from bptoolkit.triton_kernels import attention as file
from bptoolkit.triton_kernels import attention_layout as layout

BOTTOM = (-1, 0, 1)
SEED = torch.tensor([123456789, -987654321], dtype=torch.int32)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiles of 32 rows and columns: several without many elements."""
    monkeypatch.setattr(layout, "tile", lambda *_: layout.Tile(32, 32, 4, 1))


def cu(*numbers, device="cpu", dtype=torch.int32):
    return torch.tensor(numbers, dtype=dtype, device=device)


# Dropout -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("window", [EVERYWHERE, BOTTOM], ids=["full", "causal"])
def test_dropout_is_the_eager_rules(device, window, p):
    """The same bits in every pass, whatever the tiles; heads in groups; and of the mask's gradient."""
    run(33, 70, B=(1, 2), shared=(1, 1), seed=SEED.to(device), p=p, window=window, device=device)
    run(20, 33, B=(2,), m=normal(1, 20, 33, device=device), seed=SEED.to(device), p=p, need="qkvm", device=device)


def test_dropout_in_half_precision(device):
    for dtype in (torch.float16, torch.bfloat16):
        run(20, 33, B=(2,), seed=SEED.to(device), p=0.3, dtype=dtype, device=device, errors=1 << 16)


@pytest.mark.parametrize("packed", [False, True])
def test_dropout_of_a_call(device, packed):
    """From the same state of torch's generator "triton" and "eager" drop the same elements; a second call drops others."""
    q, k, v = (normal(20, 2, 8, device=device, seed=s).requires_grad_() for s in range(3))
    call = bp.functional.varlen_attention if packed else bp.functional.scaled_dot_product_attention
    args = (q, k, v, cu(0, 7, 20, device=device)) if packed else (q, k, v)
    found = []
    for backend in ("triton", "eager"):
        torch.manual_seed(3)
        o = call(*args, dropout_p=0.4, backend=backend)
        found.append((o, *torch.autograd.grad(o.sin().sum(), (q, k, v))))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not torch.equal(found[0][0], call(*args, dropout_p=0.4, backend="triton"))


def test_places_past_32_bits():
    """The hash of a row has a seed per row, where a call has more rows than 32 bits count too."""
    places = torch.tensor([0, 5, (1 << 31) + 3, (1 << 32) + 3, (7 << 40) + 1])
    keys = randomness.hashed(places, SEED)
    assert len(set(keys.tolist())) == 5
    want = torch.stack([randomness.hashed(torch.arange(9, dtype=torch.int32), torch.stack([h, h * 0x31848BAB])) for h in keys])
    assert torch.equal(randomness.hashed_rows(keys[:, None], torch.arange(9, dtype=torch.int32), {}), want)


# Packed sequences ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [EVERYWHERE, CAUSAL, BOTTOM, (5, 2, 1)], ids=str)
@pytest.mark.parametrize("ends", [(0, 70), (0, 5, 5, 38, 70), (0, 32, 64), (3, 31, 60)], ids=str)
def test_packed(device, ends, window):
    """One sequence, an empty one, ends on tiles and inside, rows before the first and after the last."""
    c = cu(*ends, device=device)
    run(
        70,
        70,
        B=(1,),
        cu_q=c,
        cu_k=c,
        window=window,
        device=device,
        **({} if ends[0] == 0 and window != BOTTOM else {"dlse": None}),
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_packed_with_all_options(device, dtype):
    """Other lengths of keys, a sequence without keys and one without queries; groups of heads, slopes, a cap, dropout."""
    cu_q, cu_k = cu(1, 5, 5, 38, 40, device=device, dtype=dtype), cu(1, 1, 20, 40, 66, device=device, dtype=dtype)
    options = {"slopes": normal(1, 2, device=device), "need": "qkvs", "cap": 2.0, "seed": SEED.to(device), "p": 0.3}
    run(45, 70, B=(1, 2), shared=(1, 1), cu_q=cu_q, cu_k=cu_k, window=(9, 2, 1), device=device, dlse=None, **options)


def test_more_sequences_than_rows(device):
    """Most are empty; and no sequence at all."""
    c = cu(*(k // 7 * 2 for k in range(20)), device=device)
    run(6, 6, B=(1,), cu_q=c, cu_k=c, device=device, dlse=None)
    c = cu(2, device=device)
    run(6, 6, B=(1,), cu_q=c, cu_k=c, device=device, dlse=None)


@pytest.mark.parametrize("L, S, B", [(0, 5, 1), (5, 0, 1), (0, 0, 1), (4, 4, 0)])
def test_packed_and_empty(device, L, S, B):
    run(L, S, B=(B,), cu_q=cu(0, L, device=device), cu_k=cu(0, S, device=device), device=device, dlse=None)


def test_heads_between(device):
    """(N, H, E) seen as (H, N, E), as the public function has it, and as nested tensors have it."""
    q, k, v, do = (normal(18, 3, 8, device=device, seed=s).transpose(0, 1) for s in range(4))
    c = cu(0, 4, 18, device=device)
    run_of(q, k, v, do=do, cu_q=c, cu_k=c)


def test_numbers_that_cannot_be(device):
    """They are not read on the host, so the kernels cannot complain; nothing outside of the tensors is read or written."""
    q, k, v = (normal(1, 20, 8, device=device, seed=s) for s in range(3))
    for ends in ((0, 15, 7, 20), (0, 99), (-50, 10, 1 << 30)):
        c = cu(*ends, device=device)
        out = file.KERNEL.forward(q, k, v, None, None, None, None, c, c, EVERYWHERE, None, 0.0, 0.0)
        need = PACKED_RULE.Need(True, True, True, *(False,) * 6)
        o, _, top, l = (t.nan_to_num() for t in out)
        file.KERNEL.backward(o, None, q, k, v, None, None, None, None, c, c, o, top, l, EVERYWHERE, None, 0.0, 0.0, need)


def test_nested_tensors(device):
    parts = [normal(n, 2, 8, device=device, seed=n) for n in (3, 40)]
    results = []
    for backend in ("triton", "eager"):
        q = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2).detach().requires_grad_()
        o = bp.functional.scaled_dot_product_attention(q, q, q, is_causal=True, backend=backend)
        (g,) = torch.autograd.grad(o.values().sin().sum(), q)
        results.append((o.values(), g.values()))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_shipped_tiles(device, monkeypatch):
    monkeypatch.undo()
    c = cu(0, 3, 133, device=device)
    run(133, 133, 16, B=(1,), cu_q=c, cu_k=c, window=CAUSAL, dtype=torch.float16, errors=1 << 13, device=device)
    if LONG:
        run(70, 70, 200, B=(1,), window=CAUSAL, device=device)
