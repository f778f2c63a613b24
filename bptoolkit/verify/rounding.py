"""`noise`: the exact results of a reference, and the size sigma of the rounding error in each of their elements.

The reference runs in float64, once plainly and a few times under Monte Carlo arithmetic (see `arithmetic`); sigma is the
spread. docs/tolerances.md derives it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bptoolkit.verify.arithmetic import Arithmetic

Run = Callable[[list[Tensor]], Sequence[Tensor | None]]

SMALL = 2.0**-30  # amplitude of the runs that measure first-order errors in float64
WINDOW = 9  # elements of similar magnitude that share their sigma


@dataclass(frozen=True)
class Noise:
    """What a result should be, and how exactly.

    Attributes:
        exact: the reference in float64 at the exactly widened inputs.
        sigma: size of the rounding error of an ideal implementation, an element each; float64, of the same shape.
        excluded: elements on the edge of a kink of an intermediate value, which rounding alone decides; None for none.
        slope: size of the relative error that all elements share (of a common factor, for one).
        independent: how many independent errors the elements stand for.
    """

    exact: Tensor
    sigma: Tensor
    excluded: Tensor | None
    slope: float = 0.0
    independent: float = math.inf


def noise(
    run: Run,
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    work: torch.dtype = torch.float64,
    seed: int = 0,
    repeats: int = 4,
    probes: int = 3,
) -> list[Noise | None]:
    """The exact results of `run`, and the size of the rounding error in each of their elements.

    Args:
        run: (tensors) -> results (outputs, gradients); those that are None stay None.
        inputs: of any dtype; floating-point ones are widened to `work`, others passed as they are.
        dtype: whose rounding is modelled.
        work: what `run` computes in. Narrower than float64 it carries an error of its own, which widens sigma.
        seed: of the perturbations; the global generator is used only by `run` itself, from the same state each time, and is
            left as it was.
        repeats: number of perturbed runs.
        probes: number of runs that look for jumps within a few units of a low-precision dtype.
    """
    return _Measurement(run, inputs, dtype, work, seed, repeats, probes).result()


class _Measurement:
    """One call of `noise`."""

    def __init__(
        self, run: Run, inputs: Sequence[Tensor], dtype: torch.dtype, work: torch.dtype, seed: int, repeats: int, probes: int
    ) -> None:
        self.run, self.dtype, self.work, self.seed, self.repeats, self.probes = run, dtype, work, seed, repeats, probes
        self.inputs = [t.detach().to(work) if t.is_floating_point() else t.detach() for t in inputs]
        self.unit = torch.finfo(dtype).eps / 2
        self.own = torch.finfo(work).eps / 2  # error of `run` itself
        self.amplitude = max(SMALL, 16 * self.own)
        self.narrowed = 0.0

    def result(self) -> list[Noise | None]:
        state = torch.get_rng_state()
        devices = [torch.device("cuda", d) for d in range(torch.cuda.device_count())] if torch.cuda.is_initialized() else []
        others = [torch.cuda.get_rng_state(d) for d in devices]

        def restore() -> None:
            torch.set_rng_state(state)
            for d, s in zip(devices, others):
                torch.cuda.set_rng_state(s, d)

        self.restore = restore
        try:
            exact = self._evaluate(None)
            runs = self._runs(range(self.repeats), self.amplitude)
            if self.narrowed / 2 > self.own:  # a cast inside: `run` is no more exact than that
                self.own = self.narrowed / 2
                if 16 * self.own > self.amplitude:
                    self.amplitude = 16 * self.own
                    runs = self._runs(range(self.repeats), self.amplitude)
            return self._results(exact, runs)
        finally:
            restore()

    def _evaluate(self, mode: Arithmetic | None, inputs: bool = False) -> list[Tensor | None]:
        """The results of one run: plain, or under a mode, which perturbs the inputs too."""
        self.restore()
        if mode is None:
            out = self.run([t.detach() for t in self.inputs])
        else:
            given = [mode.perturbed(t) if inputs else t.detach() for t in self.inputs]
            with mode:
                out = self.run(given)
        return [None if o is None else o.detach().double() for o in out]

    def _runs(
        self, numbers: Sequence[int] | range, amplitude: float, inputs: bool = True, grid: torch.dtype | None = None
    ) -> list[list[Tensor | None]]:
        """Perturbed runs. The same number draws the same perturbations at every amplitude."""
        f16 = self.dtype is torch.float16
        wide = self.dtype.itemsize < 4
        out = []
        for k in numbers:
            mode = Arithmetic(
                (self.seed * 1009 + k) & (2**62 - 1), amplitude, torch.finfo(self.dtype).tiny if f16 else 0.0, wide, grid
            )
            out.append(self._evaluate(mode, inputs))
            self.narrowed = max(self.narrowed, mode.narrowed)
        return out

    def _results(self, exact: list[Tensor | None], runs: list[list[Tensor | None]]) -> list[Noise | None]:
        unit = max(self.unit, self.own)
        least = self._least_input() * min(unit, 2.0**-24)
        judged = [k for k, e in enumerate(exact) if e is not None]
        deviations = {k: _deviations(exact, runs, k) for k in judged}
        kinks: dict[int, Tensor] = {}
        jumps = self._jumps(exact, runs, judged, deviations, True)
        if jumps:
            # A kink that perturbed inputs alone have crossed decides nothing: a correct implementation sees the exact ones.
            inner = self._runs(range(self.repeats), self.amplitude, inputs=False)
            again = self._jumps(exact, inner, list(jumps), {k: _deviations(exact, inner, k) for k in jumps}, False)
            for k, jumped in jumps.items():
                quiet = _deviations(exact, inner, k)
                deviations[k] = torch.where(jumped, quiet, deviations[k])
                if k in again:
                    kinks[k] = again[k]
        sizes: dict[int, Tensor] = {}
        for k in judged:
            e = exact[k]
            assert e is not None
            d = deviations[k] * (unit / self.amplitude)
            if self.own > SMALL / 16:
                d = d * 4.0 if self.own >= self.unit else d  # the exact value errs as much as the result
            deviations[k] = d
            sizes[k] = _pooled(d.abs().mean(0) * 1.2533 if self.repeats else torch.zeros_like(e), e, unit, kinks.get(k)).clamp(
                min=least
            )
        if self.unit > 1e-5 and self.own < self.unit / 64:
            self._near_kinks(exact, judged, sizes, kinks)
        out: list[Noise | None] = []
        for k, e in enumerate(exact):
            if e is None:
                out.append(None)
                continue
            size, excluded = sizes[k], kinks.get(k)
            lost = ~size.isfinite() & e.isfinite()
            if e.numel() and bool(lost.any()):
                excluded = lost if excluded is None else excluded | lost
            out.append(_noise(e, size, excluded, deviations[k], self.unit))
        return out

    def _least_input(self) -> float:
        """The magnitude of the smallest input: what is a unit roundoff of it is lost by 1 + tanh or erf in their tails."""
        sizes = [t.abs().nan_to_num(0.0, 0.0, 0.0).amax() for t in self.inputs if t.is_floating_point() and t.numel()]
        return float(torch.stack([s.double().cpu() for s in sizes]).amin()) if sizes else 0.0

    def _jumps(
        self,
        exact: list[Tensor | None],
        runs: list[list[Tensor | None]],
        which: Sequence[int],
        deviations: dict[int, Tensor],
        inputs: bool,
    ) -> dict[int, Tensor]:
        """Elements that do not follow the amplitude: a thousandth of it leaves more than a thirtieth of their deviation."""
        if self.own > SMALL / 16:
            return {}
        suspects = {}
        for k in which:
            d = deviations[k]
            if not d.numel():
                continue
            e = exact[k]
            assert e is not None
            scale = torch.maximum(e.abs(), _rms(e))
            suspect = d.abs() > 2.0**-14 * scale
            if bool(suspect.any()):
                suspects[k] = suspect
        if not suspects:
            return {}
        finer = self._runs(range(self.repeats), self.amplitude / 1024, inputs)
        found = {}
        for k, suspect in suspects.items():
            jumped = (suspect & (_deviations(exact, finer, k).abs() > deviations[k].abs() / 32)).any(0)
            if bool(jumped.any()):
                found[k] = jumped
        return found

    def _near_kinks(
        self, exact: list[Tensor | None], judged: list[int], sizes: dict[int, Tensor], kinks: dict[int, Tensor]
    ) -> None:
        """Exclude what jumps when the operations alone, not the inputs, err by a few units of a low-precision dtype."""
        reach = 3.0
        runs = self._runs(range(100, 100 + self.probes), reach * self.unit, inputs=False)
        if self.probes > 3:
            runs += self._runs(range(200, 200 + self.probes), self.unit, inputs=False, grid=self.dtype)
        for k in judged:
            d = _deviations(exact, runs, k)
            if not d.numel():
                continue
            worst = d.abs().amax(0)
            jumped = worst > 10 * reach * sizes[k] + least(self.dtype)
            if bool(jumped.any()):
                kinks[k] = jumped if k not in kinks else kinks[k] | jumped


def _deviations(exact: list[Tensor | None], runs: list[list[Tensor | None]], k: int) -> Tensor:
    """(runs, ...): what each run differs by from the exact result; 0 where both are the same infinity or NaN."""
    e = exact[k]
    assert e is not None
    rows = [r[k] - e for r in runs]  # type: ignore[operator]
    d = torch.stack(rows) if rows else e.new_zeros(0, *e.shape)
    return torch.where(e.isfinite(), d, 0.0) if e.numel() and not bool(e.isfinite().all()) else d


def _rms(t: Tensor) -> Tensor:
    t = t[t.isfinite()] if t.numel() and not bool(t.isfinite().all()) else t
    return t.square().mean().sqrt() if t.numel() else t.new_zeros(())


def _pooled(size: Tensor, exact: Tensor, unit: float, kinks: Tensor | None) -> Tensor:
    """Sigma from few runs, made safe from below by its neighbours: the elements of nearest magnitude, which round alike.

    The mean of four deviations is at times many times too small. The geometric mean over neighbours is not, and does not let
    a few large elements speak for small ones, as a mean square over the tensor would.
    """
    n = size.numel()
    if kinks is not None:
        size = torch.where(kinks, 0.0, size)  # a jump says nothing about its neighbours
    if n < 2:
        return size
    flat = size.reshape(-1)
    own = torch.maximum(flat, exact.reshape(-1).abs().nan_to_num(0.0, 0.0, 0.0) * (unit * 0.577))
    logs = own.clamp(min=1e-300, max=1e300).log()
    if n <= WINDOW:
        near = logs.mean().expand(n)
    else:
        order = exact.reshape(-1).abs().nan_to_num(0.0, 0.0, 0.0).argsort(stable=True)
        sums = torch.nn.functional.pad(logs[order].cumsum(0), (1, 0))
        low = (torch.arange(n, device=size.device) - WINDOW // 2).clamp(0, n - WINDOW)
        near = torch.empty_like(logs)
        near[order] = (sums[low + WINDOW] - sums[low]) / WINDOW
    pooled = torch.maximum(flat, 0.5 * near.exp()).view(size.shape)
    finite = size[size.isfinite()]
    share = 1.0 if unit < 1e-5 else 0.02
    return torch.maximum(pooled, share * _rms(finite)) if finite.numel() else pooled


def _noise(exact: Tensor, size: Tensor, excluded: Tensor | None, deviations: Tensor, unit: float) -> Noise:
    """A `Noise`, with what the perturbed runs show of errors that elements share."""
    n = exact.numel()
    runs = deviations.shape[0]
    if n == 0 or runs < 2:
        return Noise(exact, size, excluded)
    take = exact.isfinite() & size.isfinite() & (size > 0)
    if excluded is not None:
        take &= ~excluded
    e, d, s = exact[take], deviations[:, take], size[take]
    if not e.numel():
        return Noise(exact, size, excluded)
    z, w = d / s, e / s
    root = z.square().mean(1).sqrt()
    mean, spread = root.mean(), root.var()
    independent = float(0.5 * mean.square() / spread) if float(spread) > 0 else math.inf
    total = w.square().sum()
    slopes = (z * w).sum(1) / total if float(total) > 0 else z.new_zeros(runs)
    return Noise(exact, size, excluded, float(slopes.abs().mean()) * 1.2533, max(1.0, independent))


def least(dtype: torch.dtype) -> float:
    """An error that is always allowed: two steps of the subnormal float16; for wider exponents where kernels flush to zero, and
    in float64 what only a formula without any cancellation keeps.
    """
    info = torch.finfo(dtype)
    if dtype is torch.float64:
        return 1e-60
    return 2.0 * info.tiny * info.eps if dtype is torch.float16 else 4.0 * info.tiny
