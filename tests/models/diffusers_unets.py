"""The weights of our U-Nets, copied into those of diffusers that stand for the same mathematics."""

from torch import nn

from fastgen.nn import Downsample, ResBlock, SpatialAttention, SpatialTransformer, Upsample

from ..modules import copy_parameters
from ..nn.diffusers_weights import copy_attention, copy_resblock


def copy_unet(model: nn.Module, peer: nn.Module) -> None:
    """Into a `UNet2DModel` or a `UNet2DConditionModel`: both list the same layers in the order of the forward pass."""
    copy_parameters(model.input_blocks[0][0], peer.conv_in)
    copy_parameters(model.time_embedding.linear_1, peer.time_embedding.linear_1)
    copy_parameters(model.time_embedding.linear_2, peer.time_embedding.linear_2)
    if model.class_embedding is not None:
        copy_parameters(model.class_embedding, peer.class_embedding)
    copy_parameters(model.out_norm, peer.conv_norm_out)
    copy_parameters(model.out_conv, peer.conv_out)
    stages = [*model.input_blocks[1:], model.middle_block, *model.output_blocks]
    ours = [layer for stage in stages for layer in stage]
    theirs = [layer for block in peer.down_blocks for layer in _layers(block, "downsamplers")]
    theirs += [peer.mid_block.resnets[0], peer.mid_block.attentions[0], peer.mid_block.resnets[1]]
    theirs += [layer for block in peer.up_blocks for layer in _layers(block, "upsamplers")]
    for layer, peer_layer in zip(ours, theirs, strict=True):
        if isinstance(layer, ResBlock):
            copy_resblock(layer, peer_layer)
        elif isinstance(layer, SpatialAttention):
            copy_attention(layer, peer_layer)
        elif isinstance(layer, SpatialTransformer):
            peer_layer.load_state_dict(layer.state_dict())
        else:
            assert isinstance(layer, Upsample | Downsample)
            copy_parameters(layer.conv, peer_layer.conv)


def _layers(block, resamplers):
    attentions = getattr(block, "attentions", None)
    for i, resnet in enumerate(block.resnets):
        yield resnet
        if attentions is not None:
            yield attentions[i]
    yield from getattr(block, resamplers) or ()
