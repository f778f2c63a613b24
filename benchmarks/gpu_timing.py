"""Times on a GPU: device events around each run, a flushed cache before it, medians of runs that take turns in both orders."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

FLUSH = 256 << 20  # bytes, more than any cache


def medians(runs: Sequence[Callable[[], Any]], device: str, seconds: float, least: int = 5) -> list[float]:
    """Milliseconds of each run."""
    for run in runs:
        run(), run()
    flush = torch.empty(FLUSH if device == "cuda" else 8, dtype=torch.int8, device=device)
    times: list[list[float]] = [[] for _ in runs]
    end, k = time.monotonic() + seconds, 0
    while k < least or time.monotonic() < end:
        for which in range(len(runs)) if k % 2 else reversed(range(len(runs))):
            times[which].append(_once(runs[which], flush))
        k += 1
    return [statistics.median(t) for t in times]


def _once(run: Callable[[], Any], flush: torch.Tensor) -> float:
    flush.zero_()
    if flush.device.type == "cpu":
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e3
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    run()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended))


def host(run: Callable[[], Any], seconds: float = 0.3) -> float:
    """Microseconds that the processor spends on a call, the device's work not waited for: the median of batches of 20."""
    times = []
    end = time.monotonic() + seconds
    run()
    while len(times) < 5 or time.monotonic() < end:
        began = time.perf_counter()
        for _ in range(20):
            run()
        times.append((time.perf_counter() - began) / 20 * 1e6)
        synchronize()
    return statistics.median(times)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak(run: Callable[[], Any], device: str) -> int:
    """The most bytes that are allocated at any moment of a run, above what there was before; 0 on the CPU."""
    if device != "cuda":
        return 0
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    synchronize()
    most = torch.cuda.max_memory_allocated() - before
    del result
    return int(most)


def copy_bandwidth(device: str, n: int) -> float:
    """GB/s of a copy of n bytes, read and written counted."""
    a = torch.ones(n, dtype=torch.int8, device=device)
    b = torch.empty_like(a)
    (ms,) = medians([lambda: b.copy_(a)], device, 0.5)
    return 2 * n / ms / 1e6


def matrix_rate(device: str, n: int, dtype: torch.dtype) -> float:
    """TFLOP/s of a product of two random n × n matrices."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    (ms,) = medians([lambda: a @ b], device, 0.5)
    return 2 * n**3 / ms / 1e9
