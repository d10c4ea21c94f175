"""Noise schedules, solvers, guidance and the loop. A solver is a formula; traced once, it is a table that one kernel executes.

Stand-ins for other people's samplers are in ``fastgen.samplers.diffusers`` and ``fastgen.samplers.k_diffusion``.
"""

from . import diffusers, k_diffusion, score
from .brownian import BrownianTree
from .ddim import DDIM
from .ddpm import DDPM
from .diffusers import from_diffusers
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
from .losses import noising_tables, vlb_table
from .noise import draw_normal
from .path import Path
from .plan import Plan
from .prediction import Prediction
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
from .solver import DiscreteSolver, EDMSolver, FlowSolver, SigmaSolver, Solver
from .solvers import (
    DEIS,
    DPM2,
    LCM,
    LMS,
    PNDM,
    SOLVERS,
    TCD,
    Consistency,
    DPM2Ancestral,
    DPMSolverPP,
    DPMSolverPP2SAncestral,
    DPMSolverPPMultistepSDE,
    DPMSolverPPSDE,
    EDMDPMSolverPP,
    EDMEuler,
    EDMHeun,
    Euler,
    EulerAncestral,
    FlowEuler,
    FlowHeun,
    Heun,
    RePaint,
    SASolver,
    UniPC,
    make_solver,
)
from .table import coefficient_table
from .thresholding import dynamic_threshold
from .trace import Linear, Trace

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
    "diffusers",
    "draw_normal",
    "dynamic_threshold",
    "flow_shift",
    "from_diffusers",
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
