"""The scans of minGRU and minLSTM, their gates made in registers. For the maths see the op of this name.

A program walks as one of `linear_recurrence` does: it has a tile of rows of the batch and of the H elements of a step, T B H,
and h, or in backward c, in float32 registers. Of pre it reads the two or three blocks of its elements, T B G·H. The products
with the weights are the vendor's.

forward     a = σ(−u)    z = σ(u)    hₜ = a hₜ₋₁ + z g(m)
backward    the other way, with c = aₜ₊₁ gₜ₊₁ in registers:    gₜ = dhₜ + c    dpre from gₜ, hₜ₋₁ and pre    c ← aₜ gₜ
in chunks   where a step has few elements and T is long: a and b = z g(m) are written once in float32, from which
            `linear_recurrence.carried` finds what each chunk starts from; the chunks are then walked at once
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from bptoolkit.ops import min_rnn as op
from bptoolkit.ops.recurrent import over_time, within
from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.elementwise import place, tiles
from bptoolkit.triton_kernels.elementwise import tile as tile_of_all
from bptoolkit.triton_kernels.functions import sigmoid_slope, tanh
from bptoolkit.triton_kernels.kernel import WARP, Kernel, computed_in_float32, dense
from bptoolkit.triton_kernels.linear_recurrence import (
    NARROW,
    WIDE,
    Plan,
    across,
    between,
    carried,
    plan,
    position,
    row_ends,
    tile,
    tiles_of,
)
from bptoolkit.triton_kernels.operator import operator

# --- what the kernels share -----------------------------------------------------------------------------------------------


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1 + tl.exp(-tl.abs(x)))


@triton.jit
def logit(x0, x1, KIND: tl.constexpr):
    """U of the gate z = σ(u), from the first block of pre, or for min_lstm from the first two."""
    return softplus(-x0) - softplus(-x1) if KIND == "min_lstm" else x0


@triton.jit
def candidate(m, ACTIVATION: tl.constexpr):
    if ACTIVATION == "g":
        m = tl.where(m >= 0, m + 0.5, tl.sigmoid(m))
    elif ACTIVATION == "tanh":
        m = tanh(m)
    return m


@triton.jit
def candidate_chain(dc, m, ACTIVATION: tl.constexpr):
    """dm from dc, c = g(m)."""
    if ACTIVATION == "g":
        dc *= tl.where(m >= 0, 1.0, sigmoid_slope(m))
    elif ACTIVATION == "tanh":
        c = tanh(m)
        dc *= 1 - c * c
    return dc


@triton.jit
def blocks_of(pre, i, T, pt, N, mask, ends, KIND: tl.constexpr, DOWN: tl.constexpr, U: tl.constexpr):
    """The blocks of pre of U steps from the i-th on; of min_gru the first one twice."""
    x0 = tiles_of(pre, i, T, pt, mask, ends, 0.0, 0, DOWN, U)
    x1 = x0
    if KIND == "min_lstm":
        x1 = tiles_of(pre + N, i, T, pt, mask, ends, 0.0, 0, DOWN, U)
        m = tiles_of(pre + 2 * N, i, T, pt, mask, ends, 0.0, 0, DOWN, U)
    else:
        m = tiles_of(pre + N, i, T, pt, mask, ends, 0.0, 0, DOWN, U)
    return x0, x1, m


# --- the kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T", "M", "C"])
def forward_kernel(
    pre, lengths, starts, y, pt, pm, T, M, N, C,
    KIND: tl.constexpr, ACTIVATION: tl.constexpr, DOWN: tl.constexpr, U: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    m, n, mask = place(M, N, BM, BN)
    k, ends = tl.program_id(1).to(tl.int64), row_ends(lengths, m, M, T)
    pre += m[:, None] * pm + n[None, :]  # BM BN
    here = m[:, None] * N + n[None, :]
    h = tl.load(starts + k * M * N + here, mask, other=0.0).to(tl.float32)
    for i in range(k * C, min(k * C + C, T), U):
        x0s, x1s, ms = blocks_of(pre, i, T, pt, N, mask, ends, KIND, DOWN, U)
        for s in tl.static_range(U):
            t = position(i + s, T, DOWN)
            u, there = logit(x0s[s], x1s[s], KIND), between(t, 0, ends)
            h = tl.where(there, tl.sigmoid(-u) * h + tl.sigmoid(u) * candidate(ms[s], ACTIVATION), h)
            tl.store(y + t * M * N + here, tl.where(there, h, 0.0).to(y.dtype.element_ty), mask & between(t, 0, ends * 0 + T))


@triton.jit(do_not_specialize=["T", "M", "C"])
def backward_kernel(
    dh, pre, h, h0, lengths, starts, dpre, dh0, dt, dm, dn, pt, pm, ht, hm, T, M, N, C,
    KIND: tl.constexpr, ACTIVATION: tl.constexpr, DOWN: tl.constexpr, U: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    m, n, mask = place(M, N, BM, BN)
    k, ends = tl.program_id(1).to(tl.int64), row_ends(lengths, m, M, T)
    dh += m[:, None] * dm + n[None, :] * dn  # BM BN
    pre += m[:, None] * pm + n[None, :]
    here = m[:, None] * N + n[None, :]
    G: tl.constexpr = 3 if KIND == "min_lstm" else 2
    BEFORE: tl.constexpr = -1 if DOWN else 1  # where the step is that came before in forward
    c = tl.zeros((BM, BN), tl.float32)
    if starts is not None:
        c = tl.load(starts + k * M * N + here, mask, other=0.0)
    if dpre is not None:
        h += m[:, None] * hm + n[None, :]
        first = tl.load(h0 + here, mask, other=0.0).to(tl.float32)
        dpre += m[:, None] * G * N + n[None, :]
    for i in range(k * C, min(k * C + C, T), U):
        Ds = tiles_of(dh, i, T, dt, mask, ends, 0.0, 0, DOWN, U)
        x0s, x1s, ms = blocks_of(pre, i, T, pt, N, mask, ends, KIND, DOWN, U)
        if dpre is not None:
            Hs = tiles_of(h, i, T, ht, mask, ends, 0.0, BEFORE, DOWN, U)
        for s in tl.static_range(U):
            t = position(i + s, T, DOWN)
            u, there = logit(x0s[s], x1s[s], KIND), between(t, 0, ends)
            a, z, g = tl.sigmoid(-u), tl.sigmoid(u), Ds[s] + c
            c = tl.where(there, a * g, c)
            if dpre is not None:
                gz, stored = g * z, mask & between(t, 0, ends * 0 + T)
                before = tl.where(between(t + BEFORE, 0, ends), Hs[s], first)
                du = tl.where(there, (gz * candidate(ms[s], ACTIVATION) - gz * before) * a, 0.0)
                dx = tl.where(there, candidate_chain(gz, ms[s], ACTIVATION), 0.0)
                to = dpre + t * M * G * N
                if KIND == "min_lstm":
                    tl.store(to, (-du * tl.sigmoid(-x0s[s])).to(dpre.dtype.element_ty), stored)
                    tl.store(to + N, (du * tl.sigmoid(-x1s[s])).to(dpre.dtype.element_ty), stored)
                else:
                    tl.store(to, du.to(dpre.dtype.element_ty), stored)
                tl.store(to + (G - 1) * N, dx.to(dpre.dtype.element_ty), stored)
    if dh0 is not None:  # noqa: SIM102 (known when it compiles, the other is not)
        if k == tl.num_programs(1) - 1:
            tl.store(dh0 + here, c.to(dh0.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["M"])
def coefficients_kernel(
    pre, a, b, M, N, KIND: tl.constexpr, ACTIVATION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """A and b of M steps of rows, T B H; pre is dense."""
    m, n, mask = place(M, N, BM, BN)
    G: tl.constexpr = 3 if KIND == "min_lstm" else 2
    pre += m[:, None] * G * N + n[None, :]  # BM BN
    here = m[:, None] * N + n[None, :]
    x0 = tl.load(pre, mask, other=0.0).to(tl.float32)
    x1 = tl.load(pre + N, mask, other=0.0).to(tl.float32)
    u = logit(x0, x1, KIND)
    tl.store(a + here, tl.sigmoid(-u), mask)
    if b is not None:
        x2 = tl.load(pre + (G - 1) * N, mask, other=0.0).to(tl.float32)
        tl.store(b + here, tl.sigmoid(u) * candidate(x2, ACTIVATION), mask)


# --- launches -------------------------------------------------------------------------------------------------------------


def fewer(sizes: dict[str, int]) -> dict[str, int]:
    """Fewer steps under way: backward has four or five loads a step. Their number divides that of `linear_recurrence`."""
    U = sizes["U"]
    return sizes | {"U": max(1, U // (4 if U > 4 else 2))}


def _way(x: Tensor, BACK: bool) -> tuple[Plan, tuple[int, int], dict[str, int]]:
    """How the steps of x, T B H, are walked; the grid; the tile."""
    T, M, N = x.shape
    way = plan(T, M, N, x.element_size(), x.device)
    sizes = way.sizes
    tiles = triton.cdiv(M, sizes["BM"]) * triton.cdiv(N, sizes["BN"])
    return way, (tiles, way.K), fewer(sizes) if BACK else sizes


def _coefficients(pre: Tensor, N: int, kind: str, activation: str, with_b: bool) -> tuple[Tensor, Tensor | None]:
    T, B, _ = pre.shape
    a = torch.empty(T, B, N, dtype=torch.float32, device=pre.device)
    b = torch.empty(T, B, N, dtype=torch.float32, device=pre.device) if with_b else None
    BM, BN, warps = tile_of_all(T * B, N, WARP)
    grid = tiles(T * B, N, BM, BN)
    coefficients_kernel[grid](pre, a, b, T * B, N, kind, activation, BM, BN, num_warps=warps, enable_fp_fusion=True)
    return a, b


def _launch_forward(pre: Tensor, h0: Tensor, lengths: Tensor | None, reverse: bool, kind: str, activation: str) -> Tensor:
    y = _fake_forward(pre, h0, lengths, reverse, kind, activation)
    if y.numel():
        (T, M, N), pre, lengths = y.shape, pre.contiguous(), dense(lengths)
        (way, grid, sizes), starts = _way(y, False), dense(h0)
        if way.K > 1:
            starts = carried(*_coefficients(pre, N, kind, activation, True), lengths, starts, way, False, reverse)
        steps, options = (*pre.stride()[:2], T, M, N, way.C), {"num_warps": way.warps, "enable_fp_fusion": True}
        forward_kernel[grid](pre, lengths, starts, y, *steps, kind, activation, reverse, **sizes, **options)
    return y


def _fake_forward(pre, h0, lengths, reverse, kind, activation):
    return torch.empty((*pre.shape[:2], h0.shape[-1]), dtype=pre.dtype, device=pre.device)


def _launch_backward(
    dh: Tensor,
    pre: Tensor,
    h0: Tensor,
    h: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
    kind: str,
    activation: str,
    need: list[bool],
) -> tuple[Tensor, Tensor]:
    """The gradients of pre and h0; empty those that are not needed."""
    dpre, dh0 = _fake_backward(dh, pre, h0, h, lengths, reverse, kind, activation, need)
    if not dh.numel():
        return dpre.zero_(), dh0.zero_()
    (T, M, N), pre, lengths, dh = dh.shape, pre.contiguous(), dense(lengths), across(dh)
    (way, grid, sizes), starts, h = _way(dh, True), None, dense(h)
    if way.K > 1:
        a, _ = _coefficients(pre, N, kind, activation, False)
        starts = carried(a, dh, lengths, None, way, True, not reverse)
    given = (dh, pre, h if need[0] else None, dense(h0), lengths, starts)
    outputs = (t if needed else None for t, needed in zip((dpre, dh0), need))
    steps = (*dh.stride(), *pre.stride()[:2], M * N, N, T, M, N, way.C)
    options = {"num_warps": way.warps, "enable_fp_fusion": True}
    backward_kernel[grid](*given, *outputs, *steps, kind, activation, not reverse, **sizes, **options)
    return dpre, dh0


def _fake_backward(dh, pre, h0, h, lengths, reverse, kind, activation, need):
    shapes = (pre.shape, h0.shape)
    return tuple(torch.empty(s if needed else (0,), dtype=pre.dtype, device=pre.device) for s, needed in zip(shapes, need))


FORWARD = operator("triton_min_rnn", _launch_forward, _fake_forward)
BACKWARD = operator("triton_min_rnn_backward", _launch_backward, _fake_backward)

# --- the rules ------------------------------------------------------------------------------------------------------------


def forward_gates(x, h0, w, b, lengths, reverse, kind, activation):
    pre = F.linear(within(x, lengths), w, b)
    return FORWARD(pre, h0, lengths, reverse, kind, activation), pre


def forward_outputs(x, h0, w, b, lengths, reverse, kind, activation):
    return FORWARD(F.linear(within(x, lengths), w, b), h0, lengths, reverse, kind, activation)


def backward_gates(dh, dpre, x, h0, w, lengths, reverse, kind, activation, h, pre, need):
    if dh is None:
        return op.GATES.backward(dh, dpre, x, h0, w, lengths, reverse, kind, activation, h, pre, need)
    wanted = [need.x or need.w or need.b, need.h0]
    da, dh0 = BACKWARD(dh, pre, h0, h, lengths, reverse, kind, activation, wanted)
    if wanted[0] and dpre is not None:
        da = da + dpre
    dx = within(da @ w, lengths) if need.x else None
    dw = over_time(da, within(x, lengths)) if need.w else None
    db = da.sum((0, 1)) if need.b else None
    return dx, dh0 if need.h0 else None, dw, db, None


def backward_outputs(dh, x, h0, w, b, lengths, reverse, kind, activation, h, need):
    pre = F.linear(within(x, lengths), w, b)
    return backward_gates(dh, None, x, h0, w, lengths, reverse, kind, activation, h, pre, need)


def unsupported(
    x: Tensor,
    h0: Tensor,
    w: Tensor,
    b: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
    kind: str,
    activation: str,
) -> str | None:
    """Why the kernel cannot take the call, or None."""
    return computed_in_float32(x)


GATES = Kernel(forward_gates, backward_gates, unsupported)
OUTPUTS = Kernel(forward_outputs, backward_outputs, unsupported)


def specs(warp: int) -> list[Spec]:
    """The kernels at the shipped configurations: many elements a step and few, both cells, ragged rows in reverse."""
    every = []
    few = "few elements a step: with 4 bytes a thread there are more threads, and the loads of more steps are under way"
    for (t, size), width, kind in (
        (("bf16", 2), WIDE, "min_gru"),
        (("bf16", 2), NARROW, "min_lstm"),
        (("fp32", 4), WIDE, "min_lstm"),
        (("fp32", 4), NARROW, "min_gru"),
    ):
        ragged = kind == "min_lstm"
        sizes = tile(32, 4096, width, size, warp)
        for label, kernel in (("", forward_kernel), (" backward", backward_kernel)):
            names = kernel.arg_names
            types = {name: f"*{t}" for name in ("dh", "pre", "h", "h0", "y", "dpre", "dh0") if name in names}
            types |= {"starts": "*fp32" if width == NARROW else f"*{t}"} | ({"lengths": "*i64"} if ragged else {})
            numbers = [name for name in ("dt", "dm", "pt", "pm", "ht", "hm", "T", "M", "N", "C") if name in names]
            types |= dict.fromkeys(numbers, "i32")
            constants = {"KIND": kind, "ACTIVATION": "tanh" if ragged else "g", "DOWN": ragged}
            constants |= fewer(sizes) if label else sizes
            constants |= {"starts": None} if label and width == WIDE else {}
            constants |= {"dn": 1} if "dn" in names else {}
            constants |= {} if ragged else {"lengths": None}
            aligned = tuple(name for name in types if name not in constants and name not in ("T", "M", "C"))
            types = {name: types[name] for name in names if name in types and name not in constants}
            name = f"min_rnn{label} {kind} {t} {width} bytes"
            every.append(Spec(name, kernel, types, constants, aligned, 1, narrow=few if width == NARROW else ""))
        types = {"pre": f"*{t}", "a": "*fp32", "b": "*fp32", "M": "i32", "N": "i32"}
        BM, BN, warps = tile_of_all(4096, 4096, warp)
        constants = {"KIND": kind, "ACTIVATION": "g", "BM": BM, "BN": BN}
        if width == WIDE:
            every.append(
                Spec(f"min_rnn coefficients {kind} {t}", coefficients_kernel, types, constants, ("pre", "a", "b", "N"), warps)
            )
    return every
