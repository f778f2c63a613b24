"""The kernels of the GRU: a step of it, and all steps with the recurrent weights at hand. For the launches see `gru`.

Letters   as in `bptoolkit.ops.gru`. Where U is given, G holds Wi x + b and U holds Wh hₜ₋₁ + bh, T B 3H each, and the gates are
          made again from them. A tensor that is not given is None
"""

import triton
import triton.language as tl

from bptoolkit.triton_kernels.elementwise import place
from bptoolkit.triton_kernels.functions import tanh
from bptoolkit.triton_kernels.linear_recurrence import row_ends
from bptoolkit.triton_kernels.recurrent import factor, kept, put, state_before, step_of, units, weights

# --- one step of some rows and units --------------------------------------------------------------------------------------


@triton.jit
def three(p, H, mask):
    """The blocks of three gates."""
    return tl.load(p, mask, other=0.0), tl.load(p + H, mask, other=0.0), tl.load(p + 2 * H, mask, other=0.0)


@triton.jit
def put_four(p, a, b, c, d, lengths, t, ends, H, mask):
    put(p, a, lengths, t, ends, mask)
    put(p + H, b, lengths, t, ends, mask)
    put(p + 2 * H, c, lengths, t, ends, mask)
    put(p + 3 * H, d, lengths, t, ends, mask)


@triton.jit
def biases(bh, n, H):
    """bh of the three gates, zeros where it is not given: 1 BN each."""
    if bh is None:
        none = tl.zeros(n.shape, tl.float32)[None, :]
        r, z, q = none, none, none
    else:
        r, z, q = three(bh + n[None, :], H, (n < H)[None, :])
    return r.to(tl.float32), z.to(tl.float32), q.to(tl.float32)


@triton.jit
def gates_of(ar, az, an, q):
    """The gates, of which q is there already."""
    r, z = tl.sigmoid(ar), tl.sigmoid(az)
    return r, z, tanh(an + r * q)


@triton.jit
def read_gates(G, U, t, B, m, n, H, mask):
    """r z q n of step t as they are kept, or what they are made from: pairs, of which the second may be nothing."""
    if U is None:
        p = G + t * B * (4 * H) + (m[:, None] * (4 * H) + n[None, :])
        r, z, q = three(p, H, mask)
        n_ = tl.load(p + 3 * H, mask, other=0.0)
        ur, uz = r, z
    else:
        at = t * B * (3 * H) + (m[:, None] * (3 * H) + n[None, :])
        r, z, n_ = three(G + at, H, mask)
        ur, uz, q = three(U + at, H, mask)
    return r, z, q, n_, ur, uz


@triton.jit
def made(r, z, q, n, ur, uz, U):
    """r z q n in float32."""
    r, z, q, n = r.to(tl.float32), z.to(tl.float32), q.to(tl.float32), n.to(tl.float32)
    if U is not None:
        r, z, n = gates_of(r + ur.to(tl.float32), z + uz.to(tl.float32), n, q)
    return r, z, q, n


@triton.jit
def cell_back(r, z, q, n, hp, dh):
    """The gradients of n, r, z and q, and what goes straight to hₜ₋₁."""
    dn = dh * (1 - z) * (1 - n * n)
    return dn, dn * q * r * (1 - r), dh * (hp - n) * z * (1 - z), dn * r, dh * z


# --- a step a launch ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["t", "T", "B"])
def step_kernel(
    u, pre, h0, bh, lengths, y, G, state, t, T, B, H,
    REVERSE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Step t from u = Wh hₜ₋₁. state: the h that the rows go on from, where that is not y."""
    m, n, mask = place(B, H, BM, BN)
    ends = row_ends(lengths, m, B, T)
    t = tl.full((), 0, tl.int64) + t
    here, blocks = m[:, None] * H + n[None, :], m[:, None] * (3 * H) + n[None, :]  # BM BN
    br, bz, bq = biases(bh, n, H)
    ur, uz, q = three(u + blocks, H, mask)
    ar, az, an = three(pre + t * B * (3 * H) + blocks, H, mask)
    h = tl.load(h0 + here, mask, other=0.0).to(tl.float32)
    hp = state_before(y, h, t, T, ends, here, B, H, mask, REVERSE)
    q = q.to(tl.float32) + bq
    r, z = ar.to(tl.float32) + ur.to(tl.float32) + br, az.to(tl.float32) + uz.to(tl.float32) + bz
    r, z, new = gates_of(r, z, an.to(tl.float32), q)
    out = new + z * (hp - new)
    put(y + t * B * H + here, out, lengths, t, ends, mask)
    if G is not None:
        put_four(G + t * B * (4 * H) + (m[:, None] * (4 * H) + n[None, :]), r, z, q, new, lengths, t, ends, H, mask)
    if state is not None:
        tl.store(state + here, kept(lengths, t, ends, out, h).to(state.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["t", "T", "B"])
def step_back_kernel(
    sent, dy, G, U, y, h0, lengths, da, carried, t, T, B, H, yt, yb,
    REVERSE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The gradient of step t from what came back from the step after: sent = Whᵀ [da_r da_z dq], and dh z, to be replaced."""
    m, n, mask = place(B, H, BM, BN)
    ends = row_ends(lengths, m, B, T)
    t = tl.full((), 0, tl.int64) + t
    here = m[:, None] * H + n[None, :]  # BM BN
    old = tl.load(carried + here, mask, other=0.0)
    dh = old + tl.load(sent + here, mask, other=0.0).to(tl.float32)
    dh += tl.load(dy + t * yt + m[:, None] * yb + n[None, :], mask, other=0.0).to(tl.float32)
    hp = tl.load(h0 + here, mask, other=0.0).to(tl.float32)
    hp = state_before(y, hp, t, T, ends, here, B, H, mask, REVERSE)
    r, z, q, new, ur, uz = read_gates(G, U, t, B, m, n, H, mask)
    r, z, q, new = made(r, z, q, new, ur, uz, U)
    dn, dr, dz, dq, straight = cell_back(r, z, q, new, hp, dh)
    put_four(da + t * B * (4 * H) + (m[:, None] * (4 * H) + n[None, :]), dn, dr, dz, dq, lengths, t, ends, H, mask)
    tl.store(carried + here, kept(lengths, t, ends, straight, old), mask)


# --- all steps in a launch ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T", "B"])
def resident_kernel(
    pre, h0, wh, bh, lengths, y, G, T, B,
    H: tl.constexpr, REVERSE: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    m, n = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM), tl.arange(0, BH)
    mask = (m < B)[:, None] & (n < H)[None, :]
    ends = row_ends(lengths, m, B, T)
    here, blocks = m[:, None] * H + n[None, :], m[:, None] * (3 * H) + n[None, :]  # BM BH
    Wr, Wz = weights(wh, H, BH, True, UPCAST), weights(wh + H * H, H, BH, True, UPCAST)
    Wn = weights(wh + 2 * H * H, H, BH, True, UPCAST)
    br, bz, bq = biases(bh, n, H)
    h = tl.load(h0 + here, mask, other=0.0).to(tl.float32)
    pr, pz, pn = three(pre + step_of(0, T, REVERSE) * B * (3 * H) + blocks, H, mask)
    for k in range(0, T):
        t = step_of(k, T, REVERSE)
        x, an = factor(h, wh, UPCAST), pn.to(tl.float32)
        r = tl.dot(x, Wr, pr.to(tl.float32) + br, input_precision=PRECISION)
        z = tl.dot(x, Wz, pz.to(tl.float32) + bz, input_precision=PRECISION)
        q = tl.dot(x, Wn, input_precision=PRECISION) + bq
        pr, pz, pn = three(pre + step_of(k + 1, T, REVERSE) * B * (3 * H) + blocks, H, mask)
        r, z, new = gates_of(r, z, an, q)
        out = new + z * (h - new)
        h = kept(lengths, t, ends, units(out, H, BH), h)
        put(y + t * B * H + here, out, lengths, t, ends, mask)
        if G is not None:
            put_four(G + t * B * (4 * H) + (m[:, None] * (4 * H) + n[None, :]), r, z, q, new, lengths, t, ends, H, mask)


@triton.jit(do_not_specialize=["T", "B"])
def resident_back_kernel(
    dy, G, U, y, h0, wh, lengths, da, dh0, T, B, yt, yb,
    H: tl.constexpr, REVERSE: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    m, n = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM), tl.arange(0, BH)
    mask = (m < B)[:, None] & (n < H)[None, :]
    ends = row_ends(lengths, m, B, T)
    here = m[:, None] * H + n[None, :]  # BM BH
    Wr, Wz = weights(wh, H, BH, False, UPCAST), weights(wh + H * H, H, BH, False, UPCAST)
    Wn = weights(wh + 2 * H * H, H, BH, False, UPCAST)
    first = tl.load(h0 + here, mask, other=0.0).to(tl.float32)
    dh = tl.zeros((BM, BH), tl.float32)
    dy += m[:, None] * yb + n[None, :]
    t = step_of(0, T, not REVERSE)
    pr, pz, pq, pn, ur, uz = read_gates(G, U, t, B, m, n, H, mask)
    d, hp = tl.load(dy + t * yt, mask, other=0.0), state_before(y, first, t, T, ends, here, B, H, mask, REVERSE)
    for k in range(0, T):
        t, after = step_of(k, T, not REVERSE), step_of(k + 1, T, not REVERSE)
        r, z, q, new = made(pr, pz, pq, pn, ur, uz, U)
        dn, dr, dz, dq, straight = cell_back(r, z, q, new, hp, dh + d.to(tl.float32))
        pr, pz, pq, pn, ur, uz = read_gates(G, U, after, B, m, n, H, mask)
        d, hp = tl.load(dy + after * yt, mask, other=0.0), state_before(y, first, after, T, ends, here, B, H, mask, REVERSE)
        put_four(da + t * B * (4 * H) + (m[:, None] * (4 * H) + n[None, :]), dn, dr, dz, dq, lengths, t, ends, H, mask)
        sent = tl.dot(factor(dr, wh, UPCAST), Wr, straight, input_precision=PRECISION)
        sent = tl.dot(factor(dz, wh, UPCAST), Wz, sent, input_precision=PRECISION)
        sent = tl.dot(factor(dq, wh, UPCAST), Wn, sent, input_precision=PRECISION)
        dh = kept(lengths, t, ends, units(sent, H, BH), dh)
    tl.store(dh0 + here, dh.to(dh0.dtype.element_ty), mask)
