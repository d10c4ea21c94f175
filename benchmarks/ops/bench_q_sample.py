"""`q_sample`: noising a training batch and making its target of v, beside eager and compiled torch.

With noise given, without and with the target; and with the noise drawn: by torch's global generator in the plain functions, from
one seed a sample in the kernel. The floors: one pass that reads two tensors and writes one, and, where noise is drawn, the time
`philox_normal` needs for as many normals.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastgen.ops import philox_normal, q_sample
from fastgen.samplers import alphas_cumprod, linear_betas, noising_tables

from ..cases import AS_USED, DTYPES, WITH_SEEDS, Case, Provider, Workload, compiled, random_tensor
from ..verify import Normals, Outputs, Values

SHAPES = ((128, 3, 32, 32), (16, 3, 256, 256))  # a batch of CIFAR-10, and of 256 x 256 images
MODES = ("x_t", "x_t_and_v", "drawn")
GROUP_OF = {
    "x_t": "`q_sample`, noise given",
    "x_t_and_v": "`q_sample`, noise given, and the target of v",
    "drawn": "`q_sample`, noise drawn, and the target of v",
}
TRAIN_STEPS, STEP = 1000, 3
FLOPS_PER_ELEMENT = {"x_t": 3, "x_t_and_v": 6, "drawn": 66}  # nominal: sixty for a normal
PASSES = {"x_t": 3, "x_t_and_v": 4, "drawn": 3}


def plain_x_t(x0: Tensor, noise: Tensor, t: Tensor, alphas: Tensor, sigmas: Tensor) -> Tensor:
    return alphas[t][:, None, None, None] * x0 + sigmas[t][:, None, None, None] * noise


def plain_x_t_and_v(x0: Tensor, noise: Tensor, t: Tensor, alphas: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    alpha, sigma = alphas[t][:, None, None, None], sigmas[t][:, None, None, None]
    return alpha * x0 + sigma * noise, alpha * noise - sigma * x0


def plain_drawn(x0: Tensor, noise: Tensor, t: Tensor, alphas: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    return plain_x_t_and_v(x0, torch.randn_like(x0), t, alphas, sigmas)


PLAIN: dict[str, Callable] = {"x_t": plain_x_t, "x_t_and_v": plain_x_t_and_v, "drawn": plain_drawn}


def cases(device: torch.device, full: bool) -> list[Case]:
    dtypes = ("fp32", "bf16") if device.type == "cuda" or full else ("fp32",)
    return [
        Case(
            "q_sample", mode, shape, dtype, functools.partial(build, mode, shape, dtype, device),
            GROUP_OF[mode], WITH_SEEDS if mode == "drawn" else AS_USED,
        )
        for mode in MODES
        for shape in SHAPES
        for dtype in dtypes
    ]  # fmt: skip


def build(mode: str, shape: tuple[int, ...], dtype: str, device: torch.device, allow_compile: bool) -> Workload:
    x0, noise = (random_tensor(shape, device, dtype, seed=seed) for seed in range(2))
    t = torch.randint(0, TRAIN_STEPS, shape[:1], generator=torch.Generator().manual_seed(2)).to(device)
    wide = [table.to(device) for table in noising_tables(alphas_cumprod(linear_betas(TRAIN_STEPS)))]
    tables = [table.to(DTYPES[dtype]) for table in wide]  # what a plain trainer holds
    own_tables = [table.float() for table in wide]
    seeds = torch.arange(1, shape[0] + 1, device=device)
    drawn, plain = mode == "drawn", PLAIN[mode]

    def fastgen() -> Tensor | tuple[Tensor, ...]:
        source = {"seeds": seeds, "step": STEP} if drawn else {"noise": noise}
        return q_sample(x0, t, *own_tables, **source, return_target=None if mode == "x_t" else "v_prediction")

    calls: dict[str, Callable] = {"eager": functools.partial(plain, x0, noise, t, *tables)}
    inputs = [x0, noise, t, *tables]
    notes: list[str] = []
    if function := compiled(plain, inputs, allow_compile, notes):
        calls["compile"] = functools.partial(function, *inputs)
    calls["fastgen"] = fastgen

    def expected() -> Outputs:
        """With the noise that was given, or the kernel's own."""
        used = philox_normal(seeds, shape, STEP) if drawn else noise
        outputs = (plain_x_t if mode == "x_t" else plain_x_t_and_v)(x0.double(), used.double(), t, *wide)
        return (outputs,) if isinstance(outputs, Tensor) else outputs

    alpha, sigma = (table[t][:, None, None, None] for table in wide)

    def noise_of_x_t(outputs: Outputs) -> Tensor:
        return ((outputs[0].double() - alpha * x0.double()) / sigma)[t >= 100]  # where it is not lost in rounding

    def noise_of_target(outputs: Outputs) -> Tensor:
        return ((outputs[1].double() + sigma * x0.double()) / alpha)[t <= 500]

    exact = Values(expected, tolerance=2 * torch.finfo(x0.dtype).eps) if drawn else Values(expected, yardstick="eager")
    own_noise = (Normals(noise_of_x_t), Normals(noise_of_target)) if drawn else ()
    providers = [
        Provider(name, call, "fastgen") if name == "fastgen" else Provider(name, call, expected=own_noise)
        for name, call in calls.items()
    ]
    providers.append(Provider("memory", functools.partial(torch.add, x0, noise), "floor"))
    if drawn:
        providers.append(Provider("noise", functools.partial(philox_normal, seeds, shape, STEP), "floor"))
    elements = math.prod(shape)
    return Workload(
        providers,
        (exact, *own_noise),
        min_bytes=PASSES[mode] * elements * DTYPES[dtype].itemsize,
        flops=FLOPS_PER_ELEMENT[mode] * elements,
        notes=notes,
    )
