"""Noise schedules, solvers, guidance and the loop. A solver is a way of filling a table that one kernel executes."""

from .ddim import DDIM
from .ddpm import DDPM
from .guidance import ClassifierFreeGuidance
from .loop import sample
from .losses import noising_tables, vlb_table
from .noise import draw_normal
from .schedules import alphas_cumprod, linear_betas, scaled_linear_betas, squared_cosine_betas, timestep_spacing
from .solver import Plan, Solver
from .table import coefficient_table

__all__ = [
    "DDIM",
    "DDPM",
    "ClassifierFreeGuidance",
    "Plan",
    "Solver",
    "alphas_cumprod",
    "coefficient_table",
    "draw_normal",
    "linear_betas",
    "noising_tables",
    "sample",
    "scaled_linear_betas",
    "squared_cosine_betas",
    "timestep_spacing",
    "vlb_table",
]
