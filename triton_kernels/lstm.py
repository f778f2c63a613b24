"""The LSTM over a whole sequence, both directions of time, forward and backward. For the maths see the op of this name, for the
kernels `lstm_loops`, for the choice between them `recurrent`.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from bptoolkit.grad_norms import deliver, key_of
from bptoolkit.ops import lstm as op
from bptoolkit.ops.lstm_loops import products, squares
from bptoolkit.ops.recurrent import before, order, within
from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.kernel import Kernel, computed_in_float32, dense
from bptoolkit.triton_kernels.linear_recurrence import recurrence
from bptoolkit.triton_kernels.lstm_loops import resident_back_kernel, resident_kernel, step_back_kernel, step_kernel
from bptoolkit.triton_kernels.lstm_slices import slices_back_kernel, slices_kernel
from bptoolkit.triton_kernels.operator import operator
from bptoolkit.triton_kernels.recurrent import at_start, fixed, path, rows_of, shipped, steps_of, stepwise
from bptoolkit.triton_kernels.recurrent_slices import launch_slices, states

# --- launches -------------------------------------------------------------------------------------------------------------


def _launch_forward(
    pre: Tensor, h0: Tensor, c0: Tensor, wh: Tensor, lengths: Tensor | None, reverse: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    out = _fake_forward(pre, h0, c0, wh, lengths, reverse, keep)
    if not out[0].numel():
        return out
    (T, B, H), (pre, h0, c0, wh, lengths) = out[0].shape, map(dense, (pre, h0, c0, wh, lengths))  # type: ignore[assignment]
    y, c, G = *out[:2], out[2] if keep else None
    way = path(H, 4, pre.dtype, pre.device)
    if way == "resident":
        grid, launch = fixed(y, H, 4, reverse)
        resident_kernel[grid](pre, h0, c0, wh, lengths, y, c, G, T, B, **launch)
        return out
    if way != "steps":
        args = pre, c0, wh, lengths, states(h0), y, c, G, T, B
        launch_slices(slices_kernel, way == "persistent", 4, y, H, args, REVERSE=reverse)
        return out
    state = torch.empty(B, H, dtype=y.dtype, device=y.device) if reverse and lengths is not None else None
    u, h, w = torch.empty(B, 4 * H, dtype=y.dtype, device=y.device), h0, wh.mT
    (grid, launch), ys = stepwise(y, H), y.unbind(0)
    for t in order(T, reverse):
        torch.mm(h, w, out=u)
        step_kernel[grid](u, pre, h0, c0, lengths, y, c, G, state, t, T, B, H, reverse, **launch)
        h = ys[t] if state is None else state
    return out


def _fake_forward(pre, h0, c0, wh, lengths, reverse, keep):
    T, B, _ = pre.shape
    shapes = ((T, B, h0.shape[-1]), (T, B, c0.shape[-1]), (T if keep else 0, B, pre.shape[-1]))
    return tuple(torch.empty(shape, dtype=pre.dtype, device=pre.device) for shape in shapes)


def _launch_backward(
    dy: Tensor | None,
    dc: Tensor | None,
    G: Tensor,
    c: Tensor,
    c0: Tensor,
    wh: Tensor,
    lengths: Tensor | None,
    reverse: bool,
    raw: bool,
    record: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """da, dh0 and dc0. raw: G is before the gates' functions. record: who is given the norms of what steps send back."""
    out = _backward(dy, dc, G, c, c0, wh, lengths, reverse, raw)
    if record:
        dy, dc, G = (within(t, lengths) for t in (dy, dc, G))
        G = G.sigmoid() if raw else G  # i and g are not used
        found = squares(out[0], dy, dc, None, G, c, c0, wh, None, lengths, None, reverse, False, recurrence)
        deliver(record, found)
    return out


def _backward(dy, dc, G, c, c0, wh, lengths, reverse, raw):
    da, dh0, dc0 = out = _fake_backward(dy, dc, G, c, c0, wh, lengths, reverse, raw)
    if not da.numel():
        return da, dh0.zero_(), dc0.zero_()
    (T, B, H), (G, c, c0, wh, lengths) = c.shape, map(dense, (G, c, c0, wh, lengths))
    dy, dc = rows_of(dy), rows_of(dc)
    steps = (*steps_of(dy), *steps_of(dc))
    way = path(H, 4, c.dtype, c.device)
    if way == "resident":
        grid, launch = fixed(c, H, 4, reverse)
        resident_back_kernel[grid](dy, dc, G, c, c0, wh, lengths, *out, T, B, *steps, RAW=raw, **launch)
        return out
    sent = torch.empty(B, H, dtype=c.dtype, device=c.device).zero_()
    carried = torch.empty(B, H, dtype=torch.float32, device=c.device).zero_()
    if way != "steps":
        args = dy, dc, G, c, c0, wh, lengths, da, carried, T, B, *steps
        launch_slices(slices_back_kernel, way == "persistent", 4, c, H, args, REVERSE=reverse, RAW=raw)
        torch.mm(at_start(da, lengths, reverse), wh, out=sent)
        return da, dh0.copy_(sent), dc0.copy_(carried)
    (grid, launch), das = stepwise(c, H), da.unbind(0)
    for t in order(T, reverse)[::-1]:
        step_back_kernel[grid](sent, dy, dc, G, c, c0, lengths, da, carried, t, T, B, H, *steps, reverse, raw, **launch)
        torch.mm(das[t], wh, out=sent)
    if reverse and lengths is not None:
        torch.mm(at_start(da, lengths, reverse), wh, out=sent)
    return da, dh0.copy_(sent), dc0.copy_(carried)


def _fake_backward(dy, dc, G, c, c0, wh, lengths, reverse, raw, record=0):
    return tuple(torch.empty(shape, dtype=c.dtype, device=c.device) for shape in (G.shape, c0.shape, c0.shape))


def _flops(rows, wh):
    return 2 * prod(rows) * prod(wh)


FORWARD = operator(
    "triton_lstm",
    _launch_forward,
    _fake_forward,
    flops=lambda pre, h0, c0, wh, *_, out_shape=None: _flops(pre[:2], wh),
)
BACKWARD = operator(
    "triton_lstm_backward",
    _launch_backward,
    _fake_backward,
    flops=lambda dy, dc, G, c, c0, wh, *_, out_shape=None: _flops(c[:2], wh),
)

# --- the rules ------------------------------------------------------------------------------------------------------------


def forward_gates(x, h0, c0, wi, wh, b, wr, lengths, reverse, record):
    return FORWARD(F.linear(x, wi, b), h0, c0, wh, lengths, reverse, True)


def forward_outputs(x, h0, c0, wi, wh, b, wr, lengths, reverse, record):
    return FORWARD(F.linear(x, wi, b), h0, c0, wh, lengths, reverse, False)[:2]


def backward_gates(dy, dc, dG, x, h0, c0, wi, wh, wr, lengths, reverse, record, y, c, G, need):
    if dG is not None:  # second order only
        return op.GATES.backward(dy, dc, dG, x, h0, c0, wi, wh, wr, lengths, reverse, record, y, c, G, need)
    hp = before(h0, y, lengths, reverse) if need.wh else None
    return _gradients(dy, dc, x, hp, c0, wi, wh, lengths, reverse, record, c, G, False, need)


def backward_outputs(dy, dc, x, h0, c0, wi, wh, b, wr, lengths, reverse, record, y, c, need):
    hp = before(h0, y, lengths, reverse)
    G = F.linear(x, wi, b).contiguous()  # T B 4H
    G.view(-1, G.shape[-1]).addmm_(hp.reshape(-1, hp.shape[-1]), wh.mT)
    return _gradients(dy, dc, x, hp, c0, wi, wh, lengths, reverse, record, c, G, True, need)


def _gradients(dy, dc, x, hp, c0, wi, wh, lengths, reverse, record, c, G, raw, need):
    da, dh0, dc0 = BACKWARD(dy, dc, G, c, c0, wh, lengths, reverse, raw, key_of(record))  # T B 4H, B H, B H
    x = within(x, lengths) if need.wi else x
    dx, dwi, dwh, db, _, _ = products(need, dy, da, x, hp, c, G, wi, wh, None, None, reverse, False)
    return dx, dh0 if need.h0 else None, dc0 if need.c0 else None, dwi, dwh, db, None, None


def unsupported(x, h0, c0, wi, wh, b, wr, lengths, reverse, record) -> str | None:
    """Why the kernels cannot take the call, or None."""
    return computed_in_float32(x) if wr is None else "the fused kernels have no projection"


GATES = Kernel(forward_gates, backward_gates, unsupported)
OUTPUTS = Kernel(forward_outputs, backward_outputs, unsupported)


def specs(warp: int) -> list[Spec]:
    """The kernels at the shipped configurations: units that fill a tile and that do not; gates kept and made again; ragged."""
    return [
        *shipped("lstm", 4, "steps", step_kernel, warp, False),
        *shipped("lstm", 4, "steps", step_back_kernel, warp, True),
        *shipped("lstm", 4, "resident", resident_kernel, warp, False),
        *shipped("lstm", 4, "resident", resident_back_kernel, warp, True),
        *shipped("lstm", 4, "persistent", slices_kernel, warp, False),
        *shipped("lstm", 4, "persistent", slices_back_kernel, warp, True),
    ]
