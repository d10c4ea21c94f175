"""`FlowJob`: images, and rows of a table, of a flow."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..data import from_unit_interval
from ..models import FlowModel
from .model_job import ModelJob


class FlowJob(ModelJob):
    """What a flow draws, each example from its seed.

    Args:
        model: on its device; its data are images in [0, 1), dequantised, or rows.
        num: of the examples.
        temperature: the deviation of the latent.
        levels: of an image, K: which of them a number falls in.
        mean, scale: [D], of each column of a table; rows are ``row * scale + mean``, as the model has them where None.
        options: ``threads`` of torch, and ``seed``, ``labels``, ``shard_size`` and ``batch_size`` of :class:`fastgen.jobs.Job`.

    Raises:
        TypeError, ValueError: an argument is out of its range, or they do not fit each other; the message names it.
    """

    def __init__(
        self,
        model: FlowModel,
        num: int,
        *,
        temperature: float = 1.0,
        levels: int = 256,
        mean: Sequence[float] | None = None,
        scale: Sequence[float] | None = None,
        **options: Any,
    ) -> None:
        config = model.config
        classes = config.get("num_classes")
        super().__init__(model, num, num_classes=classes, needs_class=classes is not None, **options)
        if config.get("context_features") is not None:
            raise ValueError("FlowJob: model must take no context, context_features of this one is not None")
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"FlowJob: temperature must be finite and not negative, got {temperature}")
        if not isinstance(levels, int) or levels < 2:
            raise ValueError(f"FlowJob: levels must be an integer of at least 2, got {levels!r}")
        for name, numbers in (("mean", mean), ("scale", scale)):
            if numbers is not None and (len(model.shape), len(numbers)) != (1, model.shape[0]):
                raise ValueError(f"FlowJob: {name} must be of {list(model.shape)} numbers, got {len(numbers)}")
        self._flow, self.temperature, self.levels = model, float(temperature), levels
        self.mean = None if mean is None else [float(x) for x in mean]
        self.scale = None if scale is None else [float(x) for x in scale]

    @property
    def shape(self) -> tuple[int, ...]:
        return self._flow.shape

    @property
    def settings(self) -> dict[str, Any]:
        of_data = {"levels": self.levels} if len(self.shape) == 3 else {"mean": self.mean, "scale": self.scale}
        return {**super().settings, "temperature": self.temperature, **of_data}

    def draw_batch(self, seeds: Sequence[int], labels: Tensor | None) -> Tensor:
        context = None if labels is None else labels.to(self.device)
        x = self._flow.sample(len(seeds), context, seeds=seeds, temperature=self.temperature)
        if x.dim() == 4:
            return from_unit_interval(x, self.levels)
        rows = x.double()
        rows = rows if self.scale is None else rows * rows.new_tensor(self.scale)
        return rows if self.mean is None else rows + rows.new_tensor(self.mean)
