"""Draws docs/flow_memory.png, maf_sampling.png, flow_samples.png and flow_interpolation.png, pictures for docs/flows.md.

    python docs/make_flow_pictures.py [memory] [sampling] [samples] [interpolation] [--features N ...] [--trial FOLDER]

memory: the peak of one training step of a stack of Glow steps against its depth, each in a process of its own. sampling: the time
of samples of a MAF against its features, beside nflows and zuko of the same layers, kept in docs/maf_sampling.json: with --features
only these are measured, and the others are those of the file. samples: what shipped weights draw. interpolation: held-out digits
turned into one another. The first two measure for some minutes, on a machine that does nothing else; a trial takes few and small
ones, into another folder.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from _pages import DOCS, mark_ratio, save_figure, write
from matplotlib.ticker import NullLocator
from torch import nn
from tqdm import tqdm

from benchmarks import machine
from benchmarks.pictures import COLOURS
from fastgen.cli._images import to_pixels
from fastgen.cli.demo.flows import interpolated
from fastgen.data import from_unit_interval
from fastgen.flows import AffineCoupling, ConvNet, GlowStep, reversible
from fastgen.flows import Compose as Stack
from fastgen.models import MAF, Glow, MultiScaleRealNVP, find_weights

DEPTHS, TRIAL_DEPTHS = (4, 8, 16, 32, 64), (2, 4)
IMAGES, TRIAL_IMAGES = (32, 12, 16, 16), (4, 12, 8, 8)
HIDDEN = 64
MB = (10, 20, 50, 100, 200, 500, 1000)
# glibc raises the size from which it gives memory back as soon as it is freed; what it keeps then grows with the number of layers.
GIVES_BACK = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
FEATURES, TRIAL_FEATURES = (8, 16, 32, 64, 128, 256, 512, 784), (4, 8)
LAYERS, WIDTH, ROWS = 5, 512, 64
REPEATS, SECONDS = 3, 40.0  # no round of all begins after so long
SHORT = 0.2  # seconds for which a call is repeated within a round
TEMPERATURES = (0.5, 0.7, 0.85, 1.0)
NAMES = ("memory", "sampling", "samples", "interpolation")
WAYS = {
    "reversible": ("fastgen, reversible", COLOURS["peer"], "o-"),
    "stored": ("fastgen, activations stored", "#56B4E9", "s-"),
    "normflows": ("normflows", COLOURS["eager"], "^-"),
    "FrEIA": ("FrEIA", COLOURS["compile"], "v-"),
    "nflows": ("nflows", COLOURS["eager"], "^-"),
    "zuko": ("zuko", COLOURS["compile"], "v-"),
}


# ---- memory -----------------------------------------------------------------------------------------------------------------


def stack(way: str, depth: int, channels: int) -> tuple[nn.Module, Callable[[Any], Any]]:
    """A stack of actnorm, 1x1 convolution and affine coupling, and a function of images that gives its loss."""
    if way == "normflows":
        import normflows

        blocks = nn.ModuleList(normflows.flows.GlowBlock(channels, HIDDEN, use_lu=False) for _ in range(depth))
        return blocks, lambda x: _through((block.inverse for block in blocks), x)
    if way == "FrEIA":
        import FrEIA.framework
        import FrEIA.modules

        chain = FrEIA.framework.SequenceINN(channels, *IMAGES[2:])
        for _ in range(depth):
            chain.append(FrEIA.modules.AllInOneBlock, subnet_constructor=_network, affine_clamping=2.0)
        return chain, lambda x: _through([chain], x)
    steps = [
        GlowStep(channels, AffineCoupling(ConvNet(channels // 2, channels, hidden_channels=HIDDEN), scale_fn="sigmoid"))
        for _ in range(depth)
    ]
    flow = reversible(steps) if way == "reversible" else Stack(steps)
    return flow, lambda x: _through([flow], x)


def _network(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, HIDDEN, 3, padding=1), nn.ReLU(), nn.Conv2d(HIDDEN, HIDDEN, 1), nn.ReLU(),
        nn.Conv2d(HIDDEN, outputs, 3, padding=1),
    )  # fmt: skip


def _through(layers: Any, x: Any) -> Any:
    total = 0.0
    for layer in layers:
        x, log_det = layer(x)
        total = total + log_det
    return 0.5 * x.square().sum() - total.sum()  # type: ignore[attr-defined]


def peak(way: str, depth: int, shape: Sequence[int]) -> float:
    """MB that one training step of this process holds at most beyond what it held before: the model and its gradients are there."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    _, loss = stack(way, depth, shape[1])
    x = torch.randn(*shape)
    loss(x[:1]).backward()  # actnorms begin, gradients are there, libraries are loaded
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    loss(x).backward()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    """KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def memory(trial: bool) -> Any:
    depths, shape = (TRIAL_DEPTHS, TRIAL_IMAGES) if trial else (DEPTHS, IMAGES)
    ways = ("reversible", "stored", "normflows", "FrEIA")
    found: dict[str, list[float]] = {way: [] for way in ways}
    for way, depth in tqdm([(way, depth) for way in ways for depth in depths], unit="stack"):
        command = [sys.executable, __file__, "--one", json.dumps([way, depth, list(shape)])]
        done = subprocess.run(command, env=GIVES_BACK, capture_output=True, text=True, check=True)
        found[way].append(float(done.stdout))
        tqdm.write(f"{way} {depth}: {found[way][-1]:.1f} MB")
    return draw_memory(found, depths, shape)


def draw_memory(found: dict[str, list[float]], depths: Sequence[int], shape: Sequence[int]) -> Any:
    figure, axis = _axes("steps of Glow", "MB", depths)
    for way, values in found.items():
        label, colour, style = WAYS[way]
        axis.plot(depths, values, style, color=colour, label=label)
    axis.set_yticks(MB, [str(size) for size in MB])
    axis.yaxis.set_minor_locator(NullLocator())
    mark_ratio(axis, depths[-1], found["reversible"][-1], found["stored"][-1])
    size = " x ".join(map(str, shape))
    axis.set_title(
        f"Peak memory of a training step, images {size}, {HIDDEN} hidden channels, fp32", loc="left", fontsize=11
    )
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


# ---- sampling ---------------------------------------------------------------------------------------------------------------


def samplers(features: int, width: int) -> dict[str, Callable[[], Any]]:
    """Samples of a MAF of :data:`LAYERS` layers: of ours, and of the peers' with as many layers of as many units."""
    import zuko
    from nflows import distributions, flows, transforms

    ours = MAF(features, num_transforms=LAYERS, hidden_features=width, num_blocks=1).eval()
    layers: list[nn.Module] = []
    for _ in range(LAYERS):
        layers += [
            transforms.MaskedAffineAutoregressiveTransform(features, width, num_blocks=1),
            transforms.ReversePermutation(features),
        ]
    nflow = flows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([features])).eval()
    theirs = zuko.flows.MAF(features, 0, transforms=LAYERS, hidden_features=(width, width, width)).eval()
    with torch.no_grad():
        for parameter in (p for model in (ours, nflow, theirs) for p in model.parameters()):
            parameter.mul_(0.5)  # else samples of many features of an untrained flow overflow
    return {
        "fastgen": lambda: ours.sample(ROWS, seeds=range(ROWS)),
        "nflows": lambda: nflow.sample(ROWS),
        "zuko": lambda: theirs().sample((ROWS,)),
    }


def seconds_of_samples(features: int, width: int) -> dict[str, float]:
    """Of the fastest of several rounds of all."""
    torch.manual_seed(0)
    calls = samplers(features, width)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        calls["fastgen"]()  # plans and packs
        for _ in range(REPEATS):
            if sum(map(sum, seconds.values())) > SECONDS:
                break
            for name, call in calls.items():
                until = time.perf_counter() + SHORT
                while True:
                    begin = time.perf_counter()
                    call()
                    end = time.perf_counter()
                    seconds[name].append(end - begin)
                    if end > until:
                        break
    return {name: min(values) for name, values in seconds.items()}


def sampling(trial: Path | None, again: Sequence[int] | None) -> Any:
    features, width = (TRIAL_FEATURES, 32) if trial else (FEATURES, WIDTH)
    what = {
        "machine": machine.name(torch.device("cpu")), "threads": torch.get_num_threads(), "layers": LAYERS, "width": width,
        "rows": ROWS,
    }  # fmt: skip
    file = (trial or DOCS) / "maf_sampling.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    found: dict[str, dict[str, float]] = kept.pop("seconds", {})
    if kept != what or again is None:
        found = {}  # of another machine, say
    for count in tqdm([n for n in features if again is None or n in again], unit="size"):
        found[str(count)] = seconds_of_samples(count, width)
        tqdm.write(f"{count}: " + ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in found[str(count)].items()))
        write(file, json.dumps({**what, "seconds": found}, indent=1) + "\n")
    there = [n for n in features if str(n) in found]
    return draw_sampling(
        {name: [found[str(n)][name] for n in there] for name in ("fastgen", "nflows", "zuko")}, there, what
    )


def draw_sampling(found: dict[str, list[float]], features: Sequence[int], what: dict[str, Any]) -> Any:
    figure, axis = _axes("features", f"seconds of {ROWS} samples", features)
    for name, values in found.items():
        label, colour, style = WAYS.get(name, ("fastgen", COLOURS["peer"], "o-"))
        axis.plot(features, values, style, color=colour, label=label)
    mark_ratio(axis, features[-1], found["fastgen"][-1], min(found["nflows"][-1], found["zuko"][-1]))
    axis.set_title(
        f"MAF, {what['layers']} layers of {what['width']} units, fp32; {what['machine']}",
        loc="left", fontsize=11,
    )  # fmt: skip
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


# ---- samples ----------------------------------------------------------------------------------------------------------------


def samples() -> Any:
    """A row of the ten digits at each temperature, of both sizes."""
    labels = torch.arange(10)
    figure, axes = plt.subplots(
        len(TEMPERATURES), 2, figsize=(9.0, 0.55 * len(TEMPERATURES) + 0.5), layout="constrained"
    )
    for column, (name, levels) in enumerate((("digits-glow", 17), ("mnist-glow", 256))):
        model = Glow.load(find_weights(name), dtype=torch.float32)
        for row, temperature in enumerate(TEMPERATURES):
            images = from_unit_interval(model.sample(10, labels, seeds=range(10), temperature=temperature), levels)
            axis = axes[row][column]
            axis.imshow(to_pixels(images, ink=True).transpose(1, 0, 2, 3).reshape(images.shape[2], -1, 3))
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_color("#bbbbbb")
            if column == 0:
                axis.set_ylabel(f"{temperature:g}", rotation=0, ha="right", va="center", fontsize=10)
        axes[0][column].set_title(f"{name}, {model.shape[1]} x {model.shape[2]}", fontsize=11)
    figure.supylabel("temperature", fontsize=10)
    return figure


def interpolation() -> Any:
    """A row a pair of digits, held-out ones at its ends, between them the great circle of their latents."""
    _, stages = interpolated(MultiScaleRealNVP.load(find_weights("digits-realnvp"), dtype=torch.float32))
    figure, axes = plt.subplots(
        len(stages), 1, figsize=(0.75 * stages.shape[1], 0.8 * len(stages)), layout="constrained"
    )
    for axis, images in zip(axes, stages, strict=True):
        framed = torch.nn.functional.pad(images, (1, 1, 1, 1), value=-1.0)
        axis.imshow(to_pixels(framed, ink=True).transpose(1, 0, 2, 3).reshape(framed.shape[2], -1, 3))
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_color("#bbbbbb")
    return figure


# ---- all --------------------------------------------------------------------------------------------------------------------


def _axes(x: str, y: str, ticks: Sequence[int]) -> tuple[Any, Any]:
    figure, axis = plt.subplots(figsize=(7.5, 4.4), layout="constrained")
    axis.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(which="major", color="#e5e5e5")
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", choices=[*NAMES, []], help="(default: all)")
    parser.add_argument(
        "--features", type=int, nargs="*", choices=FEATURES, help="measure samples of these MAFs alone, if any"
    )
    parser.add_argument("--trial", type=Path, metavar="FOLDER", help="few and small ones, into FOLDER")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trial:
        args.trial.mkdir(parents=True, exist_ok=True)
    if args.one:
        print(peak(*json.loads(args.one)))
        return
    drawn = {
        "memory": ("flow_memory.png", lambda: memory(bool(args.trial))),
        "sampling": ("maf_sampling.png", lambda: sampling(args.trial, args.features)),
        "samples": ("flow_samples.png", samples),
        "interpolation": ("flow_interpolation.png", interpolation),
    }
    for what in args.what or drawn:
        name, draw = drawn[what]
        figure = draw()
        if args.trial:
            figure.savefig(args.trial / name, dpi=100)
        else:
            save_figure(figure, name)


if __name__ == "__main__":
    main()
