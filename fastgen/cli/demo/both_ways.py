"""The same digits through plain torch and through fastgen, step by step in turns, each part of either timed."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from ...models import UNet
from ...samplers import ClassifierFreeGuidance, Plan, draw_normal
from .plain_sampling import PlainSampler

SHOWN_STATES = 8  # of the trajectory, before the image
SHOWN_CLASSES = (3, 7)


@dataclass
class Side:
    """One of the two ways: its images and the seconds its parts took."""

    images: Tensor
    generator: torch.Generator
    model_seconds: float = 0.0
    step_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return self.model_seconds + self.step_seconds


@dataclass
class Comparison:
    """One sampler, both ways."""

    name: str
    steps: int
    plain: Side
    fused: Side
    seeds_step_seconds: float = 0.0
    trajectory: list[tuple[int, Tensor]] = field(default_factory=list)

    @property
    def difference(self) -> float:
        return float((self.plain.images - self.fused.images).abs().max())


@torch.no_grad()
def compare(
    name: str,
    plain_sampler: PlainSampler,
    plan: Plan,
    models: tuple[UNet, UNet],
    labels: Tensor,
    image_shape: tuple[int, int, int],
    seed: int,
    quiet: bool,
) -> Comparison:
    """Both trajectories at once, in turns, so that neither has the quieter machine.

    Args:
        name: of the sampler.
        plain_sampler: its steps in plain torch.
        plan: the same steps as fastgen has them.
        models: the plain one and the fused one.
        labels: [N], the classes to draw, in order.
        image_shape: (C, H, W).
        seed: of the generators.
        quiet: no progress bar.
    """
    n, steps = len(labels), len(plan.timesteps)
    null = {"y": torch.full((n,), models[1].null_label or 0)}
    plain_guided, fused_guided = (ClassifierFreeGuidance(model, {"y": labels}, null) for model in models)

    def start() -> Side:
        generator = torch.Generator().manual_seed(seed)
        return Side(draw_normal((n, *image_shape), generator, "cpu"), generator)

    result = Comparison(name, steps, start(), start())
    seeds = torch.arange(n)
    shown = {round(k * (steps - 1) / SHOWN_STATES) for k in range(SHOWN_STATES)}
    shown_images = [int((labels == digit).nonzero().median()) for digit in SHOWN_CLASSES]

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
        tqdm(plan.timesteps, desc=f"{name}, both ways", unit="step", disable=quiet or None, leave=False)
    ):
        if i in shown:
            result.trajectory.append((int(t), result.fused.images[shown_images].clone()))
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
