"""Whether drawn digits are copies: their distance to the nearest training image, beside that of real digits not trained on."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Copies:
    """Distances in pixel space (root of the sum of squares, images in [-1, 1]) to the nearest training image."""

    median: float
    smallest: float
    held_out_median: float
    held_out_smallest: float
    closer_than_any_held_out: int

    @classmethod
    def measure(cls, drawn: Tensor, train: Tensor, held_out: Tensor) -> "Copies":
        """Of ``drawn`` and ``held_out`` images to those of ``train``, all [*, C, H, W]."""
        real = train.flatten(1).double()
        ours, theirs = _nearest(drawn, real), _nearest(held_out, real)
        return cls(
            median=float(ours.median()),
            smallest=float(ours.min()),
            held_out_median=float(theirs.median()),
            held_out_smallest=float(theirs.min()),
            closer_than_any_held_out=int((ours < theirs.min()).sum()),
        )

    def __str__(self) -> str:
        return (
            f"copies: distance to the nearest training image, median {self.median:.2f} (smallest {self.smallest:.2f}); "
            f"real held-out digits {self.held_out_median:.2f} ({self.held_out_smallest:.2f}); "
            f"drawn digits closer than any held-out one: {self.closer_than_any_held_out}"
        )


def _nearest(images: Tensor, real: Tensor) -> Tensor:
    parts = images.clamp(-1, 1).flatten(1).double().split(100)  # of MNIST, 48 MB of distances each
    return torch.cat([torch.cdist(part, real).amin(1) for part in parts])
