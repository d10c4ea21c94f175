"""The shipped 28 x 28 digits as a pipeline of diffusers: its `UNet2DModel` with our weights, its `DDIMScheduler`."""

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DModel
from torch import Tensor, nn

from ...models import UNet
from ...nn import ResBlock, SpatialAttention
from ...samplers import draw_normal
from ...training import TrainingRecord


class DigitsPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Digits by class, with classifier-free guidance: what a pipeline for images of classes does."""

    def __init__(self: Any, unet: UNet2DModel, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self: Any, labels: Tensor, *, guidance_scale: float, num_inference_steps: int, generator: torch.Generator
    ) -> Tensor:
        """[N, C, H, W] in [-1, 1], a digit for each of ``labels`` [N]."""
        unet, scheduler = self.unet, self.scheduler
        size = unet.config.sample_size
        x = draw_normal((len(labels), unet.config.in_channels, size, size), generator, "cpu")
        both = torch.cat([labels, torch.full_like(labels, unet.config.num_class_embeds - 1)])
        scheduler.set_timesteps(num_inference_steps)
        for t in self.progress_bar(scheduler.timesteps):
            cond, uncond = unet(torch.cat([x, x]), t, class_labels=both).sample.chunk(2)
            prediction = uncond + guidance_scale * (cond - uncond)
            x = scheduler.step(prediction, t, x, use_clipped_model_output=True).prev_sample
        return x


def digits_pipeline(model: UNet, record: TrainingRecord) -> DigitsPipeline:
    """The pipeline of a class-conditional U-Net with a null class, such as the shipped ones.

    Args:
        model: its weights are copied.
        record: what it was trained to predict, on which schedule, and for images of which shape.
    """
    assert record.image_shape is not None
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type=record.prediction_type or "epsilon",
        timestep_spacing="trailing" if record.prediction_type == "v_prediction" else "leading",
    )
    return DigitsPipeline(unet_2d_model(model, record.image_shape[-1]).eval(), scheduler)


def unet_2d_model(model: UNet, sample_size: int) -> Any:
    """``model`` as diffusers has it; both list the same layers in the order of the forward pass."""
    config = model.config
    mult, channels = config["channel_mult"], config["model_channels"]
    attends = ["Attn" if 2**level in config["attention_resolutions"] else "" for level in range(len(mult))]
    peer: Any = UNet2DModel(
        sample_size=sample_size,
        in_channels=model.in_channels,
        out_channels=model.out_channels,
        block_out_channels=tuple(int(channels * m) for m in mult),
        down_block_types=tuple(f"{attn}DownBlock2D" for attn in attends),
        up_block_types=tuple(f"{attn}UpBlock2D" for attn in reversed(attends)),
        layers_per_block=config["num_res_blocks"],
        attention_head_dim=config["num_head_channels"],
        norm_num_groups=config["num_groups"],
        attn_norm_num_groups=config["num_groups"],
        norm_eps=1e-5,
        resnet_time_scale_shift="scale_shift" if config["use_scale_shift_norm"] else "default",
        num_class_embeds=config["num_classes"] + int(config["null_class"]),
    )
    first: Any
    first, *down = model.input_blocks
    _copy(first[0], peer.conv_in)
    _copy(model.time_embedding.linear_1, peer.time_embedding.linear_1)
    _copy(model.time_embedding.linear_2, peer.time_embedding.linear_2)
    _copy(model.class_embedding, peer.class_embedding)
    _copy(model.out_norm, peer.conv_norm_out)
    _copy(model.out_conv, peer.conv_out)
    stages: list[Any] = [*down, model.middle_block, *model.output_blocks]
    for ours, theirs in zip((layer for stage in stages for layer in stage), _layers(peer), strict=True):
        if isinstance(ours, ResBlock):
            _copy_res_block(ours, theirs)
        elif isinstance(ours, SpatialAttention):
            _copy_attention(ours, theirs)
        else:
            _copy(ours.conv, theirs.conv)
    return peer


def _layers(peer: Any) -> Iterator[nn.Module]:
    for block in peer.down_blocks:
        yield from _of_block(block)
        yield from block.downsamplers or ()
    first, last = peer.mid_block.resnets
    yield from (first, *peer.mid_block.attentions, last)
    for block in peer.up_blocks:
        yield from _of_block(block)
        yield from block.upsamplers or ()


def _of_block(block: Any) -> Iterator[nn.Module]:
    attentions = getattr(block, "attentions", None)
    for i, resnet in enumerate(block.resnets):
        yield resnet
        if attentions is not None:
            yield attentions[i]


def _copy_res_block(ours: ResBlock, theirs: Any) -> None:
    for name in ("norm1", "conv1", "norm2", "conv2"):
        _copy(getattr(ours, name), getattr(theirs, name))
    _copy(ours.embedding_projection, theirs.time_emb_proj)
    if theirs.conv_shortcut is not None:
        _copy(ours.skip, theirs.conv_shortcut)


def _copy_attention(ours: SpatialAttention, theirs: Any) -> None:
    _copy(ours.norm, theirs.group_norm)
    _copy(ours.proj, theirs.to_out[0])
    for linear, weight, bias in zip(
        (theirs.to_q, theirs.to_k, theirs.to_v), ours.qkv.weight.chunk(3), ours.qkv.bias.chunk(3), strict=True
    ):
        linear.load_state_dict({"weight": weight, "bias": bias})


def _copy(ours: Any, theirs: Any) -> None:
    theirs.load_state_dict(ours.state_dict())
