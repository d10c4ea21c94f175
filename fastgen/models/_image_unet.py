"""`ImageUNet`: a U-Net of residual blocks over images, and the state dicts of guided-diffusion and its descendants.

Dhariwal and Nichol 2021; Rombach et al. 2022.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..nn import Downsample, ResBlock, Upsample
from ..nn.conv2d import conv_beside, normed_conv
from ..nn.resblock import zero_parameters
from ._staged_unet import StagedUNet, as_given, fastest_layout


class ImageUNet(StagedUNet):
    """A :class:`StagedUNet` of :class:`fastgen.nn.ResBlock`; what attends after them a subclass says.

    Args:
        config: as :class:`StagedUNet` has it; ``use_scale_shift_norm`` and ``resblock_updown`` among them, and
            ``conv_resample``, unless it is True.
        out_channels: of the last convolution.
        attention: what follows a residual block where there is attention, of (channels, level); that of the middle is None.
        norm: class or factory of the norms, called as :class:`fastgen.nn.GroupNorm`.
        block: class or factory of the residual blocks, called as :class:`fastgen.nn.ResBlock`.

    The stages are numbered as in guided-diffusion and its descendants, whose state dicts load as they are.
    """

    foreign_keys: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"time_embed\.0\.(.*)", r"time_embedding.linear_1.\1"),
        (r"time_embed\.2\.(.*)", r"time_embedding.linear_2.\1"),
        (r"label_emb\.weight", "class_embedding.weight"),
        (r"(.*)\.in_layers\.0\.(.*)", r"\1.norm1.\2"),
        (r"(.*)\.in_layers\.2\.(.*)", r"\1.conv1.\2"),
        (r"(.*)\.emb_layers\.1\.(.*)", r"\1.embedding_projection.\2"),
        (r"(.*)\.out_layers\.0\.(.*)", r"\1.norm2.\2"),
        (r"(.*)\.out_layers\.3\.(.*)", r"\1.conv2.\2"),
        (r"(.*)\.skip_connection\.(.*)", r"\1.skip.\2"),
        (r"(.*)\.op\.(.*)", r"\1.conv.\2"),
        (r"out\.0\.(.*)", r"out_norm.\1"),
        (r"out\.2\.(.*)", r"out_conv.\1"),
    )
    beside_config: ClassVar[tuple[str, ...]] = ("norm",)

    def __init__(
        self,
        config: Mapping[str, Any],
        out_channels: int,
        *,
        attention: Callable[[int, int | None], Iterable[nn.Module]],
        norm: Callable[..., nn.Module],
        block: Callable[..., nn.Module] = ResBlock,
    ) -> None:
        super().__init__(config, out_channels)
        conv, num_groups = conv_beside(norm), config["num_groups"]

        def res_block(channels: int, out_channels: int, resample: str | None = None) -> nn.Module:
            return block(
                channels, out_channels, embedding_channels=self.embedding_channels, resample=resample, norm=norm,
                use_scale_shift_norm=config["use_scale_shift_norm"], dropout=config["dropout"], num_groups=num_groups,
            )  # fmt: skip

        def resample(direction: str, channels: int) -> nn.Module:
            use_conv = config.get("conv_resample", True)
            if config["resblock_updown"]:
                return res_block(channels, channels, direction)
            if direction == "up":
                return Upsample(channels, use_conv=use_conv, conv=conv)
            return Downsample(channels, use_conv=use_conv)

        channels = int(config["model_channels"] * config["channel_mult"][0])
        first = conv(self.in_channels, channels, 3, padding=1)
        channels = self._build_stages(
            first,
            res_block=res_block,
            attention=lambda width, level: attention(width, level) if self._has_attention(level) else (),
            resample=resample,
        )
        self.out_norm = norm(num_groups, channels, activation="silu")
        self.out_conv = conv(channels, out_channels, 3, padding=1)
        zero_parameters(self.out_conv)

    def _widen(self, channels: int) -> None:
        """Make the first convolution one of so many channels, those of the image and what is concatenated with it."""
        first = self.get_submodule("input_blocks.0.0")
        self.set_submodule("input_blocks.0.0", type(first)(channels, first.out_channels, 3, padding=1))

    def _run(self, x: Tensor, **given: Any) -> Tensor:
        """The network on an image; ``given``: what layers take beside the features."""
        return as_given(normed_conv(self.out_norm, self.out_conv, self._run_stages(x, **given)), x, self.out_conv)

    def _laid_out(self, h: Tensor) -> Tensor:
        return fastest_layout(self.out_conv, h)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], **options: Any) -> Self:
        """The model whose weights these are, a peer's or our own, in evaluation mode, in their dtype and on their device.

        Args:
            state: weights by name, whose shapes say the sizes; without a prefix such as ``model.diffusion_model.``.
            options: arguments of the constructor. No shape tells the heads: ``num_heads`` or ``num_head_channels`` must be
                among them. Nor do shapes tell ``num_groups``, ``dropout``, and that the last class is the null class.

        Raises:
            ValueError: the names are not those of such a model, or the heads are missing.
            RuntimeError: weights and options do not fit each other, as ``load_state_dict`` says it.
        """
        if options.get("num_heads") is None and options.get("num_head_channels") is None:
            raise ValueError(
                f"{cls.__name__}.from_state_dict: num_heads or num_head_channels must be given, no shape tells them"
            )
        return super().from_state_dict(state, **options)

    @classmethod
    def _config_of(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        first = state["input_blocks.0.0.weight"]
        if first.dim() != 4:
            raise ValueError(
                f"{cls.__name__}.from_state_dict: convolutions must be of 2 dimensions, got a weight of shape "
                f"{tuple(first.shape)}"
            )
        levels, stages = levels_and_stages(state)
        blocks = [f"input_blocks.{level * stages + 1}" for level in range(levels)]  # the first of each level
        model_channels = state["time_embedding.linear_1.weight"].shape[1]
        widths = [state[f"{block}.0.conv2.weight"].shape[0] for block in blocks]
        embedding = state[f"{blocks[0]}.0.embedding_projection.weight"]
        found: dict[str, Any] = {
            "in_channels": first.shape[1],
            "model_channels": model_channels,
            "channel_mult": [w / model_channels if w % model_channels else w // model_channels for w in widths],
            "num_res_blocks": stages - 1,
            "attention_resolutions": [2**i for i, block in enumerate(blocks) if f"{block}.1.norm.weight" in state],
            "use_scale_shift_norm": embedding.shape[0] == 2 * widths[0],
        }
        if "class_embedding.weight" in state:
            found["num_classes"] = state["class_embedding.weight"].shape[0]
        if levels > 1:
            resampling = f"input_blocks.{stages}.0"
            found["resblock_updown"] = f"{resampling}.norm1.weight" in state
            found["conv_resample"] = found["resblock_updown"] or f"{resampling}.conv.weight" in state
        return found

    def adopted(self, name: str, ours: str, tensor: Tensor, shape: torch.Size | None) -> Tensor:
        """Kernels of one pixel as the matrices of linear layers, and these as kernels."""
        if shape is not None and tensor.shape[:2] == shape[:2] and tensor.numel() == shape.numel():
            return tensor.reshape(shape)
        return tensor


def levels_and_stages(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """How many levels there are on the way down, and of how many stages: residual blocks, and what resamples after them."""
    numbers = (re.match(r"input_blocks\.(\d+)\.", name) for name in state)
    total = 1 + max(int(match[1]) for match in numbers if match)
    for i in range(1, total):
        if f"input_blocks.{i}.0.norm1.weight" not in state:  # a convolution, or a mean without weights
            return total // i, i
    for i in range(total):  # on the way up a block that resamples stands beside another
        if any(f"output_blocks.{i}.{layer}.norm1.weight" in state for layer in (1, 2)):
            return total // (i + 1), i + 1
    return 1, total
