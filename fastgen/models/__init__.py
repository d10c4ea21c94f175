"""Whole models, one file a model family, and their checkpoints."""

from .autoencoder_kl import AutoencoderKL, DiagonalGaussian
from .autoregressive import AutoregressiveModel
from .checkpoint import CheckpointError, load_state, read_metadata, save_state
from .digit_classifier import DigitClassifier
from .gated_pixel_cnn import GatedPixelCNN
from .pixel_cnn import PixelCNN
from .pixel_cnn_plus_plus import PixelCNNPlusPlus
from .pixel_snail import PixelSNAIL
from .super_resolution import SuperResolutionUNet
from .unet import UNet
from .unet_condition import UNetCondition
from .video_unet import FrameInterpolationUNet, VideoUNet, known_frames
from .wavenet import WaveNet
from .weights import SHIPPED, find_weights

__all__ = [
    "SHIPPED",
    "AutoencoderKL",
    "AutoregressiveModel",
    "CheckpointError",
    "DiagonalGaussian",
    "DigitClassifier",
    "FrameInterpolationUNet",
    "GatedPixelCNN",
    "PixelCNN",
    "PixelCNNPlusPlus",
    "PixelSNAIL",
    "SuperResolutionUNet",
    "UNet",
    "UNetCondition",
    "VideoUNet",
    "WaveNet",
    "find_weights",
    "known_frames",
    "load_state",
    "read_metadata",
    "save_state",
]
