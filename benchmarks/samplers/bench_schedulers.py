"""Trajectories of ten steps of every stand-in, beside diffusers' scheduler of its name; the model is left out.

A call is a whole trajectory over one fixed model output, as a pipeline makes it, without `set_timesteps`. diffusers draws its noise
by torch, fastgen in its kernel from seeds. The floor moves as many tensors as the table's rows name, with torch's own add and copy,
and draws as many normals.
"""

import functools
import importlib.util
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgen.ops import philox_normal
from fastgen.samplers import Plan
from fastgen.samplers import diffusers as stand_ins

from ..cases import DTYPES, Case, Provider, Workload, random_tensor
from ..verify import Check, compare

SHAPES = ((1, 4, 64, 64), (4, 4, 128, 128), (16, 3, 256, 256))
STEPS = 10
TOLERANCE = 1e-4

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


def cases(device: torch.device, full: bool) -> list[Case]:
    return [
        Case("schedulers", mode, shape, "fp32", functools.partial(build, mode, shape, device))
        for shape in SHAPES
        for mode in SCHEDULERS
    ]


def build(mode: str, shape: tuple[int, ...], device: torch.device, allow_compile: bool) -> Workload:
    name, config = SCHEDULERS[mode]
    x = random_tensor(shape, device, "fp32", seed=0)
    output = random_tensor(shape, device, "fp32", seed=1, deviation=0.5)
    seeds = torch.arange(1, shape[0] + 1, device=device)
    mine = getattr(stand_ins, name)(**config)
    takes_seeds = "seeds" in inspect.signature(mine.step).parameters
    fused = trajectory(mine, output, x, device, {"seeds": seeds} if takes_seeds else {})
    calls: dict[str, Callable[[], Tensor]] = {}
    notes = []
    if importlib.util.find_spec("diffusers") is None:
        notes.append("diffusers is not installed: its scheduler is not measured")
    else:
        import diffusers

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peer = getattr(diffusers, name)(**config)
        calls["diffusers"] = trajectory(peer, output, x, device, {})

    def check() -> list[Check]:
        """The same generator for both: the trajectory that the tests compare step by step."""
        outputs = {}
        schedulers = {"fastgen": getattr(stand_ins, name)(**config)}
        if calls:
            schedulers["diffusers"] = peer
        for label, scheduler in schedulers.items():
            options = {}
            if "generator" in inspect.signature(scheduler.step).parameters:
                options["generator"] = torch.Generator(device).manual_seed(0)
            outputs[label] = (trajectory(scheduler, output, x, device, options)(),)
        return compare(outputs, outputs.get("diffusers", outputs["fastgen"]), tolerance=TOLERANCE)

    fused()
    plan = next(iter(mine._plans.values()))
    providers = [Provider(label, call) for label, call in calls.items()]
    providers += [Provider("fastgen", fused, "fastgen"), Provider("memory", floor(plan, x, output), "floor")]
    if any(plan.draws_noise):
        draws = sum(plan.draws_noise)
        providers.append(Provider("noise", lambda: [philox_normal(seeds, shape, i) for i in range(draws)], "floor"))
    elements, item = math.prod(shape), DTYPES["fp32"].itemsize
    moved = sum(sum(passes(plan, i)) for i in range(len(plan)))
    return Workload(providers, check, min_bytes=moved * elements * item, flops=20 * len(plan) * elements, notes=notes)


def trajectory(
    scheduler: Any, output: Tensor, start: Tensor, device: torch.device, options: dict[str, Any]
) -> Callable[[], Tensor]:
    """The steps of a whole trajectory, from the state that `set_timesteps` leaves."""
    scheduler.set_timesteps(STEPS, device=device)
    scheduler.is_scale_input_called = True  # else every step warns
    state = {k: list(v) if isinstance(v, list) else v for k, v in vars(scheduler).items()}
    timesteps = list(scheduler.timesteps)

    @torch.no_grad()
    def run() -> Tensor:
        vars(scheduler).update({k: list(v) if isinstance(v, list) else v for k, v in state.items()})
        if hasattr(scheduler, "_history"):
            scheduler._history = {}
        x = start
        for t in timesteps:
            x = scheduler.step(output, t, x, return_dict=False, **options)[0]
        return x

    return run


def passes(plan: Plan, i: int) -> tuple[int, int]:
    """(tensors read, tensors written) by step i; noise is drawn, not read."""
    stage = plan.stages[i]
    return 2 + len(stage.reads), 1 + (stage.second is not None) + (stage.third is not None)


def floor(plan: Plan, x: Tensor, output: Tensor) -> Callable[[], None]:
    """As much traffic as the plan's, by additions (three passes) and copies (two)."""
    counts = [sum(passes(plan, i)) for i in range(len(plan))]
    work = [(n // 3 - (n % 3 == 1), (0, 2, 1)[n % 3]) for n in counts]
    others = [torch.empty_like(x) for _ in range(4)]

    def run() -> None:
        for adds, copies in work:
            for k in range(adds):
                torch.add(x if k == 0 else others[k % 4], output, out=others[(k + 1) % 4])
            for k in range(copies):
                others[(k + 2) % 4].copy_(others[k % 4])

    return run
