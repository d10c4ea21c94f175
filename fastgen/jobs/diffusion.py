"""`DiffusionJob`: images of a diffusion model, by any solver of :mod:`fastgen.samplers`."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from ..samplers import Solver, sample
from .model_job import ModelJob


class DiffusionJob(ModelJob):
    """Images of a diffusion model: :func:`fastgen.samplers.sample` with a seed an image.

    Args:
        model: as ``sample`` takes it, with the classes as ``y``; on its device and in float32.
        solver: from noise to images.
        image_shape: (C, H, W).
        num: of the images.
        steps: of a trajectory.
        guidance_scale: of classifier-free guidance towards the labels; at 1 there is none.
        options: ``threads`` of torch, and ``seed``, ``labels``, ``shard_size`` and ``batch_size`` of :class:`fastgen.jobs.Job`.

    Raises:
        TypeError, ValueError: an argument is out of its range, or they do not fit each other; the message names it.
    """

    def __init__(
        self,
        model: nn.Module,
        solver: Solver,
        image_shape: Sequence[int],
        num: int,
        *,
        steps: int,
        guidance_scale: float = 1.0,
        **options: Any,
    ) -> None:
        classes, null_label = getattr(model, "num_classes", None), getattr(model, "null_label", None)
        needs_class = classes is not None and null_label is None
        super().__init__(model, num, num_classes=classes, needs_class=needs_class, **options)
        if guidance_scale != 1 and (self.labels is None or null_label is None):
            raise ValueError(
                f"DiffusionJob: guidance_scale must be 1 without labels, or for a model without a class for none, "
                f"got {guidance_scale}"
            )
        solver.plan(steps)  # raises where there is no such trajectory
        self.solver, self.steps, self.guidance_scale = solver, steps, float(guidance_scale)
        self._shape = tuple(map(int, image_shape))

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def settings(self) -> dict[str, Any]:
        return {
            **super().settings,
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "solver": described(self.solver),
        }

    def draw_batch(self, seeds: Sequence[int], labels: Tensor | None) -> Tensor:
        return sample(
            self.model,
            (len(seeds), *self._shape),
            self.solver,
            steps=self.steps,
            seeds=seeds,
            classes=labels,
            guidance_scale=self.guidance_scale,
            progress=False,
        )


def described(solver: Solver) -> dict[str, Any]:
    """The class of ``solver`` and all its fields, ready for JSON."""
    options = {field.name: _described(getattr(solver, field.name)) for field in fields(solver)}
    return {"name": type(solver).__name__, **options}


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        # ten digits: another processor's cosine may differ in the last ones
        text = ",".join(f"{number:.9e}" for number in value.double().flatten().tolist())
        return f"{list(value.shape)} {hashlib.sha256(text.encode()).hexdigest()}"
    if callable(value):
        return f"{value.__module__}.{value.__qualname__}"
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
