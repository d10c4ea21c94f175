"""`UNet`: the U-Net of DDPM, improved-DDPM and guided-diffusion, with every norm on the fused op.

Ho et al. 2020; Nichol and Dhariwal 2021; Dhariwal and Nichol 2021. Sampling is in `fastgen.samplers`.
"""

import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import Downsample, GroupNorm, ResBlock, SpatialAttention, TimestepEmbedding, Upsample
from ..nn.conv2d import conv_beside, normed_conv
from ..nn.resblock import zero_parameters
from .checkpoint import load_model, save_model

MODEL_NAME = "UNet"


class UNet(nn.Module):
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

    def __init__(
        self,
        in_channels: int = 3,
        model_channels: int = 128,
        *,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
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
        super().__init__()
        self._config: dict[str, Any] = {
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
        _check_config(self._config)
        self.in_channels = in_channels
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.num_classes = num_classes
        embedding_channels = 4 * model_channels
        conv = conv_beside(norm)

        def res_block(channels: int, out_channels: int, resample: str | None = None) -> ResBlock:
            return ResBlock(
                channels, out_channels, embedding_channels=embedding_channels, resample=resample, norm=norm,
                use_scale_shift_norm=use_scale_shift_norm, dropout=dropout, num_groups=num_groups,
            )  # fmt: skip

        def attention(channels: int) -> SpatialAttention:
            return SpatialAttention(
                channels, num_heads=num_heads, num_head_channels=num_head_channels, num_groups=num_groups, norm=norm
            )

        def resample(direction: str, channels: int) -> nn.Module:
            if resblock_updown:
                return res_block(channels, channels, direction)
            return Upsample(channels, conv=conv) if direction == "up" else Downsample(channels)

        self.time_embedding = TimestepEmbedding(model_channels, embedding_channels)
        self.class_embedding: nn.Embedding | None = None
        if num_classes is not None:
            self.class_embedding = nn.Embedding(num_classes + int(null_class), embedding_channels)

        widths = [model_channels * mult for mult in channel_mult]
        channels = widths[0]
        self.input_blocks = nn.ModuleList([Stage([conv(in_channels, channels, 3, padding=1)])])
        skip_channels = [channels]
        for level, width in enumerate(widths):
            has_attention = 2**level in attention_resolutions
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [res_block(channels, width)]
                channels = width
                if has_attention:
                    layers.append(attention(channels))
                self.input_blocks.append(Stage(layers))
                skip_channels.append(channels)
            if level < len(widths) - 1:
                self.input_blocks.append(Stage([resample("down", channels)]))
                skip_channels.append(channels)

        self.middle_block = Stage([res_block(channels, channels), attention(channels), res_block(channels, channels)])

        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            has_attention = 2**level in attention_resolutions
            for i in range(num_res_blocks + 1):
                layers = [res_block(channels + skip_channels.pop(), width)]
                channels = width
                if has_attention:
                    layers.append(attention(channels))
                if level > 0 and i == num_res_blocks:
                    layers.append(resample("up", channels))
                self.output_blocks.append(Stage(layers))

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
        embedding = self._embed(x, timesteps, y)
        h = x
        skips: list[Tensor] = []
        for stage in self.input_blocks:
            h = stage(h, embedding)
            if not skips:
                h = self._laid_out(h)
            skips.append(h)
        h = self.middle_block(h, embedding)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), embedding)
        return normed_conv(self.out_norm, self.out_conv, h)

    @property
    def null_label(self) -> int | None:
        """The number of the null class, None for a model without one."""
        return self.num_classes if self._config["null_class"] else None

    @property
    def downsampling(self) -> int:
        """The factor between the first level and the last, which height and width of an image are divisible by."""
        return 2 ** (len(self._config["channel_mult"]) - 1)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, ready for JSON and for :meth:`from_config`."""
        return json.loads(json.dumps(self._config))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, norm: Callable[..., nn.Module] = GroupNorm) -> "UNet":
        """Build a model with fresh weights from :attr:`config`.

        Raises:
            ValueError: ``config`` has a key that the model does not know, or a value out of range.
        """
        known = [name for name in inspect.signature(cls).parameters if name != "norm"]
        unknown = sorted(set(config) - set(known))
        if unknown:
            raise ValueError(f"UNet.from_config: unknown keys {unknown}; the known ones are {known}")
        return cls(**config, norm=norm)

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
        """Write weights, and the config as JSON in the metadata, to a safetensors file, atomically.

        Args:
            path: the file.
            metadata: further strings to keep in the header (how it was trained, say).
        """
        save_model(path, self, MODEL_NAME, self._config, metadata)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        norm: Callable[..., nn.Module] = GroupNorm,
    ) -> "UNet":
        """Read what :meth:`save` wrote: the model in evaluation mode on ``device``, in ``dtype`` or else that of the file.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: the file is damaged, is of another model, does not fit its own config, or its weights are not finite.
        """
        return load_model(
            path, MODEL_NAME, lambda config: cls.from_config(config, norm=norm), device=device, dtype=dtype
        )

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"UNet: x must be [N, {self.in_channels}, H, W], got shape {tuple(x.shape)}")
        factor = self.downsampling
        if x.shape[2] % factor or x.shape[3] % factor or 0 in x.shape[2:]:
            raise ValueError(f"UNet: height and width of x must be divisible by {factor}, got shape {tuple(x.shape)}")

    def _laid_out(self, h: Tensor) -> Tensor:
        """Channels-last where the weights are: an image of one channel does not say which layout it has."""
        weight = self.out_conv.weight
        if weight.is_contiguous() or not weight.is_contiguous(memory_format=torch.channels_last):
            return h
        return h.to(memory_format=torch.channels_last)

    def _embed(self, x: Tensor, timesteps: Tensor, y: Tensor | None) -> Tensor:
        n = x.shape[0]
        if timesteps.dim() > 1 or (timesteps.dim() == 1 and timesteps.shape[0] != n):
            raise ValueError(f"UNet: timesteps must be [N] = [{n}] or a scalar, got shape {tuple(timesteps.shape)}")
        embedding = self.time_embedding(timesteps.expand(n))  # [N, 4 * model_channels]
        if self.class_embedding is None:
            if y is not None:
                raise ValueError("UNet: the model has no classes (num_classes=None), got y")
            return embedding
        if y is None:
            if self.null_label is None:
                raise ValueError(f"UNet: y is needed, the model has {self.num_classes} classes and no null class")
            y = torch.full((n,), self.null_label, device=x.device)
        elif y.shape != (n,) or y.is_floating_point():
            raise ValueError(f"UNet: y must be [N] = [{n}] integers, got shape {tuple(y.shape)} of {y.dtype}")
        return embedding + self.class_embedding(y)


class Stage(nn.ModuleList):
    """Layers in a row; those that take the embedding get it."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, ResBlock) else layer(x)
        return x


def _check_config(config: Mapping[str, Any]) -> None:
    """Raise ValueError for values no layer would name well."""
    for name in ("in_channels", "model_channels", "num_res_blocks", "num_groups", "num_heads"):
        if not isinstance(config[name], int) or config[name] < 1:
            raise ValueError(f"UNet: {name} must be a positive integer, got {config[name]!r}")
    mult = config["channel_mult"]
    if not mult or not all(isinstance(m, int) and m >= 1 for m in mult):
        raise ValueError(f"UNet: channel_mult must be positive integers, one a level, got {mult}")
    factors = [2**level for level in range(len(mult))]
    if not set(config["attention_resolutions"]) <= set(factors):
        raise ValueError(
            f"UNet: attention_resolutions must be downsampling factors among {factors}, "
            f"got {config['attention_resolutions']}"
        )
    widths = [config["model_channels"] * m for m in mult]
    if any(width % config["num_groups"] for width in widths):
        raise ValueError(f"UNet: num_groups must divide every width {widths}, got num_groups={config['num_groups']}")
    if config["num_classes"] is not None and config["num_classes"] < 1:
        raise ValueError(f"UNet: num_classes must be None or positive, got {config['num_classes']}")
    if config["null_class"] and config["num_classes"] is None:
        raise ValueError("UNet: null_class needs num_classes, got None")
    if not 0 <= config["dropout"] < 1:
        raise ValueError(f"UNet: dropout must be in [0, 1), got {config['dropout']}")
