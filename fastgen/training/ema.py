"""`EMA`: the exponential moving average of a model's weights, which samples better than the weights themselves."""

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


class EMA(Generic[Model]):
    r"""A copy of a model whose parameters follow those of the model in training:

    .. math:: \bar\theta \leftarrow d\,\bar\theta + (1 - d)\,\theta, \qquad d = \min(decay, (1 + k) / (10 + k))

    at step k: early on it follows faster, for the initial weights are worth nothing. Buffers are copied.

    Args:
        model: what is averaged; its copy is :attr:`model`, in evaluation mode and without gradients.
        decay: d at the end.
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: Model, step: int) -> None:
        """Follow ``model`` after ``step`` steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for average, parameter in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(parameter, 1 - decay)
        for copied, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            copied.copy_(buffer)
