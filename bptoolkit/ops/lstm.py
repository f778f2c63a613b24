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
          over all steps: hₜ₋₁ = yₜ₋₁ is known for every t, so nothing is replayed. The other ways are in `bptt_run`, the loops
          in `lstm_loops`
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
from bptoolkit.function import Rule
from bptoolkit.grad_norms import KeepsGradNorms, Kept, key_of, recorders
from bptoolkit.op import LOW, Op
from bptoolkit.ops import recurrent_reference
from bptoolkit.ops.bptt_run import Way
from bptoolkit.ops.lstm_loops import BPTT, LOOP, MADE, gates, products
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


def forward_gates(x, h0, c0, wi, wh, b, wr, lengths, reverse, record):
    pre = F.linear(within(x, lengths), wi, b)  # T B 4H: the product with x is one for all steps
    return LOOP(pre, h0, c0, wh, wr, lengths, reverse, True)


def forward_outputs(x, h0, c0, wi, wh, b, wr, lengths, reverse, record):
    pre = F.linear(within(x, lengths), wi, b)  # T B 4H
    return LOOP(pre, h0, c0, wh, wr, lengths, reverse, False)[:2]


def backward_gates(dy, dc, dG, x, h0, c0, wi, wh, wr, lengths, reverse, record, y, c, G, need):
    dy, dc, dG, x = (within(t, lengths) for t in (dy, dc, dG, x))
    da, dh0, dc0 = BPTT(dy, dc, dG, G, c, c0, wh, wr, lengths, None, reverse, False, key_of(record))  # T B 4H, B P, B H
    hp = before(h0, y, lengths, reverse) if need.wh else None
    dx, dwi, dwh, db, _, dwr = products(need, dy, da, x, hp, c, G, wi, wh, wr, None, reverse, False)
    return dx, dh0, dc0, dwi, dwh, db, dwr, None


def backward_outputs(dy, dc, x, h0, c0, wi, wh, b, wr, lengths, reverse, record, y, c, need):
    x = within(x, lengths)
    G = gates(x, before(h0, y, lengths, reverse), wi, wh, b)  # T B 4H
    return backward_gates(dy, dc, None, x, h0, c0, wi, wh, wr, lengths, reverse, record, y, c, within(G, lengths), need)


def _gates_kernel():
    from bptoolkit.triton_kernels.lstm import GATES

    return GATES


def _outputs_kernel():
    from bptoolkit.triton_kernels.lstm import OUTPUTS

    return OUTPUTS


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
    kernel=_gates_kernel,
)
OUTPUTS = Rule("lstm_outputs", forward_outputs, backward_outputs, inputs=_INPUTS, outputs="y c", kernel=_outputs_kernel)


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
    resets: Tensor | None = None,
    save: str | int = "gates",
    truncate: Any = None,
    grad_norms: Callable[[int, Tensor], Any] | Kept | None = None,
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
        resets: bool, (T, B), (B, T) if batch_first, or (T,): where True, the state before the step is zero, for the reverse
            direction the state after the step before. Its values are read: not inside torch.compile.
        save: what a layer keeps for backward, in one direction, besides its input: "gates" (the default, the fastest): h, c and
            the gates; "outputs": h and c, one product more; "sparse": h and every √T-th c, the others are made again element by
            element; "segments": h and c at the ends of √T segments, which backward runs again one by one, the output is not
            kept; an int: the plan with the fewest steps run again of those that keep, and hold at any moment of backward, at
            most so many bytes of states and gates (`bptoolkit.bptt_plan`). Whatever follows the layer keeps its output in most
            cases; then "segments" saves what "outputs" keeps besides, c, which is half of it.
        truncate: how far gradients go back: None, to the beginning; (k1, k2), the losses of every k1 steps through at most k2
            steps, to the beginning of the window that ends with them; k, (k, k); "eprop", c only, not the products with
            weight_hh; ARTBP(p), cut at random, without bias. Losses count once, and the states are those of the forward pass.
            With "segments" or a number of bytes, k and (k1, k2) run the whole sequence again at once.
        grad_norms: a function that backward calls with (k, norms) for each layer and direction k = layer·D + direction that it
            goes through, as soon as it has; norms (T,), float64, has at each step the norm of the gradient that the step sends
            back to the state it started from (h and c), over all rows that take it. If truncated, from the window that owns
            the step. For a module, or inside torch.compile: `keep_grad_norms()`.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        output (T, B, D·P) or as the input is laid out, and (h_n, c_n) in the shapes of hx.

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
        h0, c0 = start
        b, wr = ws[2] + ws[3] if bias else None, ws[-1] if proj_size else None
        if not way.own:
            y, cn = way.run(reverse, record, x, h0, c0, ws[0], ws[1], b, None, wr, lengths)
            return y, (last(h0, y, lengths, reverse), cn)
        args = (x, h0, c0, ws[0], ws[1], b, wr, lengths, reverse, record)
        y, c, *_ = rule(*args, backend=OP.pick(rule, backend, *args))
        return y, (last(h0, y, lengths, reverse), last(c0, c, lengths, reverse))

    layout = Layout(num_layers, bidirectional, batch_first, bias, dropout if training else 0.0, proj_size)
    packed = isinstance(input, PackedSequence)
    output, (h, c) = sequence(
        OP, cell, 4, ("h_0", "c_0"), input, hx, weights, layout, lengths, packed and not proj_size, resets, records
    )
    if proj_size and c.device.type == "cpu" and torch.is_autocast_enabled("cpu"):  # torch's keeps the cell's dtype there
        c = c.to(hx[1].dtype if hx is not None else input.data.dtype)
    return output, (h, c)


class LSTM(KeepsGradNorms, nn.LSTM):
    """`torch.nn.LSTM` with the backward above; same parameters, state_dict and arguments, `lengths` and `resets`."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`
    save: str | int = "gates"  # these two as in `lstm`
    truncate: Any = None

    def forward(self, input, hx=None, lengths=None, resets=None):  # type: ignore[override]
        return lstm(input, hx, weights_of(self), **options_of(self), proj_size=self.proj_size, lengths=lengths, resets=resets)


def reference(input, hx, weights, **kwargs):
    """The same in plain torch, a step at a time."""
    input, *rest = OP.cast(input, *(hx or ()), *weights)
    hx, weights = rest[: -len(weights)] or None, rest[-len(weights) :]
    P, bias = kwargs.get("proj_size", 0), kwargs.get("bias", True)
    H = weights[0].shape[0] // 4

    def step(x, states, ws, h=None):
        h, c = states[0] if h is None else h, states[1]
        a = x @ ws[0].mT + h @ ws[1].mT
        i, f, g, o = (a + ws[2] + ws[3] if bias else a).split(H, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return (h @ ws[-1].mT if P else h), c

    return recurrent_reference.plain(step, (P or H, H), input, hx, weights, **kwargs)


def peer(input, hx, weights, save="gates", truncate=None, lengths=None):
    """Torch's own, for benchmarks."""
    zeros = input.new_zeros(1, input.shape[1], weights[1].shape[1])
    y, h, c = recurrent_reference.torchs(torch._VF.lstm, input, (zeros, zeros), weights, lengths)
    return y, (h, c)


def case(draw: Draw) -> Case:
    args, kwargs = recurrent_reference.case(draw, 4, 2, projections=True)
    return Case(args, recurrent_reference.options(draw, "lstm", args, kwargs))


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
