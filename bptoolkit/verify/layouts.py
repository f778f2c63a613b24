"""How a tensor lies in memory, and what values it has: the axes that a contiguous normal tensor never shows.

A layout takes a contiguous tensor and gives one of the same values with other strides; what lies between its elements is NaN,
so that a read past the strides is seen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def contiguous(t: Tensor) -> Tensor:
    """As it is."""
    return t


def transposed(t: Tensor) -> Tensor:
    """The last two dimensions change places in memory."""
    return t.mT.contiguous().mT if t.dim() > 1 else step(t)


def _between(t: Tensor, *shape: int) -> Tensor:
    """A buffer of a shape, with what shows when it is read: NaN, or 1 for integers."""
    return t.new_full(shape, float("nan") if t.is_floating_point() else 1)


def step(t: Tensor) -> Tensor:
    """Every second element along the last dimension of a wider tensor."""
    if t.dim() == 0:
        return offset(t)
    wide = _between(t, *t.shape[:-1], 2 * t.shape[-1] + 1)
    wide[..., 1::2] = t
    return wide[..., 1::2]


def sliced(t: Tensor) -> Tensor:
    """A slice of columns of a wider tensor, as the gradient of `torch.cat` is."""
    if t.dim() == 0:
        return offset(t)
    wide = _between(t, *t.shape[:-1], t.shape[-1] + 3)
    wide[..., 1:-2] = t
    return wide[..., 1:-2]


def offset(t: Tensor) -> Tensor:
    """Contiguous, but not at the start of its storage."""
    wide = _between(t, t.numel() + 3)
    wide[3:] = t.reshape(-1)
    return wide[3:].view(t.shape)


def channels_last(t: Tensor) -> Tensor:
    """The second dimension runs fastest (4 and 5 dimensions); else the first one does."""
    if t.dim() < 2:
        return step(t)
    order = [0, *range(2, t.dim()), 1] if t.dim() > 3 else [*range(1, t.dim()), 0]
    return t.permute(order).contiguous().permute([order.index(k) for k in range(t.dim())])


def expanded(t: Tensor) -> Tensor:
    """Stride 0 along the first dimension: the first row, repeated. The values change."""
    if t.dim() == 0 or t.shape[0] == 0:
        return t
    return t[:1].contiguous().expand(t.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f for f in (contiguous, transposed, step, sliced, offset, channels_last, expanded)
}


def random(t: Tensor) -> Tensor:
    """Contiguous normal values."""
    return t


def ones(t: Tensor) -> Tensor:
    """One 1, expanded with stride 0 in every dimension: what `.sum()` sends back."""
    return t.new_ones(()).expand(t.shape)


def rows(t: Tensor) -> Tensor:
    """One row, expanded over all others: what a sum over the leading dimensions sends back."""
    return t[:1].contiguous().expand(t.shape) if t.dim() and t.shape[0] else t


def columns(t: Tensor) -> Tensor:
    """One value a row, expanded along the last dimension: what a sum over it sends back."""
    return t[..., :1].contiguous().expand(t.shape) if t.dim() and t.shape[-1] else t


def zeros(t: Tensor) -> Tensor:
    """Zero everywhere."""
    return torch.zeros_like(t)


def one_hot(t: Tensor) -> Tensor:
    """One element alone."""
    flat = torch.zeros_like(t).reshape(-1)
    if t.numel():
        flat[t.numel() // 2] = 1.0
    return flat.view(t.shape)


COTANGENTS: dict[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f for f in (random, transposed, sliced, ones, rows, columns, zeros, step, offset, channels_last, one_hot)
}


KINKS = (0.0, 1.0, -1.0, 0.5, -0.5, 3.0, -3.0, 6.0, 2.0, -2.0, 0.25, 20.0)  # where piecewise functions change their formula


def _normal(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def _of(scale: float) -> Callable[[tuple[int, ...], torch.Generator], Tensor]:
    return lambda shape, g: scale * _normal(shape, g)


def _huge(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Normal values of which the largest is 1000: a cube overflows float16, whatever the size of the tensor."""
    t = _normal(shape, g)
    return t * (1000.0 / t.abs().max().clamp(min=1e-3)) if t.numel() else t


def _kinks(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Zeros, ties and the corners of piecewise functions, mixed with normal values."""
    table = torch.tensor(KINKS, dtype=torch.float64)
    picked = table[torch.randint(len(KINKS), shape, generator=g)]
    return torch.where(torch.rand(shape, generator=g) < 0.75, picked, _normal(shape, g))


def _constant(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Every row constant, each with its own value."""
    return _normal((*shape[:-1], 1), g).expand(shape) if shape else _normal(shape, g)


def _wide(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Magnitudes over six powers of ten."""
    exponent = torch.rand(shape, generator=g, dtype=torch.float64) * 6 - 4
    return _normal(shape, g).sign() * 10**exponent


def _shifted(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Small differences far from zero."""
    return 50 + _normal(shape, g)


VALUES: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "normal": _normal,
    "kinks": _kinks,
    "large": _of(30.0),
    "small": _of(1e-3),
    "huge": _huge,
    "tiny": _of(1e-6),
    "constant": _constant,
    "wide": _wide,
    "shifted": _shifted,
    "zero": lambda shape, g: torch.zeros(shape, dtype=torch.float64),
}
