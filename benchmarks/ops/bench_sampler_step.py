"""`sampler_step` as one step of DDPM (noise drawn inside the kernel) and of DDIM (eta 0), beside diffusers' schedulers.

diffusers draws its noise in the step too. The floors: one pass that reads sample and model output and writes one tensor of
the size, and for DDPM the time `philox_normal` needs for as many normals.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from fastgen.ops import COLUMNS, philox_normal, sampler_step

from ..cases import DTYPES, Case, Provider, Workload, random_tensor
from ..verify import Check, compare

SHAPES = ((1, 4, 64, 64), (16, 3, 256, 256))
MODES = ("ddpm", "ddim")
TRAIN_STEPS = 1000
DDIM_STEPS = 50
TIMESTEP = 500  # the middle of the trajectory: nothing is trivial there
STEP = 3  # the row of the table that is timed; the others are filler
TOLERANCE = 1e-5
FLOPS_PER_ELEMENT = {"ddpm": 70, "ddim": 10}  # nominal: sixty for a normal, the rest for the row


def alphas_bar() -> Tensor:
    """Products of 1 - beta for the linear schedule of DDPM (Ho et al. 2020), float64, [1000]."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, TRAIN_STEPS, dtype=torch.float64), 0)


def coefficients(mode: str) -> dict[str, float]:
    """One step from :data:`TIMESTEP`, epsilon prediction, x0 clipped to [-1, 1].

    DDPM, eq. 7 of Ho et al. with the "fixed small" variance; DDIM, eq. 12 of Song et al. 2021 with sigma 0.
    """
    bar = alphas_bar()
    here = bar[TIMESTEP].item()
    before = bar[TIMESTEP - (1 if mode == "ddpm" else TRAIN_STEPS // DDIM_STEPS)].item()
    row = {
        "prediction_sample": 1 / math.sqrt(here), "prediction_model": -math.sqrt((1 - here) / here),
        "clip_min": -1.0, "clip_max": 1.0,
    }  # fmt: skip
    if mode == "ddim":
        return row | {"prediction": math.sqrt(before), "model": math.sqrt(1 - before)}
    alpha = here / before
    return row | {
        "prediction": math.sqrt(before) * (1 - alpha) / (1 - here),
        "sample": math.sqrt(alpha) * (1 - before) / (1 - here),
        "noise": math.sqrt((1 - before) / (1 - here) * (1 - alpha)),
    }


def expected_step(mode: str, x: Tensor, model: Tensor, noise: Tensor) -> Tensor:
    """The step from its formula, in float64."""
    c = {name: 0.0 for name in COLUMNS} | coefficients(mode)
    x, model = x.double(), model.double()
    prediction = (c["prediction_sample"] * x + c["prediction_model"] * model).clamp(c["clip_min"], c["clip_max"])
    return c["sample"] * x + c["prediction"] * prediction + c["model"] * model + c["noise"] * noise.double()


def cases(device: torch.device, full: bool) -> list[Case]:
    dtypes = ("fp32", "fp16") if device.type == "cuda" else ("fp32",)
    return [
        Case("sampler_step", mode, shape, dtype, functools.partial(build, mode, shape, dtype, device))
        for mode in MODES
        for shape in SHAPES
        for dtype in dtypes
    ]


def build(mode: str, shape: tuple[int, ...], dtype: str, device: torch.device, allow_compile: bool) -> Workload:
    x = random_tensor(shape, device, dtype, seed=0)
    model = random_tensor(shape, device, dtype, seed=1)
    stochastic = mode == "ddpm"
    seeds = torch.arange(1, shape[0] + 1, dtype=torch.int64, device=device) if stochastic else None
    table = torch.zeros(STEP + 1, len(COLUMNS), dtype=torch.float32)
    for name, value in coefficients(mode).items():
        table[STEP, COLUMNS.index(name)] = value
    table = table.to(device)

    def fastgen() -> Tensor:
        return sampler_step(x, model, table, STEP, seeds=seeds)

    calls: dict[str, Callable[[], Tensor]] = {}
    notes = []
    if importlib.util.find_spec("diffusers") is None:
        notes.append("diffusers is not installed: its scheduler is not measured")
    else:
        calls["diffusers"] = diffusers_step(mode, x, model, device)
    calls["fastgen"] = fastgen

    def noise() -> Tensor:
        return philox_normal(torch.arange(1, shape[0] + 1, dtype=torch.int64, device=device), shape, STEP)

    def check() -> list[Check]:
        """Every provider with the same noise: diffusers is handed the kernel's own normals."""
        drawn = noise()
        patch = "diffusers.schedulers.scheduling_ddpm.randn_tensor"
        outputs = {}
        for name, call in calls.items():
            if name == "diffusers":
                with mock.patch(patch, lambda *args, dtype, **kwargs: drawn.to(dtype)):
                    outputs[name] = (call(),)
            else:
                outputs[name] = (call(),)
        tolerance = TOLERANCE if dtype == "fp32" else 4 * torch.finfo(DTYPES[dtype]).eps
        return compare(outputs, (expected_step(mode, x, model, drawn),), tolerance=tolerance)

    providers = [Provider(name, call, "fastgen" if name == "fastgen" else "baseline") for name, call in calls.items()]
    providers.append(Provider("memory", functools.partial(torch.add, x, model), "floor"))
    if stochastic:
        drawing = functools.partial(philox_normal, seeds, shape, STEP)
        providers.append(Provider("noise", drawing, "floor"))
    elements = math.prod(shape)
    return Workload(
        providers,
        check,
        min_bytes=3 * elements * DTYPES[dtype].itemsize,
        flops=FLOPS_PER_ELEMENT[mode] * elements,
        notes=notes,
    )


def diffusers_step(mode: str, x: Tensor, model: Tensor, device: torch.device) -> Callable[[], Tensor]:
    """One call of the diffusers scheduler with the same schedule, as its pipelines make it."""
    from diffusers import DDIMScheduler, DDPMScheduler

    if mode == "ddim":
        scheduler = DDIMScheduler(num_train_timesteps=TRAIN_STEPS, beta_schedule="linear")
        scheduler.set_timesteps(DDIM_STEPS, device=device)
    else:
        scheduler = DDPMScheduler(num_train_timesteps=TRAIN_STEPS, beta_schedule="linear")
        scheduler.set_timesteps(TRAIN_STEPS, device=device)
    timestep = scheduler.timesteps[scheduler.timesteps.tolist().index(TIMESTEP)]  # a tensor, as in a pipeline's loop
    return lambda: scheduler.step(model, timestep, x, return_dict=False)[0]
