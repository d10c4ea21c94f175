"""Who may want to see the calls that an op is made of; by private names of torch, and "somebody may" where this torch lacks one."""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _library

# Called for every step of a sampler, so bare. Transforms: vmap, grad and their like; modes: fake tensors, counters of ops.
transforms_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
modes_active: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
profiler_active: Callable[[], bool] = torch.autograd._profiler_enabled


def watched() -> bool:
    """Whether the compiler, a mode of the dispatcher or a transform of `torch.func` is looking."""
    return torch.compiler.is_compiling() or modes_active() > 0 or transforms_active()


def autocast_active(device: torch.device) -> bool:
    """Whether autocast chooses the dtypes on ``device``."""
    return _library.any_autocast() and device.type != "meta" and torch.is_autocast_enabled(device.type)


def in_autocast_dtype(t: Tensor) -> Tensor:
    """What autocast makes of an argument of an op that it runs in low precision: float64, and a boolean mask, it leaves alone."""
    if not t.is_floating_point() or t.dtype == torch.float64:
        return t
    return t.to(torch.get_autocast_dtype(t.device.type))
