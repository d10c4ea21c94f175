"""`RealNVP` of vectors and `MultiScaleRealNVP` of images. Dinh et al. 2016 (Density estimation using real NVP)."""

from ..flows import (
    ActNorm,
    AffineCoupling,
    Compose,
    ConvResNet,
    Logit,
    MultiScale,
    ResidualMLP,
    Split,
    Squeeze,
    Transform,
)
from ._configured import check_positive
from ._flow_model import FlowModel, alternating, check_vector, stack


class RealNVP(FlowModel):
    """A density of vectors [N, features]: affine couplings of the two halves in turn, an actnorm before each.

    Args:
        features: D, at least 2.
        num_couplings: how many.
        hidden_features, num_blocks: of each coupling's residual network.
        scale_fn: of the couplings, as :func:`fastgen.ops.affine_coupling` names it; ``"tanh"`` is exp(tanh s).
        context_features: of a context [N, context_features]; None for none.
        actnorm: whether an actnorm, initialised by the first batch, stands before each coupling.
        reversible: train in the memory of one coupling; :func:`fastgen.flows.reversible`.

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    def __init__(
        self,
        features: int,
        *,
        num_couplings: int = 8,
        hidden_features: int = 128,
        num_blocks: int = 2,
        scale_fn: str = "tanh",
        context_features: int | None = None,
        actnorm: bool = True,
        reversible: bool = False,
    ) -> None:
        config = {
            "features": features,
            "num_couplings": num_couplings,
            "hidden_features": hidden_features,
            "num_blocks": num_blocks,
            "scale_fn": scale_fn,
            "context_features": context_features,
            "actnorm": actnorm,
            "reversible": reversible,
        }
        check_vector("RealNVP", config, "num_couplings", "hidden_features", "num_blocks")
        layers: list[Transform] = []
        for i in range(num_couplings):
            mask = alternating(i)
            transformed = features // 2 if mask == "first_half" else features - features // 2
            network = ResidualMLP(
                features - transformed,
                2 * transformed,
                hidden_features=hidden_features,
                num_blocks=num_blocks,
                context_features=context_features,
            )
            if actnorm:
                layers.append(ActNorm(features))
            layers.append(AffineCoupling(network, mask=mask, scale_fn=scale_fn))
        super().__init__(config, stack(layers, reversible=reversible), (features,))


class MultiScaleRealNVP(FlowModel):
    """A density of images [N, in_channels, H, W] in [0, 1): couplings by checkerboard and by channels, in scales.

    The logits of pixels come first. Three checkerboard couplings, the squeeze that keeps each diagonal of a block together, three
    channel couplings; the last scale has four checkerboard couplings. Where the paper has batch norm, actnorms stand here.

    Args:
        in_channels: of the image.
        image_size: H = W, divisible by 2 once for every scale but the last.
        num_scales: how many.
        hidden_channels, num_blocks: of each coupling's residual network; twice the channels at each further scale.
        scale_fn: as in :class:`RealNVP`.
        alpha: of the logits, :class:`fastgen.flows.Logit`.
        num_classes: of labels [N] as context; None for none.
        reversible: train in the memory of one layer a scale.

    Raises:
        ValueError: an argument is out of its range, or the image cannot be squeezed as often; the message names it.
    """

    def __init__(
        self,
        in_channels: int = 3,
        image_size: int = 32,
        *,
        num_scales: int = 2,
        hidden_channels: int = 64,
        num_blocks: int = 4,
        scale_fn: str = "tanh",
        alpha: float = 0.05,
        num_classes: int | None = None,
        reversible: bool = False,
    ) -> None:
        config = {
            "in_channels": in_channels,
            "image_size": image_size,
            "num_scales": num_scales,
            "hidden_channels": hidden_channels,
            "num_blocks": num_blocks,
            "scale_fn": scale_fn,
            "alpha": alpha,
            "num_classes": num_classes,
            "reversible": reversible,
        }
        counts = ("in_channels", "image_size", "num_scales", "hidden_channels", "num_blocks")
        check_positive("MultiScaleRealNVP", config, *counts)
        check_positive("MultiScaleRealNVP", config, "num_classes", optional=True)

        def couplings(channels: int, number: int, width: int, *, checkerboard: bool) -> list[Transform]:
            layers: list[Transform] = []
            for i in range(number):
                seen, given = (channels, 2 * channels) if checkerboard else (channels // 2, channels)
                network = ConvResNet(seen, given, hidden_channels=width, num_blocks=num_blocks, num_classes=num_classes)
                mask = alternating(i, checkerboard)
                layers += [ActNorm(channels), AffineCoupling(network, mask=mask, scale_fn=scale_fn)]
            return layers

        levels, splits, channels = [], [], in_channels
        for scale in range(num_scales):
            width = hidden_channels * 2**scale
            if scale == num_scales - 1:
                layers = couplings(channels, 4, width, checkerboard=True)
            else:
                layers = couplings(channels, 3, width, checkerboard=True)
                layers += [Squeeze(order="checkerboard")]
                layers += couplings(4 * channels, 3, 2 * width, checkerboard=False)
                splits.append(Split(2 * channels, 4 * channels))
                channels *= 2
            levels.append(stack(layers, reversible=reversible, keep_last=False))
        levels[0] = Compose([Logit(alpha), levels[0]])
        shape = (in_channels, image_size, image_size)
        super().__init__(config, MultiScale(levels, splits, shape), shape, (in_channels * image_size**2,))
