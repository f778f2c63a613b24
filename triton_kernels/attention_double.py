"""Attention differentiated twice, by tiles in registers. For the maths see `bptoolkit.ops.attention_rule`.

backward     of the rule, as a node that can be differentiated again, pushed forward and batched; it runs the kernels of `attention`
its vjp      sums: u, w and g_dO of rows I, by a pass over K, V and the cotangents b, c; then rows: gQ of rows I, by another; then
             columns: gK and gV of columns J, by passes over the rows of all heads that share them. P is made again in each of
             them, with no L × S matrix and no atomics: the same bits every time
forward mode u and g_dO alone, at the directions in which q, k and v move

Packed sequences, dropout, and what has to do with the gradient of a mask are the eager loops'.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import triton
from torch import Tensor

from bptoolkit.ops.attention_plain import nothing
from bptoolkit.ops.attention_rule import RULE, backward_node, double_fast, push_by, run_backward
from bptoolkit.triton_kernels import attention as first
from bptoolkit.triton_kernels.attention_layout import (
    Batch,
    Tile,
    batch_of,
    mask_of,
    near,
    of_samples,
    precision_of,
    samples,
    shared_arguments,
)
from bptoolkit.triton_kernels.attention_second import second_columns_kernel, second_rows_kernel, sums_kernel
from bptoolkit.triton_kernels.kernel import WARP, dense
from bptoolkit.triton_kernels.operator import operator


WIDEST = 128  # features of a head


def tile(kernel: str, E: int, bytes: int, warp: int) -> Tile:
    """The tile of "sums", "rows" or "columns", for E padded features of elements of so many bytes. No more rows than "sums"."""
    return Tile(32, 32, 4, 2)


def split(kernel: str, E: int, bytes: int, warp: int) -> bool:
    """Whether "sums" (u and w, g_dO) or "columns" (gK, gV) takes two launches."""
    return E > 64


def constants(q: Tensor, m: Tensor | None, n: Batch, kernel: str) -> tuple[tuple[Any, ...], dict[str, Any], Tile, bool]:
    """What the kernels take from the features on, how they are launched, the tile, and whether there are two launches."""
    BE, BV = (max(triton.next_power_of_2(x), 16) for x in (n.E, n.EV))
    size = max(BE, BV), q.element_size(), WARP
    t = tile(kernel, *size)
    natural = m is not None and m.dtype != torch.bool
    upcast = q.device.type == "cpu" and q.dtype == torch.bfloat16  # whose products the interpreter gets wrong
    fixed = (n.E, n.EV, BE, BV, t.BM, t.BN, natural, precision_of(q.dtype, WARP), upcast, tile("sums", *size).BM)
    return fixed, {"num_warps": t.warps, "num_stages": t.stages, "enable_fp_fusion": True}, t, split(kernel, *size)


def steps(t: Tensor | None, is_shared: bool = False) -> tuple[int, ...]:
    """The steps over b, h, g and rows, those of k, v, b, c without g; zeros where the tensor is not given."""
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
    o: Tensor | None,
    top: Tensor,
    l: Tensor,
    window: Sequence[int],
    scale: float | None,
    cap: float,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """g_dO, g_dlse, gQ, gK, gV and gh of each sample; empty those that are not needed."""
    out = _fake(a, b, c, f, do, dlse, q, k, v, m, slopes, lengths, o, top, l, window, scale, cap, need)
    n = batch_of(q, k, do.shape[-1])
    N = n.B * n.H * n.G
    if not N:
        return out
    gdo, gdlse, gq, gk, gv, gslopes = (t if wanted else None for t, wanted in zip(out, need))
    if a is None and b is None and f is None:  # U is 0: of X nothing is left, nor of gV
        v = o = None
        if gv is not None:
            gv.zero_()
            gv = None
    mask = mask_of(m, q)
    terms = mask.m, of_samples(slopes, q, torch.float32), of_samples(lengths, q, torch.int32)
    A, dO, Q, O = (None if t is None else samples(t, n, n.G) for t in (a, do, q, o))
    B, C, K, V = (None if t is None else samples(t, n, 1) for t in (b, c, k, v))
    given = A, B, C, of_samples(f, q, torch.float32), dO, Q, K, V, *terms
    walk = *steps(A), *steps(B, True), *steps(C, True), *steps(dO), *steps(Q), *steps(K, True), *steps(V, True), *mask.steps
    H, G, L, S, _, left, right, shift, sigma, cap_, *_ = shared_arguments(q, n, window, scale, cap, 0.0, False)
    shared = H, G, L, S, left, right, shift, sigma, cap_
    weights = gq is not None or gk is not None or gslopes is not None

    fixed, options, t, two = constants(q, m, n, "sums")
    blocks = triton.cdiv(n.L, t.BM)
    numbers = None
    if weights or gv is not None:
        numbers = torch.empty(N, blocks, 5, t.BM, dtype=torch.float32, device=q.device)
    rows = dense(dlse), O, dense(top), dense(l)
    wholes = ((numbers, None, gdlse, weights), (None, gdo, None, False)) if two else ((numbers, gdo, gdlse, weights),)
    for *written, more in wholes:
        if blocks and any(x is not None for x in written):
            sums_kernel[(blocks * N,)](*given, *rows, *written, *walk, *steps(O), *shared, *fixed[:-1], more, **options)

    if gq is not None or gslopes is not None:
        fixed, options, t, _ = constants(q, m, n, "rows")
        blocks = triton.cdiv(n.L, t.BM)
        partial = None if gslopes is None else torch.empty(N, blocks, dtype=torch.float32, device=q.device)
        if blocks:
            second_rows_kernel[(blocks * N,)](*given, numbers, gq, partial, *walk, *shared, *fixed, **options)
        if gslopes is not None:
            torch.sum(partial, 1, out=gslopes.view(-1))

    fixed, options, t, two = constants(q, m, n, "columns")
    for written in ((gk, None), (None, gv)) if two else ((gk, gv),):
        if n.S and any(x is not None for x in written):
            grid = (triton.cdiv(n.S, t.BN) * n.B * n.H,)
            second_columns_kernel[grid](*given, numbers, *written, *walk, *shared, *fixed, **options)
    return out


def _fake(a, b, c, f, do, dlse, q, k, v, m, slopes, lengths, o, top, l, window, scale, cap, need):
    shapes = (do.shape, q.shape[:-1], q.shape, k.shape, (*k.shape[:-1], do.shape[-1]), q.shape[:-2])
    dtypes = (q.dtype, torch.float32, q.dtype, q.dtype, q.dtype, torch.float32)
    return tuple(
        torch.empty(shape if wanted else (0,), dtype=dtype, device=q.device)
        for shape, dtype, wanted in zip(shapes, dtypes, need)
    )


def _flops(a, b, c, f, do, dlse, q, k, v, m, slopes, lengths, o, top, l, window, scale, cap, need, *, out_shape=None):
    """Of the maths: each product once."""
    E, V = q[-1] * (1 + (a is not None) + (b is not None)), do[-1] * ((v is not None) + (c is not None))
    of_do, _, of_q, of_k, of_v, _ = need
    E += q[-1] * (of_q * (1 + (b is not None)) + of_k * (1 + (a is not None)))
    V += do[-1] * (of_do * ((v is not None) + (c is not None)) + of_v)
    return 2 * prod(q[:-1]) * k[-2] * (E + V)


DOUBLE = operator("triton_attention_double", _launch, _fake, flops=_flops)


def _again_fast(do, dlse, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, o, top, l, window, scale, cap, p, need):
    """`attention.backward`, with the parameters of the node."""
    of = {"q": q, "k": k, "v": v, "m": m, "slopes": slopes}
    wanted = RULE.Need(*(x[0] in need for x in of), *(False,) * 4)
    options = window, scale, cap, p
    run = RULE.backward if first.unsupported(q, k, do, m, slopes, lengths, seed, cu_q, cu_k, *options) else first.backward
    with torch.no_grad():
        grads = run(do, dlse, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, o, top, l, *options, wanted)
    return tuple(nothing(q) if g is None else g for g in grads[:5])


def _double(a, b, c, e, f, wanted, args):
    do, dlse, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, o, top, l, window, scale, cap, p, _ = args
    left_out = e is not None or "m" in wanted or p or cu_q is not None or max(q.shape[-1], do.shape[-1]) > WIDEST
    if left_out or first.unsupported(q, k, do, m, slopes, lengths, seed, cu_q, cu_k, window, scale, cap, p):
        return double_fast(a, b, c, e, f, wanted, args)
    need = [x in wanted for x in "olqkvs"]
    grads = DOUBLE(a, b, c, f, do, dlse, q, k, v, m, slopes, lengths, o, top, l, list(window), scale, cap, need)
    gdo, gdlse, gq, gk, gv, gh = (g if n else None for g, n in zip(grads, need))
    return gdo, gdlse, gq, gk, gv, None, None if gh is None else gh.sum_to_size(slopes.shape).to(slopes.dtype)


AGAIN = backward_node("attention_backward_fused", _again_fast, _double)


def again(do, dlse, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, o, top, l, window, scale, cap, p, need):
    return run_backward(AGAIN, do, dlse, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, o, top, l, window, scale, cap, p, need)


def push(tangents, do, dlse, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, o, top, l, window, scale, cap, p, need):
    args = do, dlse, q, k, v, m, slopes, lengths, seed, cu_q, cu_k, o, top, l, window, scale, cap, p
    return push_by(AGAIN, tangents, args, need)


KERNEL = first.KERNEL._replace(again=again, push=push)
