"""Draws docs/pixelcnn_time.png: the time of an image against its size, pixel by pixel through the network and by the cached engine.

    python docs/make_pixelcnn_time.py [--trial FILE]

A Gated PixelCNN of 10 layers of 128 channels, as in benchmarks/models, one image of 8 x 8 to 64 x 64 pixels. The naive loop is one
pass of the network in plain torch, timed, times the pixels: extrapolated. The floor is that of the benchmark. Takes two minutes, on
a machine that does nothing else; a trial takes a small network and small images, and draws them into another file.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from _pages import mark_ratio, save_figure
from matplotlib.ticker import NullLocator
from tqdm import tqdm

from benchmarks import machine
from benchmarks.models.bench_pixelcnn import CONFIGS, counted, floors
from benchmarks.models.plain_pixelcnn import plain_torch
from benchmarks.pictures import COLOURS
from fastgen.autoregressive import plan, sample

SIZES, TRIAL_SIZES = (8, 12, 16, 24, 32, 48, 64), (8, 12, 16)
REPEATS = 3


def fastest(call: Callable[[], Any], times: int = 1) -> float:
    """Seconds of the fastest of several calls, the first of which is not counted, each standing for ``times``."""
    call()
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found) * times


def measure(size: int, options: dict[str, Any]) -> dict[str, float]:
    """Seconds of an image of size x size, by each way; the floor is the sum of its parts."""
    kind, config, _ = CONFIGS["gated"]
    torch.manual_seed(0)
    model, shape = kind(**{**config, **options}).eval(), (1, 1, size, size)
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixels = size * size
    with torch.no_grad(), plain_torch():
        naive = fastest(lambda: model(image), pixels)
    start = time.perf_counter()
    made = plan(model, shape)
    set_up = time.perf_counter() - start
    parts = floors(*counted(made.captured.network), pixels, 1, "fp32")
    return {
        "naive": naive,
        "cached": fastest(lambda: sample(model, shape, seeds=[0])),
        "set-up": set_up,
        "floor": sum(fastest(part.call, part.times) for part in parts),
    }


def draw(found: dict[int, dict[str, float]], title: str) -> Any:
    figure, axis = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    sizes = list(found)
    lines = {
        "naive": ("a pass of the network for each pixel, plain torch (extrapolated from one)", COLOURS["eager"], "o-"),
        "cached": ("fastgen, cached", COLOURS["peer"], "s-"),
        "floor": ("the same products by the library: of rows, and of each pixel", "#777777", "--"),
    }
    for name, (label, colour, style) in lines.items():
        axis.plot(sizes, [found[size][name] for size in sizes], style, color=colour, label=label)
    for size in (sizes[0], sizes[-1]):
        mark_ratio(axis, size, found[size]["cached"], found[size]["naive"], to_the_right=size == sizes[0])
    axis.set(xscale="log", yscale="log", xlabel="pixels along a side", ylabel="seconds of one image")
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(which="major", color="#e5e5e5")
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(title, loc="left", fontsize=11)
    figure.legend(loc="outside lower center", ncols=1, frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trial", type=Path, metavar="FILE", help="a small network and small images, into FILE")
    trial = parser.parse_args().trial
    options: dict[str, Any] = {"channels": 16, "dilations": [1] * 4} if trial else {}
    found = {}
    for size in tqdm(TRIAL_SIZES if trial else SIZES, unit="size"):
        found[size] = measure(size, options)
        tqdm.write(f"{size:3d}: " + ", ".join(f"{name} {seconds:.4f} s" for name, seconds in found[size].items()))
    layers = "4 layers of 16 channels" if trial else "10 layers of 128 channels"
    figure = draw(found, f"Gated PixelCNN, {layers}, fp32; {machine.name(torch.device('cpu'))}")
    if trial:
        figure.savefig(trial, dpi=100)
    else:
        save_figure(figure, "pixelcnn_time.png")


if __name__ == "__main__":
    main()
