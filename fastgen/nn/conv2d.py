"""`Conv2d`: `torch.nn.Conv2d` on the fused op, and how a norm and its activation go into the convolution after it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import conv2d, conv2d_plan
from ..ops.conv2d import Conv2dPlan
from .group_norm import GroupNorm, PlainGroupNorm


class Conv2d(nn.Conv2d):
    r"""`torch.nn.Conv2d`, same parameters and state dict, that fuses what stands around it in a U-Net:

    .. math:: y = \big(conv(act(input \cdot input\_scale + input\_shift)) + embedding + residual\big) \cdot output\_scale

    Without gradients, 3x3 convolutions on the CPU go through Winograd's algorithms where that is faster; :meth:`plan` says whether,
    and :func:`fastgen.ops.conv2d` what that means for the error and the memory.

    Args:
        in_channels, out_channels, kernel_size, and all others: as in :class:`torch.nn.Conv2d`, ``padding_mode`` zeros alone.

    Raises:
        ValueError: another ``padding_mode``.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(in_channels, out_channels, kernel_size, *args, **kwargs)
        if self.padding_mode != "zeros":
            raise ValueError(f"Conv2d: padding_mode must be 'zeros', got {self.padding_mode!r}")

    def forward(
        self,
        input: Tensor,
        *,
        input_scale: Tensor | None = None,
        input_shift: Tensor | None = None,
        activation: str | None = None,
        embedding: Tensor | None = None,
        residual: Tensor | None = None,
        output_scale: float = 1.0,
    ) -> Tensor:
        """``input`` [N, C, H, W] and what :func:`fastgen.ops.conv2d` takes beside it; raises what that raises."""
        return conv2d(
            input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups,
            input_scale=input_scale, input_shift=input_shift, activation=activation, embedding=embedding,
            residual=residual, output_scale=output_scale,
        )  # fmt: skip

    def plan(self, input: Tensor) -> Conv2dPlan:
        """Which algorithm takes ``input``, as things are now, and why."""
        return conv2d_plan(input, self.weight, self.stride, self.padding, self.dilation, self.groups)


def conv_beside(norm: Callable[..., nn.Module]) -> type[nn.Conv2d]:
    """The class of the convolutions beside such norms: torch's own where the norms are plain torch."""
    return nn.Conv2d if norm is PlainGroupNorm else Conv2d


def normed_conv(
    norm: nn.Module, conv: nn.Module, input: Tensor, *, residual: Tensor | None = None, **of_norm: Tensor
) -> Tensor:
    """``residual + conv(norm(input, **of_norm))``, with the activation that the norm has.

    Where the kernels can take it the norm's scale and shift are applied as the convolution reads ``input``. Where they cannot
    (gradients, autocast, the compiler, another class of norm, a shape that the library does better), it is the calls it reads as.
    """
    if isinstance(norm, GroupNorm) and isinstance(conv, Conv2d) and _in_one_call(norm, conv, input):
        a, c = norm.affine_map(input, **of_norm)
        return conv(input, input_scale=a, input_shift=c, activation=norm.activation, residual=residual)
    y = conv(norm(input, **of_norm))
    return y if residual is None else residual + y


def _in_one_call(norm: GroupNorm, conv: Conv2d, input: Tensor) -> bool:
    if torch.compiler.is_compiling() or type(norm).forward is not GroupNorm.forward:
        return False
    watched = torch.is_grad_enabled() and any(p.requires_grad for p in norm.parameters())
    return not watched and conv.plan(input).outputs > 0
