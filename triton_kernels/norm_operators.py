"""The two operators of layer_norm, rms_norm, add_norm and dropout_add_norm: launches of the kernels of `norms`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from bptoolkit.ops.layer_norm import rows
from bptoolkit.randomness import threshold
from bptoolkit.triton_kernels.kernel import WARP, computed_in_float32, dense, programs
from bptoolkit.triton_kernels.norms import (
    HELD,
    HELD_MASKED,
    LONG_TILE,
    LONGEST,
    backward_kernel,
    forward_kernel,
    long_backward_kernel,
    long_forward_kernel,
    tile,
)
from bptoolkit.triton_kernels.operator import operator


def _launch_forward(
    x: Tensor,
    a: Tensor | None,
    seed: Tensor | None,
    w: Tensor | None,
    b: Tensor | None,
    p: float,
    D: int,
    eps: float,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, s = x + a with a share p of x dropped if there is a seed, mean and rstd; s is empty without a, mean if not centred."""
    M, N = rows(x, D)
    y, s, mean, rstd = _fake_forward(x, a, seed, w, b, p, D, eps, centred)
    if not x.numel():
        return y, s, mean.zero_(), rstd.fill_(torch.nan if centred else eps**-0.5 if eps else torch.inf)
    x2, a2 = x.reshape(M, N), None if a is None else a.reshape(M, N)
    written = (y, None if a is None else s, mean if centred else None, rstd)
    pointers = (x2, a2, *map(dense, (seed, w, b)), *written)
    steps = (*x2.stride(), *((0, 0) if a2 is None else a2.stride()))
    BM, BN, warps = tile(N, WARP)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    if N <= HELD:
        grid = (triton.cdiv(M, BM),)
        forward_kernel[grid](*pointers, *steps, M, N, eps, *_dropout(seed, p), BM, BN, **options)
    else:
        long_forward_kernel[(M,)](*pointers, *steps, N, eps, *_dropout(seed, p), LONG_TILE, **options)
    return y, s, mean, rstd


def _fake_forward(x, a, seed, w, b, p, D, eps, centred):
    statistics = (*x.shape[: x.dim() - D], *(1,) * D)
    y, s = (torch.empty(x.shape if given else (0,), dtype=x.dtype, device=x.device) for given in (True, a is not None))
    m, r = (torch.empty(statistics if given else (0,), dtype=torch.float32, device=x.device) for given in (centred, True))
    return y, s, m, r


def _launch_backward(
    dy: Tensor | None,
    ds: Tensor | None,
    dm: Tensor | None,
    dr: Tensor | None,
    s: Tensor,
    w: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    seed: Tensor | None,
    p: float,
    D: int,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, da, dw and db, empty where they are not needed; dx is masked as x was, da is not."""
    M, N = rows(s, D)
    out = _fake_backward(dy, ds, dm, dr, s, w, mean, rstd, seed, p, D, need)
    if not s.numel():
        return *out[:2], *(t.zero_() for t in out[2:])
    dx, da, dw, db = (t if wanted else None for t, wanted in zip(out, need))
    held = HELD if seed is None else HELD_MASKED
    BM, BN, warps = tile(N, WARP, held)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    zero = torch.zeros((), dtype=s.dtype, device=s.device)
    s2, dy2 = s.reshape(M, N), (zero.expand(s.shape) if dy is None else dy).reshape(M, N)
    ds2 = None if ds is None else ds.reshape(M, N)
    steps = (*dy2.stride(), *((0, 0) if ds2 is None else ds2.stride()), *s2.stride())
    read = (dy2, ds2, *map(dense, (dm, dr)), s2, *map(dense, (w, mean, rstd, seed)))
    if held < N and not (dx is None and da is None):
        long_backward_kernel[(M,)](*read, dx, da, *steps, N, *_dropout(seed, p), LONG_TILE, **options)
        dx = da = None
    sums = [t for t in (dw, db) if t is not None]
    if dx is None and da is None and not sums:
        return out
    tiles = triton.cdiv(N, BN)
    P = min(triton.cdiv(M, BM), max(1, programs(s.device, warps) // tiles))
    partial = torch.empty(len(sums), P, N, dtype=torch.float32, device=s.device)
    dw_ = None if dw is None else partial[0]
    db_ = None if db is None else partial[-1]
    backward_kernel[(P, tiles)](*read, dx, da, dw_, db_, *steps, M, N, *_dropout(seed, p), BM, BN, **options)
    for total, part in zip(sums, partial):
        torch.sum(part, 0, out=total)
    return out


def _fake_backward(dy, ds, dm, dr, s, w, mean, rstd, seed, p, D, need):
    _, N = rows(s, D)
    slopes = (torch.empty(s.shape if wanted else (0,), dtype=s.dtype, device=s.device) for wanted in need[:2])
    sums = (torch.empty(N if wanted else 0, dtype=torch.float32, device=s.device) for wanted in need[2:])
    return *slopes, *sums


def _dropout(seed: Tensor | None, p: float) -> tuple[int, float]:
    """The threshold and the scale of what is kept."""
    return (0, 1.0) if seed is None else (threshold(p), 1 / (1 - p) if p < 1 else 0.0)


FORWARD = operator("triton_norm", _launch_forward, _fake_forward)
BACKWARD = operator("triton_norm_backward", _launch_backward, _fake_backward)


def gradients(dy, ds, dm, dr, s, w, b, mean, rstd, seed, p, D, need):
    """dx, da, dw and db in the dtypes and shapes of what they are gradients of; None where they are not needed."""
    dx, da, dw, db = BACKWARD(dy, ds, dm, dr, s, w, mean, rstd, seed, p, D, list(need))
    dw, db = (g.reshape(t.shape).to(t.dtype) if n and t is not None else None for g, t, n in zip((dw, db), (w, b), need[2:]))
    return dx if need[0] else None, da if need[1] else None, dw, db


def too_long(x: Tensor, D: int) -> str | None:
    """Why the kernels cannot take x, or None."""
    _, N = rows(x, D)
    if N > LONGEST:
        return f"a row of {N} elements is too long for the fused kernel, in which one program works on it: at most {LONGEST}"
    return computed_in_float32(x)
