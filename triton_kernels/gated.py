"""Gated linear units, fused: y = b f(a) in one pass, da and db in one pass. For the maths see the op of this name.

glu's halves are read where they are in x, and its backward writes both halves of dx; swiglu's two inputs may be the halves of
one tensor too. A gate that is off (reglu) blocks any cotangent, as in the eager rule.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bptoolkit.triton_kernels.activation import GELUS
from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.elementwise import in_order, matrices, memory_format, place, read, strides, tile, tiles, write
from bptoolkit.triton_kernels.functions import activate, chain
from bptoolkit.triton_kernels.kernel import WARP, Kernel, computed_in_float32
from bptoolkit.triton_kernels.operator import operator


@triton.jit(do_not_specialize=["M"])
def forward_kernel(a, b, y, am, an, bm, bn, M, N, NAME: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    m, n, mask = place(M, N, BM, BN)
    A = read(a, m, n, am, an, mask)  # BM BN
    B = read(b, m, n, bm, bn, mask)  # BM BN
    write(y, activate(A, NAME) * B, m, n, N, mask)


@triton.jit(do_not_specialize=["M"])
def backward_kernel(
    dy, a, b, ca, cb, da, db, y, dym, dyn, am, an, bm, bn, om, M, N, NAME: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """ca and cb, dense, are added to da and db, whose rows are om apart; y is the output once more, if it is wanted."""
    m, n, mask = place(M, N, BM, BN)
    DY = read(dy, m, n, dym, dyn, mask)  # BM BN
    A = read(a, m, n, am, an, mask)  # BM BN
    if b is not None:
        B = read(b, m, n, bm, bn, mask)  # BM BN
    if da is not None:
        DA = chain(DY * B, A, NAME)
        if ca is not None:
            DA += read(ca, m, n, N, 1, mask)
        write(da, DA, m, n, om, mask)
    if db is not None or y is not None:
        F = activate(A, NAME)  # BM BN
        if db is not None:
            DB = DY * F
            if cb is not None:
                DB += read(cb, m, n, N, 1, mask)
            write(db, DB, m, n, om, mask)
        if y is not None:
            write(y, F * B, m, n, N, mask)


def _launch_forward(a: Tensor, b: Tensor, name: str) -> Tensor:
    y = _fake_forward(a, b, name)
    if y.numel():
        _forward(y, name, *matrices(*in_order(memory_format(a), a, b)))
    return y


def _forward(y, name, M, N, tensors):
    BM, BN, warps = tile(M, N, WARP)
    shape = (*strides(*tensors), M, N, name, BM, BN)
    forward_kernel[tiles(M, N, BM, BN)](*tensors, y, *shape, num_warps=warps, enable_fp_fusion=True)


def _fake_forward(a, b, name):
    return torch.empty(a.shape, dtype=a.dtype, device=a.device, memory_format=memory_format(a))


def _launch_backward(dy: Tensor, a: Tensor, b: Tensor | None, name: str, need: list[bool]) -> tuple[Tensor, Tensor]:
    da, db = _fake_backward(dy, a, b, name, need)
    if a.numel():
        M, N, inputs = matrices(*in_order(memory_format(a), dy, a, b))
        launch_backward(inputs, (None, None), (da if need[0] else None, db if need[1] else None, None), N, M, N, name)
    return da, db


def launch_backward(inputs, more, outputs, om, M, N, name):
    """Launch the backward on matrices. inputs: dy, a, b; more: what is added to da, db; outputs: da, db, y; any may be None."""
    BM, BN, warps = tile(M, N, WARP)
    shape = (*strides(*inputs), om, M, N, name, BM, BN)
    backward_kernel[tiles(M, N, BM, BN)](*inputs, *more, *outputs, *shape, num_warps=warps, enable_fp_fusion=True)


def _fake_backward(dy, a, b, name, need):
    kw = {"dtype": a.dtype, "device": a.device}
    da, db = (torch.empty(a.shape, memory_format=memory_format(a), **kw) if n else torch.empty((0,), **kw) for n in need)
    return da, db


def _launch_glu(x: Tensor, dim: int) -> Tensor:
    y = _fake_glu(x, dim)
    if y.numel():
        rows, (b, a) = halves(x, x, dim)
        _forward(y, "sigmoid", *matrices(a, b, rows=rows))
    return y


def halves(t: Tensor, x: Tensor, dim: int) -> tuple[int, list[Tensor]]:
    """How many dimensions of t, in the order of x's memory, stand before glu's; and its two halves in that order."""
    (t,), d = in_order(memory_format(x), t), dim % x.dim()
    if memory_format(x) is not torch.contiguous_format and d:
        d = x.dim() - 1 if d == 1 else d - 1
    n = t.shape[d] // 2
    return d, [t.narrow(d, 0, n), t.narrow(d, n, n)]


def _fake_glu(x, dim):
    d = dim % x.dim()
    shape = (*x.shape[:d], x.shape[d] // 2, *x.shape[d + 1 :])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _launch_glu_backward(dy: Tensor, x: Tensor, dim: int) -> Tensor:
    dx = _fake_glu_backward(dy, x, dim)
    if x.numel():
        rows, (b, a) = halves(x, x, dim)
        _, (db, da) = halves(dx, x, dim)
        M, N, inputs = matrices(*in_order(memory_format(x), dy), a, b, rows=rows)
        da, db = da.view(M, N), db.view(M, N)
        launch_backward(inputs, (None, None), (da, db, None), da.stride(0), M, N, "sigmoid")
    return dx


def _fake_glu_backward(dy, x, dim):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


GLU_FORWARD = operator("triton_glu", _launch_glu, _fake_glu)
GLU_BACKWARD = operator("triton_glu_backward", _launch_glu_backward, _fake_glu_backward)
FORWARD = operator("triton_gated", _launch_forward, _fake_forward)
BACKWARD = operator("triton_gated_backward", _launch_backward, _fake_backward)


def glu_forward(x, dim):
    return GLU_FORWARD(x, dim)


def glu_backward(dy, x, dim):
    return GLU_BACKWARD(dy, x, dim)


def swiglu_forward(a, b):
    return FORWARD(a, b, "silu")


def swiglu_backward(dy, a, b, need):
    return wanted(BACKWARD(dy, a, b, "silu", list(need)), need)


def geglu_forward(a, b, approximate):
    return FORWARD(a, b, GELUS[approximate])


def geglu_backward(dy, a, b, approximate, need):
    return wanted(BACKWARD(dy, a, b, GELUS[approximate], list(need)), need)


def reglu_forward(a, b):
    return FORWARD(a, b, "relu")


def reglu_backward(dy, a, b, need):
    return wanted(BACKWARD(dy, a, b, "relu", list(need)), need)


def wanted(gradients, need):
    """The gradients that are needed, None for the others."""
    return tuple(g if n else None for g, n in zip(gradients, need))


def unsupported(first: Tensor, *others: object) -> str | None:
    """Why the kernels cannot take the call, or None."""
    return computed_in_float32(first)


GLU = Kernel(glu_forward, glu_backward, unsupported)
SWIGLU = Kernel(swiglu_forward, swiglu_backward, unsupported)
GEGLU = Kernel(geglu_forward, geglu_backward, unsupported)
REGLU = Kernel(reglu_forward, reglu_backward, unsupported)


def specs(warp: int) -> list[Spec]:
    """The kernels at the shipped configurations: one long row; the halves of longer rows; short rows, several to a tile."""
    every = []
    for t in ("bf16", "fp32"):
        for name, where, M, N in (
            ("silu", "dense", 1, 1 << 20),
            ("gelu", "dense", 1, 1 << 20),
            ("gelu_tanh", "dense", 1, 1 << 20),
            ("relu", "dense", 1, 1 << 20),
            ("silu", "halves", 4096, 11008),
            ("sigmoid", "halves", 4096, 64),
        ):
            BM, BN, warps = tile(M, N, warp)
            constants = {"an": 1, "bn": 1, "NAME": name, "BM": BM, "BN": BN}
            sizes = dict.fromkeys(("am", "bm", "M", "N"), "i32")
            pointers = dict.fromkeys(("a", "b", "y"), f"*{t}")
            label = f"gated {name} {where} {t}" if where == "dense" else f"gated {name} {where} of {N} {t}"
            every.append(Spec(label, forward_kernel, pointers | sizes, constants, (*pointers, "am", "bm", "N"), warps))
            pointers = dict.fromkeys(("dy", "a", "b", "da", "db"), f"*{t}")
            constants = constants | {"dyn": 1, "ca": None, "cb": None, "y": None}
            aligned = (*pointers, "dym", "am", "bm", "om", "N")
            types = pointers | sizes | {"dym": "i32", "om": "i32"}
            every.append(Spec(label.replace("gated", "gated backward", 1), backward_kernel, types, constants, aligned, warps))
    return every
