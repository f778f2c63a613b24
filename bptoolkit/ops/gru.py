"""GRU, a whole sequence at once.

Maths     r, z = σ(Wi xₜ + b + Wh hₜ₋₁ + bh)            blocks of H rows: r z n
          q = Wh_n hₜ₋₁ + bh_n
          n = tanh(Wi_n xₜ + bi_n + r q)
          hₜ = n + z (hₜ₋₁ - n)    yₜ = hₜ
          backward through time, t = T … 1, with the carry dh from step t+1:
          dh += dyₜ
          da_n = dh (1-z)(1-n²)    da_z = dh (hₜ₋₁ - n) z(1-z)    da_r = da_n q r(1-r)    dq = da_n r
          dh ← dh z + Whᵀ [da_r da_z dq]
          after the loop, each one product over all steps:
          dx = [da_r da_z da_n] Wi       dWi = Σₜ [da_r da_z da_n]ₜᵀ xₜ      db  = Σₜ [da_r da_z da_n]ₜ
                                         dWh = Σₜ [da_r da_z dq]ₜᵀ hₜ₋₁      dbh = Σₜ [da_r da_z dq]ₜ
Letters   see `recurrent`; *V dimensions that vmap adds; G is r z q n side by side, T B 4H
          da in the rules is da_n da_r da_z dq: its first three blocks go back to x, its last three to hₜ₋₁
Saving    save="gates" keeps x y G; save="outputs" keeps x y and makes G again from the outputs, in one product over
          all steps: hₜ₋₁ = yₜ₋₁ is known for every t, so nothing is replayed. The other ways are in `bptt_run`, the
          loops in `gru_loops`
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
from bptoolkit.grad_norms import KeepsGradNorms, Kept, key_of, recorders
from bptoolkit.op import Op
from bptoolkit.ops import recurrent_reference
from bptoolkit.ops.bptt_run import Way
from bptoolkit.ops.gru_loops import BPTT, LOOP, MADE, gates, products
from bptoolkit.ops.recurrent import (
    Layout,
    before,
    last,
    options_of,
    sequence,
    weights_of,
    within,
)

# --- the rules ------------------------------------------------------------------------------------------------------------


def forward_gates(x, h0, wi, wh, b, bh, lengths, reverse, record):
    pre = F.linear(within(x, lengths), wi, b)  # T B 3H: the product with x is one for all steps
    return LOOP(pre, h0, wh, None if bh is None else bh.unsqueeze(0), lengths, reverse, True)


def forward_outputs(x, h0, wi, wh, b, bh, lengths, reverse, record):
    pre = F.linear(within(x, lengths), wi, b)  # T B 3H
    return LOOP(pre, h0, wh, None if bh is None else bh.unsqueeze(0), lengths, reverse, False)[0]


def backward_gates(dy, dG, x, h0, wi, wh, lengths, reverse, record, y, G, need):
    dy, dG, x = (within(t, lengths) for t in (dy, dG, x))
    da, dh0 = BPTT(dy, dG, G, y, h0, wh, lengths, None, reverse, False, key_of(record))  # T B 4H, B H
    dx, dwi, dwh, db, dbh = products(need, da, x, before(h0, y, lengths, reverse) if need.wh else None, wi)
    return dx, dh0, dwi, dwh, db, dbh, None


def backward_outputs(dy, x, h0, wi, wh, b, bh, lengths, reverse, record, y, need):
    x = within(x, lengths)
    G = gates(x, before(h0, y, lengths, reverse), wi, wh, b, bh)  # T B 4H
    return backward_gates(dy, None, x, h0, wi, wh, lengths, reverse, record, y, within(G, lengths), need)


def _gates_kernel():
    from bptoolkit.triton_kernels.gru import GATES

    return GATES


def _outputs_kernel():
    from bptoolkit.triton_kernels.gru import OUTPUTS

    return OUTPUTS


_INPUTS = "x h0 wi wh b bh lengths"
_BPTT = "h0 wh lengths y G"  # what the loop of backward uses
_USES = {"x": "wi", "h0": "", "wi": "x", "wh": "", "b": "", "bh": ""}
GATES = Rule(
    "gru_gates",
    forward_gates,
    backward_gates,
    inputs=_INPUTS,
    outputs="y G",
    uses={letter: f"{_BPTT} {more}" for letter, more in _USES.items()},
    kernel=_gates_kernel,
)
OUTPUTS = Rule("gru_outputs", forward_outputs, backward_outputs, inputs=_INPUTS, outputs="y", kernel=_outputs_kernel)

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
    resets: Tensor | None = None,
    save: str | int = "gates",
    truncate: Any = None,
    grad_norms: Callable[[int, Tensor], Any] | Kept | None = None,
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
        resets: bool, (T, B), (B, T) if batch_first, or (T,): where True, the state before the step is zero, for the reverse
            direction the state after the step before. Its values are read: not inside torch.compile.
        save: what a layer keeps for backward, in one direction, besides its input: "gates" (the default, the fastest): h and
            the gates; "outputs": h, one product more; "sparse": the same, as there is no cell; "segments": h at the ends of √T
            segments, which backward runs again one by one; an int: the plan with the fewest steps run again of those that keep,
            and hold at any moment of backward, at most so many bytes of states and gates (`bptoolkit.bptt_plan`). Where what
            follows the layer keeps its output in any case, "outputs" costs nothing and "segments" saves nothing.
        truncate: how far gradients go back: None, to the beginning; (k1, k2), the losses of every k1 steps through at most k2
            steps, to the beginning of the window that ends with them; k, (k, k); "eprop", through z h only, not the products
            with weight_hh; ARTBP(p), cut at random, without bias. Losses count once, and the states are those of the forward.
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
    way = Way(OP, MADE, save, truncate, backend, weights, num_layers * (1 + bidirectional), resets)
    records = recorders(OP.name, grad_norms, num_layers * (1 + bidirectional))
    rule = GATES if save == "gates" and torch.is_grad_enabled() else OUTPUTS

    def cell(x, start, ws, lengths, reverse, record):
        (h0,) = start
        b, bh = (ws[2], ws[3]) if bias else (None, None)
        if not way.own:
            y, _ = way.run(reverse, record, x, h0, None, ws[0], ws[1], b, bh, None, lengths)
            return y, (last(h0, y, lengths, reverse),)
        args = (x, h0, ws[0], ws[1], b, bh, lengths, reverse, record)
        out = rule(*args, backend=OP.pick(rule, backend, *args))
        y = out if isinstance(out, Tensor) else out[0]
        return y, (last(h0, y, lengths, reverse),)

    layout = Layout(num_layers, bidirectional, batch_first, bias, dropout if training else 0.0)
    output, (h,) = sequence(OP, cell, 3, ("h_0",), input, hx, weights, layout, lengths, True, resets, records)
    return output, h


class GRU(KeepsGradNorms, nn.GRU):
    """`torch.nn.GRU` with the backward above; same parameters, state_dict and arguments, `lengths` and `resets`."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`
    save: str | int = "gates"  # these two as in `gru`
    truncate: Any = None

    def forward(self, input, hx=None, lengths=None, resets=None):  # type: ignore[override]
        return gru(input, hx, weights_of(self), **options_of(self), lengths=lengths, resets=resets)


def reference(input, hx, weights, **kwargs):
    """The same in plain torch, a step at a time."""
    bias, H = kwargs.get("bias", True), weights[0].shape[0] // 3

    def step(x, states, ws, h=None):
        (direct,), h = states, states[0] if h is None else h
        a, u = F.linear(x, ws[0], ws[2] if bias else None), F.linear(h, ws[1], ws[3] if bias else None)
        (ar, az, an), (ur, uz, un) = a.split(H, -1), u.split(H, -1)
        r, z = torch.sigmoid(ar + ur), torch.sigmoid(az + uz)
        n = torch.tanh(an + r * un)
        return ((1 - z) * n + z * direct,)

    y, (h,) = recurrent_reference.plain(step, (H,), input, None if hx is None else (hx,), weights, **kwargs)
    return y, h


def peer(input, hx, weights, save="gates", truncate=None, lengths=None):
    """Torch's own, for benchmarks."""
    zeros = input.new_zeros(1, input.shape[1], weights[1].shape[1])
    return recurrent_reference.torchs(torch._VF.gru, input, zeros, weights, lengths)


def case(draw: Draw) -> Case:
    args, kwargs = recurrent_reference.case(draw, 3, 1)
    return Case(args, recurrent_reference.options(draw, "gru", args, kwargs))


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
