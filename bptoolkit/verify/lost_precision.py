"""Whether a wrong result looks like one that was computed or stored in a lower precision than its own."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from bptoolkit.verify.probing import Finding, near, rerun, rms


def _rounded_anew(f: Finding) -> bool:
    """Whether the relative error changes when the cotangent is scaled.

    That of rounding does; that of a wrong formula does not, as a gradient is linear in the cotangent.
    """
    other = rerun(f, cotangents=tuple(1.3 * c for c in f.cotangents))
    return other is not None and bool(rms(other / 1.3 - f.g) > 0.1 * rms(f.error))


def lost_precision(f: Finding) -> Iterator[str]:
    """An error that is spread and of the size of another dtype's rounding."""
    scale = rms(f.w)
    if f.got.dtype in (torch.float64, torch.float32) and f.g.numel() > 3 and bool(f.g.isfinite().all()) and float(scale) > 0:
        relative = float(rms(f.error) / scale)
        below = (
            [torch.bfloat16, torch.float16, torch.float32] if f.got.dtype == torch.float64 else [torch.bfloat16, torch.float16]
        )
        for d in below:
            short = str(d).removeprefix("torch.")
            u = torch.finfo(d).eps / 2
            if torch.equal(f.g.to(d).double(), f.g) and not torch.equal(f.w.to(d).double(), f.w) and relative < 16 * u:
                yield f"every element of {f.subject} is a {short} number: computed or stored in {short}"
                return
        for d in below if _rounded_anew(f) else ():
            u = torch.finfo(d).eps / 2
            if u / 6 < relative < 3 * u and float(f.error.abs().max() / scale) < 24 * u:
                short = str(d).removeprefix("torch.")
                size = round(math.log2(relative))
                yield (
                    f"the error of {f.subject} is 2^{size} relative, the rounding of {short}: computed in lower precision "
                    "inside?"
                )
                return
    sizes = [m.removeprefix("sizes:") for m in f.matters if m.removeprefix("sizes:") in dict(f.point.sizes)]
    if "dtype" in f.matters and sizes and f.got.dtype != torch.float64 and bool(f.g.isfinite().all()) and float(scale) > 0:
        if float(rms(f.error) / scale) < 64 * torch.finfo(f.got.dtype).eps:
            short = str(f.got.dtype).removeprefix("torch.")
            yield (
                f"the error of {f.subject} grows with {', '.join(sizes)} and only in {short}: a sum is kept in "
                f"{short} instead of float32?"
            )
    elif "dtype" in f.matters and f.got.dtype != torch.float64 and f.name and bool(f.wrong.any()):
        again = rerun(f, dtype=torch.float64)
        if again is not None and near(again.double(), f.w, torch.float64):
            short = str(f.got.dtype).removeprefix("torch.")
            yield f"right in float64, wrong in {short}: overflow, cancellation or a sum in low precision inside"
