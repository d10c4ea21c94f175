"""Drop-in `torch.nn` modules over the ops, and the pieces of the models that are built from them."""

from .actnorm import ActNorm
from .attention import SingleHeadAttention, SpatialAttention
from .causal_transformer import CausalTransformerLayer, KeyValueCache
from .concat_elu import ConcatELU
from .conv2d import Conv2d, UpsampleConv2d
from .embedding import TimestepEmbedding, timestep_embedding
from .gated_activation import GatedActivation
from .geglu import GEGLU
from .group_norm import GroupNorm, PlainGroupNorm
from .invertible_conv1x1 import InvertibleConv1x1
from .layer_norm import LayerNorm
from .linear_attention import LinearAttention
from .masked_conv2d import MaskedConv2d
from .masked_linear import MaskedLinear
from .pseudo3d import FrameAttention, PseudoConv3d, SpatioTemporalAttention, TemporalAttention, TemporalConv
from .resample import Downsample, Upsample
from .resblock import ResBlock
from .rms_norm import ChannelRMSNorm, RMSNorm
from .squeeze import Squeeze
from .transformer import BasicTransformerBlock, CrossAttention, FeedForward, SpatialTransformer

__all__ = [
    "GEGLU",
    "ActNorm",
    "BasicTransformerBlock",
    "CausalTransformerLayer",
    "ChannelRMSNorm",
    "ConcatELU",
    "Conv2d",
    "CrossAttention",
    "Downsample",
    "FeedForward",
    "FrameAttention",
    "GatedActivation",
    "GroupNorm",
    "InvertibleConv1x1",
    "KeyValueCache",
    "LayerNorm",
    "LinearAttention",
    "MaskedConv2d",
    "MaskedLinear",
    "PlainGroupNorm",
    "PseudoConv3d",
    "RMSNorm",
    "ResBlock",
    "SingleHeadAttention",
    "SpatialAttention",
    "SpatialTransformer",
    "SpatioTemporalAttention",
    "Squeeze",
    "TemporalAttention",
    "TemporalConv",
    "TimestepEmbedding",
    "Upsample",
    "UpsampleConv2d",
    "timestep_embedding",
]
