"""The LSTM with peepholes, with layer normalisation, and with zoneout or dropout inside the recurrence.

Maths     in `recurrent_variants`, which has the rule, forward and backward:
          peephole_lstm     the gates see the cell: i and f the old one, o the new one, each unit its own
          layer_norm_lstm   Wi x, Wh h and what the output sees of the cell are normalised over their units
          zoneout_lstm      the plain LSTM; like the other two it takes
                            zoneout               each unit keeps its old state with a probability
                            recurrent_dropout     of g, the candidate for the cell: what the cell remembers is never dropped
                            variational_dropout   of x and hₜ₋₁, by one mask for all steps
Letters   T steps, B batch, I in, H hidden, L layers, D directions
Source    peepholes: Gers & Schmidhuber, "Recurrent nets that time and count", 2000; Graves, arXiv 1308.0850, eqs. 7-11
          layer normalisation: Ba et al., arXiv 1607.06450, eqs. 20-22
          zoneout: Krueger et al., arXiv 1606.01305; recurrent dropout: Semeniuta et al., arXiv 1603.05118;
          variational dropout: Gal & Ghahramani, arXiv 1512.05287
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from bptoolkit import randomness
from bptoolkit.cases import Case, Draw
from bptoolkit.op import LOW, Op
from bptoolkit.ops import recurrent_reference, recurrent_variants_reference
from bptoolkit.ops.recurrent import Layout, last, sequence
from bptoolkit.ops.recurrent_variants import CANDIDATE, INPUT, RULE, STATE, ZONE_C, ZONE_H

Rate = float | tuple[float, float]
PEEPHOLES: Mapping[str, int] = {"weight_ch": 3}  # the further weights of a layer in a direction, in multiples of H
NORMS: Mapping[str, int] = {"gain_ih": 4, "gain_hh": 4, "gain_c": 1, "bias_c": 1}


def further(op: str, bias: bool) -> dict[str, int]:
    """The further weights of an op."""
    all_ = PEEPHOLES if op == "peephole_lstm" else NORMS if op == "layer_norm_lstm" else {}
    return {name: n for name, n in all_.items() if bias or name != "bias_c"}


def layout_of(op: str, num_layers: int, bidirectional: bool, batch_first: bool, bias: bool, dropout: float) -> Layout:
    return Layout(num_layers, bidirectional, batch_first, bias, dropout, further=tuple(further(op, bias).items()))


def rates_of(op: str, zoneout: Rate, recurrent_dropout: float, variational_dropout: Rate) -> tuple[float, ...]:
    """The probabilities in the order of the rule, checked."""

    def two(name: str, rate: Rate, of: str) -> tuple[float, float]:
        pair = tuple(rate) if isinstance(rate, (tuple, list)) else (rate, rate)
        if len(pair) != 2:
            raise ValueError(f"{op}: {name}={rate}; it must be one probability, or two, for {of}")
        for p in pair:
            if not 0 <= p <= 1:
                raise ValueError(f"{op}: {name}={rate}; a probability lies between 0 and 1")
        return pair

    zone_h, zone_c = two("zoneout", zoneout, "h and c")
    drop_x, drop_h = two("variational_dropout", variational_dropout, "x and h")
    candidate, _ = two("recurrent_dropout", (recurrent_dropout, 0.0), "g")
    rates = {ZONE_H: zone_h, ZONE_C: zone_c, CANDIDATE: candidate, INPUT: drop_x, STATE: drop_h}
    return tuple(rates[k] for k in range(5))


def run(
    op: Op,
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    layout: Layout,
    rates: tuple[float, ...],
    training: bool,
    lengths: Tensor | None,
    backend: str,
    eps: float = 0.0,
) -> tuple[Any, tuple[Tensor, Tensor]]:
    """What the three functions have in common: `sequence`, with a seed for each cell."""
    names, random = layout.names, training and any(rates)

    def cell(x, start, ws, lengths, reverse, _):
        (h0, c0), of = start, dict(zip(names, ws))
        b = of["bias_ih"] + of["bias_hh"] if layout.bias else None
        further = [of.get(name) for name in (*PEEPHOLES, *NORMS)]
        seed = randomness.draw_seed(x) if random else None
        args = (x, h0, c0, of["weight_ih"], of["weight_hh"], b, *further, seed, lengths, reverse, rates, float(eps))
        y, c = RULE(*args, backend=op.pick(RULE, backend, *args))
        return y, (last(h0, y, lengths, reverse), last(c0, c, lengths, reverse))

    output, (h, c) = sequence(op, cell, 4, ("h_0", "c_0"), input, hx, weights, layout, lengths)
    return output, (h, c)


def peephole_lstm(
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    bias: bool = True,
    dropout: float = 0.0,
    zoneout: Rate = 0.0,
    recurrent_dropout: float = 0.0,
    variational_dropout: Rate = 0.0,
    training: bool = True,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Any, tuple[Tensor, Tensor]]:
    """A whole sequence through an LSTM whose gates see the cell; H hidden, L layers, D directions.

    Args:
        input: (T, B, I), (B, T, I) if batch_first, (T, I), or a PackedSequence; floating point, T at least 1.
        hx: (h_0, c_0), each (L·D, B, H), without B for a (T, I) input; None for zeros.
        weights: per layer and direction, those of torch.nn.LSTM: weight_ih (4H, I or D·H), weight_hh (4H, H), bias_ih and
            bias_hh (4H) if bias; gates in the order i f g o; then weight_ch (3H): the peepholes of i and f to the old
            cell, of o to the new one.
        num_layers, bidirectional, batch_first, bias: as in torch.nn.LSTM.
        dropout: the share of every layer's output but the last's that is zeroed, if training.
        zoneout: the probability that a unit of h, and of c, keeps its old value for a step; two numbers for two. In
            evaluation the states are mixed in that proportion.
        recurrent_dropout: the share of g, the candidate for the cell, that is zeroed, if training; anew at each step.
        variational_dropout: the share of x, and of h, that is zeroed, if training; the same units at all steps. Two numbers
            for two.
        training: whether the random masks are drawn; `torch.manual_seed` governs them.
        lengths: (B,) int64, between 0 and T: rows end there, their outputs past it are zero, their last states are those
            at their ends, a reverse direction starts there.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        output (T, B, D·H) or as the input is laid out, and (h_n, c_n) in the shapes of hx.

    Raises:
        ValueError: shapes, lengths or devices disagree, an option is out of range, or the named backend cannot run the call.
        TypeError: the tensors are not of one floating-point dtype, or hx or lengths is no such tensor.
    """
    layout = layout_of("peephole_lstm", num_layers, bidirectional, batch_first, bias, dropout if training else 0.0)
    rates = rates_of("peephole_lstm", zoneout, recurrent_dropout, variational_dropout)
    return run(PEEPHOLE, input, hx, weights, layout, rates, training, lengths, backend)


def layer_norm_lstm(
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    bias: bool = True,
    dropout: float = 0.0,
    zoneout: Rate = 0.0,
    recurrent_dropout: float = 0.0,
    variational_dropout: Rate = 0.0,
    training: bool = True,
    eps: float = 1e-5,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Any, tuple[Tensor, Tensor]]:
    """A whole sequence through a layer-normalised LSTM; arguments and errors as `peephole_lstm` but for weights and eps.

    Args:
        weights: per layer and direction, those of torch.nn.LSTM, then gain_ih and gain_hh (4H) of the norms of Wi x and Wh h,
            whose shifts are bias_ih and bias_hh, and gain_c (H) and, if bias, bias_c (H) of that of the cell.
        eps: added to the variances.
    """
    layout = layout_of("layer_norm_lstm", num_layers, bidirectional, batch_first, bias, dropout if training else 0.0)
    rates = rates_of("layer_norm_lstm", zoneout, recurrent_dropout, variational_dropout)
    return run(LAYER_NORM, input, hx, weights, layout, rates, training, lengths, backend, eps)


def zoneout_lstm(
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    bias: bool = True,
    dropout: float = 0.0,
    zoneout: Rate = 0.0,
    recurrent_dropout: float = 0.0,
    variational_dropout: Rate = 0.0,
    training: bool = True,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Any, tuple[Tensor, Tensor]]:
    """A whole sequence through an LSTM with zoneout or dropout inside; arguments and errors as `peephole_lstm` but for weights.

    Args:
        weights: those of torch.nn.LSTM.
    """
    layout = layout_of("zoneout_lstm", num_layers, bidirectional, batch_first, bias, dropout if training else 0.0)
    rates = rates_of("zoneout_lstm", zoneout, recurrent_dropout, variational_dropout)
    return run(ZONEOUT, input, hx, weights, layout, rates, training, lengths, backend)


class Variant(nn.RNNBase):
    """What the three modules have in common: the parameters of `torch.nn.LSTM` and further ones, and the random masks."""

    backend: str = "auto"
    function: Callable[..., Any]  # the op's
    more: Mapping[str, int] = {}  # the further weights of a layer in a direction, in multiples of H

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
        zoneout: Rate = 0.0,
        recurrent_dropout: float = 0.0,
        variational_dropout: Rate = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        kind = {"device": device, "dtype": dtype}
        super().__init__("LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, **kind)
        rates_of(type(self).__name__, zoneout, recurrent_dropout, variational_dropout)
        self.zoneout, self.recurrent_dropout, self.variational_dropout = zoneout, recurrent_dropout, variational_dropout
        for name in (n for names in self.names() for n in names if not hasattr(self, n)):
            size = self.more[name[: name.index("_l")]] * hidden_size
            self.register_parameter(name, nn.Parameter(torch.empty(size, **kind)))
        self.reset_parameters()

    def names(self) -> list[list[str]]:
        """The names of the weights of each layer in each direction, in the order of the op."""
        more = [name for name in self.more if self.bias or name != "bias_c"]
        return [[*names, *(m + names[0].removeprefix("weight_ih") for m in more)] for names in self._all_weights]

    def options(self) -> dict[str, Any]:
        """The module's attributes as the options of its function."""
        names = ["num_layers", "bidirectional", "batch_first", "bias", "training", "zoneout", "backend"]
        names += ["dropout", "recurrent_dropout", "variational_dropout"] if self.training else []
        return {name: getattr(self, name) for name in names}

    def forward(self, input, hx=None, lengths=None):
        weights = [getattr(self, name) for names in self.names() for name in names]
        return type(self).function(input, hx, weights, **self.options(), lengths=lengths)

    def extra_repr(self) -> str:
        """The arguments that are not the default ones."""
        rates = ("zoneout", "recurrent_dropout", "variational_dropout")
        return super().extra_repr() + "".join(f", {r}={getattr(self, r)}" for r in rates if getattr(self, r))


class PeepholeLSTM(Variant):
    """An LSTM whose gates see the cell: `torch.nn.LSTM`'s arguments and parameters, and `weight_ch_l[k]` of 3H peepholes.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as in torch.nn.LSTM.
        zoneout, recurrent_dropout, variational_dropout: see `bptoolkit.functional.peephole_lstm`, as for `lengths`.
    """

    function = staticmethod(peephole_lstm)
    more = PEEPHOLES


class LayerNormLSTM(Variant):
    """A layer-normalised LSTM: `torch.nn.LSTM`'s arguments and parameters, and gains for the norms.

    The gains are `gain_ih_l[k]`, `gain_hh_l[k]` (4H) and `gain_c_l[k]` (H), and begin at 1; `bias_c_l[k]` (H) begins at 0.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as in torch.nn.LSTM.
        zoneout, recurrent_dropout, variational_dropout: see `bptoolkit.functional.peephole_lstm`, as for `lengths`.
        eps: added to the variances.
    """

    function = staticmethod(layer_norm_lstm)
    more = NORMS

    def __init__(self, *args: Any, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eps = eps

    def options(self) -> dict[str, Any]:
        """The module's attributes as the options of its function."""
        return super().options() | {"eps": self.eps}

    def reset_parameters(self) -> None:
        """As torch.nn.LSTM; the gains are 1 and the shifts of the cell 0."""
        super().reset_parameters()
        for name, p in self.named_parameters():
            if name.startswith("gain_"):
                nn.init.ones_(p)
            elif name.startswith("bias_c"):
                nn.init.zeros_(p)


class ZoneoutLSTM(Variant):
    """An LSTM with zoneout or dropout inside the recurrence: `torch.nn.LSTM`'s arguments and parameters.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as in torch.nn.LSTM.
        zoneout, recurrent_dropout, variational_dropout: see `bptoolkit.functional.peephole_lstm`, as for `lengths`.
    """

    function = staticmethod(zoneout_lstm)


# --- references, cases and the table ----------------------------------------------------------------------------------------


def reference_of(op: str) -> Callable[..., Any]:
    """The papers' formulas in plain torch, with the masks that the same state of torch's generator gives."""

    def reference(input, hx, weights, *, zoneout=0.0, recurrent_dropout=0.0, variational_dropout=0.0, **kwargs):
        input, *rest = BY_NAME[op].cast(input, *(hx or ()), *weights)
        hx, weights = rest[: -len(weights)] or None, rest[-len(weights) :]
        rates = rates_of(op, zoneout, recurrent_dropout, variational_dropout)
        more = tuple(further(op, kwargs.get("bias", True)))
        return recurrent_variants_reference.plain(more, rates, input, hx, weights, **kwargs)

    return reference


def case_of(op: str) -> Callable[[Draw], Case]:
    def case(draw: Draw) -> Case:
        (x, hx, plain), kwargs = recurrent_reference.case(draw, 4, 2, small=True)
        H, n = plain[1].shape[1], 4 if kwargs["bias"] else 2
        weights: list[Tensor] = []
        for k in range(0, len(plain), n):
            weights += [*plain[k : k + n], *(draw.tensor(m * H) for m in further(op, kwargs["bias"]).values())]
        kwargs |= {"training": draw.random.random() < 0.7, "zoneout": draw.choice((0.0, 0.3, (0.2, 0.6)))}
        kwargs |= {"recurrent_dropout": draw.choice((0.0, 0.4)), "variational_dropout": draw.choice((0.0, 0.3, (0.0, 0.5)))}
        return Case((x, hx, weights), kwargs)

    return case


def bench_of(op: str) -> Callable[[Draw], Case]:
    def bench(draw: Draw) -> Case:
        x, hx, weights = recurrent_reference.wide(draw, 4, 64, 32, 256)
        more = [draw.tensor(m * 256, scale=1 / 16) for m in further(op, True).values()]
        return Case((x, hx, [*weights, *more]), {"zoneout": 0.1, "recurrent_dropout": 0.1})

    return bench


def _op(call: Callable[..., Any], source: str) -> Op:
    name = call.__name__
    return Op(
        name=name,
        call=call,
        reference=reference_of(name),
        rules=(RULE,),
        shapes="input: T B I -> T B H",
        source=source,
        autocast=LOW,
        random=True,
        case=case_of(name),
        bench=bench_of(name),
    )


PEEPHOLE = _op(peephole_lstm, "Gers & Schmidhuber 2000; Graves 2013, eqs. 7-11")
LAYER_NORM = _op(layer_norm_lstm, "Ba et al. 2016, eqs. 20-22")
ZONEOUT = _op(zoneout_lstm, "Krueger et al. 2017; Semeniuta et al. 2016; Gal & Ghahramani 2016")
OPS = (PEEPHOLE, LAYER_NORM, ZONEOUT)
BY_NAME = {op.name: op for op in OPS}
