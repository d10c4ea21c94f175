"""Whole models, one file a model family, and their checkpoints."""

from .autoregressive import AutoregressiveModel
from .checkpoint import CheckpointError, load_state, read_metadata, save_state
from .digit_classifier import DigitClassifier
from .gated_pixel_cnn import GatedPixelCNN
from .pixel_cnn import PixelCNN
from .pixel_cnn_plus_plus import PixelCNNPlusPlus
from .pixel_snail import PixelSNAIL
from .unet import UNet
from .wavenet import WaveNet
from .weights import SHIPPED, find_weights

__all__ = [
    "SHIPPED",
    "AutoregressiveModel",
    "CheckpointError",
    "DigitClassifier",
    "GatedPixelCNN",
    "PixelCNN",
    "PixelCNNPlusPlus",
    "PixelSNAIL",
    "UNet",
    "WaveNet",
    "find_weights",
    "load_state",
    "read_metadata",
    "save_state",
]
