"""Whole trajectories of a scheduler and its stand-in: same model, same noise, same calls as a pipeline makes.

Beside both stands the exact one: the parent's code in float64, with the coefficients that it works out from its levels in float32.
"""

import contextlib
import importlib
import inspect
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from fastgen.samplers import diffusers as ours
from fastgen.samplers.diffusers import move
from fastgen.samplers.diffusers.session import MEMORY

from ...backends import import_peer
from ..rounding import ROUNDINGS, UNIT
from .cases import Case

SHAPE = (2, 3, 6, 5)
NEED_TORCHSDE = {
    "DPMSolverSDEScheduler": "dpmsolver_sde",
    "CosineDPMSolverMultistepScheduler": "cosine_dpmsolver_multistep",
}
diffusers = import_peer("diffusers")


def remembered(sigma_to_t: Callable[..., Any]) -> Callable[..., Any]:
    """A function of KDPM2 that each of its constructors calls a thousand times, half a second in all."""
    known: dict[Any, Any] = {}

    def call(self: Any, sigma: Any, log_sigmas: Any) -> Any:
        sigma_, log_sigmas_ = np.asarray(sigma), np.asarray(log_sigmas)
        key = sigma_.dtype, sigma_.shape, sigma_.tobytes(), log_sigmas_.dtype, log_sigmas_.tobytes()
        if key not in known:
            known[key] = sigma_to_t(self, sigma, log_sigmas)
        return known[key]

    return call


for cls in (diffusers.KDPM2DiscreteScheduler, diffusers.KDPM2AncestralDiscreteScheduler):
    cls._sigma_to_t = remembered(cls._sigma_to_t)


def model(x: Tensor, t: float, channels: int = 1) -> Tensor:
    """Smooth, bounded, different for every timestep; bounded outputs keep trajectories of 10 steps well conditioned."""
    phase = t * 0.013
    out = torch.tanh(0.8 * x) * torch.cos(torch.tensor(phase, dtype=x.dtype)) + 0.3 * torch.sin(x + phase)
    return torch.cat([out] * channels, dim=1) if channels > 1 else out


def parent(name: str) -> Any:
    """diffusers' class; two of them are hidden where torchsde is not installed, which only their own noise needs."""
    found = getattr(diffusers, name)
    if name not in NEED_TORCHSDE or "dummy" not in found.__module__:
        return found
    module = f"diffusers.schedulers.scheduling_{NEED_TORCHSDE[name]}"
    sys.modules["torchsde"] = types.ModuleType("torchsde")  # while it is imported
    try:
        return getattr(importlib.import_module(module), name)
    finally:
        del sys.modules["torchsde"]


def made(cls: Any, config: Mapping[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(**config)


def pair(name: str, **config: Any) -> tuple[Any, Any]:
    """(fastgen's, diffusers') scheduler of one class and configuration."""
    return made(ours.stand_in(parent(name)), config), made(parent(name), config)


# ---- one noise and one arithmetic for all dtypes ------------------------------------------------------------------------------


class Torch64:
    """torch, where float32 means float64: some of diffusers' steps cast the sample to float32."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name == "float32" else getattr(torch, name)


@contextlib.contextmanager
def in_float64(cls: Any) -> Iterator[None]:
    """Steps of a class of diffusers, and of its stand-in, work in the dtype of a float64 sample throughout."""
    MEMORY.clear()
    try:
        with mock.patch.object(sys.modules[cls.__module__], "torch", Torch64()):
            yield
    finally:
        MEMORY.clear()  # what has been followed here is not what the class does


@contextlib.contextmanager
def one_noise(cls: Any) -> Iterator[None]:
    """Whatever dtype a step draws its noise in, it gets what float32 would have been."""

    def draw(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, layout: Any = None) -> Tensor:
        return torch.randn(tuple(shape), generator=generator).to(dtype or torch.float32)

    theirs = mock.patch.object(sys.modules[cls.__module__], "randn_tensor", draw, create=True)
    with theirs, mock.patch.object(move, "draw_normal", draw):
        yield


# ---- trajectories -------------------------------------------------------------------------------------------------------------


def run(
    scheduler: Any,
    case: Case,
    dtype: torch.dtype = torch.float32,
    *,
    steps: int = 10,
    begin: int = 0,
    exact: bool = False,
    rounds: bool = False,
) -> list[Tensor]:
    """The samples of a trajectory.

    Args:
        begin: the first step, as of image to image.
        exact: in float64 throughout.
        rounds: each sample is rounded to float32 before the next step, to see what a trajectory makes of that.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler.set_timesteps(steps)
    if begin:
        scheduler.set_begin_index(begin)
    cls = getattr(scheduler, "parent", type(scheduler))
    with one_noise(cls), in_float64(cls) if exact else contextlib.nullcontext():
        return _follow(scheduler, case, dtype, begin, rounds)


def _follow(scheduler: Any, case: Case, dtype: torch.dtype, begin: int, rounds: bool) -> list[Tensor]:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x = (x * float(getattr(scheduler, "init_noise_sigma", 1.0))).to(dtype)  # flow schedulers of diffusers have none
    options = dict(case.options)
    takes = inspect.signature(scheduler.step).parameters
    if "generator" in takes:
        options["generator"] = torch.Generator().manual_seed(3)
    if "variance_noise" in takes and case.config.get("algorithm_type", "").startswith("sde"):
        options["variance_noise"] = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype)
    samples = []
    for t in scheduler.timesteps[begin:]:
        inputs = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(model(inputs, float(t), case.channels), t, x, return_dict=False, **options)[0]
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


class Parents(NamedTuple):
    """What a stand-in is held against; ``of_rounding``: what float32 does to the trajectory, at least one rounding."""

    scheduler: Any
    exact: list[Tensor]
    off: float  # of the parent's in float32
    of_rounding: float


def parents(case: Case, **kwargs: Any) -> Parents:
    scheduler = made(parent(case.name), case.config)
    exact, rounded = (run(scheduler, case, torch.float64, exact=True, rounds=r, **kwargs) for r in (False, True))
    off = error(run(scheduler, case, **kwargs), exact)
    return Parents(scheduler, exact, off, max(error(rounded, exact), UNIT))


def check(case: Case, **kwargs: Any) -> None:
    """A stand-in beside its parent: as close in float64 and in float32 as these allow, and no call left to the parent.

    A step in float32 rounds its coefficients and terms too, up to ``ROUNDINGS`` times as often as its sample. Where the parent's
    error is larger than that, the stand-in's may be twice the parent's. float64 does to a trajectory what float32 does, by 2^-29.
    """
    theirs = parents(case, **kwargs)
    mine = ours.from_diffusers(theirs.scheduler)
    off = error(run(mine, case, **kwargs), theirs.exact)
    assert off <= max(2 * theirs.off, ROUNDINGS * theirs.of_rounding), f"float32 {off:.1e} off, {theirs[2:]} beside it"
    off = error(run(mine, case, torch.float64, exact=True, **kwargs), theirs.exact)
    allowed = ROUNDINGS * max(theirs.off, theirs.of_rounding) * 2.0**-29
    assert off <= allowed, f"float64 {off:.1e} off, where {allowed:.1e} are allowed"
    assert mine.fallbacks == {}
    assert torch.equal(mine.timesteps, theirs.scheduler.timesteps)
