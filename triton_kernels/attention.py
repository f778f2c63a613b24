"""Attention by tiles in registers, forward and backward. For the maths see `bptoolkit.ops.attention_rule`.

forward    a program has rows I of Q and passes over K and V: the running maximum T and sum l, O rescaled as T grows
backward   rows: D = rowsum(dO∘O) − dlse and dQ of rows I, by passes over K and V; then columns: dK and dV of columns J, by
           passes over the rows of all heads that share them. P is made again from S, T and l. 7 products of matrices instead
           of 5, and no atomics: the same bits every time
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import Any

import torch
import triton
from torch import Tensor

from bptoolkit.ops.attention_rule import RULE
from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.attention_bias import mask_gradient, mask_kernel
from bptoolkit.triton_kernels.attention_layout import (
    batch_of,
    constants,
    mask_of,
    near,
    of_samples,
    options_of,
    precision_of,
    samples,
    shared_arguments,
    tile,
)
from bptoolkit.triton_kernels.attention_loops import columns_kernel, forward_kernel, rows_kernel
from bptoolkit.triton_kernels.kernel import Kernel, computed_in_float32, dense
from bptoolkit.triton_kernels.operator import operator

WIDEST = 128  # features of a head


def _launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    m: Tensor | None,
    slopes: Tensor | None,
    lengths: Tensor | None,
    window: Sequence[int],
    scale: float | None,
    cap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = _fake_forward(q, k, v, m, slopes, lengths, window, scale, cap)
    n = batch_of(q, k, v.shape[-1])
    if not out[1].numel():
        return out
    Q, K, V = samples(q, n, n.G), samples(k, n, 1), samples(v, n, 1)
    mask = mask_of(m, q)
    terms = mask.m, of_samples(slopes, q, torch.float32), of_samples(lengths, q, torch.int32)
    steps = (*Q.stride()[:4], *near(K), *near(V), *mask.steps)
    fixed, options, t = constants(q, m, n, "forward", options_of(terms, window, cap))
    grid = (triton.cdiv(n.L, t.BM) * n.B * n.H * n.G,)
    forward_kernel[grid](Q, K, V, *terms, *out, *steps, *shared_arguments(q, n, window, scale, cap), *fixed, **options)
    return out


def _fake_forward(q, k, v, m, slopes, lengths, window, scale, cap):
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
    o: Tensor | None,
    top: Tensor,
    l: Tensor,
    window: Sequence[int],
    scale: float | None,
    cap: float,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dQ, dK, dV, dM and dh of each sample; empty those that are not needed."""
    n = batch_of(q, k, do.shape[-1])
    now = need if not n.B * n.H * n.G else [*need[:3], False, need[4]]  # dM is allocated with its parts
    out = _fake_backward(do, dlse, q, k, v, m, slopes, lengths, o, top, l, window, scale, cap, now)
    if not n.B * n.H * n.G:
        return tuple(t.zero_() for t in out)
    dq, dk, dv, _, dslopes = (t if wanted else None for t, wanted in zip(out, now))
    dO, Q, K = samples(do, n, n.G), samples(q, n, n.G), samples(k, n, 1)
    mask = mask_of(m, q)
    terms = mask.m, of_samples(slopes, q, torch.float32), of_samples(lengths, q, torch.int32)
    shared = shared_arguments(q, n, window, scale, cap)
    steps = (*dO.stride()[:4], *Q.stride()[:4], *near(K))
    has, V, O, of_v, of_o = options_of(terms, window, cap), None, None, (0,) * 3, (0,) * 4
    if v is not None and o is not None:
        V, O = samples(v, n, 1), samples(o, n, n.G)
        of_v, of_o = near(V), O.stride()[:4]
    fixed, options, t = constants(q, m, n, "rows", has)
    blocks, N = triton.cdiv(n.L, t.BM), n.B * n.H * n.G
    T, r, D = (torch.empty(N, blocks * t.BM, dtype=torch.float32, device=q.device) for _ in range(3))
    parts = None if dslopes is None else torch.empty(N, blocks, dtype=torch.float32, device=q.device)
    given = (dO, dense(dlse), Q, K, V, *terms, O, dense(top), dense(l), T, r, D, dq, parts)
    if blocks:
        rows_kernel[(blocks * N,)](*given, *steps, *of_v, *mask.steps, *of_o, *shared, *fixed, **options)
    if dslopes is not None:
        torch.sum(parts, 1, out=dslopes.view(-1))
    if n.S and not (dk is None and dv is None):
        fixed, options, t = constants(q, m, n, "columns", has)
        grid = (triton.cdiv(n.S, t.BN) * n.B * n.H,)
        given = (dO, Q, K, V, *terms, T, r, D, dk, dv)
        columns_kernel[grid](*given, *steps, *of_v, *mask.steps, *shared, *fixed, **options)
    dm = out[3]
    if m is not None and need[3]:
        given = (dO, Q, K, V, *terms, T, r, D)
        dm = mask_gradient(m, mask, n, given, (*steps, *of_v, *mask.steps), shared, constants(q, m, n, "mask", has))
    return out[0], out[1], out[2], dm, out[4]


def _fake_backward(do, dlse, q, k, v, m, slopes, lengths, o, top, l, window, scale, cap, need):
    shapes = (q.shape, k.shape, (*k.shape[:-1], do.shape[-1]), () if m is None else m.shape, q.shape[:-2])
    dtypes = (q.dtype, q.dtype, q.dtype, q.dtype if m is None else m.dtype, torch.float32)
    return tuple(
        torch.empty(shape if wanted else (0,), dtype=dtype, device=q.device)
        for shape, dtype, wanted in zip(shapes, dtypes, need)
    )


def _forward_flops(q, k, v, m, slopes, lengths, window, scale, cap, *, out_shape=None):
    return 2 * prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _backward_flops(do, dlse, q, k, v, m, slopes, lengths, o, top, l, window, scale, cap, need, *, out_shape=None):
    return 2 * prod(q[:-1]) * k[-2] * (3 * q[-1] + 2 * do[-1])


FORWARD = operator("triton_attention", _launch_forward, _fake_forward, flops=_forward_flops)
BACKWARD = operator("triton_attention_backward", _launch_backward, _fake_backward, flops=_backward_flops)


def forward(q, k, v, m, slopes, lengths, seed, cu_q, cu_k, window, scale, cap, p):
    return FORWARD(q, k, v, m, slopes, lengths, list(window), scale, cap)


def backward(do, dlse, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, o, top, l, window, scale, cap, p, need):
    if do is None and v is None:
        return RULE.backward(do, dlse, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, o, top, l, window, scale, cap, p, need)
    if do is None:
        do = torch.zeros((), dtype=q.dtype, device=q.device).expand(*q.shape[:-1], v.shape[-1])
    wanted = list(need[:5])
    dq, dk, dv, dm, dh = BACKWARD(do, dlse, q, k, v, m, slopes, lengths, o, top, l, list(window), scale, cap, wanted)
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
    if cu_q is not None:
        return "the fused kernel takes no packed sequences"
    if p:
        return "the fused kernel has no dropout"
    E = max(q.shape[-1], v.shape[-1])
    if E > WIDEST:
        return f"a head of {E} features is too wide for the fused kernel: at most {WIDEST}"
    return computed_in_float32(q)


KERNEL = Kernel(forward, backward, unsupported)


_POINTERS = {
    "forward": ("q k v", "o", "lse top l"),
    "rows": ("do q k v o", "dq", "top l T_ r_ D"),
    "columns": ("do q k v", "dk dv", "T_ r_ D"),
}
_KERNELS = {"forward": forward_kernel, "rows": rows_kernel, "columns": columns_kernel}
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_OPTIONS = ("m", "slopes", "lengths", "dlse", "dslopes")


def specs(warp: int) -> list[Spec]:
    """The kernels at the shipped configurations: full, causal, with a mask, a bias, all the options."""
    every = []
    for t, E, (kind, kernel) in product(("bf16", "fp32"), (64, 128), _KERNELS.items()):
        for label in ("full", "causal", "mask", "bias", "everything"):
            if t == "fp32" and (label == "mask" or (E == 64 and label != "causal")):
                continue
            tensors, written, numbers = (names.split() for names in _POINTERS[kind])
            types = {name: f"*{t}" for name in (*tensors, *written)} | {name: "*fp32" for name in numbers}
            values: dict[str, Any] = dict.fromkeys((*_OPTIONS, "left", "right", "cap"))
            types |= dict.fromkeys(("H", "G", "L", "S", "shift"), "i32") | {"scale": "fp32"}
            if label in ("causal", "everything"):
                types["right"] = "i32"
            if label in ("mask", "bias", "everything"):
                types["m"] = "*u8" if label == "mask" else f"*{t}"
            if label == "everything":
                types |= {"slopes": "*fp32", "lengths": "*i32", "left": "i32", "cap": "fp32"}
                types |= {"dlse": "*fp32", "dslopes": "*fp32"} if kind == "rows" else {}
            has, bytes = {"mask": 1, "bias": 1, "everything": 2}.get(label, 0), 4 if t == "fp32" else 2
            BM, BN, warps, stages = tile(kind, E, bytes, has, warp)
            values |= {
                "E": E,
                "EV": E,
                "BE": E,
                "BV": E,
                "BM": BM,
                "BN": BN,
                "SPLIT": not has,
                "NATURAL": has > 0 and label != "mask",
                "UPCAST": False,
                "ms": 1,
            }
            values |= {"BR": tile("rows", E, bytes, has, warp).BM, "PRECISION": precision_of(_DTYPES[t], warp)}
            steps = [name for name in kernel.arg_names if name not in types and name not in values]
            types |= dict.fromkeys(steps, "i32")
            aligned = (*steps, *(name for name, of in types.items() if of[0] == "*"))
            types = {name: types[name] for name in kernel.arg_names if name in types}
            aligned = tuple(name for name in aligned if name in types)
            values = {name: value for name, value in values.items() if name in kernel.arg_names and name not in types}
            every.append(Spec(f"attention {kind} {t} {E} {label}", kernel, types, values, aligned, warps, stages, True))
    return every
