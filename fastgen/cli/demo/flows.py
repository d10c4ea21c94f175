"""`fastgen demo flows`: digits at several temperatures, one digit turned into another, and flows trained side by side.

The same models are trained here and in nflows and normflows: as likely in the end, and how much sooner.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._files import check_writable
from ...data import NUM_CLASSES, from_unit_interval, load_digits, load_mnist, load_table, to_levels
from ...flows import bits_per_dim, dequantize
from ...models import FlowModel, Glow, MultiScaleRealNVP, find_weights
from .._autoregressive_recipes import DIGIT_LEVELS
from .._errors import UsageError, argument_errors
from .._flow_recipes import FLOW_RECIPES, MNIST_LEVELS
from .digit_scores import DigitJudge
from .flow_peers import Pair, glow_pair, maf_pair, spline_pair
from .flow_report import held_out_line, print_flow_report, write_flow_report
from .flow_training import Setting, contest
from .mnist_scores import MnistJudge
from .pictures import draw_grid, draw_interpolations

PICTURES = ("flows.png", "interpolation.png", "flows.md")
SMALL, LARGE, WITHOUT_CLASSES = "digits-glow", "mnist-glow", "digits-realnvp"
TEMPERATURES = (0.5, 0.7, 1.0)
PER_CLASS = 10
WANTED = 0.85  # share of the digits of 8 x 8 read as the class asked for, at the temperature where it is greatest
BETWEEN = ((3, 8), (4, 9), (1, 7), (5, 6))  # held-out digits that are turned into each other
STAGES = 9
SEEDS = 3
STEPS = {"maf": 300, "spline": 200, "glow": 150}
OF_BOTH = (
    "num_transforms",
    "hidden_features",
    "num_blocks",
    "scale_fn",
    "bound",
    "num_bins",
)  # what a config says of both sides
GLOW = {"num_levels": 2, "num_steps": 4, "hidden_channels": 32}


@dataclass(frozen=True)
class Drawing:
    """Digits [PER_CLASS NUM_CLASSES, 1, H, W] by class, how long they took and how many are read as asked."""

    size: int
    temperature: float
    images: Tensor
    seconds: float
    read: float

    @property
    def title(self) -> str:
        size = f"{self.size} x {self.size}"
        return f"{size}, temperature {self.temperature:g}: {self.seconds:.2f} s, {self.read:.0%} read as asked"


def run(args: argparse.Namespace) -> int:
    """Draw, interpolate, train, compare, judge, write; returns 0 if digits are recognised and the libraries agree."""
    if args.steps is not None:
        raise UsageError("--steps is for `fastgen demo mnist` and `digits`: flows draw in one pass")
    real = None
    if args.data is not None:
        with argument_errors("--data"):
            real = load_mnist(args.data, "train"), load_mnist(args.data, "test")
    paths = {name: find_weights(name) for name in (SMALL, WITHOUT_CLASSES)}
    paths[LARGE] = find_weights(args.weights or LARGE)
    small, large = (Glow.load(paths[name], dtype=torch.float32) for name in (SMALL, LARGE))
    if (large.shape, large.config["num_classes"]) != ((1, 28, 28), NUM_CLASSES):
        raise UsageError(f"--weights {paths[LARGE]}: not a Glow of 28 x 28 digits with {NUM_CLASSES} classes")
    between = MultiScaleRealNVP.load(paths[WITHOUT_CLASSES], dtype=torch.float32)
    for name in PICTURES:
        check_writable(args.out / name)

    judges: dict[int, Any] = {8: DigitJudge(), 28: MnistJudge(real)}
    drawings = [
        [_draw(model, levels, temperature, judges[model.shape[1]], args.seed) for temperature in TEMPERATURES]
        for model, levels in ((small, DIGIT_LEVELS), (large, MNIST_LEVELS))
    ]
    contests = [contest(setting, range(args.seed, args.seed + SEEDS), args.quiet) for setting in _settings()]
    best = max(drawing.read for drawing in drawings[0])
    back, turned = interpolated(between)
    findings = [
        *(line for name, path in paths.items() for line in held_out_line(path.stem if path.is_file() else name, path)),
        f"encoded and decoded again, the held-out digits differ by at most {back:.1e} of a pixel in [0, 1)",
        *(line for row in drawings for line in judges[row[0].size].findings(row[1].images)),
    ]  # fmt: skip
    draw_grid(args.out / "flows.png", [{drawing.title: drawing.images for drawing in row} for row in drawings])
    draw_interpolations(args.out / "interpolation.png", turned)
    print_flow_report(contests, findings)
    write_flow_report(args.out / "flows.md", contests, findings)
    print(f"wrote {', '.join(str(args.out / name) for name in PICTURES[:-1])} and {args.out / PICTURES[-1]}")
    failures = [
        f"{c.what}: fastgen and {c.theirs.library} differ by more than the noise" for c in contests if not c.equal
    ]
    failures += [f"only {best:.0%} of the digits of 8 x 8 recognised"] if best < WANTED else []
    failures += [] if back <= 1e-3 else [f"a digit encoded and decoded is another one, by {back:.1e}"]
    for failure in failures:
        print(f"fastgen demo: FAILED: {failure}")
    return 1 if failures else 0


def _draw(model: FlowModel, levels: int, temperature: float, judge: Any, seed: int) -> Drawing:
    labels = torch.arange(NUM_CLASSES).repeat_interleave(PER_CLASS)
    seeds = [seed + i for i in range(len(labels))]
    model.sample(1, labels[:1], seeds=seeds[:1])  # allocates
    begin = time.perf_counter()
    x = model.sample(len(labels), labels, seeds=seeds, temperature=temperature)
    seconds = time.perf_counter() - begin
    images = from_unit_interval(x, levels)
    return Drawing(model.shape[1], temperature, images, seconds, judge.recognised(images, labels))


@torch.no_grad()
def interpolated(model: FlowModel) -> tuple[float, Tensor]:
    """Held-out digits of :data:`BETWEEN`, in pairs, turned into each other along the great circle of their latents.

    Returns:
        The largest error of the two ends, encoded and decoded again, and the images [len(BETWEEN), STAGES, 1, 8, 8] in [-1, 1].
    """
    digits = load_digits("held_out")
    chosen = torch.tensor([[int((digits.labels == label).nonzero()[0]) for label in pair] for pair in BETWEEN])
    x = dequantize(to_levels(digits.images[chosen.flatten()], DIGIT_LEVELS), DIGIT_LEVELS, seeds=range(chosen.numel()))
    z, _ = model(x)
    back = float((model.inverse(z)[0] - x).abs().max())
    first, last = z.unflatten(0, (len(BETWEEN), 2)).unbind(1)  # [pairs, D]
    angle = torch.acos(torch.cosine_similarity(first, last, dim=1))[:, None, None]
    share = torch.linspace(0, 1, STAGES)[None, :, None]
    stages = (torch.sin((1 - share) * angle) * first[:, None] + torch.sin(share * angle) * last[:, None]) / torch.sin(
        angle
    )
    images, _ = model.inverse(stages.flatten(0, 1))
    return back, from_unit_interval(images, DIGIT_LEVELS).unflatten(0, (len(BETWEEN), STAGES))


def _settings() -> list[Setting]:
    """What is trained here and in the peer libraries: the models of the recipes of tables, and a small Glow of digits."""
    train, held_out = (_pixels(split) for split in ("train", "held_out"))
    return [
        _of_table("breast-cancer-maf", "breast_cancer", maf_pair, STEPS["maf"]),
        _of_table("diabetes-spline", "diabetes", spline_pair, STEPS["spline"]),
        Setting(
            "Glow, 8 x 8 digits", "bits/dim", lambda x: glow_pair(x, GLOW), train, held_out,
            lambda nats: bits_per_dim(nats, 64, levels=DIGIT_LEVELS), STEPS["glow"],
        ),
    ]  # fmt: skip


def _of_table(name: str, table: str, make: Callable[[Tensor, dict[str, Any]], Pair], steps: int) -> Setting:
    """The model of a recipe and its table."""
    model = FLOW_RECIPES[name].model.from_config(FLOW_RECIPES[name].config)
    config = {key: value for key, value in model.config.items() if key in OF_BOTH}
    train, held_out = (load_table(table, split).rows for split in ("train", "held_out"))
    what = f"{type(model).__name__}, {table.replace('_', ' ')}"
    return Setting(what, "nats", lambda x: make(x, config), train, held_out, lambda nats: -nats, steps)


def _pixels(split: str) -> Tensor:
    """The digits around 0, each dequantised once."""
    levels = to_levels(load_digits(split).images, DIGIT_LEVELS)
    return dequantize(levels, DIGIT_LEVELS, seeds=range(len(levels))) - 0.5
