"""What needs no reference: backward is linear in the cotangent, and agrees with finite differences of forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bptoolkit.verify.properties.values import truth_of
from bptoolkit.verify.trial import NotApplicable, Trial, Wrong, pull


def linear_in_cotangent(trial: Trial) -> None:
    """Backward is linear in the cotangent: of zero it is zero, of a sum the sum, of a thousandfold the thousandfold.

    Catches thresholds, clipping and normalisation of the gradient, and cotangents that are left out of a product.
    """
    xs = trial.leaves()
    outputs = trial.run(xs)
    if not any(o.requires_grad for o in outputs) or not all(bool(o.isfinite().all()) for o in outputs):
        raise NotApplicable("the outputs are not finite, or none requires grad")
    a = trial.cotangents(outputs, kind="random")
    b = trial.cotangents(outputs, salt=17, kind="random")

    def pulled(cotangents: Sequence[Tensor]) -> list[Any]:
        return [g if g is None else g.detach() for g in pull(outputs, xs, cotangents, retain_graph=True)]

    for name, g in zip(trial.names, pulled([torch.zeros_like(c) for c in a])):
        if g is not None and bool((g.nan_to_num(0, 0, 0) != 0).any()):
            raise Wrong(
                f"gradient of {name} is not zero for a cotangent of zeros: {float(g.abs().max()):.3g}",
                what=f"gradient of {name}",
            )
    much = 8.0 if trial.point.dtype == "float16" else 1024.0
    alone = [pulled(a), pulled(b)]
    for words, p, q in (("a combined cotangent", 2.0, -0.5), ("a large cotangent", much, 0.0)):
        combined = [p * c + q * d for c, d in zip(a, b)]
        if trial.reference is None:  # against the combination of the function's own gradients
            got = [g if g is None else (p * g.double() + q * h.double()).to(g.dtype) for g, h in zip(*alone)]
        else:
            got = pulled(combined)
        what = [f"output {k}" for k in range(len(outputs))] + [f"gradient of {n} for {words}" for n in trial.names]
        trial.judge(what, [*(None for _ in outputs), *got], truth_of(trial, len(xs)), [*xs, *combined])


def finite_differences(trial: Trial) -> None:
    """The derivative of forward along a random direction, by Richardson extrapolation, is what backward says.

    Catches a forward and a backward that disagree. It claims nothing where the extrapolation does not settle, as at a kink.
    """
    if trial.point.dtype != "float64":
        raise NotApplicable("finite differences need float64")
    xs = trial.leaves()
    outputs = trial.run(xs)
    if not any(o.requires_grad for o in outputs) or not all(bool(o.isfinite().all()) for o in outputs):
        raise NotApplicable("the outputs are not finite, or none requires grad")
    live = [k for k, o in enumerate(outputs) if o.requires_grad]
    cotangents = trial.cotangents(outputs, kind="random")
    grads = pull(outputs, xs, cotangents)
    wanted = [k for k, n in enumerate(trial.need) if n and xs[k].numel()]
    settled = 0
    for moved in [*((k,) for k in wanted), *([tuple(wanted)] if len(wanted) > 1 else [])]:
        directions = [
            d * _scale(x) if k in moved else None for k, (d, x) in enumerate(zip(trial.directions(xs, salt=len(moved)), xs))
        ]

        def along(step: float, directions: Any = directions) -> float:
            at = [x.detach() if d is None else x.detach() + step * d for x, d in zip(xs, directions)]
            with torch.no_grad():
                ys = trial.run(at)
            return sum(float((ys[k].double() * cotangents[k].double()).sum()) for k in live)

        got = sum(float((grads[k] * directions[k]).sum()) for k in moved if grads[k] is not None)  # type: ignore[operator]
        terms = sum(float((grads[k] * directions[k]).abs().sum()) for k in moved if grads[k] is not None)  # type: ignore[operator]
        want, uncertain = derivative(along)
        if not (abs(want) < float("inf")) or uncertain > 1e-3 * max(abs(want), 1e-3 * terms, 1e-300):
            continue
        settled += 1
        floor = 1e-13 * sum(float(cotangents[k].abs().sum()) for k in live)
        floor *= max(float(d.abs().max()) for d in directions if d is not None)
        if abs(got - want) > uncertain + 1e-9 * terms + floor:
            names = " and ".join(trial.names[k] for k in moved)
            raise Wrong(
                f"derivative along a direction of {names}: backward says {got:.9g}, finite differences of forward "
                f"{want:.9g} ± {uncertain:.1g}" + (f", a factor of {got / want:.6g}" if want else ""),
                what=f"gradient along {names}",
            )
    if not settled:
        raise NotApplicable("the finite differences do not settle here")


def _scale(x: Tensor) -> float:
    """How far to move an input: by its own size, or by one where it is zero."""
    return float(x.detach().abs().mean()) or 1.0 if x.numel() else 1.0


def derivative(along: Callable[[float], float]) -> tuple[float, float]:
    """f'(0) by Romberg's scheme on four central differences, and how uncertain it is.

    The uncertainty is the difference of the last two columns, the rounding of f, and a tenth of the difference of the one-sided
    derivatives beyond what curvature explains, which stays large where f has a kink.
    """
    h, middle = 2e-2, along(0.0)
    table: list[list[float]] = []
    size = abs(middle)
    sides = []
    for k in range(4):
        up, down = along(h / 2**k), along(-h / 2**k)
        size = max(size, abs(up), abs(down))
        row = [(up - down) / (2 * h / 2**k)]
        sides.append((up - 2 * middle + down) / (h / 2**k))
        for j in range(k):
            row.append(row[j] + (row[j] - table[k - 1][j]) / (4 ** (j + 1) - 1))
        table.append(row)
    rounding = 50 * size * 2**-52 / (h / 8)
    kink = abs(
        2 * sides[3] - sides[2]
    )  # the jump of the derivative halves with the step where f is smooth, and stays at a kink
    spread = abs(table[3][3] - table[3][2]) + abs(table[3][3] - table[2][2])
    return table[3][3], 4 * spread + rounding + 4 * kink
