"""Attention by tiles in registers, forward and backward. For the maths see `bptoolkit.ops.attention_rule`.

forward    a program has rows I of Q and passes over K and V: the running maximum T and sum l, O rescaled as T grows
backward   rows: D = rowsum(dO∘O) − dlse and dQ of rows I, by passes over K and V; then columns: dK and dV of columns J, by
           passes over the rows of all heads that share them; then dM, in `attention_bias`. P is made again from S, T and l.
           7 products of matrices instead of 5, and no atomics: the same bits every time
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

from bptoolkit.ops.attention_rule import RULE
from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.attention_bias import mask_gradient, mask_kernel
from bptoolkit.triton_kernels.attention_descriptors import PARTS, described, path_of, readable, type_of
from bptoolkit.triton_kernels.attention_layout import (
    batch_of,
    blocks,
    constants,
    mask_of,
    near,
    of_samples,
    options_of,
    samples,
    shared_arguments,
    tile,
)
from bptoolkit.triton_kernels.attention_loops import columns_kernel, forward_kernel, rows_kernel
from bptoolkit.triton_kernels.kernel import Kernel, computed_in_float32, dense, precision_of
from bptoolkit.triton_kernels.operator import operator

WIDEST = {2: 256, 4: 128}  # bytes of an element -> features of a head; three products of tf32 take registers


def _launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    m: Tensor | None,
    slopes: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    window: Sequence[int],
    scale: float | None,
    cap: float,
    p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = _fake_forward(q, k, v, m, slopes, lengths, seed, cu_q, cu_k, window, scale, cap, p)
    n, packed = batch_of(q, k, v.shape[-1], cu_q), cu_q is not None
    if not out[1].numel():
        return out
    Q, K, V = samples(q, n, n.G), samples(k, n, 1), samples(v, n, 1)
    mask = mask_of(m, q)
    terms = mask.m, of_samples(slopes, q, torch.float32), of_samples(lengths, q, torch.int32), dense(seed)
    steps = (*Q.stride()[:4], *near(K), *near(V), *mask.steps)
    has = options_of(terms, window, cap)
    path = path_of(n, has, packed, q=Q, k=K, v=V)
    special = path == "specialised"
    fixed, options, t = constants(q, m, n, "forward", has, not special)
    grid = (blocks(n, n.L, t.BM, packed) * n.B * n.H * n.G,)
    given = (*described(path, t.BM, Q), *described(path, t.BN, K, V), *terms, dense(cu_q), dense(cu_k), *out)
    shared = shared_arguments(q, n, window, scale, cap, p, packed)
    forward_kernel[grid](*given, *steps, *shared, *fixed, special, **options)
    return out


def _fake_forward(q, k, v, m, slopes, lengths, seed, cu_q, cu_k, window, scale, cap, p):
    o = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
    return (o, *(torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device) for _ in range(3)))


def _launch_backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    m: Tensor | None,
    slopes: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    o: Tensor | None,
    top: Tensor,
    l: Tensor,
    window: Sequence[int],
    scale: float | None,
    cap: float,
    p: float,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dQ, dK, dV, dM and dh of each sample; empty those that are not needed."""
    n, packed = batch_of(q, k, do.shape[-1], cu_q), cu_q is not None
    now = need if not n.B * n.H * n.G else [*need[:3], False, need[4]]  # dM is allocated with its parts
    out = _fake_backward(do, dlse, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, o, top, l, window, scale, cap, p, now)
    if not n.B * n.H * n.G:
        return tuple(t.zero_() for t in out)
    dq, dk, dv, _, dslopes = (t if wanted else None for t, wanted in zip(out, now))
    dO, Q, K = samples(do, n, n.G), samples(q, n, n.G), samples(k, n, 1)
    mask = mask_of(m, q)
    terms = mask.m, of_samples(slopes, q, torch.float32), of_samples(lengths, q, torch.int32), dense(seed)
    of_all, shared = (dense(cu_q), dense(cu_k)), shared_arguments(q, n, window, scale, cap, p, packed)
    has, V, O, of_v, of_o = options_of(terms, window, cap), None, None, (0,) * 3, (0,) * 4
    if v is not None and o is not None:
        V, O = samples(v, n, 1), samples(o, n, n.G)
        of_v, of_o = near(V), O.stride()[:4]
    path = path_of(n, has, packed, q=Q, k=K, v=V)
    special, dO = path == "specialised", readable(path, dO)
    steps = (*dO.stride()[:4], *Q.stride()[:4], *near(K))
    fixed, options, t = constants(q, m, n, "rows", has, not special)
    down, N = blocks(n, n.L, t.BM, packed), n.B * n.H * n.G
    T, r, D = (torch.empty(N, down * t.BM, dtype=torch.float32, device=q.device) for _ in range(3))
    parts = None if dslopes is None else torch.empty(N, down, dtype=torch.float32, device=q.device)
    (by_do, by_q), read = described(path, t.BM, dO, Q), described(path, t.BN, K, V)
    given = (by_do, dense(dlse), by_q, *read, *terms, *of_all, O, dense(top), dense(l), T, r, D, dq, parts)
    if n.L:
        rows_kernel[(down * N,)](*given, *steps, *of_v, *mask.steps, *of_o, *shared, *fixed, special, **options)
    if dslopes is not None:
        torch.sum(parts, 1, out=dslopes.view(-1))
    if n.S and not (dk is None and dv is None):
        fixed, options, t = constants(q, m, n, "columns", has)
        grid = (blocks(n, n.S, t.BN, packed) * n.B * n.H,)
        read = *described(path, t.BM, dO, Q), *described(path, t.BN, K, V)
        given = (*read, *terms, *of_all, T, r, D, dk, dv)
        columns_kernel[grid](*given, *steps, *of_v, *mask.steps, *shared, *fixed, special, **options)
    dm = out[3]
    if m is not None and need[3]:
        given = (dO, Q, K, V, *terms, T, r, D)
        dm = mask_gradient(m, mask, n, given, (*steps, *of_v, *mask.steps), shared, constants(q, m, n, "mask", has))
    return out[0], out[1], out[2], dm, out[4]


def _fake_backward(do, dlse, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, o, top, l, window, scale, cap, p, need):
    shapes = (q.shape, k.shape, (*k.shape[:-1], do.shape[-1]), () if m is None else m.shape, q.shape[:-2])
    dtypes = (q.dtype, q.dtype, q.dtype, q.dtype if m is None else m.dtype, torch.float32)
    return tuple(
        torch.empty(shape if wanted else (0,), dtype=dtype, device=q.device)
        for shape, dtype, wanted in zip(shapes, dtypes, need)
    )


def _forward_flops(q, k, v, *_, out_shape=None):
    return 2 * prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _backward_flops(do, dlse, q, k, *_, out_shape=None):
    return 2 * prod(q[:-1]) * k[-2] * (3 * q[-1] + 2 * do[-1])


FORWARD = operator("triton_attention", _launch_forward, _fake_forward, flops=_forward_flops)
BACKWARD = operator("triton_attention_backward", _launch_backward, _fake_backward, flops=_backward_flops)


def forward(q, k, v, m, slopes, lengths, seed, cu_q, cu_k, window, scale, cap, p):
    return FORWARD(q, k, v, m, slopes, lengths, seed, cu_q, cu_k, list(window), scale, cap, p)


def backward(do, dlse, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, o, top, l, window, scale, cap, p, need):
    if do is None and v is None:
        return RULE.backward(do, dlse, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, o, top, l, window, scale, cap, p, need)
    if do is None:
        do = torch.zeros((), dtype=q.dtype, device=q.device).expand(*q.shape[:-1], v.shape[-1])
    given = do, dlse, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, o, top, l
    dq, dk, dv, dm, dh = BACKWARD(*given, list(window), scale, cap, p, list(need[:5]))
    dh = dh.sum_to_size(slopes.shape).to(slopes.dtype) if need.slopes else None
    dq, dk, dv, dm = (t if wanted else None for t, wanted in zip((dq, dk, dv, dm), need))
    return dq, dk, dv, dm, dh, *(None,) * 4


def unsupported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    m: Tensor | None,
    slopes: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    window: Sequence[int],
    scale: float | None,
    cap: float,
    p: float,
) -> str | None:
    """Why the kernel cannot take the call, or None."""
    E, most = max(q.shape[-1], v.shape[-1]), WIDEST.get(q.element_size())
    if most is not None and most < E:
        return f"a head of {E} features of {q.dtype} is too wide for the fused kernel: at most {most}"
    return computed_in_float32(q)


KERNEL = Kernel(forward, backward, unsupported)


_KERNELS = {"forward": forward_kernel, "rows": rows_kernel, "columns": columns_kernel, "mask": mask_kernel}
_OF_FLOATS = {"lse", "top", "l", "T_", "r_", "D"}
_OPTIONAL = ("m", "slopes", "lengths", "seed", "cu_q", "cu_k", "dlse", "dslopes", "left", "right", "cap")
_GIVEN: dict[str, dict[str, str]] = {
    "full": {},
    "causal": {"right": "i32"},
    "packed": {"right": "i32", "cu_q": "*i32", "cu_k": "*i32"},
    "mask": {"m": "*u8"},
    "bias": {"m": "*t"},
    "options": dict.fromkeys(("right", "left"), "i32") | {"m": "*t", "slopes": "*fp32", "lengths": "*i32", "cap": "fp32"},
}
_GIVEN["everything"] = _GIVEN["options"] | {"seed": "*i32"}
_CALLS = (
    ("pointers", "bf16", 64, "causal mask everything"),
    ("pointers", "bf16", 128, "causal packed bias options everything"),
    ("pointers", "bf16", 256, "causal packed everything"),
    ("pointers", "fp32", 64, "causal"),
    ("pointers", "fp32", 128, "causal everything"),
    ("descriptors", "bf16", 64, "causal everything"),
    ("descriptors", "bf16", 128, "causal bias everything"),
    ("specialised", "bf16", 64, "full causal"),
    ("specialised", "bf16", 128, "full causal"),
)


def specs(warp: int) -> list[Spec]:
    """The kernels at the shipped configurations: full, causal, packed and causal, with a mask, a bias, all the options; and
    those of the second order."""
    from bptoolkit.triton_kernels.attention_double import configurations

    calls = [
        _spec(t, E, label, kind, warp, path)
        for path, t, E, labels in _CALLS
        for label, kind in product(labels.split(), _KERNELS)
        if kind != "mask" or (label in ("bias", "everything") and path == "pointers")
    ]
    return calls + configurations(warp)


def _spec(t: str, E: int, label: str, kind: str, warp: int, path: str = "pointers") -> Spec:
    kernel, names = _KERNELS[kind], _KERNELS[kind].arg_names
    given: dict[str, str] = dict(_GIVEN[label])
    if label in ("options", "everything"):
        given |= {"dlse": "*fp32", "dslopes": "*fp32"}
    terms, window = [given.get(x) for x in ("m", "slopes", "lengths", "seed")], [0 if "left" in given else -1]
    has = options_of(terms, window, "cap" in given)
    dtype, bytes = {"bf16": (torch.bfloat16, 2), "fp32": (torch.float32, 4)}[t]
    BM, BN, warps, stages = tile(kind, E, bytes, has, warp)
    values: dict[str, Any] = dict.fromkeys(_OPTIONAL) | dict.fromkeys(("E", "EV", "BE", "BV"), E)
    special, BR = path == "specialised", tile("rows", E, bytes, has, warp).BM
    values |= {"BM": BM, "BN": BN, "SPLIT": not has and not special, "BR": BR, "ms": 1, "SPECIAL": special}
    values |= {"NATURAL": given.get("m") == "*t", "PRECISION": precision_of(dtype, warp), "UPCAST": False}
    values |= {"ROW": False, "COLUMN": False}
    types = given | dict.fromkeys(("scale", "inverse"), "fp32")
    for name in (name for name in names if name not in types and name not in values):
        number = names.index(name) > names.index("ob" if "ob" in names else "qb") or name in ("ob", "qb")
        types[name] = "i32" if number else "*fp32" if name in _OF_FLOATS else "*i32" if name == "order" else "*t"
    types = {name: types[name].replace("*t", f"*{t}") for name in names if name in types}
    if path != "pointers":
        types |= {name: type_of(t, BM if name in ("do", "q") else BN, E) for name in ("do", "q", "k", "v") if name in names}
    steps = [name for name, of in types.items() if of == "i32" and len(name) == 2 and name.islower()]
    aligned = (*(name for name, of in types.items() if of[0] == "*"), *steps)
    values = {name: values[name] for name in names if name in values and name not in types}
    what = label if path == "pointers" else f"{label}, {path}"
    return Spec(f"attention {kind} {t} {E} {what}", kernel, types, values, aligned, warps, stages, True, parts=PARTS[path])
