"""k-diffusion's functions over ten steps, as a program calls them, beside k-diffusion itself: one seed, one cheap denoiser.

The denoiser is the exact one of normal data around a fixed image: it depends on x and on sigma, so that every coefficient of
every step shows in the result. It costs a pass over memory a call, in both, and is one of the floors. Noise is torch's, from a
seed set in the call; where k-diffusion's default wants torchsde, both are handed torch's generator as their noise sampler. Two
functions have the loop in plain torch beside them, eager and compiled.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgen.samplers import k_diffusion as stand_ins
from tests.peers import load_k_diffusion

from ..cases import DTYPES, Case, Provider, Workload, random_tensor
from ..verify import Values
from . import plain

SHAPES = ((1, 4, 64, 64), (16, 3, 256, 256))
FULL_SHAPES = ((1, 4, 64, 64), (4, 4, 128, 128), (16, 3, 256, 256))
STEPS, SEED = 10, 3
TOLERANCE = 1e-5  # of float32 beside float64 over ten steps; k-diffusion itself uses a tenth of it
FUNCTIONS = (
    "euler", "euler_ancestral", "heun", "dpm_2", "dpm_2_ancestral", "lms", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m",
    "dpmpp_2m_sde", "dpmpp_3m_sde",
)  # fmt: skip
ANCESTRAL = ("euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral")  # draw by torch of themselves
SDE = ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")  # by torchsde, unless handed a noise sampler

NoiseSampler = Callable[[Any, Any], Tensor]


def cases(device: torch.device, full: bool) -> list[Case]:
    load_k_diffusion()  # raises ImportError where it is not installed
    return [
        Case(
            "k_diffusion", mode, shape, "fp32", functools.partial(build, mode, shape, device),
            f"functions of k-diffusion, {STEPS} steps, {'x'.join(map(str, shape))}",
        )
        for shape in (FULL_SHAPES if full else SHAPES)
        for mode in FUNCTIONS
    ]  # fmt: skip


def denoiser(centre: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """E[x0 | x] for x0 ~ N(centre, 1) and x = x0 + sigma eps, [N, *]; sigma [N]."""
    weight = (sigma.square() + 1).reciprocal()
    return torch.lerp(centre, x, weight.view(-1, *[1] * (x.dim() - 1)))


def build(mode: str, shape: tuple[int, ...], device: torch.device, allow_compile: bool) -> Workload:
    sigmas = stand_ins.get_sigmas_karras(STEPS, 0.03, 14.6, device=device).float()
    x = random_tensor(shape, device, "fp32", seed=0, deviation=float(sigmas[0]))
    centre = random_tensor(shape, device, "fp32", seed=1)
    model = functools.partial(denoiser, centre)
    draw = functools.partial(torch.randn, shape, device=device)
    given = {"noise_sampler": lambda sigma, following: draw()} if mode in SDE else {}

    def call(module: Any) -> Tensor:
        torch.manual_seed(SEED)
        return getattr(module, f"sample_{mode}")(model, x, sigmas, disable=True, **given)

    def expected() -> tuple[Tensor]:
        """k-diffusion in float64, with the float32 noise."""
        wide = {"noise_sampler": lambda sigma, following: draw().double()} if mode in ANCESTRAL + SDE else {}
        torch.manual_seed(SEED)
        function = getattr(load_k_diffusion(), f"sample_{mode}")
        wide_model = functools.partial(denoiser, centre.double())
        return (function(wide_model, x.double(), sigmas.double(), disable=True, **wide),)

    providers = [
        Provider("k-diffusion", functools.partial(call, load_k_diffusion())),
        Provider("fastgen", functools.partial(call, stand_ins), "fastgen"),
    ]
    notes: list[str] = []
    if (loop := plain_loop(mode, sigmas.double().tolist())) is not None:

        def slope(i: int, x: Tensor) -> Tensor:
            return (x - model(x, sigmas[i].expand(len(x)))) / sigmas[i]

        follows = {"eager": loop.eager, "compile": loop.compile(x, allow_compile, notes)}
        for name, follow in follows.items():
            if follow is not None:
                providers.insert(0, Provider(name, functools.partial(_seeded, follow, x, slope, draw)))

    calls_of_model, draws = _counts(mode, x, sigmas, model, draw)
    levels = sigmas[:1].expand(len(x))
    others = torch.empty_like(x)
    providers += [
        Provider("memory", lambda: [torch.add(x, centre, out=others) for _ in range(calls_of_model)], "floor"),
        Provider("model", lambda: [model(x, levels) for _ in range(calls_of_model)], "floor"),
    ]
    if draws:
        providers.append(Provider("noise", lambda: [draw() for _ in range(draws)], "floor"))
    elements = math.prod(shape)
    return Workload(
        providers,
        (Values(expected, tolerance=TOLERANCE),),
        min_bytes=6
        * calls_of_model
        * elements
        * DTYPES["fp32"].itemsize,  # two reads and a write, of step and model each
        flops=13 * calls_of_model * elements,
        notes=notes,
    )


def plain_loop(mode: str, sigmas: list[float]) -> plain.Loop | None:
    """The loop of the plainest of them; None for the others."""
    if mode == "euler":
        return plain.euler(sigmas)
    return plain.euler_ancestral(sigmas) if mode == "euler_ancestral" else None


def _seeded(follow: Callable[..., Tensor], *args: Any) -> Tensor:
    torch.manual_seed(SEED)
    return follow(*args)


def _counts(
    mode: str, x: Tensor, sigmas: Tensor, model: Callable[..., Tensor], draw: Callable[[], Tensor]
) -> tuple[int, int]:
    """How often k-diffusion calls its model and its noise sampler in a trajectory."""
    called, drawn = [], []

    def counting_model(x: Tensor, sigma: Tensor) -> Tensor:
        called.append(1)
        return model(x, sigma)

    def counting_noise(sigma: Any, following: Any) -> Tensor:
        drawn.append(1)
        return draw()

    options = {"noise_sampler": counting_noise} if mode in ANCESTRAL + SDE else {}
    getattr(load_k_diffusion(), f"sample_{mode}")(counting_model, x, sigmas, disable=True, **options)
    return len(called), len(drawn)
