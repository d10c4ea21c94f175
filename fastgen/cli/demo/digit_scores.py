"""How good drawn 8 x 8 digits are: read by a classifier fitted on real ones, and compared with the nearest real one."""

import numpy as np
from sklearn.svm import SVC
from torch import Tensor

from ...data import load_digits
from .copies import Copies


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
        return Copies.measure(images, self.train.images, self.held_out.images)

    def findings(self, images: Tensor) -> list[str]:
        """Sentences on real digits and on copies, for the report of ``images``."""
        share = self.held_out_recognised()
        return [
            f"real held-out digits: {share:.1%} are read as what they are, by the same classifier",
            str(self.copies(images)),
        ]


def _flat(images: Tensor) -> np.ndarray:
    return images.clamp(-1, 1).flatten(1).numpy()
