"""What the pooling ops share: windows over the last one, two or three dimensions, and the two transposes of pooling.

Window j of a dimension covers the positions js + kd − p, k < K: stride s, dilation d, padding p. A reduction picks or sums
elements of a window; its transpose writes by index (`scatter`) or spreads over the window (`spread`).
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bptoolkit.function import unwatched
from bptoolkit.op import Op
from bptoolkit.ops.conv import _ints as ints
from bptoolkit.precision import wide
from bptoolkit.transforms import _transforms_active

BLOCK = 1 << 17  # elements of a block: all that a formula makes of it stays in the cache


def check_input(op: Op, n: int, x: Tensor, channels: bool = True) -> None:
    """Raise unless x is (N, C, *X) or (C, *X) with n sizes in X, none of them 0, nor C where `channels` says so."""
    op.check(x)
    shape = tuple(x.shape)
    if len(shape) > n + 2:
        raise ValueError(f"{op.name}: input has shape {shape}; it needs {n + 2} dimensions, or {n + 1} unbatched")
    if 0 in shape[-n - channels :]:
        raise ValueError(f"{op.name}: input has shape {shape}; only the number of samples may be 0")


def windows(op: Op, n: int, x: Tensor, options: tuple[Any, ...], ceil_mode: bool) -> tuple[Any, ...]:
    """kernel, stride, padding, dilation, each with n sizes, and ceil_mode; after the checks that go with them."""
    check_input(op, n, x)
    name, (kernel, stride, padding, dilation) = op.name, options
    kernel = ints(name, "kernel_size", kernel, n, 1)
    stride = (
        kernel if stride is None or (isinstance(stride, (tuple, list)) and not stride) else ints(name, "stride", stride, n, 1)
    )
    padding, dilation = ints(name, "padding", padding, n, 0), ints(name, "dilation", dilation, n, 1)
    for X, k, s, p, d in zip(x.shape[-n:], kernel, stride, padding, dilation):
        reach = d * (k - 1) + 1
        if p > k // 2:
            raise ValueError(f"{name}: padding={padding} is more than half of kernel_size={kernel}")
        if X + 2 * p - reach + (s - 1 if ceil_mode else 0) < 0:
            raise ValueError(
                f"{name}: kernel_size={kernel} with dilation={dilation} is larger than the input {tuple(x.shape)} "
                f"with padding={padding}"
            )
    return kernel, stride, padding, dilation, bool(ceil_mode)


def layout(n: int, x: Tensor) -> tuple[tuple[int, ...], bool]:
    """x's last n sizes, and whether it is channels_last, as its gradient is then too."""
    size = tuple(x.shape[-n:])
    if n == 1 or x.dim() != n + 2 or _transforms_active() or x.is_contiguous():
        return size, False
    return size, x.is_contiguous(memory_format=torch.channels_last if n == 2 else torch.channels_last_3d)


def scatter(t: Tensor, i: Tensor, size: tuple[int, ...], last: bool, add: bool) -> Tensor:
    """Zeros of `size` in the last dimensions, with t written to (or added up at) the places i of those, flattened.

    Args:
        t: (*B, *Y), or (N, C, *Y) if `last`.
        i: as t.
        size: the sizes X.
        last: channels_last: the dimensions are scattered in the order N, X, C.
        add: elements of t may meet in one place, and are added in float32 at least; else one of them is kept.
    """
    n, free = len(size), unwatched(t, i)
    t, i = flatten(t, n, last), flatten(i, n, last)
    dim = 1 if last else t.dim() - 1
    v = wide(t) if add else t
    zeros = v.new_zeros((*t.shape[:dim], prod(size), *t.shape[dim + 1 :]))
    if free:
        out = zeros.scatter_add_(dim, i, v) if add else zeros.scatter_(dim, i, v)
    else:
        out = zeros.scatter_add(dim, i, v) if add else zeros.scatter(dim, i, v)
    return unflatten(out.to(t.dtype), size, last)


def gather(t: Tensor, i: Tensor, n: int, last: bool) -> Tensor:
    """The transpose: t at the places i of its last n dimensions, flattened."""
    size, dim = tuple(i.shape[i.dim() - n :]), 1 if last else t.dim() - n
    return unflatten(flatten(t, n, last).gather(dim, flatten(i, n, last)), size, last)


def flatten(t: Tensor, n: int, last: bool) -> Tensor:
    """(N, C, *X) to (N, X, C) if `last`, else (*B, *X) to (*B, X)."""
    t = channels_to_end(t) if last else t
    k = t.dim() - n - last
    return t.reshape(*t.shape[:k], prod(t.shape[k : k + n]), *t.shape[k + n :])


def unflatten(t: Tensor, size: tuple[int, ...], last: bool) -> Tensor:
    """The opposite."""
    k = t.dim() - 1 - last
    t = t.reshape(*t.shape[:k], *size, *t.shape[k + 1 :])
    return channels_to_front(t) if last else t


def channels_to_end(t: Tensor) -> Tensor:
    """(N, C, *X) to (N, *X, C); not movedim, which torch's older vmap (`is_grads_batched`) does not have."""
    return t.permute(0, *range(2, t.dim()), 1)


def channels_to_front(t: Tensor) -> Tensor:
    """The opposite."""
    return t.permute(0, t.dim() - 1, *range(1, t.dim() - 1))


def by_samples(
    formula: Callable[[Tensor], Tensor], g: Tensor, size: tuple[int, ...], last: bool, blocks: bool = False
) -> Tensor:
    """formula(g), which takes (R, *Y) to (R, *X), or (R, *Y, C) to (R, *X, C) if `last`, each row on its own.

    Args:
        formula: computes in what is wide enough; g's dtype comes back.
        g: (*B, *Y), or (N, C, *Y) if `last`.
        size: the sizes X.
        last: channels_last, for g as for the result.
        blocks: the formula has several steps, and is to be run on a few rows at a time where that is possible.
    """
    dtype, free, g = g.dtype, blocks and g.device.type == "cpu" and unwatched(g), channels_to_end(g) if last else g
    k = g.dim() - len(size) - last
    lead, R, channels = g.shape[:k], prod(g.shape[:k]), g.shape[g.dim() - last :]
    g = g.reshape(R, *g.shape[k:])
    n = max(BLOCK // max(prod(size) * prod(channels), 1), 1)  # rows that stay in the cache
    if free and n < R:
        out = g.new_empty(R, *size, *channels)
        for part, into in zip(g.split(n), out.split(n)):
            into.copy_(formula(part))
    else:
        out = formula(g).to(dtype).contiguous()
    out = out.reshape(*lead, *size, *channels)
    return channels_to_front(out) if last else out


def repeat(g: Tensor, size: tuple[int, ...]) -> Tensor:
    """(R, *Y, …) to (R, *X, …): every element of the dimensions Y as often as it goes into X, in one copy."""
    n, R = len(size), g.shape[0]
    Y, rest = g.shape[1 : n + 1], g.shape[n + 1 :]
    g = g.reshape(R, *(d for y in Y for d in (y, 1)), *rest)
    g = g.expand(R, *(d for y, X in zip(Y, size) for d in (y, X // y)), *rest)
    return g.reshape(R, *size, *rest)


def spread(g: Tensor, dim: int, k: int, s: int, p: int, X: int) -> Tensor:
    """dx[m] = Σ g[j] over the windows j of a dimension that cover m, js − p ≤ m < js − p + k.

    Let m + p = sq + r with r < s, and k = sa + b with b < s. Position r of block q lies in window j = q − t if st + r < k,
    which is t < a, and t = a too if r < b: in each block only two values differ,
        A[q] = g[q] + … + g[q − a + 1] for r ≥ b,         B[q] = A[q] + g[q − a] for r < b.
    """
    a, b = k // s, k % s
    Q = -(-(X + p) // s)  # blocks
    before, after = (a if b else a - 1), Q - g.shape[dim]
    whole = before == 0 and type(after) is int and after == 0  # a graph for any size does not ask whether this one is
    h = g if whole else F.pad(g, (0, 0) * (g.dim() - 1 - dim) + (before, after))  # g[q] is h[q + before]
    if not b:
        values = [(box(h, dim, a), s)]
    elif not a:
        values = [(h, b), (torch.zeros_like(h), s - b)]
    else:
        A = box(h, dim, a).narrow(dim, 1, Q)
        values = [(A + h.narrow(dim, 0, Q), b), (A, s - b)]
    blocks = [v if s == 1 else v.unsqueeze(dim + 1).expand(*v.shape[: dim + 1], r, *v.shape[dim + 1 :]) for v, r in values]
    out = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim + 1)
    out = out if s == 1 else out.reshape(*g.shape[:dim], Q * s, *g.shape[dim + 1 :])
    if type(X) is not int:  # whether a view is contiguous would be asked, and bound to this size
        return out.index_select(dim, torch.arange(X, device=out.device) + p)
    return out.narrow(dim, p, X)


def box(h: Tensor, dim: int, w: int) -> Tensor:
    """Sums of w neighbours, out[i] = h[i] + … + h[i + w − 1], by doubling: about log₂ w additions."""
    if w == 1:
        return h
    n, half = h.shape[dim] - w + 1, box(h, dim, w // 2)
    out = half.narrow(dim, 0, n) + half.narrow(dim, w // 2, n)
    return out + h.narrow(dim, w - 1, n) if w % 2 else out
