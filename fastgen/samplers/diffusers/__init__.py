"""diffusers' schedulers by their own names: change one import, or ``pipe.scheduler = from_diffusers(pipe.scheduler)``.

The classes take the same arguments, keep the same configuration files and draw the same images with the same generators; each
step is one kernel. diffusers itself need not be installed. Noise can also come from per-sample ``seeds=``.
"""

from typing import Any

from .discrete import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler, PNDMScheduler
from .distilled import LCMScheduler, TCDScheduler
from .dpm_solver import DPMSolverMultistepInverseScheduler, DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler
from .flow import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from .karras import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, LMSDiscreteScheduler
from .multistep import DEISMultistepScheduler, IPNDMScheduler, SASolverScheduler, UniPCMultistepScheduler
from .preconditioned import (
    CMStochasticIterativeScheduler,
    CosineDPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
)
from .repaint import RePaintScheduler
from .scheduler import Scheduler, SchedulerOutput
from .two_stage import (
    DPMSolverSDEScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
)

__all__ = [
    "CMStochasticIterativeScheduler",
    "CosineDPMSolverMultistepScheduler",
    "DDIMInverseScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "RePaintScheduler",
    "SASolverScheduler",
    "Scheduler",
    "SchedulerOutput",
    "TCDScheduler",
    "UniPCMultistepScheduler",
    "from_diffusers",
]


def from_diffusers(scheduler: Any) -> Scheduler:
    """The stand-in for an instance of a diffusers scheduler, with its configuration.

    Args:
        scheduler: any diffusers scheduler of :data:`__all__`; one of fastgen's comes back as it is.

    Raises:
        TypeError: it is no scheduler, or of a class that has no stand-in; the message lists those that have.
    """
    if isinstance(scheduler, Scheduler):
        return scheduler
    cls = globals().get(type(scheduler).__name__)
    if not (isinstance(cls, type) and issubclass(cls, Scheduler)) or not hasattr(scheduler, "config"):
        names = [name for name in __all__ if name.endswith("Scheduler") and name != "Scheduler"]
        raise TypeError(f"no stand-in for {type(scheduler).__name__}: there are {names}")
    return cls.from_config({k: v for k, v in dict(scheduler.config).items() if k in cls.defaults or k.startswith("_")})
