"""Trajectories of twenty steps of every stand-in, beside diffusers' scheduler of its name; the model is left out.

A call is what a pipeline does without its model: a generator, `set_timesteps`, the start scaled, then `scale_model_input` and
`step` at every timestep, over outputs that were made before and differ from step to step. First as used: diffusers' defaults,
noise from the generator on both sides. At the small size also as the first in a process, before fastgen has followed a step. Then,
for the schedulers that draw noise, with seeds: fastgen draws in its kernel. A few have the loop in plain torch beside them, eager
and compiled. The floors: a pass that reads two tensors and writes one for every step, and drawing the noise.
"""

import functools
import inspect
import math
import sys
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastgen.ops import philox_normal
from fastgen.samplers import diffusers as stand_ins
from fastgen.samplers.diffusers.session import HIDDEN, MEMORY

from ..cases import AS_USED, DTYPES, FIRST, WITH_SEEDS, Case, Provider, Workload, random_tensor
from ..verify import Outputs, Values
from . import plain

SHAPES = ((1, 4, 64, 64), (16, 3, 256, 256))
FULL_SHAPES = ((1, 4, 64, 64), (4, 4, 128, 128), (16, 3, 256, 256))
STEPS = 20
OUTPUTS = 3  # that take turns, each near the noise in the start: neighbours differ, so that every order of a multistep method shows
TOLERANCE = 5e-5  # the two round their coefficients otherwise: a tenth of it is seen over twenty steps

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "ipndm": ("IPNDMScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    "deis": ("DEISMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "unipc_3": ("UniPCMultistepScheduler", {"solver_order": 3}),
    "sa_solver": ("SASolverScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "edm_euler": ("EDMEulerScheduler", {}),
    "edm_dpmpp_2m": ("EDMDPMSolverMultistepScheduler", {}),
    "consistency": ("CMStochasticIterativeScheduler", {}),
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow_heun": ("FlowMatchHeunDiscreteScheduler", {}),
}
DRAWING = (
    "ddpm", "euler_ancestral", "dpm_2_ancestral", "dpmpp_2m_sde", "sa_solver", "lcm", "tcd", "consistency",
)  # fmt: skip


def cases(device: torch.device, full: bool) -> list[Case]:
    return [
        Case(
            "schedulers", mode, shape, "fp32", functools.partial(build, mode, how, shape, device),
            f"schedulers of diffusers, {STEPS} steps, {'x'.join(map(str, shape))}", how,
        )
        for how, modes in ((AS_USED, SCHEDULERS), (FIRST, SCHEDULERS), (WITH_SEEDS, DRAWING))
        for shape in (SHAPES[:1] if how == FIRST else FULL_SHAPES if full else SHAPES)
        for mode in modes
    ]  # fmt: skip


class Trajectory:
    """What a pipeline does with a scheduler: called, it returns the last sample and the last input of the model.

    Args:
        scheduler: diffusers' or fastgen's.
        start: [N, *], unit variance.
        outputs: of the model, taken in turns.
        seeds: [N] for fastgen's own noise; else a generator is made, as a user makes one.
    """

    def __init__(self, scheduler: Any, start: Tensor, outputs: list[Tensor], seeds: Tensor | None = None) -> None:
        self.scheduler, self.start, self.outputs, self.seeds = scheduler, start, outputs, seeds
        self.before: Callable[[], None] = lambda: None  # each call
        self._takes = inspect.signature(scheduler.step).parameters
        self.step = 0

    def __call__(self) -> tuple[Tensor, Tensor]:
        self.before()
        scheduler, device = self.scheduler, self.start.device
        options: dict[str, Any] = {"seeds": self.seeds} if self.seeds is not None else {}
        if not options and "generator" in self._takes:
            options["generator"] = torch.Generator(device).manual_seed(0)
        scheduler.set_timesteps(STEPS, device=device)
        x = self.start * getattr(scheduler, "init_noise_sigma", 1.0)
        scale = getattr(scheduler, "scale_model_input", lambda x, t: x)  # flow schedulers of diffusers have none
        for self.step, t in enumerate(scheduler.timesteps):
            model_input = scale(x, t)
            x = scheduler.step(self.outputs[self.step % OUTPUTS], t, x, return_dict=False, **options)[0]
        return x, model_input

    def with_noise(self, noise: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
        """The trajectory of diffusers' scheduler, handed ``noise(step)`` wherever it would draw."""
        module = sys.modules[type(self.scheduler).__module__]
        with mock.patch.object(module, "randn_tensor", lambda *args, **kwargs: noise(self.step)):
            return self()


def build(mode: str, how: str, shape: tuple[int, ...], device: torch.device, allow_compile: bool) -> Workload:
    name, config = SCHEDULERS[mode]
    start = random_tensor(shape, device, "fp32", seed=0)
    outputs = [start + random_tensor(shape, device, "fp32", seed=1 + k, deviation=0.2) for k in range(OUTPUTS)]
    seeds = torch.arange(1, shape[0] + 1, device=device) if how == WITH_SEEDS else None
    fused = Trajectory(getattr(stand_ins, name)(**config), start, outputs, seeds)
    if how == FIRST:
        fused.before = functools.partial(forget, fused.scheduler)
    theirs, judge = (Trajectory(diffusers_scheduler(name, config), start, outputs) for _ in range(2))

    def with_generator() -> Outputs:
        return judge()

    def with_the_kernels_noise() -> Outputs:
        return judge.with_noise(lambda step: philox_normal(seeds, shape, step))

    same_generator = Values(with_generator, tolerance=TOLERANCE)
    expected = same_generator if seeds is None else Values(with_the_kernels_noise, tolerance=TOLERANCE)
    providers = [
        Provider("diffusers", theirs, expected=(same_generator,)),
        Provider("fastgen", fused, "fastgen"),
    ]
    notes: list[str] = []
    loop = plain_loop(mode, theirs)
    if loop is not None:  # it has no scheduler to scale the model's input
        sample_alone = Values(lambda: judge()[:1], tolerance=TOLERANCE)
        providers[:0] = _plain_providers(loop, theirs, sample_alone, allow_compile, notes)

    steps, draws = len(theirs.scheduler.timesteps), _draws(judge)
    others = torch.empty_like(start)
    providers.append(
        Provider("memory", lambda: [torch.add(start, outputs[0], out=others) for _ in range(steps)], "floor")
    )
    if draws:
        providers.append(Provider("noise", _drawing(start, draws, seeds), "floor"))
    elements, item = math.prod(shape), DTYPES["fp32"].itemsize
    return Workload(
        providers, (expected,), min_bytes=3 * steps * elements * item, flops=20 * steps * elements, notes=notes
    )


def forget(scheduler: Any) -> None:
    """What has been followed in this process, and what the scheduler knows of it."""
    MEMORY.clear()
    vars(scheduler).pop(HIDDEN, None)


def diffusers_scheduler(name: str, config: dict[str, Any]) -> Any:
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(diffusers, name)(**config)


def _draws(trajectory: Trajectory) -> int:
    """How often diffusers draws noise in a trajectory."""
    if not hasattr(sys.modules[type(trajectory.scheduler).__module__], "randn_tensor"):
        return 0
    drawn: list[int] = []
    trajectory.with_noise(lambda step: drawn.append(step) or trajectory.start)
    return len(drawn)


def _drawing(like: Tensor, draws: int, seeds: Tensor | None) -> Callable[[], Any]:
    """The floor of the noise: torch's own from a generator, or the kernel's from seeds."""
    if seeds is not None:
        return lambda: [philox_normal(seeds, like.shape, i) for i in range(draws)]
    generator = torch.Generator(like.device).manual_seed(0)
    return lambda: [torch.randn(like.shape, generator=generator, device=like.device) for _ in range(draws)]


# ---- the loop in plain torch ------------------------------------------------------------------------------------------------


def plain_loop(mode: str, trajectory: Trajectory) -> plain.Loop | None:
    """The loop of a few of them, with the schedule that diffusers makes; None for the others."""
    scheduler = trajectory.scheduler
    scheduler.set_timesteps(STEPS)
    if mode in ("ddpm", "ddim"):
        bars = scheduler.alphas_cumprod.double()
        end = 1.0 if mode == "ddpm" else float(scheduler.final_alpha_cumprod)
        alpha_bars = [float(bars[t]) for t in scheduler.timesteps] + [end]
        return plain.ddpm(alpha_bars) if mode == "ddpm" else plain.ddim(alpha_bars)
    if mode in ("euler", "flow_euler", "euler_ancestral"):
        levels = scheduler.sigmas.double().tolist()
        return plain.euler_ancestral(levels) if mode == "euler_ancestral" else plain.euler(levels)
    return None


def _plain_providers(
    loop: plain.Loop, theirs: Trajectory, expected: Values, allow_compile: bool, notes: list[str]
) -> list[Provider]:
    start, outputs = theirs.start, theirs.outputs
    first = start * getattr(theirs.scheduler, "init_noise_sigma", 1.0)

    def provider(name: str, follow: Callable[..., Tensor]) -> Provider:
        def call() -> Tensor:
            generator = torch.Generator(start.device).manual_seed(0)
            draw = functools.partial(torch.randn, start.shape, generator=generator, device=start.device)
            return follow(first, lambda i, x: outputs[i % OUTPUTS], draw)

        return Provider(name, call, expected=(expected,))

    found = [provider("eager", loop.eager)]
    if (follow := loop.compile(start, allow_compile, notes)) is not None:
        found.append(provider("compile", follow))
    return found
