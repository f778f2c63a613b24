"""minGRU and minLSTM: recurrent cells whose gates see the input alone, so that a sequence is one product and one scan.

Maths     minGRU    u = Wz xₜ + bz
          minLSTM   u = softplus(−f) − softplus(−i)    f = Wf xₜ + bf    i = Wi xₜ + bi
                    so that σ(u) = σ(i) / (σ(f) + σ(i)), the input gate, and 1 − σ(u) the forget gate, both normalised
          both      z = σ(u)    m = Wm xₜ + bm    c = g(m)
                    hₜ = (1 − z) hₜ₋₁ + z c
          g(m) = m + ½ where m ≥ 0, else σ(m): positive and increasing; or the identity, or tanh
          backward  gₜ = dhₜ + (1 − zₜ₊₁) gₜ₊₁             the reverse scan, see `linear_recurrence`
          du = gₜ (c − hₜ₋₁) z (1 − z)                    dm = gₜ z g'(m)
          minGRU    dWz's row block is du                 minLSTM   df = −du σ(−f)    di = du σ(−i)
          with da the blocks side by side:
          dx = da W        dW = Σₜ daₜᵀ xₜ        db = Σₜ daₜ        dh₀ = (1 − z₁) g₁
Letters   see `recurrent`; G blocks of H rows: z m, or f i m; pre = W x + b, T B G·H
Saving    save="gates" keeps x, h and pre; save="outputs" keeps x and h, and makes pre again in one product
Numerics  the gates and the scan are in float32 for half tensors. The scan is not in log space: `linear_scan` never divides by a
          product of decays, which is what Heinsen's form in logarithms (arXiv 2311.06281) is there for
Source    Feng et al., arXiv 2410.01201: Algorithms 1 to 8, and g from Appendix B
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
from bptoolkit.op import LOW, Op
from bptoolkit.ops import recurrent_reference
from bptoolkit.ops.linear_recurrence import _first, _standing, scan, times_before
from bptoolkit.ops.recurrent import Layout, check_save, last, over_time, sequence, within
from bptoolkit.precision import wide

BLOCKS = {"min_gru": 2, "min_lstm": 3}
ACTIVATIONS = ("g", "identity", "tanh")

# --- the maths ------------------------------------------------------------------------------------------------------------


def _gate(pre: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """U and m: T B H each."""
    if kind == "min_gru":
        u, m = pre.chunk(2, -1)
        return u, m
    f, i, m = pre.chunk(3, -1)
    return F.softplus(-f) - F.softplus(-i), m


def _activation(m: Tensor, activation: str) -> Tensor:
    if activation == "g":
        return torch.where(m >= 0, m + 0.5, m.sigmoid())
    return m.tanh() if activation == "tanh" else m


def _slope(m: Tensor, activation: str) -> Tensor | float:
    if activation == "g":
        s = m.sigmoid()
        return torch.where(m >= 0, 1.0, s * (1 - s))
    return 1 - m.tanh() ** 2 if activation == "tanh" else 1.0


def _run(pre: Tensor, h0: Tensor, lengths: Tensor | None, reverse: bool, kind: str, activation: str) -> Tensor:
    u, m = _gate(wide(pre), kind)
    added = u.sigmoid() * _activation(m, activation)
    h = scan(_standing((-u).sigmoid(), lengths), within(added, lengths), wide(h0), reverse, False)
    return within(h, lengths).to(pre.dtype)


def forward_gates(x, h0, w, b, lengths, reverse, kind, activation):
    pre = F.linear(within(x, lengths), w, b)  # T B GH: one product for all steps
    return _run(pre, h0, lengths, reverse, kind, activation), pre


def forward_outputs(x, h0, w, b, lengths, reverse, kind, activation):
    return _run(F.linear(within(x, lengths), w, b), h0, lengths, reverse, kind, activation)


def backward_gates(dh, dpre, x, h0, w, lengths, reverse, kind, activation, h, pre, need):
    P = wide(pre)
    u, m = _gate(P, kind)
    keep, dh0, da = _standing((-u).sigmoid(), lengths), None, None
    if dh is not None:
        g = scan(keep, wide(within(dh, lengths)), None, not reverse, True)
        if need.h0:
            dh0 = (_first(keep, reverse, h0) * _first(g, reverse, torch.zeros_like(h0))).to(h0.dtype)
        if not (need.x or need.w or need.b):
            return None, dh0, None, None, None
        z = u.sigmoid()
        gz = within(g, lengths) * z
        du = (gz * _activation(m, activation) - z * within(times_before(h0, h, g, lengths, reverse), lengths)) * (1 - z)
        blocks = [du] if kind == "min_gru" else [-du * (-P.chunk(3, -1)[0]).sigmoid(), du * (-P.chunk(3, -1)[1]).sigmoid()]
        da = torch.cat([*blocks, gz * _slope(m, activation)], -1).to(pre.dtype)  # T B GH
    da = dpre if da is None else da if dpre is None else da + dpre
    dx = within(da @ w, lengths) if need.x else None  # T B I
    dw = over_time(da, within(x, lengths)) if need.w else None  # GH I
    db = da.sum((0, 1)) if need.b else None  # GH
    return dx, dh0, dw, db, None


def backward_outputs(dh, x, h0, w, b, lengths, reverse, kind, activation, h, need):
    pre = F.linear(within(x, lengths), w, b)
    return backward_gates(dh, None, x, h0, w, lengths, reverse, kind, activation, h, pre, need)


def _gates_kernel():
    from bptoolkit.triton_kernels.min_rnn import GATES

    return GATES


def _outputs_kernel():
    from bptoolkit.triton_kernels.min_rnn import OUTPUTS

    return OUTPUTS


_INPUTS, _SCAN = "x h0 w b lengths", "h0 lengths h pre"
GATES = Rule(
    "min_rnn_gates",
    forward_gates,
    backward_gates,
    inputs=_INPUTS,
    outputs="h pre",
    uses={"x": f"{_SCAN} w", "h0": "h0 lengths pre", "w": f"{_SCAN} x", "b": _SCAN},
    kernel=_gates_kernel,
)
OUTPUTS = Rule("min_rnn_outputs", forward_outputs, backward_outputs, inputs=_INPUTS, outputs="h", kernel=_outputs_kernel)

# --- the public functions -------------------------------------------------------------------------------------------------


def min_gru(
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
    activation: str = "g",
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    save: str = "gates",
    backend: str = "auto",
) -> tuple[Any, Tensor]:
    """A whole sequence through a minGRU; H hidden, L layers, D directions.

    Args:
        input: (T, B, I), (B, T, I) if batch_first, (T, I), or a PackedSequence; floating point.
        hx: h_0 of shape (L·D, B, H), without B for a (T, I) input; None for zeros.
        weights: per layer and direction weight_ih (2H, I or D·H) and, if bias, bias_ih (2H); blocks in the order z m.
            (min_lstm: 3H rows, in the order f i m.)
        num_layers, bidirectional, batch_first, bias: as in torch.nn.GRU.
        dropout: the share of every layer's output but the last's that is zeroed, if training.
        activation: of the candidate, "g" (the paper's, positive), "identity" or "tanh".
        lengths: (B,) int64, between 0 and T: rows end there, their outputs past it are zero, their last states are those
            at their ends, a reverse direction starts there.
        resets: bool, (T, B), (B, T) if batch_first, or (T,): where True, the state before the step is zero, for the reverse
            direction the state after the step before. Its values are read: not inside torch.compile.
        save: what is kept for backward: "gates" (the default, the fastest) or "outputs" (less memory, one product more).
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        output (T, B, D·H) or as the input is laid out, and h_n in the shape of hx.

    Raises:
        ValueError: shapes, lengths or devices disagree, an option is out of range, or the named backend cannot run the call.
        TypeError: the tensors are not of one floating-point dtype, or hx or lengths is no such tensor.
    """
    layout = Layout(num_layers, bidirectional, batch_first, bias, dropout if training else 0.0, recurrent=False)
    return _sequence(GRU_OP, input, hx, weights, layout, lengths, resets, activation, save, backend)


def min_lstm(
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
    activation: str = "g",
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    save: str = "gates",
    backend: str = "auto",
) -> tuple[Any, Tensor]:
    """A whole sequence through a minLSTM, its gates normalised; arguments and errors as `min_gru`."""
    layout = Layout(num_layers, bidirectional, batch_first, bias, dropout if training else 0.0, recurrent=False)
    return _sequence(LSTM_OP, input, hx, weights, layout, lengths, resets, activation, save, backend)


def _sequence(
    op: Op,
    input: Any,
    hx: Any,
    weights: Any,
    layout: Layout,
    lengths: Any,
    resets: Any,
    activation: str,
    save: str,
    backend: str,
) -> tuple[Any, Tensor]:
    check_save(op.name, save)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op.name}: activation={activation!r} is not known; choose from {', '.join(map(repr, ACTIVATIONS))}")
    rule = GATES if save == "gates" and torch.is_grad_enabled() else OUTPUTS

    def cell(x, start, ws, lengths, reverse, _):
        args = (x, *start, ws[0], ws[1] if layout.bias else None, lengths, reverse, op.name, activation)
        out = rule(*args, backend=op.pick(rule, backend, *args))
        h = out if isinstance(out, Tensor) else out[0]
        return h, (last(start[0], h, lengths, reverse),)

    output, (h,) = sequence(op, cell, BLOCKS[op.name], ("h_0",), input, hx, weights, layout, lengths, resets=resets)
    return output, h


# --- the modules ----------------------------------------------------------------------------------------------------------


class MinGRU(nn.Module):
    """A minGRU over whole sequences, laid out as `torch.nn.GRU`; see `min_gru`.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional: as in torch.nn.GRU.
        activation: "g", "identity" or "tanh".

    Parameters are weight_ih_l[k] and bias_ih_l[k], with the suffix _reverse for the second direction; uniform in ±1/√I.
    """

    backend: str = "auto"
    save: str = "gates"  # or "outputs"; see `min_gru`
    run = staticmethod(min_gru)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        activation: str = "g",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.num_layers, self.bias = input_size, hidden_size, num_layers, bias
        self.batch_first, self.dropout, self.bidirectional, self.activation = batch_first, dropout, bidirectional, activation
        self._names: list[str] = []
        D, rows = 1 + bidirectional, BLOCKS[self.run.__name__] * hidden_size
        for k in range(num_layers * D):
            suffix = f"_l{k // D}" + "_reverse" * (k % D)
            columns = input_size if k < D else D * hidden_size
            for name, shape in (("weight_ih", (rows, columns)), ("bias_ih", (rows,))):
                if name == "bias_ih" and not bias:
                    continue
                self.register_parameter(name + suffix, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
                self._names.append(name + suffix)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in ±1/√I, as torch.nn.Linear."""
        bound = 0.0
        for name in self._names:
            p = getattr(self, name)
            if p.dim() == 2:
                bound = p.shape[1] ** -0.5 if p.shape[1] else 0.0
            nn.init.uniform_(p, -bound, bound)

    def forward(
        self, input: Any, hx: Tensor | None = None, lengths: Tensor | None = None, resets: Tensor | None = None
    ) -> tuple[Any, Tensor]:
        weights = [getattr(self, name) for name in self._names]
        names = ("num_layers", "bidirectional", "batch_first", "bias", "training", "activation", "save", "backend")
        dropout = self.dropout if self.training and self.num_layers > 1 else 0.0
        return self.run(
            input, hx, weights, lengths=lengths, resets=resets, dropout=dropout, **{n: getattr(self, n) for n in names}
        )

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults."""
        text = f"{self.input_size}, {self.hidden_size}"
        defaults = {
            "num_layers": 1,
            "bias": True,
            "batch_first": False,
            "dropout": 0.0,
            "bidirectional": False,
            "activation": "g",
        }
        return text + "".join(f", {n}={getattr(self, n)!r}" for n, default in defaults.items() if getattr(self, n) != default)


class MinLSTM(MinGRU):
    """A minLSTM over whole sequences; arguments and parameters as `MinGRU`, with three blocks of rows."""

    run = staticmethod(min_lstm)


# --- the ops --------------------------------------------------------------------------------------------------------------


def _reference(op: str) -> Callable[..., Any]:
    def reference(input, hx, weights, activation="g", **kwargs):
        """The same in plain torch, a step at a time."""
        input, *rest = (GRU_OP if op == "min_gru" else LSTM_OP).cast(input, *([] if hx is None else [hx]), *weights)
        hx, weights = rest[: -len(weights)] or None, rest[-len(weights) :]
        bias = kwargs.get("bias", True)

        def step(x, states, ws):
            (h,) = states
            *gates, m = F.linear(x, ws[0], ws[1] if bias else None).chunk(BLOCKS[op], -1)
            c = {"g": lambda: torch.where(m >= 0, m + 0.5, m.sigmoid()), "tanh": m.tanh, "identity": lambda: m}[activation]()
            if op == "min_gru":
                return (torch.sigmoid(-gates[0]) * h + torch.sigmoid(gates[0]) * c,)
            f, i = (F.logsigmoid(g) for g in gates)  # f / (f + i), where both may underflow
            return ((f - i).sigmoid() * h + (i - f).sigmoid() * c,)

        y, (h,) = recurrent_reference.plain(step, (weights[0].shape[0] // BLOCKS[op],), input, hx, weights, **kwargs)
        return y, h

    return reference


def _case(G: int) -> Callable[[Draw], Case]:
    def case(draw: Draw) -> Case:
        (x, hx, weights), kwargs = recurrent_reference.case(draw, G, 1, small=True)
        per = 2 + 2 * kwargs["bias"]  # weight_ih, weight_hh, bias_ih, bias_hh
        weights = [w for k, w in enumerate(weights) if k % per in ((0, 2) if per == 4 else (0,))]
        return Case(
            (x, hx, weights), kwargs | {"activation": draw.choice(ACTIVATIONS), "save": draw.choice(("gates", "outputs"))}
        )

    return case


def _bench(G: int, save: str) -> Callable[[Draw], Case]:
    def bench(draw: Draw) -> Case:
        x, hx, weights = recurrent_reference.wide(draw, G, 128, 32, 256)
        return Case((x, hx, weights[::2]), {"save": save})

    return bench


def _op(call: Callable[..., Any]) -> Op:
    G = BLOCKS[call.__name__]
    return Op(
        name=call.__name__,
        call=call,
        reference=_reference(call.__name__),
        rules=(GATES, OUTPUTS),
        shapes="input: T B I -> T B H",
        source="Feng et al. 2024",
        autocast=LOW,
        case=_case(G),
        bench={f"save={s}": _bench(G, s) for s in ("gates", "outputs")},
    )


GRU_OP, LSTM_OP = _op(min_gru), _op(min_lstm)
OPS = (GRU_OP, LSTM_OP)
