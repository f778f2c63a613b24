"""One step of an LSTM, a GRU and Elman's recurrence.

Maths     lstm_cell   a = Wi x + Wh h + b                 four blocks of H rows, one per gate: i f g o
                      i, f, o = σ(a)   g = tanh(a)
                      c' = f c + i g       h' = o tanh(c')
                      dc' += dh' o (1 - tanh² c')
                      daᵢ = dc' g i(1-i)   da_f = dc' c f(1-f)   da_g = dc' i (1-g²)   daₒ = dh' tanh(c') o(1-o)
                      dc = dc' f           dx, dh, dWi, dWh, db: of two products with one sum, below
          gru_cell    r, z = σ(Wi x + bi + Wh h + bh)     blocks of H rows: r z n
                      q = Wh_n h + bh_n    n = tanh(Wi_n x + bi_n + r q)
                      h' = n + z (h - n)
                      da_n = dh' (1-z)(1-n²)   da_z = dh' (h - n) z(1-z)   da_r = da_n q r(1-r)   dq = da_n r
                      dh = dh' z + ...         da = [da_r da_z da_n] goes back to x, du = [da_r da_z dq] to h
          rnn_cell    h' = φ(Wi x + Wh h + b)             φ = tanh or relu
                      da = dh' φ'(a)           tanh' = 1-h'²   relu' = [h' > 0]
          products    dx = da Wi   dWi = daᵀ x   dh += du Wh   dWh = duᵀ h   dbi = Σ da   dbh = Σ du
                      with du = da where h and x share their gates
Letters   B batch, I in, H hidden, G·H the gates side by side; x: B I, h and c: B H; h', c' are h2, c2 in the code, and the
          gates i f g o, or r z q n, are G: B 4H
Numerics  the products are in the tensors' dtype, the gates of half tensors in float32; relu lets NaN through and blocks any
          cotangent where it is off, as torch does
Saving    the inputs, h', c' and G; without a gradient nothing
Source    Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000; Cho et al. 2014 with q inside, as cuDNN and
          torch have it; Elman 1990
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.op import LOW, Op
from bptoolkit.ops.recurrent import cast, check_hx
from bptoolkit.precision import wide
from bptoolkit.shapes import check_floating

# --- lstm_cell ------------------------------------------------------------------------------------------------------------


def lstm_forward(x, h, c, wi, wh, b):
    a = torch.addmm(F.linear(x, wi, b), h, wh.mT)  # B 4H
    i, f, g, o = wide(a).chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c2 = f * wide(c) + i * g
    return (o * c2.tanh()).to(x.dtype), c2.to(x.dtype), torch.cat([i, f, g, o], -1).to(x.dtype)


def lstm_backward(dh2, dc2, dG, x, h, c, wi, wh, c2, G, need):
    (i, f, g, o), tc = wide(G).chunk(4, -1), wide(c2).tanh()
    dc = None if dc2 is None else wide(dc2)
    ao = torch.zeros_like(o)
    if dh2 is not None:
        dm = wide(dh2)
        through = dm * (o * (1 - tc * tc))
        dc, ao = through if dc is None else dc + through, dm * (tc * o * (1 - o))
    if dc is None:  # second order only
        dc = torch.zeros_like(tc)
    da = torch.cat([dc * (g * i * (1 - i)), dc * (wide(c) * f * (1 - f)), dc * (i * (1 - g * g)), ao], -1)  # B 4H
    if dG is not None:
        da = da + wide(dG) * torch.cat([i * (1 - i), f * (1 - f), 1 - g * g, o * (1 - o)], -1)
    dx, dh, dwi, dwh, db, _ = products(da.to(G.dtype), None, x, h, wi, wh, need, need.b)
    return dx, dh, (dc * f).to(G.dtype) if need.c else None, dwi, dwh, db


def products(da, du, x, h, wi, wh, need, bi, bh=False):
    """The gradients of Wi x and Wh h from those of their values; du None: the same for both."""
    du = da if du is None else du
    return (
        da @ wi if need.x else None,  # B I
        du @ wh if need.h else None,  # B H
        da.mT @ x if need.wi else None,  # G·H I
        du.mT @ h if need.wh else None,  # G·H H
        da.sum(0) if bi else None,  # G·H
        du.sum(0) if bh else None,  # G·H
    )


_LSTM_USES = {"x": "wi", "h": "wh", "c": "", "wi": "x", "wh": "h", "b": ""}
LSTM_RULE = Rule(
    "lstm_cell",
    lstm_forward,
    lstm_backward,
    inputs="x h c wi wh b",
    outputs="h2 c2 G",
    uses={letter: f"c c2 G {more}" for letter, more in _LSTM_USES.items()},
)

# --- gru_cell -------------------------------------------------------------------------------------------------------------


def gru_forward(x, h, wi, wh, bi, bh):
    (ar, az, an), (ur, uz, q) = (wide(F.linear(*t)).chunk(3, -1) for t in ((x, wi, bi), (h, wh, bh)))  # each B H
    r, z = (ar + ur).sigmoid(), (az + uz).sigmoid()
    n = (an + r * q).tanh()
    return (n + z * (wide(h) - n)).to(x.dtype), torch.cat([r, z, q, n], -1).to(x.dtype)


def gru_backward(dh2, dG, x, h, wi, wh, G, need):
    r, z, q, n = wide(G).chunk(4, -1)
    dy = torch.zeros_like(n) if dh2 is None else wide(dh2)  # None: second order only
    dr, dz, dq, dn = (0, 0, 0, 0) if dG is None else wide(dG).chunk(4, -1)
    an = dy * ((1 - z) * (1 - n * n)) + dn * (1 - n * n)
    az = dy * ((wide(h) - n) * z * (1 - z)) + dz * (z * (1 - z))
    ar = (an * q + dr) * (r * (1 - r))
    da, du = torch.cat([ar, az, an], -1), torch.cat([ar, az, an * r + dq], -1)  # B 3H
    grads = products(da.to(G.dtype), du.to(G.dtype), x, h, wi, wh, need, need.bi, need.bh)
    return grads[0], grads[1] + (dy * z).to(G.dtype) if need.h else None, *grads[2:]


_GRU_USES = {"x": "wi", "h": "wh", "wi": "x", "wh": "", "bi": "", "bh": ""}
GRU_RULE = Rule(
    "gru_cell",
    gru_forward,
    gru_backward,
    inputs="x h wi wh bi bh",
    outputs="h2 G",
    uses={letter: f"h G {more}" for letter, more in _GRU_USES.items()},
)

# --- rnn_tanh_cell, rnn_relu_cell -----------------------------------------------------------------------------------------


def rnn_forward(x, h, wi, wh, b, nonlinearity):
    a = torch.addmm(F.linear(x, wi, b), h, wh.mT)  # B H
    return a.tanh() if nonlinearity == "tanh" else a.relu()


def rnn_backward(dh2, x, h, wi, wh, h2, nonlinearity, need):
    da = dh2 * (1 - h2 * h2) if nonlinearity == "tanh" else torch.where(h2 <= 0, 0.0, dh2)
    return products(da, None, x, h, wi, wh, need, need.b)[:5]


_RNN_USES = {"x": "wi", "h": "wh", "wi": "x", "wh": "h", "b": ""}
RNN_RULE = Rule(
    "rnn_cell",
    rnn_forward,
    rnn_backward,
    inputs="x h wi wh b",
    outputs="h2",
    uses={letter: f"h2 {more}" for letter, more in _RNN_USES.items()},
)

# --- the public functions and modules ---------------------------------------------------------------------------------------


def prepare(
    op: Op, gates: int, states: tuple[str, ...], input: Any, hx: Any, weights: Sequence[Any], keep_state: bool
) -> tuple[list[Any], bool]:
    """The tensors of a call, checked, cast and with a batch dimension: x, the states, the weights; and whether x had one."""
    hx = check_hx(op.name, hx, states)
    check_floating(op.name, "input", input)
    check_floating(op.name, "weight_hh", weights[1])
    if input.dim() not in (1, 2):
        raise ValueError(f"{op.name}: input has shape {tuple(input.shape)}, {input.dim()} dimensions; it needs (B, I) or (I)")
    batched = input.dim() == 2
    for name, h in zip(states, hx or ()):
        if h.dim() != input.dim():
            raise ValueError(
                f"{op.name}: {name} has shape {tuple(h.shape)}, {h.dim()} dimensions; with input {tuple(input.shape)} "
                f"it needs {'(B, H)' if batched else '(H)'}"
            )
    if not batched:
        input, hx = input.unsqueeze(0), hx if hx is None else [h.unsqueeze(0) for h in hx]
    if hx is None:
        hx = [input.new_zeros(input.shape[0], weights[1].shape[-1])] * len(states)
    input, hx, there = cast(op, input, hx, [w for w in weights if w is not None], keep_state)
    found = iter(there)
    tensors = [input, *hx, *(w if w is None else next(found) for w in weights)]
    op.check(*tensors)
    wh = weights[1]
    if wh.shape[0] != gates * wh.shape[1]:
        raise ValueError(f"{op.name}: weight_hh has shape {tuple(wh.shape)}; it needs ({gates}·H, H)")
    return tensors, batched


def summed(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM, as `torch.nn.LSTMCell`; gates in the order i f g o.

    Args:
        input: (B, I) or (I), floating point.
        hx: (h, c), each (B, H), or (H) for an input (I); None for zeros.
        weight_ih, weight_hh: (4H, I) and (4H, H).
        bias_ih, bias_hh: (4H,) or None.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        The next h and c, in the shape of h.

    Raises:
        ValueError: the shapes or devices disagree, or the named backend cannot run the call.
        TypeError: the tensors are not of one floating-point dtype, or hx is not a pair of tensors.
    """
    weights = (weight_ih, weight_hh, bias_ih, bias_hh)
    (x, h, c, wi, wh, bi, bh), batched = prepare(LSTM_CELL, 4, ("h", "c"), input, hx, weights, True)
    args = (x, h, c, wi, wh, summed(bi, bh))
    h2, c2, _ = LSTM_RULE(*args, backend=LSTM_CELL.pick(LSTM_RULE, backend, *args))
    return (h2, c2) if batched else (h2.squeeze(0), c2.squeeze(0))


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """One step of a GRU, as `torch.nn.GRUCell`; gates in the order r z n.

    Args:
        input: (B, I) or (I), floating point.
        hx: (B, H), or (H) for an input (I); None for zeros.
        weight_ih, weight_hh: (3H, I) and (3H, H).
        bias_ih, bias_hh: (3H,) or None.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        The next state, in the shape of hx.

    Raises:
        ValueError: the shapes or devices disagree, or the named backend cannot run the call.
        TypeError: the tensors are not of one floating-point dtype, or hx is no tensor.
    """
    args, batched = prepare(GRU_CELL, 3, ("hx",), input, hx, (weight_ih, weight_hh, bias_ih, bias_hh), True)
    h2, _ = GRU_RULE(*args, backend=GRU_CELL.pick(GRU_RULE, backend, *args))
    return h2 if batched else h2.squeeze(0)


def rnn_tanh_cell(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """h' = tanh(Wi x + bi + Wh h + bh), as `torch.nn.RNNCell`; arguments and errors as `gru_cell`, with one block of H rows."""
    return _rnn(TANH_CELL, "tanh", input, hx, (weight_ih, weight_hh, bias_ih, bias_hh), backend)


def rnn_relu_cell(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """h' = relu(Wi x + bi + Wh h + bh), as `torch.nn.RNNCell`; arguments and errors as `gru_cell`, with one block of H rows."""
    return _rnn(RELU_CELL, "relu", input, hx, (weight_ih, weight_hh, bias_ih, bias_hh), backend)


def _rnn(op: Op, nonlinearity: str, input: Tensor, hx: Tensor | None, weights: Sequence[Any], backend: str) -> Tensor:
    (x, h, wi, wh, bi, bh), batched = prepare(op, 1, ("hx",), input, hx, weights, False)
    args = (x, h, wi, wh, summed(bi, bh), nonlinearity)
    h2 = RNN_RULE(*args, backend=op.pick(RNN_RULE, backend, *args))
    return h2 if batched else h2.squeeze(0)


class LSTMCell(nn.LSTMCell):
    """`torch.nn.LSTMCell` with the backward above; same parameters, state_dict and arguments."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`

    def forward(self, input, hx=None):
        return lstm_cell(input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, backend=self.backend)


class GRUCell(nn.GRUCell):
    """`torch.nn.GRUCell` with the backward above; same parameters, state_dict and arguments."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`

    def forward(self, input, hx=None):
        return gru_cell(input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, backend=self.backend)


class RNNCell(nn.RNNCell):
    """`torch.nn.RNNCell` with the backward above; same parameters, state_dict and arguments."""

    backend: str = "auto"

    def forward(self, input, hx=None):
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        cell = rnn_tanh_cell if self.nonlinearity == "tanh" else rnn_relu_cell
        return cell(input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, backend=self.backend)


# --- references, cases and the table ----------------------------------------------------------------------------------------


def lstm_reference(input, hx, weight_ih, weight_hh, bias_ih=None, bias_hh=None):
    """The same in plain torch."""
    h, c = hx if hx is not None else [input.new_zeros(*input.shape[:-1], weight_hh.shape[1])] * 2
    i, f, g, o = (F.linear(input, weight_ih, bias_ih) + F.linear(h, weight_hh, bias_hh)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru_reference(input, hx, weight_ih, weight_hh, bias_ih=None, bias_hh=None):
    """The same in plain torch."""
    h = hx if hx is not None else input.new_zeros(*input.shape[:-1], weight_hh.shape[1])
    (ar, az, an), (ur, uz, un) = (F.linear(*t).chunk(3, -1) for t in ((input, weight_ih, bias_ih), (h, weight_hh, bias_hh)))
    z = torch.sigmoid(az + uz)
    return (1 - z) * torch.tanh(an + torch.sigmoid(ar + ur) * un) + z * h


def rnn_reference(phi: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def reference(input, hx, weight_ih, weight_hh, bias_ih=None, bias_hh=None):
        h = hx if hx is not None else input.new_zeros(*input.shape[:-1], weight_hh.shape[1])
        return phi(F.linear(input, weight_ih, bias_ih) + F.linear(h, weight_hh, bias_hh))

    return reference


def case_of(gates: int, states: int) -> Callable[[Draw], Case]:
    def case(draw: Draw) -> Case:
        B, I, H = draw.size(), draw.size(), draw.size(1)
        lead = (B,) if draw.random.random() < 0.8 else ()
        x, hs = draw.tensor(*lead, I), [draw.tensor(*lead, H) for _ in range(states)]
        hx = None if draw.random.random() < 0.2 else hs[0] if states == 1 else tuple(hs)
        scale = H**-0.5
        weights = [draw.tensor(gates * H, n, scale=scale) for n in (I, H)]
        biases = [draw.tensor(gates * H, scale=scale) if draw.random.random() < 0.7 else None for _ in range(2)]
        return Case((x, hx, *weights, *biases), {})

    return case


def bench_of(gates: int, states: int) -> Callable[[Draw], Case]:
    def bench(draw: Draw) -> Case:
        B, H = 128, 512
        hs = tuple(draw.tensor(B, H) for _ in range(states))
        shapes = ((gates * H, H), (gates * H, H), (gates * H,), (gates * H,))
        weights = [draw.tensor(*s, scale=H**-0.5) for s in shapes]
        return Case((draw.tensor(B, H), hs if states > 1 else hs[0], *weights), {})

    return bench


def _op(call: Any, reference: Any, rule: Rule, gates: int, states: tuple[str, ...], module: Any, source: str, **kw: Any) -> Op:
    return Op(
        name=call.__name__,
        call=call,
        reference=reference,
        peer=getattr(torch._VF, call.__name__),
        rules=(rule,),
        module=() if module is None else (module,),
        replaces=() if module is None else (module.__base__,),
        shapes=f"input: B I, {', '.join(f'{s}: B H' for s in states)}, weight_ih: G I, weight_hh: G H, bias_ih: G, bias_hh: G "
        "-> B H",
        source=source,
        case=case_of(gates, len(states)),
        bench=bench_of(gates, len(states)),
        **kw,
    )


KEEPS_STATE = {"cuda": "low"}  # on the CPU torch's cells keep the dtype of their states; see `recurrent.cast`
LSTM_CELL = _op(
    lstm_cell,
    lstm_reference,
    LSTM_RULE,
    4,
    ("h", "c"),
    LSTMCell,
    "Hochreiter & Schmidhuber 1997; Gers et al. 2000",
    autocast=KEEPS_STATE,
)
GRU_CELL = _op(gru_cell, gru_reference, GRU_RULE, 3, ("hx",), GRUCell, "Cho et al. 2014", autocast=KEEPS_STATE)
TANH_CELL = _op(rnn_tanh_cell, rnn_reference(torch.tanh), RNN_RULE, 1, ("hx",), RNNCell, "Elman 1990", autocast=LOW)
RELU_CELL = _op(rnn_relu_cell, rnn_reference(torch.relu), RNN_RULE, 1, ("hx",), None, "Elman 1990", autocast=LOW)
OPS = (LSTM_CELL, GRU_CELL, TANH_CELL, RELU_CELL)
