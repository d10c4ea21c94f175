"""`UNet`: the U-Net of DDPM, improved-DDPM and guided-diffusion, with every norm on the fused op.

Ho et al. 2020; Nichol and Dhariwal 2021; Dhariwal and Nichol 2021. Sampling is in `fastgen.samplers`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

from torch import Tensor, nn

from ..nn import Downsample, GroupNorm, ResBlock, SpatialAttention, Upsample
from ..nn.conv2d import conv_beside, normed_conv
from ..nn.resblock import zero_parameters
from ._staged_unet import StagedUNet, laid_out_as


class UNet(StagedUNet):
    """A U-Net that predicts noise (or whatever it is trained for) from a noisy image and a timestep.

    Args:
        in_channels: of the image; also of the output.
        model_channels: width of the first level.
        channel_mult: width of each level, in units of ``model_channels``; each but the first halves the resolution.
        num_res_blocks: residual blocks a level (one more on the way up).
        attention_resolutions: downsampling factors (1, 2, 4, ...) whose levels have attention; the middle always has.
        num_heads: attention heads; not used where ``num_head_channels`` is given.
        num_head_channels: channels of one head.
        num_classes: None, or the number of classes that ``y`` may take.
        null_class: one class more, number ``num_classes``, that stands for "no class" (classifier-free guidance).
        use_scale_shift_norm: the embedding as scale and shift of the second norm of a block, instead of a channel bias.
        resblock_updown: resample inside residual blocks, instead of by convolution.
        learn_sigma: twice the output channels, the second half for the variance.
        dropout: rate inside the residual blocks.
        num_groups: of every norm; divides every width.
        norm: class or factory of the norms, called as :class:`fastgen.nn.GroupNorm`; not part of ``config``. Beside
            :class:`fastgen.nn.PlainGroupNorm` the convolutions are torch's own too.

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    beside_config: ClassVar = ("norm",)

    def __init__(
        self,
        in_channels: int = 3,
        model_channels: int = 128,
        *,
        channel_mult: Sequence[float] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (2,),
        num_heads: int = 1,
        num_head_channels: int | None = None,
        num_classes: int | None = None,
        null_class: bool = False,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        learn_sigma: bool = False,
        dropout: float = 0.0,
        num_groups: int = 32,
        norm: Callable[..., nn.Module] = GroupNorm,
    ) -> None:
        config = {
            "in_channels": in_channels,
            "model_channels": model_channels,
            "channel_mult": list(channel_mult),
            "num_res_blocks": num_res_blocks,
            "attention_resolutions": list(attention_resolutions),
            "num_heads": num_heads,
            "num_head_channels": num_head_channels,
            "num_classes": num_classes,
            "null_class": null_class,
            "use_scale_shift_norm": use_scale_shift_norm,
            "resblock_updown": resblock_updown,
            "learn_sigma": learn_sigma,
            "dropout": dropout,
            "num_groups": num_groups,
        }
        super().__init__(config, in_channels * (2 if learn_sigma else 1))
        conv = conv_beside(norm)

        def res_block(channels: int, out_channels: int, resample: str | None = None) -> ResBlock:
            return ResBlock(
                channels, out_channels, embedding_channels=self.embedding_channels, resample=resample, norm=norm,
                use_scale_shift_norm=use_scale_shift_norm, dropout=dropout, num_groups=num_groups,
            )  # fmt: skip

        def attention(channels: int, level: int | None) -> Iterator[SpatialAttention]:
            if self._has_attention(level):
                yield SpatialAttention(
                    channels, num_heads=num_heads, num_head_channels=num_head_channels, num_groups=num_groups, norm=norm
                )

        def resample(direction: str, channels: int) -> nn.Module:
            if resblock_updown:
                return res_block(channels, channels, direction)
            return Upsample(channels, conv=conv) if direction == "up" else Downsample(channels)

        first = conv(in_channels, int(model_channels * channel_mult[0]), 3, padding=1)
        channels = self._build_stages(first, res_block=res_block, attention=attention, resample=resample)
        self.out_norm = norm(num_groups, channels, activation="silu")
        self.out_conv = conv(channels, self.out_channels, 3, padding=1)
        zero_parameters(self.out_conv)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Apply the network.

        Args:
            x: [N, in_channels, H, W] in the dtype of the weights, NCHW or channels-last; H and W divisible by
                2^(levels - 1).
            timesteps: [N] or a scalar tensor; integers or fractions.
            y: [N] integers below ``num_classes``, or ``null_label`` for no class; None means no class for all samples,
                where the model has a null class.

        Returns:
            [N, out_channels, H, W] in the dtype of ``x``.

        Raises:
            ValueError: a shape does not fit, or ``y`` is missing or superfluous; the message names the argument.
        """
        self._check_input(x)
        h = self._run_stages(x, embedding=self._embed(x, timesteps, y))
        return normed_conv(self.out_norm, self.out_conv, h)

    def _laid_out(self, h: Tensor) -> Tensor:
        return laid_out_as(self.out_conv.weight, h)
