"""Drop-in `torch.nn` modules over the ops, and the pieces of the models that are built from them."""

from .attention import SpatialAttention
from .conv2d import Conv2d, UpsampleConv2d
from .embedding import TimestepEmbedding, timestep_embedding
from .group_norm import GroupNorm, PlainGroupNorm
from .resample import Downsample, Upsample
from .resblock import ResBlock

__all__ = [
    "Conv2d",
    "Downsample",
    "GroupNorm",
    "PlainGroupNorm",
    "ResBlock",
    "SpatialAttention",
    "TimestepEmbedding",
    "Upsample",
    "UpsampleConv2d",
    "timestep_embedding",
]
