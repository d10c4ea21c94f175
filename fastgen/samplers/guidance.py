"""Classifier-free guidance: a model called with and without its condition, in one batch of twice the size.

Ho and Salimans 2022. The combination uncond + w (cond - uncond) itself is folded into the sampler's kernel.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Model = Callable[..., Tensor]


class ClassifierFreeGuidance:
    """Calls ``model(x, t, **kwargs)`` once, on the conditional and the unconditional half together.

    Args:
        model: takes x [2N, C, *], t [2N] and keyword arguments.
        cond, uncond: keyword arguments of the two halves, the same names; tensors of N rows are joined, everything else
            must be equal on both sides (a scalar tensor: the same object) and is passed as it is.

    Raises:
        ValueError: the names differ, or a value that is no tensor of N rows does.
    """

    def __init__(self, model: Model, cond: Mapping[str, Any], uncond: Mapping[str, Any]) -> None:
        if set(cond) != set(uncond):
            raise ValueError(f"cond and uncond must have the same names, got {sorted(cond)} and {sorted(uncond)}")
        self.model = model
        self.kwargs: dict[str, Any] = {}
        for name, value in cond.items():
            other = uncond[name]
            if isinstance(value, Tensor) and value is other and value.dim() == 0:
                self.kwargs[name] = value  # comparing two scalars would wait for the device
            elif isinstance(value, Tensor) and isinstance(other, Tensor):
                if value.shape != other.shape:
                    raise ValueError(
                        f"{name} must have one shape in cond and uncond, got {tuple(value.shape)} and {tuple(other.shape)}"
                    )
                if value.dim() == 0:
                    raise ValueError(f"{name} must have one row a sample, or be the same scalar tensor in both")
                self.kwargs[name] = torch.cat([value, other])
            elif isinstance(value, Tensor) or isinstance(other, Tensor) or value != other:
                raise ValueError(f"{name} must be a tensor in both cond and uncond, or equal in both")
            else:
                self.kwargs[name] = value

    def __call__(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, C, *], t [N] -> the model's outputs (conditional, unconditional), [N, C', *] each."""
        for name, value in self.kwargs.items():
            if isinstance(value, Tensor) and value.dim() > 0 and len(value) != 2 * len(x):
                raise ValueError(f"{name} must have one row a sample ({len(x)}) on each side, got {len(value) // 2}")
        both = self.model(torch.cat([x, x]), torch.cat([t, t]), **self.kwargs)
        cond, uncond = both.chunk(2)
        return cond, uncond
