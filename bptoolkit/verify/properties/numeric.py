"""What needs no reference: backward is linear in the cotangent, and agrees with finite differences of forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bptoolkit.verify.properties.calls import call
from bptoolkit.verify.properties.values import truth_of
from bptoolkit.verify.trial import NotApplicable, Outputs, Trial, Wrong, pull

LEVELS = tuple(2.0**-k for k in range(3, 13))  # steps of the finite differences, in units of the input's own size
COLUMNS = 4


def linear_in_cotangent(trial: Trial) -> None:
    """Backward is linear in the cotangent: of zero it is zero, of a sum the sum, of a thousandfold the thousandfold; and
    what is not finite stays so.

    Catches thresholds, clipping and normalisation of the gradient, terms without the cotangent, cotangents used twice, and
    `nan_to_num`.
    """
    a = call(trial)
    b, zero = trial.cotangents(a.outputs, salt=17), [torch.zeros_like(c) for c in a.cotangents]
    of_a, of_b = _pulled(trial, a.cotangents), _pulled(trial, b)
    for name, g, usual in zip(trial.names, _pulled(trial, zero), of_a):
        if (
            g is not None
            and usual is not None
            and bool(((g != 0) & usual.isfinite()).any())
            and not _not_zero_either(trial, zero)
        ):
            size = float(g.abs().nan_to_num(torch.inf).max())
            raise Wrong(f"gradient of {name} is not zero for a cotangent of zeros: {size:.3g}", what=f"gradient of {name}")
    _hold_non_finite(trial, a.cotangents, of_a)
    much = 4.0 if trial.point.dtype == "float16" else 1024.0  # powers of two: only the sum below rounds
    for words, p, q in (
        ("a sum of two cotangents", 0.5, -0.25),
        ("a small cotangent", 1 / much, 0.0),
        ("a large cotangent", much, 0.0),
    ):
        mixed = [p * c + q * d if q else p * c for c, d in zip(a.cotangents, b)]
        want = [None if x is None or y is None else p * x.double() + q * y.double() for x, y in zip(of_a, of_b)]
        sizes = [
            None if x is None or y is None else abs(p) * x.double().abs() + abs(q) * y.double().abs()
            for x, y in zip(of_a, of_b)
        ]
        _hold_linear(trial, [*(x.detach() for x in a.xs), *mixed], len(a.outputs), _pulled(trial, mixed), want, sizes, words)


def _pulled(trial: Trial, cotangents: Sequence[Tensor]) -> list[Any]:
    made = call(trial)
    return pull(
        made.outputs, made.xs, [c.clone() for c in cotangents] if "cotangents" in trial.contract.mutates else cotangents
    )


def _hold_non_finite(trial: Trial, cotangents: Sequence[Tensor], usual: Sequence[Any]) -> None:
    """Raise if an infinite or undefined cotangent does not reach a gradient that depends on it: what scales the loss for half
    precision looks for it there, and skips the step."""
    for word, value in (("infinity", torch.inf), ("NaN", torch.nan)):
        try:
            grads = _pulled(trial, [torch.full_like(c, value) for c in cotangents])
        except Exception:  # a solver that checks what it is given
            continue
        for name, g, u in zip(trial.names, grads, usual):
            if g is not None and u is not None and bool((g.isfinite() & u.isfinite() & (u != 0)).any()):
                raise Wrong(
                    f"gradient of {name} is finite for a cotangent of {word}: a gradient scaler does not see the overflow",
                    what=f"gradient of {name}",
                )


def _not_zero_either(trial: Trial, zero: Sequence[Tensor]) -> bool:
    """Whether torch's own gradient is not zero there either: zero times infinity."""
    if trial.reference is None:
        return False
    xs = [v.double().requires_grad_(n) for v, n in zip(trial.values, trial.need)]
    grads = pull(trial.run(xs, trial.reference), xs, [c.double() for c in zero])
    return any(g is not None and bool((g != 0).any()) for g in grads)


def _hold_linear(
    trial: Trial,
    inputs: list[Tensor],
    outputs: int,
    got: Sequence[Any],
    want: Sequence[Any],
    size: Sequence[Any],
    words: str,
) -> None:
    """Raise unless gradients are what a combination of others says, within the rounding errors of all of them."""
    dtype = trial.point.torch_dtype
    info = torch.finfo(dtype)
    scales: Any = None
    for k, (g, w, s) in enumerate(zip(got, want, size)):
        if g is None or w is None or g.numel() == 0:
            continue
        sound = w.isfinite() & g.isfinite() & (s < info.max / 64)  # an overflow is no lack of linearity
        error = torch.where(sound, (g.double() - w).abs(), 0.0)
        if bool((error <= 8 * info.eps * s + 64 * info.tiny).all()):
            continue
        if scales is None:
            scales = trial.noise(truth_of(trial, len(trial.values)), inputs, dtype)[outputs:]
            own = _own_noise(trial, inputs[len(trial.values) :], got)
        if scales[k] is None:
            continue
        wide = torch.where(sound, w, g.double())  # what is not judged is taken as it is
        scale = replace(scales[k], exact=wide, sigma=4 * scales[k].sigma + info.eps * s.nan_to_num(0, 0, 0) + own[k])
        name = trial.names[k]
        try:
            trial.hold(f"gradient of {name} for {words} is not the same combination of those of each", g, scale, dtype)
        except Wrong as wrong:
            wrong.what = f"gradient of {name}"
            raise


def _own_noise(trial: Trial, cotangents: Sequence[Tensor], got: Sequence[Any]) -> list[float]:
    """Per gradient: how much it changes when inputs and cotangents are rounded otherwise. A fused operator of the reference
    counts as one rounding in the error model, whatever it loses inside.
    """
    g = torch.Generator().manual_seed(trial.point.seed)
    most = [0.0] * len(got)
    for _ in range(3):

        def rounded(t: Tensor) -> Tensor:
            error = torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.device)
            return (t.double() * (1 + torch.finfo(t.dtype).eps * error)).to(t.dtype)

        near = replace(trial, values=tuple(rounded(v) for v in trial.values))
        for k, (a, b) in enumerate(zip(got, _pulled(near, [rounded(c) for c in cotangents]))):
            if a is not None and a.numel():
                most[k] = max(most[k], float((a.double() - b.double()).abs().nan_to_num(0, 0, 0).max()))
    return most


def finite_differences(trial: Trial) -> None:
    """The derivative of forward along a random direction, by Richardson extrapolation, is what backward says.

    Catches a forward and a backward that disagree. It claims nothing where the extrapolation does not settle, as at a kink, nor
    where the reference disagrees with its own derivative as well (a straight-through estimator).
    """
    if trial.point.dtype != "float64" or not trial.wide:
        raise NotApplicable("finite differences need float64")
    made = call(trial)
    if not all(bool(o.isfinite().all()) for o in made.outputs):
        raise NotApplicable("an output is not finite")
    wanted = [k for k, n in enumerate(trial.need) if n and trial.values[k].numel()]
    settled = 0
    for moved in [*((k,) for k in wanted), *([tuple(wanted)] if len(wanted) > 1 else [])]:
        found = _disagreement(trial, trial.call, moved, 0)
        if found is None:
            continue
        settled += 1
        if found.right:
            continue
        again, both = _disagreement(trial, trial.call, moved, 1), _disagreement(trial, trial.call, moved, 0, 1)
        if again is None or again.right or both is None or not _additive(found, again, both):
            continue
        if trial.reference is not None:
            own = _disagreement(trial, trial.reference, moved, 0)
            if own is None or not own.right:
                raise NotApplicable("the reference is not the derivative of its own forward, or cannot be told to be")
        names = " and ".join(trial.names[k] for k in moved)
        raise Wrong(f"derivative along a direction of {names}: {found}", what=f"gradient along {names}")
    if not settled:
        raise NotApplicable("the finite differences do not settle here")


class _Derivative:
    """What backward says and what finite differences say, along one direction."""

    def __init__(self, got: float, want: float, uncertain: float) -> None:
        self.got, self.want, self.uncertain = got, want, uncertain
        self.right = abs(got - want) <= uncertain

    def __str__(self) -> str:
        text = f"backward says {self.got:.9g}, finite differences of forward {self.want:.9g} ± {self.uncertain:.1g}"
        return text + (f", a factor of {self.got / self.want:.6g}" if self.want else "")


def _disagreement(trial: Trial, fn: Callable[..., Outputs], moved: tuple[int, ...], *salts: int) -> _Derivative | None:
    """Both derivatives along a sum of drawn directions; None where the finite differences do not settle."""
    xs = trial.leaves()
    passed = [x.clone() if n in trial.contract.mutates else x for n, x in zip(trial.names, xs)]
    outputs = trial.run(passed, fn)
    cotangents = trial.cotangents(outputs, kind="random")
    live = [k for k, o in enumerate(outputs) if o.requires_grad]
    grads = pull(outputs, xs, [c.clone() for c in cotangents])
    if any(g is not None and not bool(g.isfinite().all()) for g in grads):
        return None
    drawn = [trial.directions(xs, salt=1009 * salt + sum(2**k for k in moved)) for salt in salts]
    directions = [sum(d) * _scale(x.detach()) if k in moved else None for k, (*d, x) in enumerate(zip(*drawn, xs))]
    products = [grads[k] * directions[k] for k in moved if grads[k] is not None]  # type: ignore[operator]

    def along(step: float) -> tuple[float, float]:
        at = [x.detach().clone() if d is None else x.detach() + step * d for x, d in zip(xs, directions)]
        try:
            with torch.no_grad():
                ys = trial.run(at, fn)
        except Exception:  # outside the function's domain
            return math.nan, math.nan
        terms = [ys[k].double() * cotangents[k].double() for k in live]
        return sum(float(t.sum()) for t in terms), sum(float(t.abs().sum()) for t in terms)

    got = sum(float(p.sum()) for p in products)
    want, uncertain = derivative(along)
    uncertain += 1e-8 * sum(float(p.abs().sum()) for p in products)
    reach = sum(
        float(d.abs().sum()) for d in directions if d is not None
    )  # a gradient that is nothing but rounding is no gradient
    uncertain += 1e-14 * reach * max((float(cotangents[k].abs().max()) for k in live if cotangents[k].numel()), default=0.0)
    if not uncertain <= 1e-2 * max(abs(want), abs(got), 1e-300):
        return None
    return _Derivative(got, want, uncertain)


def _additive(a: _Derivative, b: _Derivative, both: _Derivative) -> bool:
    """Whether the derivative along a sum of directions is the sum; with ties (a median) it need not be: no gradient exists."""
    return abs(a.want + b.want - both.want) <= a.uncertain + b.uncertain + both.uncertain


def _scale(x: Tensor) -> Tensor | float:
    """How far to move each element: by its own size, so that signs stay; by a tenth of the usual size where it is near zero."""
    usual = float(x.square().mean().sqrt())
    return x.abs().clamp(min=0.1 * usual) if usual else 1.0


def derivative(along: Callable[[float], tuple[float, float]]) -> tuple[float, float]:
    """f'(0) by Richardson extrapolation of central differences, and how uncertain it is.

    Args:
        along: step -> (f, the sum of the magnitudes that f is a sum of).

    Of all runs of four halvings the one whose last columns differ least is taken. The uncertainty is ten times that difference,
    the rounding of f, and twice the difference of the two one-sided derivatives, which is the jump where f has a kink.
    """
    middle, size = along(0.0)
    up, down = [along(h) for h in LEVELS], [along(-h) for h in LEVELS]
    size = max([size, *(s for _, s in (*up, *down) if math.isfinite(s))])
    central = [(u - d) / (2 * h) for (u, _), (d, _), h in zip(up, down, LEVELS)]
    right = [(u - middle) / h for (u, _), h in zip(up, LEVELS)]
    left = [(middle - d) / h for (d, _), h in zip(down, LEVELS)]
    want, uncertain = _extrapolated(central, (2, 4, 6), size)
    sides = _extrapolated(right, (1, 2, 3), size), _extrapolated(left, (1, 2, 3), size)
    return want, 10 * uncertain + 2 * abs(sides[0][0] - sides[1][0])


def _extrapolated(rows: list[float], orders: tuple[int, ...], size: float) -> tuple[float, float]:
    """The value that differences of halved steps tend to, and how far its last columns are apart."""
    best = (math.nan, math.inf)
    for k in range(len(rows) - COLUMNS + 1):
        columns = [rows[k : k + COLUMNS]]
        for p in orders:
            last = columns[-1]
            columns.append([(2**p * fine - coarse) / (2**p - 1) for coarse, fine in pairwise(last)])
        value = columns[-1][-1]
        spread = abs(value - columns[-2][-1]) + abs(columns[-2][-1] - columns[-2][-2])
        spread += 4 * size * 2**-52 / LEVELS[k + COLUMNS - 1]
        if spread < best[1]:
            best = value, spread
    return best
