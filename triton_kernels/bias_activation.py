"""A bias and an activation, fused: y = f(x + b) in one pass, dx and db in one pass. For the maths see the op of this name.

forward    one program per tile of BM rows × BN columns
backward   a program has BN columns, walks over tiles of rows p, p + P, p + 2P, … and keeps its sums for db in registers; the P
           partial sums, in float32, are added up afterwards: no atomics, the same bits every time
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bptoolkit.ops.linear import rows
from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.elementwise import PER_THREAD, TILE, place, read, tile, tiles, write
from bptoolkit.triton_kernels.functions import activate, chain
from bptoolkit.triton_kernels.kernel import WARP, Kernel, computed_in_float32, dense, programs
from bptoolkit.triton_kernels.operator import operator

AT_A_TIME = 2  # times `programs`: 32 warps on each multiprocessor, as many as 64 registers a thread leave room for
NARROW = 256  # columns of a tile in backward, at most: there are more rows of tiles to share, and fewer sums for each


@triton.jit(do_not_specialize=["M"])
def forward_kernel(x, b, y, xm, xn, M, N, NAME: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    m, n, mask = place(M, N, BM, BN)
    B = tl.load(b + n, n < N, other=0.0).to(tl.float32)  # BN
    write(y, activate(read(x, m, n, xm, xn, mask) + B[None, :], NAME), m, n, N, mask)


@triton.jit(do_not_specialize=["M"])
def backward_kernel(dy, x, b, c, dx, db, y, dym, dyn, xm, xn, M, N, NAME: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """c, dense, is added to dx; y is the output once more, if it is wanted. x is y for a relu that has kept that, without b."""
    j, p = tl.program_id(0), tl.program_id(1)
    n = j.to(tl.int64) * BN + tl.arange(0, BN)  # BN
    columns = n < N
    if b is not None:
        B = tl.load(b + n, columns, other=0.0).to(tl.float32)  # BN
    dB = tl.zeros((BM, BN), tl.float32)
    for k in range(p, tl.cdiv(M, BM), tl.num_programs(1)):
        m = (tl.zeros((BM,), tl.int64) + k) * BM + tl.arange(0, BM)  # BM
        mask = (m < M)[:, None] & columns[None, :]
        X = read(x, m, n, xm, xn, mask)  # BM BN
        if b is not None:
            X += B[None, :]
        if dx is not None or db is not None:
            DX = chain(read(dy, m, n, dym, dyn, mask), X, NAME)  # BM BN
            if c is not None:
                DX += read(c, m, n, N, 1, mask)
            if dx is not None:
                write(dx, DX, m, n, N, mask)
            if db is not None:
                dB += tl.where(mask, DX, 0.0)  # past the last row dy is 0, but a slope at b need not be finite
        if y is not None:
            write(y, activate(X, NAME), m, n, N, mask)
    if db is not None:
        tl.store(db + p.to(tl.int64) * N + n, tl.sum(dB, 0), columns)


def tile_backward(N: int, warp: int) -> tuple[int, int, int]:
    """BM, BN and the number of warps, of `warp` threads each, for rows of N elements."""
    BN = min(triton.next_power_of_2(N), NARROW)
    return TILE // BN, BN, TILE // (PER_THREAD * warp)


def backward_into(dy, x, b, c, dx, y, need_b, name):
    """Launch the backward on matrices; dx and y, dense, are written, or are None. Returns db in float32, or an empty tensor."""
    M, N = x.shape
    db = torch.empty((N if need_b else 0,), dtype=torch.float32, device=x.device)
    if not x.numel():
        return db.zero_()
    BM, BN, warps = tile_backward(N, WARP)
    J = triton.cdiv(N, BN)
    P = min(triton.cdiv(M, BM), max(1, AT_A_TIME * programs(x.device, warps) // J))
    partial = torch.empty((P, N), dtype=torch.float32, device=x.device) if need_b else None
    shape = (*dy.stride(), *x.stride(), M, N, name, BM, BN)
    backward_kernel[(J, P)](dy, x, b, c, dx, partial, y, *shape, num_warps=warps, enable_fp_fusion=True)
    return db if partial is None else torch.sum(partial, 0, out=db)


def _launch_forward(x: Tensor, b: Tensor, name: str) -> Tensor:
    y = _fake_forward(x, b, name)
    if y.numel():
        x = rows(x)
        (M, N), BM, BN, warps = x.shape, *tile(len(x), x.shape[1], WARP)
        shape = (*x.stride(), M, N, name, BM, BN)
        forward_kernel[tiles(M, N, BM, BN)](x, dense(b), y, *shape, num_warps=warps, enable_fp_fusion=True)
    return y


def _fake_forward(x, b, name):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _launch_backward(dy: Tensor, x: Tensor, b: Tensor | None, name: str, need: list[bool]) -> tuple[Tensor, Tensor]:
    dx, _ = _fake_backward(dy, x, b, name, need)
    return dx, backward_into(rows(dy), rows(x), dense(b), None, dx if need[0] else None, None, need[1], name)


def _fake_backward(dy, x, b, name, need):
    dx = torch.empty(x.shape if need[0] else (0,), dtype=x.dtype, device=x.device)
    return dx, torch.empty((x.shape[-1] if need[1] else 0,), dtype=torch.float32, device=x.device)


FORWARD = operator("triton_bias_activation", _launch_forward, _fake_forward)
BACKWARD = operator("triton_bias_activation_backward", _launch_backward, _fake_backward)


def forward(x, b, activation):
    return FORWARD(x, b, activation)


def backward(dy, x, b, activation, need):
    dx, db = BACKWARD(dy, x, b, activation, list(need))
    return dx if need.x else None, db.to(b.dtype) if need.b else None


def relu_forward(x, b):
    return FORWARD(x, b, "relu")


def relu_backward(dy, y, need):
    dx, db = BACKWARD(dy, y, None, "relu", list(need))
    return dx if need.x else None, db.to(y.dtype) if need.b else None


def unsupported(x: Tensor, b: Tensor, activation: str = "relu") -> str | None:
    """Why the kernels cannot take the call, or None."""
    return computed_in_float32(x)


KERNEL = Kernel(forward, backward, unsupported)
RELU = Kernel(relu_forward, relu_backward, unsupported)


def specs(warp: int) -> list[Spec]:
    """The kernels at the shipped configurations: short rows, several to a tile; common rows; without b, for relu."""
    every = []
    for t in ("bf16", "fp32"):
        for name, N in (("gelu", 64), ("gelu", 4096), ("gelu_tanh", 4096), ("silu", 4096), ("relu", 4096)):
            BM, BN, warps = tile(4096, N, warp)
            pointers, sizes = dict.fromkeys(("x", "b", "y"), f"*{t}"), dict.fromkeys(("xm", "M", "N"), "i32")
            constants = {"xn": 1, "NAME": name, "BM": BM, "BN": BN}
            label = f"bias_activation {name} {N} {t}"
            every.append(Spec(label, forward_kernel, pointers | sizes, constants, (*pointers, "xm", "N"), warps))
            every.append(
                backward_spec(f"bias_activation backward {name} {N} {t}", name, N, t, warp, given=("b",) * (name != "relu"))
            )
    return every


def backward_spec(label: str, name: str, N: int, t: str, warp: int, given: tuple[str, ...]) -> Spec:
    """The backward of rows of N elements of type t; `given` of b, c and y are there."""
    BM, BN, warps = tile_backward(N, warp)
    pointers = dict.fromkeys(("dy", "x", "dx", *given), f"*{t}") | {"db": "*fp32"}
    types = pointers | dict.fromkeys(("dym", "xm", "M", "N"), "i32")
    constants = {"dyn": 1, "xn": 1, "b": None, "c": None, "y": None, "NAME": name, "BM": BM, "BN": BN}
    return Spec(label, backward_kernel, types, constants, (*pointers, "dym", "xm", "N"), warps)
