"""The simple recurrence of Elman, a whole sequence at once.

Maths     hₜ = φ(Wi xₜ + Wh hₜ₋₁ + b)    yₜ = hₜ           φ = tanh or relu
          backward through time, t = T … 1, with the carry dh from step t+1:
          dh += dyₜ        daₜ = dh φ'(aₜ)        dh ← Whᵀ daₜ            tanh' = 1-h²    relu' = [h > 0]
          after the loop, each one product over all steps:
          dx = da Wi       dWi = Σₜ daₜᵀ xₜ       dWh = Σₜ daₜᵀ hₜ₋₁      db = Σₜ daₜ
Letters   see `recurrent`; *V dimensions that vmap adds
Saving    x and y: nothing else is needed
Source    Elman 1990; backpropagation through time, Werbos 1990
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from bptoolkit import grad_norms
from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.grad_norms import KeepsGradNorms, Kept, key_of, recorded, recorders
from bptoolkit.op import LOW, Op
from bptoolkit.opaque import Opaque
from bptoolkit.ops import recurrent_reference
from bptoolkit.ops.bptt import slack
from bptoolkit.ops.bptt_pieces import Core
from bptoolkit.ops.bptt_run import Way, rules
from bptoolkit.ops.recurrent import (
    Layout,
    back,
    before,
    carry,
    each,
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


def loop(pre: Tensor, h0: Tensor, wh: Tensor, lengths: Tensor | None, reverse: bool, nonlinearity: str) -> Tensor:
    """The outputs y from pre = Wi x + b: *V T B H."""
    return truncated(pre, h0, wh, lengths, None, reverse, nonlinearity, False)


def truncated(pre, h0, wh, lengths, xi, reverse, nonlinearity, cut):
    """`loop`, with `slack` on what a step takes from the one before."""
    T, h, pres, ys = pre.shape[-3], h0, pre.unbind(-3), [pre] * pre.shape[-3]
    keeps, xis = each(None if lengths is None else valid(T, lengths), T), each(xi, T)
    for t in order(T, reverse):
        a = pres[t] + slack(h, xis[t], cut) @ wh.mT
        ys[t] = h = carry(keeps[t], a.tanh() if nonlinearity == "tanh" else a.relu(), h)
    return within(torch.stack(ys, -3), lengths)


def loop_fast(pre, h0, wh, lengths, reverse, nonlinearity):
    """`loop` in place, without *V."""
    y, h, wt = torch.empty_like(pre, memory_format=torch.contiguous_format), h0, wh.mT
    phi = torch.tanh_ if nonlinearity == "tanh" else torch.relu_
    reset = valid(len(pre), lengths).unbind(0) if reverse and lengths is not None else None
    pres, ys = pre.unbind(0), y.unbind(0)
    for t in order(len(pre), reverse):
        h = phi(torch.addmm(pres[t], h, wt, out=ys[t]))
        if reset is not None:  # a row starts at its own end
            h = torch.where(reset[t], h, h0)
    return y if lengths is None else y.masked_fill_(~valid(len(pre), lengths), 0)


def loop_fake(pre, h0, wh, lengths, reverse, nonlinearity):
    return pre.new_empty(pre.shape)


def bptt(
    dy: Tensor,
    y: Tensor,
    h0: Tensor,
    wh: Tensor,
    lengths: Tensor | None,
    xi: Tensor | None,
    reverse: bool,
    nonlinearity: str,
    cut: bool,
    record: int,
) -> tuple[Tensor, Tensor]:
    """The gradients da and dh0 from the cotangent of y, which is zero past a row's length."""
    T = y.shape[-3]
    xis: Any = [None] * T if xi is None else xi.unbind(-3)
    keeps = [None] * T if lengths is None else valid(T, lengths).unbind(-3)
    k = within(1 - y * y if nonlinearity == "tanh" else (y > 0).to(y.dtype), lengths)
    dh, das, dys, ks = torch.zeros_like(h0), [y] * T, dy.unbind(-3), k.unbind(-3)
    for t in order(T, reverse)[::-1]:
        das[t] = da = (dh + dys[t]) * ks[t]  # *V B H
        sent = torch.zeros_like(dh) if cut else da @ wh
        dh = carry(keeps[t], sent if xis[t] is None else sent * xis[t], dh)
    return torch.stack(das, -3), dh


def bptt_fast(dy, y, h0, wh, lengths, xi, reverse, nonlinearity, cut, record):
    """`bptt` in place, without *V."""
    T = len(y)
    if nonlinearity == "tanh":
        da = y.square().neg_().add_(1)
        if lengths is not None:
            da.masked_fill_(~valid(T, lengths), 0)
    else:
        da = torch.gt(y, 0, out=torch.empty_like(y))
    if cut:
        return da.mul_(dy), torch.zeros_like(h0)
    keeps = valid(T, lengths).unbind(0) if reverse and lengths is not None else None
    xis = None if xi is None else xi.unbind(0)
    dh, behind, das, dys = torch.zeros_like(h0), None, da.unbind(0), dy.unbind(0)
    for t in order(T, reverse)[::-1]:
        dht = dys[t] + dh if behind is None else torch.addmm(dys[t], behind, wh)
        das[t].mul_(dht)
        if keeps is None and xis is None:  # dh is still zero past the lengths
            behind = das[t]
        else:
            sent = das[t] @ wh
            dh = carry(keeps and keeps[t], sent if xis is None else sent.mul_(xis[t]), dh)
    return da, dh if behind is None else behind @ wh


def squares(da, wh, lengths, xi, cut):
    """The squares of what each row sends back, after the loop that made da: *V T B."""
    sent = torch.zeros_like(da) if cut else back(da, wh)
    there = None if lengths is None else valid(da.shape[-3], lengths)
    return grad_norms.squares(there, sent if xi is None else sent * xi)


def _squares_of(da, dy, y, h0, wh, lengths, xi, reverse, nonlinearity, cut):
    return squares(da, wh, lengths, xi, cut)


def bptt_fake(dy, y, h0, wh, lengths, xi, reverse, nonlinearity, cut, record):
    return y.new_empty(y.shape), y.new_empty(h0.shape)


LOOP = Opaque("rnn_loop", loop, loop_fake, vmap="leading", fast=folded("tbwl", loop_fast, loop))
_fast_back = recorded(folded("ttbwlt", bptt_fast, bptt), _squares_of)
BPTT = Opaque("rnn_bptt", bptt, bptt_fake, vmap="leading", fast=_fast_back)

# --- the rule -------------------------------------------------------------------------------------------------------------


def forward(x, h0, wi, wh, b, lengths, reverse, nonlinearity, record):
    pre = F.linear(within(x, lengths), wi, b)  # T B H: the product with x is one for all steps
    return LOOP(pre, h0, wh, lengths, reverse, nonlinearity)


def backward(dy, x, h0, wi, wh, lengths, reverse, nonlinearity, record, y, need):
    dy, x = within(dy, lengths), within(x, lengths)
    da, dh0 = BPTT(dy, y, h0, wh, lengths, None, reverse, nonlinearity, False, key_of(record))  # T B H, B H
    dx, dwi, dwh, db = products(need, da, x, before(h0, y, lengths, reverse) if need.wh else None, wi)
    return dx, dh0, dwi, dwh, db, None


def products(need, da, x, hp, wi):
    """The gradients of x, wi, wh and b: each one product over all steps."""
    dx = da @ wi if need.x else None  # T B I
    dwi = over_time(da, x) if need.wi else None  # H I
    dwh = over_time(da, hp) if need.wh else None  # H H
    db = da.sum((0, 1)) if need.b else None  # H
    return dx, dwi, dwh, db


def _kernel():
    from bptoolkit.triton_kernels.rnn import KERNEL

    return KERNEL


_BPTT = "h0 wh lengths y"  # what the loop of backward uses
_USES = {"x": "wi", "h0": "", "wi": "x", "wh": "", "b": ""}
RULE = Rule(
    "rnn",
    forward,
    backward,
    inputs="x h0 wi wh b lengths",
    outputs="y",
    uses={letter: f"{_BPTT} {more}" for letter, more in _USES.items()},
    kernel=_kernel,
)

# --- the other ways of saving, and truncation -------------------------------------------------------------------------------


def core(nonlinearity: str) -> Core:
    """The cell, for `bptt_run`."""

    def _loop(pre, h0, c0, wh, bh, wr, lengths, xi, reverse, cut):
        return truncated(pre, h0, wh, lengths, xi, reverse, nonlinearity, cut), None, None

    def _fast(pre, h0, c0, wh, bh, wr, lengths, reverse, keep):
        return loop_fast(pre, h0, wh, lengths, reverse, nonlinearity), None, None

    def _node(pre, h0, c0, wh, bh, wr, lengths, reverse, keep):
        return LOOP(pre, h0, wh, lengths, reverse, nonlinearity), None, None

    def _back(fast, dy, dc, G, y, c, h0, c0, wh, wr, lengths, xi, reverse, cut):
        return *(bptt_fast if fast else bptt)(dy, y, h0, wh, lengths, xi, reverse, nonlinearity, cut, 0), None

    def _squares(da, dy, dc, G, y, c, h0, c0, wh, wr, lengths, xi, reverse, cut):
        return squares(da, wh, lengths, xi, cut)

    def _products(need, dy, da, x, hp, c, G, wi, wh, wr, xi, reverse, cut):
        return *products(need, da, x, hp, wi), None, None

    return Core(f"rnn_{nonlinearity}", "rnn", _loop, _fast, _node, _back, _squares, _products)


MADE = {n: rules(core(n)) for n in ("tanh", "relu")}

# --- the public function and module -----------------------------------------------------------------------------------------


def rnn(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    nonlinearity: str = "tanh",
    bidirectional: bool = False,
    batch_first: bool = False,
    bias: bool = True,
    dropout: float = 0.0,
    training: bool = True,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    save: str | int = "gates",
    truncate: Any = None,
    grad_norms: Callable[[int, Tensor], Any] | Kept | None = None,
    backend: str = "auto",
) -> tuple[Any, Tensor]:
    """A whole sequence through a simple recurrent network, as `torch.nn.RNN`; H hidden, L layers, D directions.

    Args:
        input: (T, B, I), (B, T, I) if batch_first, (T, I), or a PackedSequence; floating point, T at least 1.
        hx: (L·D, B, H), without B for a (T, I) input; None for zeros.
        weights: the tensors of torch.nn.RNN in its order: per layer and direction weight_ih (H, I or D·H), weight_hh (H, H),
            bias_ih and bias_hh (H) if bias.
        nonlinearity: "tanh" or "relu".
        num_layers, bidirectional, batch_first, bias: as in torch.nn.RNN.
        dropout: the share of every layer's output but the last's that is zeroed, if training.
        lengths: (B,) int64, between 0 and T: rows end there, their outputs past it are zero, their last states are those
            at their ends, a reverse direction starts there.
        resets: bool, (T, B), (B, T) if batch_first, or (T,): where True, the state before the step is zero, for the reverse
            direction the state after the step before. Its values are read: not inside torch.compile.
        save: what a layer keeps for backward, in one direction, besides its input: "gates" (the default), "outputs", "sparse":
            all three h, as there is nothing else; "segments": h at the ends of √T segments, which backward runs again one by
            one; an int: the plan with the fewest steps run again of those that keep, and hold at any moment of backward, at
            most so many bytes of states (`bptoolkit.bptt_plan`). Where what follows the layer keeps its output in any case,
            "gates" costs nothing and "segments" saves nothing.
        truncate: how far gradients go back: None, to the beginning; (k1, k2), the losses of every k1 steps through at most k2
            steps, to the beginning of the window that ends with them; k, (k, k); "eprop", not at all; ARTBP(p), cut at random,
            without bias. Losses count once, and the states are those of the forward pass.
            With "segments" or a number of bytes, k and (k1, k2) run the whole sequence again at once.
        grad_norms: a function that backward calls with (k, norms) for each layer and direction k = layer·D + direction that it
            goes through, as soon as it has; norms (T,), float64, has at each step the norm of the gradient that the step sends
            back to the state it started from (h), over all rows that take it. If truncated, from the window that owns
            the step. For a module, or inside torch.compile: `keep_grad_norms()`.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        output (T, B, D·H) or as the input is laid out, and h_n in the shape of hx.

    Raises:
        ValueError: shapes, lengths, resets or devices disagree, an option is out of range, resets cannot be read, or the named
            backend cannot run the call.
        TypeError: the tensors are not of one floating-point dtype, or hx, lengths or resets is no such tensor;
            grad_norms is no function, or is called inside torch.compile.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"rnn: nonlinearity={nonlinearity!r} is not known; choose 'tanh' or 'relu'")
    way = Way(OP, MADE[nonlinearity], save, truncate, backend, weights, num_layers * (1 + bidirectional), resets)
    records = recorders(OP.name, grad_norms, num_layers * (1 + bidirectional))

    def cell(x, start, ws, lengths, reverse, record):
        (h0,), b = start, ws[2] + ws[3] if bias else None
        if not way.own:
            y, _ = way.run(reverse, record, x, h0, None, ws[0], ws[1], b, None, None, lengths)
            return y, (last(h0, y, lengths, reverse),)
        args = (x, h0, ws[0], ws[1], b, lengths, reverse, nonlinearity, record)
        y = RULE(*args, backend=OP.pick(RULE, backend, *args))
        return y, (last(h0, y, lengths, reverse),)

    layout = Layout(num_layers, bidirectional, batch_first, bias, dropout if training else 0.0)
    output, (h,) = sequence(OP, cell, 1, ("h_0",), input, hx, weights, layout, lengths, resets=resets, records=records)
    return output, h


class RNN(KeepsGradNorms, nn.RNN):
    """`torch.nn.RNN` with the backward above; same parameters, state_dict and arguments, `lengths` and `resets`."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`
    save: str | int = "gates"  # these two as in `rnn`
    truncate: Any = None

    def forward(self, input, hx=None, lengths=None, resets=None):  # type: ignore[override]
        return rnn(
            input, hx, weights_of(self), **options_of(self), nonlinearity=self.nonlinearity, lengths=lengths, resets=resets
        )


def reference(input, hx, weights, nonlinearity="tanh", **kwargs):
    """The same in plain torch, a step at a time."""
    input, *rest = OP.cast(input, *([] if hx is None else [hx]), *weights)
    hx, weights = rest[: -len(weights)] or None, rest[-len(weights) :]
    bias, phi = kwargs.get("bias", True), getattr(torch, nonlinearity)

    def step(x, states, ws, h=None):
        h = states[0] if h is None else h
        return (phi(F.linear(x, ws[0], ws[2] if bias else None) + F.linear(h, ws[1], ws[3] if bias else None)),)

    y, (h,) = recurrent_reference.plain(step, (weights[0].shape[0],), input, hx, weights, **kwargs)
    return y, h


def peer(input, hx, weights, nonlinearity="tanh", save="gates", truncate=None, lengths=None):
    """Torch's own, for benchmarks."""
    zeros = input.new_zeros(1, input.shape[1], weights[1].shape[1])
    run = torch._VF.rnn_tanh if nonlinearity == "tanh" else torch._VF.rnn_relu
    return recurrent_reference.torchs(run, input, zeros, weights, lengths)


def case(draw: Draw) -> Case:
    args, kwargs = recurrent_reference.case(draw, 1, 1)
    kwargs = recurrent_reference.options(draw, "rnn", args, kwargs)
    return Case(args, kwargs | {"nonlinearity": draw.choice(("tanh", "relu"))})


def bench(nonlinearity: str) -> Callable[[Draw], Case]:
    return lambda draw: Case(recurrent_reference.wide(draw, 1, 128, 32, 256), {"nonlinearity": nonlinearity})


OP = Op(
    name="rnn",
    call=rnn,
    reference=reference,
    peer=peer,
    rules=(RULE,),
    module=(RNN,),
    replaces=(nn.RNN,),
    shapes="input: T B I -> T B H",
    source="Elman 1990; Werbos 1990",
    autocast=LOW,
    case=case,
    bench={n: bench(n) for n in ("tanh", "relu")},
)
OPS = (OP,)
