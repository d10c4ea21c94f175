"""Real data sets small enough to come with a package: what the demo, the trainer and the tests draw from."""

from .digits import IMAGE_SHAPE, NUM_CLASSES, Digits, load_digits

__all__ = ["IMAGE_SHAPE", "NUM_CLASSES", "Digits", "load_digits"]
