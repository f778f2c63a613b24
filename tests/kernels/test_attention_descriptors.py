"""Attention's kernels reading by descriptors, beside the same kernels reading by pointers: the same bits in the interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from fused import normal

import bptoolkit as bp
from bptoolkit.ops.attention_rule import PACKED_RULE, RULE
from bptoolkit.ops.attention_tiles import CAUSAL, EVERYWHERE
from bptoolkit.triton_kernels import aot
from bptoolkit.triton_kernels import attention as file
from bptoolkit.triton_kernels import attention_descriptors as descriptors
from bptoolkit.triton_kernels import attention_layout as layout

HALF = [torch.float16, torch.bfloat16]
BOTTOM = (-1, 0, 1)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiles of 32 rows and columns: several without many elements."""
    monkeypatch.setattr(layout, "tile", lambda *_: layout.Tile(32, 32, 4, 1))


@pytest.fixture
def reads(device):
    """The path by descriptors, where the device has them."""
    if device == "cuda" and (torch.version.hip or torch.cuda.get_device_capability()[0] < 9):
        pytest.skip("needs a tensor memory accelerator: compute capability 9 or more")
    return "descriptors"


@pytest.fixture(params=descriptors.PATHS[1:])
def path(request, device, reads):
    """Each of the two paths that the device has."""
    if device == "cuda" and request.param == "specialised" and torch.cuda.get_device_capability()[0] != 10:
        pytest.skip("needs compute capability 10")
    return request.param


def drawn(L, S, E, EV=None, *, B=(1, 2), shared=None, dtype=torch.float16, device="cpu"):
    """q, k, v and dO."""
    shapes = ((*B, L, E), (*(shared or B), S, E), (*(shared or B), S, EV or E), (*B, L, EV or E))
    return [normal(*shape, dtype=dtype, device=device, seed=seed) for seed, shape in enumerate(shapes)]


def results(path, q, k, v, do, *, window=EVERYWHERE, scale=None, cap=0.0, p=0.0, dlse=True, need="qkv", **given):
    """What the kernels give forward and backward by a path."""
    terms = [given.pop(name, None) for name in ("m", "slopes", "lengths", "seed", "cu_q", "cu_k")]
    assert not given
    call, options = (q, k, v, *terms), (window, scale, cap, p)
    with descriptors.forced(path):
        o, lse, top, l = file.KERNEL.forward(*call, *options)
        dlse = normal(*lse.shape, device=str(q.device), seed=9) if dlse else None
        wanted = RULE.Need(*(x in need for x in "qkvms"), *(False,) * 4)
        kept = (q, k, v) if wanted.q or wanted.k else (q, k, None)
        o_kept = o if kept[2] is not None else None
        gradients = file.KERNEL.backward(do, dlse, *kept, *terms, o_kept, top, l, *options, wanted)
    return [t for t in (o, lse, top, l, *gradients) if t is not None]


def alike(want, got):
    """The same bits; on a GPU, whose compiler may contract products otherwise, nearly."""
    for a, b in zip(want, got, strict=True):
        near = 2e-2 if a.device.type == "cuda" else 0
        torch.testing.assert_close(b, a, rtol=near, atol=near)


def same(path, *args, **kw):
    """By a path as by pointers."""
    got = results(path, *args, **kw)
    alike(results("pointers", *args, **kw), got)
    return got


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("window", [EVERYWHERE, CAUSAL, BOTTOM], ids=["full", "causal", "bottom right"])
@pytest.mark.parametrize("L, S", [(33, 31), (64, 97)])
def test_sizes(device, path, dtype, window, L, S):
    """Either side of a tile: rows past the last are none of the next head's."""
    same(path, *drawn(L, S, 16, dtype=dtype, device=device), window=window)


@pytest.mark.parametrize("E, EV", [(64, 64), (128, 32), (24, 80)])
def test_features(device, reads, E, EV):
    """A tile is wider than a head of 24 or 80: zeros beside it."""
    same(reads, *drawn(34, 40, E, EV, B=(1,), device=device), window=CAUSAL)


@pytest.mark.parametrize("B, shared", [((), None), ((3,), None), ((2, 1, 2), None), ((2, 2, 3), (2, 2, 1)), ((1, 4), (1, 1))])
def test_batches(device, reads, B, shared):
    """Any number of dimensions; groups of heads that share k and v."""
    same(reads, *drawn(20, 40, 16, B=B, shared=shared, device=device), window=CAUSAL)


@pytest.mark.parametrize("kind", [torch.bool, torch.float16], ids=str)
def test_masks(device, reads, kind):
    m = normal(2, 1, 34, 40, device=device)
    m = m > -0.5 if kind == torch.bool else m.to(kind)
    m[0, 0, 0] = False if kind == torch.bool else -math.inf
    same(reads, *drawn(34, 40, 16, B=(2, 1), device=device), m=m, need="qkv" if kind == torch.bool else "qkvm")


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_options(device, reads):
    """A window, slopes, lengths (0, inside a tile, past the end), a cap, dropout."""
    tensors = drawn(20, 40, 16, B=(3, 1), device=device)
    slopes, lengths = normal(3, 1, device=device).abs(), torch.tensor([[0], [21], [99]], device=device)
    seed = torch.arange(2, dtype=torch.int32, device=device)
    options = {"cap": 1.5, "scale": 0.7, "window": (20, 3, 1), "need": "qkvs"}
    same(reads, *tensors, slopes=slopes, lengths=lengths, **options)
    same(reads, *tensors, seed=seed, p=0.3, window=CAUSAL)


@pytest.mark.parametrize("need", ["q", "k", "v", "qk"])
@pytest.mark.parametrize("dlse", [True, False])
def test_need(device, reads, need, dlse):
    """Descriptors that a kernel does not read from."""
    same(reads, *drawn(20, 34, 16, B=(1,), device=device), need=need, dlse=dlse, window=CAUSAL)


def inside(t, heads):
    """The same values within memory that is NaN elsewhere: rows, features and heads beside them."""
    L, E = t.shape[-2:]
    shape = [*t.shape[:-2], L + 5, E + 16]
    if heads:  # B L H E
        shape = [shape[0], shape[2], shape[1], shape[3]]
    memory = torch.full(shape, math.nan, dtype=t.dtype, device=t.device)
    view = (memory.transpose(1, 2) if heads else memory)[..., 2 : 2 + L, 8 : 8 + E]
    return view.copy_(t)


@pytest.mark.parametrize("heads", [False, True], ids=["rows within heads", "heads within rows"])
def test_what_lies_beside_is_not_read(device, reads, heads):
    """NaN all around, which 0 · NaN would let through."""
    tensors = drawn(20, 34, 20, device=device)
    placed = [inside(t, heads) for t in [torch.nn.functional.pad(t, (0, 4)) for t in tensors]]
    alike(results("pointers", *tensors, window=CAUSAL), same(reads, *(t[..., :20] for t in placed), window=CAUSAL))


@pytest.mark.parametrize("of", ["expanded", "over rows", "sliced", "one element late"])
def test_cotangents_of_any_layout(device, reads, of):
    """They are copied where they cannot be read."""
    q, k, v, do = drawn(20, 34, 20, 16, device=device)
    q, k = (torch.nn.functional.pad(t, (0, 4))[..., :20] for t in (q, k))
    do = {
        "expanded": do[..., :1, :1].expand(do.shape),
        "over rows": do[..., :1, :].expand(do.shape),
        "sliced": torch.nn.functional.pad(do, (0, 3))[..., :16],
        "one element late": torch.nn.functional.pad(do, (1, 7))[..., 1:17],
    }[of]
    same(reads, q, k, v, do)


def test_rows_apart(device, reads):
    """18 features whose rows are 48 bytes apart; of dO they are dense, which cannot be read."""
    q, k, v, do = drawn(20, 34, 18, device=device)
    same(reads, *(torch.nn.functional.pad(t, (0, 6))[..., :18] for t in (q, k, v)), do)


def test_they_are_used(device, path, monkeypatch):
    """Three descriptors forward, four of each of two kernels backward; none outside of the block, nor of empty tensors."""
    made, real = [], descriptors._descriptor
    monkeypatch.setattr(descriptors, "_descriptor", lambda t, rows: made.append(rows) or real(t, rows))
    results(path, *drawn(20, 40, 16, device=device))
    assert len(made) == 11
    results("pointers", *drawn(20, 40, 16, device=device))
    results(path, *drawn(20, 0, 16, device=device))
    results(path, *drawn(0, 20, 16, device=device))
    assert len(made) == 11


def test_the_public_function(device, path):
    """Under autograd, of a higher order too."""
    q, k, v, _ = (t.requires_grad_() for t in drawn(20, 20, 16, B=(1, 2), device=device))
    found = []
    for how in ("pointers", path):
        with descriptors.forced(how):
            o = bp.functional.scaled_dot_product_attention(q, k, v, is_causal=True, backend="triton")
            first = torch.autograd.grad(o.float().square().sum(), (q, k, v), create_graph=True)
            second = torch.autograd.grad(sum(g.float().square().sum() for g in first), (q, k, v))
        found.append((o, *first, *second))
    alike(*found)


def test_what_they_cannot_take(device, path):
    tensors = drawn(20, 20, 16, B=(1, 2), device=device)
    late = torch.nn.functional.pad(tensors[1], (1, 7))[..., 1:17]
    cu = torch.tensor([0, 20], dtype=torch.int32, device=device)
    for rule, args, options, why in (
        (RULE, [t.float() for t in tensors], {}, "it takes half precision, not torch.float32"),
        (RULE, drawn(2, 2, 256, device=device), {}, "a head has at most 128 features, not 256"),
        (RULE, drawn(2, 2, 16, 144, device=device), {}, "a head has at most 128 features, not 144"),
        (RULE, drawn(2, 2, 20, 16, B=(), device=device), {}, "q has a step of 40 bytes over rows: multiples of 16"),
        (RULE, drawn(2, 2, 16, 18, B=(), device=device), {}, "v has a step of 36 bytes over rows: multiples of 16"),
        (RULE, [tensors[0], late, *tensors[2:]], {}, "k begins 2 bytes after a multiple of 16"),
        (
            RULE,
            [*tensors[:2], tensors[2][:, :1].expand(1, 2, 20, 16)],
            {},
            "v has a step of 0 bytes over heads: multiples of 16",
        ),
        (PACKED_RULE, tensors, {"cu_q": cu, "cu_k": cu}, "packed sequences"),
    ):
        terms = [options.get(name) for name in ("m", "slopes", "lengths", "seed", "cu_q", "cu_k")]
        with (
            descriptors.forced(path),
            pytest.raises(ValueError, match=f"attention by the {path} path cannot take this call: .*{why}"),
        ):
            rule.kernel().forward(*args[:3], *terms, EVERYWHERE, None, 0.0, 0.0)
    with descriptors.forced("specialised"), pytest.raises(ValueError, match="is_causal, and no mask, window to the left"):
        file.KERNEL.forward(*tensors[:3], *(None,) * 6, EVERYWHERE, None, 2.0, 0.0)
    with (
        pytest.raises(ValueError, match="no path 'nothing'; there are pointers, descriptors, specialised"),
        descriptors.forced("nothing"),
    ):
        pass


@pytest.mark.parametrize("path, part", [("descriptors", "sm_90"), ("specialised", "sm_100")])
def test_what_is_compiled(path, part, monkeypatch):
    """Copies by the tensor memory accelerator, no other read of 16 bytes; warps of their own."""
    monkeypatch.undo()
    spec = next(s for s in aot.specs_for(file, part) if s.label == f"attention forward bf16 64 causal, {path}")
    assembly = aot.compiled_for(spec, aot.TARGETS[part]).asm
    assert "cp.async.bulk.tensor.5d" in assembly["ptx"] and "ld.global" not in assembly["ptx"]
    assert ("ttg.warp_specialize" in assembly["ttgir"]) == (path == "specialised")


def test_which_parts_have_them():
    labels = {part: [s.label for s in aot.specs_for(file, part)] for part in aot.TARGETS}
    found = {part: {p for p in descriptors.PATHS if any(label.endswith(p) for label in of)} for part, of in labels.items()}
    assert found == {"sm_80": set(), "sm_90": {"descriptors"}, "sm_100": {"descriptors", "specialised"}, "gfx942": set()}
