"""`UNet`: the U-Net of DDPM, improved-DDPM and guided-diffusion, with every norm on the fused op.

Ho et al. 2020; Nichol and Dhariwal 2021; Dhariwal and Nichol 2021. Sampling is in `fastgen.samplers`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ..nn import GroupNorm, SpatialAttention
from ._image_unet import ImageUNet


class UNet(ImageUNet):
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
        resblock_updown: resample inside residual blocks, instead of by layers of their own.
        conv_resample: these layers have convolutions; else they are means and nearest neighbours alone.
        learn_sigma: twice the output channels, the second half for the variance.
        dropout: rate inside the residual blocks.
        num_groups: of every norm; divides every width.
        norm: class or factory of the norms, called as :class:`fastgen.nn.GroupNorm`; not part of ``config``. Beside
            :class:`fastgen.nn.PlainGroupNorm` the convolutions are torch's own too.
        use_new_attention_order: that with which the model was made in guided-diffusion whose state dict this one loads;
            not part of ``config``.

    State dicts of guided-diffusion's ``UNetModel``, of improved-diffusion's and of latent-diffusion's without
    ``use_spatial_transformer`` load as they are; :meth:`from_state_dict` finds the sizes too. They do not tell the heads,
    nor ``use_new_attention_order``, which the U-Net of ImageNet 64x64 has and no other of those published:

        UNet.from_state_dict(torch.load("256x256_diffusion.pt"), num_head_channels=64)
        UNet.from_state_dict(torch.load("64x64_diffusion.pt"), num_head_channels=64, use_new_attention_order=True)

    Not covered: another number of heads on the way up (``num_heads_upsample``, of which the weights say nothing either),
    and ``dims`` other than 2.

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    foreign_keys: ClassVar = (*ImageUNet.foreign_keys, (r"(.*)\.proj_out\.(.*)", r"\1.proj.\2"))
    beside_config: ClassVar = ("norm", "use_new_attention_order")

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
        conv_resample: bool = True,
        learn_sigma: bool = False,
        dropout: float = 0.0,
        num_groups: int = 32,
        norm: Callable[..., nn.Module] = GroupNorm,
        use_new_attention_order: bool = False,
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
        if not conv_resample:  # which older training checkpoints do not say, whose config must be equal
            config["conv_resample"] = False

        def attention(channels: int, level: int | None) -> Iterator[SpatialAttention]:
            yield SpatialAttention(
                channels, num_heads=num_heads, num_head_channels=num_head_channels, num_groups=num_groups, norm=norm
            )

        super().__init__(config, in_channels * (2 if learn_sigma else 1), attention=attention, norm=norm)
        self.use_new_attention_order = use_new_attention_order

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
        return self._run(x, embedding=self._embed(x, timesteps, y))

    @classmethod
    def _config_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        found = super()._config_of(state)
        inputs, outputs = found["in_channels"], state["out_conv.weight"].shape[0]
        if outputs not in (inputs, 2 * inputs):
            raise ValueError(
                f"{cls.__name__}.from_state_dict: the output must have the channels of the input, or twice as many, got "
                f"{outputs} and {inputs}"
            )
        return found | {"learn_sigma": outputs == 2 * inputs}

    def adopted_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """With the rows of guided-diffusion's ``qkv``, a convolution [3 C, C, 1], in our order."""
        ours = super().adopted_state(state)
        convolutions = {self.translated(name) for name, tensor in state.items() if tensor.dim() == 3}
        for name, layer in self.named_modules():
            by_head = f"{name}.qkv.weight" in convolutions and not self.use_new_attention_order
            if not (by_head and isinstance(layer, SpatialAttention)):
                continue
            for key in (f"{name}.qkv.weight", f"{name}.qkv.bias"):
                if key in ours and len(ours[key]) == 3 * layer.channels:
                    by_kind = ours[key].unflatten(0, (layer.num_heads, 3, -1)).transpose(0, 1)
                    ours[key] = by_kind.flatten(0, 2)
        return ours
