"""The 1,797 handwritten digits of 8 x 8 pixels that come inside scikit-learn, split once for all.

The data are those of Alpaydin and Kaynak, 1998. 30 images of each class are held out, the same ones on every machine:
nothing in fastgen trains on them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

IMAGE_SHAPE = (1, 8, 8)
NUM_CLASSES = 10
HELD_OUT_PER_CLASS = 30
SPLITS = ("train", "held_out")

_SPLIT_SEED = 1998
_MAX_LEVEL = 16.0  # the images count the set pixels of 4 x 4 blocks


class Digits(NamedTuple):
    """``images`` [N, 1, H, W] float32 in [-1, 1] (ink is 1; 8 x 8 pixels here) and ``labels`` [N] int64 in 0..9."""

    images: Tensor
    labels: Tensor


def load_digits(split: str = "train") -> Digits:
    """The digits of one split: ``"train"`` (1,497 images) or ``"held_out"`` (300), in the order of scikit-learn.

    Raises:
        ValueError: there is no such split.
        ModuleNotFoundError: scikit-learn is not installed; the message says how to install it.
    """
    if split not in SPLITS:
        raise ValueError(f"load_digits: split must be one of {SPLITS}, got {split!r}")
    try:
        from sklearn.datasets import load_digits as load
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits come from scikit-learn, which is not installed: pip install scikit-learn", name=error.name
        ) from error
    bunch = load()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / (_MAX_LEVEL / 2) - 1  # [1797, 1, 8, 8]
    labels = torch.from_numpy(bunch.target).long()
    held_out = _held_out(labels)
    chosen = held_out if split == "held_out" else ~held_out
    return Digits(images[chosen], labels[chosen])


def _held_out(labels: Tensor) -> Tensor:
    """[N] bool: a seeded choice of ``HELD_OUT_PER_CLASS`` images of each class."""
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(NUM_CLASSES):
        members = (labels == label).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=generator)
        mask[members[order[:HELD_OUT_PER_CLASS]]] = True
    return mask
