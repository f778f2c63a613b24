"""Replicas of public bugs that give wrong values: formulas, tails of blocks, lost rows and steps, empty tensors, rounding.

Elementwise and rowwise kernels, opaque to autograd: forward and backward compute in float32 or wider and cast what they return.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from faults.record import Fault, Twin

HALF = (torch.float16, torch.bfloat16)
EPS = 1e-5


def wide(t: Tensor) -> Tensor:
    """In float32, if it is narrower."""
    return t.float() if t.dtype in HALF else t


def rounded(t: Tensor, dtype: torch.dtype) -> Tensor:
    """In a dtype."""
    return t.to(dtype)


def cut(t: Tensor, dtype: torch.dtype) -> Tensor:
    """In a dtype; bfloat16 by dropping the low 16 bits."""
    if dtype != torch.bfloat16:
        return t.to(dtype)
    return (t.contiguous().view(torch.int32) & -65536).view(torch.float32).to(dtype)


def op(
    forward: Callable[..., Tensor | tuple[Tensor, ...]],
    backward: Callable[..., Sequence[Tensor]],
    narrow: Callable[[Tensor, torch.dtype], Tensor] = rounded,
) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """A kernel: `forward(*inputs)` and `backward(needed, cotangents, *inputs)`, on wide tensors."""

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(*xs: Tensor) -> Tensor | tuple[Tensor, ...]:
            out = forward(*map(wide, xs))
            if isinstance(out, tuple):
                return tuple(narrow(y, xs[0].dtype) for y in out)
            return narrow(out, xs[0].dtype)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        @once_differentiable
        def backward(ctx, *dys):
            xs = ctx.saved_tensors
            needed = ctx.needs_input_grad
            grads = backward(needed, [wide(dy) for dy in dys], *map(wide, xs))
            return tuple(narrow(g, x.dtype) if n else None for g, x, n in zip(grads, xs, needed, strict=False))

    return Kernel.apply


def softmax(x):
    return x.softmax(-1)


def softmax_backward(needed, dys, x):
    y = x.softmax(-1)
    return [y * (dys[0] - (dys[0] * y).sum(-1, keepdim=True))]


def softmax_sums_along_columns(needed, dys, x):
    y = x.softmax(-1)
    along = torch.zeros_like(y[:1].sum(0)) if y.shape[0] else y.new_zeros(y.shape[1])
    n = min(y.shape)
    along[:n] = (dys[0] * y).sum(-1)[:n]
    return [y * (dys[0] - along)]


def softmax_without_normaliser(needed, dys, x):
    return [dys[0] * x.softmax(-1)]  # last_da is lost


def rms(x, w):
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * w


def _rms_backward(dy, x, w):
    """The gradient by x, and what is summed over rows to be that by w."""
    r = (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    g = dy * w
    return r * g - x * r**3 * (g * x).mean(-1, keepdim=True), dy * x * r


def rms_backward(needed, dys, x, w):
    dx, dw = _rms_backward(dys[0], x, w)
    return [dx, dw.sum(0)]


def rms_full_blocks(needed, dys, x, w):
    dx, dw = _rms_backward(dys[0], x, w)
    return [dx, dw[: max(1, len(x) // 16) * 16].sum(0)]


def rms_unfilled(needed, dys, x, w):
    dx, dw = _rms_backward(dys[0], x, w)
    total = torch.full_like(w, float("nan"))  # torch.empty
    for first in range(0, len(x), 32):
        part = dw[first : first + 32].sum(0)
        total = total + part if first else part
    return [dx, total]


def rms_divides_by_columns(needed, dys, x, w):
    dx, dw = _rms_backward(dys[0], x, w)
    rows = max(1, 64 // x.shape[1])  # a program takes
    return [dx, torch.stack([part.sum(0) for part in dw.split(rows)]).sum(0)]


def biased_tanh(x, b):
    return (x + b).tanh()


def biased_tanh_backward(needed, dys, x, b):
    dx = dys[0] * (1 - (x + b).tanh().square())
    return [dx, dx.sum(0)]


def biased_tanh_32_rows(needed, dys, x, b):
    dx = dys[0] * (1 - (x + b).tanh().square())
    return [dx, dx[:32].sum(0)]


def normalised(x):
    """Rows of at most length 1, and what they were multiplied by."""
    r = (x.square().sum(-1) + 1).rsqrt()
    return x * r[:, None], r


def normalised_to_row_0(x):
    y, r = normalised(x)
    rs = torch.zeros_like(r)
    rs[:1] = r[-1:]  # all programs write to the same place: the last one stays
    return y, rs


def normalised_backward(needed, dys, x):
    dy, dr = dys
    r = (x.square().sum(-1, keepdim=True) + 1).rsqrt()
    return [dy * r - (dr[:, None] + (dy * x).sum(-1, keepdim=True)) * r**3 * x]


def huber(x, t):
    return F.huber_loss(x, t, reduction="none")


def huber_backward(needed, dys, x, t):
    d = x - t
    g = dys[0] * torch.where(d.abs() < 1, d, d.sign())
    return [g, -g]


def huber_without_abs(needed, dys, x, t):
    d = x - t
    g = dys[0] * torch.where(d < 1, d, d.sign())
    return [g, -g]


def relu6_backward(needed, dys, x):
    return [torch.where((x > 0) & (x < 6), dys[0], torch.zeros_like(x))]


def relu6_closed(needed, dys, x):
    return [torch.where((x >= 0) & (x <= 6), dys[0], torch.zeros_like(x))]


def soft_entropy(x, p):
    return -(p * x.log_softmax(-1)).sum(-1)


def soft_entropy_backward(needed, dys, x, p):
    dy = dys[0][:, None]
    return [dy * (x.softmax(-1) * p.sum(-1, keepdim=True) - p), -dy * x.log_softmax(-1)]


def soft_entropy_of_distributions(needed, dys, x, p):
    dy = dys[0][:, None]
    return [dy * (x.softmax(-1) - p), -dy * x.log_softmax(-1)]


def silu_backward(needed, dys, x):
    s = x.sigmoid()
    return [dys[0] * s * (1 + x * (1 - s))]


def affine(x, w, b):
    return x * w + b


def affine_backward(needed, dys, x, w, b):
    return [dys[0] * w, (dys[0] * x).sum(0), dys[0].sum(0)]


def affine_too_few(needed, dys, x, w, b):
    return affine_backward(needed, dys, x, w, b)[: 3 if needed[2] else 2]


def scan(x, a):
    """h = tanh(a) h + x along time, from zero."""
    h, hs = torch.zeros_like(x[:, :1]), [x[:, :0]]
    for t in range(x.shape[1]):
        h = a[:, t : t + 1].tanh() * h + x[:, t : t + 1]
        hs.append(h)
    return torch.cat(hs, -1)


def scan_and_last(x, a):
    """The scan, and its state after all steps, doubled."""
    hs = scan(x, a)
    return hs, 2 * hs[:, -1] if x.shape[1] else x.sum(-1)


def _scan_backward(dy, dlast, x, a):
    """Gradients by x and a; the last state's is dlast."""
    k, hs = a.tanh(), scan(x, a)
    carry, dx, da = 2 * dlast, torch.zeros_like(x), torch.zeros_like(a)
    for t in reversed(range(x.shape[1])):
        carry = carry + dy[:, t]
        dx[:, t] = carry
        if t:
            da[:, t] = carry * hs[:, t - 1] * (1 - k[:, t].square())
        carry = carry * k[:, t]
    return [dx, da]


def scan_backward(needed, dys, x, a):
    return _scan_backward(dys[0], torch.zeros_like(dys[0].sum(-1)), x, a)


def scan_without_last_step(needed, dys, x, a):
    dx, da = scan_backward(needed, dys, x, a)
    da[:, -1:] = 0
    return [dx, da]


def scan_and_last_backward(needed, dys, x, a):
    return _scan_backward(*dys, x, a)


def scan_and_last_dropped(needed, dys, x, a):
    return _scan_backward(dys[0], torch.zeros_like(dys[1]), x, a)


def small_softmax(x):
    return 1e-4 * x.softmax(-1)


def _fault(name, history, about, inputs, fn, reference, caught_by):
    kind, family = about.split()
    caught = tuple(caught_by.split())
    return Fault(
        name=name, history=history, kind=kind, family=family, inputs=inputs, fn=fn, reference=reference, caught_by=caught
    )


ROWS, ROWS_W, PAIR, BIAS = "x: B N -> B N", "x: B N, w: N -> B N", "x: B N, t: B N -> B N", "x: B N, b: N -> B N"
TARGETS, AFFINE, SCALES = "x: B N, p: B N -> B", "x: B N, w: N, b: N -> B N", "x: B N -> B N, B"
SCAN, SCAN_LAST = "x: B T, a: B T -> B T", "x: B T, a: B T -> B T, B"

_tail = op(rms, rms_full_blocks)
_unfilled = op(rms, rms_unfilled)
_grid = op(rms, rms_divides_by_columns)
_lost = op(biased_tanh, biased_tanh_32_rows)
_row_0 = op(normalised_to_row_0, normalised_backward)
_along = op(softmax, softmax_sums_along_columns)
_last_da = op(softmax, softmax_without_normaliser)
_signed = op(huber, huber_without_abs)
_closed = op(F.relu6, relu6_closed)
_distributions = op(soft_entropy, soft_entropy_of_distributions)
_truncated = op(F.silu, silu_backward, cut)
_too_few = op(affine, affine_too_few)
_step = op(scan, scan_without_last_step)
_state = op(scan_and_last, scan_and_last_dropped)
_zeros = op(torch.zeros_like, lambda needed, dys, x: [torch.zeros_like(x)])

FAULTS = [
    _fault("tail block of rows not summed", "mamba PR#537", "shape norm", ROWS_W, _tail, rms, "sizes"),
    _fault("weight gradient of no rows unfilled", "pytorch#45201", "shape norm", ROWS_W, _unfilled, rms, "sizes"),
    _fault("grid of rows without columns", "attention-gym PR#260", "shape norm", ROWS_W, _grid, rms, "sizes"),
    _fault("rows past the first block lost", "attorch 194d60c", "shape activation", BIAS, _lost, biased_tanh, "sizes"),
    _fault("scales all in row 0", "Triton-distributed PR#185", "value norm", SCALES, _row_0, normalised, "forward_value"),
    _fault("row sums laid along columns", "attorch 3199f2d", "value softmax", ROWS, _along, softmax, "gradient_value"),
    _fault("gradient of the normaliser lost", "CoLT5#8", "value softmax", ROWS, _last_da, softmax, "gradient_value"),
    _fault("huber threshold with a sign", "attorch 7a43008", "value activation", PAIR, _signed, huber, "gradient_value values"),
    _fault("slope at both kinks", "attorch 0107f0f", "value activation", ROWS, _closed, F.relu6, "values"),
    _fault("targets sum to one", "Automodel PR#2428", "value softmax", TARGETS, _distributions, soft_entropy, "gradient_value"),
    _fault("bfloat16 by truncation", "triton#11217", "precision activation", ROWS, _truncated, F.silu, "dtypes"),
    _fault("one gradient too few without bias", "attorch c8ecdfb", "contract norm", AFFINE, _too_few, affine, "grad_subsets"),
    _fault("last step dropped", "accelerated-scan", "value recurrent", SCAN, _step, scan, "gradient_value"),
    _fault("last state's gradient dropped", "mamba", "value multi", SCAN_LAST, _state, scan_and_last, "gradient_value"),
    _fault("zeros for small outputs", "KernelBench#165", "value softmax", ROWS, _zeros, small_softmax, "forward_value"),
]


def _twin(name, family, inputs, fn, reference):
    return Twin(name=f"history: {name}", family=family, inputs=inputs, fn=fn, reference=reference)


TWINS = [
    _twin("softmax", "softmax", ROWS, op(softmax, softmax_backward), softmax),
    _twin("rms norm", "norm", ROWS_W, op(rms, rms_backward), rms),
    _twin("biased tanh", "activation", BIAS, op(biased_tanh, biased_tanh_backward), biased_tanh),
    _twin("normalised rows and scales", "norm", SCALES, op(normalised, normalised_backward), normalised),
    _twin("huber", "activation", PAIR, op(huber, huber_backward), huber),
    _twin("relu6", "activation", ROWS, op(F.relu6, relu6_backward), F.relu6),
    _twin("soft entropy", "softmax", TARGETS, op(soft_entropy, soft_entropy_backward), soft_entropy),
    _twin("silu", "activation", ROWS, op(F.silu, silu_backward), F.silu),
    _twin("affine", "norm", AFFINE, op(affine, affine_backward), affine),
    _twin("scan", "recurrent", SCAN, op(scan, scan_backward), scan),
    _twin("scan and last state", "recurrent", SCAN_LAST, op(scan_and_last, scan_and_last_backward), scan_and_last),
]
