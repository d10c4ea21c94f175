"""Real data: handwritten digits, 8 x 8 inside scikit-learn and MNIST from a folder, with their levels; three tables; PNG files."""

from .digits import IMAGE_SHAPE, NUM_CLASSES, Digits, load_digits
from .levels import from_unit_interval, to_levels
from .mnist import load_mnist
from .png import png
from .tables import TABLES, Table, load_table

__all__ = [
    "IMAGE_SHAPE",
    "NUM_CLASSES",
    "TABLES",
    "Digits",
    "Table",
    "from_unit_interval",
    "load_digits",
    "load_mnist",
    "load_table",
    "png",
    "to_levels",
]
