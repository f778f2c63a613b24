"""Faults and twins of functions that draw random numbers in forward, and of functions under autocast.

Masks are drawn as integers, so that the reference draws the same ones in every dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from faults.record import Fault, Twin

CPU = {"device_type": "cpu"}
SCALE = 10 / 7


def draw(x: Tensor) -> Tensor:
    """Keeps seven elements of ten."""
    return torch.randint(10, x.shape, device=x.device) >= 3


def plain_dropout(x: Tensor) -> Tensor:
    return x * draw(x) * SCALE


def keep(ctx: Any, x: Tensor, mask: Tensor) -> None:
    ctx.save_for_backward(mask)


def by_mask(ctx: Any, dy: Tensor) -> Tensor:
    return dy * ctx.saved_tensors[0] * SCALE


def dropout(
    backward: Callable[[Any, Tensor], Tensor] = by_mask,
    save: Callable[[Any, Tensor, Tensor], None] = keep,
) -> Callable[[Tensor], Tensor]:
    """Dropout; `save(ctx, x, mask)`."""

    class Dropout(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.state = torch.get_rng_state()
            mask = draw(x)
            save(ctx, x, mask)
            return x * mask * SCALE

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return backward(ctx, dy)

    return Dropout.apply


def keep_output(ctx: Any, x: Tensor, mask: Tensor) -> None:
    """The mask is to be read off the output: but a zero may have been kept."""
    ctx.save_for_backward(x * mask != 0)


def unscaled(ctx: Any, dy: Tensor) -> Tensor:
    return dy * ctx.saved_tensors[0]


def one_row(ctx: Any, dy: Tensor) -> Tensor:
    """The mask of the first row, for all rows."""
    return dy * ctx.saved_tensors[0][:1] * SCALE


def replayed(ctx: Any, dy: Tensor) -> Tensor:
    """Draws the mask again from the state before forward, and leaves the generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(ctx.state)
        return dy * draw(dy) * SCALE


def rewound(ctx: Any, dy: Tensor) -> Tensor:
    """Draws the mask again from the state before forward: what follows draws the same numbers as forward did."""
    torch.set_rng_state(ctx.state)
    return dy * draw(dy) * SCALE


def noise_of(x: Tensor) -> Tensor:
    """Numbers between -2 and 2."""
    return (torch.randint(-50, 51, x.shape, device=x.device) / 25).to(x.dtype)


def plain_sample(m: Tensor, s: Tensor) -> Tensor:
    return m + s * noise_of(s)


def sample(again: bool = False, sign: int = 1) -> Callable[[Tensor, Tensor], Tensor]:
    """m + s e, with e drawn in forward: the gradient of s takes the same e."""

    class Sample(Function):
        @staticmethod
        def forward(ctx: Any, m: Tensor, s: Tensor) -> Tensor:
            e = noise_of(s)
            ctx.save_for_backward(e)
            return m + s * e

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
            e = ctx.saved_tensors[0]
            return dy, dy * (noise_of(e) if again else sign * e)

    return Sample.apply


def attention(cast: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """softmax(x wᵀ) w; `cast`: backward computes in the dtype of what was saved."""

    class Attention(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return plain_attention(x, w)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
            x, w = ctx.saved_tensors
            dy = dy.to(x.dtype) if cast else dy
            p = (x @ w.mT).softmax(-1)
            dp = dy @ w.mT
            ds = p * (dp - (dp * p).sum(-1, keepdim=True))
            return ds @ w, ds.mT @ x + p.mT @ dy

    return Attention.apply


def plain_attention(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w.mT).softmax(-1) @ w


def accumulated(cast: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """A layer that accumulates the gradient of its weights in a buffer of their dtype."""

    class Linear(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return F.linear(x, w)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
            x, w = ctx.saved_tensors
            wide = dy.to(x.dtype)
            return wide @ w, torch.zeros_like(w).addmm_((wide if cast else dy).mT, x)

    return Linear.apply


def fixed(dtype: torch.dtype | None) -> Callable[[Tensor, Tensor], Tensor]:
    """A layer that has its inputs cast under autocast: to a dtype that is written down, or by autocast itself."""

    class Linear(Function):
        @staticmethod
        @torch.amp.custom_fwd(**CPU, cast_inputs=dtype)
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return F.linear(x, w)

        @staticmethod
        @once_differentiable
        @torch.amp.custom_bwd(**CPU)
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
            x, w = ctx.saved_tensors
            dy = dy.to(x.dtype)
            return dy @ w, dy.mT @ x

    return Linear.apply


RANDOM = {"family": "stochastic", "contract": {"random": True}}
DROPOUT = RANDOM | {"inputs": "x: B N -> B N", "reference": plain_dropout}
SAMPLE = RANDOM | {"inputs": "m: B N, s: B N -> B N", "reference": plain_sample}
LAYER = {"family": "linear", "inputs": "x: B I, w: O I -> B O", "reference": F.linear}
ATTENTION = {"family": "attention", "inputs": "x: B N, w: M N -> B N", "reference": plain_attention}


def _fault(name: str, kind: str, fn: Any, *caught_by: str, of: dict[str, Any]) -> Fault:
    return Fault(name=name, kind=kind, fn=fn, caught_by=caught_by, **of)


FAULTS = [
    _fault("dropout gradient without the scale", "value", dropout(unscaled), "gradient_value", of=DROPOUT),
    _fault("dropout mask read off the output", "range", dropout(save=keep_output), "values", of=DROPOUT),
    _fault("dropout mask of the first row", "randomness", dropout(one_row), "gradient_value", "sizes", of=DROPOUT),
    _fault("dropout rewinds the generator in backward", "randomness", dropout(rewound), "global_rng", of=DROPOUT),
    _fault("sample draws again for the scale", "randomness", sample(again=True), "gradient_value", of=SAMPLE),
    _fault("sample takes the scale to be subtracted", "value", sample(sign=-1), "gradient_value", of=SAMPLE),
    _fault("layer accumulates into float32 under autocast", "autocast", accumulated(False), "autocast", of=LAYER),
    _fault("layer casts to float16 whatever autocast says", "autocast", fixed(torch.float16), "autocast", of=LAYER),
    _fault("attention backward raises under autocast", "autocast", attention(False), "autocast", of=ATTENTION),
]

TWINS = [
    Twin(name="dropout of three in ten", fn=dropout(), **DROPOUT),
    Twin(name="dropout that replays its mask", fn=dropout(replayed), **DROPOUT),
    Twin(name="sample", fn=sample(), **SAMPLE),
    Twin(name="layer that accumulates after a cast", fn=accumulated(True), **LAYER),
    Twin(name="layer that autocast casts", fn=fixed(torch.bfloat16), **LAYER),
    Twin(name="attention that casts its cotangent", fn=attention(True), **ATTENTION),
]
