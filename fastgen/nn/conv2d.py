"""`Conv2d` and `UpsampleConv2d`: `torch.nn.Conv2d` on the fused ops, and how a norm and its activation go into the convolution
after it."""

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ..ops import conv2d, conv2d_plan, upsample_conv2d, upsample_conv2d_plan
from ..ops._convolution_plan import ConvolutionPlan
from ..ops.conv2d import reads_in_parts
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
        skip: Tensor | None = None,
        input_scale: Tensor | None = None,
        input_shift: Tensor | None = None,
        activation: str | None = None,
        embedding: Tensor | None = None,
        residual: Tensor | None = None,
        output_scale: float = 1.0,
        gather_moments: bool = False,
    ) -> Tensor:
        """``input`` [N, C, H, W] and what :func:`fastgen.ops.conv2d` takes beside it; raises what that raises."""
        return conv2d(
            input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups, skip=skip,
            input_scale=input_scale, input_shift=input_shift, activation=activation, embedding=embedding,
            residual=residual, output_scale=output_scale, gather_moments=gather_moments,
        )  # fmt: skip

    def plan(self, input: Tensor, skip: Tensor | None = None) -> ConvolutionPlan:
        """Which algorithm takes ``input``, or both inputs, as things are now, and why."""
        return conv2d_plan(input, self.weight, self.stride, self.padding, self.dilation, self.groups, skip=skip)


class UpsampleConv2d(Conv2d):
    r"""Nearest upsampling by two, then a 3x3 convolution that keeps the size, with what :class:`Conv2d` fuses around both:

    .. math:: y = \big(conv(up(act(input \cdot input\_scale + input\_shift))) + embedding + residual\big) \cdot output\_scale

    Parameters and state dict are those of the convolution; :func:`fastgen.ops.upsample_conv2d` says how it goes without the image
    between them.

    Args:
        in_channels, out_channels, bias, device, dtype: as in :class:`torch.nn.Conv2d`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor, **fused: Any) -> Tensor:
        """[N, C, H, W] -> [N, out_channels, 2H, 2W], with the keywords of :meth:`Conv2d.forward`."""
        return upsample_conv2d(input, self.weight, self.bias, **fused)

    def plan(self, input: Tensor, skip: Tensor | None = None) -> ConvolutionPlan:
        """Which algorithm takes ``input``, or both inputs, as things are now, and why."""
        return upsample_conv2d_plan(input, self.weight, skip=skip)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, bias={self.bias is not None}"


def conv_beside(norm: Callable[..., nn.Module]) -> type[nn.Conv2d]:
    """The class of the convolutions beside such norms: torch's own where the norms are plain torch."""
    return nn.Conv2d if norm is PlainGroupNorm else Conv2d


def conv_of_upsampled(conv: Callable[..., nn.Module], channels: int, out_channels: int) -> nn.Module:
    """The 3x3 convolution after an upsampling by two: one that upsamples, where ``conv`` is :class:`Conv2d`."""
    return UpsampleConv2d(channels, out_channels) if conv is Conv2d else conv(channels, out_channels, 3, padding=1)


def normed_conv(
    norm: nn.Module,
    conv: nn.Module,
    input: Tensor,
    *,
    skip: Tensor | None = None,
    residual: Tensor | None = None,
    gather_moments: bool = False,
    **of_norm: Tensor,
) -> Tensor:
    """``residual + conv(norm(input, **of_norm))``, with the activation that the norm has; ``skip``: a second input of a norm of
    ours, whose channels come after those of ``input``; ``gather_moments``: such a norm reads what is returned.

    Where the kernels can take it the norm's scale and shift are applied as the convolution reads ``input``. Where they cannot
    (gradients, autocast, the compiler, another class of norm, a shape that the library does better), it is the calls it reads as.
    """
    if is_own(norm) and isinstance(conv, Conv2d) and takes_norm(conv, norm, input, skip):
        a, c = norm.affine_map(input, skip=skip, **of_norm)
        return conv(
            input, skip=skip, input_scale=a, input_shift=c, activation=norm.activation, residual=residual,
            **gathering(conv, gather_moments),
        )  # fmt: skip
    y = conv(norm(input, **of_norm) if skip is None else norm(input, skip=skip, **of_norm))
    return y if residual is None else residual + y


def gathering(conv: nn.Module, wanted: bool = True) -> dict[str, bool]:
    """The keyword by which ``conv`` gathers the moments of what it returns; none of a class that may not know it."""
    known = isinstance(conv, Conv2d) and type(conv).forward in (Conv2d.forward, UpsampleConv2d.forward)
    return {"gather_moments": True} if wanted and known else {}


def is_own(norm: nn.Module) -> TypeGuard[GroupNorm]:
    """Whether a norm is computed by the op."""
    return isinstance(norm, GroupNorm) and type(norm).forward is GroupNorm.forward


def reads_both(conv: nn.Module, input: Tensor, skip: Tensor) -> bool:
    """Whether ``conv``, which nobody looks at, reads both inputs where they lie, and nobody compiles or asks for gradients."""
    if not isinstance(conv, Conv2d) or torch.compiler.is_compiling() or conv._forward_hooks or conv._forward_pre_hooks:
        return False
    if conv.plan(input, skip).outputs > 0:
        return True
    return reads_in_parts(input, skip, conv.weight, conv.bias, conv.stride, conv.padding)


def takes_norm(conv: Conv2d, norm: nn.Module, input: Tensor, skip: Tensor | None = None) -> bool:
    """Whether ``conv`` is to apply the norm of ``input``: it has kernels for it, and nobody compiles or asks for gradients."""
    if torch.compiler.is_compiling():
        return False
    watched = torch.is_grad_enabled() and any(p.requires_grad for p in norm.parameters())
    return not watched and conv.plan(input, skip).outputs > 0
