"""What all demonstrations do: draw 100 digits both ways, compare and time the two, judge the digits, write pictures and report."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..._files import check_writable
from ...data import NUM_CLASSES
from ...models import UNet, find_weights
from ...nn import GroupNorm, PlainGroupNorm
from ...samplers import DDIM, DDPM, DiscreteSolver
from ...training import SCHEDULES, TrainingRecord
from .._errors import UsageError, argument_errors
from .both_ways import Comparison, compare
from .pictures import draw_grid, draw_trajectory
from .plain_sampling import PlainSampler
from .report import print_report, write_report

PICTURES = ("digits.png", "trajectory.png", "report.md")
PER_CLASS = 10
GUIDANCE_SCALE = 2.0
WANTED = 0.95  # share of the digits read as the class asked for
AGREE = 1e-2  # largest difference of a pixel in [-1, 1] after a whole trajectory in float32


@dataclass(frozen=True)
class Demonstration:
    """Which digits are drawn, and how.

    Args:
        weights: those shipped for it.
        image_shape: (C, H, W) of its images.
        steps: of each sampler, ``"DDIM"`` and ``"DDPM"``; a divisor of the length of the noise schedule.
    """

    weights: str
    image_shape: tuple[int, int, int]
    steps: Mapping[str, int]


class Judge(Protocol):
    """Reads digits: `DigitJudge`, `MnistJudge`."""

    def recognised(self, images: Tensor, labels: Tensor) -> float: ...

    def findings(self, images: Tensor) -> list[str]: ...


def demonstrate(demo: Demonstration, args: argparse.Namespace, make_judge: Callable[[], Judge]) -> int:
    """Run ``demo``; returns 0 if both ways agree and the digits are recognised."""
    path = find_weights(args.weights or demo.weights)
    record = TrainingRecord.read(path)
    models = _load(path, record, demo, PlainGroupNorm), _load(path, record, demo, GroupNorm)
    solvers = _solvers(record)
    plans = {}
    for name, solver in solvers.items():
        with argument_errors("--steps"):
            plans[name] = solver.plan(args.steps or demo.steps[name], guidance_scale=GUIDANCE_SCALE).to("cpu")
    for name in PICTURES:
        check_writable(args.out / name)
    torch.manual_seed(args.seed)
    judge = make_judge()
    labels = torch.arange(NUM_CLASSES).repeat_interleave(PER_CLASS)
    comparisons = []
    for name, plan in plans.items():
        plain = PlainSampler(
            name.lower(),
            solvers[name].betas,
            [int(t) for t in plan.timesteps],
            GUIDANCE_SCALE,
            solvers[name].prediction_type,
        )
        comparisons.append(compare(name, plain, plan, models, labels, demo.image_shape, args.seed, args.quiet))
    scores = {c.name: judge.recognised(c.fused.images, labels) for c in comparisons}
    findings = _findings(comparisons, scores) + judge.findings(torch.cat([c.fused.images for c in comparisons]))

    draw_grid(args.out / "digits.png", [_panels(c, scores[c.name]) for c in comparisons])
    draw_trajectory(args.out / "trajectory.png", comparisons[0].trajectory)
    print_report(comparisons, findings)
    write_report(args.out / "report.md", comparisons, findings)
    print(f"wrote {args.out / 'digits.png'}, {args.out / 'trajectory.png'} and {args.out / 'report.md'}")

    failures = [
        f"{c.name}: the two ways differ by {c.difference:.1e}" for c in comparisons if not c.difference <= AGREE
    ]
    failures += [f"{name}: only {score:.0%} recognised" for name, score in scores.items() if score < WANTED]
    for failure in failures:
        print(f"fastgen demo: FAILED: {failure}")
    return 1 if failures else 0


def _load(path: Path, record: TrainingRecord, demo: Demonstration, norm: type[torch.nn.Module]) -> UNet:
    model = UNet.load(path, dtype=torch.float32, norm=norm)
    if (model.in_channels, model.out_channels, model.num_classes, model.null_label) != (1, 1, NUM_CLASSES, NUM_CLASSES):
        raise UsageError(f"--weights {path}: not a model of digits with {NUM_CLASSES} classes and a null class")
    if record.image_shape not in (None, demo.image_shape):
        raise UsageError(f"--weights {path}: draws images of shape {record.image_shape}, not {demo.image_shape}")
    if norm is GroupNorm:  # each way in the layout that is the faster for it
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _solvers(record: TrainingRecord) -> dict[str, DiscreteSolver]:
    betas = SCHEDULES[record.schedule or "squared_cosine"](record.timesteps or 1000)
    kind = record.prediction_type or "epsilon"
    # a prediction of the noise says nothing where there is nothing else: it begins a little before the end of the schedule
    spacing = "leading" if kind == "epsilon" else "trailing"
    common: dict[str, Any] = {"betas": betas, "prediction_type": kind, "timestep_spacing": spacing}
    return {"DDIM": DDIM(**common, use_clipped_model_output=True), "DDPM": DDPM(**common)}


def _panels(c: Comparison, score: float) -> dict[str, Tensor]:
    return {
        f"{c.name}, {c.steps} steps, plain torch: {c.plain.seconds:.1f} s": c.plain.images,
        f"fastgen: {c.fused.seconds:.1f} s, {score:.0%} read as asked": c.fused.images,
    }


def _findings(comparisons: list[Comparison], scores: Mapping[str, float]) -> list[str]:
    lines = [
        f"{c.name}: largest difference between the two ways, pixels in [-1, 1]: {c.difference:.1e}" for c in comparisons
    ]
    return lines + [
        f"{name}: {score:.1%} of the drawn digits are read as the class asked for" for name, score in scores.items()
    ]
