"""`AutoregressiveTrainer`: maximum likelihood, in bits a dimension, by the loop that diffusion is trained by too."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..models import AutoregressiveModel
from .loop import TrainingLoop, check_labels
from .options import AutoregressiveOptions
from .spread import Spread


class Examples(NamedTuple):
    """What one step learns from: images [N, C, H, W] and labels [N] or None."""

    images: Tensor
    labels: Tensor | None


class AutoregressiveTrainer(TrainingLoop[AutoregressiveModel, AutoregressiveOptions]):
    """An autoregressive model in training; see :class:`TrainingLoop`.

    Args:
        model: a :class:`fastgen.models.AutoregressiveModel`; it is trained in place.
        options: see :class:`AutoregressiveOptions`.
        images: [M, C, H, W] in [-1, 1].
        labels: [M] int64, None for a model without classes.
        device: of model and data.
        spread: over ranks and micro-batches.

    Raises:
        ValueError: images, labels and model do not fit each other; the message names the argument.
    """

    def __init__(
        self,
        model: AutoregressiveModel,
        options: AutoregressiveOptions,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        device: torch.device | str = "cpu",
        spread: Spread | None = None,
    ) -> None:
        _check_data(model, images, labels)
        super().__init__(model, options, images, labels, device, spread)

    def draw(self) -> tuple[Tensor, ...]:
        """Which images."""
        return (torch.randint(len(self.images), (self.options.batch_size,), generator=self.generator),)

    def examples(self, numbers: tuple[Tensor, ...]) -> Examples:
        """The images that were chosen, with their labels."""
        chosen = numbers[0].to(self.device)
        images = self.images[chosen].to(memory_format=torch.channels_last)
        return Examples(images, None if self.labels is None else self.labels[chosen])

    def loss(self, batch: Examples) -> Tensor:
        """The mean of bits a dimension over ``batch``."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.autocast):
            return self.model.bits_per_dim(*batch).mean()

    def after_backward(self) -> None:
        """The gradients clipped, as the options have it."""
        if self.options.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_norm)


@torch.no_grad()
def mean_bits_per_dim(
    model: AutoregressiveModel, images: Tensor, labels: Tensor | None = None, batch_size: int = 100
) -> float:
    """Bits a dimension, the mean over all ``images``."""

    def parts() -> Iterator[Tensor]:
        for i in range(0, len(images), batch_size):
            part = images[i : i + batch_size].to(memory_format=torch.channels_last)
            yield model.bits_per_dim(part, None if labels is None else labels[i : i + batch_size]).double()

    return float(torch.cat(list(parts())).mean())


@torch.no_grad()
def begin_with_frequencies(model: AutoregressiveModel, images: Tensor) -> None:
    """Make the last bias of a categorical model such that it begins with the frequencies of the levels in ``images``.

    Each level is counted once more than it is there.
    """
    counts = torch.bincount(model.indices(images).flatten(), minlength=model.levels).double() + 1
    bias = model.get_parameter("out.bias")
    bias.copy_((counts / counts.sum()).log().repeat_interleave(model.in_channels))


def _check_data(model: AutoregressiveModel, images: Tensor, labels: Tensor | None) -> None:
    name = "AutoregressiveTrainer"
    if images.dim() != 4 or not len(images) or images.shape[1] != model.in_channels:
        raise ValueError(f"{name}: images must be [M, {model.in_channels}, H, W], got shape {tuple(images.shape)}")
    if (labels is None) != (model.num_classes is None):
        wanted = "None" if model.num_classes is None else "given"
        raise ValueError(f"{name}: labels must be {wanted} for a model with num_classes={model.num_classes}")
    if model.condition_channels is not None:
        raise ValueError(f"{name}: the model must need no map, got condition_channels={model.condition_channels}")
    if labels is not None and model.num_classes is not None:
        check_labels(name, labels, len(images), model.num_classes)
