"""The deterministic solvers followed in float64 over the exact denoiser of `mixture`, and the order each converges with."""

import functools
import math

import numpy as np
import torch
from torch import Tensor

from fastgen.samplers import make_solver
from fastgen.samplers.engine.compile import compile_trace
from fastgen.samplers.engine.path import Path
from fastgen.samplers.engine.trace import Trace

from .mixture import clean

# components that overlap: the error falls with its order at fewer steps than where they stand apart
MEANS = torch.tensor([[-1.0, 0.5], [1.2, -0.4], [0.3, 1.1]], dtype=torch.float64)
DEVIATIONS = torch.tensor([0.35, 0.25, 0.45], dtype=torch.float64)

ORDERS = {
    "euler": (1, {}),
    "heun": (2, {}),
    "dpm_2": (2, {}),
    "lms": (3, {"order": 3}),
    "dpmpp_1": (1, {}),
    "dpmpp_2m": (2, {"lower_order_final": False}),
    "dpmpp_3m": (3, {"lower_order_final": False}),
    "dpmpp_2s": (2, {"lower_order_final": False}),
    "dpmpp_3s": (3, {"lower_order_final": False, "solver_type": "heun"}),
    "dpmpp_2s_ancestral": (2, {"eta": 0.0}),
    "dpmpp_sde": (2, {"eta": 0.0}),
    "dpmpp_2m_sde": (2, {"eta": 0.0}),
    "dpmpp_3m_sde": (3, {"eta": 0.0}),
    "deis": (3, {"order": 3, "lower_order_final": False}),
    "unipc": (3, {"order": 2, "lower_order_final": False}),
}


def integrate(name: str, steps: int, x: Tensor, arguments: dict) -> Tensor:
    """From sigma = 100 to 0.1 in even steps of log sigma. At sigma = 100 the prediction hardly changes, so that the lower orders
    a multistep solver warms up with do not show."""
    solver = make_solver(name, **arguments)
    sigmas = np.exp(np.linspace(math.log(100.0), math.log(0.1), steps + 1)).tolist()
    norms = [math.hypot(1, s) for s in sigmas]
    object.__setattr__(solver, "sigma_path", lambda _: Path(sigmas[:-1], [1.0] * len(sigmas), sigmas, float))
    vp = Path(sigmas[:-1], [1 / n for n in norms], [s / n for s, n in zip(sigmas, norms, strict=True)])
    object.__setattr__(solver, "vp_path", lambda _: vp)
    object.__setattr__(solver, "final_sigma", "min")
    trace = Trace(solver.prediction(), scale_inputs=False)
    solver.follow(trace, steps)
    plan = compile_trace(trace).to("cpu", torch.float64)
    in_sigma_space = plan.stages[0].alpha == 1.0
    x = x if in_sigma_space else x / norms[0]
    history: dict = {}
    for i, stage in enumerate(plan.stages):
        x0 = clean(x, stage.alpha, stage.sigma, MEANS, DEVIATIONS)
        x = plan.step((x - stage.alpha * x0) / stage.sigma, i, x, history=history)
    return x if in_sigma_space else x * norms[-1]


@functools.cache
def exact_trajectories() -> tuple[Tensor, Tensor]:
    """Where trajectories begin, [64, 2], and where they end: by five times the steps that any order is measured with,
    with an error of third order, a hundredth of theirs."""
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 100.0
    return x, integrate("dpmpp_3m", 2048, x, {"lower_order_final": False})
