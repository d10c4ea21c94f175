"""The scheduler of a diffusers pipeline: fused steps for it, and back."""

import sys
from typing import Any


def known(part: Any) -> bool:
    """Whether ``part`` is a scheduler of diffusers, with or without our steps."""
    diffusers = sys.modules.get("diffusers")  # where it is not loaded, nobody has one
    return diffusers is not None and isinstance(part, diffusers.SchedulerMixin)


def accelerate_scheduler(part: Any) -> None:
    """Give a scheduler the stand-in's class; whatever else comes, leave it."""
    if known(part) and not is_fused(part) and refusal(part) is None:
        part.__class__ = _stand_in(part.__class__)


def restore_scheduler(part: Any) -> None:
    if is_fused(part):
        part.__class__ = part.parent


def is_fused(part: Any) -> bool:
    if not known(part):
        return False
    from ..samplers.diffusers import FusedScheduler

    return isinstance(part, FusedScheduler)


def refusal(part: Any) -> str | None:
    """Why one of diffusers' schedulers cannot have fused steps."""
    try:
        _stand_in(part.__class__)
    except TypeError as error:
        return str(error)
    return None


def _stand_in(cls: type) -> type:
    from ..samplers.diffusers import stand_in  # only where diffusers is there

    return stand_in(cls)
