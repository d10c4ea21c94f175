"""Weights of the pieces of fastgen's U-Net, copied into the diffusers modules that stand for the same mathematics."""

import torch
from torch import nn

from fastgen.nn import ResBlock, SpatialAttention

from ..modules import copy_parameters


def copy_resblock(block: ResBlock, peer: nn.Module) -> None:
    """Into a `ResnetBlock2D`."""
    for name in ("norm1", "conv1", "norm2", "conv2"):
        copy_parameters(getattr(block, name), getattr(peer, name))
    if block.embedding_projection is not None:
        copy_parameters(block.embedding_projection, peer.time_emb_proj)
    assert isinstance(block.skip, nn.Identity) == (peer.conv_shortcut is None)
    if peer.conv_shortcut is not None:
        copy_parameters(block.skip, peer.conv_shortcut)


def copy_attention(block: SpatialAttention, peer: nn.Module) -> None:
    """Into an `Attention` with a group norm."""
    copy_parameters(block.norm, peer.group_norm)
    copy_parameters(block.proj, peer.to_out[0])
    with torch.no_grad():
        for part in ("weight", "bias"):
            for name, values in zip(("to_q", "to_k", "to_v"), getattr(block.qkv, part).chunk(3), strict=True):
                getattr(getattr(peer, name), part).copy_(values)
