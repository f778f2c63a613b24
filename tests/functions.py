"""Functions with a forward and a backward of one's own, right ones and writers over memory, for the tests of the properties."""

from __future__ import annotations

import torch
from torch.autograd import Function


def sine(backward, forward=None):
    """sin, by a forward and a backward of one's own."""

    def plain(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    return type("Sine", (Function,), {"forward": staticmethod(forward or plain), "backward": staticmethod(backward)}).apply


def right(ctx, g):
    return g * ctx.saved_tensors[0].cos()


class Styled(Function):
    """The newer style."""

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    backward = staticmethod(right)


class Both(Function):
    """sin and cos, with cotangents that may be undefined."""

    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        s, c = x.sin(), x.cos()
        ctx.save_for_backward(s, c)
        return s, c

    @staticmethod
    def backward(ctx, gs, gc):
        s, c = ctx.saved_tensors
        found = [g for g in (None if gs is None else gs * c, None if gc is None else -gc * s) if g is not None]
        return sum(found) if found else None


class Matmul(Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w.mT, x.mT @ g


class Identity(Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, g):
        return g


class Masked(Function):
    """Dropout that keeps its mask."""

    @staticmethod
    def forward(ctx, x):
        mask = torch.rand(x.shape) < 0.5
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


class Replayed(Function):
    """Dropout that replays its mask from the state of the generator."""

    @staticmethod
    def forward(ctx, x):
        ctx.state = torch.get_rng_state()
        return x * (torch.rand(x.shape) < 0.5)

    @staticmethod
    def backward(ctx, g):
        now = torch.get_rng_state()
        torch.set_rng_state(ctx.state)
        mask = torch.rand(g.shape) < 0.5
        torch.set_rng_state(now)
        return g * mask


class Exp_(Function):
    """In place."""

    @staticmethod
    def forward(ctx, x):
        x.exp_()
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


def writes_cotangent(ctx, g):
    return g.mul_(ctx.saved_tensors[0].cos())


def writes_saved(ctx, g):
    (x,) = ctx.saved_tensors
    return g * x.data.cos_()


def copies_and_writes(ctx, x):
    z = x.clone()
    ctx.save_for_backward(z)
    return z.sin()
