"""The kernels of the LSTM: a step of it, and all steps with the recurrent weights at hand. For the launches see `lstm`.

Letters   as in `bptoolkit.ops.lstm`; a the gates before their functions, a = Wi x + b + Wh hₜ₋₁; s the carried c. With
          RAW, G holds a. A tensor that is not given is None
"""

import triton
import triton.language as tl

from bptoolkit.triton_kernels.elementwise import place
from bptoolkit.triton_kernels.functions import tanh
from bptoolkit.triton_kernels.linear_recurrence import row_ends
from bptoolkit.triton_kernels.recurrent import factor, given, kept, put, state_before, step_of, units, weights

# --- one step of some rows and units --------------------------------------------------------------------------------------


@triton.jit
def four(p, H, mask):
    """The blocks of the four gates."""
    i, f = tl.load(p, mask, other=0.0), tl.load(p + H, mask, other=0.0)
    g, o = tl.load(p + 2 * H, mask, other=0.0), tl.load(p + 3 * H, mask, other=0.0)
    return i, f, g, o


@triton.jit
def put_four(p, i, f, g, o, lengths, t, ends, H, mask):
    put(p, i, lengths, t, ends, mask)
    put(p + H, f, lengths, t, ends, mask)
    put(p + 2 * H, g, lengths, t, ends, mask)
    put(p + 3 * H, o, lengths, t, ends, mask)


@triton.jit
def cell(i, f, g, o, s):
    """The gates, c and h from a and the c before."""
    i, f, g, o = tl.sigmoid(i), tl.sigmoid(f), tanh(g), tl.sigmoid(o)
    s = f * s + i * g
    return i, f, g, o, s, o * tanh(s)


@triton.jit
def cell_back(i, f, g, o, c, cp, dh, dc, RAW: tl.constexpr):
    """The gradient of a, and the dc that is carried on."""
    i, f, g, o = i.to(tl.float32), f.to(tl.float32), g.to(tl.float32), o.to(tl.float32)
    if RAW:
        i, f, g, o = tl.sigmoid(i), tl.sigmoid(f), tanh(g), tl.sigmoid(o)
    tc = tanh(c)
    dc += dh * o * (1 - tc * tc)
    return dc * g * i * (1 - i), dc * cp * f * (1 - f), dc * i * (1 - g * g), dh * tc * o * (1 - o), dc * f


# --- a step a launch ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["t", "T", "B"])
def step_kernel(
    u, pre, h0, c0, lengths, y, c, G, state, t, T, B, H,
    REVERSE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Step t from u = Wh hₜ₋₁. state: the h that the rows go on from, where that is not y."""
    m, n, mask = place(B, H, BM, BN)
    ends = row_ends(lengths, m, B, T)
    t = tl.full((), 0, tl.int64) + t
    here, gates = m[:, None] * H + n[None, :], m[:, None] * (4 * H) + n[None, :]  # BM BN
    ui, uf, ug, uo = four(u + gates, H, mask)
    i, f, g, o = four(pre + t * B * (4 * H) + gates, H, mask)
    s0 = tl.load(c0 + here, mask, other=0.0).to(tl.float32)
    s = state_before(c, s0, t, T, ends, here, B, H, mask, REVERSE)
    i, f = i.to(tl.float32) + ui.to(tl.float32), f.to(tl.float32) + uf.to(tl.float32)
    g, o = g.to(tl.float32) + ug.to(tl.float32), o.to(tl.float32) + uo.to(tl.float32)
    i, f, g, o, s, h = cell(i, f, g, o, s)
    put(y + t * B * H + here, h, lengths, t, ends, mask)
    put(c + t * B * H + here, s, lengths, t, ends, mask)
    if G is not None:
        put_four(G + t * B * (4 * H) + gates, i, f, g, o, lengths, t, ends, H, mask)
    if state is not None:
        h = kept(lengths, t, ends, h, tl.load(h0 + here, mask, other=0.0).to(tl.float32))
        tl.store(state + here, h.to(state.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["t", "T", "B"])
def step_back_kernel(
    sent, dy, dc, G, c, c0, lengths, da, carried, t, T, B, H, yt, yb, ct, cb,
    REVERSE: tl.constexpr, RAW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The gradient of step t from what came back from the step after: sent = Whᵀ da, and the carried dc, which is replaced."""
    m, n, mask = place(B, H, BM, BN)
    ends = row_ends(lengths, m, B, T)
    t = tl.full((), 0, tl.int64) + t
    here, gates = m[:, None] * H + n[None, :], m[:, None] * (4 * H) + n[None, :]  # BM BN
    dh = tl.load(sent + here, mask, other=0.0).to(tl.float32)
    if dy is not None:
        dh += tl.load(dy + t * yt + m[:, None] * yb + n[None, :], mask, other=0.0).to(tl.float32)
    old = tl.load(carried + here, mask, other=0.0)
    new = old
    if dc is not None:
        new += tl.load(dc + t * ct + m[:, None] * cb + n[None, :], mask, other=0.0).to(tl.float32)
    i, f, g, o = four(G + t * B * (4 * H) + gates, H, mask)
    s = tl.load(c + t * B * H + here, mask, other=0.0).to(tl.float32)
    s0 = tl.load(c0 + here, mask, other=0.0).to(tl.float32)
    sp = state_before(c, s0, t, T, ends, here, B, H, mask, REVERSE)
    i, f, g, o, new = cell_back(i, f, g, o, s, sp, dh, new, RAW)
    put_four(da + t * B * (4 * H) + gates, i, f, g, o, lengths, t, ends, H, mask)
    tl.store(carried + here, kept(lengths, t, ends, new, old), mask)


# --- all steps in a launch ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T", "B"])
def resident_kernel(
    pre, h0, c0, wh, lengths, y, c, G, T, B,
    H: tl.constexpr, REVERSE: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    m, n = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM), tl.arange(0, BH)
    mask = (m < B)[:, None] & (n < H)[None, :]
    ends = row_ends(lengths, m, B, T)
    here, gates = m[:, None] * H + n[None, :], m[:, None] * (4 * H) + n[None, :]  # BM BH
    Wi, Wf = weights(wh, H, BH, True, UPCAST), weights(wh + H * H, H, BH, True, UPCAST)
    Wg, Wo = weights(wh + 2 * H * H, H, BH, True, UPCAST), weights(wh + 3 * H * H, H, BH, True, UPCAST)
    h = tl.load(h0 + here, mask, other=0.0).to(tl.float32)
    s = tl.load(c0 + here, mask, other=0.0).to(tl.float32)
    pi, pf, pg, po = four(pre + step_of(0, T, REVERSE) * B * (4 * H) + gates, H, mask)
    for k in range(0, T):
        t = step_of(k, T, REVERSE)
        x = factor(h, wh, UPCAST)
        i = tl.dot(x, Wi, pi.to(tl.float32), input_precision=PRECISION)
        f = tl.dot(x, Wf, pf.to(tl.float32), input_precision=PRECISION)
        g = tl.dot(x, Wg, pg.to(tl.float32), input_precision=PRECISION)
        o = tl.dot(x, Wo, po.to(tl.float32), input_precision=PRECISION)
        pi, pf, pg, po = four(pre + step_of(k + 1, T, REVERSE) * B * (4 * H) + gates, H, mask)
        i, f, g, o, new, out = cell(i, f, g, o, s)
        s, h = kept(lengths, t, ends, new, s), kept(lengths, t, ends, units(out, H, BH), h)
        put(y + t * B * H + here, out, lengths, t, ends, mask)
        put(c + t * B * H + here, new, lengths, t, ends, mask)
        if G is not None:
            put_four(G + t * B * (4 * H) + gates, i, f, g, o, lengths, t, ends, H, mask)


@triton.jit(do_not_specialize=["T", "B"])
def resident_back_kernel(
    dy, dc, G, c, c0, wh, lengths, da, dh0, dc0, T, B, yt, yb, ct, cb,
    H: tl.constexpr, REVERSE: tl.constexpr, RAW: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    m, n = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM), tl.arange(0, BH)
    mask = (m < B)[:, None] & (n < H)[None, :]
    ends = row_ends(lengths, m, B, T)
    here, gates = m[:, None] * H + n[None, :], m[:, None] * (4 * H) + n[None, :]  # BM BH
    Wi, Wf = weights(wh, H, BH, False, UPCAST), weights(wh + H * H, H, BH, False, UPCAST)
    Wg, Wo = weights(wh + 2 * H * H, H, BH, False, UPCAST), weights(wh + 3 * H * H, H, BH, False, UPCAST)
    s0 = tl.load(c0 + here, mask, other=0.0).to(tl.float32)
    dh, ds = tl.zeros((BM, BH), tl.float32), tl.zeros((BM, BH), tl.float32)
    if dy is not None:
        dy += m[:, None] * yb + n[None, :]
    if dc is not None:
        dc += m[:, None] * cb + n[None, :]
    t = step_of(0, T, not REVERSE)
    s = tl.load(c + t * B * H + here, mask, other=0.0).to(tl.float32)
    sp = state_before(c, s0, t, T, ends, here, B, H, mask, REVERSE)
    pi, pf, pg, po = four(G + t * B * (4 * H) + gates, H, mask)
    ey, ec = given(dy, t * yt, mask), given(dc, t * ct, mask)
    for k in range(0, T):
        t, after = step_of(k, T, not REVERSE), step_of(k + 1, T, not REVERSE)
        i, f, g, o, dct = cell_back(pi, pf, pg, po, s, sp, dh + ey.to(tl.float32), ds + ec.to(tl.float32), RAW)
        s, sp = sp, state_before(c, s0, after, T, ends, here, B, H, mask, REVERSE)
        pi, pf, pg, po = four(G + after * B * (4 * H) + gates, H, mask)
        ey, ec = given(dy, after * yt, mask), given(dc, after * ct, mask)
        put_four(da + t * B * (4 * H) + gates, i, f, g, o, lengths, t, ends, H, mask)
        sent = tl.dot(factor(i, wh, UPCAST), Wi, input_precision=PRECISION)
        sent = tl.dot(factor(f, wh, UPCAST), Wf, sent, input_precision=PRECISION)
        sent = tl.dot(factor(g, wh, UPCAST), Wg, sent, input_precision=PRECISION)
        sent = tl.dot(factor(o, wh, UPCAST), Wo, sent, input_precision=PRECISION)
        dh, ds = kept(lengths, t, ends, units(sent, H, BH), dh), kept(lengths, t, ends, dct, ds)
    tl.store(dh0 + here, dh.to(dh0.dtype.element_ty), mask)
    tl.store(dc0 + here, ds.to(dc0.dtype.element_ty), mask)
