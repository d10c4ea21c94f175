"""`sampler_step` as one step of DDPM (noise drawn inside the kernel) and of DDIM (eta 0), beside diffusers' schedulers.

diffusers draws its noise in the step too. The floors: one pass that reads sample and model output and writes one tensor of
the size, and for DDPM the time `philox_normal` needs for as many normals.
"""

import functools
import importlib.util
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastgen.ops import COLUMNS, philox_normal, sampler_step

from ..cases import AS_USED, DTYPES, WITH_SEEDS, Case, Provider, Workload, compiled, random_tensor
from ..verify import Normals, Outputs, Values

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
    row = {"prediction_sample": 1 / math.sqrt(here), "prediction_model": -math.sqrt((1 - here) / here)}
    if mode == "ddim":
        return row | {"prediction": math.sqrt(before), "model": math.sqrt(1 - before)}
    alpha = here / before
    return row | {
        "prediction": math.sqrt(before) * (1 - alpha) / (1 - here),
        "sample": math.sqrt(alpha) * (1 - before) / (1 - here),
        "noise": math.sqrt((1 - before) / (1 - here) * (1 - alpha)),
    }


COEFFICIENTS = {mode: coefficients(mode) for mode in MODES}


def plain_ddpm(x: Tensor, model: Tensor, noise: Tensor | None = None) -> Tensor:
    """The step as a sampler in plain torch has it; ``noise`` is drawn where it is not given."""
    c = COEFFICIENTS["ddpm"]
    prediction = (c["prediction_sample"] * x + c["prediction_model"] * model).clamp(-1, 1)
    noise = torch.randn_like(x) if noise is None else noise
    return c["prediction"] * prediction + c["sample"] * x + c["noise"] * noise


def plain_ddim(x: Tensor, model: Tensor) -> Tensor:
    c = COEFFICIENTS["ddim"]
    prediction = (c["prediction_sample"] * x + c["prediction_model"] * model).clamp(-1, 1)
    return c["prediction"] * prediction + c["model"] * model


def cases(device: torch.device, full: bool) -> list[Case]:
    dtypes = ("fp32", "fp16") if device.type == "cuda" else ("fp32",)
    return [
        Case(
            "sampler_step", mode, shape, dtype, functools.partial(build, mode, shape, dtype, device),
            f"one {mode.upper()} step, {'x'.join(map(str, shape))}", WITH_SEEDS if mode == "ddpm" else AS_USED,
        )
        for mode in MODES
        for shape in SHAPES
        for dtype in dtypes
    ]  # fmt: skip


def build(mode: str, shape: tuple[int, ...], dtype: str, device: torch.device, allow_compile: bool) -> Workload:
    x = random_tensor(shape, device, dtype, seed=0)
    model = random_tensor(shape, device, dtype, seed=1)
    stochastic = mode == "ddpm"
    plain = plain_ddpm if stochastic else plain_ddim
    seeds = torch.arange(1, shape[0] + 1, dtype=torch.int64, device=device)
    table = torch.zeros(STEP + 1, len(COLUMNS), dtype=torch.float32)
    for name, value in ({"clip_min": -1.0, "clip_max": 1.0} | COEFFICIENTS[mode]).items():
        table[STEP, COLUMNS.index(name)] = value
    table = table.to(device)
    notes: list[str] = []
    calls: dict[str, Callable[[], Tensor]] = {"eager": functools.partial(plain, x, model)}
    if function := compiled(plain, (x, model), allow_compile, notes):
        calls["compile"] = functools.partial(function, x, model)
    if importlib.util.find_spec("diffusers") is None:
        notes.append("diffusers is not installed: its scheduler is not measured")
    else:
        calls["diffusers"] = diffusers_step(mode, x, model, device)

    def fastgen() -> Tensor:
        return sampler_step(x, model, table, STEP, seeds=seeds if stochastic else None)

    def expected(noise: Tensor | None = None) -> Tensor:
        wide = (x.double(), model.double())
        return plain_ddpm(*wide, noise) if noise is not None else plain(*wide)

    def with_the_kernels_noise() -> tuple[Tensor]:
        return (expected(philox_normal(seeds, shape, STEP).double() if stochastic else None),)

    def noise_of(outputs: Outputs) -> Tensor:
        """Of what torch drew."""
        mean = expected(torch.zeros_like(x, dtype=torch.float64))
        return (outputs[0].double() - mean) / COEFFICIENTS["ddpm"]["noise"]

    tolerance = TOLERANCE if dtype == "fp32" else 4 * torch.finfo(DTYPES[dtype]).eps
    exact = Values(with_the_kernels_noise, tolerance=tolerance)
    own_noise = (Normals(noise_of),) if stochastic else ()
    providers = [Provider(name, call, expected=own_noise) for name, call in calls.items()]
    providers += [
        Provider("fastgen", fastgen, "fastgen"),
        Provider("memory", functools.partial(torch.add, x, model), "floor"),
    ]
    if stochastic:
        drawing = functools.partial(philox_normal, seeds, shape, STEP)
        providers.append(Provider("noise", drawing, "floor"))
    elements = math.prod(shape)
    return Workload(
        providers,
        (exact, *own_noise),
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
