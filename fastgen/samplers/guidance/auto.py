"""Guidance by a weaker version of the same model."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .base import ALONE, Call, Guidance, Model


class AutoGuidance(Guidance):
    """Karras et al. 2024: weak + w (strong - weak), where ``weak`` is a smaller or less trained model; the kernel combines them.

    Args:
        model, weak: called as ``model(x, t, **kwargs)`` each.
        kwargs: of both.
        guidance_scale: w.
    """

    def __init__(
        self, model: Model, weak: Model, kwargs: Mapping[str, Any] | None = None, guidance_scale: float = 1.0
    ) -> None:
        self.model, self.weak, self.kwargs, self.guidance_scale = model, weak, dict(kwargs or {}), guidance_scale

    def scale(self, call: Call) -> float:
        return self.guidance_scale

    def __call__(self, x: Tensor, t: Tensor, call: Call = ALONE) -> tuple[Tensor, Tensor | None]:
        return self.model(x, t, **self.kwargs), self.weak(x, t, **self.kwargs)
