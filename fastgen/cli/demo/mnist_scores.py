"""How good drawn 28 x 28 digits are: read by the shipped classifier of real ones and, where MNIST is at hand, compared with it."""

import torch
from torch import Tensor

from ...data import Digits
from ...models import DigitClassifier, find_weights, read_metadata
from ...models.checkpoint import json_metadata
from .copies import Copies

WEIGHTS = "mnist-classifier"
HELD_OUT = 1000  # of the test images, to compare the drawn ones with


class MnistJudge:
    """The shipped :class:`fastgen.models.DigitClassifier`.

    Args:
        real: the training and the test images, None where they are not at hand.
    """

    def __init__(self, real: tuple[Digits, Digits] | None = None) -> None:
        self.real = real
        self.classifier = DigitClassifier.load(find_weights(WEIGHTS), dtype=torch.float32)

    def recognised(self, images: Tensor, labels: Tensor) -> float:
        """The share of ``images`` [N, 1, 28, 28] that are read as ``labels`` [N]."""
        return float((self.classifier.read(images) == labels).double().mean())

    def findings(self, images: Tensor) -> list[str]:
        """Sentences on real digits and on copies, for the report of ``images``."""
        if self.real is None:
            share = json_metadata(WEIGHTS, read_metadata(find_weights(WEIGHTS)), "training")["read_right"]
            return [
                f"real test digits: {share:.1%} were read as what they are by the same classifier, when it was trained"
            ]
        train, test = self.real
        return [
            f"real test digits: {self.recognised(*test):.1%} are read as what they are, by the same classifier",
            str(Copies.measure(images, train.images, test.images[:HELD_OUT])),
        ]
