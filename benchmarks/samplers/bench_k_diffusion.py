"""k-diffusion's functions, ten steps over one fixed prediction, beside k-diffusion itself with the same noise sampler."""

import functools
import importlib.util
import math
import sys
import types
from typing import Any

import torch
from torch import Tensor

from fastgen.samplers import k_diffusion as stand_ins

from ..cases import DTYPES, Case, Provider, Workload, random_tensor
from ..verify import Check, compare

SHAPES = ((1, 4, 64, 64), (4, 4, 128, 128), (16, 3, 256, 256))
STEPS = 10
FUNCTIONS = {
    "euler": False, "euler_ancestral": True, "heun": False, "dpm_2": False, "dpm_2_ancestral": True, "lms": False,
    "dpmpp_2s_ancestral": True, "dpmpp_sde": True, "dpmpp_2m": False, "dpmpp_2m_sde": True, "dpmpp_3m_sde": True,
}  # fmt: skip


def cases(device: torch.device, full: bool) -> list[Case]:
    if importlib.util.find_spec("k_diffusion") is None:
        raise ImportError("k-diffusion is not installed (pip install --no-deps k-diffusion==0.1.1.post1)")
    return [
        Case("k_diffusion", mode, shape, "fp32", functools.partial(build, mode, shape, device))
        for shape in SHAPES
        for mode in FUNCTIONS
    ]


@functools.cache
def load_peer() -> Any:
    """k_diffusion.sampling alone: the package's __init__ and the imports of training want much else."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("k-diffusion is not installed")
    for name in ("torchdiffeq", "torchsde"):
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            stub: Any = types.ModuleType(name)
            stub.odeint = None
            sys.modules.setdefault(name, stub)
    package: Any = types.ModuleType("k_diffusion_sampling_only")
    package.__path__ = [spec.submodule_search_locations[0]]
    package.utils = types.ModuleType("k_diffusion_sampling_only.utils")
    package.utils.append_dims = lambda x, n: x.reshape(x.shape + (1,) * (n - x.ndim))
    sys.modules[package.__name__] = package
    sys.modules[f"{package.__name__}.utils"] = package.utils
    path = f"{spec.submodule_search_locations[0]}/sampling.py"
    found = importlib.util.spec_from_file_location(f"{package.__name__}.sampling", path)
    if found is None or found.loader is None:
        raise ImportError(f"{path} cannot be loaded")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


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

    calls = {"k-diffusion": functools.partial(call, load_peer()), "fastgen": functools.partial(call, stand_ins)}

    def check() -> list[Check]:
        outputs = {name: (run(),) for name, run in calls.items()}
        return compare(outputs, outputs["k-diffusion"], tolerance=1e-4)

    providers = [Provider(name, run, "fastgen" if name == "fastgen" else "baseline") for name, run in calls.items()]
    size = math.prod(shape) * DTYPES["fp32"].itemsize
    return Workload(providers, check, min_bytes=3 * STEPS * size, flops=10 * STEPS * math.prod(shape))
