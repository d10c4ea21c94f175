"""Whole models, one file a model family, and their checkpoints."""

from .checkpoint import CheckpointError, load_state, read_metadata, save_state
from .unet import UNet

__all__ = ["CheckpointError", "UNet", "load_state", "read_metadata", "save_state"]
