"""Attention differentiated twice, by tiles in registers. For the maths see `bptoolkit.ops.attention_rule`.

backward    of the rule, as a node that can be differentiated again, pushed forward and batched; it runs `attention`'s kernels
its vjp     sums: u, w and g_dO of rows I, by a pass over K, V and the cotangents b, c; rows: gQ of rows I, by another; columns:
            gK and gV of columns J, by passes over the rows of all heads that share them. P is made again in each of them; no
            L × S matrix is, and no atomics: the same bits every time
forward     mode is u and g_dO alone, at the directions in which q, k and v move

What has to do with the gradient of a mask is the eager loops'.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import Any

import torch
import triton
from torch import Tensor

from bptoolkit.ops.attention_plain import nothing
from bptoolkit.ops.attention_rule import RULE, backward_node, double_fast, push_by, run_backward, shared, summed
from bptoolkit.triton_kernels import attention as first
from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.attention_layout import (
    Batch,
    Tile,
    batch_of,
    blocks,
    mask_of,
    near,
    of_samples,
    options_of,
    samples,
    shared_arguments,
)
from bptoolkit.triton_kernels.attention_second import second_columns_kernel, second_rows_kernel, sums_kernel
from bptoolkit.triton_kernels.kernel import WARP, dense, precision_of, upcasts
from bptoolkit.triton_kernels.operator import operator

WIDEST = 128  # features of a head


def tile(kernel: str, E: int, bytes: int, warp: int) -> Tile:
    """The tile of a launch, for E padded features of elements of so many bytes; no more rows than "sums" has.

    kernel: "sums" (u and w; g_dO too unless `split`), "do", "rows", "columns" (gK; gV too unless `split`) or "v".
    """
    if bytes == 4 and warp == 64:
        return Tile(64, 16, 4, 1)
    if bytes == 4:
        warps = 8 if kernel == "columns" or (E > 64 and kernel in ("do", "v")) else 4
        return Tile(32 if E > 64 and kernel in ("do", "rows", "columns") else 64, 16, warps, 1)
    if warp == 64:
        return Tile(32 if kernel in ("columns", "v") else 64, 16 if E > 64 and kernel == "rows" else 32, 4, 1)
    if E <= 64:
        return Tile(64, 32, 8, 2)
    return {"do": Tile(32, 32, 4, 2), "rows": Tile(32, 32, 8, 2)}.get(kernel, Tile(64, 16, 8, 2))


def split(kernel: str, E: int, bytes: int, warp: int) -> bool:
    """Whether g_dO of "sums", or gV of "columns", takes a launch of its own, for want of registers."""
    return E > 64 or bytes == 4 or (warp == 64 and kernel == "sums")


def part(bytes: int) -> int:
    """How many features at a time enter the products over features, 0 for all: a factor of tf32x3 takes twice its registers."""
    return 16 if bytes == 4 else 0


def size_of(q: Tensor, n: Batch) -> tuple[int, int]:
    return max(triton.next_power_of_2(max(n.E, n.EV)), 16), q.element_size()


def constants(q: Tensor, m: Tensor | None, n: Batch, kernel: str) -> tuple[tuple[Any, ...], dict[str, Any], Tile]:
    """What the kernels take from the features to the last but one, how they are launched, and the tile."""
    BE, BV = (max(triton.next_power_of_2(x), 16) for x in (n.E, n.EV))
    t = tile(kernel, *size_of(q, n), WARP)
    natural = m is not None and m.dtype != torch.bool
    fixed = n.E, n.EV, BE, BV, t.BM, t.BN, natural, precision_of(q.dtype, WARP), upcasts(q), part(q.element_size())
    return fixed, {"num_warps": t.warps, "num_stages": t.stages, "enable_fp_fusion": True}, t


def steps(t: Tensor | None, is_shared: bool = False) -> tuple[int, ...]:
    """Over b, h, g and rows, without g for k, v, b, c; zeros where the tensor is not given."""
    if t is None:
        return (0,) * (3 if is_shared else 4)
    return near(t) if is_shared else t.stride()[:4]


def _launch(
    a: Tensor | None,
    b: Tensor | None,
    c: Tensor | None,
    f: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """g_dO, g_dlse, gQ, gK, gV and gh of each sample; empty those that are not needed."""
    out = _fake(a, b, c, f, do, dlse, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, o, top, l, window, scale, cap, p, need)
    n, packed = batch_of(q, k, do.shape[-1], cu_q), cu_q is not None
    N = n.B * n.H * n.G
    if not N:
        return out
    gdo, gdlse, gq, gk, gv, gslopes = (t if wanted else None for t, wanted in zip(out, need))
    if a is None and b is None and f is None:  # U is 0: nothing is left of X, nor of gV
        v = o = None
        if gv is not None:
            gv.zero_()
            gv = None
    mask = mask_of(m, q)
    A, dO, Q, O = (None if t is None else samples(t, n, n.G) for t in (a, do, q, o))
    B, C, K, V = (None if t is None else samples(t, n, 1) for t in (b, c, k, v))
    numbers_of_samples = of_samples(slopes, q, torch.float32), of_samples(lengths, q, torch.int32)
    given = A, B, C, of_samples(f, q, torch.float32), dO, Q, K, V, mask.m, *numbers_of_samples
    given = *given, dense(seed), dense(cu_q), dense(cu_k)
    walk = *steps(A), *steps(B, True), *steps(C, True), *steps(dO), *steps(Q), *steps(K, True), *steps(V, True), *mask.steps
    common = shared_arguments(q, n, window, scale, cap, p, packed)
    weights = not (gq is None and gk is None and gslopes is None)
    size = size_of(q, n)
    apart = {kernel: split(kernel, *size, WARP) for kernel in ("sums", "columns")}

    rows, numbers = (dense(dlse), O, dense(top), dense(l)), None
    BR = tile("sums", *size, WARP).BM
    if weights or gv is not None:
        numbers = torch.empty(N, blocks(n, n.L, BR, packed), 5, BR, dtype=torch.float32, device=q.device)
    launches: list[Any] = [("sums", numbers, None if apart["sums"] else gdo, gdlse, weights)]
    launches += [("do", None, gdo, None, False)] if apart["sums"] else []
    for kernel, *written, has_w in launches:
        fixed, options, t = constants(q, m, n, kernel)
        grid = (blocks(n, n.L, t.BM, packed) * N,)
        if n.L and any(x is not None for x in written):
            sums_kernel[grid](*given, *rows, *written, *walk, *steps(O), *common, *fixed, has_w, **options)

    if gq is not None or gslopes is not None:
        fixed, options, t = constants(q, m, n, "rows")
        down = blocks(n, n.L, t.BM, packed)
        partial = None if gslopes is None else torch.empty(N, down, dtype=torch.float32, device=q.device)
        if n.L:
            second_rows_kernel[(down * N,)](*given, numbers, gq, partial, *walk, *common, *fixed, BR, **options)
        if gslopes is not None:
            torch.sum(partial, 1, out=gslopes.view(-1))

    for kernel, *written in [("columns", gk, None), ("v", None, gv)] if apart["columns"] else [("columns", gk, gv)]:
        fixed, options, t = constants(q, m, n, kernel)
        grid = (blocks(n, n.S, t.BN, packed) * n.B * n.H,)
        if n.S and any(x is not None for x in written):
            second_columns_kernel[grid](*given, numbers, *written, *walk, *common, *fixed, BR, **options)
    return out


def _fake(a, b, c, f, do, dlse, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, o, top, l, window, scale, cap, p, need):
    shapes = (do.shape, q.shape[:-1], q.shape, k.shape, (*k.shape[:-1], do.shape[-1]), q.shape[:-2])
    dtypes = (q.dtype, torch.float32, q.dtype, q.dtype, q.dtype, torch.float32)
    return tuple(
        torch.empty(shape if wanted else (0,), dtype=dtype, device=q.device)
        for shape, dtype, wanted in zip(shapes, dtypes, need)
    )


def _flops(a, b, c, f, do, dlse, q, k, v, *others, out_shape=None):
    """Of the maths: each product once."""
    need = others[-1]
    of_a, of_b, of_c, of_v = (t is not None for t in (a, b, c, v))
    need_do, _, need_q, need_k, need_v, _ = need
    by_e = 1 + of_a + of_b + need_q * (1 + of_b) + need_k * (1 + of_a)
    by_v = (of_v + of_c) * (1 + need_do) + need_v
    return 2 * prod(q[:-1]) * k[-2] * (q[-1] * by_e + do[-1] * by_v)


DOUBLE = operator("triton_attention_double", _launch, _fake, flops=_flops)


# The rule's backward, to be differentiated again ---------------------------------------------------------------------------


def _refused(q, k, do, m, slopes, lengths, seed, cu_q, cu_k, window, scale, cap, p):
    """Why the kernels cannot take the call, in which vmap may have put dimensions in front."""
    if any(t is not None and t.dim() > 1 for t in (seed, cu_q, cu_k)):
        return "several calls side by side"
    return first.unsupported(q, k, do, m, slopes, lengths, seed, cu_q, cu_k, window, scale, cap, p)


def _fast(do, dlse, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, o, top, l, window, scale, cap, p, need):
    """The first order: `attention.backward`, where it takes the call."""
    of, options = {"q": q, "k": k, "v": v, "m": m, "s": slopes}, (window, scale, cap, p)
    wanted = RULE.Need(*(x in need for x in of), *(False,) * 4)
    why = _refused(q, k, do, m, slopes, lengths, seed, cu_q, cu_k, *options)
    run = RULE.backward if why else first.backward
    with torch.no_grad():
        grads = run(do, dlse, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, o, top, l, *options, wanted)
    return tuple(nothing(q) if g is None else g for g in grads[:5])


def _double(a, b, c, e, f, wanted, args):
    """The second: as `double_fast`."""
    do, dlse, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, o, top, l, window, scale, cap, p, _ = args
    E, options = max(q.shape[-1], do.shape[-1]), (window, scale, cap, p)
    why = _refused(q, k, do, m, slopes, lengths, seed, cu_q, cu_k, *options)
    if why or e is not None or "m" in wanted or E > WIDEST:
        return double_fast(a, b, c, e, f, wanted, args)
    K, V = k, v
    full = cu_q is not None or options_of((m, slopes, lengths, seed), window, cap) >= 2
    if WARP == 64 and full:  # a loop over the group would spill scalars
        K, V, b, c = (shared(t, q) for t in (k, v, b, c))
    need = [x in wanted for x in "olqkvs"]
    others = m, slopes, lengths, seed, cu_q, cu_k, o, top, l, list(window), scale, cap, p
    grads = DOUBLE(a, b, c, f, do, dlse, q, K, V, *others, need)
    gdo, gdlse, gq, gk, gv, gh = (g if n else None for g, n in zip(grads, need))
    gk, gv = (summed(g, k, g is not None) for g in (gk, gv))
    return gdo, gdlse, gq, gk, gv, None, None if gh is None else gh.sum_to_size(slopes.shape).to(slopes.dtype)


AGAIN = backward_node("attention_backward_fused", _fast, _double)


def again(do, dlse, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, o, top, l, window, scale, cap, p, need):
    args = do, dlse, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, o, top, l, window, scale, cap, p
    return run_backward(AGAIN, *args, need)


def push(tangents, do, dlse, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, o, top, l, window, scale, cap, p, need):
    args = do, dlse, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, o, top, l, window, scale, cap, p
    return push_by(AGAIN, tangents, args, need)


KERNEL = first.KERNEL._replace(again=again, push=push)


# The shipped configurations ------------------------------------------------------------------------------------------------

_KERNELS = {
    "sums": (sums_kernel, "numbers gdlse"),
    "do": (sums_kernel, "gdo"),
    "rows": (second_rows_kernel, "numbers gq"),
    "columns": (second_columns_kernel, "numbers gk"),
    "v": (second_columns_kernel, "numbers gv"),
}
_TENSORS, _OUTPUTS = "a b c do q k v o", "gdo gq gk gv"
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_FLOAT32 = "f slopes dlse top l numbers gdlse gslopes"


def configurations(warp: int) -> list[Spec]:
    """Every launch at all cotangents of q, k and v: causal, that packed and with dropout, and with all other options.

    `attention.specs` has them.
    """
    every, labels = [], ("causal", "packed", "all")
    for t, E, (kind, (kernel, written)), label in product(("bf16", "fp32"), (64, 128), _KERNELS.items(), labels):
        bytes, names = 4 if t == "fp32" else 2, kernel.arg_names
        of = {"do": "sums", "v": "columns"}.get(kind, kind)
        two = split(of, E, bytes, warp)
        if (kind in ("do", "v") and not two) or (t == "fp32" and (label == "packed" or (E == 64 and label == "causal"))):
            continue
        pointers = dict.fromkeys([*_TENSORS.split(), *_OUTPUTS.split(), "m"], f"*{t}")
        pointers |= dict.fromkeys(("lengths", "seed", "cu_q", "cu_k"), "*i32")
        pointers |= dict.fromkeys(_FLOAT32.split(), "*fp32")
        there = {*_TENSORS.split(), "top", "l", *written.split()}
        there |= {"m", "f", "slopes", "lengths", "dlse", "gslopes"} if label == "all" else set()
        there |= {"seed", "cu_q", "cu_k"} if label == "packed" else set()
        there |= set() if two else {"sums": {"gdo"}, "columns": {"gv"}}.get(kind, set())
        types = {name: of for name, of in pointers.items() if name in there}
        numbers = ("H", "G", "L", "S", "N", "MH", "MG", "shift", "right", "threshold")
        types |= dict.fromkeys(numbers, "i32") | {"scale": "fp32", "inverse": "fp32"}
        types |= {"left": "i32", "cap": "fp32"} if label == "all" else {}
        BM, BN, warps, stages = tile(kind, E, bytes, warp)
        values: dict[str, Any] = dict.fromkeys((*pointers, "left", "cap"))
        values |= {"E": E, "EV": E, "BE": E, "BV": E, "BM": BM, "BN": BN, "BR": tile("sums", E, bytes, warp).BM, "ms": 1}
        values |= {"NATURAL": label == "all", "PRECISION": precision_of(_DTYPES[t], warp), "UPCAST": False}
        values |= {"PART": part(bytes), "WEIGHTS": kind == "sums"}
        if warp == 64 and label != "causal" and kernel is second_columns_kernel:
            del types["G"]
            values["G"] = 1  # see `_double`
        steps = [name for name in names if name not in types and name not in values]
        types |= dict.fromkeys(steps, "i32")
        types = {name: types[name] for name in names if name in types}
        aligned = tuple(name for name, of in types.items() if of[0] == "*" or name in steps)
        values = {name: value for name, value in values.items() if name in names and name not in types}
        every.append(Spec(f"attention twice {kind} {t} {E} {label}", kernel, types, values, aligned, warps, stages, True))
    return every
