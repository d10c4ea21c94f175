"""Somebody's PixelCNN before and after `fastgen.accelerate`: the same pixels under the same seed, times, and the report.

Where pytorch-generative is installed it is that project's GatedPixelCNN, with random weights; else a small PixelCNN built here in
the same way: its classes have the names, attributes and arguments that fastgen knows.
"""

import argparse
import importlib
import time
from typing import Any

import torch
from torch import Tensor, nn

import fastgen


class CausalConv2d(nn.Conv2d):
    """A convolution that puts to 0, before each call, the weights of what lies behind the pixel; ``mask_center``: and of itself."""

    def __init__(self, mask_center: bool, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        mask = torch.zeros_like(self.weight.detach())
        row, column = (size // 2 for size in self.kernel_size)
        mask[:, :, :row] = 1
        mask[:, :, row, : column + (not mask_center)] = 1
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= self.mask
        return super().forward(x)


class AutoregressiveModel(nn.Module):
    """Sampling as everybody writes it: a pass of the whole model for every pixel."""

    _sample_fn = staticmethod(lambda logits: logits.sigmoid().bernoulli())

    def _get_conditioned_on(self, n_samples: int | None, conditioned_on: Tensor | None) -> Tensor:
        return conditioned_on.clone() if conditioned_on is not None else -torch.ones(n_samples or 1, 1, 28, 28)

    @torch.no_grad()
    def sample(self, n_samples: int | None = None, conditioned_on: Tensor | None = None) -> Tensor:
        image = self._get_conditioned_on(n_samples, conditioned_on)
        for y in range(image.shape[2]):
            for x in range(image.shape[3]):
                drawn = self._sample_fn(self.forward(image)[:, :, y, x])
                image[:, :, y, x] = torch.where(image[:, :, y, x] < 0, drawn, image[:, :, y, x])
        return image


class PixelCNN(AutoregressiveModel):
    def __init__(self, channels: int = 32, layers: int = 4) -> None:
        super().__init__()
        self.first = CausalConv2d(True, 1, channels, 7, padding=3)
        self.layers = nn.ModuleList(CausalConv2d(False, channels, channels, 3, padding=1) for _ in range(layers))
        self.head = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x.relu())
        return self.head(x.relu())


def build() -> nn.Module:
    try:
        models = importlib.import_module("pytorch_generative.models")
    except ImportError:
        return PixelCNN()
    return models.GatedPixelCNN(in_channels=1, out_channels=1, n_gated=4, gated_channels=32, head_channels=16)


def draw(model: Any, images: int) -> tuple[Tensor, float]:
    torch.manual_seed(0)
    began = time.perf_counter()
    return model.sample(images), time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        model(torch.zeros(1, 1, 28, 28))  # pytorch-generative's learn the shape of their images from their first call
    before, plain = draw(model, arguments.images)
    fastgen.accelerate(model)
    fastgen.report(model)
    after, fast = draw(model, arguments.images)
    _, again = draw(model, arguments.images)
    print(f"their loop {plain:.2f} s, accelerated {fast:.2f} s with the plan of the model, then {again:.2f} s")
    print(f"pixels that differ: {int((before != after).sum())} of {before.numel()}")


if __name__ == "__main__":
    main()
