"""Class accuracy: the share of images in which a classifier sees the class that they were drawn as.

    1/N sum [argmax_c p(c | x_n) = y_n]

Of a conditional model and a classifier trained on the real images it is the classification accuracy score turned round: Ravuri and
Vinyals 2019 train on what was drawn and judge by what is real.
"""

from typing import NamedTuple

from torch import Tensor


class Accuracy(NamedTuple):
    """``right`` of ``total`` images."""

    right: int
    total: int

    @property
    def share(self) -> float:
        return self.right / self.total


def class_accuracy(logits: Tensor, labels: Tensor) -> Accuracy:
    """Of ``logits`` [N, K] and ``labels`` [N]; a label that is none of the K classes is never right."""
    return Accuracy(int((logits.argmax(dim=1).cpu() == labels.cpu()).sum()), len(labels))
