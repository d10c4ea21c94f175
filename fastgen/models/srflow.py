"""`SRFlow`: a Glow of high-resolution images given low-resolution ones. Lugmayr et al. 2020 (SRFlow)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..flows import (
    ActNormConv1x1,
    AffineCoupling,
    AffineInjector,
    Center,
    Compose,
    Context,
    ConvNet,
    GlowStep,
    MultiScale,
    Split,
    Squeeze,
    StandardNormal,
)
from ._configured import check_positive
from ._flow_model import FlowModel, check_parametrization, stack
from .glow import SplitPrior


class SRFlow(FlowModel):
    """p(high | low) of images [N, in_channels, scale h, scale w] in [0, 1], given [N, in_channels, h, w] as context.

    An encoder of residual dense blocks reads the low-resolution image. A level squeezes, has two transition steps without coupling,
    and conditional steps: actnorm and 1x1 convolution, an affine injector of the encoder's features, a coupling that sees them too.
    Any h and w will do, if the levels can halve scale h and scale w.

    Args:
        in_channels: of the images.
        scale: of the resolutions, a power of 2.
        num_levels, num_steps: L and K of the paper: 3 and 16 for a scale of 4.
        hidden_channels: of the networks of the conditional steps.
        feature_channels, num_blocks, growth_channels: of the encoder; 64, 23 and 32 in the paper.
        scale_fn: of couplings and injectors; ``"sigmoid"`` is sigmoid(s + 2).
        parametrization: of the 1x1 convolutions' matrices, ``"direct"`` or ``"plu"``; :class:`fastgen.flows.ActNormConv1x1`.
        reversible: train in the memory of one step a level; :func:`fastgen.flows.reversible`.

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    def __init__(
        self,
        in_channels: int = 3,
        scale: int = 4,
        *,
        num_levels: int = 3,
        num_steps: int = 16,
        hidden_channels: int = 64,
        feature_channels: int = 64,
        num_blocks: int = 8,
        growth_channels: int = 32,
        scale_fn: str = "sigmoid",
        parametrization: str = "direct",
        reversible: bool = False,
    ) -> None:
        config = {
            "in_channels": in_channels,
            "scale": scale,
            "num_levels": num_levels,
            "num_steps": num_steps,
            "hidden_channels": hidden_channels,
            "feature_channels": feature_channels,
            "num_blocks": num_blocks,
            "growth_channels": growth_channels,
            "scale_fn": scale_fn,
            "parametrization": parametrization,
            "reversible": reversible,
        }
        check_positive(
            "SRFlow", config, *(key for key in config if key not in ("scale_fn", "parametrization", "reversible"))
        )
        check_parametrization("SRFlow", parametrization)
        if scale & (scale - 1):
            raise ValueError(f"SRFlow: scale must be a power of 2, got {scale}")

        def step(channels: int) -> GlowStep:
            kept, transformed = channels // 2, channels - channels // 2
            coupling = ConvNet(
                kept, 2 * transformed, hidden_channels=hidden_channels, context_channels=feature_channels
            )
            injector = ConvNet(feature_channels, 2 * channels, hidden_channels=hidden_channels)
            return GlowStep(
                channels,
                AffineCoupling(coupling, scale_fn=scale_fn),
                AffineInjector(injector, scale_fn=scale_fn),
                parametrization=parametrization,
            )

        levels, splits, channels = [], [], in_channels
        for level in range(num_levels):
            channels *= 4
            transition = [ActNormConv1x1(channels, parametrization=parametrization) for _ in range(2)]
            steps = stack(
                [Squeeze(), *transition, *(step(channels) for _ in range(num_steps))],
                reversible=reversible,
                keep_last=False,
            )
            levels.append(Compose([Center(), steps]) if level == 0 else steps)
            if level < num_levels - 1:
                prior = SplitPrior(channels // 2, channels - channels // 2, feature_channels)
                splits.append(Split(channels // 2, channels, prior))
                channels //= 2
        super().__init__(config, MultiScale(levels, splits), (in_channels, -1, -1))
        self.scale = scale
        self.encoder = Encoder(in_channels, feature_channels, num_blocks, growth_channels)

    def inverse(self, z: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        """Latent [N, D] -> (image, log-det); the context says the size."""
        shape = self._image_shape(context)
        return self.transform.inverse(z, self._context(context), shape=shape)  # type: ignore[call-arg]

    def _latent(self, seeds: Tensor, temperature: float, dtype: torch.dtype, context: Context) -> Tensor:
        return StandardNormal((math.prod(self._image_shape(context)),)).sample(seeds, temperature, dtype=dtype)

    def _checked(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.shape[0] or not x.is_floating_point():
            raise ValueError(
                f"SRFlow: x must be floating, [N, {self.shape[0]}, H, W], got {x.dtype} of {tuple(x.shape)}"
            )
        return x

    def _image_shape(self, context: Context) -> Sequence[int]:
        if not isinstance(context, Tensor) or context.dim() != 4 or context.shape[1] != self.shape[0]:
            got = f"shape {tuple(context.shape)}" if isinstance(context, Tensor) else type(context).__name__
            raise ValueError(f"SRFlow: context must be a low-resolution image [N, {self.shape[0]}, h, w], got {got}")
        return (self.shape[0], self.scale * context.shape[2], self.scale * context.shape[3])

    def _context(self, context: Context) -> Context:
        """The encoder's features at the size of each level."""
        _, height, width = self._image_shape(context)
        features = self.encoder(context)
        levels = range(1, len(self.transform.levels) + 1)  # type: ignore[arg-type]
        return tuple(_resized(features, height // 2**level, width // 2**level) for level in levels)


class Encoder(nn.Module):
    """[N, in_channels, h, w] -> [N, channels, h, w]: residual-in-residual dense blocks, as ESRGAN has them (Wang et al. 2018)."""

    def __init__(self, in_channels: int, channels: int, num_blocks: int, growth: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.blocks = nn.ModuleList(_ResidualOfDense(channels, growth) for _ in range(num_blocks))
        self.last = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first = h = self.first(x)
        for block in self.blocks:
            h = block(h)
        return first + self.last(h)


class _ResidualOfDense(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Dense(channels, growth) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for block in self.blocks:
            h = block(h)
        return x + 0.2 * h


class _Dense(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels + i * growth, growth, 3, padding=1) for i in range(4))
        self.last = nn.Conv2d(channels + 4 * growth, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for conv in self.convs:
            seen.append(F.leaky_relu(conv(torch.cat(seen, 1)), 0.2))
        return x + 0.2 * self.last(torch.cat(seen, 1))


def _resized(features: Tensor, height: int, width: int) -> Tensor:
    """By the nearest pixel where they grow, by means where they shrink."""
    if features.shape[2] > height:
        return F.adaptive_avg_pool2d(features, (height, width))
    return F.interpolate(features, (height, width), mode="nearest")
