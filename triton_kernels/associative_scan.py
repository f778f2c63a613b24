"""A walk over the steps with an operator of the user's, both directions. For the maths see `bptoolkit.associative_scan`.

A tensor is T M N: steps, and the elements of one, which the operator combines each by itself. A program has a tile of them,
walks over the steps, and holds what it carries in float32 registers; the loads of U steps are under way at a time. The operator
and its vjp are `triton.jit` functions of tuples (of values, where the elements are one tensor), compiled into the walk.

forward    y₁ = x₁                      yₜ = yₜ₋₁ • xₜ
backward   from the last step, c = 0    d = dyₜ + c    (c, dxₜ) = vjp(d, yₜ₋₁, xₜ)    dx₁ = dy₁ + c
"""

# ruff: noqa: RUF005 (Triton's language knows no stars)
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from bptoolkit import kernels
from bptoolkit.triton_kernels import interpreter
from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.elementwise import place
from bptoolkit.triton_kernels.kernel import WARP, Kernel, computed_in_float32
from bptoolkit.triton_kernels.linear_recurrence import across
from bptoolkit.triton_kernels.operator import operator

BYTES, LOADS = 16, 12  # that a thread reads at once; so many of which are under way at a time

# --- the kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def inside(here, t, least, T):
    """Where there are elements, if least ≤ t < T."""
    each = tl.zeros(here.shape, tl.int64) + t  # the interpreter cannot put a scalar condition beside a block of them
    return here & (each >= least) & (each < T)


@triton.jit
def tiles(xs, strides, t, T, here, m, n):
    """A tile of each tensor at step t, zero where there is none; the strides are t m n, tensor after tensor."""
    found = ()
    for k in tl.static_range(len(xs)):
        at = xs[k] + (t * strides[3 * k] + m[:, None] * strides[3 * k + 1] + n[None, :] * strides[3 * k + 2])  # BM BN
        found = found + (tl.load(at, inside(here, t, 0, T), other=0.0).to(tl.float32),)
    return found


@triton.jit
def put(ys, values, t, M, N, here, m, n):
    """A tile of each tensor of results, which are dense."""
    for k in tl.static_range(len(ys)):
        at = ys[k] + (t * M * N + m[:, None] * N + n[None, :])
        tl.store(at, values[k].to(ys[k].dtype.element_ty), here)


@triton.jit(do_not_specialize=["T", "M"])
def forward_kernel(
    xs, ys, of_x, T, M, N, COMBINE: tl.constexpr, ONE: tl.constexpr, U: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    m, n, here = place(M, N, BM, BN)
    zero = tl.zeros((), tl.int64)
    y = tiles(xs, of_x, zero, T, here, m, n)
    put(ys, y, zero, M, N, here, m, n)
    for i in range(1, T, U):
        read = ()
        for s in tl.static_range(U):
            read = read + (tiles(xs, of_x, zero + i + s, T, here, m, n),)
        for s in tl.static_range(U):
            y = (COMBINE(y[0], read[s][0]),) if ONE else COMBINE(y, read[s])  # past the last step nothing is stored
            put(ys, y, zero + i + s, M, N, inside(here, zero + i + s, 0, T), m, n)


@triton.jit(do_not_specialize=["T", "M"])
def backward_kernel(
    dys, xs, ys, dxs, of_dy, of_x, of_y, T, M, N,
    VJP: tl.constexpr, ONE: tl.constexpr, U: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    m, n, here = place(M, N, BM, BN)
    zero = tl.zeros((), tl.int64)
    c = ()
    for _ in tl.static_range(len(xs)):
        c = c + (tl.zeros((BM, BN), tl.float32),)
    for i in range(0, T - 1, U):
        read = ()
        for s in tl.static_range(U):
            t = zero + (T - 1 - i - s)
            read = read + (
                (
                    tiles(dys, of_dy, t, T, here, m, n),
                    tiles(ys, of_y, t - 1, T, here, m, n),
                    tiles(xs, of_x, t, T, here, m, n),
                ),
            )
        for s in tl.static_range(U):
            t = zero + (T - 1 - i - s)
            dy, left, right = read[s]
            d = ()
            for k in tl.static_range(len(xs)):
                d = d + (dy[k] + c[k],)
            if ONE:
                dl, dr = VJP(d[0], left[0], right[0])
                dl, dr = (dl,), (dr,)
            else:
                dl, dr = VJP(d, left, right)
            put(dxs, dr, t, M, N, inside(here, t, 1, T), m, n)
            carried = ()
            for k in tl.static_range(len(xs)):
                carried = carried + (tl.where(inside(here, t, 1, T), dl[k], c[k]),)
            c = carried
    first = tiles(dys, of_dy, zero, T, here, m, n)
    d = ()
    for k in tl.static_range(len(xs)):
        d = d + (first[k] + c[k],)
    put(dxs, d, zero, M, N, here, m, n)


# --- the operators of the user --------------------------------------------------------------------------------------------

_KEYS: dict[Any, int] = {}
_PAIRS: list[tuple[Any, Any]] = []


def key_of(kernel: Callable[[], tuple[Any, Any]]) -> int:
    """The number of an operator and its vjp, by which torch's operators know them."""
    if kernel not in _KEYS:
        pair = kernel()
        if not isinstance(pair, tuple) or len(pair) != 2 or not all(isinstance(f, JITFunction) for f in pair):
            raise TypeError(f"associative_scan: kernel must return two triton.jit functions, fn and vjp, not {pair!r}")
        _KEYS[kernel] = len(_PAIRS)
        _PAIRS.append(pair)
        interpreter.ALSO.update(f.fn.__module__ for f in pair)
    return _KEYS[kernel]


def _functions(key: int) -> tuple[Any, Any]:
    combine, vjp = _PAIRS[key]
    return (interpreter.interpreted(combine), interpreter.interpreted(vjp)) if kernels.INTERPRETING else (combine, vjp)


# --- launches -------------------------------------------------------------------------------------------------------------


def tile(M: int, N: int, size: int, count: int, warp: int) -> dict[str, int]:
    """U, BM and BN for `count` tensors to be read at a step, the widest of elements of `size` bytes: one warp."""
    elements = BYTES // size * warp
    BN = elements if M == 1 else min(triton.next_power_of_2(N), elements)
    return {"U": max(1, LOADS // count), "BM": elements // BN, "BN": BN}


def steps_of(ts: Sequence[Tensor]) -> tuple[list[Tensor], tuple[int, ...]]:
    """The tensors as the kernels read them, and their strides."""
    ts = [across(t) for t in ts]
    return ts, tuple(s for t in ts for s in t.stride())


def _launch_forward(xs: list[Tensor], key: int) -> list[Tensor]:
    ys = _fake_forward(xs, key)
    T, M, N = xs[0].shape
    if ys[0].numel():
        xs, of_x = steps_of(xs)
        sizes = tile(M, N, max(t.element_size() for t in xs), len(xs), WARP)
        grid = (triton.cdiv(M, sizes["BM"]) * triton.cdiv(N, sizes["BN"]),)
        combine, _ = _functions(key)
        forward_kernel[grid](
            tuple(xs), tuple(ys), of_x, T, M, N, combine, len(xs) == 1, **sizes, num_warps=1, enable_fp_fusion=True
        )
    return ys


def _fake_forward(xs, key):
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in xs]


def _launch_backward(dys: list[Tensor], xs: list[Tensor], ys: list[Tensor], key: int) -> list[Tensor]:
    dxs = _fake_backward(dys, xs, ys, key)
    T, M, N = xs[0].shape
    if dxs[0].numel():
        (dys, of_dy), (xs, of_x), (ys, of_y) = steps_of(dys), steps_of(xs), steps_of(ys)
        sizes = tile(M, N, max(t.element_size() for t in xs), 3 * len(xs), WARP)
        grid = (triton.cdiv(M, sizes["BM"]) * triton.cdiv(N, sizes["BN"]),)
        _, vjp = _functions(key)
        given = (tuple(dys), tuple(xs), tuple(ys), tuple(dxs), of_dy, of_x, of_y, T, M, N, vjp, len(xs) == 1)
        backward_kernel[grid](*given, **sizes, num_warps=1, enable_fp_fusion=True)
    return dxs


def _fake_backward(dys, xs, ys, key):
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in xs]


FORWARD = operator("triton_associative_scan", _launch_forward, _fake_forward)
BACKWARD = operator("triton_associative_scan_backward", _launch_backward, _fake_backward)

# --- the rules ------------------------------------------------------------------------------------------------------------


def _flat(t: Tensor, dim: int) -> Tensor:
    """T M N, where the dimensions before dim are the rows."""
    return t.movedim(dim, 0).reshape(t.shape[dim], t.shape[:dim].numel(), t.shape[dim + 1 :].numel())


def _back(t: Tensor, like: Tensor, dim: int) -> Tensor:
    return t.view(t.shape[0], *like.shape[:dim], *like.shape[dim + 1 :]).movedim(0, dim).contiguous()


def of_operator(n: int, operator_of: Any) -> Kernel:
    """The rules for n tensors; `operator_of` gives the operator of a call's option."""

    def forward(*args: Any) -> Any:
        op, xs = operator_of(args[n]), args[:n]
        out = FORWARD([_flat(t, op.dims[0]) for t in xs], key_of(op.kernel))
        out = [_back(y, x, op.dims[0]) for y, x in zip(out, xs)]
        return out[0] if n == 1 else tuple(out)

    def backward(*args: Any) -> Any:
        dys, xs, ys, op = args[:n], args[n : 2 * n], args[2 * n : 3 * n], operator_of(args[3 * n])
        dys = [torch.zeros((), dtype=y.dtype, device=y.device).expand(y.shape) if d is None else d for d, y in zip(dys, ys)]
        flat = ([_flat(t, op.dims[0]) for t in ts] for ts in (dys, xs, ys))
        grads = [_back(g, x, op.dims[0]) for g, x in zip(BACKWARD(*flat, key_of(op.kernel)), xs)]
        return grads[0] if n == 1 else tuple(grads)

    def unsupported(*args: Any) -> str | None:
        op, xs = operator_of(args[n]), args[:n]
        if op.kernel is None:
            return "the operator has no fused form; see kernel="
        if len({(t.shape, d) for t, d in zip(xs, op.dims)}) > 1:
            return "the fused kernel combines element by element: all tensors must have one shape"
        if not all(t.is_floating_point() for t in xs):
            return "the fused kernel takes floating-point tensors alone"
        return next(filter(None, map(computed_in_float32, xs)), None)

    return Kernel(forward, backward, unsupported)


@triton.jit
def affine(f, g):
    """Two affine maps x -> a x + b, f first."""
    return g[0] * f[0], g[0] * f[1] + g[1]


@triton.jit
def affine_vjp(d, f, g):
    return (d[0] * g[0], d[1] * g[0]), (d[0] * f[0] + d[1] * f[1], d[1])


def specs(warp: int) -> list[Spec]:
    """The walks with an operator of two tensors."""
    every = []
    for t, size in (("bf16", 2), ("fp32", 4)):
        pair, ints = (f"*{t}",) * 2, ("i32", "i32", "constexpr") * 2
        for label, kernel, count in (("", forward_kernel, 2), (" backward", backward_kernel, 6)):
            tensors = [name for name in ("dys", "xs", "ys", "dxs") if name in kernel.arg_names]
            strides = [name for name in ("of_dy", "of_x", "of_y") if name in kernel.arg_names]
            types = dict.fromkeys(tensors, pair) | dict.fromkeys(strides, ints) | dict.fromkeys("TMN", "i32")
            constants = {"ONE": False, "VJP" if label else "COMBINE": affine_vjp if label else affine}
            constants |= {(name, k): 1 for name in strides for k in (2, 5)} | tile(1, 4096, size, count, warp)
            types = {name: types[name] for name in kernel.arg_names if name in types}
            aligned = (*((name, k) for name in tensors for k in (0, 1)), *((s, k) for s in strides for k in (0, 1, 3, 4)), "N")
            every.append(Spec(f"associative_scan{label} {t}", kernel, types, constants, aligned, 1))
    return every
