"""What batch, group and instance normalization share: the backward over channels, and checks of arguments.

Maths     m = mean(x)    r = 1/√(mean((x − m)²) + eps)    y = (x − m) r w + b    with mean() over a pool of M elements
          with t = x − m and, per sample and channel, s₁ = Σᵢ dy and s₂ = Σᵢ dy t:
          db = Σₙ s₁                   dw = Σₙ r s₂
          dm' = dm − r Σ_pool w s₁     dr' = dr + Σ_pool w s₂     all that flows into m and into r
          dx = r w dy + dm'/M − r³ dr' t/M
          with m and r given (evaluation): dx = r w dy
Letters   x, y of shape N C *I; n over N samples, i over *I; w, b of shape C; m and r one per pool; dt is the gradient of the
          loss by t, in t's shape
Numerics  half inputs are normalized in float32, and m and r are float32
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from bptoolkit.blocks import BLOCK
from bptoolkit.function import unwatched
from bptoolkit.precision import wide
from bptoolkit.shapes import check_floating

_HALF = (torch.bfloat16, torch.float16)


class Batch:
    """One statistic per channel, over all samples: m and r have shape C."""

    def __init__(self, x: Tensor) -> None:
        self.M = x[:, :1].numel() if x.shape[1] else 0

    def sum(self, t: Tensor) -> Tensor:
        return t.sum(0)  # N C -> C

    def spread(self, t: Tensor) -> Tensor:
        return t[None]  # C -> 1 C


class Group:
    """One statistic per sample and group of channels: m and r have shape N G."""

    def __init__(self, x: Tensor, G: int) -> None:
        self.N, self.C, self.G = x.shape[0], x.shape[1], G
        self.K = self.C // G
        self.M = self.K * prod(x.shape[2:])

    def sum(self, t: Tensor) -> Tensor:
        return t.reshape(self.N, self.G, self.K).sum(2)  # N C -> N G

    def spread(self, t: Tensor) -> Tensor:
        return t[:, :, None].expand(self.N, self.G, self.K).reshape(self.N, self.C)  # N G -> N C


def backward(dy, dm, dr, x, w, b, m, r, pool, given, need):
    """The gradients of x, w and b; `given`: m and r do not depend on x."""
    dx = dw = db = None
    if dy is not None and need.b:
        db = dy.sum((0, *range(2, dy.dim())), dtype=b.dtype)  # C
    if not (need.x or need.w):
        return dx, dw, db
    N, C, M = x.shape[0], x.shape[1], max(pool.M, 1)
    mc, rc = pool.spread(m).expand(N, C), pool.spread(r)  # N C, N|1 C
    v = 1 if w is None else w.to(r.dtype)
    s1, s2 = sums(dy, x, mc, pool) if dy is not None and (need.w or not given) else (None, None)  # N C
    if s2 is not None and need.w:
        dw = (rc * s2).sum(0).to(w.dtype)  # C
    if not need.x:
        return dx, dw, db
    a, e, f = (v * rc).expand(N, C), None, None  # N C
    if not given:
        if dy is not None:
            dm = plus(dm, -r * pool.sum(v * s1))
            dr = plus(dr, pool.sum(v * s2))
        e, f = (None if t is None else pool.spread(t).expand(N, C) for t in (scaled(dm, 1 / M), scaled(dr, -(r**3) / M)))
    return combined(dy, x, mc, a, e, f), dw, db


def plus(t, u):
    return u if t is None else t + u


def scaled(t, c):
    return None if t is None else t * c


def sums(dy, x, mc, pool):
    """Σᵢ dy and Σᵢ dy (x − m), each N C, or 1 C where the samples are one pool."""
    plain = not (x.is_cpu and x.numel() and unwatched(dy, x, mc))
    inner, over_samples = tuple(range(2, x.dim())), x.dim() == 2 and isinstance(pool, Batch)
    if x.dim() == 2 and (plain or not over_samples):  # one position: the sums are the elements
        return wide(dy), wide(dy) * (wide(x) - mc)
    if plain:
        return wide(dy).sum(inner), (wide(dy) * (wide(x) - over(mc, x))).sum(inner)
    if over_samples:
        s1, s2 = dy.sum(0, keepdim=True, dtype=mc.dtype), mc.new_zeros(1, mc.shape[1])
    else:
        s1, s2 = mc.new_empty(mc.shape), mc.new_empty(mc.shape)
    t_ = None
    for xk, dyk, mk, *sk in blocks(x, dy, over(mc, x), *(() if over_samples else (s1, s2))):
        t_ = torch.empty_like(xk, dtype=mc.dtype) if t_ is None or t_.shape != xk.shape else t_
        dyk = wide(dyk)
        torch.sub(xk, mk, out=t_).mul_(dyk)
        if over_samples:
            s2 += t_.sum(0)
        else:
            torch.sum(dyk, inner, out=sk[0])
            torch.sum(t_, inner, out=sk[1])
    return s1, s2


def combined(dy, x, mc, a, e, f):
    """A dy + e + f (x − m), in x's shape and dtype; without dy, e or f if it is None."""
    mc, a, e, f = (t if t is None else over(t, x) for t in (mc, a, e, f))
    if dy is None or not (x.is_cpu and x.numel() and unwatched(dy, x, mc, a, e, f)):
        dx = 0 if dy is None else wide(dy) * a
        dx = dx if e is None else dx + e
        dx = dx if f is None else dx + (wide(x) - mc) * f
        return dx.expand(x.shape).to(x.dtype) if isinstance(dx, Tensor) else None
    dx, t_ = torch.empty_like(x), None
    if e is None:
        for xk, dyk, ak in blocks(dx, dy, a):
            torch.mul(dyk, ak, out=xk) if dyk.dtype == ak.dtype else xk.copy_(wide(dyk) * ak)
        return dx
    for dxk, xk, dyk, mk, ak, ek, fk in blocks(dx, x, dy, mc, a, e, f):
        t_ = dxk if dx.dtype == mc.dtype else torch.empty_like(xk, dtype=mc.dtype) if t_ is None or t_.shape != xk.shape else t_
        torch.sub(xk, mk, out=t_).mul_(fk).add_(ek).addcmul_(wide(dyk), ak)
        if t_ is not dxk:
            dxk.copy_(t_)
    return dx


def over(t, x):
    """T of shape N C over the positions of x."""
    return t.reshape(*t.shape, *(1,) * (x.dim() - 2))


def blocks(x, *others):
    """The tensors by blocks of samples, or of channels if there is one sample."""
    d = 0 if len(x) > 1 else 1
    size = max(1, BLOCK * x.shape[d] // x.numel())
    return zip(*(t.split(size, d) for t in (x, *others)))


def in_one_dtype(x: Tensor, *others: Tensor | None) -> bool:
    """Whether torch's kernel takes the tensors as they are and gives m and r in float32 or float64."""
    return x.dtype not in _HALF or (x.device.type == "cuda" and all(t is None or t.dtype == x.dtype for t in others))


def check_per_channel(op: str, x: Tensor, C: int, **tensors: Any) -> None:
    """Raise unless each tensor has shape C, x's device, and x's dtype or, beside a half x, float32."""
    for name, t in tensors.items():
        if t is None:
            continue
        check_floating(op, name, t)
        if tuple(t.shape) != (C,):
            raise ValueError(
                f"{op}: {name} has shape {tuple(t.shape)} but input {tuple(x.shape)} has {C} channels; it needs ({C},)"
            )
        if t.device != x.device:
            raise ValueError(f"{op}: {name} is on {t.device} but input is on {x.device}; they must be on one device")
        if t.dtype != x.dtype and (x.dtype not in _HALF or t.dtype != torch.float32):
            allowed = f"{x.dtype} or torch.float32" if x.dtype in _HALF else str(x.dtype)
            raise TypeError(f"{op}: {name} is {t.dtype} but input is {x.dtype}; it must be {allowed}")


def check_input(op: str, x: Any, least: int = 2) -> None:
    """Raise unless x is a tensor of floating point with `least` dimensions."""
    check_floating(op, "input", x)
    if x.dim() < least:
        raise ValueError(
            f"{op}: input has shape {tuple(x.shape)}, {x.dim()} dimensions; it needs at least {least}: (N, C, ...)"
        )


def check_eps(op: str, eps: float, positive: bool) -> None:
    if eps < 0 or (positive and eps == 0):
        raise ValueError(f"{op}: eps={eps} must be {'positive' if positive else 'at least 0'}")
