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
        return self._output(image, samples).reshape(len(image), -1, *image.shape[2:])

    def layout(self, shape: Sequence[int]) -> tuple[int, bool, bool]:
        """Of images [N, C, H, W]: (logits of a pixel, whether levels come before colors, whether the module tells them apart)."""
        output = self._output(torch.zeros(tuple(shape)), None)
        named = output.dim() > (3 if self.sequence else 4)
        return output[0].numel() // (shape[2] * shape[3]), not named or output.shape[2] == shape[1], named

    def _output(self, image: Tensor, samples: Tensor | None) -> Tensor:
        x = image.to(self.device, self.dtype)
        inputs = [x[:, :, 0] if self.sequence else x]
        if self.condition is not None:
            inputs.append(self._of(self.condition, samples))
        with evaluating(self.model), torch.no_grad():
            return self.model(*inputs)

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
