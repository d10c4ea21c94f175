"""What the sampling loops of other projects' models are made of: logits of a pixel at the cost of that pixel."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .. import _dispatch
from ..ops._watchers import autocast_active

WHOLE = (torch.float32, torch.float64)  # in half precision the order of sums decides which pixel is drawn


def steps_of(model: nn.Module, image: Tensor) -> Any:
    """`Steps` for images like this one, [N, C, H, W]; None, which is said once, where the model's own loop has to run.

    Their logits are the model's own to rounding: a draw by the same uniforms is the same pixel but where a uniform falls that
    close to a threshold. Nothing is drawn from torch's generators here.
    """
    from ..autoregressive import NotPlannable, plan  # whoever samples nothing need not load it

    try:
        if image.dim() != 4:
            raise NotPlannable(f"images must be [N, C, H, W], got {tuple(image.shape)}")
        parameter = next(model.parameters())
        reason = _reason(model, parameter)
        if reason is not None:
            raise NotPlannable(reason)
        with torch.random.fork_rng([parameter.device] if parameter.is_cuda else []):
            if any(module.training for module in model.modules()) and not _as_in_evaluation(model, image[:1]):
                raise NotPlannable("in training mode it computes otherwise")
            made = plan(model, tuple(image.shape))
        if made.program.per_color:
            raise NotPlannable("the colors of a pixel hang on one another")
    except NotPlannable as error:
        _dispatch.warn_once(
            f"{type(model).__name__}.sample: {error}; the model's own loop runs, a pass of it for each pixel"
        )
        return None
    return made.steps(len(image))


def _reason(model: nn.Module, parameter: Tensor) -> str | None:
    """Why the model's own loop has to run, as far as a look at the modules tells."""
    if parameter.dtype not in WHOLE:
        return f"its weights are {parameter.dtype}, whose rounding decides which pixel is drawn"
    if autocast_active(parameter.device):
        return "under autocast, whose rounding decides which pixel is drawn"
    for name, module in model.named_modules():
        if isinstance(module, _NormBase) and module.training:
            return f"{name} averages over the batch in training mode"
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if name and any(not type(hook).__module__.startswith("torch.nn.utils.") for hook in hooks):  # weight norm
            return f"a hook on {name} looks at every call"
    return None


def _as_in_evaluation(model: nn.Module, image: Tensor) -> bool:
    from ..autoregressive.capture import evaluating

    own = model.forward(image)
    with evaluating(model):
        other = model.forward(image)
    return torch.allclose(own, other, rtol=0, atol=1e-5 * float(other.abs().max()))
