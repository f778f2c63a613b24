"""The gated linear recurrence, both directions. For the maths see the op of this name.

A tensor is T M N: steps, rows (of ragged calls, or of a layout in which they stand apart), and the elements of a row; nothing
flows along M and N. A program has a tile of them, walks over the steps, and holds h in float32 registers. The loads of U steps
are under way at a time. The i-th step of a walk is t = i, or DOWN t = T − 1 − i; past the length of a row a is 1 and b is 0.

forward     hₜ = aₜ hₜ₋₁ + bₜ
backward    the other way, with c = aₜ₊₁ gₜ₊₁ in registers:    gₜ = dhₜ + c    daₜ = hₜ₋₁ gₜ    dbₜ = gₜ    c ← aₜ gₜ
in chunks   where a step has too few elements for a GPU and T is long, K chunks of C steps are walked at once:
            summary    p = Π a of a chunk, and x, what it leaves when it starts from zero
            carry      s₀ = h₀    s_{k+1} = p_k s_k + x_k    one chunk after the other
            walk       forward or backward above, each chunk from its s
            p can overflow, or x, where no h does: where s_{k+1} is not finite, the steps of chunk k are walked again from s_k
"""

# ruff: noqa: RUF005 (Triton's language knows no stars)
from __future__ import annotations

from math import isqrt
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.elementwise import place
from bptoolkit.triton_kernels.kernel import WARP, Kernel, computed_in_float32, dense, programs
from bptoolkit.triton_kernels.operator import operator

WIDE, NARROW = 16, 4  # bytes that a thread reads at once, where a step has many elements and where it has few
STEPS = {WIDE: 4, NARROW: 12}  # of which the loads are under way at a time; with many more, registers spill
STEPS_64 = 4  # the most with warps of 64, whose scalar registers hold the masks and addresses of each step
LONG, CHUNKS = 1024, 3  # from so many steps on, chunks, if there would be so many

# --- what the kernels share -----------------------------------------------------------------------------------------------


@triton.jit
def position(i, T, DOWN: tl.constexpr):
    """The step that is the i-th of a walk; not between 0 and T if there is none."""
    if DOWN:
        t = T - 1 - i
    else:
        t = i
    return t


@triton.jit
def between(t, least, ends):
    """For each row, whether least ≤ t < its end: BM 1."""
    each = tl.zeros(ends.shape, tl.int64) + t  # the interpreter cannot put a scalar condition beside a block of them
    return ((each >= least) & (each < ends))[:, None]


@triton.jit
def row_ends(lengths, m, M, T):
    """The lengths of the rows, or T: BM."""
    if lengths is None:
        ends = tl.zeros(m.shape, tl.int64) + T
    else:
        ends = tl.load(lengths + m, m < M, other=0)
    return ends


@triton.jit
def tiles_of(x, i, T, xt, mask, ends, other: tl.constexpr, off: tl.constexpr, DOWN: tl.constexpr, U: tl.constexpr):
    """U tiles of x in float32, from the i-th step on, `off` steps away; `other` outside the rows."""
    found = ()
    for s in tl.static_range(U):
        t = position(i + s, T, DOWN) + off
        found = found + (tl.load(x + t * xt, mask & between(t, 0, ends), other=other).to(tl.float32),)
    return found


@triton.jit
def step(A, B, h, BACK: tl.constexpr):
    """One step of what is carried along: h, or in backward c."""
    if BACK:
        h = A * (h + B)
    else:
        h = A * h + B
    return h


@triton.jit
def walked(a, b, h, k, C, T, at, bt, mask, ends, BACK: tl.constexpr, DOWN: tl.constexpr, U: tl.constexpr):
    """What chunk k leaves when it starts from h, and its product of a: BM BN each."""
    p = tl.full(h.shape, 1.0, tl.float32)
    for i in range(k * C, min(k * C + C, T), U):
        As = tiles_of(a, i, T, at, mask, ends, 1.0, 0, DOWN, U)
        Bs = tiles_of(b, i, T, bt, mask, ends, 0.0, 0, DOWN, U)
        for s in tl.static_range(U):
            h = step(As[s], Bs[s], h, BACK)
            p *= As[s]
    return h, p


# --- the kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T", "M", "C"])
def forward_kernel(
    a, b, lengths, starts, y, at, am, an, bt, bm, bn, T, M, N, C,
    DOWN: tl.constexpr, U: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    m, n, mask = place(M, N, BM, BN)
    k, ends = tl.program_id(1).to(tl.int64), row_ends(lengths, m, M, T)
    a += m[:, None] * am + n[None, :] * an  # BM BN
    b += m[:, None] * bm + n[None, :] * bn
    here = m[:, None] * N + n[None, :]
    h = tl.load(starts + k * M * N + here, mask, other=0.0).to(tl.float32)
    for i in range(k * C, min(k * C + C, T), U):
        As = tiles_of(a, i, T, at, mask, ends, 1.0, 0, DOWN, U)
        Bs = tiles_of(b, i, T, bt, mask, ends, 0.0, 0, DOWN, U)
        for s in tl.static_range(U):
            h = step(As[s], Bs[s], h, False)
            t = position(i + s, T, DOWN)
            value = h
            if lengths is not None:
                value = tl.where(between(t, 0, ends), h, 0.0)
            tl.store(y + t * M * N + here, value.to(y.dtype.element_ty), mask & between(t, 0, ends * 0 + T))


@triton.jit(do_not_specialize=["T", "M", "C"])
def backward_kernel(
    dh, a, h, h0, lengths, starts, da, db, dh0, dt, dm, dn, at, am, an, ht, hm, hn, T, M, N, C,
    DOWN: tl.constexpr, U: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    m, n, mask = place(M, N, BM, BN)
    k, ends = tl.program_id(1).to(tl.int64), row_ends(lengths, m, M, T)
    dh += m[:, None] * dm + n[None, :] * dn  # BM BN
    a += m[:, None] * am + n[None, :] * an
    here = m[:, None] * N + n[None, :]
    BEFORE: tl.constexpr = -1 if DOWN else 1  # where the step is that came before in forward
    c = tl.zeros((BM, BN), tl.float32)
    if starts is not None:
        c = tl.load(starts + k * M * N + here, mask, other=0.0)
    if da is not None:
        h += m[:, None] * hm + n[None, :] * hn
        first = tl.load(h0 + here, mask, other=0.0).to(tl.float32)
    for i in range(k * C, min(k * C + C, T), U):
        As = tiles_of(a, i, T, at, mask, ends, 1.0, 0, DOWN, U)
        Ds = tiles_of(dh, i, T, dt, mask, ends, 0.0, 0, DOWN, U)
        if da is not None:
            Hs = tiles_of(h, i, T, ht, mask, ends, 0.0, BEFORE, DOWN, U)
        for s in tl.static_range(U):
            g = Ds[s] + c
            c = As[s] * g
            t = position(i + s, T, DOWN)
            stored = mask & between(t, 0, ends * 0 + T)
            if lengths is not None:
                g = tl.where(between(t, 0, ends), g, 0.0)
            if db is not None:
                tl.store(db + t * M * N + here, g.to(db.dtype.element_ty), stored)
            if da is not None:
                value = tl.where(between(t + BEFORE, 0, ends), Hs[s], first) * g
                if lengths is not None:
                    value = tl.where(between(t, 0, ends), value, 0.0)
                tl.store(da + t * M * N + here, value.to(da.dtype.element_ty), stored)
    if dh0 is not None:  # noqa: SIM102 (known when it compiles, the other is not)
        if k == tl.num_programs(1) - 1:
            tl.store(dh0 + here, c.to(dh0.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["T", "M", "C"])
def summary_kernel(
    a, b, lengths, p, x, at, am, an, bt, bm, bn, T, M, N, C,
    BACK: tl.constexpr, DOWN: tl.constexpr, U: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    m, n, mask = place(M, N, BM, BN)
    k, ends = tl.program_id(1).to(tl.int64), row_ends(lengths, m, M, T)
    a += m[:, None] * am + n[None, :] * an  # BM BN
    b += m[:, None] * bm + n[None, :] * bn
    h = tl.zeros((BM, BN), tl.float32)
    h, product = walked(a, b, h, k, C, T, at, bt, mask, ends, BACK, DOWN, U)
    here = k * M * N + m[:, None] * N + n[None, :]
    tl.store(p + here, product, mask)
    tl.store(x + here, h, mask)


@triton.jit
def wrong(new, h):
    """Where a step over a chunk may be wrong: it is not finite, and not because h was NaN."""
    return (h == h) & ~(tl.abs(new) < float("inf"))


@triton.jit(do_not_specialize=["T", "M", "C", "K"])
def carry_kernel(
    a, b, lengths, p, x, h0, starts, at, am, an, bt, bm, bn, T, M, N, C, K,
    BACK: tl.constexpr, DOWN: tl.constexpr, U: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    m, n, mask = place(M, N, BM, BN)
    here = m[:, None] * N + n[None, :]  # BM BN
    start = tl.zeros((BM, BN), tl.float32)
    if h0 is not None:
        start = tl.load(h0 + here, mask, other=0.0).to(tl.float32)
    tl.store(starts + here, start, mask)
    a += m[:, None] * am + n[None, :] * an
    b += m[:, None] * bm + n[None, :] * bn
    p += here
    x += here
    starts += here
    ends = row_ends(lengths, m, M, T)
    all_chunks = tl.zeros((BM,), tl.int64) + (K - 1)  # those that another follows
    size = tl.zeros((), tl.int64) + M * N
    h = start
    bad = tl.zeros((BM, BN), tl.int32)
    for k in range(0, K - 1, U):
        Ps = tiles_of(p, k, K, size, mask, all_chunks, 1.0, 0, False, U)
        Xs = tiles_of(x, k, K, size, mask, all_chunks, 0.0, 0, False, U)
        for s in tl.static_range(U):
            new = Ps[s] * h + Xs[s]
            bad |= wrong(new, h).to(tl.int32)
            h = new
            tl.store(starts + (k + s + 1) * size, h, mask & between(k + s, 0, all_chunks))
    if tl.max(tl.max(bad, 1), 0) > 0:
        tl.debug_barrier()  # what is written again has been written
        h = start
        for k in range(0, K - 1):
            j = tl.zeros((), tl.int64) + k
            new = tl.load(p + j * size, mask, other=1.0) * h + tl.load(x + j * size, mask, other=0.0)
            again = wrong(new, h)
            if tl.max(tl.max(again.to(tl.int32), 1), 0) > 0:
                exact, _ = walked(a, b, h, j, C, T, at, bt, mask, ends, BACK, DOWN, U)
                new = tl.where(again, exact, new)
            h = new
            tl.store(starts + (j + 1) * size, h, mask)


# --- launches -------------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """The tile, its number of warps, and K chunks of C steps."""

    sizes: dict[str, int]
    warps: int
    C: int
    K: int


def tile(M: int, N: int, width: int, size: int, warp: int) -> dict[str, int]:
    """U, BM and BN: one warp, each thread of which reads `width` bytes at a time of elements of `size` bytes."""
    elements = width // size * warp
    BN = elements if M == 1 else min(triton.next_power_of_2(N), elements)
    return {"U": min(STEPS[width], STEPS_64) if warp == 64 else STEPS[width], "BM": elements // BN, "BN": BN}


def plan(T: int, M: int, N: int, size: int, device: torch.device) -> Plan:
    """How T steps of M × N elements of `size` bytes are walked: 8 warps on each multiprocessor have enough loads under way."""
    enough = programs(device, 2)
    sizes = tile(M, N, WIDE, size, WARP)
    if _tiles(M, N, sizes) < enough:
        sizes = tile(M, N, NARROW, size, WARP)
    U, K = sizes["U"], min(enough // _tiles(M, N, sizes), isqrt(T))
    if T >= LONG and K >= CHUNKS:
        C = triton.cdiv(triton.cdiv(T, K), U) * U
        return Plan(sizes, 1, C, triton.cdiv(T, C))
    return Plan(sizes, 1, T, 1)


def _tiles(M: int, N: int, sizes: dict[str, int]) -> int:
    return triton.cdiv(M, sizes["BM"]) * triton.cdiv(N, sizes["BN"])


def across(t: Tensor) -> Tensor:
    """T, or a copy where it is time that lies side by side in memory, not the elements of a step."""
    strides = [s for s, size in zip(t.stride()[1:], t.shape[1:]) if size > 1]
    return t.contiguous() if strides and t.shape[0] > 1 and 0 < t.stride(0) < min(strides) else t


def matrices(lengths: Tensor | None, *tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors as T M N, with a single row where they are views of that."""
    every = [None if t is None else across(t) for t in tensors]
    given = [t for t in every if t is not None]
    T, B, N = given[0].shape
    if lengths is not None or not (B == 1 or N == 1 or all(t.stride(1) == N * t.stride(2) for t in given)):
        return every
    return [None if t is None else t.reshape(T, 1, B * N) for t in every]


def carried(
    a: Tensor, b: Tensor, lengths: Tensor | None, h0: Tensor | None, way: Plan, BACK: bool, DOWN: bool
) -> Tensor | None:
    """What each chunk starts from: K M N in float32, or for a single one h0."""
    if way.K == 1:
        return h0
    T, M, N = b.shape
    p, x = (torch.empty(way.K - 1, M, N, dtype=torch.float32, device=b.device) for _ in range(2))
    starts = torch.empty(way.K, M, N, dtype=torch.float32, device=b.device)
    sizes, options = way.sizes, {"num_warps": way.warps, "enable_fp_fusion": True}
    steps, many = (*a.stride(), *b.stride(), T, M, N, way.C), _tiles(M, N, way.sizes)
    summary_kernel[(many, way.K - 1)](a, b, lengths, p, x, *steps, BACK, DOWN, **sizes, **options)
    carry_kernel[(many,)](a, b, lengths, p, x, h0, starts, *steps, way.K, BACK, DOWN, **sizes, **options)
    return starts


def _launch_forward(a: Tensor, b: Tensor, h0: Tensor, lengths: Tensor | None, reverse: bool) -> Tensor:
    y = _fake_forward(a, b, h0, lengths, reverse)
    if y.numel():
        a, b = matrices(lengths, a, b)
        T, M, N = b.shape
        way, lengths = plan(T, M, N, b.element_size(), b.device), dense(lengths)
        starts = carried(a, b, lengths, dense(h0), way, False, reverse)
        grid, options = (_tiles(M, N, way.sizes), way.K), {"num_warps": way.warps, "enable_fp_fusion": True}
        steps = (*a.stride(), *b.stride(), T, M, N, way.C)
        forward_kernel[grid](a, b, lengths, starts, y, *steps, reverse, **way.sizes, **options)
    return y


def recurrence(a: Tensor, b: Tensor, h0: Tensor, reverse: bool, _: bool) -> Tensor:
    """For other launchers, in place of `bptoolkit.ops.linear_recurrence.loop_fast` without shift."""
    return _launch_forward(a, b, h0, None, reverse)


def _fake_forward(a, b, h0, lengths, reverse):
    return torch.empty(b.shape, dtype=b.dtype, device=b.device)


def _launch_backward(
    dh: Tensor, a: Tensor, h0: Tensor | None, lengths: Tensor | None, reverse: bool, h: Tensor | None, need: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    da, db, dh0 = _fake_backward(dh, a, h0, lengths, reverse, h, need)
    if not dh.numel():
        return da, db, dh0.zero_()
    dh, a, h = matrices(lengths, dh, a, h if need[0] else None)
    T, M, N = dh.shape
    way, lengths = plan(T, M, N, dh.element_size(), dh.device), dense(lengths)
    starts = carried(a, dh, lengths, None, way, True, not reverse)
    outputs = (t if needed else None for t, needed in zip((da, db, dh0), need))
    steps = (*dh.stride(), *a.stride(), *((0, 0, 0) if h is None else h.stride()), T, M, N, way.C)
    grid, options = (_tiles(M, N, way.sizes), way.K), {"num_warps": way.warps, "enable_fp_fusion": True}
    first = dense(h0) if need[0] else None
    backward_kernel[grid](dh, a, h, first, lengths, starts, *outputs, *steps, not reverse, **way.sizes, **options)
    return da, db, dh0


def _fake_backward(dh, a, h0, lengths, reverse, h, need):
    shapes = (dh.shape, dh.shape, dh.shape[1:])
    return tuple(torch.empty(s if needed else (0,), dtype=dh.dtype, device=dh.device) for s, needed in zip(shapes, need))


FORWARD = operator("triton_linear_recurrence", _launch_forward, _fake_forward)
BACKWARD = operator("triton_linear_recurrence_backward", _launch_backward, _fake_backward)

# --- the rules ------------------------------------------------------------------------------------------------------------


def forward(a, b, h0, lengths, reverse):
    return FORWARD(a, b, h0, lengths, reverse)


def backward(dh, a, h0, lengths, reverse, h, need):
    wanted = (need.a, need.b, need.h0)
    grads = BACKWARD(dh, a, h0, lengths, reverse, h, list(wanted))
    return (*(g if needed else None for g, needed in zip(grads, wanted)), None)


def unsupported(a: Tensor, b: Tensor, h0: Tensor, lengths: Tensor | None, reverse: bool) -> str | None:
    """Why the kernel cannot take the call, or None."""
    return computed_in_float32(b)


KERNEL = Kernel(forward, backward, unsupported)


def specs(warp: int) -> list[Spec]:
    """The kernels at the shipped configurations: many elements a step and few; one row of them, and ragged rows in reverse."""
    every = []
    few = "few elements a step: with 4 bytes a thread there are more threads, and the loads of more steps are under way"
    for t, size in (("bf16", 2), ("fp32", 4)):
        for width, ragged in ((WIDE, False), (WIDE, True), (NARROW, False), (NARROW, True)):
            sizes = tile(32 if ragged else 1, 4096, width, size, warp)
            name = f"{t} {width} bytes{', ragged' * ragged}"
            for label, kernel, read, written in (
                ("", forward_kernel, "ab", ("y",)),
                (" backward", backward_kernel, ("dh", "a", "h"), ("h0", "da", "db", "dh0")),
                (" summary", summary_kernel, "ab", ()),
                (" carry", carry_kernel, "ab", ("h0",)),
            ):
                names = kernel.arg_names
                pointers = dict.fromkeys((*read, *written), f"*{t}")
                pointers |= {s: "*fp32" for s in ("p", "x", "starts") if s in names}
                pointers |= {"lengths": "*i64"} if ragged else {}
                strides = [f"{tensor[0]}{dim}" for tensor in read for dim in ("t", "m")]
                constants = {f"{tensor[0]}n": 1 for tensor in read} | sizes | {"DOWN": (kernel is backward_kernel) != ragged}
                constants |= {} if ragged else {"lengths": None}
                constants |= {"BACK": False} if "BACK" in names else {}
                types = pointers | dict.fromkeys(strides, "i32") | {s: "i32" for s in ("T", "M", "N", "C", "K") if s in names}
                aligned, narrow = (*pointers, *strides, "N"), few if width == NARROW else ""
                every.append(Spec(f"linear_recurrence{label} {name}", kernel, types, constants, aligned, 1, narrow=narrow))
    return every
