"""Draws docs/unet_time.png: where the time of a U-Net goes by kind of layer, with torch's own layers and with fastgen's.

    python docs/make_unet_profile.py

The U-Net of DDPM on CIFAR-10, batch 4, as in benchmarks/models. Times are those of the ops themselves by torch's profiler, of the
fastest of several forwards; what is left of the forward is Python's and counts as the rest. A 1x1 convolution that goes as a matrix
product counts as one.
"""

import time
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from _pages import save_figure
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import machine
from benchmarks.models.bench_unet import CONFIGS, fill_zeros
from fastgen.models import UNet
from fastgen.nn import GroupNorm, PlainGroupNorm

# Kind of layer -> what its ops have in their names; the first that fits.
KINDS = {
    "convolution": ("conv",),
    "norm and activation": ("norm", "silu"),
    "attention": ("attention", "softmax"),
    "matrix products": ("mm", "linear", "matmul"),
    "rest": ("",),
}
COLOURS = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#999999")  # Okabe and Ito
FORWARDS = 7


def seconds_by_kind(model: nn.Module, *args: Any) -> dict[str, float]:
    """Of the fastest of several forwards."""
    best, found = float("inf"), {}
    with torch.no_grad():
        for _ in range(2):
            model(*args)
        for _ in range(FORWARDS):
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                start = time.perf_counter()
                model(*args)
                seconds = time.perf_counter() - start
            if seconds < best:
                best, found = seconds, dict.fromkeys(KINDS, 0.0)
                for event in profiler.key_averages():
                    kind = next(kind for kind, parts in KINDS.items() if any(part in event.key for part in parts))
                    found[kind] += event.self_cpu_time_total / 1e6
                found["rest"] += max(best - sum(found.values()), 0.0)
    return found


def main() -> None:
    shape, config = CONFIGS["unet_cifar"]
    fused = UNet(**config, norm=GroupNorm).eval()
    fill_zeros(fused)
    plain = UNet(**config, norm=PlainGroupNorm).eval()
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    bars = {
        name: seconds_by_kind(model, x, torch.full(shape[:1], 500))
        for name, model in (("torch's layers", plain), ("fastgen's", fused))
    }
    figure, axis = plt.subplots(figsize=(9, 2.9), layout="constrained")
    longest = max(sum(kinds.values()) for kinds in bars.values())
    for place, (name, kinds) in enumerate(bars.items()):
        left = 0.0
        for (kind, seconds), colour in zip(kinds.items(), COLOURS, strict=True):
            axis.barh(
                place, seconds * 1e3, left=left * 1e3, color=colour, height=0.6, label=kind if place == 0 else None
            )
            if seconds > 0.04 * longest:
                axis.text(
                    (left + seconds / 2) * 1e3, place, f"{seconds * 1e3:.0f}", ha="center", va="center", color="white"
                )
            left += seconds
        axis.text(left * 1e3 + 0.01 * longest * 1e3, place, f"{left * 1e3:.0f} ms", va="center", fontweight="bold")
        print(name, {kind: round(seconds * 1e3, 1) for kind, seconds in kinds.items()})
    axis.set_yticks(range(len(bars)), list(bars))
    axis.set(ylim=(len(bars) - 0.5, -0.5), xlim=(0, longest * 1e3 * 1.12), xlabel="milliseconds of one forward")
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    size = "x".join(map(str, shape))
    axis.set_title(
        f"U-Net of DDPM on CIFAR-10, {size}, fp32; {machine.name(torch.device('cpu'))}", loc="left", fontsize=11
    )
    figure.legend(loc="outside lower center", ncols=len(KINDS), frameon=False)
    save_figure(figure, "unet_time.png")


if __name__ == "__main__":
    main()
