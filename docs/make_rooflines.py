"""Draws docs/attention_roofline.png and docs/convolution_roofline.png: the benchmarks' rates below the machine's two limits.

    python docs/make_rooflines.py [attention] [convolution]

A roof is the rate of a matrix product and, left of it, what a copy leaves of that: bytes are those that the mathematics must move.
Measures for about a minute, on a machine that does nothing else.
"""

import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from _pages import save_figure
from matplotlib.ticker import NullLocator
from tqdm import tqdm

from benchmarks import machine
from benchmarks.cases import Case
from benchmarks.ops import bench_attention, bench_conv2d
from benchmarks.pictures import COLOURS
from benchmarks.timing import HostClock, interleave

CPU = torch.device("cpu")
OURS, TORCH = COLOURS["peer"], COLOURS["eager"]
SHAPES = ("o", "^", "s", "D", "v")  # of the marks, one a group
Point = tuple[float, dict[str, float]]  # operations a byte, and the rate of each provider


def attention_cases() -> dict[str, list[Case]]:
    titles = {"self": "d = 40 to 160", "d8": "d = 8", "keys77": "77 keys", "backward": "forward and backward"}
    listed = bench_attention.cases(CPU, full=False)
    return {title: [c for c in listed if c.mode == mode and c.dtype == "fp32"] for mode, title in titles.items()}


def convolution_cases() -> dict[str, list[Case]]:
    listed = [c for c in bench_conv2d.cases(CPU, full=False) if c.dtype == "fp32" and c.layout == "NHWC"]
    narrow = [c for c in listed if c.shape[1] <= 320]
    return {"128 to 320 channels": narrow, "640 and 1280 channels": [c for c in listed if c not in narrow]}


def measure(case: Case) -> Point:
    workload = case.build(False)
    calls = {p.name: p.call for p in workload.providers if p.role != "floor"}
    with workload.grad_mode():
        times, _ = interleave(calls, HostClock(), seconds=0.6, min_rounds=5)
    best = {name: workload.flops / min(seconds) for name, seconds in times.items()}
    ours = best.pop("fastgen")
    return workload.flops / workload.min_bytes, {"fastgen": ours, "torch": max(best.values())}


def copy_rate(size: int = 2**26) -> float:
    """Bytes read and written a second by a copy that no cache holds."""
    x, y = torch.ones(size // 4), torch.empty(size // 4)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        y.copy_(x)
        times.append(time.perf_counter() - start)
    return 2 * size / min(times)


def draw(name: str, title: str, groups: dict[str, list[Point]], gemm: float, copy: float) -> None:
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    at = [x for points in groups.values() for x, _ in points]
    low, high = min(at) / 2, max(at) * 2
    knee = gemm / copy
    ends = sorted({low, min(max(knee, low), high), high})
    axis.plot(ends, [min(gemm, x * copy) / 1e9 for x in ends], color="black", linewidth=1.2)
    label = f"{gemm / 1e9:.0f} GFLOP/s of a matrix product, {copy / 1e9:.0f} GB/s of a copy"
    beside: dict[float, int] = {}  # points that have as many operations a byte stand side by side
    for (group, points), marker in zip(groups.items(), SHAPES, strict=False):
        for x, rates in points:
            place = beside.setdefault(x, 0)
            beside[x] += 1
            x *= 1.06 ** ((place + 1) // 2 * (1 if place % 2 else -1))
            axis.plot([x, x], [rates["torch"] / 1e9, rates["fastgen"] / 1e9], color="#cccccc", linewidth=1, zorder=1)
            for provider, colour in (("torch", TORCH), ("fastgen", OURS)):
                axis.plot(x, rates[provider] / 1e9, marker, color=colour, markersize=6, markeredgecolor="white")
        axis.plot([], [], marker, color="#555555", linestyle="", label=group)
    for provider, colour in (("torch", TORCH), ("fastgen", OURS)):
        axis.plot([], [], color=colour, linewidth=5, label=provider)
    axis.plot([], [], color="black", linewidth=1.2, label=label)
    rates = [r / 1e9 for points in groups.values() for _, of in points for r in of.values()]
    bottom, top = min(rates) / 1.6, max([*rates, gemm / 1e9]) * 1.5
    axis.set(
        xscale="log", yscale="log", xlim=(low, high), ylim=(bottom, top),
        xlabel="operations for each byte that must be moved", ylabel="GFLOP/s, of the plain algorithm",
    )  # fmt: skip
    for of_axis, least, most in ((axis.xaxis, low, high), (axis.yaxis, bottom, top)):
        ticks = [t * 10**e for e in range(5) for t in (1, 2, 5) if least <= t * 10**e <= most]
        of_axis.set_ticks(ticks, [str(t) for t in ticks])
        of_axis.set_minor_locator(NullLocator())
    axis.grid(color="#e4e4e4", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(f"{title}\n{machine.name(CPU)}, fp32", loc="left", fontsize=11)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    save_figure(figure, name)


PICTURES: dict[str, tuple[str, Callable[[], dict[str, list[Case]]]]] = {
    "attention": ("attention: rates below the roofs of the machine", attention_cases),
    "convolution": (
        "GroupNorm, SiLU, 3x3 convolution, residual: rates below the roofs of the machine",
        convolution_cases,
    ),
}


def main(wanted: Iterable[str]) -> None:
    gemm, copy = machine.gemm_rate(CPU, "fp32"), copy_rate()
    for name in wanted:
        title, groups_of = PICTURES[name]
        groups: dict[str, Any] = groups_of()
        with tqdm(total=sum(map(len, groups.values())), unit="case") as bar:
            for group, cases in groups.items():
                groups[group] = []
                for case in cases:
                    groups[group].append(measure(case))
                    bar.update()
        gemm = max(gemm, machine.gemm_rate(CPU, "fp32"))
        draw(f"{name}_roofline.png", title, groups, gemm, copy)


if __name__ == "__main__":
    main(sys.argv[1:] or list(PICTURES))
