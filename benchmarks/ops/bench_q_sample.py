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

from ..cases import DTYPES, Case, Provider, Workload, compiled, random_tensor
from ..verify import Check, compare, moments

SHAPES = ((128, 3, 32, 32), (16, 3, 256, 256))  # a batch of CIFAR-10, and of 256 x 256 images
MODES = ("x_t", "x_t_and_v", "drawn")
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
        Case("q_sample", mode, shape, dtype, functools.partial(build, mode, shape, dtype, device))
        for mode in MODES
        for shape in SHAPES
        for dtype in dtypes
    ]


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
    notes = []
    if allow_compile:
        try:
            calls["compile"] = functools.partial(compiled(plain, [x0, noise, t, *tables], False), x0, noise, t, *tables)
        except Exception as error:  # no compiler, say: the case goes on without this baseline
            notes.append(f"compile is not measured: {type(error).__name__}: {str(error).strip().splitlines()[:1]}")
    else:
        notes.append("compile is not measured: switched off, or the time budget of the run is spent")
    calls["fastgen"] = fastgen

    def check() -> list[Check]:
        def outputs_of(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (output,) if isinstance(output, Tensor) else output

        used = philox_normal(seeds, shape, STEP) if drawn else noise
        function = plain_x_t if mode == "x_t" else plain_x_t_and_v
        expected = outputs_of(function(x0.double(), used.double(), t, *wide))
        outputs = {name: outputs_of(call()) for name, call in calls.items()}
        if not drawn:
            return compare(outputs, expected, yardstick="eager")
        checks = compare({"fastgen": outputs.pop("fastgen")}, expected, tolerance=2 * torch.finfo(x0.dtype).eps)
        alpha, sigma = (table[t][:, None, None, None] for table in wide)
        later = (t >= 100)[:, None, None, None].expand(shape)  # where the noise is not lost in rounding
        for name, (x_t, _) in outputs.items():
            checks.append(moments(name, ((x_t.double() - alpha * x0.double()) / sigma)[later]))
        return checks

    providers = [Provider(name, call, "fastgen" if name == "fastgen" else "baseline") for name, call in calls.items()]
    providers.append(Provider("memory", functools.partial(torch.add, x0, noise), "floor"))
    if drawn:
        providers.append(Provider("noise", functools.partial(philox_normal, seeds, shape, STEP), "floor"))
    elements = math.prod(shape)
    return Workload(
        providers,
        check,
        min_bytes=PASSES[mode] * elements * DTYPES[dtype].itemsize,
        flops=FLOPS_PER_ELEMENT[mode] * elements,
        notes=notes,
    )
