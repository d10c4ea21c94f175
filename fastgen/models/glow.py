"""`Glow`: steps of actnorm, 1x1 convolution and coupling, in levels. Kingma & Dhariwal 2018 (Glow)."""

import torch
from torch import Tensor, nn

from ..flows import (
    AdditiveCoupling,
    AffineCoupling,
    Center,
    Compose,
    Context,
    ConvNet,
    GlowStep,
    Logit,
    MultiScale,
    Split,
    Squeeze,
)
from ..flows.conditioners import zero
from ._configured import check_positive
from ._flow_model import FlowModel, check_parametrization, stack

COUPLINGS = ("affine", "additive")


class Glow(FlowModel):
    """A density of images [N, in_channels, H, W] in [0, 1): levels of squeeze, steps, and a split with a learned Gaussian.

    Args:
        in_channels: of the image.
        image_size: H = W, divisible by 2 ** num_levels.
        num_levels, num_steps: L and K of the paper: 3 and 32 for CIFAR-10.
        hidden_channels: of each coupling's network.
        coupling: ``"affine"`` or ``"additive"``.
        scale_fn: of affine couplings, as :func:`fastgen.ops.affine_coupling` names it; ``"sigmoid"`` is sigmoid(s + 2), the
            published code's.
        alpha: of the logits of pixels, :class:`fastgen.flows.Logit`, which come first; None: pixels around 0, the paper's.
        num_classes: of labels [N] as context, for the last prior and every coupling; None for none.
        parametrization: of the 1x1 convolutions' matrices, ``"direct"`` or ``"plu"``; :class:`fastgen.flows.ActNormConv1x1`.
        reversible: train in the memory of one step a level; :func:`fastgen.flows.reversible`.

    Raises:
        ValueError: an argument is out of its range, or the image cannot be squeezed as often; the message names it.
    """

    def __init__(
        self,
        in_channels: int = 3,
        image_size: int = 32,
        *,
        num_levels: int = 3,
        num_steps: int = 32,
        hidden_channels: int = 512,
        coupling: str = "affine",
        scale_fn: str = "sigmoid",
        alpha: float | None = None,
        num_classes: int | None = None,
        parametrization: str = "direct",
        reversible: bool = False,
    ) -> None:
        config = {
            "in_channels": in_channels,
            "image_size": image_size,
            "num_levels": num_levels,
            "num_steps": num_steps,
            "hidden_channels": hidden_channels,
            "coupling": coupling,
            "scale_fn": scale_fn,
            "alpha": alpha,
            "num_classes": num_classes,
            "parametrization": parametrization,
            "reversible": reversible,
        }
        check_positive("Glow", config, "in_channels", "image_size", "num_levels", "num_steps", "hidden_channels")
        check_positive("Glow", config, "num_classes", optional=True)
        check_parametrization("Glow", parametrization)
        if coupling not in COUPLINGS:
            raise ValueError(f"Glow: coupling must be one of {COUPLINGS}, got {coupling!r}")

        def step(channels: int) -> GlowStep:
            transformed = channels - channels // 2
            parameters = transformed if coupling == "additive" else 2 * transformed
            network = ConvNet(channels // 2, parameters, hidden_channels=hidden_channels, num_classes=num_classes)
            if coupling == "additive":
                return GlowStep(channels, AdditiveCoupling(network), parametrization=parametrization)
            return GlowStep(channels, AffineCoupling(network, scale_fn=scale_fn), parametrization=parametrization)

        levels, splits, channels = [], [], in_channels
        for level in range(num_levels):
            channels *= 4
            steps = stack(
                [Squeeze(), *(step(channels) for _ in range(num_steps))], reversible=reversible, keep_last=False
            )
            levels.append(Compose([Center() if alpha is None else Logit(alpha), steps]) if level == 0 else steps)
            if level < num_levels - 1:
                splits.append(Split(channels // 2, channels, SplitPrior(channels // 2, channels - channels // 2)))
                channels //= 2
        splits.append(Split(0, channels, TopPrior(channels, num_classes)))
        shape = (in_channels, image_size, image_size)
        super().__init__(config, MultiScale(levels, splits, shape), shape, (in_channels * image_size**2,))


class SplitPrior(nn.Conv2d):
    """Mean and log-scale of what leaves, by what goes on and perhaps a map beside it: a 3x3 convolution from 0.

    Args:
        keep, leave: channels that go on, and that leave.
        context_channels: of the map; labels are not looked at.
    """

    def __init__(self, keep: int, leave: int, context_channels: int | None = None) -> None:
        super().__init__(keep + (context_channels or 0), 2 * leave, 3, padding=1)
        self.context_channels = context_channels
        zero(self)

    def forward(self, kept: Tensor, context: Tensor | None = None) -> Tensor:
        if self.context_channels is not None and context is not None:
            kept = torch.cat([kept, context], 1)
        return super().forward(kept)


class TopPrior(nn.Module):
    """Mean and log-scale of each channel of what is left at the end, [N or 1, 2 channels, 1, 1]; by label where there are some."""

    def __init__(self, channels: int, num_classes: int | None) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(num_classes or 1, 2 * channels))
        self.num_classes = num_classes

    def forward(self, context: Context) -> Tensor:
        if self.num_classes is None:
            return self.table[:, :, None, None]
        if not isinstance(context, Tensor) or context.is_floating_point():
            raise ValueError(f"Glow: context must be labels, integers [N] below {self.num_classes}, got {context!r}")
        return self.table[context][:, :, None, None]
