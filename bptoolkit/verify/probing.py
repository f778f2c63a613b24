"""What the probes of `diagnosis` look at, and what they share: comparing, naming a factor, saying which elements are meant."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bptoolkit.verify.layouts import KINKS
from bptoolkit.verify.picture import where_wrong
from bptoolkit.verify.point import Point


@dataclass(frozen=True)
class Finding:
    """A result that is wrong, and what is known about the call that gave it.

    Attributes:
        what: what is wrong, "gradient of w" or "output".
        got: the result.
        want: the right one, in float64.
        sigma: the size of the rounding error in each element, where known.
        inputs: the call's inputs by name.
        outputs, cotangents: of the call.
        gradients: the right gradients of all inputs by name, in float64.
        point: the configuration.
        matters: the axes without which it does not fail: fields of the point, or letters of its sizes ("sizes:N" or "N").
        rerun: gives the gradients of the function under test, one an input in the order of `inputs`, of another call: with
            other `cotangents`, with `contiguous_inputs=True`, in another `dtype`.
        truth: (inputs, cotangents) -> the right gradients of another call, one an input, in float64.
    """

    what: str
    got: Tensor
    want: Tensor
    sigma: Tensor | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: tuple[Tensor, ...] = ()
    cotangents: tuple[Tensor, ...] = ()
    gradients: dict[str, Tensor] = field(default_factory=dict)
    point: Point = field(default_factory=Point)
    matters: tuple[str, ...] = ()
    rerun: Callable[..., list[Any]] | None = None
    truth: Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Any]] | None = None

    @property
    def name(self) -> str:
        """The input whose gradient it is; "" for an output."""
        return self.what.removeprefix("gradient of ") if self.what.startswith("gradient of ") else ""

    @property
    def subject(self) -> str:
        """The result, as the subject of a sentence."""
        return f"{self.name}'s gradient" if self.name else f"the {self.what or 'result'}"

    @cached_property
    def g(self) -> Tensor:
        """The result in float64."""
        return self.got.detach().double()

    @cached_property
    def w(self) -> Tensor:
        """The right result in float64."""
        return self.want.detach().double()

    @cached_property
    def error(self) -> Tensor:
        """Result minus right result."""
        return self.g - self.w

    @cached_property
    def allowed(self) -> Tensor:
        """The error in each element that rounding explains."""
        scale = torch.maximum(self.w.abs(), rms(self.w).expand_as(self.w))
        if self.sigma is not None and self.sigma.shape == self.w.shape:
            return 6 * self.sigma.double() + 1e-9 * scale
        return scale * (1e-6 if self.got.dtype == torch.float64 else 16 * torch.finfo(self.got.dtype).eps)

    @cached_property
    def wrong(self) -> Tensor:
        """Which elements are wrong."""
        return (self.error.abs() > self.allowed) | ~self.g.isfinite()

    def like(self, candidate: Tensor, scale: float = 1.0) -> bool:
        """Whether the result is this candidate, which is not the right result."""
        return candidate.shape == self.g.shape and self.explains(self.g, candidate.detach().double(), scale)

    def explains(self, seen: Tensor, model: Tensor, scale: float = 1.0) -> bool:
        """Whether a model of something seen, result or error, leaves nothing but rounding, and little of the error."""
        rest, error = rms(seen - model), rms(self.error)
        if not bool(rest.isfinite() & error.isfinite()) or float(rms(model)) == 0:
            return False
        if self.got.dtype == torch.float64:
            limit = 1e-6 * rms(model)
        elif self.sigma is not None:
            limit = max(1.0, scale) * rms(self.allowed) / 2
        else:
            limit = 4 * torch.finfo(self.got.dtype).eps * torch.maximum(rms(self.w), rms(model))
        return bool(rest <= limit) and bool(rest < 0.1 * error)


def rms(t: Tensor) -> Tensor:
    """Root of the mean square, a scalar; 0 of nothing."""
    return t.double().square().mean().sqrt() if t.numel() else torch.zeros((), dtype=torch.float64)


def near(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Whether two tensors are equal to within the rounding of a dtype, and not both zero."""
    if a.shape != b.shape or not a.numel():
        return False
    a, b = a.detach().double(), b.detach().double()
    size = torch.maximum(rms(a), rms(b))
    bound = (1e-9 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps) * size
    return bool(size > 0) and bool(size.isfinite()) and bool(rms(a - b) <= bound)


def sums_to(big: Sequence[int], small: Sequence[int]) -> bool:
    """Whether a sum over broadcast dimensions takes one shape to another."""
    if len(big) < len(small) or tuple(big) == tuple(small):
        return False
    tail = big[len(big) - len(small) :]
    return all(s in (b, 1) for b, s in zip(tail, small))


def expands(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a shape can be expanded to another."""
    return tuple(shape) == tuple(to) or sums_to(to, shape)


def rerun(f: Any, **changed: Any) -> Tensor | None:
    """The gradient that is wrong, of another call; None if it cannot be had."""
    if f.rerun is None or f.name not in f.inputs:
        return None
    try:
        got = f.rerun(**changed)[list(f.inputs).index(f.name)]
    except Exception:  # the other call may be one that the function refuses
        return None
    return None if got is None or got.shape != f.g.shape else got.detach().double()


def right(f: Any, again: Tensor) -> bool:
    """Whether another call gave the right result."""
    return bool(again.isfinite().all()) and bool(((again - f.w).abs() <= f.allowed).all())


def raw(t: Tensor) -> Tensor | None:
    """A tensor's storage read in order from its offset, as a kernel that ignores strides reads it; None if it is too short."""
    flat = torch.empty(0, dtype=t.dtype).set_(t.detach().untyped_storage())[t.storage_offset() :]
    return flat[: t.numel()].clone().view(t.shape) if flat.numel() >= t.numel() else None


def factor(f: Any, c: float) -> str:
    """A factor in words, if it is one that mistakes have: a sign, a size, the root of one, a half."""
    low = f.got.dtype not in (torch.float64, torch.float32)
    if low and f.g.numel() < 4:  # a few rounded numbers fit too many factors
        return ""
    close = {torch.float64: 1e-6, torch.float32: 1e-5}.get(f.got.dtype, torch.finfo(f.got.dtype).eps)
    sign = " (and with the wrong sign)" if c < 0 else ""
    if math.isclose(c, -1, rel_tol=close):
        return "with the wrong sign"
    plain = {2.0: "times 2: a term counted twice?", 0.5: "divided by 2: a factor of 2 is missing?"}
    constant = next((words for value, words in plain.items() if math.isclose(abs(c), value, rel_tol=close)), "")
    for n, words in _sizes(f):
        for value, how in (
            (1 / n, f"divided by {n}, {words}: mean instead of sum?"),
            (n, f"times {n}, {words}: sum instead of mean?"),
        ):
            if math.isclose(abs(c), value, rel_tol=close):
                return how + " Or a factor of 2?" * bool(constant) + sign
    if constant:
        root = next(
            (f" Or the root of 4, {words}: a scale left out, or applied twice?" for n, words in _sizes(f) if n == 4), ""
        )
        return constant + root + sign
    for n, words in _sizes(f):
        for value, how in ((math.sqrt(n), "times"), (1 / math.sqrt(n), "divided by")):
            if math.isclose(abs(c), value, rel_tol=close):
                return f"{how} the root of {n}, {words}: a scale applied twice or not at all?" + sign
        for value, how in (((n - 1) / n, f"{n - 1}/{n}"), (n / (n - 1), f"{n}/{n - 1}")):
            if not low and n > 2 and math.isclose(abs(c), value, rel_tol=close):
                return f"times {how}, {n} being {words}: a variance by n or by n - 1?" + sign
    for value, how in ((math.log(2), "ln 2"), (1 / math.log(2), "1/ln 2")):
        if math.isclose(abs(c), value, rel_tol=close):
            return f"times {how}: exp2 or log2 for exp or log?" + sign
    return ""


def _sizes(f: Any) -> Iterator[tuple[int, str]]:
    """The sizes of a call that a factor may be, likeliest first, in words."""
    found: list[tuple[int, str]] = []
    for letter, size in f.point.sizes:
        n = math.prod(int(k) for k in str(size).split("x")) if str(size) not in ("-", "") and letter != "case" else 0
        found.append((n, f"the {'batch size' if letter.strip('*') in ('B', 'N') else 'size'} {letter}"))
    found += [(o.numel(), "the number of elements of the output") for o in f.outputs]
    found += [(n, f"the size of dimension {d} of {k}") for k, x in f.inputs.items() for d, n in enumerate(x.shape)]
    seen = set()
    for n, words in found:
        if n > 1 and n not in seen:
            seen.add(n)
            yield n, words


def tensors(f: Any) -> Iterator[tuple[str, Tensor]]:
    """The inputs of the call, and for a gradient its cotangents and outputs, by what a sentence calls them."""
    for k, c in enumerate(f.cotangents if f.name else ()):
        yield "the cotangent" if len(f.cotangents) == 1 else f"the cotangent of output {k}", c.detach().double()
    for name, x in f.inputs.items():
        yield name, x.detach().double()
    for k, o in enumerate(f.outputs if f.name else ()):  # an output is itself among them
        yield "the output" if len(f.outputs) == 1 else f"output {k}", o.detach().double()


def candidates(f: Any) -> Iterator[tuple[str, Tensor]]:
    """What a missing term may be: the tensors of the call, their products with the cotangent, and sums of the cotangent."""
    shape = f.error.shape
    for name, t in tensors(f):
        if expands(t.shape, shape):
            yield name, t.expand(shape)
    for c in f.cotangents if f.name else ():
        dy = c.detach().double()
        for name, t in tensors(f):
            if not name.startswith("the cotangent") and dy.shape == t.shape == shape:
                yield f"cotangent × {name}", dy * t
        if dy.dim() and sums_to(dy.shape, shape):
            yield "the sum of the cotangent", dy.sum_to_size(shape)
        if dy.dim() and dy.shape == shape:
            yield "the sum of the cotangent over the last dimension", dy.sum(-1, keepdim=True).expand(shape)
    for name, g in f.gradients.items():
        if name != f.name and g.shape == shape:
            yield f"the gradient of {name}", g.double()


def flat(t: Tensor) -> bool:
    """Whether all elements are alike: then it fits anything constant."""
    return t.numel() == 0 or float(t.max() - t.min()) <= 1e-12 * float(t.abs().max())


def times(a: float) -> str:
    """A coefficient in front of a name."""
    return "" if math.isclose(a, 1, rel_tol=1e-6) else f"{a:.6g} × "


def hits(mask: Tensor, d: int) -> list[int]:
    """Along a dimension, the indices at which anything is marked."""
    return [int(k) for k in mask.movedim(d, 0).reshape(mask.shape[d], -1).any(-1).nonzero().reshape(-1)]


def place(mask: Tensor) -> str:
    """Where a mask marks, to follow "is wrong"."""
    said = where_wrong(mask)
    return said if said in ("everywhere", "nowhere") else f"in {said}"


def condition(f: Any, mask: Tensor) -> str:
    """In words, what is true of an input exactly where a mask marks: zero, at a kink, negative, large; "" if nothing fits.

    Of one wrong element some input is always the largest: it speaks only where chance would do so less than once in a thousand.
    """
    marked = int(mask.sum())
    if not 0 < marked < mask.numel():
        return ""
    rare = math.comb(mask.numel(), marked) > 1000
    for name, x in f.inputs.items():
        x = x.detach().double()
        if not expands(x.shape, mask.shape):
            continue
        x = x.expand(mask.shape)
        corners = [v for v in KINKS if bool((x[mask] == v).any())]
        if 0 < len(corners) < 4 and mask.numel() > 3 and torch.equal(torch.isin(x, torch.tensor(corners).to(x)), mask):
            values = " or ".join(f"{v:g}" for v in corners)
            if not rare or not _beyond(x, mask).startswith("over"):  # that the others are smaller says more
                return f"exactly where {name} is {values}: the derivative at a kink"
        if x.dim():
            top = x == x.amax(-1, keepdim=True)
            ties = top & (top.sum(-1, keepdim=True) > 1)
            if torch.equal(ties, mask) and mask.numel() > 3:
                return f"exactly where {name} ties for the largest of its row"
        if not rare:
            continue
        for value in KINKS:
            for holds, word in ((x < value, "below"), (x > value, "above")):
                if torch.equal(holds, mask):
                    return f"exactly where {name} is {word} {value:g}"
        said = _beyond(x, mask)
        if said:
            return f"where |{name}| is {said}"
    return ""


def _beyond(x: Tensor, mask: Tensor) -> str:
    """Whether the marked elements are the largest, or the smallest, in magnitude."""
    inside, outside = x[mask].abs(), x[~mask].abs()
    if float(inside.min()) > float(outside.max()):
        return f"over {float(outside.max()):.4g}"
    return f"under {float(outside.min()):.4g}" if float(inside.max()) < float(outside.min()) else ""


def overflow(f: Any, bad: Tensor) -> str:
    """A word on overflow, where the inputs are large or the dtype is small."""
    large = max((float(x.detach().abs().nan_to_num(0, 0, 0).max()) for x in f.inputs.values() if x.numel()), default=0.0)
    if f.got.dtype == torch.float16 or large > 80:
        return f": overflow of an intermediate value? (inputs are up to {large:.3g})"
    return ""
