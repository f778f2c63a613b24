"""Dropout: of elements, of channels, and their self-normalizing forms.

Maths     dropout  y = a k ∘ x,  a = 1/(1 − p)                             dx = a k ∘ dy
          alpha    y = a (k ∘ x + α′ (1 − k)) + b                          dx = a k ∘ dy
                   a = 1/√((1 − p) (1 + p α′²)),  b = −a p α′              so that mean 0 and variance 1 stay
          p = 1    y = 0 ∘ x                                               dx = 0 ∘ dy
Letters   x, y of one shape (*B); k the mask, 1 with probability 1 − p, else 0, of x's shape, or of its first `lead`
          dimensions and 1 … 1; p the share dropped; α′ = −λα of SELU, −1.7581; s the seed, 2 numbers
Numerics  the mask is not kept: k is a hash of s and the element's index, computed again in backward (`bptoolkit.randomness`);
          half tensors are computed in float32; 0 · ∞ is NaN, as in torch
Source    Hinton et al., arXiv 1207.0580; Srivastava et al. 2014, section 4; channels: Tompson et al. 2015, section 3.2;
          alpha: Klambauer et al., "Self-Normalizing Neural Networks", 2017, section 3
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bptoolkit import randomness
from bptoolkit.blocks import by_elements
from bptoolkit.cases import Case, Draw
from bptoolkit.function import Rule
from bptoolkit.op import Op
from bptoolkit.ops.elementwise import refuse_leaf
from bptoolkit.precision import wide
from bptoolkit.shapes import check_floating

DROPPED = -1.7580993408473766  # α′ = −λα of SELU: its limit at −∞


def affine(p: float, alpha: bool) -> tuple[float, float, float]:
    """y = x (a k) + (c k + b)."""
    p = float(p)  # a constant of the graph, where Dynamo has made it a symbol
    if p == 1:
        return 0.0, 0.0, 0.0
    if not alpha:
        return 1 / (1 - p), 0.0, 0.0
    a = 1 / sqrt((1 - p) * (1 + p * DROPPED * DROPPED))
    return a, -a * DROPPED, a * DROPPED * (1 - p)


def masked(formula, t, s, p, lead):
    """formula(t, k), k being the mask in t's dtype."""
    shape = t.shape[:lead]
    k = randomness.keep(s, shape, p).view((*shape, *(1,) * (t.dim() - lead)))

    def rule(t, k):
        return formula(wide(t), k.to(wide(t).dtype)).to(t.dtype)

    return by_elements(rule, t, k) if lead == t.dim() else rule(t, k)


def forward(x, s, p, lead, alpha):
    a, c, b = affine(p, alpha)
    return masked(lambda x, k: x * (k * a) + (k * c + b) if c else x * (k * a), x, s, p, lead)


def backward(dy, s, p, lead, alpha):
    a, _, _ = affine(p, alpha)
    return masked(lambda dy, k: dy * (k * a), dy, s, p, lead), None


def kernel():
    from bptoolkit.triton_kernels.dropout import KERNEL

    return KERNEL


RULE = Rule("dropout", forward, backward, inputs="x s", outputs="y", kernel=kernel)


def run(op: Op, x: Tensor, p: float, training: bool, inplace: bool, backend: str, lead: int | None, alpha: bool) -> Tensor:
    """What the six functions have in common."""
    check_floating(op.name, "input", x)
    check_share(op.name, p)
    lead = x.dim() if lead is None else lead
    backend = op.pick(RULE, backend, x, None, p, lead, alpha)  # the seed is not drawn yet
    if not training or p == 0 or x.numel() == 0:
        return x
    if inplace:
        refuse_leaf(op.name, x)
    y = RULE(x, randomness.draw_seed(x), float(p), lead, alpha, backend=backend)
    return x.copy_(y) if inplace else y


def check_share(op: str, p: float) -> None:
    """Raise unless p is a probability."""
    if not 0 <= p <= 1:
        raise ValueError(f"{op}: p={p}; the probability of an element to be dropped lies between 0 and 1")


def check_dims(op: str, x: Any, allowed: tuple[int, ...] | None) -> None:
    """Raise for an input without channels; warn, as torch does, of one that has not the dimensions it is made for."""
    check_floating(op, "input", x)
    if x.dim() < 2:
        raise ValueError(f"{op}: input has shape {tuple(x.shape)}; it needs a batch or channel dimension and one more")
    if allowed is not None and x.dim() not in allowed:
        warnings.warn(
            f"{op}: input has {x.dim()} dimensions and not {' or '.join(map(str, allowed))}, which torch deprecates; "
            "use dropout to drop elements",
            stacklevel=3,
        )


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, backend: str = "auto") -> Tensor:
    """Zero elements with probability p and divide the others by 1 − p, as `torch.nn.functional.dropout`.

    The mask is another one than torch's for the same seed. `torch.manual_seed` governs it.

    Args:
        input: (*B), floating point.
        p: the probability of an element to be dropped, in [0, 1].
        training: if not, the input itself is returned.
        inplace: write the result over the input, and return the input.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B), of the input's dtype.

    Raises:
        TypeError: the input is not a tensor of floating point.
        ValueError: p is outside [0, 1], or the named backend cannot run the call.
        RuntimeError: inplace=True and the input is a leaf that requires grad; or vmap with randomness="error".
    """
    return run(DROPOUT, input, p, training, inplace, backend, None, False)


def dropout1d(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, backend: str = "auto") -> Tensor:
    """Zero whole channels of (N, C, L) or (C, L), as `torch.nn.functional.dropout1d`.

    Args:
        input: (N, C, L) or (C, L), floating point.
        p: the probability of a channel to be dropped, in [0, 1].
        training: if not, the input itself is returned.
        inplace: write the result over the input, and return the input.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        The input's shape and dtype.

    Raises:
        TypeError: the input is not a tensor of floating point.
        ValueError: p is outside [0, 1], the input has not 2 or 3 dimensions, or the named backend cannot run the call.
        RuntimeError: inplace=True and the input is a leaf that requires grad; or vmap with randomness="error".
    """
    check_dims("dropout1d", input, None)
    if input.dim() > 3:
        raise ValueError(f"dropout1d: input has shape {tuple(input.shape)}; it needs (N C L) or (C L)")
    return run(DROPOUT1D, input, p, training, inplace, backend, input.dim() - 1, False)


def dropout2d(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, backend: str = "auto") -> Tensor:
    """Zero whole channels of (N, C, H, W), as `torch.nn.functional.dropout2d`.

    Args:
        input: (N, C, H, W), floating point; three dimensions are taken for (N, C, L), as torch does.
        p: the probability of a channel to be dropped, in [0, 1].
        training: if not, the input itself is returned.
        inplace: write the result over the input, and return the input.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        The input's shape and dtype.

    Raises:
        TypeError: the input is not a tensor of floating point.
        ValueError: p is outside [0, 1], the input has fewer than 2 dimensions, or the named backend cannot run the call.
        RuntimeError: inplace=True and the input is a leaf that requires grad; or vmap with randomness="error".
    """
    check_dims("dropout2d", input, (3, 4))
    return run(DROPOUT2D, input, p, training, inplace, backend, 2, False)


def dropout3d(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, backend: str = "auto") -> Tensor:
    """Zero whole channels of (N, C, D, H, W) or (C, D, H, W), as `torch.nn.functional.dropout3d`.

    Args:
        input: (N, C, D, H, W) or (C, D, H, W), floating point.
        p: the probability of a channel to be dropped, in [0, 1].
        training: if not, the input itself is returned.
        inplace: write the result over the input, and return the input.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        The input's shape and dtype.

    Raises:
        TypeError: the input is not a tensor of floating point.
        ValueError: p is outside [0, 1], the input has fewer than 2 dimensions, or the named backend cannot run the call.
        RuntimeError: inplace=True and the input is a leaf that requires grad; or vmap with randomness="error".
    """
    check_dims("dropout3d", input, (4, 5))
    return run(DROPOUT3D, input, p, training, inplace, backend, 2 if input.dim() == 5 else 1, False)


def alpha_dropout(
    input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False, *, backend: str = "auto"
) -> Tensor:
    """Set elements to −λα of SELU with probability p, and keep mean 0 and variance 1, as `torch.nn.functional.alpha_dropout`.

    Args:
        input: (*B), floating point.
        p: the probability of an element to be dropped, in [0, 1].
        training: if not, which is the default, the input itself is returned.
        inplace: write the result over the input, and return the input.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        (*B), of the input's dtype.

    Raises:
        TypeError: the input is not a tensor of floating point.
        ValueError: p is outside [0, 1], or the named backend cannot run the call.
        RuntimeError: inplace=True and the input is a leaf that requires grad; or vmap with randomness="error".
    """
    return run(ALPHA, input, p, training, inplace, backend, None, True)


def feature_alpha_dropout(
    input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False, *, backend: str = "auto"
) -> Tensor:
    """`alpha_dropout` of whole channels, as `torch.nn.functional.feature_alpha_dropout`.

    Args:
        input: (N, C, *D), floating point.
        p: the probability of a channel to be dropped, in [0, 1].
        training: if not, which is the default, the input itself is returned.
        inplace: write the result over the input, and return the input.
        backend: "auto", "eager" or "triton"; see `bptoolkit.choose`.

    Returns:
        The input's shape and dtype.

    Raises:
        TypeError: the input is not a tensor of floating point.
        ValueError: p is outside [0, 1], the input has fewer than 2 dimensions in training, or the named backend cannot run
            the call.
        RuntimeError: inplace=True and the input is a leaf that requires grad; or vmap with randomness="error".
    """
    if training:
        check_dims("feature_alpha_dropout", input, None)
    return run(FEATURE_ALPHA, input, p, training, inplace, backend, 2, True)


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` with the backward above; same arguments, another mask for the same seed."""

    backend: str = "auto"  # an instance may set its own; see `bptoolkit.swap`

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training, self.inplace, backend=self.backend)


class Dropout1d(nn.Dropout1d):
    """`torch.nn.Dropout1d` with the backward above; same arguments, another mask for the same seed."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return dropout1d(input, self.p, self.training, self.inplace, backend=self.backend)


class Dropout2d(nn.Dropout2d):
    """`torch.nn.Dropout2d` with the backward above; same arguments, another mask for the same seed."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return dropout2d(input, self.p, self.training, self.inplace, backend=self.backend)


class Dropout3d(nn.Dropout3d):
    """`torch.nn.Dropout3d` with the backward above; same arguments, another mask for the same seed."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return dropout3d(input, self.p, self.training, self.inplace, backend=self.backend)


class AlphaDropout(nn.AlphaDropout):
    """`torch.nn.AlphaDropout` with the backward above; same arguments (inplace has no effect, as in torch)."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return alpha_dropout(input, self.p, self.training, backend=self.backend)


class FeatureAlphaDropout(nn.FeatureAlphaDropout):
    """`torch.nn.FeatureAlphaDropout` with the backward above; same arguments (inplace has no effect, as in torch)."""

    backend: str = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return feature_alpha_dropout(input, self.p, self.training, backend=self.backend)


def reference_of(lead: Callable[[Tensor], int], alpha: bool) -> Callable[..., Tensor]:
    """The paper's formula, with the mask that the same state of torch's generator gives."""

    def reference(input, p=0.5, training=not alpha, inplace=False):
        if not training or p == 0 or not input.numel():
            return input
        n = lead(input)
        kept = randomness.keep(randomness.draw_seed(input), input.shape[:n], p)
        kept = kept.reshape(*input.shape[:n], *(1,) * (input.dim() - n))
        if not alpha or p == 1:
            return torch.where(kept, input / (1 - p) if p < 1 else input, 0 * input)
        q, limit = 1 - p, -1.0507009873554804934193349852946 * 1.6732632423543772848170429916717
        a = (q + limit**2 * q * p) ** -0.5
        return a * torch.where(kept, input, limit + 0 * input) - a * p * limit

    return reference


def case_of(least: int, most: int, alpha: bool) -> Callable[[Draw], Case]:
    def case(draw: Draw) -> Case:
        x = draw.tensor(*(draw.size() for _ in range(draw.random.randint(least, most))))
        return Case((x,), {"p": draw.choice((0.5, 0.3, 0.1, 0.9)), "training": True})

    return case


def bench(draw: Draw) -> Case:
    return Case((draw.tensor(64, 128, 512), 0.1, True), {})


def bench_channels(draw: Draw) -> Case:
    return Case((draw.tensor(32, 64, 56, 56), 0.1, True), {})


def bench_rows(draw: Draw) -> Case:
    return Case((draw.tensor(64, 128, 512), 0.1, True), {})


def bench_volumes(draw: Draw) -> Case:
    return Case((draw.tensor(8, 32, 16, 28, 28), 0.1, True), {})


def _op(
    call: Callable[..., Tensor], peer: Any, module: Any, source: str, dims: tuple[int, int], lead: Any = None, **kw: Any
) -> Op:
    alpha = "alpha" in peer.__name__
    return Op(
        name=peer.__name__,
        call=call,
        reference=reference_of(lead or (lambda x: x.dim()), alpha),
        peer=peer,
        rules=(RULE,),
        module=(module,),
        replaces=(module.__base__,),
        source=source,
        random=True,
        **{"shapes": "input: *B -> *B", "case": case_of(*dims, alpha), "bench": bench, **kw},
    )


TOMPSON = "Tompson et al. 2015, §3.2"
DROPOUT = _op(dropout, F.dropout, Dropout, "Hinton et al. 2012", (1, 3))
DROPOUT1D = _op(dropout1d, F.dropout1d, Dropout1d, TOMPSON, (2, 3), lambda x: x.dim() - 1, bench=bench_rows)
DROPOUT2D = _op(dropout2d, F.dropout2d, Dropout2d, TOMPSON, (4, 4), lambda x: 2, bench=bench_channels)
DROPOUT3D = _op(dropout3d, F.dropout3d, Dropout3d, TOMPSON, (4, 5), lambda x: x.dim() - 3, bench=bench_volumes)
ALPHA = _op(alpha_dropout, F.alpha_dropout, AlphaDropout, "Klambauer et al. 2017, §3", (1, 3))
FEATURE_ALPHA = _op(
    feature_alpha_dropout,
    F.feature_alpha_dropout,
    FeatureAlphaDropout,
    "Klambauer et al. 2017, §3",
    (2, 4),
    lambda x: 2,
    bench=bench_channels,
)
OPS = (DROPOUT, DROPOUT1D, DROPOUT2D, DROPOUT3D, ALPHA, FEATURE_ALPHA)
