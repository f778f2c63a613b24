"""Layer normalization, fused; and the launchers of all norms over rows. For the maths see the op of this name.

The kernels are those of `norms`: for rows of up to HELD elements each direction reads every tensor once and writes once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from bptoolkit.ops.layer_norm import RULE, rows
from bptoolkit.randomness import threshold
from bptoolkit.triton_kernels.aot import Spec
from bptoolkit.triton_kernels.kernel import WARP, Kernel, computed_in_float32, dense, programs
from bptoolkit.triton_kernels.norms import (
    HELD,
    HELD_MASKED,
    LONG_TILE,
    LONGEST,
    backward_kernel,
    compilations,
    forward_kernel,
    long_backward_kernel,
    long_forward_kernel,
    tile,
)
from bptoolkit.triton_kernels.operator import operator


def outputs(x: Tensor, D: int, like: int, statistics: int) -> list[Tensor]:
    """What forward writes: `like` tensors of x's shape, then as many statistics of its rows."""
    lead = x.shape[: x.dim() - D]
    every = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(like)]
    return every + [torch.empty((*lead, *(1,) * D), dtype=torch.float32, device=x.device) for _ in range(statistics)]


def gradients(x: Tensor, D: int, like: Sequence[bool], sums: Sequence[bool]) -> list[Tensor]:
    """What backward writes: tensors of x's shape, then sums over rows; empty ones for those that are not needed."""
    _, N = rows(x, D)
    every = [torch.empty(x.shape if needed else (0,), dtype=x.dtype, device=x.device) for needed in like]
    return every + [torch.empty(N if needed else 0, dtype=torch.float32, device=x.device) for needed in sums]


def run_forward(
    x: Tensor,
    w: Tensor | None,
    b: Tensor | None,
    D: int,
    eps: float,
    *,
    y: Tensor,
    rstd: Tensor,
    mean: Tensor | None = None,
    a: Tensor | None = None,
    s: Tensor | None = None,
    seed: Tensor | None = None,
    p: float = 0.0,
) -> None:
    """Write y, rstd and, if they are given, mean and s = x + a, with a share p of x dropped if there is a seed."""
    M, N = rows(x, D)
    if not x.numel():
        rstd.fill_(torch.nan if mean is not None else eps**-0.5 if eps else torch.inf)
        if mean is not None:
            mean.zero_()
        return
    x2, a2 = x.reshape(M, N), None if a is None else a.reshape(M, N)
    pointers = (x2, a2, dense(seed), dense(w), dense(b), y, s, mean, rstd)
    steps = (*x2.stride(), *((0, 0) if a2 is None else a2.stride()))
    BM, BN, warps = tile(N, WARP)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    if N <= HELD:
        grid = (triton.cdiv(M, BM),)
        forward_kernel[grid](*pointers, *steps, M, N, eps, *_dropout(seed, p), BM, BN, **options)
    else:
        long_forward_kernel[(M,)](*pointers, *steps, N, eps, *_dropout(seed, p), LONG_TILE, **options)


def run_backward(
    dy: Tensor | None,
    dm: Tensor | None,
    dr: Tensor | None,
    s: Tensor,
    w: Tensor | None,
    rstd: Tensor,
    D: int,
    *,
    dx: Tensor,
    dw: Tensor,
    db: Tensor | None = None,
    mean: Tensor | None = None,
    ds: Tensor | None = None,
    da: Tensor | None = None,
    seed: Tensor | None = None,
    p: float = 0.0,
) -> None:
    """Write those of dx, da, dw and db that are not empty; dx is masked as x was, da is not."""
    M, N = rows(s, D)
    dx, da, dw, db = (None if t is None or (not t.numel() and s.numel()) else t for t in (dx, da, dw, db))
    if not s.numel():
        for t in (dw, db):
            if t is not None:
                t.zero_()
        return
    held = HELD if seed is None else HELD_MASKED
    BM, BN, warps = tile(N, WARP, held)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    zero = torch.zeros((), dtype=s.dtype, device=s.device)
    s2, dy2 = s.reshape(M, N), (zero.expand(s.shape) if dy is None else dy).reshape(M, N)
    ds2 = None if ds is None else ds.reshape(M, N)
    statistics = (*map(dense, (w, mean, rstd)), dense(seed))
    steps = (*dy2.stride(), *((0, 0) if ds2 is None else ds2.stride()), *s2.stride())
    read = (dy2, ds2, *map(dense, (dm, dr)), s2, *statistics)
    if held < N and not (dx is None and da is None):
        long_backward_kernel[(M,)](*read, dx, da, *steps, N, *_dropout(seed, p), LONG_TILE, **options)
        dx = da = None
    sums = [t for t in (dw, db) if t is not None]
    if dx is None and da is None and not sums:
        return
    tiles = triton.cdiv(N, BN)
    P = min(triton.cdiv(M, BM), max(1, programs(s.device, warps) // tiles))
    partial = torch.empty(len(sums), P, N, dtype=torch.float32, device=s.device)
    dw_ = None if dw is None else partial[0]
    db_ = None if db is None else partial[-1]
    backward_kernel[(P, tiles)](*read, dx, da, dw_, db_, *steps, M, N, *_dropout(seed, p), BM, BN, **options)
    for out, part in zip(sums, partial):
        torch.sum(part, 0, out=out)


def _dropout(seed: Tensor | None, p: float) -> tuple[int, float]:
    """The threshold and the scale of what is kept."""
    return (0, 1.0) if seed is None else (threshold(p), 1 / (1 - p) if p < 1 else 0.0)


def too_long(x: Tensor, D: int) -> str | None:
    """Why the kernels of `norms` cannot take x, or None."""
    _, N = rows(x, D)
    if N > LONGEST:
        return f"a row of {N} elements is too long for the fused kernel, in which one program works on it: at most {LONGEST}"
    return computed_in_float32(x)


def _launch_forward(x: Tensor, w: Tensor | None, b: Tensor | None, D: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = _fake_forward(x, w, b, D, eps)
    run_forward(x, w, b, D, eps, y=y, mean=mean, rstd=rstd)
    return y, mean, rstd


def _fake_forward(x, w, b, D, eps):
    return tuple(outputs(x, D, 1, 2))


def _launch_backward(
    dy: Tensor | None,
    dm: Tensor | None,
    dr: Tensor | None,
    x: Tensor,
    w: Tensor | None,
    m: Tensor,
    r: Tensor,
    D: int,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dw, db = _fake_backward(dy, dm, dr, x, w, m, r, D, need)
    run_backward(dy, dm, dr, x, w, r, D, dx=dx, dw=dw, db=db, mean=m)
    return dx, dw, db


def _fake_backward(dy, dm, dr, x, w, m, r, D, need):
    return tuple(gradients(x, D, need[:1], need[1:]))


FORWARD = operator("triton_layer_norm", _launch_forward, _fake_forward)
BACKWARD = operator("triton_layer_norm_backward", _launch_backward, _fake_backward)


def forward(x, w, b, D, eps):
    return FORWARD(x, w, b, D, eps)


def backward(dy, dm, dr, x, w, b, m, r, D, need):
    if not (need.x or need.w):
        return RULE.backward(dy, dm, dr, x, w, b, m, r, D, need)  # x has not been kept
    dx, dw, db = BACKWARD(dy, dm, dr, x, w, m, r, D, list(need))
    return dx if need.x else None, shaped(dw, w, need.w), shaped(db, b, need.b)


def shaped(sums: Tensor, parameter: Tensor | None, need: bool) -> Tensor | None:
    """A sum over rows as the gradient of a parameter."""
    return sums.reshape(parameter.shape).to(parameter.dtype) if need and parameter is not None else None


def unsupported(x: Tensor, w: Tensor | None, b: Tensor | None, D: int, eps: float) -> str | None:
    """Why the kernel cannot take the call, or None."""
    return too_long(x, D)


KERNEL = Kernel(forward, backward, unsupported)


def specs(warp: int) -> list[Spec]:
    """The kernels at the shipped configurations."""
    return compilations("layer_norm", warp, centred=True)
