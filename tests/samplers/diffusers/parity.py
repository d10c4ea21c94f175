"""Whole trajectories of a scheduler and its stand-in: same model, same noise, same calls as a pipeline makes."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastgen.samplers import diffusers as ours

SHAPE = (2, 3, 6, 5)


def model(x: Tensor, t: float, channels: int = 1) -> Tensor:
    """Smooth, bounded, different for every timestep; bounded outputs keep trajectories of 10 steps well conditioned."""
    phase = t * 0.013
    out = torch.tanh(0.8 * x) * torch.cos(torch.tensor(phase, dtype=x.dtype)) + 0.3 * torch.sin(x + phase)
    return torch.cat([out] * channels, dim=1) if channels > 1 else out


def pair(name: str, **config: Any) -> tuple[Any, Any]:
    """(fastgen's, diffusers') scheduler of one class and configuration."""
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(ours, name)(**config), getattr(diffusers, name)(**config)


class Torch64:
    """torch, where float32 means float64: some of diffusers' steps cast the sample to float32."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name == "float32" else getattr(torch, name)


@contextlib.contextmanager
def in_float64(scheduler: Any) -> Iterator[None]:
    """diffusers keeps levels in float32 and works out coefficients in it; the same levels in float64 show the formula."""
    lift(scheduler)
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch(f"{type(scheduler).__module__}.torch", Torch64()):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def lift(scheduler: Any) -> None:
    for name, value in vars(scheduler).items():
        floating = isinstance(value, Tensor) and value.dtype == torch.float32
        if floating and name not in ("timesteps",):
            setattr(scheduler, name, value.double())
    if hasattr(scheduler, "sigmas_interpol"):  # KDPM2 keeps what it has worked out of the levels
        levels = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]])
        following = torch.cat([levels[1:], levels.new_zeros(1)])
        up = (following**2 * (levels**2 - following**2) / levels**2).nan_to_num(0).sqrt()
        down = (following**2 - up**2).clamp_min(0).sqrt()
        ancestral = hasattr(scheduler, "sigmas_down")
        between = (levels.log() + (down if ancestral else levels.roll(1)).log()).mul(0.5).exp()
        if ancestral:
            between[-2:] = 0
            scheduler.sigmas_up, scheduler.sigmas_down = doubled(up), doubled(down)
        scheduler.sigmas_interpol = doubled(between)


def doubled(levels: Tensor) -> Tensor:
    return torch.cat([levels[:1], levels[1:].repeat_interleave(2), levels[-1:]])


def run(
    scheduler: Any,
    dtype: torch.dtype,
    *,
    channels: int = 1,
    begin: int | None = None,
    clock: Any = None,
    rounds: bool = False,
    **options: Any,
) -> list[Tensor]:
    """The samples of a trajectory; ``clock`` is the scheduler whose timesteps and first sigma the model goes by. ``rounds``: each
    sample is rounded to float32 before the next step, to see what a trajectory makes of that."""
    clock = clock or scheduler
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)
    x = x * float(getattr(clock, "init_noise_sigma", 1.0))  # flow schedulers of diffusers have none
    if "generator" in scheduler.step.__code__.co_varnames:
        options["generator"] = generator
    if begin is not None:
        scheduler.set_begin_index(begin)
    if dtype == torch.float64:  # the same noise as in float32
        with mock.patch("torch.randn", _single_randn):
            return _follow(scheduler, x, clock, channels, begin or 0, rounds, options)
    return _follow(scheduler, x, clock, channels, begin or 0, rounds, options)


_randn = torch.randn


def _single_randn(*args: Any, dtype: Any = None, **kwargs: Any) -> Tensor:
    return _randn(*args, dtype=torch.float32, **kwargs).to(dtype)


def _follow(
    scheduler: Any, x: Tensor, clock: Any, channels: int, begin: int, rounds: bool, options: dict[str, Any]
) -> list[Tensor]:
    samples = []
    for t, now in zip(scheduler.timesteps[begin:], clock.timesteps[begin:].tolist(), strict=True):
        inputs = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(model(inputs, now, channels), t, x, return_dict=False, **options)[0]
        samples.append(x)
        x = x.float().to(x.dtype) if rounds else x
    return samples


def error(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference along two trajectories, relative to the largest value of each step, or to 1."""
    assert len(a) == len(b), (len(a), len(b))
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        assert x.isfinite().all() and y.isfinite().all()
        worst = max(worst, float((x.double() - y.double()).abs().max() / y.double().abs().max().clamp_min(1.0)))
    return worst
