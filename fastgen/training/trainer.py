"""`Trainer`: denoising diffusion training of a `UNet`, one step at a time, with EMA and an exact checkpoint.

Ho et al. 2020, algorithm 1; Ho and Salimans 2022 (the class dropped at random, for guidance). The noising and the loss are
`fastgen.ops.q_sample` and `fastgen.ops.diffusion_loss`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..models import UNet
from ..ops import diffusion_loss, philox_normal, q_sample
from ..samplers import alphas_cumprod, noising_tables, vlb_table
from .loop import MAX_SEED, TrainingLoop, check_labels
from .options import SCHEDULES, TrainingOptions
from .spread import Spread


class Batch(NamedTuple):
    """What one step learns from: images [N, C, H, W], labels [N] or None, timesteps [N] and noise of the shape of the images."""

    images: Tensor
    labels: Tensor | None
    timesteps: Tensor
    noise: Tensor


class Trainer(TrainingLoop[UNet, TrainingOptions]):
    """A diffusion model in training; see :class:`TrainingLoop`.

    Args:
        model: a :class:`fastgen.models.UNet`; it is trained in place. With ``learn_sigma`` the loss is the hybrid one.
        options: see :class:`TrainingOptions`.
        images: [M, C, H, W] in [-1, 1].
        labels: [M] int64, None for a model without classes.
        device: of model and data.
        spread: over ranks and micro-batches.

    Raises:
        ValueError: images, labels and model do not fit each other; the message names the argument.
    """

    def __init__(
        self,
        model: UNet,
        options: TrainingOptions,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        device: torch.device | str = "cpu",
        spread: Spread | None = None,
    ) -> None:
        _check_data(model, options, images, labels)
        super().__init__(model, options, images, labels, device, spread)
        bars = alphas_cumprod(SCHEDULES[options.schedule](options.timesteps))
        self._alphas, self._sigmas = (table.to(self.device) for table in noising_tables(bars))
        learned = model.out_channels != model.in_channels
        self._vlb = vlb_table(bars).to(self.device) if learned else None

    def draw(self) -> tuple[Tensor, ...]:
        """Which images, their timesteps, the seeds of their noise, and, of a model with labels, whether these are dropped."""
        n, generator = self.options.batch_size, self.generator
        chosen = torch.randint(len(self.images), (n,), generator=generator)
        timesteps = torch.randint(self.options.timesteps, (n,), generator=generator)
        seeds = torch.randint(MAX_SEED, (n,), generator=generator)
        if self.labels is None:
            return chosen, timesteps, seeds
        return chosen, timesteps, seeds, torch.rand(n, generator=generator) < self.options.label_dropout

    def examples(self, numbers: tuple[Tensor, ...]) -> Batch:
        """The images of ``numbers`` and what they are noised by; the noise of each follows from its own seed."""
        chosen, timesteps, seeds, *dropped = (x.to(self.device) for x in numbers)
        images = self.images[chosen]
        noise = philox_normal(seeds, images.shape, dtype=images.dtype)
        if self.labels is None:
            return Batch(images, None, timesteps, noise)
        labels = self.labels[chosen]
        if self.model.null_label is not None:
            labels = torch.where(dropped[0], self.model.null_label, labels)
        return Batch(images, labels, timesteps, noise)

    def loss(self, batch: Batch) -> Tensor:
        """The loss of the model on ``batch``, a scalar."""
        images, labels, timesteps, noise = batch
        x = q_sample(images, timesteps, self._alphas, self._sigmas, noise)
        assert isinstance(x, Tensor)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.autocast):
            output = self.model(x, timesteps, labels)
        return diffusion_loss(
            output.to(x.dtype), images, noise, timesteps, self._alphas, self._sigmas,
            prediction_type=self.options.prediction_type, vlb_table=self._vlb, vlb_weight=self.options.timesteps / 1000,
        )  # fmt: skip


def _check_data(model: UNet, options: TrainingOptions, images: Tensor, labels: Tensor | None) -> None:
    if images.dim() != 4 or not len(images) or images.shape[1] != model.in_channels:
        raise ValueError(f"Trainer: images must be [M, {model.in_channels}, H, W], got shape {tuple(images.shape)}")
    if labels is None:
        if model.num_classes is not None and model.null_label is None:
            raise ValueError(f"Trainer: labels are needed, the model has {model.num_classes} classes and no null class")
        return
    if model.num_classes is None:
        raise ValueError("Trainer: labels must be None for a model without classes (num_classes=None)")
    check_labels("Trainer", labels, len(images), model.num_classes)
    if options.label_dropout and model.null_label is None:
        raise ValueError(
            f"Trainer: label_dropout={options.label_dropout} needs a model with null_class=True; without one it must be 0"
        )
