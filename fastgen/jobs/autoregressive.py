"""`AutoregressiveJob`: images of a PixelCNN or its like."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..autoregressive import sample
from ..autoregressive.sampling import checked_cut
from ..models import AutoregressiveModel
from .model_job import ModelJob


class AutoregressiveJob(ModelJob):
    """Images of an autoregressive model: :func:`fastgen.autoregressive.sample` with a seed an image.

    Args:
        model: of :mod:`fastgen.models`, without a map as condition; on its device.
        image_shape: (C, H, W).
        num: of the images.
        temperature, top_k, top_p: as ``sample`` takes them.
        options: ``threads`` of torch, and ``seed``, ``labels``, ``shard_size`` and ``batch_size`` of :class:`fastgen.jobs.Job`.

    Raises:
        TypeError, ValueError: an argument is out of its range, or they do not fit each other; the message names it.
    """

    def __init__(
        self,
        model: AutoregressiveModel,
        image_shape: Sequence[int],
        num: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        **options: Any,
    ) -> None:
        classes = model.num_classes
        super().__init__(model, num, num_classes=classes, needs_class=classes is not None, **options)
        if model.condition_channels is not None:
            raise ValueError("AutoregressiveJob: model must take no map, condition_channels of this one is not None")
        checked_cut(temperature, top_k, top_p)  # raises where one is out of its range
        if model.distribution == "logistic_mixture" and (top_k, top_p) != (None, None):
            raise ValueError(f"AutoregressiveJob: top_k and top_p are not for mixtures, got {top_k} and {top_p}")
        self.temperature, self.top_k, self.top_p = float(temperature), top_k, top_p
        self._shape = tuple(map(int, image_shape))

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def settings(self) -> dict[str, Any]:
        return {
            **super().settings,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
        }

    def draw_batch(self, seeds: Sequence[int], labels: Tensor | None) -> Tensor:
        return sample(
            self.model,
            (len(seeds), *self._shape),
            condition=None if labels is None else labels.to(self.device),
            seeds=seeds,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            progress=False,
        )
