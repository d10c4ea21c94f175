"""k-diffusion's functions, ten steps over one fixed prediction, beside k-diffusion itself with the same noise sampler."""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from fastgen.samplers import k_diffusion as stand_ins
from tests.peers import load_k_diffusion

from ..cases import DTYPES, Case, Provider, Workload, random_tensor
from ..verify import Check, compare

SHAPES = ((1, 4, 64, 64), (4, 4, 128, 128), (16, 3, 256, 256))
STEPS = 10
FUNCTIONS = {
    "euler": False, "euler_ancestral": True, "heun": False, "dpm_2": False, "dpm_2_ancestral": True, "lms": False,
    "dpmpp_2s_ancestral": True, "dpmpp_sde": True, "dpmpp_2m": False, "dpmpp_2m_sde": True, "dpmpp_3m_sde": True,
}  # fmt: skip


def cases(device: torch.device, full: bool) -> list[Case]:
    load_k_diffusion()  # raises ImportError where it is missing
    return [
        Case("k_diffusion", mode, shape, "fp32", functools.partial(build, mode, shape, device))
        for shape in SHAPES
        for mode in FUNCTIONS
    ]


def build(mode: str, shape: tuple[int, ...], device: torch.device, allow_compile: bool) -> Workload:
    x = random_tensor(shape, device, "fp32", seed=0, deviation=10.0)
    denoised = random_tensor(shape, device, "fp32", seed=1, deviation=0.5)
    noise = random_tensor(shape, device, "fp32", seed=2)
    sigmas = stand_ins.get_sigmas_karras(STEPS, 0.03, 14.6, device=device)
    options: dict[str, Any] = {"disable": True}
    if FUNCTIONS[mode]:
        options["noise_sampler"] = lambda sigma, sigma_next: noise

    def call(module: Any) -> Tensor:
        return getattr(module, f"sample_{mode}")(lambda x, sigma: denoised, x, sigmas, **options)

    calls = {"k-diffusion": functools.partial(call, load_k_diffusion()), "fastgen": functools.partial(call, stand_ins)}

    def check() -> list[Check]:
        outputs = {name: (run(),) for name, run in calls.items()}
        return compare(outputs, outputs["k-diffusion"], tolerance=1e-4)

    providers = [Provider(name, run, "fastgen" if name == "fastgen" else "baseline") for name, run in calls.items()]
    size = math.prod(shape) * DTYPES["fp32"].itemsize
    return Workload(providers, check, min_bytes=3 * STEPS * size, flops=10 * STEPS * math.prod(shape))
