"""`fastgen demo`: real digits drawn twice, through plain torch and through fastgen, compared, timed and judged."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from ...data import IMAGE_SHAPE, NUM_CLASSES
from ...models import UNet, find_weights
from ...nn import PlainGroupNorm
from ...samplers import DDIM, DDPM, ClassifierFreeGuidance, DiscreteSolver, Plan, draw_normal, squared_cosine_betas
from .digit_scores import DigitJudge
from .pictures import draw_grid, draw_trajectory
from .plain_sampling import PlainSampler
from .report import Comparison, Side, print_report, write_report

WEIGHTS = "digits-ddpm"
PER_CLASS = 10
GUIDANCE_SCALE = 2.0
STEPS = {"DDIM": 50, "DDPM": 100}
WANTED = 0.95  # share of the digits read as the class asked for
AGREE = 1e-2  # largest difference of a pixel in [-1, 1] after a whole trajectory in float32


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """Add the `demo` sub-command."""
    parser = subparsers.add_parser(
        "demo",
        help="draw real digits with and without fastgen, compare and time both",
        description="Draw 10 x 10 digits with DDIM and with DDPM, through plain torch and through fastgen.",
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of pictures and report (default: demo)")
    parser.add_argument("--weights", default=WEIGHTS, help="file, or name of shipped weights (default: digits-ddpm)")
    parser.add_argument("--seed", type=int, default=0, help="of the generators (default: 0)")
    parser.add_argument("--steps", type=int, help="of both samplers (default: DDIM 50, DDPM 100)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def run(args: argparse.Namespace) -> int:
    """Draw, compare, judge, write; returns 0 if both ways agree and the digits are recognised."""
    torch.manual_seed(args.seed)
    judge = DigitJudge()
    labels = torch.arange(NUM_CLASSES).repeat_interleave(PER_CLASS)
    betas = squared_cosine_betas()
    solvers: dict[str, DiscreteSolver] = {
        "DDIM": DDIM(betas=betas, use_clipped_model_output=True),
        "DDPM": DDPM(betas=betas),
    }
    comparisons = [_compare(name, solver, args.steps or STEPS[name], args, labels) for name, solver in solvers.items()]
    scores = {c.name: judge.recognised(c.fused.images, labels) for c in comparisons}
    held_out = judge.held_out_recognised()
    copies = judge.copies(torch.cat([c.fused.images for c in comparisons]))

    args.out.mkdir(parents=True, exist_ok=True)
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


@torch.no_grad()
def _compare(name: str, solver: DiscreteSolver, steps: int, args: argparse.Namespace, labels: Tensor) -> Comparison:
    """Both trajectories at once, step by step, in turns, so that neither has the quieter machine."""
    n, shape = len(labels), (len(labels), *IMAGE_SHAPE)
    plain_model = UNet.load(find_weights(args.weights), norm=PlainGroupNorm)
    fused_model = UNet.load(find_weights(args.weights))
    plan = solver.plan(steps, guidance_scale=GUIDANCE_SCALE).to("cpu")
    plain_sampler = PlainSampler(name.lower(), solver.betas, [int(t) for t in plan.timesteps], GUIDANCE_SCALE)
    null = {"y": torch.full((n,), fused_model.null_label or 0)}
    plain_guided = ClassifierFreeGuidance(plain_model, {"y": labels}, null)
    fused_guided = ClassifierFreeGuidance(fused_model, {"y": labels}, null)

    def start() -> Side:
        generator = torch.Generator().manual_seed(args.seed)
        return Side(draw_normal(shape, generator, "cpu"), generator)

    result = Comparison(name, steps, start(), start())
    seeds = torch.arange(n)
    shown = {round(k * (steps - 1) / 8) for k in range(8)}

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
            result.trajectory.append((t, result.fused.images[[35, 75]].clone()))
        for step in (plain_step, fused_step)[:: 1 if i % 2 else -1]:
            step(i, timesteps[i].expand(n))
    result.trajectory.append((-1, result.fused.images[[35, 75]].clone()))
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
