"""What the tests of attention share: its tensors, its masks, tiles small enough to have rests, the dropout of a call."""

from __future__ import annotations

import functools
import math

import torch
import torch.utils.checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

import bptoolkit as bp
from bptoolkit import randomness
from bptoolkit.ops import attention_plain

sdpa = bp.functional.scaled_dot_product_attention
close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-10)
DOUBLE = torch.float64


def qkv(*batch, L=5, S=7, E=4, Ev=3, seed=0, dtype=DOUBLE):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((*batch, L, E), (*batch, S, E), (*batch, S, Ev))
    return tuple(torch.randn(s, generator=generator, dtype=DOUBLE).to(dtype).requires_grad_() for s in shapes)


def gradients(fn, xs, seed=1):
    out = fn(*xs)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(out.dtype)
    return out.detach(), torch.autograd.grad(out, xs, g, allow_unused=True)


def orders(fn, xs, top=3):
    """Outputs and all derivatives to the third, at random cotangents; −inf, the lse of a row that sees nothing, left out."""
    out = fn(*xs)
    out = tuple(o.nan_to_num(neginf=0.0) for o in (out if isinstance(out, tuple) else (out,)))
    generator = torch.Generator().manual_seed(1)
    dout = tuple(torch.randn(o.shape, generator=generator, dtype=DOUBLE).requires_grad_() for o in out)
    grads, found = torch.autograd.grad(out, xs, dout, create_graph=True), [*out]
    found += grads
    for k in range(2, top + 1):
        scalar = sum((g.sin() * torch.arange(g.numel()).reshape(g.shape).cos()).sum() for g in grads)
        kwargs = {"create_graph": k < top, "allow_unused": True, "materialize_grads": True}
        grads = torch.autograd.grad(scalar, (*dout, *xs), **kwargs)
        found += grads
    return [t.detach() for t in found]


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operator returned."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and not func.is_view:  # a view may be expanded
                self.most = max(self.most, t.numel())
        return out


MASKS = {
    "none": lambda: {},
    "causal": lambda: {"is_causal": True},
    "boolean": lambda: {"attn_mask": torch.rand(5, 7, generator=torch.Generator().manual_seed(5)) > 0.4},
    "padding": lambda: {"attn_mask": torch.arange(7) < torch.tensor([7, 4]).view(2, 1, 1, 1)},
    "heads": lambda: {"attn_mask": torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(5)) > 0.4},
    "every": lambda: {"attn_mask": torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(5)) > 0.4},
    "additive": lambda: {"attn_mask": torch.randn(2, 1, 5, 7, dtype=DOUBLE, generator=torch.Generator().manual_seed(5))},
    "row": lambda: {"attn_mask": torch.randn(7, dtype=DOUBLE, generator=torch.Generator().manual_seed(5))},
    "column": lambda: {"attn_mask": torch.randn(3, 5, 1, dtype=DOUBLE, generator=torch.Generator().manual_seed(5))},
}


def with_mask(fn, kwargs):
    """The function of q, k, v and, if it is additive, the mask; and the mask as a further input."""
    m = kwargs.get("attn_mask")
    if m is None or m.dtype == torch.bool:
        return lambda q, k, v: fn(q, k, v, **kwargs), ()
    return lambda q, k, v, m: fn(q, k, v, **{**kwargs, "attn_mask": m}), (m.clone().requires_grad_(),)


def keep_of(q, k, p):
    """The factor that the call after this one will use: the draw is repeated."""
    state = torch.get_rng_state()
    seed = randomness.draw_seed(q)
    torch.set_rng_state(state)
    return attention_plain.KEEP(q.detach(), k.detach(), seed, None, None, p)


def dropped(z, causal=False):
    def fn(q, k, v, m=None):
        s = q @ k.mT * q.shape[-1] ** -0.5 + (0 if m is None else m)
        if causal:
            s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
        return (s.softmax(-1) * z) @ v

    return fn
