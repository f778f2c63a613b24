"""Faults and twins of attention, written as a flash kernel is: probabilities are recomputed from the row's maximum and sum."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from faults.record import Fault, Twin

FULL = "q: B T D, k: B S D, v: B S D -> B T D"
CAUSAL = "q: B T D, k: B T D, v: B T D -> B T D"
GROUPED = "q: B H T D, k: B T D, v: B T D -> B H T D"
HALF = (torch.float16, torch.bfloat16)
Grads = tuple[Tensor | None, ...]


def up(t: Tensor) -> Tensor:
    """In the precision of the computation."""
    return t.float() if t.dtype in HALF else t


def scale_of(q: Tensor) -> float:
    """One over the root of the head's size."""
    return 1 / math.sqrt(max(q.shape[-1], 1))


def hidden(s: Tensor, diagonal: int = 0) -> Tensor:
    """Scores, those of keys after the query at -inf."""
    return s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1 + diagonal), -torch.inf)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention."""
    return torch.softmax(q @ k.mT * scale_of(q), -1) @ v


def plain_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """No query sees a later key."""
    return torch.softmax(hidden(q @ k.mT * scale_of(q)), -1) @ v


def plain_grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All heads share keys and values."""
    return plain(q, k[:, None], v[:, None])


def delta_of(dp: Tensor, p: Tensor, dy: Tensor, q: Tensor) -> Tensor:
    """What softmax takes off in each row."""
    return (dp * p).sum(-1, keepdim=True)


def probabilities(s: Tensor, top: Tensor, total: Tensor) -> Tensor:
    """Normalised by the row's maximum and sum; by their log-sum-exp alone it would lose digits where scores are large."""
    return (s - top).exp() / total


def attention(
    causal: bool = False,
    delta: Callable[..., Tensor] = delta_of,
    p_of: Callable[..., Tensor] = probabilities,
    p_for_v: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda p, s, top: p,
    mask: Callable[[Tensor], Tensor] = hidden,
    dk_scale: Callable[[float], float] = lambda scale: scale,
    keys: Callable[[Tensor], Tensor] = lambda t: t,
) -> Callable[..., Tensor]:
    """Attention, its parts to be replaced. In autocast all is computed in the dtype of the inputs."""

    class Attention(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            s = up(q) @ up(k).mT * scale_of(q)
            s = hidden(s) if causal else s
            top = s.amax(-1, keepdim=True) if s.shape[-1] else s.new_zeros(*s.shape[:-1], 1)
            total = (s - top).exp().sum(-1, keepdim=True)
            ctx.save_for_backward(q, k, v, top, total)
            return (probabilities(s, top, total) @ up(v)).to(q.dtype)

        @staticmethod
        @torch.amp.custom_bwd(device_type="cpu")
        @once_differentiable
        def backward(ctx: Any, dy: Tensor) -> Grads:
            q, k, v, top, total = ctx.saved_tensors
            dtype, scale = q.dtype, scale_of(q)
            q, k, v, dy = up(q), up(k), up(v), up(dy.to(dtype))
            s = q @ k.mT * scale
            s = mask(s) if causal else s
            p = p_of(s, top, total)
            dp = dy @ v.mT
            ds = p * (dp - delta(dp, p, dy, q))
            return (
                (ds @ k * scale).to(dtype),
                keys(ds.mT @ q * dk_scale(scale)).to(dtype),
                keys(p_for_v(p, s, top).mT @ dy).to(dtype),
            )

    return Attention.apply


def grouped(over_heads: Callable[[Tensor], Tensor] = lambda t: t.sum(1)) -> Callable[..., Tensor]:
    """All query heads share keys and values; their gradients are summed over the heads."""

    class Grouped(torch.autograd.Function):
        @staticmethod
        def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            p = torch.softmax(up(q) @ up(k)[:, None].mT * scale_of(q), -1)
            return (p @ up(v)[:, None].to(p.dtype)).to(q.dtype), p

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
            ctx.mark_non_differentiable(output[1])
            ctx.save_for_backward(*inputs, output[1])

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dy: Tensor, _: Tensor) -> Grads:
            q, k, v, p = ctx.saved_tensors
            dtype, scale = q.dtype, scale_of(q)
            q, k, v, dy = up(q), up(k), up(v), up(dy.to(dtype))
            dp = dy @ v[:, None].mT
            ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
            return (ds @ k[:, None]).to(dtype), over_heads(ds.mT @ q).to(dtype), over_heads(p.mT.to(dy.dtype) @ dy).to(dtype)

    return lambda q, k, v: Grouped.apply(q, k, v)[0]


def blocks_of(block: int) -> Callable[[Tensor], Tensor]:
    """Keys are written in blocks; those of a last block that is not full stay zero, unless it is the only one."""

    def keep(t: Tensor) -> Tensor:
        n = t.shape[1]
        if n <= block or n % block == 0:
            return t
        return torch.cat((t[:, : n // block * block], torch.zeros_like(t[:, n // block * block :])), 1)

    return keep


def unnormalised(p: Tensor, s: Tensor, top: Tensor) -> Tensor:
    """Not divided by the row's sum."""
    return (s - top).exp()


def no_maximum(s: Tensor, top: Tensor, total: Tensor) -> Tensor:
    """Overflows when scores are large."""
    return s.exp() / s.exp().sum(-1, keepdim=True)


def fault(name: str, fn: Any, *caught: str, causal: bool = False, kind: str = "value") -> Fault:
    """A fault of attention."""
    return Fault(
        name=f"attention: {name}",
        family="attention",
        kind=kind,
        inputs=CAUSAL if causal else FULL,
        fn=fn,
        reference=plain_causal if causal else plain,
        caught_by=caught,
    )


FAULTS = [
    fault("scale missing in dk", attention(dk_scale=lambda _: 1.0), "gradient_value", "sizes"),
    fault("delta missing", attention(delta=lambda dp, *_: torch.zeros_like(dp[..., :1])), "gradient_value"),
    fault(
        "delta from the queries",
        attention(delta=lambda dp, p, dy, q: (dy * q).sum(-1, keepdim=True)),
        "gradient_value",
    ),
    fault("causal mask off by one in backward", attention(True, mask=lambda s: hidden(s, -1)), "gradient_value", causal=True),
    fault("dv from unnormalised probabilities", attention(p_for_v=unnormalised), "gradient_value"),
    fault("dk 0.5 % too large", attention(dk_scale=lambda s: 1.005 * s), "gradient_value"),
    fault("keys beyond full blocks of 16 dropped", attention(keys=blocks_of(16)), "sizes", kind="shape"),
    fault(
        "causal, keys beyond full blocks of 32 dropped", attention(True, keys=blocks_of(32)), "sizes", causal=True, kind="shape"
    ),
    fault("probabilities recomputed without the maximum", attention(p_of=no_maximum), "values", kind="range"),
    Fault(
        name="attention: dk and dv of the last head only",
        family="attention",
        kind="value",
        inputs=GROUPED,
        fn=grouped(lambda t: t[:, -1:].sum(1)),
        reference=plain_grouped,
        caught_by=("gradient_value", "sizes"),
    ),
]
TWINS = [
    Twin(name="attention", family="attention", inputs=FULL, fn=attention(), reference=plain),
    Twin(name="attention: causal", family="attention", inputs=CAUSAL, fn=attention(True), reference=plain_causal),
    Twin(name="attention: shared keys", family="attention", inputs=GROUPED, fn=grouped(), reference=plain_grouped),
]
