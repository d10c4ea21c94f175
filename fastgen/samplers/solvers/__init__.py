"""The solvers, a page each: the formula as its paper has it, a function of a `Trace` and a `Path`, and the class with its options.

`fastgen.samplers.k_diffusion` has the same formulas under its names.
"""

from collections.abc import Callable

from .base import DiscreteSolver, SigmaSolver, Solver
from .consistency import Consistency
from .ddim import DDIM
from .ddpm import DDPM
from .deis import DEIS
from .dpm_2 import DPM2, DPM2Ancestral
from .dpm_solver import DPMSolverPP
from .dpm_solver_sde import DPMSolverPP2SAncestral, DPMSolverPPMultistepSDE, DPMSolverPPSDE
from .edm import EDMDPMSolverPP, EDMEuler, EDMHeun, EDMSolver
from .euler import Euler, EulerAncestral
from .flow import FlowEuler, FlowHeun, FlowSolver
from .heun import Heun
from .lcm import LCM
from .lms import LMS
from .pndm import PNDM
from .repaint import RePaint
from .sa_solver import SASolver
from .tcd import TCD
from .unipc import UniPC

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
    "Heun",
    "RePaint",
    "SASolver",
    "SigmaSolver",
    "Solver",
    "UniPC",
    "make_solver",
]

SOLVERS: dict[str, Callable[..., Solver]] = {
    "ddpm": DDPM,
    "ddim": DDIM,
    "euler": Euler,
    "euler_ancestral": EulerAncestral,
    "heun": Heun,
    "dpm_2": DPM2,
    "dpm_2_ancestral": DPM2Ancestral,
    "lms": LMS,
    "pndm": PNDM,
    "repaint": RePaint,
    "dpmpp_1": lambda **kw: DPMSolverPP(order=1, **kw),
    "dpmpp_2m": DPMSolverPP,
    "dpmpp_3m": lambda **kw: DPMSolverPP(order=3, **kw),
    "dpmpp_2s": lambda **kw: DPMSolverPP(singlestep=True, **kw),
    "dpmpp_3s": lambda **kw: DPMSolverPP(order=3, singlestep=True, **kw),
    "dpmpp_2s_ancestral": DPMSolverPP2SAncestral,
    "dpmpp_sde": DPMSolverPPSDE,
    "dpmpp_2m_sde": DPMSolverPPMultistepSDE,
    "dpmpp_3m_sde": lambda **kw: DPMSolverPPMultistepSDE(order=3, **kw),
    "deis": DEIS,
    "unipc": UniPC,
    "sa_solver": SASolver,
    "lcm": LCM,
    "tcd": TCD,
    "flow_euler": FlowEuler,
    "flow_heun": FlowHeun,
    "edm_euler": EDMEuler,
    "edm_heun": EDMHeun,
    "edm_dpmpp_2m": EDMDPMSolverPP,
    "consistency": Consistency,
}


def make_solver(name: str, **arguments: object) -> Solver:
    """A solver by its name in :data:`SOLVERS`, with the arguments of its class."""
    if name not in SOLVERS:
        raise ValueError(f"solver must be one of {sorted(SOLVERS)}, got {name!r}")
    return SOLVERS[name](**arguments)
