"""`AutoencoderKL`: the autoencoder of latent diffusion, between images and the latents that a diffusion model makes.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022; the networks are those of Esser et
al., "Taming Transformers", 2021. Names of parameters as in CompVis' stable-diffusion, less what residual blocks call
their skip.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..nn import Downsample, GroupNorm, ResBlock, SingleHeadAttention, Upsample
from ..nn.conv2d import conv_beside, normed_conv
from ..ops import generator_normal
from ..ops.generator_normal import Generators
from ._configured import Configured, check_positive, count
from ._staged_unet import as_given, check_levels, fastest_layout

_EPS = 1e-6  # of every norm


class DiagonalGaussian:
    """A normal distribution over latents, each independent of the others.

    Args:
        mean: [N, *].
        logvar: the same shape; the logarithm of the variance, which is clamped to [-30, 20].
    """

    def __init__(self, mean: Tensor, logvar: Tensor) -> None:
        self.mean = mean
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        """The standard deviation, [N, *]."""
        return (0.5 * self.logvar).exp()

    @property
    def var(self) -> Tensor:
        """The variance, [N, *]."""
        return self.logvar.exp()

    def sample(self, generator: Generators = None) -> Tensor:
        """mean + std * noise, [N, *]; takes and raises what :func:`fastgen.ops.generator_normal` does."""
        noise = generator_normal(self.mean.shape, generator, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        """The mean, [N, *]."""
        return self.mean

    def kl(self, other: "DiagonalGaussian | None" = None) -> Tensor:
        r"""KL(self || other) in nats, [N]; to the standard normal where there is no other:
        :math:`\frac12 \sum \mu^2 + \sigma^2 - 1 - \log \sigma^2`.
        """
        if other is None:
            nats = self.mean.square() + self.var - 1 - self.logvar
        else:
            nats = (self.mean - other.mean).square() / other.var + (self.logvar - other.logvar).exp() - 1
            nats = nats - self.logvar + other.logvar
        return 0.5 * nats.flatten(1).sum(1)


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where there is some for it, and what resamples."""

    def __init__(
        self, blocks: Iterable[nn.Module], attentions: Iterable[nn.Module], resample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.attn = nn.ModuleList(attentions)
        self.resample = resample

    def forward(self, h: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            h = block(h)
            if i < len(self.attn):
                h = self.attn[i](h)
        return h if self.resample is None else self.resample(h)


class Encoder(nn.Module):
    """[N, in_channels, H, W] -> [N, out_channels, H / f, W / f], f the factor between the first level and the last.

    Args:
        in_channels, out_channels: of the first and the last convolution.
        config, norm: those of :class:`AutoencoderKL`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, config: Mapping[str, Any], norm: Callable[..., nn.Module]
    ) -> None:
        super().__init__()
        conv, widths, blocks = conv_beside(norm), _widths(config), config["num_res_blocks"]
        block, attention = _layers(config, norm)
        self.conv_in = conv(in_channels, config["model_channels"], 3, padding=1)
        self.down = nn.ModuleList()
        for level, (before, width) in enumerate(pairwise([config["model_channels"], *widths])):
            self.down.append(
                Level(
                    [block(before if i == 0 else width, width) for i in range(blocks)],
                    attention(width, blocks if 2**level in config["attention_resolutions"] else 0),
                    Downsample(width, padding=0) if level < len(widths) - 1 else None,
                )
            )
        width = widths[-1]
        self.mid = Level([block(width, width), block(width, width)], attention(width, int(config["mid_attention"])))
        self.norm_out = norm(config["num_groups"], width, eps=_EPS, activation="silu")
        self.conv_out = conv(width, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = fastest_layout(self.conv_out, self.conv_in(fastest_layout(self.conv_out, x)))
        for level in self.down:
            h = level(h)
        return as_given(normed_conv(self.norm_out, self.conv_out, self.mid(h)), x, self.conv_out)


class Decoder(nn.Module):
    """[N, in_channels, h, w] -> [N, out_channels, f h, f w]: the way back, with a block a level more than the encoder.

    Levels have the numbers of the encoder's: the last one is the first to run.

    Args:
        in_channels, out_channels: of the first and the last convolution.
        config, norm: those of :class:`AutoencoderKL`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, config: Mapping[str, Any], norm: Callable[..., nn.Module]
    ) -> None:
        super().__init__()
        conv, widths, blocks = conv_beside(norm), _widths(config), config["num_res_blocks"] + 1
        block, attention = _layers(config, norm)
        width = widths[-1]
        self.conv_in = conv(in_channels, width, 3, padding=1)
        self.mid = Level([block(width, width), block(width, width)], attention(width, int(config["mid_attention"])))
        self.up = nn.ModuleList()
        for level, (width, before) in enumerate(pairwise([*widths, widths[-1]])):
            self.up.append(
                Level(
                    [block(before if i == 0 else width, width) for i in range(blocks)],
                    attention(width, blocks if 2**level in config["attention_resolutions"] else 0),
                    Upsample(width, conv=conv) if level > 0 else None,
                )
            )
        self.norm_out = norm(config["num_groups"], widths[0], eps=_EPS, activation="silu")
        self.conv_out = conv(widths[0], out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(fastest_layout(self.conv_out, self.conv_in(fastest_layout(self.conv_out, z))))
        for level in reversed(self.up):
            h = level(h)
        return as_given(normed_conv(self.norm_out, self.conv_out, h), z, self.conv_out)


# What CompVis and diffusers call parts of the networks, and our names.
_PARTS = (
    (r"\bmid(?:_block)?\.(?:block_1|resnets\.0)\b", "mid.block.0"),
    (r"\bmid(?:_block)?\.(?:block_2|resnets\.1)\b", "mid.block.1"),
    (r"\bmid(?:_block)?\.(?:attn_1|attentions\.0)\b", "mid.attn.0"),
    (r"\b(down|up)_blocks\b", r"\1"),
    (r"\bresnets\b", "block"),
    (r"\battentions\b", "attn"),
    (r"\b(?:down|up)(?:sample|samplers\.0)\b", "resample"),
    (r"\bconv_norm_out\b", "norm_out"),
    (r"\b(?:nin|conv)_shortcut\b", "skip"),
    (r"\bgroup_norm\b", "norm"),
    (r"\b(?:to_q|query)\b", "q"),
    (r"\b(?:to_k|key)\b", "k"),
    (r"\b(?:to_v|value)\b", "v"),
    (r"\b(?:to_out\.0|proj_attn)\b", "proj_out"),
)


class AutoencoderKL(Configured):
    """An autoencoder whose latents are drawn from a normal distribution that the encoder gives.

    The diffusion model sees ``scaling_factor * z``; neither :meth:`encode` nor :meth:`decode` multiplies by it.

    Args:
        in_channels: of the image.
        out_channels: of the reconstruction.
        latent_channels: of the latent z.
        model_channels: width of the first convolution (CompVis' ``ch``).
        channel_mult: width of each level, in units of ``model_channels``; each but the first halves the resolution.
        num_res_blocks: residual blocks a level (one more on the way up).
        attention_resolutions: downsampling factors (1, 2, 4, ...) whose levels have attention of one head: CompVis'
            ``resolution`` divided by its ``attn_resolutions``.
        mid_attention: whether the middle has it.
        z_channels: of the encoder's mean and the decoder's input; ``latent_channels`` if None. Another number needs
            ``use_quant_conv``.
        double_z: the encoder gives mean and log-variance. Without it the mean alone, and a posterior of the least
            variance.
        use_quant_conv: a 1x1 convolution after the encoder and one before the decoder.
        scaling_factor: what the latents are multiplied by for the diffusion model; kept in ``config`` alone.
        dropout: rate inside the residual blocks.
        num_groups: of every norm; divides every width.
        norm: class or factory of the norms, called as :class:`fastgen.nn.GroupNorm`; not part of ``config``. Beside
            :class:`fastgen.nn.PlainGroupNorm` convolutions and attention are torch's own too.

    State dicts of the ``AutoencoderKL`` of CompVis (latent-diffusion, stable-diffusion; without the prefix
    ``first_stage_model.``) and of diffusers, old names and new, load as they are; :meth:`from_state_dict` takes
    ``num_groups``, ``scaling_factor`` and ``dropout``, which shapes do not say, beside them.

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    beside_config: ClassVar = ("norm",)
    foreign_keys: ClassVar = ((r"loss\..*|colorize", ""),)

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 4,
        model_channels: int = 128,
        *,
        channel_mult: Sequence[float] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (),
        mid_attention: bool = True,
        z_channels: int | None = None,
        double_z: bool = True,
        use_quant_conv: bool = True,
        scaling_factor: float = 0.18215,
        dropout: float = 0.0,
        num_groups: int = 32,
        norm: Callable[..., nn.Module] = GroupNorm,
    ) -> None:
        config = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "latent_channels": latent_channels,
            "model_channels": model_channels,
            "channel_mult": list(channel_mult),
            "num_res_blocks": num_res_blocks,
            "attention_resolutions": list(attention_resolutions),
            "mid_attention": mid_attention,
            "z_channels": z_channels,
            "double_z": double_z,
            "use_quant_conv": use_quant_conv,
            "scaling_factor": scaling_factor,
            "dropout": dropout,
            "num_groups": num_groups,
        }
        _check_config(config)
        super().__init__(config)
        self.in_channels = in_channels
        self.latent_channels = latent_channels
        self.scaling_factor = scaling_factor
        z = latent_channels if z_channels is None else z_channels
        moments = 2 if double_z else 1
        self.encoder = Encoder(in_channels, moments * z, config, norm)
        self.decoder = Decoder(z, out_channels, config, norm)
        conv = conv_beside(norm)
        self.quant_conv = conv(moments * z, moments * latent_channels, 1) if use_quant_conv else None
        self.post_quant_conv = conv(latent_channels, z, 1) if use_quant_conv else None

    @property
    def downsampling(self) -> int:
        """f, the factor between the sizes of an image and of its latent."""
        return 2 ** (len(self._config["channel_mult"]) - 1)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """The posterior of the latent z.

        Args:
            x: [N, in_channels, H, W] in the dtype of the weights, usually in [-1, 1]; NCHW or channels-last. H and W
                that f does not divide are rounded down, level by level.

        Returns:
            Mean and log-variance [N, latent_channels, H / f, W / f].

        Raises:
            ValueError: the shape does not fit; the message names the argument.
        """
        factor = self.downsampling
        if x.dim() != 4 or x.shape[1] != self.in_channels or min(x.shape[2:]) < factor:
            wanted = f"[N, {self.in_channels}, H, W] with H and W at least {factor}"
            raise ValueError(f"AutoencoderKL: x must be {wanted}, got shape {tuple(x.shape)}")
        moments = self.encoder(x)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        if self._config["double_z"]:
            return DiagonalGaussian(*moments.chunk(2, dim=1))
        return DiagonalGaussian(moments, torch.full_like(moments, -torch.inf))

    def decode(self, z: Tensor) -> Tensor:
        """The image of a latent.

        Args:
            z: [N, latent_channels, h, w] in the dtype of the weights, not scaled; NCHW or channels-last.

        Returns:
            [N, out_channels, f h, f w].

        Raises:
            ValueError: the shape does not fit; the message names the argument.
        """
        if z.dim() != 4 or z.shape[1] != self.latent_channels or 0 in z.shape[2:]:
            wanted = f"[N, {self.latent_channels}, h, w]"
            raise ValueError(f"AutoencoderKL: z must be {wanted}, got shape {tuple(z.shape)}")
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def forward(
        self, x: Tensor, sample_posterior: bool = True, generator: Generators = None
    ) -> tuple[Tensor, DiagonalGaussian]:
        """(reconstruction, posterior) of ``x``, by a sample of it or by its mode; raises what :meth:`encode` does."""
        posterior = self.encode(x)
        return self.decode(posterior.sample(generator) if sample_posterior else posterior.mode()), posterior

    @classmethod
    def translated(cls, name: str) -> str:
        """As the base has it, part by part of a name."""
        name = super().translated(name)
        for pattern, ours in _PARTS:
            name = re.sub(pattern, ours, name)
        return name

    def adopted_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As the base has it; diffusers numbers the levels of the decoder as they run."""
        last = len(self.decoder.up) - 1
        renamed = {
            re.sub(r"(?<=decoder\.up_blocks\.)\d+", lambda match: str(last - int(match[0])), name): tensor
            for name, tensor in state.items()
        }
        return super().adopted_state(renamed)

    def adopted(self, name: str, ours: str, tensor: Tensor, shape: torch.Size | None) -> Tensor:
        """1x1 convolutions as linear layers."""
        return tensor.flatten(1) if shape is not None and len(shape) == 2 else tensor

    @classmethod
    def _config_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        first, latent = state["encoder.conv_in.weight"], state["decoder.conv_in.weight"]
        levels = range(count(state, r"encoder\.down\.(\d+)\."))
        widths = [len(state[f"encoder.down.{level}.block.0.conv1.weight"]) for level in levels]
        z_channels = latent.shape[1]
        use_quant_conv = "quant_conv.weight" in state
        latent_channels = state["post_quant_conv.weight"].shape[1] if use_quant_conv else z_channels
        return {
            "in_channels": first.shape[1],
            "out_channels": len(state["decoder.conv_out.weight"]),
            "latent_channels": latent_channels,
            "model_channels": len(first),
            "channel_mult": [w / len(first) if w % len(first) else w // len(first) for w in widths],
            "num_res_blocks": count(state, r"encoder\.down\.0\.block\.(\d+)\."),
            "attention_resolutions": [2**level for level in levels if f"encoder.down.{level}.attn.0.q.weight" in state],
            "mid_attention": "encoder.mid.attn.0.q.weight" in state,
            "z_channels": None if z_channels == latent_channels else z_channels,
            "double_z": len(state["encoder.conv_out.weight"]) == 2 * z_channels,
            "use_quant_conv": use_quant_conv,
        }


def _widths(config: Mapping[str, Any]) -> list[int]:
    """Of each level."""
    return [int(config["model_channels"] * mult) for mult in config["channel_mult"]]


def _layers(
    config: Mapping[str, Any], norm: Callable[..., nn.Module]
) -> tuple[Callable[[int, int], nn.Module], Callable[[int, int], list[nn.Module]]]:
    """What makes a residual block, of (channels, out_channels), and attentions, of channels and their number."""

    def block(channels: int, out_channels: int) -> nn.Module:
        return ResBlock(
            channels, out_channels, dropout=config["dropout"], num_groups=config["num_groups"], eps=_EPS,
            zero_init=False, norm=norm,
        )  # fmt: skip

    def attention(channels: int, number: int) -> list[nn.Module]:
        groups = config["num_groups"]
        return [SingleHeadAttention(channels, num_groups=groups, eps=_EPS, norm=norm) for _ in range(number)]

    return block, attention


def _check_config(config: Mapping[str, Any]) -> None:
    """Raise ValueError for values no layer would name well."""
    name = "AutoencoderKL"
    check_positive(name, config, "out_channels", "latent_channels")
    check_positive(name, config, "z_channels", optional=True)
    check_levels(name, config)
    z_channels, latent_channels = config["z_channels"], config["latent_channels"]
    if not config["use_quant_conv"] and z_channels not in (None, latent_channels):
        raise ValueError(
            f"{name}: z_channels must be latent_channels without use_quant_conv, got z_channels={z_channels} and "
            f"latent_channels={latent_channels}"
        )
