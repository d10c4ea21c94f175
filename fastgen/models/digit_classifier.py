"""`DigitClassifier`: a small convolutional network that reads 28 x 28 digits, as a judge of those that a diffusion model draws.

In the manner of LeCun et al. 1998 (LeNet-5). Its training is `fastgen train mnist-classifier`.
"""

import os
from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import load_model, save_model

MODEL_NAME = "DigitClassifier"


class DigitClassifier(nn.Module):
    """[N, 1, 28, 28] in [-1, 1], ink 1 -> [N, 10], the logits of the classes 0 to 9.

    Three 3x3 convolutions, each with ReLU and a maximum over 2x2, and a linear layer.

    Args:
        channels: of the first convolution; the others have 2 and 4 times as many.
        dropout: rate before the linear layer.
    """

    def __init__(self, channels: int = 16, *, dropout: float = 0.0) -> None:
        super().__init__()
        self._config = {"channels": channels, "dropout": dropout}
        widths = (1, channels, 2 * channels, 4 * channels)
        self.convs = nn.ModuleList(nn.Conv2d(c, k, 3, padding=1) for c, k in pairwise(widths))
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(4 * channels * 3 * 3, 10)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or tuple(x.shape[1:]) != (1, 28, 28):
            raise ValueError(f"DigitClassifier: x must be [N, 1, 28, 28], got shape {tuple(x.shape)}")
        for conv in self.convs:
            x = F.max_pool2d(F.relu(conv(x)), 2)  # 28 -> 14 -> 7 -> 3
        return self.linear(self.dropout(x.flatten(1)))

    @torch.no_grad()
    def read(self, images: Tensor, batch_size: int = 1000) -> Tensor:
        """The most likely class of each of ``images`` [N, 1, 28, 28], which are clipped to [-1, 1]: [N] int64."""
        return torch.cat([self(part.clamp(-1, 1)).argmax(1) for part in images.split(batch_size)])

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
        """Write weights and config to a safetensors file, atomically, ``metadata`` beside them."""
        save_model(path, self, MODEL_NAME, self._config, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> "DigitClassifier":
        """Read what :meth:`save` wrote: in evaluation mode, in ``dtype`` or else that of the file.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: the file is damaged, is of another model, does not fit its own config, or its weights are not finite.
        """
        return load_model(path, MODEL_NAME, lambda config: cls(**config), dtype=dtype)
