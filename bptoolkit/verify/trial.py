"""`Trial`: one call to judge, and what every property does with it: run it, pull a gradient back, hold a result to the
truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bptoolkit.verify.contract import Contract
from bptoolkit.verify.layouts import COTANGENTS, LAYOUTS
from bptoolkit.verify.point import Point
from bptoolkit.verify.tolerance import Noise, Verdict, compare, noise

Outputs = tuple[Tensor, ...]


class Wrong(AssertionError):
    """A property does not hold.

    Attributes:
        gross: certain; else it is statistical, and is confirmed on fresh draws before it is reported.
        verdict: what the tolerance model says, with the worst element, where values were compared.
        got, want: the two tensors, where values were compared; `want` in float64.
        what: what was compared ("gradient of x").
        sigma: the size of the rounding error in each element of `want`, where values were compared.
    """

    def __init__(
        self,
        message: str,
        *,
        gross: bool = True,
        verdict: Verdict | None = None,
        got: Any = None,
        want: Any = None,
        what: str = "",
        sigma: Any = None,
    ) -> None:
        super().__init__(message)
        self.gross, self.verdict, self.got, self.want, self.what, self.sigma = gross, verdict, got, want, what, sigma


class NotApplicable(Exception):
    """The property says nothing about this call; the message says why."""


@dataclass(frozen=True)
class Trial:
    """One call, at one point.

    Attributes:
        call: the function under test, of the tensors to differentiate by alone; it returns its floating-point outputs.
        reference: the same of the reference, or None. Both take tensors of any dtype: their other arguments follow.
        names: of the tensors to differentiate by.
        values: those tensors, contiguous, of the point's dtype, detached.
        point: the configuration.
        contract: what the function claims.
        fn: the function as the caller gave it.
        wide: the function under test takes float64.
    """

    call: Callable[..., Outputs]
    reference: Callable[..., Outputs] | None
    names: tuple[str, ...]
    values: Outputs
    point: Point
    contract: Contract = field(default_factory=Contract)
    fn: Any = None
    wide: bool = True

    @property
    def need(self) -> tuple[bool, ...]:
        """Which inputs require grad: all of them where the point says "1", or names none of those that this call has."""
        digits = self.point.need.ljust(len(self.values), "0")[: len(self.values)]
        if self.point.need == "1" or "1" not in digits:
            return (True,) * len(self.values)
        return tuple(d == "1" for d in digits)

    def at(self, **axes: Any) -> Trial:
        """The same trial with some fields of its point changed (need, layout, cotangent, seed)."""
        return replace(self, point=replace(self.point, **axes))

    def leaves(self, need: Sequence[bool] | None = None) -> list[Tensor]:
        """Fresh inputs, laid out as the point says, of which some require grad."""
        layout = LAYOUTS[self.point.layout]
        need = self.need if need is None else need
        return [layout(v.clone()).detach().requires_grad_(n) for v, n in zip(self.values, need)]

    def run(self, xs: Sequence[Tensor], fn: Callable[..., Outputs] | None = None) -> Outputs:
        """The outputs of the function under test (or of `fn`); a function that draws random numbers is seeded alike."""
        if self.contract.random:
            torch.manual_seed(self.point.seed)
        if self.contract.mutates:  # torch lets nobody write to a leaf that requires grad
            declared = [n in self.contract.mutates for n in self.names]
            xs = [x.clone() if d and x.requires_grad else x for x, d in zip(xs, declared)]
        return (fn or self.call)(*xs)

    def cotangents(self, outputs: Sequence[Tensor], salt: int = 0, kind: str | None = None) -> list[Tensor]:
        """A cotangent per output, of the point's kind. Another `salt` gives other values."""
        g = torch.Generator().manual_seed(self.point.seed * 7919 + salt + 1)
        make = COTANGENTS[kind or self.point.cotangent]
        return [make(torch.randn(o.shape, generator=g, dtype=torch.float64).to(o.device, o.dtype)) for o in outputs]

    def directions(self, tensors: Sequence[Tensor], salt: int = 0) -> list[Tensor]:
        """A random contiguous tensor like each of these: tangents, weights of a sum."""
        return self.cotangents(tensors, salt=salt + 1_000_003, kind="random")

    def gradients(self, outputs: Sequence[Tensor], xs: Sequence[Tensor], cotangents: Sequence[Any], **kw: Any) -> list[Any]:
        """Per input: its gradient (zeros where nothing flowed), None where it does not require grad."""
        return pull(outputs, xs, cotangents, **kw)

    def judge(
        self,
        what: Sequence[str],
        got: Sequence[Tensor | None],
        truth: Callable[[list[Tensor]], Sequence[Tensor | None]],
        inputs: Sequence[Tensor],
        native: Sequence[Tensor | None] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Hold results to a function that computes them in float64, with tolerances from the error model.

        Args:
            what: what each result is, for the message.
            got: the results of the function under test; None is left out.
            truth: the same results, from the inputs in float64, by the reference (see `oracle`).
            inputs: what `truth` gets, in the dtype of the trial: they are widened exactly.
            native: the same results from torch's own arithmetic in the dtype of the trial, where there are any.
            dtype: whose rounding the results are allowed; the point's by default.

        Raises:
            Wrong: a result differs from the truth by more than rounding explains.
        """
        dtype = dtype or self.point.torch_dtype
        laid = [list(inputs)]
        if self.contract.random and not all(t.is_contiguous() for t in inputs):
            laid.append([t.contiguous() for t in inputs])  # draws follow the strides (`torch.rand_like`) or the positions

        def hold(tensors: list[Tensor], **runs: int) -> None:
            for k, (name, g, scale) in enumerate(zip(what, got, self.noise(truth, tensors, dtype, **runs))):
                self.hold(name, g, scale, dtype, None if native is None else native[k])

        for attempt, tensors in enumerate(laid):
            try:
                hold(tensors)
                return
            except Wrong:
                if attempt == len(laid) - 1 and (self.reference is not None or dtype.itemsize > 2):
                    raise
        hold(laid[-1], repeats=16, probes=32)  # the function itself is all there is: a jump must not be missed

    def noise(self, truth: Callable[..., Any], inputs: Sequence[Tensor], dtype: torch.dtype, **runs: int) -> list[Noise | None]:
        """The exact results and the size of the rounding error in each of their elements."""
        work = torch.float64 if self.reference is not None or self.wide else dtype
        return noise(truth, inputs, dtype, work=work, seed=self.point.seed, **runs)

    def hold(
        self, what: str, got: Tensor | None, scale: Noise | None, dtype: torch.dtype, native: Tensor | None = None
    ) -> None:
        """Raise `Wrong` unless one result is within its noise of the exact one."""
        if got is None or scale is None:
            return
        if got.shape != scale.exact.shape:
            raise Wrong(f"{what} has shape {tuple(got.shape)}, want {tuple(scale.exact.shape)}", what=what)
        verdict = compare(got, scale, dtype, native)
        if verdict is not None and verdict.statistic == "nonfinite" and self._out_of_range(dtype):
            return
        if verdict is not None:
            raise Wrong(
                f"{what}: {verdict}",
                gross=verdict.gross,
                verdict=verdict,
                got=got.detach(),
                want=scale.exact,
                what=what,
                sigma=scale.sigma,
            )

    def _out_of_range(self, dtype: torch.dtype) -> bool:
        """Whether intermediate values may well leave float16, with no reference to say that they need not."""
        most = max((float(v.abs().amax()) for v in self.values if v.numel()), default=0.0)
        return dtype is torch.float16 and self.reference is None and most > 8

    @cached_property
    def oracle(self) -> Callable[..., Outputs]:
        """The function that computes the truth: the reference, or the function under test itself in float64."""
        return self.reference or self.call


def pull(outputs: Sequence[Tensor], xs: Sequence[Tensor], cotangents: Sequence[Any], **kw: Any) -> list[Any]:
    """The gradients of the inputs that require grad, zeros where nothing flowed; None for the others. A cotangent that is None
    is left undefined.
    """
    live = [(o, c) for o, c in zip(outputs, cotangents) if o.requires_grad and c is not None]
    wanted = [x for x in xs if x.requires_grad]
    if not live or not wanted:
        return [torch.zeros_like(x) if x.requires_grad else None for x in xs]
    outs, cots = zip(*live)
    got = iter(torch.autograd.grad(outs, wanted, cots, allow_unused=True, materialize_grads=True, **kw))
    return [next(got) if x.requires_grad else None for x in xs]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaN counting as equal to NaN."""
    return (
        a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a.detach().nan_to_num(7.0), b.detach().nan_to_num(7.0)))
    )
