"""Real data: handwritten digits, 8 x 8 inside scikit-learn and MNIST from a folder, with their grey levels; three tables; and
sets of images on disk: what has been drawn, and what it is measured against.
"""

from ._image_set import ImageSet, ImageSetError, JoinedImages, TensorImages
from .digits import IMAGE_SHAPE, NUM_CLASSES, Digits, load_digits
from .image_sets import open_image_set
from .levels import from_unit_interval, to_levels
from .mnist import load_mnist
from .png import png
from .tables import TABLES, Table, load_table

__all__ = [
    "IMAGE_SHAPE",
    "NUM_CLASSES",
    "TABLES",
    "Digits",
    "ImageSet",
    "ImageSetError",
    "JoinedImages",
    "Table",
    "TensorImages",
    "from_unit_interval",
    "load_digits",
    "load_mnist",
    "load_table",
    "open_image_set",
    "png",
    "to_levels",
]
