"""`TarFlowJob`: images of a transformer flow, guided towards their class, and without the noise that it was trained with."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..flows import Guidance
from ..models import TarFlow
from .model_job import ModelJob


class TarFlowJob(ModelJob):
    """What a :class:`fastgen.models.TarFlow` draws, each image from its seed.

    Args:
        model: on its device; its images are in [-1, 1].
        num: of the images.
        temperature: the deviation of the latent.
        guidance_scale: s, as diffusion has it: (a, b) + (s - 1) (a - a', b - b') of a token's parameters with and without the
            class. 1: none.
        noise_std: of the noise that the model was trained with, which is taken out; 0: it stays.
        options: ``threads`` of torch, and ``seed``, ``labels``, ``shard_size`` and ``batch_size`` of :class:`fastgen.jobs.Job`.

    Raises:
        TypeError, ValueError: an argument is out of its range, or they do not fit each other; the message names it.
    """

    def __init__(
        self,
        model: TarFlow,
        num: int,
        *,
        temperature: float = 1.0,
        guidance_scale: float = 1.0,
        noise_std: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(model, num, num_classes=model.config["num_classes"], needs_class=False, **options)
        for name, value, least in (
            ("temperature", temperature, 0),
            ("guidance_scale", guidance_scale, 1),
            ("noise_std", noise_std, 0),
        ):
            if not least <= value < float("inf"):
                raise ValueError(f"TarFlowJob: {name} must be finite and at least {least}, got {value}")
        if guidance_scale != 1 and self.labels is None:
            raise ValueError(f"TarFlowJob: guidance_scale must be 1 without labels, got {guidance_scale}")
        self._flow, self.temperature = model, float(temperature)
        self.guidance_scale, self.noise_std = float(guidance_scale), float(noise_std)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._flow.shape

    @property
    def settings(self) -> dict[str, Any]:
        own = {"temperature": self.temperature, "guidance_scale": self.guidance_scale, "noise_std": self.noise_std}
        return {**super().settings, **own}

    def draw_batch(self, seeds: Sequence[int], labels: Tensor | None) -> Tensor:
        return self._flow.sample(
            len(seeds),
            None if labels is None else labels.to(self.device),
            seeds=seeds,
            temperature=self.temperature,
            guidance=None if self.guidance_scale == 1 else Guidance(self.guidance_scale - 1),
            noise_std=self.noise_std,
        )
