"""`fastgen demo digits`: real digits drawn twice, through plain torch and through fastgen, compared, timed and judged."""

import argparse
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from ..._files import check_writable
from ...data import IMAGE_SHAPE, NUM_CLASSES
from ...models import UNet, find_weights
from ...nn import GroupNorm, PlainGroupNorm
from ...samplers import DDIM, DDPM, ClassifierFreeGuidance, DiscreteSolver, Plan, draw_normal, squared_cosine_betas
from .._errors import UsageError, argument_errors
from .digit_scores import DigitJudge
from .pictures import draw_grid, draw_trajectory
from .plain_sampling import PlainSampler
from .report import Comparison, Side, print_report, write_report

WEIGHTS = "digits-ddpm"
PICTURES = ("digits.png", "trajectory.png", "report.md")
PER_CLASS = 10
GUIDANCE_SCALE = 2.0
STEPS = {"DDIM": 50, "DDPM": 100}
WANTED = 0.95  # share of the digits read as the class asked for
AGREE = 1e-2  # largest difference of a pixel in [-1, 1] after a whole trajectory in float32


def run(args: argparse.Namespace) -> int:
    """Draw, compare, judge, write; returns 0 if both ways agree and the digits are recognised."""
    plain_model, fused_model = _load(args.weights or WEIGHTS, PlainGroupNorm), _load(args.weights or WEIGHTS, GroupNorm)
    betas = squared_cosine_betas()
    solvers: dict[str, DiscreteSolver] = {
        "DDIM": DDIM(betas=betas, use_clipped_model_output=True),
        "DDPM": DDPM(betas=betas),
    }
    plans = {}
    for name, solver in solvers.items():
        with argument_errors("--steps"):
            plans[name] = solver.plan(args.steps or STEPS[name], guidance_scale=GUIDANCE_SCALE).to("cpu")
    for name in PICTURES:
        check_writable(args.out / name)
    torch.manual_seed(args.seed)
    judge = DigitJudge()
    labels = torch.arange(NUM_CLASSES).repeat_interleave(PER_CLASS)
    comparisons = [
        _compare(name, solvers[name].betas, plan, (plain_model, fused_model), args, labels)
        for name, plan in plans.items()
    ]
    scores = {c.name: judge.recognised(c.fused.images, labels) for c in comparisons}
    held_out = judge.held_out_recognised()
    copies = judge.copies(torch.cat([c.fused.images for c in comparisons]))

    panels = {f"{c.name}, {c.steps} steps: {scores[c.name]:.0%} recognised": c.fused.images for c in comparisons}
    draw_grid(args.out / "digits.png", panels)
    draw_trajectory(args.out / "trajectory.png", comparisons[0].trajectory)
    print_report(comparisons, scores, held_out, copies)
    write_report(args.out / "report.md", comparisons, scores, held_out, copies)
    print(f"wrote {args.out / 'digits.png'}, {args.out / 'trajectory.png'} and {args.out / 'report.md'}")

    failures = [
        f"{c.name}: the two ways differ by {c.difference:.1e}" for c in comparisons if not c.difference <= AGREE
    ]
    failures += [f"{name}: only {score:.0%} recognised" for name, score in scores.items() if score < WANTED]
    for failure in failures:
        print(f"fastgen demo: FAILED: {failure}")
    return 1 if failures else 0


def _load(weights: str, norm: type[torch.nn.Module]) -> UNet:
    path = find_weights(weights)
    model = UNet.load(path, norm=norm)
    if (model.in_channels, model.out_channels, model.num_classes, model.null_label) != (1, 1, NUM_CLASSES, NUM_CLASSES):
        raise UsageError(f"--weights {path}: not a model of digits with {NUM_CLASSES} classes and a null class")
    return model


@torch.no_grad()
def _compare(
    name: str, betas: Tensor, plan: Plan, models: tuple[UNet, UNet], args: argparse.Namespace, labels: Tensor
) -> Comparison:
    """Both trajectories at once, step by step, in turns, so that neither has the quieter machine."""
    n, shape = len(labels), (len(labels), *IMAGE_SHAPE)
    (plain_model, fused_model), steps = models, len(plan.timesteps)
    plain_sampler = PlainSampler(name.lower(), betas, [int(t) for t in plan.timesteps], GUIDANCE_SCALE)
    null = {"y": torch.full((n,), fused_model.null_label or 0)}
    plain_guided = ClassifierFreeGuidance(plain_model, {"y": labels}, null)
    fused_guided = ClassifierFreeGuidance(fused_model, {"y": labels}, null)

    def start() -> Side:
        generator = torch.Generator().manual_seed(args.seed)
        return Side(draw_normal(shape, generator, "cpu"), generator)

    result = Comparison(name, steps, start(), start())
    seeds = torch.arange(n)
    shown = {round(k * (steps - 1) / 8) for k in range(8)}
    shown_images = [digit * PER_CLASS + PER_CLASS // 2 for digit in (3, 7)]

    def plain_step(i: int, t: Tensor) -> None:
        side = result.plain
        (cond, uncond), seconds = _timed(lambda: plain_guided.pair.together(side.images, t))
        side.model_seconds += seconds
        side.images, seconds = _timed(lambda: plain_sampler.step(cond, uncond, i, side.images, side.generator))
        side.step_seconds += seconds

    def fused_step(i: int, t: Tensor) -> None:
        side = result.fused
        (cond, uncond), seconds = _timed(lambda: fused_guided.pair.together(side.images, t))
        side.model_seconds += seconds
        _, seconds = _timed(lambda: plan.step(cond, i, side.images, uncond=uncond, seeds=seeds))
        result.seeds_step_seconds += seconds
        side.images, seconds = _timed(lambda: _generator_step(plan, cond, uncond, i, side))
        side.step_seconds += seconds

    for model in (plain_guided, fused_guided):  # first calls allocate
        model(result.plain.images, torch.zeros(n))
    timesteps = torch.tensor(plan.timesteps)
    for i, t in enumerate(
        tqdm(plan.timesteps, desc=f"{name}, both ways", unit="step", disable=args.quiet or None, leave=False)
    ):
        if i in shown:
            result.trajectory.append((t, result.fused.images[shown_images].clone()))
        for step in (plain_step, fused_step)[:: 1 if i % 2 else -1]:
            step(i, timesteps[i].expand(n))
    result.trajectory.append((-1, result.fused.images[shown_images].clone()))
    return result


def _generator_step(plan: Plan, cond: Tensor, uncond: Tensor, i: int, side: Side) -> Tensor:
    noise = draw_normal(side.images.shape, side.generator, "cpu") if plan.draws_noise[i] else None
    result = plan.step(cond, i, side.images, uncond=uncond, noise=noise)
    assert isinstance(result, Tensor)
    return result


Result = TypeVar("Result")


def _timed(function: Callable[[], Result]) -> tuple[Result, float]:
    begin = time.perf_counter()
    result = function()
    return result, time.perf_counter() - begin
