"""Whole models, one file a model family, and their checkpoints."""

from ._flow_model import FlowModel
from .autoencoder_kl import AutoencoderKL, DiagonalGaussian
from .autoregressive import AutoregressiveModel
from .checkpoint import CheckpointError, load_state, read_metadata, save_state
from .digit_classifier import DigitClassifier
from .gated_pixel_cnn import GatedPixelCNN
from .glow import Glow
from .masked_autoregressive_flow import IAF, MAF
from .neural_spline_flow import NeuralSplineFlow
from .nice import NICE
from .pixel_cnn import PixelCNN
from .pixel_cnn_plus_plus import PixelCNNPlusPlus
from .pixel_snail import PixelSNAIL
from .real_nvp import MultiScaleRealNVP, RealNVP
from .srflow import SRFlow
from .super_resolution import SuperResolutionUNet
from .tarflow import TarFlow
from .unet import UNet
from .unet_condition import UNetCondition
from .video_unet import FrameInterpolationUNet, VideoUNet, known_frames
from .wavenet import WaveNet
from .weights import SHIPPED, find_weights

__all__ = [
    "IAF",
    "MAF",
    "NICE",
    "SHIPPED",
    "AutoencoderKL",
    "AutoregressiveModel",
    "CheckpointError",
    "DiagonalGaussian",
    "DigitClassifier",
    "FlowModel",
    "FrameInterpolationUNet",
    "GatedPixelCNN",
    "Glow",
    "MultiScaleRealNVP",
    "NeuralSplineFlow",
    "PixelCNN",
    "PixelCNNPlusPlus",
    "PixelSNAIL",
    "RealNVP",
    "SRFlow",
    "SuperResolutionUNet",
    "TarFlow",
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
