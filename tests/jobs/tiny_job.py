"""The smallest jobs: arithmetic in place of a model, and what a test asks to go wrong on the way."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.jobs import Job


class TinyJob(Job):
    """Images whose pixels follow from seed, class, weight and the batch they are drawn in."""

    def __init__(self, num: int, *, shape: tuple[int, ...] = (1, 4, 6), weight: float = 0.5, **options: Any) -> None:
        super().__init__(num, **options)
        self._shape = shape
        self._model = nn.Linear(1, 1)
        nn.init.constant_(self._model.weight, weight)
        nn.init.zeros_(self._model.bias)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def model(self) -> nn.Module:
        return self._model

    def draw_batch(self, seeds: Sequence[int], labels: Tensor | None) -> Tensor:
        seed = torch.tensor(seeds, dtype=torch.float64).reshape(-1, *(1 for _ in self._shape))
        place = torch.arange(torch.Size(self._shape).numel()).reshape(self._shape)
        shift = 0 if labels is None else labels.reshape(seed.shape)
        return torch.sin(seed * 12.9898 + place * 78.233 + shift + len(seeds)) * self._model.weight.item()
