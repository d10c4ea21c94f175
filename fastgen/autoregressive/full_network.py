"""A module as the loops over whole images call it: for some samples of a batch, with what it is conditioned on."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .capture import dtype_and_device, evaluating


class FullNetwork:
    """``network(image, samples)``: logits [n, O, H, W] of images [n, C, H, W] that are those ``samples`` [n] of the batch.

    Args:
        model: returns of images [n, C, H, W], or of sequences [n, C, T], logits [n, O, H, W], [n, K, C, H, W] or of sequences.
        shape: (N, C, H, W) or (N, C, T) of the batch.
        condition: what the model takes beside; tensors of N rows, in lists, tuples and dictionaries too, are taken row by row.
    """

    def __init__(self, model: nn.Module, shape: Sequence[int], condition: Any = None) -> None:
        self.model, self.condition = model, condition
        self.samples, self.sequence = shape[0], len(shape) == 3
        options = dtype_and_device(model)
        self.dtype: torch.dtype = options.get("dtype", torch.get_default_dtype())
        self.device: torch.device = options.get("device", torch.device("cpu"))

    def __call__(self, image: Tensor, samples: Tensor | None = None) -> Tensor:
        x = image.to(self.device, self.dtype)
        inputs = [x[:, :, 0] if self.sequence else x]
        if self.condition is not None:
            inputs.append(self._of(self.condition, samples))
        with evaluating(self.model), torch.no_grad():
            output = self.model(*inputs)
        return output.reshape(len(x), -1, *x.shape[2:])

    def _of(self, condition: Any, samples: Tensor | None) -> Any:
        if samples is None or len(samples) == self.samples:
            return condition
        if isinstance(condition, dict):
            return {key: self._of(item, samples) for key, item in condition.items()}
        if isinstance(condition, list | tuple):
            return type(condition)(self._of(item, samples) for item in condition)
        if isinstance(condition, Tensor) and condition.dim() and len(condition) == self.samples:
            return condition[samples.to(condition.device)]
        return condition
