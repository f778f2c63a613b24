"""Which mistake a wrong result looks like, in plain words, and where it sits.

Each probe is a usual mistake run backwards: it computes what the result would be if that mistake had been made, and speaks only
if the result is that, to within rounding. No guess is better than a wrong one, so a fit has to be tight (1e-6 relative in
float64, a few standard deviations of the rounding error else), has to explain the error (what remains is a small part of it),
and has to have more elements than free numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from bptoolkit.verify.lost_precision import lost_precision
from bptoolkit.verify.picture import noun
from bptoolkit.verify.probing import Finding as Finding
from bptoolkit.verify.probing import (
    candidates,
    condition,
    expands,
    factor,
    flat,
    hits,
    near,
    overflow,
    place,
    raw,
    rerun,
    right,
    sums_to,
    tensors,
    times,
)
from bptoolkit.verify.variants import mistaken_call, products, sizes_that_matter

TILES = (128, 64, 32, 16)
Probe = Callable[[Finding], Iterator[str]]


def diagnose(failure: Finding) -> list[str]:
    """At most three guesses which mistake was made, likeliest first; none where nothing fits.

    Example:
        >>> want = torch.randn(5, 3, dtype=torch.float64)
        >>> found = Finding("gradient of w", want / 4, want, point=Point(sizes=(("B", 4), ("I", 3))))
        >>> diagnose(found)
        ["w's gradient equals the expected one divided by 4, the batch size B: mean instead of sum?"]
    """
    guesses: list[str] = []
    if failure.g.numel() == 0 or failure.w.numel() == 0:
        return guesses
    probes = SHAPE_PROBES if failure.g.shape != failure.w.shape else PROBES
    for probe in probes:
        try:
            found = [s for s in probe(failure) if s not in guesses]
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):  # a probe never hides the finding itself
            continue
        guesses += found
        if found and probe in _CERTAIN:
            break
    return guesses[:3]


# ---- wrong shapes


def _broadcast(f: Finding) -> Iterator[str]:
    """Sums over broadcast dimensions that are missing, or one too many."""
    g, w = f.g, f.w
    for big, small, said in ((g, w, "is not summed"), (w, g, "is summed")):
        if sums_to(big.shape, small.shape):
            summed = big.sum_to_size(small.shape)
            if near(summed, small, f.got.dtype):
                end = "over the dimensions that were broadcast" if big is g else "over dimensions that were not broadcast"
                yield f"{f.subject} {said} {end}: it has shape {tuple(g.shape)}, want {tuple(w.shape)}"
            elif near(summed * small.numel() / big.numel(), small, f.got.dtype):
                yield f"{f.subject} is a mean where no reduction is due: it has shape {tuple(g.shape)}, want {tuple(w.shape)}"


def _other_shape(f: Finding) -> Iterator[str]:
    """The right values, in another shape."""
    g, w = f.g, f.w
    if g.dim() > 1 and g.mT.shape == w.shape and near(g.mT, w, f.got.dtype):
        yield f"{f.subject} is the expected one transposed"
    elif g.numel() == w.numel() and near(g.reshape(w.shape), w, f.got.dtype):
        yield f"{f.subject} has the right values in the wrong shape: {tuple(g.shape)}, want {tuple(w.shape)}"
    else:
        for name, other in f.gradients.items():
            if name != f.name and other.shape == g.shape and near(g, other.double(), f.got.dtype):
                yield f"{f.subject} equals the expected gradient of {name}: swapped?"


# ---- strides and cotangents


def _strides(f: Finding) -> Iterator[str]:
    """Right once what is not contiguous is made contiguous."""
    bent = [c for c in f.cotangents if not c.is_contiguous()]
    if bent and f.name:
        again = rerun(f, cotangents=tuple(c.contiguous() for c in f.cotangents))
        kind = "expanded" if any(0 in c.stride() for c in bent) else "not contiguous"
        if again is not None and right(f, again):
            yield f"right when contiguous, wrong when the cotangent is {kind}: reads past strides"
        else:
            stored = tuple(raw(c) for c in f.cotangents)
            if all(r is not None for r in stored):
                again = rerun(f, cotangents=stored)
                if again is not None and f.like(again):
                    yield f"{f.subject} is that of the cotangent read in the order of its storage: ignores strides"
    if any(not x.is_contiguous() or x.storage_offset() for x in f.inputs.values()) and f.name:
        again = rerun(f, contiguous_inputs=True)
        if again is not None and right(f, again):
            yield "right when the inputs are contiguous, wrong when they are not: reads past strides"


def _cotangent_ignored(f: Finding) -> Iterator[str]:
    """The gradient stays when the cotangent changes."""
    if not f.name or not f.cotangents or not bool(f.g.isfinite().all()) or float(f.g.abs().max()) == 0:
        return
    again = rerun(f, cotangents=tuple(2.5 * c.contiguous() + 1 for c in f.cotangents))
    if again is not None and near(again, f.g, f.got.dtype):
        yield f"{f.subject} does not change with the cotangent: computed for a cotangent of ones?"


# ---- the whole of the result is something else


def _zero(f: Finding) -> Iterator[str]:
    if not f.g.any() and f.w.any():
        yield f"{f.subject} is zero everywhere" + ": not computed, detached, or the wrong index of needs_input_grad?" * bool(
            f.name
        )


def _scaled(f: Finding) -> Iterator[str]:
    """A constant factor, named if it is one of the sizes."""
    square = float((f.w * f.w).sum())
    if square == 0 or not math.isfinite(square):
        return
    c = float((f.g * f.w).sum()) / square
    if c == 0 or not f.like(c * f.w, abs(c)):
        return
    said = factor(f, c)
    if said:
        yield f"{f.subject} equals the expected one {said}"
    elif f.g.numel() > 3 and int((f.w != 0).sum()) > 3:
        yield f"{f.subject} equals the expected one times {c:.{6 if abs(c - 1) > 1e-3 else 12}g}: a constant factor"


def _elsewhere(f: Finding) -> Iterator[str]:
    """Another gradient, the cotangent, an input or an output."""
    if f.g.numel() < 2:
        return
    for name, other in f.gradients.items():
        if name != f.name and f.like(other):
            yield f"{f.subject} equals the expected gradient of {name}: swapped?"
    for name, t in tensors(f):
        if f.like(t):
            tail = ": passed through unchanged?" if name.startswith("the cotangent") else ""
            yield f"{f.subject} equals {name}{tail}"
    for name, t in products(f):
        if f.like(t):
            yield f"{f.subject} equals {name}"
            return


def _moved(f: Finding) -> Iterator[str]:
    """The right values at other places."""
    w = f.w
    if w.numel() < 3:
        return
    if w.dim() > 1:
        if f.like(w.mT.reshape(w.shape)):
            yield f"{f.subject} is the expected one transposed"
        for k in range(w.dim() - 1):
            t = w.transpose(k, k + 1)
            if k < w.dim() - 2 and f.like(t.reshape(w.shape)):
                yield f"{f.subject} is the expected one with dimensions {k} and {k + 1} exchanged"
    for d in range(w.dim()):
        n = w.shape[d]
        if n < 2:
            continue
        for by in (1, -1):
            rolled = w.roll(by, d)
            shifted = rolled.clone()
            shifted.select(d, 0 if by > 0 else n - 1).zero_()
            if f.like(rolled) or (n > 2 and f.like(shifted)):
                yield (
                    f"{f.subject} is the expected one shifted by {by:+d} along dimension {d} (of size {n}): an index or "
                    "time step off by one"
                )
        if n > 2 and f.like(w.flip(d)):
            yield f"{f.subject} is the expected one in reverse order along dimension {d}"
        if n > 1 and f.like(w.cumsum(d)):
            yield f"{f.subject} is the running sum of the expected one along dimension {d}"


def _per_row(f: Finding) -> Iterator[str]:
    """A factor that is constant along one dimension, and may be an input."""
    ratio = f.g / f.w
    if f.w.dim() < 1 or not bool(ratio.isfinite().all()):
        return
    for d in range(f.w.dim()):
        if f.w.shape[d] < 3 or f.w.numel() < 6:
            continue
        c = (f.g * f.w).sum(d, keepdim=True) / (f.w * f.w).sum(d, keepdim=True)
        if not f.like(c * f.w, float(c.abs().max())) or not bool(((c - 1).abs() > 1e-3).all()) or not bool(c.all()):
            continue
        for name, t in tensors(f):
            for part, said in ((t, "multiplied by"), (1 / t, "divided by")):
                if expands(part.shape, c.shape) and part.numel() == c.numel():
                    other = part.reshape(c.shape)
                    if near(c, other, f.got.dtype):
                        yield f"{f.subject} is the expected one {said} {name} once too often"
                        return
                    if near(1 / c, other, f.got.dtype):
                        yield f"{f.subject} is the expected one, but not {said} {name}"
                        return
        yield (
            f"{f.subject} equals the expected one times a factor that is the same along dimension {d}: a scale of "
            "each slice is missing"
        )
        return


# ---- a term too many or too few


def _terms(f: Finding) -> Iterator[str]:
    """The error is a constant, or a multiple of something that can be named."""
    r, n = f.error, f.error.numel()
    if n < 3 or not bool(r.isfinite().all()):
        return
    if f.explains(r, r.mean().expand_as(r)):
        yield f"{f.subject} equals the expected one plus the constant {float(r.mean()):.6g}"
        return
    for name, t in (*candidates(f), *products(f)):
        square = float((t * t).sum())
        if square == 0 or not math.isfinite(square) or flat(t):
            continue
        a = float((r * t).sum()) / square
        if f.explains(r, a * t, abs(a)):
            how = f"lacks the term {times(-a)}{name}" if a < 0 else f"has the term {times(a)}{name} too much"
            yield f"{f.subject} {how}"
            return


def _row_terms(f: Finding) -> Iterator[str]:
    """In each row the error is constant, or a multiple of one input: a sum over the row is missing."""
    r = f.error
    if r.dim() < 1 or r.shape[-1] < 4 or r.numel() < 8:
        return
    if f.explains(r, r.mean(-1, keepdim=True).expand_as(r)):
        yield f"{f.subject}: the error is constant along the last dimension: a mean or sum over it is missing or too much"
        return
    for name, t in tensors(f):
        if expands(t.shape, r.shape) and not flat(t):
            t = t.expand_as(r)
            centred, away = r - r.mean(-1, keepdim=True), t - t.mean(-1, keepdim=True)
            for seen, basis, plus in ((r, t, ""), (centred, away, " plus a constant")):
                a = (seen * basis).sum(-1, keepdim=True) / (basis * basis).sum(-1, keepdim=True).clamp_min(1e-300)
                if f.explains(seen, a * basis, float(a.abs().max())):
                    yield (
                        f"{f.subject}: in each row the error is a multiple of {name}{plus}: a term with a sum over the row is "
                        "missing?"
                    )
                    return


# ---- where


def _not_finite(f: Finding) -> Iterator[str]:
    bad = ~f.g.isfinite() & f.w.isfinite()
    if not bool(bad.any()):
        return
    kind = "NaN" if bool(f.g[bad].isnan().all()) else "inf" if not bool(f.g[bad].isnan().any()) else "NaN or inf"
    said = condition(f, bad) or place(bad)
    yield f"{f.subject} is {kind} {said}{overflow(f, bad)}"


def _blocks(f: Finding) -> Iterator[str]:
    """A tail that no whole block covers, or single rows; and what stands there instead."""
    mask = f.wrong
    share = float(mask.double().mean())
    if not 0 < share < 1:
        return
    for d in range(mask.dim()):
        n, hit = mask.shape[d], hits(mask, d)
        first, last = hit[0], hit[-1]
        if len(hit) == n or len(hit) != last - first + 1:
            continue
        inside = mask.narrow(d, first, len(hit))
        if float(inside.double().mean()) < 0.5:
            continue
        there = f.g.narrow(d, first, len(hit))[inside]
        state = "zero" if not bool(there.any()) else "wrong"
        part = noun(mask.dim(), d)
        tile = next((t for t in TILES if last == n - 1 and first and first % t == 0 and n - first < t), 0)
        if tile:
            yield f"{f.subject} is {state} {place(mask)}, beyond the last whole block of {tile}: its tail is left out"
        elif last == n - 1 and len(hit) == 1:
            yield f"{f.subject} is {state} {place(mask)}: the last {part} is left out"
        elif first == 0 and len(hit) == 1:
            yield f"{f.subject} is {state} {place(mask)}: the first {part} is left out"
        else:
            yield f"{f.subject} is {state} {place(mask)}"
        return


def _places(f: Finding) -> Iterator[str]:
    """The wrong elements are those where an input has certain values."""
    mask = f.wrong
    if bool(mask.all()) or not bool(mask.any()):
        return
    said = condition(f, mask)
    if said:
        inside = f.g[mask]
        state = "zero" if not bool(inside.any()) else "wrong"
        if (
            int(mask.sum()) > 2
            and state != "zero"
            and float(inside.abs().max() - inside.abs().min()) < 1e-12 * float(inside.abs().max())
        ):
            state = f"stuck at {float(inside.abs().max()):.4g}: clamped?"
        yield f"{f.subject} is {state} {said}"


# ---- axes


def _axes(f: Finding) -> Iterator[str]:
    """What the axes that matter say by themselves."""
    p = f.point
    if "need" in f.matters and p.need != "1":
        yield (
            f"right when all inputs require grad, wrong when only some do ({p.need}): a wrong index or early exit "
            "on needs_input_grad"
        )
    if "cotangent" in f.matters and p.cotangent not in ("random", "zeros", "one_hot"):
        kind = {"ones": "expanded", "rows": "expanded", "columns": "expanded"}.get(p.cotangent, p.cotangent.replace("_", " "))
        yield f"right when the cotangent is contiguous, wrong when it is {kind}: reads past strides"
    if "layout" in f.matters and p.layout != "contiguous":
        yield f"right when the inputs are contiguous, wrong when they are {p.layout.replace('_', ' ')}: reads past strides"


_CERTAIN = {mistaken_call, _places, _strides, _zero, _scaled, _elsewhere, _cotangent_ignored, _moved, _not_finite, _terms}
SHAPE_PROBES: tuple[Probe, ...] = (_broadcast, _other_shape)
PROBES: tuple[Probe, ...] = (
    _strides,
    _not_finite,
    _zero,
    _scaled,
    _elsewhere,
    _moved,
    mistaken_call,
    _cotangent_ignored,
    _places,
    _blocks,
    _terms,
    lost_precision,
    _per_row,
    _row_terms,
    _axes,
    sizes_that_matter,
)
