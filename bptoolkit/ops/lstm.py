"""LSTM, a whole sequence at once.

Maths     aₜ = Wi xₜ + Wh hₜ₋₁ + b                        four blocks of H rows, one per gate: i f g o
          i, f, o = σ(a)   g = tanh(a)
          cₜ = f cₜ₋₁ + i g
          mₜ = o tanh(cₜ)    hₜ = mₜ, or Wr mₜ with a projection    yₜ = hₜ
          backward through time, t = T … 1, with the carries dh and dc from step t+1:
          dh += dyₜ          dm = dh, or Wrᵀ dh
          dc += dm o (1 - tanh² cₜ)
          daᵢ = dc g i(1-i)    da_f = dc cₜ₋₁ f(1-f)    da_g = dc i (1-g²)    daₒ = dm tanh(cₜ) o(1-o)
          dh ← Whᵀ da        dc ← dc f
          after the loop, each one product over all steps:
          dx = da Wi         dWi = Σₜ daₜᵀ xₜ      dWh = Σₜ daₜᵀ hₜ₋₁      db = Σₜ daₜ      dWr = Σₜ dhₜᵀ mₜ
Letters   see `recurrent`; *V dimensions that vmap adds; G the four gates i f g o side by side, T B 4H
Saving    save="gates" keeps x y c G; save="outputs" keeps x y c and makes G again from the outputs, in one product
          over all steps: hₜ₋₁ = yₜ₋₁ is known for every t, so nothing is replayed
Source    Hochreiter & Schmidhuber 1997; the forget gate, Gers et al. 2000; full BPTT, Graves & Schmidhuber 2005
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule, unwatched
from bptoolkit.op import LOW, Op
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
    pre: Tensor, h0: Tensor, c0: Tensor, wh: Tensor, wr: Tensor | None, lengths: Tensor | None, reverse: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs y, the cells c and the gates from pre = Wi x + b: *V T B 4H. Without `keep`, the gates come back empty."""
    T, h, c = pre.shape[-3], h0, c0
    keeps = [None] * T if lengths is None else valid(T, lengths).unbind(-3)
    ys, cs, gs = [pre] * T, [pre] * T, [pre] * T
    for t in order(T, reverse):
        i, f, g, o = (pre.select(-3, t) + h @ wh.mT).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = carry(keeps[t], f * c + i * g, c)
        m = o * c.tanh()
        h = carry(keeps[t], m if wr is None else m @ wr.mT, h)
        ys[t], cs[t], gs[t] = h, c, torch.cat([i, f, g, o], -1)
    y, c, g = torch.stack(ys, -3), torch.stack(cs, -3), torch.stack(gs, -3)
    return within(y, lengths), within(c, lengths), within(g, lengths) if keep else _no_gates(pre)


def loop_fast(pre, h0, c0, wh, wr, lengths, reverse, keep):
    """`loop` in place, without *V."""
    T, B, H = pre.shape[0], pre.shape[1], c0.shape[-1]
    y, c = pre.new_empty(T, B, h0.shape[-1]), pre.new_empty(T, B, H)
    gates = pre.new_empty(T if keep else 1, B, 4 * H)
    blocks = [gates, gates[..., : 2 * H], *gates.split(H, -1)]  # all; i and f at once; i, f, g, o
    rows = list(zip(*(b.unbind(0) if keep else [b[0]] * T for b in blocks), pre.unbind(0), y.unbind(0), c.unbind(0)))
    m, h, ct, wt = pre.new_empty(B, H), h0, c0, wh.mT
    reset = valid(T, lengths).unbind(0) if reverse and lengths is not None else None
    for t in order(T, reverse):
        a, i_f, i, f, g, o, pt, yt, cn = rows[t]
        torch.addmm(pt, h, wt, out=a)
        i_f.sigmoid_()
        g.tanh_()
        o.sigmoid_()
        torch.mul(f, ct, out=cn).addcmul_(i, g)
        torch.tanh(cn, out=yt if wr is None else m).mul_(o)
        if wr is not None:
            torch.mm(m, wr.mT, out=yt)
        h, ct = yt, cn
        if reset is not None:  # a row starts at its own end
            h, ct = torch.where(reset[t], yt, h0), torch.where(reset[t], cn, c0)
    if lengths is not None:
        ends = ~valid(T, lengths)
        for s in (y, c, gates) if keep else (y, c):
            s.masked_fill_(ends, 0)
    return y, c, gates if keep else _no_gates(pre)


def _no_gates(pre: Tensor) -> Tensor:
    return pre.new_empty(*pre.shape[:-3], 0, *pre.shape[-2:])


def loop_fake(pre, h0, c0, wh, wr, lengths, reverse, keep):
    *V, T, B, _ = pre.shape
    y, c = pre.new_empty(*V, T, B, h0.shape[-1]), pre.new_empty(*V, T, B, c0.shape[-1])
    return y, c, pre.new_empty(pre.shape) if keep else _no_gates(pre)


def bptt(
    dy: Tensor | None,
    dc: Tensor | None,
    dG: Tensor | None,
    G: Tensor,
    c: Tensor,
    c0: Tensor,
    wh: Tensor,
    wr: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients da, dh0 and dc0 from the cotangents of y, c and the gates; past a row's length all are zero."""
    T = G.shape[-3]
    keeps = [None] * T if lengths is None else valid(T, lengths).unbind(-3)
    i, f, g, o = G.chunk(4, -1)
    tc, cp = c.tanh(), before(c0, c, lengths, reverse)
    # the local derivatives, for all steps at once: the loop holds the carries only
    ki, kf, kg, ko, kc = g * i * (1 - i), cp * f * (1 - f), i * (1 - g * g), tc * o * (1 - o), o * (1 - tc * tc)
    slope = None if dG is None else dG * torch.cat([i * (1 - i), f * (1 - f), 1 - g * g, o * (1 - o)], -1)
    dct = torch.zeros_like(c[..., 0, :, :])  # *V B H
    dh, das = c.new_zeros(*dct.shape[:-1], wh.shape[-1]), [G] * T  # *V B P
    for t in order(T, reverse)[::-1]:
        dht = dh if dy is None else dh + dy.select(-3, t)
        dm = dht if wr is None else dht @ wr
        dcn = dct + dm * kc.select(-3, t)
        if dc is not None:
            dcn = dcn + dc.select(-3, t)
        da = torch.cat([dcn * k.select(-3, t) for k in (ki, kf, kg)] + [dm * ko.select(-3, t)], -1)  # *V B 4H
        if slope is not None:
            da = da + slope.select(-3, t)
        das[t] = da
        dh, dct = carry(keeps[t], da @ wh, dh), carry(keeps[t], dcn * f.select(-3, t), dct)
    return torch.stack(das, -3), dh, dct


def bptt_fast(dy, dc, dG, G, c, c0, wh, wr, lengths, reverse):
    """`bptt` in place, without *V. The local derivatives are made for a few steps at a time, so that they stay in cache."""
    if dG is not None:  # second order only
        return bptt(dy, dc, dG, G, c, c0, wh, wr, lengths, reverse)
    T, B, H = c.shape
    da, dct, dh = G.new_empty(G.shape), c.new_zeros(B, H), c.new_zeros(B, wh.shape[-1])
    dht, dm = torch.empty_like(dh), torch.empty_like(dct)
    das, i_f_g, o = da.unbind(0), da[..., : 3 * H].unflatten(-1, (3, H)).unbind(0), da[..., 3 * H :].unbind(0)
    f, dys, dcs = G[..., H : 2 * H].unbind(0), dy if dy is None else dy.unbind(0), dc if dc is None else dc.unbind(0)
    freeze = lengths is not None and reverse  # the other way dh and dct are still zero past the lengths
    keeps = valid(T, lengths).unbind(0) if freeze else None
    cps = before(c0, c, lengths, reverse) if freeze else None
    steps, few, behind = order(T, reverse)[::-1], max(1, CHUNK // max(1, 4 * B * H)), None
    for k in range(0, T, few):
        ts = steps[k : k + few]
        at = slice(min(ts), max(ts) + 1)
        edge = at.stop if reverse else at.start - 1
        cp = before(c[edge] if 0 <= edge < T else c0, c[at], None, reverse) if cps is None else cps[at]
        kc = _local(da[at], G[at], c[at], cp).unbind(0)
        for t in ts:
            if behind is None:
                dht = dh if dy is None else dh + dys[t]
            else:
                dht = torch.mm(behind, wh, out=dht) if dy is None else torch.addmm(dys[t], behind, wh, out=dht)
            dm = dht if wr is None else torch.mm(dht, wr, out=dm)
            dct.addcmul_(dm, kc[t - at.start])
            if dc is not None:
                dct += dcs[t]
            i_f_g[t].mul_(dct.unsqueeze(1))
            o[t].mul_(dm)
            if keeps is None:
                behind = das[t]
                dct.mul_(f[t])
            else:
                dh = torch.where(keeps[t], das[t] @ wh, dh)
                dct = torch.where(keeps[t], dct * f[t], dct)
    return da, dh if behind is None else behind @ wh, dct


def _local(A: Tensor, gates: Tensor, c: Tensor, cp: Tensor) -> Tensor:
    """The local derivatives of a few steps: those of i, f, g, o into A; returns that of c."""
    (i, f, g, o), (ki, kf, kg, ko) = gates.chunk(4, -1), A.chunk(4, -1)
    u = i * g
    torch.addcmul(u, u, i, value=-1, out=ki)  # g i (1-i)
    torch.addcmul(i, u, g, value=-1, out=kg)  # i (1-g²)
    torch.mul(cp, f, out=u)
    torch.addcmul(u, u, f, value=-1, out=kf)  # cₜ₋₁ f (1-f)
    tc = c.tanh()
    torch.mul(tc, o, out=u)
    torch.addcmul(u, u, o, value=-1, out=ko)  # tanh(c) o (1-o)
    return torch.addcmul(o, u, tc, value=-1)  # o (1-tanh² c)


def bptt_fake(dy, dc, dG, G, c, c0, wh, wr, lengths, reverse):
    return G.new_empty(G.shape), G.new_empty(*c0.shape[:-1], wh.shape[-1]), G.new_empty(c0.shape)


LOOP = Opaque("lstm_loop", loop, loop_fake, vmap="leading", fast=folded("tbbwwl", loop_fast, loop))
BPTT = Opaque("lstm_bptt", bptt, bptt_fake, vmap="leading", fast=folded("tttttbwwl", bptt_fast, bptt))

# --- the rules ------------------------------------------------------------------------------------------------------------


def forward_gates(x, h0, c0, wi, wh, b, wr, lengths, reverse):
    pre = F.linear(within(x, lengths), wi, b)  # T B 4H: the product with x is one for all steps
    return LOOP(pre, h0, c0, wh, wr, lengths, reverse, True)


def forward_outputs(x, h0, c0, wi, wh, b, wr, lengths, reverse):
    pre = F.linear(within(x, lengths), wi, b)  # T B 4H
    return LOOP(pre, h0, c0, wh, wr, lengths, reverse, False)[:2]


def backward_gates(dy, dc, dG, x, h0, c0, wi, wh, wr, lengths, reverse, y, c, G, need):
    dy, dc, dG, x = (within(t, lengths) for t in (dy, dc, dG, x))
    da, dh0, dc0 = BPTT(dy, dc, dG, G, c, c0, wh, wr, lengths, reverse)  # T B 4H, B P, B H
    dx = da @ wi if need.x else None  # T B I
    dwi = over_time(da, x) if need.wi else None  # 4H I
    dwh = over_time(da, before(h0, y, lengths, reverse)) if need.wh else None  # 4H P
    db = da.sum((0, 1)) if need.b else None  # 4H
    dwr = over_time(_dh(dy, da, wh, reverse), G.chunk(4, -1)[3] * c.tanh()) if need.wr else None  # P H
    return dx, dh0, dc0, dwi, dwh, db, dwr, None


def backward_outputs(dy, dc, x, h0, c0, wi, wh, b, wr, lengths, reverse, y, c, need):
    x = within(x, lengths)
    G = _gates(x, before(h0, y, lengths, reverse), wi, wh, b)  # T B 4H
    return backward_gates(dy, dc, None, x, h0, c0, wi, wh, wr, lengths, reverse, y, c, within(G, lengths), need)


def _gates(x, hp, wi, wh, b):
    """All gates again, with one product over all steps."""
    H = wi.shape[0] // 4
    pre = F.linear(x, wi, b)  # T B 4H
    if unwatched(x, hp, wi, wh, b):
        pre.view(-1, 4 * H).addmm_(hp.reshape(-1, hp.shape[-1]), wh.mT)
        pre[..., : 2 * H].sigmoid_()
        pre[..., 2 * H : 3 * H].tanh_()
        pre[..., 3 * H :].sigmoid_()
        return pre
    i, f, g, o = (pre + hp @ wh.mT).chunk(4, -1)
    return torch.cat([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], -1)


def _dh(dy, da, wh, reverse):
    """The whole gradient of each hₜ: dyₜ, and what step t+1 sends back."""
    sent = da @ wh  # T B P
    none = torch.zeros_like(sent[:1])
    dh = torch.cat([none, sent[:-1]] if reverse else [sent[1:], none])
    return dh if dy is None else dh + dy


_INPUTS = "x h0 c0 wi wh b wr lengths"
_BPTT = "c0 wh wr lengths c G"  # what the loop of backward uses
_USES = {"x": "wi", "h0": "", "c0": "", "wi": "x", "wh": "h0 y", "b": "", "wr": ""}
GATES = Rule(
    "lstm_gates",
    forward_gates,
    backward_gates,
    inputs=_INPUTS,
    outputs="y c G",
    uses={letter: f"{_BPTT} {more}" for letter, more in _USES.items()},
)
OUTPUTS = Rule("lstm_outputs", forward_outputs, backward_outputs, inputs=_INPUTS, outputs="y c")


# --- the public function and module -----------------------------------------------------------------------------------------


def lstm(
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    bias: bool = True,
    dropout: float = 0.0,
    training: bool = True,
    proj_size: int = 0,
    lengths: Tensor | None = None,
    save: str = "gates",
    backend: str = "auto",
) -> tuple[Any, tuple[Tensor, Tensor]]:
    """A whole sequence through an LSTM, as `torch.nn.LSTM`; H hidden, P = proj_size or H, L layers, D directions.

    Args:
        input: (T, B, I), (B, T, I) if batch_first, (T, I), or a PackedSequence; floating point, T at least 1.
        hx: (h_0, c_0) of shapes (L·D, B, P) and (L·D, B, H), without B for a (T, I) input; None for zeros.
        weights: the tensors of torch.nn.LSTM in its order: per layer and direction weight_ih (4H, I or D·P), weight_hh
            (4H, P), bias_ih and bias_hh (4H) if bias, weight_hr (P, H) if proj_size; gates in the order i f g o.
        num_layers, bidirectional, batch_first, bias, proj_size: as in torch.nn.LSTM.
        dropout: the share of every layer's output but the last's that is zeroed, if training.
        lengths: (B,) int64, between 0 and T: rows end there, their outputs past it are zero, their last states are those
            at their ends, a reverse direction starts there.
        save: what is kept for backward: "gates" (the default, the fastest) or "outputs" (less memory, one product more).
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        output (T, B, D·P) or as the input is laid out, and (h_n, c_n) in the shapes of hx.

    Raises:
        ValueError: shapes, lengths or devices disagree, an option is out of range, or the named backend cannot run the call.
        TypeError: the tensors are not of one floating-point dtype, or hx or lengths is no such tensor.
    """
    check_save("lstm", save)
    rule = GATES if save == "gates" and torch.is_grad_enabled() else OUTPUTS

    def cell(x, start, ws, lengths, reverse):
        h0, c0 = start
        b, wr = ws[2] + ws[3] if bias else None, ws[-1] if proj_size else None
        args = (x, h0, c0, ws[0], ws[1], b, wr, lengths, reverse)
        y, c, *_ = rule(*args, backend=OP.pick(rule, backend, *args))
        return y, (last(h0, y, lengths, reverse), last(c0, c, lengths, reverse))

    layout = Layout(num_layers, bidirectional, batch_first, bias, dropout if training else 0.0, proj_size)
    packed = isinstance(input, PackedSequence)
    output, (h, c) = sequence(
        OP, cell, 4, ("h_0", "c_0"), input, hx, weights, layout, lengths, keep_state=packed and not proj_size
    )
    if proj_size and c.device.type == "cpu" and torch.is_autocast_enabled("cpu"):  # torch's keeps the cell's dtype there
        c = c.to(hx[1].dtype if hx is not None else input.data.dtype)
    return output, (h, c)


class LSTM(nn.LSTM):
    """`torch.nn.LSTM` with the backward above; same parameters, state_dict and arguments, and `lengths`."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`
    save: str = "gates"  # or "outputs"; see `lstm`

    def forward(self, input, hx=None, lengths=None):  # type: ignore[override]
        options = options_of(self) | {"proj_size": self.proj_size, "save": self.save, "lengths": lengths}
        return lstm(input, hx, weights_of(self), **options)


def reference(input, hx, weights, **kwargs):
    """The same in plain torch, a step at a time."""
    input, *rest = OP.cast(input, *(hx or ()), *weights)
    hx, weights = rest[: -len(weights)] or None, rest[-len(weights) :]
    P, bias = kwargs.get("proj_size", 0), kwargs.get("bias", True)
    H = weights[0].shape[0] // 4

    def step(x, states, ws):
        h, c = states
        a = x @ ws[0].mT + h @ ws[1].mT
        i, f, g, o = (a + ws[2] + ws[3] if bias else a).split(H, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return (h @ ws[-1].mT if P else h), c

    return recurrent_reference.plain(step, (P or H, H), input, hx, weights, **kwargs)


def peer(input, hx, weights, save="gates"):
    """Torch's own, for benchmarks."""
    zeros = input.new_zeros(1, input.shape[1], weights[1].shape[1])
    y, h, c = torch._VF.lstm(input, (zeros, zeros), weights, True, 1, 0.0, True, False, False)
    return y, (h, c)


def case(draw: Draw) -> Case:
    args, kwargs = recurrent_reference.case(draw, 4, 2, projections=True)
    return Case(args, kwargs | {"save": draw.choice(("gates", "outputs"))})


def bench(save: str) -> Callable[[Draw], Case]:
    return lambda draw: Case(recurrent_reference.wide(draw, 4, 128, 32, 256), {"save": save})


OP = Op(
    name="lstm",
    call=lstm,
    reference=reference,
    peer=peer,
    rules=(GATES, OUTPUTS),
    module=(LSTM,),
    replaces=(nn.LSTM,),
    shapes="input: T B I -> T B H",
    source="Hochreiter & Schmidhuber 1997; Gers et al. 2000",
    autocast=LOW,
    case=case,
    bench={f"save={s}": bench(s) for s in ("gates", "outputs")},
)
OPS = (OP,)
