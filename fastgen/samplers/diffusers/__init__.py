"""diffusers' schedulers with fused steps: change one import, or ``pipe.scheduler = from_diffusers(pipe.scheduler)``.

Each is a subclass of diffusers' class of its name: configuration, noise levels, saving, outputs and whatever is not a step are
diffusers' own code, and a step gives its numbers. Noise can also come from per-sample ``seeds=``.
"""

from typing import Any

from .scheduler import FusedScheduler, stand_in

try:
    import diffusers as _diffusers
except ImportError as error:
    raise ImportError(
        "fastgen.samplers.diffusers stands in for diffusers' schedulers and needs them: pip install diffusers"
    ) from error

SCHEDULERS = (
    "CMStochasticIterativeScheduler", "CosineDPMSolverMultistepScheduler", "DDIMInverseScheduler", "DDIMScheduler", "DDPMScheduler",
    "DEISMultistepScheduler", "DPMSolverMultistepInverseScheduler", "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler", "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "HeunDiscreteScheduler",
    "IPNDMScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler", "LMSDiscreteScheduler",
    "PNDMScheduler", "RePaintScheduler", "SASolverScheduler", "TCDScheduler", "UniPCMultistepScheduler",
)  # fmt: skip

# without those that this diffusers does not have, or not without another package
_THERE = [
    name for name in SCHEDULERS if ".dummy" not in getattr(getattr(_diffusers, name, None), "__module__", ".dummy")
]
__all__ = [*_THERE, "FusedScheduler", "from_diffusers", "stand_in"]


def __getattr__(name: str) -> Any:
    """The stand-in for a scheduler class of diffusers, of those above or any other."""
    parent = getattr(_diffusers, name, None) if name.endswith("Scheduler") else None
    if not isinstance(parent, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return stand_in(parent)


def __dir__() -> list[str]:
    return sorted({*globals(), *SCHEDULERS})


def from_diffusers(scheduler: Any) -> Any:
    """The stand-in for a scheduler of diffusers, with its configuration and in its state; it shares no list with it.

    Args:
        scheduler: of any class with a ``step``; one of fastgen's comes back as it is.

    Raises:
        TypeError: it is no scheduler of diffusers, or of a class without a stand-in.
    """
    if isinstance(scheduler, FusedScheduler):
        return scheduler
    if not isinstance(scheduler, _diffusers.SchedulerMixin):
        raise TypeError(f"scheduler must be one of diffusers' schedulers, got {type(scheduler).__name__}")
    cls = stand_in(type(scheduler))
    made = cls.__new__(cls)
    attributes = {name: list(value) if type(value) is list else value for name, value in vars(scheduler).items()}
    vars(made).update(attributes)
    return made
