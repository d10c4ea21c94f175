"""Whole models, one file a model family, and their checkpoints."""

from .checkpoint import CheckpointError, load_state, read_metadata, save_state
from .digit_classifier import DigitClassifier
from .unet import UNet
from .weights import SHIPPED, find_weights

__all__ = [
    "SHIPPED",
    "CheckpointError",
    "DigitClassifier",
    "UNet",
    "find_weights",
    "load_state",
    "read_metadata",
    "save_state",
]
