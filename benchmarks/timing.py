"""How long a call takes, and what the device can do at best."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, NamedTuple

import torch

CACHE_FLUSH = 256 * 2**20
"""Bytes written between two timed calls on a GPU: more than the L2 cache of any."""


class Timing(NamedTuple):
    """The 20th, 50th and 80th percentile of a call, in microseconds."""

    p20_us: float
    p50_us: float
    p80_us: float


class Ceiling(NamedTuple):
    """What the device reached here: bytes per second of a copy, operations per second of a matrix product."""

    bandwidth: float
    rate: float

    def seconds(self, traffic: int, flops: int) -> float:
        """The least time for moving ``traffic`` bytes and doing ``flops`` operations at once."""
        return max(traffic / self.bandwidth, flops / self.rate)


def measure(call: Callable[[], Any], device: torch.device, seconds: float = 0.5, least: int = 10) -> Timing:
    """Time ``call`` for about ``seconds``, at least ``least`` times, after a warm-up of a fifth of that.

    On a CPU by the wall clock, with whatever the caches hold from the last call, as in training. On a GPU by CUDA
    events, with a cold L2 cache.
    """
    call()
    once = wall_clock(call, device)
    for _ in range(int(0.2 * seconds / once)):
        call()
    repeats = max(least, int(seconds / once))
    samples = _events(call, repeats) if device.type == "cuda" else [wall_clock(call, device) for _ in range(repeats)]
    quantiles = torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return Timing(*(1e6 * quantiles).tolist())


def wall_clock(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    start = time.perf_counter_ns()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter_ns() - start) * 1e-9


def _events(call: Callable[[], Any], repeats: int) -> list[float]:
    flush = torch.empty(CACHE_FLUSH, dtype=torch.uint8, device="cuda")
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]  # type: ignore[no-untyped-call]
    for start, end in pairs:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e-3 for start, end in pairs]


def interleaved(
    calls: Mapping[str, Callable[[], Any]], device: torch.device, seconds: float = 5.0, least: int = 5
) -> dict[str, float]:
    """The median wall-clock seconds of each call, taken in turn, so that a change in the machine's load meets all.

    Every call waits for the device. They take about ``seconds`` together, at least ``least`` turns after one that does
    not count.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    start, turn = time.perf_counter(), 0
    while turn <= least or time.perf_counter() - start < seconds:
        for name, call in calls.items():
            samples[name].append(wall_clock(call, device))
        turn += 1
    return {name: median(values[1:]) for name, values in samples.items()}


def measure_ceiling(device: torch.device, seconds: float = 0.5) -> Ceiling:
    """A copy that no cache holds, and a square float32 product, in TF32 where the device has it."""
    cuda = device.type == "cuda"
    source = torch.ones((1024 if cuda else 64) * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), device, seconds)
    n = 8192 if cuda else 1024
    a = torch.randn(n, n, device=device)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if cuda else precision)
    try:
        product = measure(lambda: a @ a, device, seconds)
    finally:
        torch.set_float32_matmul_precision(precision)
    return Ceiling(2 * source.numel() / (1e-6 * copy.p50_us), 2 * n**3 / (1e-6 * product.p50_us))
