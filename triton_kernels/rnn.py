"""The simple recurrence over a whole sequence, both directions of time, forward and backward. For the maths see the op of this
name, for the kernels `rnn_loops`, for the choice between them `recurrent`.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from bptoolkit.grad_norms import deliver, key_of
from bptoolkit.ops.recurrent import before, order, within
from bptoolkit.ops.rnn import products, squares
from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.kernel import Kernel, computed_in_float32, dense
from bptoolkit.triton_kernels.operator import operator
from bptoolkit.triton_kernels.recurrent import at_start, fixed, path, rows_of, shipped, steps_of, stepwise
from bptoolkit.triton_kernels.recurrent_slices import launch_slices, states
from bptoolkit.triton_kernels.rnn_loops import resident_back_kernel, resident_kernel, step_back_kernel, step_kernel
from bptoolkit.triton_kernels.rnn_slices import slices_back_kernel, slices_kernel

# --- launches -------------------------------------------------------------------------------------------------------------


def _launch_forward(pre: Tensor, h0: Tensor, wh: Tensor, lengths: Tensor | None, reverse: bool, tanh: bool) -> Tensor:
    y = _fake_forward(pre, h0, wh, lengths, reverse, tanh)
    if not y.numel():
        return y
    (T, B, H), (pre, h0, wh, lengths) = y.shape, map(dense, (pre, h0, wh, lengths))  # type: ignore[assignment]
    way = path(H, 1, pre.dtype, pre.device)
    if way == "resident":
        grid, launch = fixed(y, H, 1, reverse)
        resident_kernel[grid](pre, h0, wh, lengths, y, T, B, TANH=tanh, **launch)
        return y
    if way != "steps":
        args = pre, wh, lengths, states(h0), y, T, B
        launch_slices(slices_kernel, way == "persistent", 1, y, H, args, REVERSE=reverse, TANH=tanh)
        return y
    state = torch.empty(B, H, dtype=y.dtype, device=y.device) if reverse and lengths is not None else None
    u, h, w = torch.empty(B, H, dtype=y.dtype, device=y.device), h0, wh.mT
    (grid, launch), ys = stepwise(y, H), y.unbind(0)
    for t in order(T, reverse):
        torch.mm(h, w, out=u)
        step_kernel[grid](u, pre, h0, lengths, y, state, t, T, B, H, tanh, **launch)
        h = ys[t] if state is None else state
    return y


def _fake_forward(pre, h0, wh, lengths, reverse, tanh):
    return torch.empty(pre.shape, dtype=pre.dtype, device=pre.device)


def _launch_backward(
    dy: Tensor, y: Tensor, h0: Tensor, wh: Tensor, lengths: Tensor | None, reverse: bool, tanh: bool, record: int
) -> tuple[Tensor, Tensor]:
    """da and dh0. record: who is given the norms of what steps send back."""
    out = _backward(dy, y, h0, wh, lengths, reverse, tanh)
    if record:
        deliver(record, squares(out[0], wh, lengths, None, False))
    return out


def _backward(dy, y, h0, wh, lengths, reverse, tanh):
    da, dh0 = out = _fake_backward(dy, y, h0, wh, lengths, reverse, tanh)
    if not da.numel():
        return da, dh0.zero_()
    (T, B, H), (y, wh, lengths) = y.shape, map(dense, (y, wh, lengths))
    dy = rows_of(dy)
    steps = steps_of(dy)
    way = path(H, 1, y.dtype, y.device)
    if way == "resident":
        grid, launch = fixed(y, H, 1, reverse)
        resident_back_kernel[grid](dy, y, wh, lengths, da, dh0, T, B, *steps, TANH=tanh, **launch)
        return out
    if way != "steps":
        args = dy, y, wh, lengths, da, T, B, *steps
        launch_slices(slices_back_kernel, way == "persistent", 1, y, H, args, REVERSE=reverse, TANH=tanh)
        torch.mm(at_start(da, lengths, reverse), wh, out=dh0)
        return out
    dh0.zero_()  # sent is gathered in it
    (grid, launch), das = stepwise(y, H), da.unbind(0)
    for t in order(T, reverse)[::-1]:
        step_back_kernel[grid](dh0, dy, y, lengths, da, t, T, B, H, *steps, tanh, **launch)
        torch.mm(das[t], wh, out=dh0)
    if reverse and lengths is not None:
        torch.mm(at_start(da, lengths, reverse), wh, out=dh0)
    return out


def _fake_backward(dy, y, h0, wh, lengths, reverse, tanh, record=0):
    return tuple(torch.empty(shape, dtype=y.dtype, device=y.device) for shape in (y.shape, h0.shape))


def _flops(rows, wh):
    return 2 * prod(rows) * prod(wh)


FORWARD = operator(
    "triton_rnn",
    _launch_forward,
    _fake_forward,
    flops=lambda pre, h0, wh, *_, out_shape=None: _flops(pre[:2], wh),
)
BACKWARD = operator(
    "triton_rnn_backward",
    _launch_backward,
    _fake_backward,
    flops=lambda dy, y, h0, wh, *_, out_shape=None: _flops(y[:2], wh),
)

# --- the rule -------------------------------------------------------------------------------------------------------------


def forward(x, h0, wi, wh, b, lengths, reverse, nonlinearity, record):
    return FORWARD(F.linear(x, wi, b), h0, wh, lengths, reverse, nonlinearity == "tanh")


def backward(dy, x, h0, wi, wh, lengths, reverse, nonlinearity, record, y, need):
    da, dh0 = BACKWARD(dy, y, h0, wh, lengths, reverse, nonlinearity == "tanh", key_of(record))  # T B H, B H
    x, hp = within(x, lengths) if need.wi else x, before(h0, y, lengths, reverse) if need.wh else None
    dx, dwi, dwh, db = products(need, da, x, hp, wi)
    return dx, dh0 if need.h0 else None, dwi, dwh, db, None


def unsupported(x, h0, wi, wh, b, lengths, reverse, nonlinearity, record) -> str | None:
    """Why the kernels cannot take the call, or None."""
    return computed_in_float32(x)


KERNEL = Kernel(forward, backward, unsupported)


def specs(warp: int) -> list[Spec]:
    """The kernels at the shipped configurations: tanh, units that fill a tile; relu, units that do not, ragged."""
    return [
        *shipped("rnn", 1, "steps", step_kernel, warp, False),
        *shipped("rnn", 1, "steps", step_back_kernel, warp, True),
        *shipped("rnn", 1, "resident", resident_kernel, warp, False),
        *shipped("rnn", 1, "resident", resident_back_kernel, warp, True),
        *shipped("rnn", 1, "persistent", slices_kernel, warp, False),
        *shipped("rnn", 1, "persistent", slices_back_kernel, warp, True),
    ]
