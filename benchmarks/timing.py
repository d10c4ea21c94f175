"""Timing: rounds in which every provider is called in turn (A B C, A B C, ...), and the arithmetic of paired ratios.

A slow moment of the machine hits all providers of its round, so the ratio within a round is steadier than the ratio of two
medians. Short calls are repeated inside a sample until it is long enough for the clock.
"""

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

SAMPLE_SECONDS = 5e-4  # a sample repeats its call until it lasts this long: 10,000 times the clock's resolution
MAX_ITERATIONS = 2000
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
L2_FLUSH_BYTES = 256 * 2**20  # several times the L2 cache of any GPU of today

Calls = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of a paired ratio over the rounds."""

    median: float
    q1: float
    q3: float

    def as_dict(self) -> dict[str, float]:
        return {"median": self.median, "q1": self.q1, "q3": self.q3}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """(q1, median, q3) with linear interpolation; a single value is all three.

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("quartiles: at least one value is needed, got none")
    if len(values) == 1:
        return values[0], values[0], values[0]
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """The ratio of two series of times, taken round by round: ``paired_ratio(baseline, fastgen)`` is a speed-up.

    Raises:
        ValueError: the series have different lengths or are empty, or a time is not positive.
    """
    if len(numerator) != len(denominator):
        raise ValueError(f"paired_ratio: rounds must match, got {len(numerator)} and {len(denominator)}")
    if min((*numerator, *denominator), default=1.0) <= 0:
        raise ValueError("paired_ratio: times must be positive")
    q1, median, q3 = quartiles([a / b for a, b in zip(numerator, denominator, strict=True)])
    return Ratio(median, q1, q3)


def geometric_mean(values: Sequence[float]) -> float:
    """exp of the mean logarithm; nan for no values."""
    return math.exp(math.fsum(map(math.log, values)) / len(values)) if values else math.nan


class Clock(Protocol):
    """Measures one call of each provider, in order; returns seconds per call."""

    def round(self, calls: Calls, iterations: Mapping[str, int]) -> dict[str, float]: ...


class HostClock:
    """`perf_counter` around the call: right where a call returns when its work is done, as on a CPU."""

    def round(self, calls: Calls, iterations: Mapping[str, int]) -> dict[str, float]:
        seconds = {}
        for name, call in calls.items():
            repeats = range(iterations[name])
            start = time.perf_counter()
            for _ in repeats:
                call()
            seconds[name] = (time.perf_counter() - start) / len(repeats)
        return seconds


class HostLaunchClock(HostClock):
    """As :class:`HostClock`, with the GPU drained before each provider: what a call costs the Python thread."""

    def round(self, calls: Calls, iterations: Mapping[str, int]) -> dict[str, float]:
        seconds = {}
        for name, call in calls.items():
            torch.cuda.synchronize()
            seconds |= super().round({name: call}, iterations)
        torch.cuda.synchronize()
        return seconds


class CudaClock:
    """CUDA events around one call, after a write that empties the L2 cache and lets the host run ahead of the GPU."""

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(L2_FLUSH_BYTES // 4, dtype=torch.int32, device=device)

    def round(self, calls: Calls, iterations: Mapping[str, int]) -> dict[str, float]:
        events = {}
        torch.cuda.synchronize()
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            start.record()
            call()
            end.record()
            events[name] = (start, end)
        torch.cuda.synchronize()
        return {name: start.elapsed_time(end) / 1000 for name, (start, end) in events.items()}


def clock_for(device: torch.device, kind: str) -> Clock:
    """The clock of a case; ``kind`` is "device" or "host"."""
    if device.type != "cuda":
        return HostClock()
    return HostLaunchClock() if kind == "host" else CudaClock(device)


def calibrate(calls: Calls, clock: Clock) -> dict[str, int]:
    """Warm every call up, and say how often a sample must repeat it."""
    once = dict.fromkeys(calls, 1)
    clock.round(calls, once)
    best = {name: min(times) for name, times in _transpose([clock.round(calls, once) for _ in range(3)]).items()}
    if isinstance(clock, CudaClock):
        return once
    return {name: min(MAX_ITERATIONS, max(1, math.ceil(SAMPLE_SECONDS / t))) for name, t in best.items()}


def interleave(
    calls: Calls, clock: Clock, *, seconds: float, min_rounds: int = 7, max_rounds: int = 200
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Time ``calls`` in interleaved rounds for about ``seconds``, but at least ``min_rounds`` of them.

    Returns:
        Per provider its seconds per call, one value a round, and its calls per sample.
    """
    iterations = calibrate(calls, clock)
    rounds: list[dict[str, float]] = []
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection would land on whichever provider happens to run
    try:
        deadline = time.perf_counter() + seconds
        while len(rounds) < min_rounds or (time.perf_counter() < deadline and len(rounds) < max_rounds):
            rounds.append(clock.round(calls, iterations))
    finally:
        if collecting:
            gc.enable()
    return _transpose(rounds), iterations


def keep_memory() -> bool:
    """Tell glibc not to give freed memory back to the system, for all providers alike; whether it could be told.

    Otherwise a large output costs thousands of page faults for whichever provider comes after one that freed much: the order
    of a round would decide, by a factor of up to four.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(option, 2**31 - 1) for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD))


def _transpose(rounds: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    return {name: [r[name] for r in rounds] for name in rounds[0]}
