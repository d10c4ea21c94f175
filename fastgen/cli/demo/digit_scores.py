"""How good drawn digits are: read by a classifier fitted on real ones, and compared with the nearest real one."""

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.svm import SVC
from torch import Tensor

from ...data import load_digits


@dataclass(frozen=True)
class Copies:
    """Distances in pixel space (root of the sum of squares, images in [-1, 1]) to the nearest training image."""

    median: float
    smallest: float
    held_out_median: float
    held_out_smallest: float
    closer_than_any_held_out: int


class DigitJudge:
    """A support vector classifier (RBF kernel) of the training digits, and the training digits themselves."""

    def __init__(self) -> None:
        self.train, self.held_out = load_digits("train"), load_digits("held_out")
        self.classifier = SVC(C=10.0, gamma=0.06).fit(_flat(self.train.images), self.train.labels.numpy())

    def recognised(self, images: Tensor, labels: Tensor) -> float:
        """The share of ``images`` [N, 1, 8, 8] that are read as ``labels`` [N]."""
        return float((self.classifier.predict(_flat(images)) == labels.numpy()).mean())

    def held_out_recognised(self) -> float:
        """The same for the real digits that neither the classifier nor the model has seen."""
        return self.recognised(*self.held_out)

    def copies(self, images: Tensor) -> Copies:
        """Whether ``images`` lie nearer to the training images than unseen real digits do."""
        ours, theirs = self._nearest(images), self._nearest(self.held_out.images)
        return Copies(
            median=float(ours.median()),
            smallest=float(ours.min()),
            held_out_median=float(theirs.median()),
            held_out_smallest=float(theirs.min()),
            closer_than_any_held_out=int((ours < theirs.min()).sum()),
        )

    def _nearest(self, images: Tensor) -> Tensor:
        real = self.train.images.flatten(1).double()
        return torch.cdist(images.clamp(-1, 1).flatten(1).double(), real).amin(1)


def _flat(images: Tensor) -> np.ndarray:
    return images.clamp(-1, 1).flatten(1).numpy()
