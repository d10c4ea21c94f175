"""Real data sets of handwritten digits: 8 x 8, small enough to come with a package, and MNIST, read from a folder."""

from .digits import IMAGE_SHAPE, NUM_CLASSES, Digits, load_digits
from .mnist import load_mnist

__all__ = ["IMAGE_SHAPE", "NUM_CLASSES", "Digits", "load_digits", "load_mnist"]
