"""What the tests of attention's second order share: the kernels beside the eager loops, and Hessian-vector products."""

from __future__ import annotations

import math

import torch
from fused import double, near, normal
from torch import Tensor

import bptoolkit as bp
from bptoolkit.ops import attention_plain as plain
from bptoolkit.ops.attention_rule import double_fast, shared
from bptoolkit.ops.attention_tiles import EVERYWHERE
from bptoolkit.triton_kernels import attention_double as file
from bptoolkit.triton_kernels import attention_layout as layout

sdpa = bp.functional.scaled_dot_product_attention
BOTTOM = (-1, 0, 1)  # causal, the last query at the last key
GIVEN, ALL = "abc", "olqkv"  # the cotangents that come, and the gradients that are wanted


def tiles_of(monkeypatch, size, first_size, split=False, part=0):
    monkeypatch.setattr(file, "tile", lambda *_: layout.Tile(size, size, 4, 1))
    monkeypatch.setattr(layout, "tile", lambda *_: layout.Tile(first_size, first_size, 4, 1))
    monkeypatch.setattr(file, "split", lambda *_: split)
    monkeypatch.setattr(file, "part", lambda *_: part)


def run(
    L,
    S,
    E=8,
    EV=None,
    *,
    B=(1,),
    of=None,
    dtype=torch.float32,
    device="cpu",
    given=GIVEN,
    need=ALL,
    errors=40,
    m=None,
    slopes=None,
    lengths=None,
    window=EVERYWHERE,
    scale=None,
    cap=0.0,
    dlse=True,
    lay=lambda t: t,
    laid="qkvdabc",
):
    """The kernels' vjp of backward beside the eager loops' in float64; of: the batch dimensions of k and v."""
    EV = EV or E
    rows, columns = (*B, L), (*(of or B), S)
    shapes = ((*rows, E), (*columns, E), (*columns, EV), (*rows, EV), (*rows, E), (*columns, E), (*columns, EV))
    every = (normal(*s, dtype=dtype, device=device, seed=n) for n, s in enumerate(shapes))
    q, k, v, do, a, b, c = (lay(t) if x in laid else t for x, t in zip("qkvdabc", every))
    f = None if slopes is None else normal(*slopes.shape, dtype=slopes.dtype, device=device, seed=9)
    return run_of(
        q,
        k,
        v,
        do,
        (a, b, c, f),
        given,
        need,
        errors,
        dlse,
        m=m,
        slopes=slopes,
        lengths=lengths,
        window=window,
        scale=scale,
        cap=cap,
    )


def run_of(q, k, v, do, moves, given, need, errors, dlse, *, m, slopes, lengths, window, scale, cap):
    moves = [t if x in given else None for x, t in zip("abcf", moves)]
    slope, options = ([slopes], [list(window), scale, cap, 0.0])
    dlse = normal(*q.shape[:-1], device=str(q.device), seed=8) if dlse else None
    only_v = set(given) == {"c"} and set(need) <= {"o", "v"}
    exact = double([q, k, v, m, *slope])
    o, _, top, l = plain.forward(
        exact[0], shared(exact[1], q), shared(exact[2], q), exact[3], exact[4], lengths, *(None,) * 3, *options
    )
    o, top, l = o.to(q.dtype), top.float(), l.float()
    args = [do, dlse, q, k, v, m, *slope, lengths, *(None,) * 3, o, top, l, *options, "qkvms"]
    if only_v:
        args[4] = args[11] = None
    kept = [t.clone() if isinstance(t, Tensor) else t for t in (*moves, *args)]
    a, b, c, f = moves
    got = file._double(a, b, c, None, f, need, args)
    again = file._double(a, b, c, None, f, need, args) if q.shape[-2] <= 17 else got  # which costs the interpreter time
    a, b, c, f = double(moves)
    want = double_fast(a, b, c, None, f, need, double(args))
    like = (do.dtype, torch.float32, q.dtype, q.dtype, q.dtype, None, None if slopes is None else slopes.dtype)
    for letter, g, w, dtype, same in zip(("do", "dlse", "q", "k", "v", "m", "slopes"), got, want, like, again):
        near(g, w, dtype, errors, f"g_{letter}")
        assert g is None or torch.equal(g.nan_to_num(), same.nan_to_num()), "another run gives other bits"
    for t, old in zip((*moves, *args), kept):
        assert not isinstance(t, Tensor) or torch.equal(t.nan_to_num(), old.nan_to_num()), "an input was written to"
    return got


def math_attention(q, k, v, causal=True):
    """Plain torch, in whole matrices."""
    s = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        s = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), -math.inf)
    return s.softmax(-1) @ v


def leaves(device, dtype=torch.float32, heads=(1, 1), L=18, E=8):
    shapes = ((1, heads[0], L, E), (1, heads[1], L, E), (1, heads[1], L, E))
    return [normal(*s, dtype=dtype, device=device, seed=n) for n, s in enumerate(shapes)]


def loss_of(attend):
    return lambda *qkv: attend(*qkv).sin().sum()


def ours(*qkv):
    return sdpa(*qkv, is_causal=True, backend="triton")


def by_reverse(attend, qkv, moves):
    """A Hessian-vector product, by reverse mode twice."""
    qkv = [t.detach().requires_grad_() for t in qkv]
    grads = torch.autograd.grad(loss_of(attend)(*qkv), qkv, create_graph=True)
    return torch.autograd.grad(grads, qkv, moves)
