"""Noise schedules, solvers, guidance and the loop. A solver is a formula; traced once, it is a table that one kernel executes.

Stand-ins for other people's samplers are in ``fastgen.samplers.diffusers`` and ``fastgen.samplers.k_diffusion``; the first, and
``from_diffusers`` in it, is loaded when it is first used, for it needs diffusers.
"""

import importlib
from typing import Any

from . import k_diffusion, score
from .engine.brownian import BrownianTree
from .engine.noise import draw_normal
from .engine.path import Path
from .engine.plan import Plan
from .engine.prediction import Prediction
from .engine.table import coefficient_table
from .engine.thresholding import dynamic_threshold
from .engine.trace import Linear, Trace
from .graph import CapturedSampler
from .guidance import (
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    Guidance,
    PerpNegGuidance,
    ProjectedGuidance,
    ZeroStarGuidance,
)
from .loop import sample
from .schedules import (
    alphas_cumprod,
    flow_shift,
    linear_betas,
    scaled_linear_betas,
    sigmoid_betas,
    spaced_sigmas,
    squared_cosine_betas,
    timestep_spacing,
    zero_terminal_snr,
)
from .solvers import (
    DDIM,
    DDPM,
    DEIS,
    DPM2,
    LCM,
    LMS,
    PNDM,
    SOLVERS,
    TCD,
    Consistency,
    DiscreteSolver,
    DPM2Ancestral,
    DPMSolverPP,
    DPMSolverPP2SAncestral,
    DPMSolverPPMultistepSDE,
    DPMSolverPPSDE,
    EDMDPMSolverPP,
    EDMEuler,
    EDMHeun,
    EDMSolver,
    Euler,
    EulerAncestral,
    FlowEuler,
    FlowHeun,
    FlowSolver,
    Heun,
    RePaint,
    SASolver,
    SigmaSolver,
    Solver,
    UniPC,
    make_solver,
)
from .training_tables import noising_tables, vlb_table

__all__ = [
    "DDIM",
    "DDPM",
    "DEIS",
    "DPM2",
    "LCM",
    "LMS",
    "PNDM",
    "SOLVERS",
    "TCD",
    "AutoGuidance",
    "BrownianTree",
    "CapturedSampler",
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "Consistency",
    "DPM2Ancestral",
    "DPMSolverPP",
    "DPMSolverPP2SAncestral",
    "DPMSolverPPMultistepSDE",
    "DPMSolverPPSDE",
    "DiscreteSolver",
    "EDMDPMSolverPP",
    "EDMEuler",
    "EDMHeun",
    "EDMSolver",
    "Euler",
    "EulerAncestral",
    "FlowEuler",
    "FlowHeun",
    "FlowSolver",
    "Guidance",
    "Heun",
    "Linear",
    "Path",
    "PerpNegGuidance",
    "Plan",
    "Prediction",
    "ProjectedGuidance",
    "RePaint",
    "SASolver",
    "SigmaSolver",
    "Solver",
    "Trace",
    "UniPC",
    "ZeroStarGuidance",
    "alphas_cumprod",
    "coefficient_table",
    "draw_normal",
    "dynamic_threshold",
    "flow_shift",
    "k_diffusion",
    "linear_betas",
    "make_solver",
    "noising_tables",
    "sample",
    "scaled_linear_betas",
    "score",
    "sigmoid_betas",
    "spaced_sigmas",
    "squared_cosine_betas",
    "timestep_spacing",
    "vlb_table",
    "zero_terminal_snr",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """The stand-ins for diffusers, loaded at their first use."""
    if name not in ("diffusers", "from_diffusers"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(".diffusers", __name__)
    return module if name == "diffusers" else module.from_diffusers


def __dir__() -> list[str]:
    return sorted({*globals(), "diffusers", "from_diffusers"})
