"""The kernels of the simple recurrence: a step, and all steps with the recurrent weights at hand. For the launches see `rnn`.

Letters   as in `bptoolkit.ops.rnn`. TANH: φ is tanh, else relu. A tensor that is not given is None
"""

import triton
import triton.language as tl

from bptoolkit.triton_kernels.elementwise import place
from bptoolkit.triton_kernels.functions import relu, tanh
from bptoolkit.triton_kernels.linear_recurrence import row_ends
from bptoolkit.triton_kernels.recurrent import factor, kept, put, step_of, units, weights


@triton.jit
def phi(a, TANH: tl.constexpr):
    return tanh(a) if TANH else relu(a)


@triton.jit
def slope(y, TANH: tl.constexpr):
    """φ' by y."""
    y = y.to(tl.float32)
    return 1 - y * y if TANH else tl.where(y > 0, 1.0, 0.0)


# --- a step a launch ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["t", "T", "B"])
def step_kernel(
    u, pre, h0, lengths, y, state, t, T, B, H,
    TANH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Step t from u = Wh hₜ₋₁. state: the h that the rows go on from, where that is not y."""
    m, n, mask = place(B, H, BM, BN)
    ends = row_ends(lengths, m, B, T)
    t = tl.full((), 0, tl.int64) + t
    here = m[:, None] * H + n[None, :]  # BM BN
    a = tl.load(pre + t * B * H + here, mask, other=0.0).to(tl.float32) + tl.load(u + here, mask, other=0.0).to(tl.float32)
    h = phi(a, TANH)
    put(y + t * B * H + here, h, lengths, t, ends, mask)
    if state is not None:
        h = kept(lengths, t, ends, h, tl.load(h0 + here, mask, other=0.0).to(tl.float32))
        tl.store(state + here, h.to(state.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["t", "T", "B"])
def step_back_kernel(
    sent, dy, y, lengths, da, t, T, B, H, yt, yb,
    TANH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The gradient of step t from what came back from the step after: sent = Whᵀ da."""
    m, n, mask = place(B, H, BM, BN)
    ends = row_ends(lengths, m, B, T)
    t = tl.full((), 0, tl.int64) + t
    here = m[:, None] * H + n[None, :]  # BM BN
    dh = tl.load(sent + here, mask, other=0.0).to(tl.float32)
    dh += tl.load(dy + t * yt + m[:, None] * yb + n[None, :], mask, other=0.0).to(tl.float32)
    put(da + t * B * H + here, dh * slope(tl.load(y + t * B * H + here, mask, other=0.0), TANH), lengths, t, ends, mask)


# --- all steps in a launch ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T", "B"])
def resident_kernel(
    pre, h0, wh, lengths, y, T, B,
    H: tl.constexpr, REVERSE: tl.constexpr, TANH: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    m, n = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM), tl.arange(0, BH)
    mask = (m < B)[:, None] & (n < H)[None, :]
    ends = row_ends(lengths, m, B, T)
    here = m[:, None] * H + n[None, :]  # BM BH
    W = weights(wh, H, BH, True, UPCAST)
    h = tl.load(h0 + here, mask, other=0.0).to(tl.float32)
    p = tl.load(pre + step_of(0, T, REVERSE) * B * H + here, mask, other=0.0)
    for k in range(0, T):
        t = step_of(k, T, REVERSE)
        a = tl.dot(factor(h, wh, UPCAST), W, p.to(tl.float32), input_precision=PRECISION)
        p = tl.load(pre + step_of(k + 1, T, REVERSE) * B * H + here, mask, other=0.0)
        out = phi(a, TANH)
        h = kept(lengths, t, ends, units(out, H, BH), h)
        put(y + t * B * H + here, out, lengths, t, ends, mask)


@triton.jit(do_not_specialize=["T", "B"])
def resident_back_kernel(
    dy, y, wh, lengths, da, dh0, T, B, yt, yb,
    H: tl.constexpr, REVERSE: tl.constexpr, TANH: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    m, n = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM), tl.arange(0, BH)
    mask = (m < B)[:, None] & (n < H)[None, :]
    ends = row_ends(lengths, m, B, T)
    here = m[:, None] * H + n[None, :]  # BM BH
    W = weights(wh, H, BH, False, UPCAST)
    dh = tl.zeros((BM, BH), tl.float32)
    dy += m[:, None] * yb + n[None, :]
    t = step_of(0, T, not REVERSE)
    s, d = tl.load(y + t * B * H + here, mask, other=0.0), tl.load(dy + t * yt, mask, other=0.0)
    for k in range(0, T):
        t, after = step_of(k, T, not REVERSE), step_of(k + 1, T, not REVERSE)
        a = units((dh + d.to(tl.float32)) * slope(s, TANH), H, BH)
        s, d = tl.load(y + after * B * H + here, mask, other=0.0), tl.load(dy + after * yt, mask, other=0.0)
        put(da + t * B * H + here, a, lengths, t, ends, mask)
        sent = tl.dot(factor(a, wh, UPCAST), W, input_precision=PRECISION)
        dh = kept(lengths, t, ends, units(sent, H, BH), dh)
    tl.store(dh0 + here, dh.to(dh0.dtype.element_ty), mask)
