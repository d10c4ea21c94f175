"""Timing: rounds in which every provider is called in turn, each round in another order, and the arithmetic of paired ratios.

A slow moment of the machine hits all providers of its round, so the ratio within a round is steadier than the ratio of two
medians. Over the rounds every provider follows every other equally often: the page faults of memory that the one before gave back
do not always land on the same. Short calls are repeated inside a sample until it is long enough for the clock.
"""

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

SAMPLE_SECONDS = 5e-4  # a sample repeats its call until it lasts this long: 10,000 times the clock's resolution
MAX_ITERATIONS = 2000
SLOW_SECONDS = 0.05  # a call that takes longer is warm after the check and one round
L2_FLUSH_BYTES = 256 * 2**20  # several times the L2 cache of any GPU of today

Calls = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of a paired ratio over the rounds."""

    median: float
    q1: float
    q3: float


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
    """Device time by CUDA events, after a write that empties the L2 cache and lets the host run ahead of the GPU.

    A call that can be captured is replayed as a CUDA graph, so that the time of its launches is not in the figure; the others are
    called. ``captured`` names those that were.
    """

    def __init__(self, device: torch.device, calls: Calls) -> None:
        self._flush = torch.empty(L2_FLUSH_BYTES // 4, dtype=torch.int32, device=device)
        graphs = {name: capture(call) for name, call in calls.items()}
        self._replays = {name: graph.replay for name, graph in graphs.items() if graph is not None}
        self.captured = list(self._replays)

    def round(self, calls: Calls, iterations: Mapping[str, int]) -> dict[str, float]:
        events = {}
        torch.cuda.synchronize()
        for name, call in calls.items():
            run = self._replays.get(name, call)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            start.record()
            run()
            end.record()
            events[name] = (start, end)
        torch.cuda.synchronize()
        return {name: start.elapsed_time(end) / 1000 for name, (start, end) in events.items()}


def capture(call: Callable[[], Any], warm_up: int = 3) -> torch.cuda.CUDAGraph | None:
    """``call`` as a CUDA graph; None where it waits for the device, copies from the host, or else cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(warm_up):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        torch.cuda.synchronize()
    except Exception:
        torch.cuda.synchronize()
        return None
    return graph


def clock_for(device: torch.device, kind: str, calls: Calls) -> Clock:
    """The clock of a case; ``kind`` is "device" or "host"."""
    if device.type != "cuda":
        return HostClock()
    return HostLaunchClock() if kind == "host" else CudaClock(device, calls)


def orders(names: Sequence[str]) -> list[list[str]]:
    """Orders of the rounds: each name stands in each place, and follows each other name, equally often (Williams 1949).

    The first row goes 0, 1, n-1, 2, n-2, ...; the others are it turned, and for an odd number each backwards too.
    """
    n = len(names)
    zigzag = [(k + 1) // 2 if k % 2 else (n - k // 2) % n for k in range(n)]
    rows = [[names[(place + turn) % n] for place in zigzag] for turn in range(n)]
    return rows + [row[::-1] for row in rows] if n % 2 and n > 1 else rows


def calibrate(calls: Calls, clock: Clock) -> dict[str, int]:
    """Warm every call up, and say how often a sample must repeat it."""
    once = dict.fromkeys(calls, 1)
    best = clock.round(calls, once)
    if isinstance(clock, CudaClock):
        return once
    for _ in range(3 if max(best.values()) < SLOW_SECONDS else 0):
        best = {name: min(best[name], seconds) for name, seconds in clock.round(calls, once).items()}
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
    turns = itertools.cycle(orders(list(calls)))
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection would land on whichever provider happens to run
    try:
        deadline = time.perf_counter() + seconds
        while len(rounds) < min_rounds or (time.perf_counter() < deadline and len(rounds) < max_rounds):
            rounds.append(clock.round({name: calls[name] for name in next(turns)}, iterations))
    finally:
        if collecting:
            gc.enable()
    return {name: [seconds[name] for seconds in rounds] for name in calls}, iterations
