"""Time, saved memory and error of an op, beside torch's own, in one run.

Absolute times are noise; what is reported is the ratio of medians, from runs that alternate between the two in both orders. An
op whose checks are red is not timed. Rows that lose stay in the table.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from bptoolkit.cases import Case, Draw
from bptoolkit.op import Op
from bptoolkit.verify import check


@dataclass(frozen=True)
class Row:
    """One op at one size, ours beside torch's. Times are medians in milliseconds, memory is in bytes."""

    op: str
    label: str
    shapes: str
    dtype: str
    forward: float
    forward_torch: float
    both: float  # forward and backward
    both_torch: float
    saved: int  # bytes kept between forward and backward, each storage once, parameters included
    saved_torch: int
    error: float  # largest gradient error against float64, relative to the gradient's own size
    error_torch: float

    def cells(self) -> list[str]:
        """The row of the table."""
        return [
            self.op,
            self.label,
            self.shapes,
            f"{self.forward_torch:.2f}",
            f"{self.forward / self.forward_torch:.2f}",
            f"{self.both_torch:.2f}",
            f"{self.both / self.both_torch:.2f}",
            f"{self.saved / 2**20:.2f}",
            f"{self.saved / max(self.saved_torch, 1):.2f}",
            f"{self.error:.1e}",
            f"{self.error_torch:.1e}",
        ]


HEADER = [
    "op",
    "case",
    "shapes",
    "torch fwd ms",
    "fwd ×",
    "torch fwd+bwd ms",
    "fwd+bwd ×",
    "saved MiB",
    "saved ×",
    "error",
    "torch's error",
]


class RedError(RuntimeError):
    """The op's checks fail, so its speed is not reported."""


def bench(op: Op, *, device: str = "cpu", dtype: torch.dtype = torch.float32, seconds: float = 4.0, seed: int = 0) -> list[Row]:
    """Measure an op beside torch's own.

    Args:
        op: what to measure.
        device: where.
        dtype: of the tensors.
        seconds: spent on timing each row.
        seed: of the arguments.

    Returns:
        A row per case of the op; none if it has no benchmark.

    Raises:
        RedError: the op's checks fail.
    """
    report = check(op, quick=True, budget=10, properties=("forward_value", "gradient_value", "cotangent_layout"))
    if not report.ok:
        raise RedError(str(report))
    cases: Any = {} if op.bench is None else {"": op.bench} if callable(op.bench) else op.bench
    return [_row(op, label, draw, device, dtype, seconds, seed) for label, draw in cases.items()]


def _row(op: Op, label: str, draw: Callable[[Draw], Case], device: str, dtype: torch.dtype, seconds: float, seed: int) -> Row:
    case = draw(Draw(Random(seed), dtype=dtype, device=device))
    tensors = [t for t in tree_flatten((case.args, case.kwargs))[0] if isinstance(t, Tensor)]
    peer = op.peer or op.reference
    ours, theirs = _runner(op.call, case), _runner(peer, case)
    forward = compare(lambda: ours(None), lambda: theirs(None), seconds / 4)
    cotangents = [torch.randn_like(o) for o in ours(None)]

    def seeded(run: Callable[[Any], Sequence[Tensor]], cotangents: list[Tensor]) -> Sequence[Tensor]:
        if op.random:
            torch.manual_seed(seed)
        return run(cotangents)

    both = compare(lambda: ours(cotangents), lambda: theirs(cotangents), seconds)
    truth = seeded(_runner(op.reference, _wide(case)), [c.double() for c in cotangents])
    return Row(
        op=op.name,
        label=label,
        shapes=", ".join("×".join(map(str, t.shape)) or "scalar" for t in tensors),
        dtype=str(dtype).removeprefix("torch."),
        forward=forward[0],
        forward_torch=forward[1],
        both=both[0],
        both_torch=both[1],
        saved=saved_bytes(lambda: ours(None)),
        saved_torch=saved_bytes(lambda: theirs(None)),
        error=_error(seeded(ours, cotangents), truth),
        error_torch=math.nan if op.random else _error(theirs(cotangents), truth),  # torch drops other elements
    )


def _runner(fn: Callable[..., Any], case: Case) -> Callable[[Any], Sequence[Tensor]]:
    """Run forward, and backward if cotangents are given: the outputs, or the gradients."""
    leaves = [t for t in tree_flatten((case.args, case.kwargs))[0] if isinstance(t, Tensor) and t.requires_grad]

    def run(cotangents: Any) -> Sequence[Tensor]:
        out = [o for o in tree_flatten(fn(*case.args, **case.kwargs))[0] if isinstance(o, Tensor) and o.requires_grad]
        return out if cotangents is None else torch.autograd.grad(out, leaves, cotangents, allow_unused=True)

    return run


def _wide(case: Case) -> Case:
    made: dict[int, Tensor] = {}  # a tensor that is given twice stays one

    def wide(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point():
            return t
        if id(t) not in made:
            made[id(t)] = t.detach().double().requires_grad_(t.requires_grad)
        return made[id(t)]

    return Case(*tree_map(wide, tuple(case)))


def _error(got: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    pairs = [(g, t) for g, t in zip(got, truth) if g is not None and t.numel()]
    return max((float((g.double() - t).abs().max() / t.abs().max().clamp_min(1e-300)) for g, t in pairs), default=0.0)


def compare(a: Callable[[], Any], b: Callable[[], Any], seconds: float) -> tuple[float, float]:
    """Medians of a and b in milliseconds, alternating in both orders, after a warm-up, for at least five rounds."""
    a(), b()
    times: tuple[list[float], list[float]] = ([], [])
    inner = max(1, int(2e-3 / max(_once(a), _once(b), 1e-7)))
    end = time.perf_counter() + seconds
    k = 0
    while k < 5 or time.perf_counter() < end:
        for which in ((0, 1), (1, 0))[k % 2]:
            times[which].append(_once((a, b)[which], inner))
        k += 1
    return statistics.median(times[0]) * 1e3, statistics.median(times[1]) * 1e3


def _once(fn: Callable[[], Any], inner: int = 1) -> float:
    began = time.perf_counter()
    for _ in range(inner):
        fn()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / inner


def saved_bytes(fn: Callable[[], Any], but: Sequence[Tensor] = ()) -> int:
    """Bytes kept for backward by what fn runs: each storage that goes through the saved-tensor hooks, once; but for those of
    some tensors, such as inputs, which are there in any case.
    """
    storages: dict[int, tuple[int, Any]] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        storages[storage.data_ptr()] = (storage.nbytes(), storage)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = fn()
    known = {t.untyped_storage().data_ptr() for t in but}
    total = sum(n for at, (n, _) in storages.items() if at not in known)
    del out
    return total


def overhead(repeats: int = 300) -> dict[str, float]:
    """Microseconds of a tiny linear, forward plus backward: ours, a plain ctx-style autograd.Function, and torch's own."""
    from bptoolkit.ops.linear import linear

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return torch.nn.functional.linear(x, w, b)

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor) -> Any:
            (dy,), (x, w) = cotangents, ctx.saved_tensors
            return dy @ w, dy.mT @ x, dy.sum(0)

    x, w, b = (torch.randn(s, requires_grad=True) for s in ((4, 3), (5, 3), (5,)))
    dy = torch.ones(4, 5)
    runs = {
        "bptoolkit": lambda: torch.autograd.grad(linear(x, w, b), (x, w, b), dy),
        "plain Function": lambda: torch.autograd.grad(Plain.apply(x, w, b), (x, w, b), dy),
        "torch": lambda: torch.autograd.grad(torch.nn.functional.linear(x, w, b), (x, w, b), dy),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in runs}
    try:
        for k in range(repeats):
            for name in list(runs) if k % 2 else list(runs)[::-1]:
                times[name].append(_once(runs[name], 20))
    finally:
        torch.set_num_threads(threads)
    return {name: statistics.median(t) * 1e6 for name, t in times.items()}


def as_dict(row: Row) -> dict[str, Any]:
    """The row for JSON."""
    return asdict(row)
