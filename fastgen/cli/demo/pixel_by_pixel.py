"""Digits drawn pixel by pixel, by the cached engine and by a pass of the whole network for each pixel; either timed."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ...autoregressive import plan, sample
from ...models import GatedPixelCNN
from .plain_network import PlainGatedPixelCNN


@dataclass(frozen=True)
class Drawing:
    """Images and how long they took."""

    what: str
    method: str
    images: Tensor
    set_up: float  # seconds
    seconds: float  # of drawing

    @property
    def whole(self) -> float:
        return self.set_up + self.seconds


@dataclass(frozen=True)
class Agreement:
    """Of one drawing beside another of the same images."""

    what: str
    pixels: int
    equal: int
    images: int
    equal_images: int

    @classmethod
    def of(cls, what: str, ours: Tensor, theirs: Tensor) -> "Agreement":
        same = ours == theirs
        return cls(what, same.numel(), int(same.sum()), len(same), int(same.flatten(1).all(1).sum()))

    def __str__(self) -> str:
        line = f"{self.what}: {self.equal:,} of {self.pixels:,} pixels are equal both ways"
        if self.equal == self.pixels:
            return line
        return f"{line}, in {self.equal_images} of {self.images} images all: one that is drawn otherwise changes those after it"


def cached(
    model: GatedPixelCNN,
    shape: tuple[int, int, int],
    labels: Tensor,
    seeds: Sequence[int],
    quiet: bool,
    *,
    prefix: Tensor | None = None,
    what: str = "",
) -> Drawing:
    """By the engine; the plan it makes first is its set-up."""
    whole = (len(labels), *shape)
    begin = time.perf_counter()
    plan(model, whole, condition=labels)
    planned = time.perf_counter()
    images = sample(
        model, whole, condition=labels, seeds=seeds, prefix=prefix, method="cached", progress=not quiet
    )  # fmt: skip
    end = time.perf_counter()
    return Drawing(what or _name(len(labels), shape), "cached", images, planned - begin, end - planned)


def naive(
    model: GatedPixelCNN, shape: tuple[int, int, int], labels: Tensor, seeds: Sequence[int], quiet: bool
) -> Drawing:
    """By a pass of the whole network, in plain torch, for each pixel."""
    plain = PlainGatedPixelCNN(model)
    begin = time.perf_counter()
    images = sample(
        plain, (len(labels), *shape), condition=labels, seeds=seeds, method="naive", progress=not quiet
    )  # fmt: skip
    return Drawing(_name(len(labels), shape), "naive", images, 0.0, time.perf_counter() - begin)


def _name(count: int, shape: tuple[int, int, int]) -> str:
    return f"{count} digit{'s' * (count > 1)} of {shape[1]} x {shape[2]}"
