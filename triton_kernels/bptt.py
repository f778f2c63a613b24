"""The other ways of saving and truncating of lstm, gru and rnn, with the kernels in place of the loops.

What `bptoolkit.ops.bptt_run` does with a cell's loops, piece by piece or window by window, is the same here: a cell with the
kernels' loops is handed to it. Windows of a truncation are side by side, a larger batch; a segment is a launch of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from bptoolkit.ops import gru_loops, lstm_loops
from bptoolkit.ops import rnn as rnn_op
from bptoolkit.ops.bptt_pieces import Core
from bptoolkit.ops.bptt_run import both
from bptoolkit.triton_kernels import gru, lstm, rnn
from bptoolkit.triton_kernels.kernel import Kernel, computed_in_float32


class Kernels(NamedTuple):
    """The fused rules of a cell: its outputs are kept, or they are not."""

    kept_y: Kernel
    planned: Kernel


def unsupported(x, h0, c0, wi, wh, b, bh, wr, lengths, s, reverse, saved, k1, k2, p, cut, record) -> str | None:
    """Why the kernels cannot take the call, or None."""
    if wr is not None:
        return "the fused kernels have no projection"
    if s is not None or cut:
        return "the fused kernels go back through every step: no e-prop, no ARTBP"
    return computed_in_float32(x)


def fused(core: Core, forward: Any, back: Any) -> Kernels:
    """The rules of a cell whose loops are these."""

    def backward(fast, dy, dc, G, y, c, h0, c0, wh, wr, lengths, xi, reverse, cut):
        return back(dy, dc, G, y, c, h0, c0, wh, lengths, reverse)

    made = both(core._replace(name=f"{core.name}_fused", fast=forward, node=forward, back=backward))
    return Kernels(*(Kernel(*pair, unsupported) for pair in made))


def _lstm(pre, h0, c0, wh, bh, wr, lengths, reverse, keep):
    return lstm.FORWARD(pre, h0, c0, wh, lengths, reverse, keep)


def _lstm_back(dy, dc, G, y, c, h0, c0, wh, lengths, reverse):
    return lstm.BACKWARD(dy, dc, G, c, c0, wh, lengths, reverse, False, 0)


def _gru(pre, h0, c0, wh, bh, wr, lengths, reverse, keep):
    y, G = gru.FORWARD(pre, h0, wh, bh, lengths, reverse, keep)
    return y, None, G


def _gru_back(dy, dc, G, y, c, h0, c0, wh, lengths, reverse):
    return *gru.BACKWARD(dy, G, None, y, h0, wh, lengths, reverse, 0), None


def _rnn(tanh: bool) -> tuple[Any, Any]:
    def forward(pre, h0, c0, wh, bh, wr, lengths, reverse, keep):
        return rnn.FORWARD(pre, h0, wh, lengths, reverse, tanh), None, None

    def back(dy, dc, G, y, c, h0, c0, wh, lengths, reverse):
        return *rnn.BACKWARD(dy, y, h0, wh, lengths, reverse, tanh, 0), None

    return forward, back


_CELLS = (
    (lstm_loops.MADE.core, _lstm, _lstm_back),
    (gru_loops.MADE.core, _gru, _gru_back),
    *((rnn_op.MADE[name].core, *_rnn(name == "tanh")) for name in ("tanh", "relu")),
)
KERNELS = {core.name: fused(core, forward, back) for core, forward, back in _CELLS}
