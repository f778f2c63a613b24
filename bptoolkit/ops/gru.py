"""GRU, a whole sequence at once.

Maths     r, z = σ(Wi xₜ + bi + Wh hₜ₋₁ + bh)            blocks of H rows: r z n
          q = Wh_n hₜ₋₁ + bh_n
          n = tanh(Wi_n xₜ + bi_n + r q)
          hₜ = n + z (hₜ₋₁ - n)    yₜ = hₜ
          backward through time, t = T … 1, with the carry dh from step t+1:
          dh += dyₜ
          da_n = dh (1-z)(1-n²)    da_z = dh (hₜ₋₁ - n) z(1-z)    da_r = da_n q r(1-r)    dq = da_n r
          dh ← dh z + Whᵀ [da_r da_z dq]
          after the loop, each one product over all steps:
          dx = [da_r da_z da_n] Wi       dWi = Σₜ [da_r da_z da_n]ₜᵀ xₜ      dbi = Σₜ [da_r da_z da_n]ₜ
                                         dWh = Σₜ [da_r da_z dq]ₜᵀ hₜ₋₁      dbh = Σₜ [da_r da_z dq]ₜ
Letters   see `recurrent`; *V dimensions that vmap adds; G is r z q n side by side, T B 4H
          da in the rules is da_n da_r da_z dq: its first three blocks go back to x, its last three to hₜ₋₁
Saving    save="gates" keeps x y G; save="outputs" keeps x y and makes G again from the outputs, in one product over
          all steps: hₜ₋₁ = yₜ₋₁ is known for every t, so nothing is replayed
Source    Cho et al. 2014; n with q inside, as cuDNN and torch have it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.op import Op
from bptoolkit.opaque import Opaque
from bptoolkit.ops import recurrent_reference
from bptoolkit.ops.recurrent import (
    CHUNK,
    Layout,
    before,
    carry,
    check_save,
    folded,
    last,
    options_of,
    order,
    over_time,
    sequence,
    valid,
    weights_of,
    within,
)

# --- the loops ------------------------------------------------------------------------------------------------------------


def loop(
    pre: Tensor, h0: Tensor, wh: Tensor, bh: Tensor | None, lengths: Tensor | None, reverse: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    """The outputs y and the gates G from pre = Wi x + bi: *V T B 3H, and bh: *V 1 3H. Without `keep`, G comes back empty."""
    T, h = pre.shape[-3], h0
    keeps = [None] * T if lengths is None else valid(T, lengths).unbind(-3)
    ys, gs = [pre] * T, [pre] * T
    for t in order(T, reverse):
        ar, az, an = pre.select(-3, t).chunk(3, -1)
        u = h @ wh.mT  # *V B 3H
        ur, uz, q = (u if bh is None else u + bh).chunk(3, -1)
        r, z = (ar + ur).sigmoid(), (az + uz).sigmoid()
        n = (an + r * q).tanh()
        h = carry(keeps[t], n + z * (h - n), h)
        ys[t], gs[t] = h, torch.cat([r, z, q, n], -1)
    return within(torch.stack(ys, -3), lengths), within(torch.stack(gs, -3), lengths) if keep else _no_gates(pre)


def loop_fast(pre, h0, wh, bh, lengths, reverse, keep):
    """`loop` in place, without *V."""
    T, B, H = pre.shape[0], pre.shape[1], h0.shape[-1]
    y, g, h, wt = pre.new_empty(T, B, H), pre.new_empty(T if keep else 1, B, 4 * H), h0, wh.mT
    blocks = [g[..., : 3 * H], g[..., : 2 * H], *g.split(H, -1)]  # r z q at once, r z at once, r, z, q, n
    above = [s.unbind(0) for s in (pre[..., : 2 * H], pre[..., 2 * H :], y)]
    rows = list(zip(*(b.unbind(0) if keep else [b[0]] * T for b in blocks), *above))
    reset = valid(T, lengths).unbind(0) if reverse and lengths is not None else None
    for t in order(T, reverse):
        rzq, rz, r, z, q, n, arz, an, yt = rows[t]
        torch.mm(h, wt, out=rzq) if bh is None else torch.addmm(bh, h, wt, out=rzq)
        rz.add_(arz).sigmoid_()
        torch.addcmul(an, r, q, out=n).tanh_()
        torch.lerp(n, h, z, out=yt)
        h = yt if reset is None else torch.where(reset[t], yt, h0)  # a row starts at its own end
    if lengths is not None:
        ends = ~valid(T, lengths)
        for s in (y, g) if keep else (y,):
            s.masked_fill_(ends, 0)
    return y, g if keep else _no_gates(pre)


def _no_gates(pre: Tensor) -> Tensor:
    *V, _, B, n = pre.shape
    return pre.new_empty(*V, 0, B, n // 3 * 4)


def loop_fake(pre, h0, wh, bh, lengths, reverse, keep):
    lead, H = pre.shape[:-1], h0.shape[-1]
    return pre.new_empty(*lead, H), pre.new_empty(*lead, 4 * H) if keep else _no_gates(pre)


def bptt(
    dy: Tensor | None,
    dG: Tensor | None,
    G: Tensor,
    y: Tensor,
    h0: Tensor,
    wh: Tensor,
    lengths: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients da and dh0 from the cotangents of y and G, which are zero past a row's length."""
    T, hp = G.shape[-3], before(h0, y, lengths, reverse)
    keeps = [None] * T if lengths is None else valid(T, lengths).unbind(-3)
    r, z, q, n = G.chunk(4, -1)
    # the local derivatives, for all steps at once: the loop holds the carry only
    kn, kz, kr = within((1 - z) * (1 - n * n), lengths), (hp - n) * z * (1 - z), q * r * (1 - r)
    slope = None
    if dG is not None:
        dr, dz, dq, dn = dG.chunk(4, -1)
        slope = dn * (1 - n * n), torch.cat([dr * r * (1 - r), dz * z * (1 - z), dq], -1)
    dh, das = torch.zeros_like(h0), [G] * T  # *V B H
    for t in order(T, reverse)[::-1]:
        dht = dh if dy is None else dh + dy.select(-3, t)
        rt, zt, knt, kzt, krt = (k.select(-3, t) for k in (r, z, kn, kz, kr))
        an = dht * knt if slope is None else dht * knt + slope[0].select(-3, t)
        rzq = torch.cat([an * krt, dht * kzt, an * rt], -1)  # *V B 3H
        if slope is not None:
            rzq = rzq + slope[1].select(-3, t)
        das[t] = torch.cat([an, rzq], -1)  # *V B 4H
        dh = carry(keeps[t], dht * zt + rzq @ wh, dh)
    return torch.stack(das, -3), dh


def bptt_fast(dy, dG, G, y, h0, wh, lengths, reverse):
    """`bptt` in place, without *V. The local derivatives are made for a few steps at a time, so that they stay in cache."""
    if dG is not None or dy is None:  # second order only
        return bptt(dy, dG, G, y, h0, wh, lengths, reverse)
    T, B, H = y.shape
    da, dh, dys = G.new_empty(G.shape), torch.zeros_like(h0), dy.unbind(0)
    all4, rzq, z = da.unflatten(-1, (4, H)).unbind(0), da[..., H:].unbind(0), G[..., H : 2 * H].unbind(0)
    freeze = lengths is not None and reverse  # the other way dh is still zero past the lengths
    keeps = valid(T, lengths).unbind(0) if freeze else None
    hps = before(h0, y, lengths, reverse) if freeze else None
    steps, few = order(T, reverse)[::-1], max(1, CHUNK // max(1, 4 * B * H))
    dht = dys[steps[0]] + dh
    for k in range(0, T, few):
        ts = steps[k : k + few]
        at = slice(min(ts), max(ts) + 1)
        edge = at.stop if reverse else at.start - 1
        hp = before(y[edge] if 0 <= edge < T else h0, y[at], None, reverse) if hps is None else hps[at]
        _local(da[at], G[at], hp)
        if freeze:
            da[at].masked_fill_(~valid(T, lengths)[at], 0)
        for j, t in enumerate(ts, k + 1):
            all4[t].mul_(dht.unsqueeze(1))
            if keeps is not None:
                dh = torch.where(keeps[t], torch.addmm(dht * z[t], rzq[t], wh), dh)
                dht = dh if j == T else dh + dys[steps[j]]
            elif j == T:
                dh = (dht * z[t]).addmm_(rzq[t], wh)
            else:
                dht = torch.addcmul(dys[steps[j]], dht, z[t]).addmm_(rzq[t], wh)
    return da, dh


def _local(A: Tensor, g: Tensor, hp: Tensor) -> None:
    """The local derivatives of a few steps, all as multiples of dh, into A: those of n, r, z and q."""
    (r, z, q, n), (kn, kr, kz, kq) = g.chunk(4, -1), A.chunk(4, -1)
    u = 1 - z
    torch.mul(n, n, out=kz)
    torch.addcmul(u, u, kz, value=-1, out=kn)  # (1-z)(1-n²)
    torch.mul(kn, r, out=kq)
    torch.mul(kq, q, out=kr)
    kr.addcmul_(kr, r, value=-1)  # kn q r (1-r)
    torch.sub(hp, n, out=kz)
    kz.mul_(z).mul_(u)  # (hₜ₋₁ - n) z (1-z)


def bptt_fake(dy, dG, G, y, h0, wh, lengths, reverse):
    return G.new_empty(G.shape), G.new_empty(h0.shape)


LOOP = Opaque("gru_loop", loop, loop_fake, vmap="leading", fast=folded("tbwwl", loop_fast, loop))
BPTT = Opaque("gru_bptt", bptt, bptt_fake, vmap="leading", fast=folded("ttttbwl", bptt_fast, bptt))

# --- the rules ------------------------------------------------------------------------------------------------------------


def forward_gates(x, h0, wi, wh, bi, bh, lengths, reverse):
    pre = F.linear(within(x, lengths), wi, bi)  # T B 3H: the product with x is one for all steps
    return LOOP(pre, h0, wh, None if bh is None else bh.unsqueeze(0), lengths, reverse, True)


def forward_outputs(x, h0, wi, wh, bi, bh, lengths, reverse):
    pre = F.linear(within(x, lengths), wi, bi)  # T B 3H
    return LOOP(pre, h0, wh, None if bh is None else bh.unsqueeze(0), lengths, reverse, False)[0]


def backward_gates(dy, dG, x, h0, wi, wh, lengths, reverse, y, G, need):
    dy, dG, x = (within(t, lengths) for t in (dy, dG, x))
    H = h0.shape[-1]
    da, dh0 = BPTT(dy, dG, G, y, h0, wh, lengths, reverse)  # T B 4H, B H
    nrz, rzq = da[..., : 3 * H], da[..., H:]  # T B 3H: what goes back to x, and to hₜ₋₁
    dx = nrz @ wi.roll(H, 0) if need.x else None  # T B I
    dwi = over_time(nrz, x).roll(-H, 0) if need.wi else None  # 3H I
    dwh = over_time(rzq, before(h0, y, lengths, reverse)) if need.wh else None  # 3H H
    dbi = nrz.sum((0, 1)).roll(-H, 0) if need.bi else None  # 3H
    dbh = rzq.sum((0, 1)) if need.bh else None  # 3H
    return dx, dh0, dwi, dwh, dbi, dbh, None


def backward_outputs(dy, x, h0, wi, wh, bi, bh, lengths, reverse, y, need):
    x = within(x, lengths)
    ar, az, an = F.linear(x, wi, bi).chunk(3, -1)  # all gates again, with one product over all steps
    ur, uz, q = F.linear(before(h0, y, lengths, reverse), wh, bh).chunk(3, -1)
    r, z = (ar + ur).sigmoid(), (az + uz).sigmoid()
    G = torch.cat([r, z, q, (an + r * q).tanh()], -1)  # T B 4H
    return backward_gates(dy, None, x, h0, wi, wh, lengths, reverse, y, within(G, lengths), need)


_INPUTS = "x h0 wi wh bi bh lengths"
_BPTT = "h0 wh lengths y G"  # what the loop of backward uses
_USES = {"x": "wi", "h0": "", "wi": "x", "wh": "", "bi": "", "bh": ""}
GATES = Rule(
    "gru_gates",
    forward_gates,
    backward_gates,
    inputs=_INPUTS,
    outputs="y G",
    uses={letter: f"{_BPTT} {more}" for letter, more in _USES.items()},
)
OUTPUTS = Rule("gru_outputs", forward_outputs, backward_outputs, inputs=_INPUTS, outputs="y")

# --- the public function and module -----------------------------------------------------------------------------------------


def gru(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    bias: bool = True,
    dropout: float = 0.0,
    training: bool = True,
    lengths: Tensor | None = None,
    save: str = "gates",
    backend: str = "auto",
) -> tuple[Any, Tensor]:
    """A whole sequence through a GRU, as `torch.nn.GRU`; H hidden, L layers, D directions.

    Args:
        input: (T, B, I), (B, T, I) if batch_first, (T, I), or a PackedSequence; floating point, T at least 1.
        hx: (L·D, B, H), without B for a (T, I) input; None for zeros.
        weights: the tensors of torch.nn.GRU in its order: per layer and direction weight_ih (3H, I or D·H), weight_hh
            (3H, H), bias_ih and bias_hh (3H) if bias; gates in the order r z n.
        num_layers, bidirectional, batch_first, bias: as in torch.nn.GRU.
        dropout: the share of every layer's output but the last's that is zeroed, if training.
        lengths: (B,) int64, between 0 and T: rows end there, their outputs past it are zero, their last states are those
            at their ends, a reverse direction starts there.
        save: what is kept for backward: "gates" (the default, the fastest) or "outputs" (less memory, one product more).
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        output (T, B, D·H) or as the input is laid out, and h_n in the shape of hx.

    Raises:
        ValueError: shapes, lengths or devices disagree, an option is out of range, or the named backend cannot run the call.
        TypeError: the tensors are not of one floating-point dtype, or hx or lengths is no such tensor.
    """
    check_save("gru", save)
    rule = GATES if save == "gates" and torch.is_grad_enabled() else OUTPUTS

    def cell(x, start, ws, lengths, reverse):
        (h0,) = start
        args = (x, h0, ws[0], ws[1], ws[2] if bias else None, ws[3] if bias else None, lengths, reverse)
        out = rule(*args, backend=OP.pick(rule, backend, *args))
        y = out if isinstance(out, Tensor) else out[0]
        return y, (last(h0, y, lengths, reverse),)

    layout = Layout(num_layers, bidirectional, batch_first, bias, dropout if training else 0.0)
    output, (h,) = sequence(OP, cell, 3, ("h_0",), input, hx, weights, layout, lengths, keep_state=True)
    return output, h


class GRU(nn.GRU):
    """`torch.nn.GRU` with the backward above; same parameters, state_dict and arguments, and `lengths`."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`
    save: str = "gates"  # or "outputs"; see `gru`

    def forward(self, input, hx=None, lengths=None):  # type: ignore[override]
        return gru(input, hx, weights_of(self), **options_of(self), save=self.save, lengths=lengths)


def reference(input, hx, weights, **kwargs):
    """The same in plain torch, a step at a time."""
    bias, H = kwargs.get("bias", True), weights[0].shape[0] // 3

    def step(x, states, ws):
        (h,) = states
        a, u = F.linear(x, ws[0], ws[2] if bias else None), F.linear(h, ws[1], ws[3] if bias else None)
        (ar, az, an), (ur, uz, un) = a.split(H, -1), u.split(H, -1)
        r, z = torch.sigmoid(ar + ur), torch.sigmoid(az + uz)
        n = torch.tanh(an + r * un)
        return ((1 - z) * n + z * h,)

    y, (h,) = recurrent_reference.plain(step, (H,), input, None if hx is None else (hx,), weights, **kwargs)
    return y, h


def peer(input, hx, weights, save="gates"):
    """Torch's own, for benchmarks."""
    zeros = input.new_zeros(1, input.shape[1], weights[1].shape[1])
    return torch._VF.gru(input, zeros, weights, True, 1, 0.0, True, False, False)


def case(draw: Draw) -> Case:
    args, kwargs = recurrent_reference.case(draw, 3, 1)
    return Case(args, kwargs | {"save": draw.choice(("gates", "outputs"))})


def bench(save: str) -> Callable[[Draw], Case]:
    return lambda draw: Case(recurrent_reference.wide(draw, 3, 128, 32, 256), {"save": save})


OP = Op(
    name="gru",
    call=gru,
    reference=reference,
    peer=peer,
    rules=(GATES, OUTPUTS),
    module=(GRU,),
    replaces=(nn.GRU,),
    shapes="input: T B I -> T B H",
    source="Cho et al. 2014",
    autocast={"cuda": "low"},  # on the CPU torch's gru keeps the dtype of its state; see `recurrent.cast`
    case=case,
    bench={f"save={s}": bench(s) for s in ("gates", "outputs")},
)
OPS = (OP,)
