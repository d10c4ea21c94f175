"""A job of a real model: digits of the shipped diffusion model, in few steps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.jobs import Job
from fastgen.models import UNet, find_weights
from fastgen.samplers import DDIM, sample, squared_cosine_betas


class Digits(Job):
    """[n, 1, 8, 8] on one thread, whatever torch would take."""

    def __init__(self, num: int, **options: Any) -> None:
        super().__init__(num, labels=torch.arange(num) % 10, **options)
        self._model = UNet.load(find_weights("digits-ddpm"), dtype=torch.float32)
        self.solver = DDIM(betas=squared_cosine_betas())

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, 8, 8)

    @property
    def model(self) -> nn.Module:
        return self._model

    def draw_batch(self, seeds: Sequence[int], labels: Tensor | None) -> Tensor:
        torch.set_num_threads(1)
        size = (len(seeds), *self.shape)
        return sample(self._model, size, self.solver, steps=4, seeds=seeds, classes=labels, progress=False)
