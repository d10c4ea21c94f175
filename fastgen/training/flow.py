"""`FlowTrainer`: maximum likelihood of a flow, in bits a dimension of images or nats of rows, by the loop of the other models."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..data import to_levels
from ..flows import bits_per_dim, dequantize
from ..models import FlowModel
from .loop import MAX_SEED, TrainingLoop, check_labels
from .options import FlowOptions
from .spread import Spread


class Examples(NamedTuple):
    """What one step learns from: rows [N, D], or images [N, C, H, W] dequantised, in [0, 1), and labels [N] or None."""

    data: Tensor
    labels: Tensor | None


class FlowTrainer(TrainingLoop[FlowModel, FlowOptions]):
    """A flow in training; see :class:`TrainingLoop`.

    Args:
        model: a :class:`fastgen.models.FlowModel`; it is trained in place. Layers that begin with the statistics of data
            (ActNorm) do so in :func:`begin_with_statistics`, before it comes here.
        options: see :class:`FlowOptions`.
        data: with ``options.levels`` images [M, C, H, W] in [-1, 1] of so many levels, each dequantised anew whenever it is drawn;
            without, rows [M, D], as they are.
        labels: [M] int64, None for a model without classes.
        device: of model and data.
        spread: over ranks and micro-batches.

    Raises:
        ValueError: data, labels and model do not fit each other; the message names the argument.
    """

    def __init__(
        self,
        model: FlowModel,
        options: FlowOptions,
        data: Tensor,
        labels: Tensor | None = None,
        *,
        device: torch.device | str = "cpu",
        spread: Spread | None = None,
    ) -> None:
        _check_data(model, options, data, labels)
        if spread is not None and spread.ranks.world_size > 1:
            _check_begun(model)
        super().__init__(model, options, data, labels, device, spread)

    def draw(self) -> tuple[Tensor, ...]:
        """Which examples and, of images, the seeds by which they are dequantised."""
        n, generator = self.options.batch_size, self.generator
        chosen = torch.randint(len(self.images), (n,), generator=generator)
        if self.options.levels is None:
            return (chosen,)
        return chosen, torch.randint(MAX_SEED, (n,), generator=generator)

    def examples(self, numbers: tuple[Tensor, ...]) -> Examples:
        """The examples that were chosen, with their labels; the noise of each image follows from its own seed."""
        chosen, *seeds = (x.to(self.device) for x in numbers)
        data, levels = self.images[chosen], self.options.levels
        if levels is not None:
            data = dequantize(to_levels(data, levels), levels, seeds=seeds[0], dtype=data.dtype)
        return Examples(data, None if self.labels is None else self.labels[chosen])

    def loss(self, batch: Examples) -> Tensor:
        """The mean over ``batch`` of bits a dimension, or of nats a row."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.autocast):
            nats = self.model.log_prob(*batch)
        return _scored(nats, batch.data, self.options.levels).mean()

    def after_backward(self) -> None:
        """The gradients clipped, as the options have it."""
        if self.options.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_norm)


@torch.no_grad()
def begin_with_statistics(
    model: FlowModel, data: Tensor, labels: Tensor | None = None, levels: int | None = None
) -> None:
    """Let the layers that begin with statistics have those of ``data``, all of it at once, as :class:`FlowTrainer` takes it.

    Of several ranks each does so with the same data, before they have a process group: within one, layers take what the ranks give
    them for different data.
    """
    x = (
        data
        if levels is None
        else dequantize(to_levels(data, levels), levels, seeds=range(len(data)), dtype=data.dtype)
    )
    model.train().log_prob(x, labels)


@torch.no_grad()
def mean_score(
    model: FlowModel,
    data: Tensor,
    labels: Tensor | None = None,
    *,
    levels: int | None = None,
    draws: int = 1,
    batch_size: int = 100,
) -> float:
    """Bits a dimension of images of ``levels``, nats of rows (-log p), the mean over all ``data``.

    Args:
        model: the flow.
        data: as :class:`FlowTrainer` takes it.
        labels: [M], for a model with classes.
        levels: of images.
        draws: how often each image is dequantised; the noise depends on its number and that of the draw alone.
        batch_size: at a time.
    """
    scores = []
    for first in range(0, len(data), batch_size):
        part = data[first : first + batch_size]
        condition = None if labels is None else labels[first : first + batch_size]
        for draw in range(1 if levels is None else draws):
            x = part
            if levels is not None:
                seeds = [draw * len(data) + first + i for i in range(len(part))]
                x = dequantize(to_levels(part, levels), levels, seeds=seeds, dtype=part.dtype)
            scores.append(_scored(model.log_prob(x, condition), x, levels).double())
    return float(torch.cat(scores).mean())


def _check_begun(model: FlowModel) -> None:
    """What a layer sets by its first batch would be the doing of one micro-batch, and lost where weights are kept in shares."""
    for name, layer in model.named_modules():
        if not getattr(layer, "initialized", True):
            raise ValueError(
                f"FlowTrainer: model must have begun with statistics of data before several ranks train it, and {name} has not: "
                "call begin_with_statistics"
            )


def _scored(nats: Tensor, x: Tensor, levels: int | None) -> Tensor:
    return -nats if levels is None else bits_per_dim(nats, math.prod(x.shape[1:]), levels=levels)


def _check_data(model: FlowModel, options: FlowOptions, data: Tensor, labels: Tensor | None) -> None:
    dims, wanted = (2, "rows [M, D]") if options.levels is None else (4, "images [M, C, H, W]")
    if data.dim() != dims or not len(data):
        raise ValueError(
            f"FlowTrainer: data must be {wanted} with levels={options.levels}, got shape {tuple(data.shape)}"
        )
    if tuple(data.shape[1:]) != model.shape:
        raise ValueError(
            f"FlowTrainer: data must be [M, {', '.join(map(str, model.shape))}], got shape {tuple(data.shape)}"
        )
    classes = model.config.get("num_classes")
    if (labels is None) != (classes is None):
        wanted = "None" if classes is None else "given"
        raise ValueError(f"FlowTrainer: labels must be {wanted} for a model with num_classes={classes}")
    if labels is not None and classes is not None:
        check_labels("FlowTrainer", labels, len(data), classes)
