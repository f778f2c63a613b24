"""The error model: when a difference from the exact result is more than rounding.

`noise` (see `rounding`) gives the size sigma of the rounding error of every element. `compare` holds a result to it by three
statistics in units of sigma: the root mean square (lost precision), the extreme value (a wrong element), and the slope of the
error on the exact value (a wrong factor, far below what a single element shows). docs/tolerances.md derives them and shows what
they see.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bptoolkit.verify.rounding import Noise, least, noise

__all__ = ["Noise", "Verdict", "compare", "noise"]

BULK = 2.0  # rms of the error, in sigma: an error of u in every operation has 1
MOST = 3.0  # largest error, over that of as many normal variates: sigma comes from few runs
DRIFT = 8.0  # slope of the error on the value, in standard errors
# Sums in float32 and float64 are no wider than their results, the exact value of float64 has an error of its own, and formulas
# that are in use lose digits: exp(x - lse) from a saved lse errs by |lse| units. A wrong formula errs by a thousand times more.
WIDER = {torch.float64: 32.0, torch.float32: 8.0}


@dataclass(frozen=True)
class Verdict:
    """A difference that rounding does not explain. `str()` is one sentence.

    Attributes:
        statistic: "max", "bulk", "drift", "nonfinite" or "zero".
        size, bound: of the statistic: in units of sigma; for "drift" the relative error.
        index: of the worst element.
        got, want: its values.
        gross: certain; else it is statistical, and wants confirmation on fresh draws.
    """

    statistic: str
    size: float
    bound: float
    index: tuple[int, ...]
    got: float
    want: float
    gross: bool

    def __str__(self) -> str:
        at = f"at {list(self.index)}: got {self.got:.6g}, want {self.want:.6g}"
        if self.want and math.isfinite(self.got) and math.isfinite(self.want):
            at += f" (ratio {self.got / self.want:.6g})"
        if self.statistic == "nonfinite":
            return f"non-finite where it should not be, or finite where it should be infinite, {at}"
        if self.statistic == "zero":
            return f"all zeros, where the exact value reaches {self.size:.3g} sigma, {at}"
        if self.statistic == "drift":
            return f"off by a factor of {1 + self.size:.6g} (rounding explains {self.bound:.2g}), worst {at}"
        what = "largest error" if self.statistic == "max" else "root mean square error"
        return f"{what} is {self.size:.3g} sigma (allowed {self.bound:.3g}), worst {at}"


def compare(got: Tensor, scale: Noise, dtype: torch.dtype, native: Tensor | None = None) -> Verdict | None:
    """What is wrong with a result, or None when rounding in `dtype` explains it.

    Args:
        got: the result, of the shape of `scale.exact`.
        scale: from `noise`, for the same dtype.
        native: the same result by torch's own arithmetic in that dtype: its error is allowed too.
    """
    if not got.numel():
        return None
    info = torch.finfo(dtype)
    unit, wider = info.eps / 2, WIDER.get(dtype, 1.0)
    exact = scale.exact
    k = got.detach().to(exact.device).double()
    n = None if native is None or native.shape != got.shape else native.detach().to(exact.device).double()
    size = torch.maximum(scale.sigma, exact.abs() * (unit / math.sqrt(3))) + least(dtype)
    judged = exact.isfinite() & size.isfinite() & (exact.abs() + 20 * size < info.max)
    if scale.excluded is not None:
        judged = judged & ~scale.excluded
    held = judged
    if n is not None:  # however badly the formula rounds, torch's own arithmetic is right there to the last digits
        held = judged | (exact.abs() < info.max / 2) & ((n - exact).abs() <= 8 * unit * exact.abs() + least(dtype))
        held = held if scale.excluded is None else held & ~scale.excluded
    wrong = _nonfinite(k, exact, held, n)
    if wrong is not None:
        return wrong
    if n is not None:
        judged = judged & n.isfinite()
    where = judged.reshape(-1).nonzero().squeeze(-1)
    count = where.numel()
    if not count:
        return None
    o, b = exact.reshape(-1)[where], size.reshape(-1)[where]
    k = k.reshape(-1)[where]
    e = (k - o) / b
    en = torch.zeros_like(e) if n is None else (n.reshape(-1)[where] - o) / b
    shape = got.shape

    def verdict(statistic: str, size: float, bound: float, at: int, gross: bool) -> Verdict:
        index = tuple(int(i) for i in torch.unravel_index(where[at], shape))
        return Verdict(statistic, size, bound, index, float(k[at]), float(o[at]), gross)

    largest, bulk = float(e.abs().max()), float(e.square().mean().sqrt())
    reach = o.abs() / b
    if not bool(k.any()):
        top = int(reach.argmax())
        seen = float(reach[top])
        if seen > 10 * wider and (n is None or bool(n[judged].any())):
            return verdict("zero", seen, 10 * wider, top, float(o.abs().amax()) > 1e-10)
    native_bulk, native_most = float(en.square().mean().sqrt()), float(en.abs().max())
    free = max(1.0, min(float(count), scale.independent))
    base = max(1.0, native_bulk)
    at = int(e.abs().argmax())
    bound = wider * MOST * max(native_most, math.sqrt(2 * math.log(2 * count)) * base) * (1 + 2 / math.sqrt(free))
    relative = float((k - o).square().sum().sqrt()) / max(float(o.square().sum().sqrt()), 1e-300)
    if not largest <= bound:
        return verdict("max", largest, bound, at, largest > 100 * bound or (relative > 0.1 and largest > 5 * bound))
    bound = wider * BULK * base * (1 + 4 / math.sqrt(2 * free))
    if not bulk <= bound:
        return verdict("bulk", bulk, bound, at, bulk > 100 * bound or (relative > 0.1 and bulk > 5 * bound))
    drift = _drift(e, en, o, b, scale.slope, unit, wider)
    if drift is not None:
        return verdict("drift", *drift, at, abs(drift[0]) > 100 * drift[1])
    return None


def _nonfinite(k: Tensor, exact: Tensor, judged: Tensor, native: Tensor | None) -> Verdict | None:
    """A result that is infinite or NaN where the exact value can be represented, or not infinite where that is infinite."""
    bad = judged & ~k.isfinite()
    if native is not None:
        bad &= native.isfinite()
    infinite = exact.isinf()
    if bool(infinite.any()):
        missed = infinite & (k != exact)
        bad = bad | (missed if native is None else missed & (native == exact))
    if not bool(bad.any()):
        return None
    index = tuple(int(i) for i in torch.unravel_index(bad.reshape(-1).to(torch.uint8).argmax(), exact.shape))
    return Verdict("nonfinite", math.inf, 0.0, index, float(k[index]), float(exact[index]), True)


def _drift(e: Tensor, en: Tensor, o: Tensor, b: Tensor, shared: float, unit: float, wider: float) -> tuple[float, float] | None:
    """The slope of the error on the exact value, and its bound, where it is over it."""
    clear = o.abs() > 8 * b
    if int(clear.sum()) < 16:
        return None
    e, en, o, b = e[clear], en[clear], o[clear], b[clear]
    distinct = torch.frexp(o).mantissa.abs().div(2 * unit).round().unique().numel()  # equal values round alike
    if distinct < 16:
        return None
    w = o / b
    total = float(w.square().sum())
    slope, native = float((e * w).sum()) / total, float((en * w).sum()) / total
    error = float((e - slope * w).square().mean().sqrt()) / math.sqrt(total) * math.sqrt(o.numel() / distinct)
    floor = unit / 4 if unit > 1e-5 else 2 * unit
    bound = wider * max(DRIFT * error, 4 * abs(native), 6 * shared, floor)
    return (slope, bound) if abs(slope) > bound else None
