"""The GRU over a whole sequence, both directions of time, forward and backward. For the maths see the op of this name, for the
kernels `gru_loops`, for the choice between them `recurrent`.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from bptoolkit.grad_norms import deliver, key_of
from bptoolkit.ops import gru as op
from bptoolkit.ops.gru_loops import products, squares
from bptoolkit.ops.recurrent import before, order, within
from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.gru_loops import resident_back_kernel, resident_kernel, step_back_kernel, step_kernel
from bptoolkit.triton_kernels.gru_slices import slices_back_kernel, slices_kernel
from bptoolkit.triton_kernels.kernel import Kernel, computed_in_float32, dense
from bptoolkit.triton_kernels.linear_recurrence import recurrence
from bptoolkit.triton_kernels.operator import operator
from bptoolkit.triton_kernels.recurrent import at_start, fixed, path, rows_of, shipped, steps_of, stepwise
from bptoolkit.triton_kernels.recurrent_slices import launch_slices, states

# --- launches -------------------------------------------------------------------------------------------------------------


def _launch_forward(
    pre: Tensor, h0: Tensor, wh: Tensor, bh: Tensor | None, lengths: Tensor | None, reverse: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    out = _fake_forward(pre, h0, wh, bh, lengths, reverse, keep)
    if not out[0].numel():
        return out
    (T, B, H), (pre, h0, wh, bh, lengths) = out[0].shape, map(dense, (pre, h0, wh, bh, lengths))  # type: ignore[assignment]
    y, G = out[0], out[1] if keep else None
    way = path(H, 3, pre.dtype, pre.device)
    if way == "resident":
        grid, launch = fixed(y, H, 3, reverse)
        resident_kernel[grid](pre, h0, wh, bh, lengths, y, G, T, B, **launch)
        return out
    if way != "steps":
        args = pre, wh, bh, lengths, states(h0), y, G, T, B
        launch_slices(slices_kernel, way == "persistent", 3, y, H, args, REVERSE=reverse)
        return out
    state = torch.empty(B, H, dtype=y.dtype, device=y.device) if reverse and lengths is not None else None
    u, h, w = torch.empty(B, 3 * H, dtype=y.dtype, device=y.device), h0, wh.mT
    (grid, launch), ys = stepwise(y, H), y.unbind(0)
    for t in order(T, reverse):
        torch.mm(h, w, out=u)
        step_kernel[grid](u, pre, h0, bh, lengths, y, G, state, t, T, B, H, reverse, **launch)
        h = ys[t] if state is None else state
    return out


def _fake_forward(pre, h0, wh, bh, lengths, reverse, keep):
    (T, B, _), H = pre.shape, h0.shape[-1]
    shapes = ((T, B, H), (T if keep else 0, B, 4 * H))
    return tuple(torch.empty(shape, dtype=pre.dtype, device=pre.device) for shape in shapes)


def _launch_backward(
    dy: Tensor,
    G: Tensor,
    U: Tensor | None,
    y: Tensor,
    h0: Tensor,
    wh: Tensor,
    lengths: Tensor | None,
    reverse: bool,
    record: int,
) -> tuple[Tensor, Tensor]:
    """da and dh0. With U, what the gates are made from is in G and U; see `gru_loops`. record: who is given the norms."""
    out = _backward(dy, G, U, y, h0, wh, lengths, reverse)
    if record:
        G = G if U is None else (G[..., : U.shape[-1]] + U).sigmoid()  # z is its second block, and r is not used
        dy, G = within(dy, lengths), within(G, lengths)
        found = squares(out[0], dy, None, G, y, h0, wh, lengths, None, reverse, False, recurrence)
        deliver(record, found)
    return out


def _backward(dy, G, U, y, h0, wh, lengths, reverse):
    da, dh0 = out = _fake_backward(dy, G, U, y, h0, wh, lengths, reverse)
    if not da.numel():
        return da, dh0.zero_()
    (T, B, H), (G, U, y, h0, wh, lengths) = y.shape, map(dense, (G, U, y, h0, wh, lengths))
    dy = rows_of(dy)
    steps = steps_of(dy)
    way = path(H, 3, y.dtype, y.device)
    if way == "resident":
        grid, launch = fixed(y, H, 3, reverse)
        resident_back_kernel[grid](dy, G, U, y, h0, wh, lengths, da, dh0, T, B, *steps, **launch)
        return out
    sent = torch.empty(B, H, dtype=y.dtype, device=y.device).zero_()
    carried = torch.empty(B, H, dtype=torch.float32, device=y.device).zero_()
    rzq = da[..., H:]  # T B 3H
    if way != "steps":
        args = dy, G, U, y, h0, wh, lengths, da, carried, T, B, *steps
        launch_slices(slices_back_kernel, way == "persistent", 3, y, H, args, REVERSE=reverse)
        torch.mm(at_start(rzq, lengths, reverse), wh, out=sent)
        return da, dh0.copy_(carried.add_(sent))
    grid, launch = stepwise(y, H)
    for t in order(T, reverse)[::-1]:
        step_back_kernel[grid](sent, dy, G, U, y, h0, lengths, da, carried, t, T, B, H, *steps, reverse, **launch)
        torch.mm(rzq[t], wh, out=sent)
    if reverse and lengths is not None:
        torch.mm(at_start(rzq, lengths, reverse), wh, out=sent)
    return da, dh0.copy_(carried.add_(sent))


def _fake_backward(dy, G, U, y, h0, wh, lengths, reverse, record=0):
    shapes = ((*y.shape[:-1], 4 * y.shape[-1]), h0.shape)
    return tuple(torch.empty(shape, dtype=y.dtype, device=y.device) for shape in shapes)


def _flops(rows, wh):
    return 2 * prod(rows) * prod(wh)


FORWARD = operator(
    "triton_gru",
    _launch_forward,
    _fake_forward,
    flops=lambda pre, h0, wh, *_, out_shape=None: _flops(pre[:2], wh),
)
BACKWARD = operator(
    "triton_gru_backward",
    _launch_backward,
    _fake_backward,
    flops=lambda dy, G, U, y, h0, wh, *_, out_shape=None: _flops(y[:2], wh),
)

# --- the rules ------------------------------------------------------------------------------------------------------------


def forward_gates(x, h0, wi, wh, b, bh, lengths, reverse, record):
    return FORWARD(F.linear(x, wi, b), h0, wh, bh, lengths, reverse, True)


def forward_outputs(x, h0, wi, wh, b, bh, lengths, reverse, record):
    return FORWARD(F.linear(x, wi, b), h0, wh, bh, lengths, reverse, False)[0]


def backward_gates(dy, dG, x, h0, wi, wh, lengths, reverse, record, y, G, need):
    if dG is not None or dy is None:  # second order only
        return op.GATES.backward(dy, dG, x, h0, wi, wh, lengths, reverse, record, y, G, need)
    hp = before(h0, y, lengths, reverse) if need.wh else None
    return _gradients(dy, x, h0, hp, wi, wh, lengths, reverse, record, y, G, None, need)


def backward_outputs(dy, x, h0, wi, wh, b, bh, lengths, reverse, record, y, need):
    hp = before(h0, y, lengths, reverse)
    A, U = F.linear(x, wi, b), F.linear(hp, wh, bh)  # T B 3H
    return _gradients(dy, x, h0, hp, wi, wh, lengths, reverse, record, y, A, U, need)


def _gradients(dy, x, h0, hp, wi, wh, lengths, reverse, record, y, G, U, need):
    da, dh0 = BACKWARD(dy, G, U, y, h0, wh, lengths, reverse, key_of(record))  # T B 4H, B H
    dx, dwi, dwh, db, dbh = products(need, da, within(x, lengths) if need.wi else x, hp, wi)
    return dx, dh0 if need.h0 else None, dwi, dwh, db, dbh, None


def unsupported(x, h0, wi, wh, b, bh, lengths, reverse, record) -> str | None:
    """Why the kernels cannot take the call, or None."""
    return computed_in_float32(x)


GATES = Kernel(forward_gates, backward_gates, unsupported)
OUTPUTS = Kernel(forward_outputs, backward_outputs, unsupported)


def specs(warp: int) -> list[Spec]:
    """The kernels at the shipped configurations: units that fill a tile and that do not; gates kept and made again; ragged."""
    return [
        *shipped("gru", 3, "steps", step_kernel, warp, False),
        *shipped("gru", 3, "steps", step_back_kernel, warp, True),
        *shipped("gru", 3, "resident", resident_kernel, warp, False),
        *shipped("gru", 3, "resident", resident_back_kernel, warp, True),
        *shipped("gru", 3, "persistent", slices_kernel, warp, False),
        *shipped("gru", 3, "persistent", slices_back_kernel, warp, True),
    ]
