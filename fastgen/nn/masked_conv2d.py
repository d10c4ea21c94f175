"""`MaskedConv2d`: the causal convolution of PixelCNN and its kin as a `torch.nn.Conv2d` that sees a part of its kernel."""

from typing import Any

from torch import Tensor, nn

from ..ops import masked_conv2d, masked_conv2d_mask


class MaskedConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` of stride 1 that keeps the size, by the taps of a mask alone: :func:`fastgen.ops.masked_conv2d`.

    The weight is the whole kernel, as published models have it; what is masked is never read and gets no gradient, and need not be
    zero. The mask is a property, not in the state dict; one that stands in a foreign state dict is let go.

    Args:
        in_channels, out_channels, kernel_size: as in :class:`torch.nn.Conv2d`.
        mask_type: one of :data:`fastgen.ops.MASK_TYPES`.
        dilation, groups, bias, device, dtype: as in :class:`torch.nn.Conv2d`.
        color_channels: into how many ordered colors the channels are divided, 3 for RGB; 1 orders none.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        mask_type: str,
        *,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        color_channels: int = 1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, padding="same", dilation=dilation, groups=groups, bias=bias,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.mask_type, self.color_channels = mask_type, color_channels
        masked_conv2d_mask(mask_type, self.weight.shape, groups=groups, color_channels=color_channels, device="meta")

    @property
    def mask(self) -> Tensor:
        """[out_channels, in_channels / groups, kh, kw], boolean: True where the weight is read."""
        return masked_conv2d_mask(
            self.mask_type, self.weight.shape, groups=self.groups, color_channels=self.color_channels,
            device=self.weight.device,
        )  # fmt: skip

    def forward(self, input: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, H, W]; raises what the op raises."""
        return masked_conv2d(
            input, self.weight, self.bias, mask_type=self.mask_type, dilation=self.dilation, groups=self.groups,
            color_channels=self.color_channels,
        )  # fmt: skip

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Less the mask that other masked convolutions keep as a buffer."""
        state_dict.pop(f"{prefix}mask", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        given = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, mask_type={self.mask_type!r}"
        defaults = {"dilation": (1, 1), "groups": 1, "color_channels": 1}
        others = [f"{name}={getattr(self, name)}" for name, value in defaults.items() if getattr(self, name) != value]
        return ", ".join([given, *others, *(["bias=False"] if self.bias is None else [])])
