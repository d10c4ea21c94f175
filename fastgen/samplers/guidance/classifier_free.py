"""Classifier-free guidance (Ho and Salimans 2022), within an interval and rescaled."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .base import ALONE, Call, Guidance, Model, Pair, of_means, rows


class ClassifierFreeGuidance(Guidance):
    """uncond + w (cond - uncond): the model is called once on both halves, the kernel combines them.

    Args:
        model, cond, uncond: see :class:`fastgen.samplers.guidance.base.Pair`.
        guidance_scale: w.
        interval: (first, last) as fractions of the trajectory, 0 at the noise and 1 at the image: outside, w is 1 and the
            unconditional half is not computed (Kynkäänniemi et al. 2024).
        rescale: phi of Lin et al. 2024, section 3.4: towards the standard deviation of the conditional output. It needs
            reductions, so the combination is then made here and not in the kernel.
    """

    def __init__(
        self,
        model: Model,
        cond: Mapping[str, Any],
        uncond: Mapping[str, Any],
        guidance_scale: float = 1.0,
        *,
        interval: tuple[float, float] = (0.0, 1.0),
        rescale: float = 0.0,
    ) -> None:
        self.model = model
        self.pair = Pair(model, cond, uncond)
        if not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(f"interval must satisfy 0 <= first <= last <= 1, got {interval}")
        if not 0 <= rescale <= 1:
            raise ValueError(f"rescale must be in [0, 1], got {rescale}")
        self.guidance_scale, self.interval, self.rescale = guidance_scale, interval, rescale

    def scale(self, call: Call) -> float:
        return self.guidance_scale

    def __call__(self, x: Tensor, t: Tensor, call: Call = ALONE) -> tuple[Tensor, Tensor | None]:
        if not self.interval[0] <= call.fraction <= self.interval[1]:
            return self.pair.first(x, t), None
        cond, uncond = self.pair.together(x, t)
        if self.rescale == 0:
            return cond, uncond
        return of_means(x, self._rescaled, cond, uncond), None

    def _rescaled(self, cond: Tensor, uncond: Tensor) -> Tensor:
        return rescaled(uncond + self.guidance_scale * (cond - uncond), cond, self.rescale)


def rescaled(guided: Tensor, cond: Tensor, rescale: float) -> Tensor:
    """phi guided std(cond) / std(guided) + (1 - phi) guided, standard deviations of each sample."""
    ratio = cond.flatten(1).std(1) / guided.flatten(1).std(1)
    return guided * rows(rescale * ratio + (1 - rescale), guided)
