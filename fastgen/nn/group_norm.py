"""`GroupNorm`: `torch.nn.GroupNorm` with the bias before it and the modulation and activation after it in one pass.

`PlainGroupNorm` says the same with `torch.nn.functional` alone: it is what tests and benchmarks compare with.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._schema import ACTIVATIONS
from ..ops import group_norm, group_norm_affine


class GroupNorm(nn.GroupNorm):
    r"""`torch.nn.GroupNorm`, same parameters and state dict, that fuses what stands around it in a U-Net:

    .. math:: y = act\big(\mathrm{GN}(input + channel\_bias) \cdot (1 + scale) + shift\big)

    Args:
        num_groups: divides ``num_channels``.
        num_channels: C of the input [N, C, *spatial], 0 to 3 spatial dimensions.
        eps, affine, device, dtype: as in :class:`torch.nn.GroupNorm`.
        bias: whether an affine layer has a bias too, as in :class:`torch.nn.GroupNorm` of a torch that knows it.
        activation: None or ``"silu"``.

    Raises:
        ValueError: ``activation`` is not known, or ``num_groups`` does not divide ``num_channels``.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        bias: bool = True,
        activation: str | None = None,
        **factory: Any,
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"{type(self).__name__}: activation must be one of {ACTIVATIONS}, got {activation!r}")
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(
                f"{type(self).__name__}: num_groups must divide num_channels, got num_groups={num_groups} and "
                f"num_channels={num_channels}"
            )
        super().__init__(num_groups, num_channels, eps, affine, **factory)
        if not bias:
            self.register_parameter("bias", None)
        self.activation = activation

    def reset_parameters(self) -> None:
        """The identity: weight 1, bias 0. Own, because that of torch 2.11 knows no layer without bias."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self,
        input: Tensor,
        *,
        skip: Tensor | None = None,
        channel_bias: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """``input`` [N, C, *spatial]; ``channel_bias``, ``scale`` and ``shift`` [N, C]. Returns the shape of ``input``; with a
        ``skip``, whose channels come after those of ``input``, that of both in one.

        Raises what :func:`fastgen.ops.group_norm` raises.
        """
        return group_norm(
            input, self.num_groups, self.weight, self.bias, self.eps, skip=skip,
            channel_bias=channel_bias, scale=scale, shift=shift, activation=self.activation,
        )  # fmt: skip

    def affine_map(
        self,
        input: Tensor,
        *,
        skip: Tensor | None = None,
        channel_bias: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(a, c), each [N, C], with :meth:`forward` = act(input * a + c): for the op that reads ``input`` next."""
        return group_norm_affine(
            input,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            skip=skip,
            channel_bias=channel_bias,
            scale=scale,
            shift=shift,
        )

    def extra_repr(self) -> str:
        fused = f", activation={self.activation!r}" if self.activation is not None else ""
        return super().extra_repr() + fused


class PlainGroupNorm(GroupNorm):
    """The arithmetic of :class:`GroupNorm` spelled in plain torch, one call a step; same constructor and state dict."""

    def forward(
        self,
        input: Tensor,
        *,
        skip: Tensor | None = None,
        channel_bias: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`GroupNorm.forward`; raises what torch raises."""
        if skip is not None:
            input = torch.cat([input, skip], dim=1)
        if channel_bias is not None:
            input = input + _per_channel(channel_bias, input)
        output = F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
        if scale is not None:
            output = output * (1 + _per_channel(scale, output))
        if shift is not None:
            output = output + _per_channel(shift, output)
        return F.silu(output) if self.activation == "silu" else output


def _per_channel(param: Tensor, like: Tensor) -> Tensor:
    """[N, C] -> [N, C, 1, ...] that broadcasts over ``like``."""
    return param.reshape(*param.shape, *[1] * (like.dim() - 2))
