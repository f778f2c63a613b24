"""Replicas of public bugs that hide from contiguous tensors, one backward and one order: strides, written and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from faults.history_values import EPS, softmax, wide
from faults.record import Fault, Twin

CPU = {"device_type": "cpu"}


def read(t: Tensor, strides: Sequence[int] | None = None) -> Tensor:
    """`t` read from its first element on, at the strides a kernel takes it to have (None: contiguous); NaN past its end."""
    if not t.numel():
        return torch.zeros_like(t)
    if strides is None:
        strides = torch.empty(t.shape, device="meta").stride()
    where = torch.zeros((), dtype=torch.long)
    for n, stride in zip(t.shape, strides, strict=True):
        where = where[..., None] + torch.arange(n) * stride
    held = t.untyped_storage().nbytes() // t.element_size() - t.storage_offset()
    memory = t.as_strided((held,), (1,))
    past = max(0, int(where.max()) + 1 - held)
    return torch.cat([memory, memory.new_full((past,), float("nan"))])[where]


def as_is(dy: Tensor, xs: Sequence[Tensor]) -> Tensor:
    """At its own strides."""
    return dy


def raw(dy: Tensor, xs: Sequence[Tensor]) -> Tensor:
    """As if contiguous."""
    return read(dy)


def raw_if_dense_rows(dy: Tensor, xs: Sequence[Tensor]) -> Tensor:
    """As if contiguous, where the last stride is 1 as the kernel wants it; a gradient without any stride 1 is copied."""
    return read(dy) if dy.stride(-1) == 1 and 0 not in dy.stride() else dy


def raw_if_expanded(dy: Tensor, xs: Sequence[Tensor]) -> Tensor:
    """As if contiguous, where a stride is 0."""
    return read(dy) if 0 in dy.stride() else dy


def op(
    forward: Callable[..., Tensor | tuple[Tensor, ...]],
    backward: Callable[..., Sequence[Tensor | None]],
    gradient: Callable[[Tensor, Sequence[Tensor]], Tensor] = as_is,
    saved: Sequence[Callable[[Tensor], Tensor]] | None = None,
) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """A kernel: `forward(*inputs)` and `backward(cotangents, *inputs)` on wide tensors.

    `gradient` and `saved` say how the last cotangent, and each input in backward, are read.
    """

    class Kernel(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(**CPU)
        def forward(ctx, *xs):
            ctx.save_for_backward(*xs)
            out = forward(*map(wide, xs))
            return tuple(y.to(xs[0].dtype) for y in out) if isinstance(out, tuple) else out.to(xs[0].dtype)

        @staticmethod
        @once_differentiable
        @torch.amp.custom_bwd(**CPU)
        def backward(ctx, *dys):
            xs = ctx.saved_tensors
            dys = [*dys[:-1], gradient(dys[-1], xs)]
            seen = xs if saved is None else [how(x) for how, x in zip(saved, xs, strict=True)]
            grads = backward([wide(dy) for dy in dys], *map(wide, seen))
            return tuple(g.to(x.dtype) if n else None for g, x, n in zip(grads, xs, ctx.needs_input_grad, strict=True))

    return Kernel.apply


def rms(x):
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()


def rms_backward(dys, x):
    r = (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    return [r * dys[0] - x * r**3 * (dys[0] * x).mean(-1, keepdim=True)]


def attention(q, k, v):
    return (q @ k.mT).softmax(-1) @ v


def attention_backward(dys, q, k, v):
    p = (q @ k.mT).softmax(-1)
    dp = dys[0] @ v.mT
    ds = p * (dp - (dp * p).sum(-1, keepdim=True))
    return [ds @ k, ds.mT @ q, p.mT @ dys[0]]


def sums_and_state(k, v):
    """What a linear attention keeps: sums over time, and the final state."""
    return v.cumsum(0), k.mT @ v


def sums_and_state_backward(dys, k, v):
    dy, dstate = dys
    return [v @ dstate.mT, k @ dstate + dy.flip(0).cumsum(0).flip(0)]


def scaled_channels(x, w):
    return x * w[:, None, None]


def scaled_channels_backward(dys, x, w):
    return [dys[0] * w[:, None, None], (dys[0] * x).sum((0, 2, 3))]


def linear_backward(dys, x, w):
    return [dys[0] @ w, dys[0].mT @ x]


def swiglu(a, b):
    return F.silu(a) * b


def swiglu_backward(dys, a, b):
    s = a.sigmoid()
    return [dys[0] * b * s * (1 + a * (1 - s)), dys[0] * a * s]


def distances(x, y):
    return (x[:, None] - y).abs().sum(-1)


def distances_backward(dys, x, y):
    g = dys[0][..., None] * (x[:, None] - y).sign()
    return [g.sum(1), -g.sum(0)]


def logsumexp(x):
    return x.logsumexp(-1)


def linear_logsumexp(x, w):
    return (x @ w.mT).logsumexp(-1)


def silu(x):
    return x * x.sigmoid()


class SwiGLUOver(torch.autograd.Function):
    """Backward writes the gradients over what was saved, which are the inputs where these are contiguous."""

    @staticmethod
    def forward(ctx, a, b):
        a, b = a.contiguous(), b.contiguous()
        ctx.save_for_backward(a, b)
        return swiglu(wide(a), wide(b)).to(a.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        a, b = ctx.saved_tensors
        for x, g in zip((a, b), swiglu_backward([wide(dy)], wide(a), wide(b)), strict=True):
            x.data.copy_(g)  # the version counter does not see it
        return a.clone(), b.clone()


class RMSOver(torch.autograd.Function):
    """Backward writes its gradient over the one that it was given."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return rms(wide(x)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dy = dy.contiguous()
        with torch.autograd._unsafe_preserve_version_counter(dy):  # `.data` of a batched tensor ends the process
            dy.copy_(rms_backward([wide(dy)], wide(ctx.saved_tensors[0]))[0])
        return dy.clone()


class LogSumExp(torch.autograd.Function):
    """Computes its gradient in forward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(wide(x).softmax(-1))
        ctx.dtype = x.dtype
        return logsumexp(wide(x)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return (ctx.saved_tensors[0] * wide(dy)[:, None]).to(ctx.dtype)


class LogSumExpOnce(LogSumExp):
    """Scales the saved gradient where it is."""

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return ctx.saved_tensors[0].data.mul_(wide(dy)[:, None]).to(ctx.dtype, copy=True)


class LinearLogSumExp(torch.autograd.Function):
    """Computes both gradients in one kernel, and asks only whether that by x is needed."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return linear_logsumexp(wide(x), wide(w)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        if not ctx.needs_input_grad[0]:
            return None, None
        x, w = map(wide, ctx.saved_tensors)
        g = (x @ w.mT).softmax(-1) * wide(dy)[:, None]
        return (g @ w).to(dy.dtype), (g.mT @ x).to(dy.dtype)


class TanhKept(torch.autograd.Function):
    """Keeps its output as an attribute, and with it itself."""

    @staticmethod
    def forward(ctx, x):
        ctx.y = y = x.tanh()
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return dy * (1 - ctx.y.square())


class TanhCached(torch.autograd.Function):
    """Keeps its input as an attribute: no version is checked, nor is it freed."""

    @staticmethod
    def forward(ctx, x):
        ctx.cache = x.detach()
        return x.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return dy * (1 - ctx.cache.tanh().square())


class SiLUIntermediate(torch.autograd.Function):
    """Saves what it computed on the way, which is a constant to the second order."""

    @staticmethod
    def forward(ctx, x):
        s = x.sigmoid()
        ctx.save_for_backward(x, s)
        return x * s

    @staticmethod
    def backward(ctx, dy):
        x, s = ctx.saved_tensors
        return dy * s * (1 + x * (1 - s))


class TanhDetached(torch.autograd.Function):
    """Saves another tensor than the output it returns."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y.detach())
        return y

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        return dy * (1 - y * y)


class Softmax(torch.autograd.Function):
    """Differentiable to any order: saves its output."""

    @staticmethod
    def forward(ctx, x):
        y = x.softmax(-1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        return y * (dy - (dy * y).sum(-1, keepdim=True))


class SoftmaxSumWithoutGrad(Softmax):
    """The row sums are constants to the second order."""

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        with torch.no_grad():
            total = (dy * y).sum(-1, keepdim=True)
        return y * (dy - total)


class SoftmaxCutOff(Softmax):
    """The kernel's gradient has no graph, and nothing says so."""

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        with torch.no_grad():
            return y * (dy - (dy * y).sum(-1, keepdim=True))


ROWS, PAIR, LINEAR, IMAGES = "x: B N -> B N", "a: B N, b: B N -> B N", "x: B I, w: O I -> B O", "x: B C H W, w: C -> B C H W"
QKV, STATE, POINTS = "q: B T D, k: B S D, v: B S D -> B T D", "k: T D, v: T E -> T E, D E", "x: P M, y: R M -> P R"
CROSS, LSE = "x: B I, w: O I -> B", "x: B N -> B"


def _by_q(dy, xs):
    return read(dy, xs[0].stride())


_cat = op(rms, rms_backward, raw_if_dense_rows)
_past = op(rms, rms_backward, raw_if_expanded)
_dout = op(attention, attention_backward, _by_q)
_dstate = op(sums_and_state, sums_and_state_backward, raw)
_images = op(scaled_channels, scaled_channels_backward, raw)
_dense = op(F.linear, linear_backward, raw)
_inputs = op(swiglu, swiglu_backward, saved=(read, read))
_weight = op(F.linear, linear_backward, saved=(torch.detach, read))
_points = op(distances, distances_backward, saved=(read, torch.detach))


def _fault(name, history, about, inputs, fn, reference, caught_by):
    kind, _, family = about.rpartition(" ")
    caught = tuple(caught_by.split())
    return Fault(
        name=name, history=history, kind=kind, family=family, inputs=inputs, fn=fn, reference=reference, caught_by=caught
    )


DY, X, SECOND = "cotangent_layout", "input_layout", "double_backward"
KEPT, VERSION = "nothing_changed backward_twice", "version_counter memory"
ACTIVATION_2, SOFTMAX_2 = "second order activation", "second order softmax"
_over, _over_dy, _once, _alone = SwiGLUOver.apply, RMSOver.apply, LogSumExpOnce.apply, LinearLogSumExp.apply
_attribute, _cached, _inner, _detached = TanhKept.apply, TanhCached.apply, SiLUIntermediate.apply, TanhDetached.apply
_sums, _off = SoftmaxSumWithoutGrad.apply, SoftmaxCutOff.apply

FAULTS = [
    _fault("rows of a slice of a cat", "pytorch#194719", "layout norm", ROWS, _cat, rms, DY),
    _fault("gradient read past its end", "TransformerEngine PR#623", "layout norm", ROWS, _past, rms, DY),
    _fault("dout at the strides of q", "flash-attention#355", "layout attention", QKV, _dout, attention, f"{DY} {X}"),
    _fault("state's gradient as contiguous", "fla PR#871", "layout multi", STATE, _dstate, sums_and_state, DY),
    _fault("image gradient as contiguous", "mmcv PR#737", "layout conv", IMAGES, _images, scaled_channels, DY),
    _fault("dense gradient as contiguous", "apex PR#1601", "layout linear", LINEAR, _dense, F.linear, DY),
    _fault("saved inputs as contiguous", "prime-rl PR#3575", "layout activation", PAIR, _inputs, swiglu, X),
    _fault("saved weight as contiguous", "VeOmni PR#958", "layout linear", LINEAR, _weight, F.linear, X),
    _fault("saved points as contiguous", "pytorch#69997", "layout linear", POINTS, _points, distances, X),
    _fault("gradients over inputs", "Liger#272", "mutation activation", PAIR, _over, swiglu, KEPT),
    _fault("gradient over grad_output", "Liger#272", "mutation norm", ROWS, _over_dy, rms, KEPT),
    _fault("saved gradient scaled", "axolotl PR#3892", "state softmax", LSE, _once, logsumexp, "backward_twice"),
    _fault("weight alone", "efficient_ce PR#8", "contract linear", CROSS, _alone, linear_logsumexp, "grad_subsets"),
    _fault("output as attribute", "pytorch#25340", "state activation", ROWS, _attribute, torch.tanh, "memory"),
    _fault("input as attribute", "dgl PR#1060", "state activation", ROWS, _cached, torch.tanh, VERSION),
    _fault("saved intermediate", "pytorch#104040", ACTIVATION_2, ROWS, _inner, silu, SECOND),
    _fault("saved detached output", "pytorch#76185", ACTIVATION_2, ROWS, _detached, torch.tanh, SECOND),
    _fault("row sums without grad", "pytorch#58509", SOFTMAX_2, ROWS, _sums, softmax, SECOND),
    _fault("gradient cut off", "Liger softmax", SOFTMAX_2, ROWS, _off, softmax, SECOND),
]


def _twin(name, family, inputs, fn, reference):
    return Twin(name=f"history: {name}", family=family, inputs=inputs, fn=fn, reference=reference)


TWINS = [
    _twin("rms without weight", "norm", ROWS, op(rms, rms_backward), rms),
    _twin("attention", "attention", QKV, op(attention, attention_backward), attention),
    _twin("sums and state", "multi", STATE, op(sums_and_state, sums_and_state_backward), sums_and_state),
    _twin("scaled channels", "conv", IMAGES, op(scaled_channels, scaled_channels_backward), scaled_channels),
    _twin("linear", "linear", LINEAR, op(F.linear, linear_backward), F.linear),
    _twin("swiglu", "activation", PAIR, op(swiglu, swiglu_backward), swiglu),
    _twin("distances", "linear", POINTS, op(distances, distances_backward), distances),
    _twin("logsumexp", "softmax", LSE, LogSumExp.apply, logsumexp),
    _twin("softmax of any order", "softmax", ROWS, Softmax.apply, softmax),
]
