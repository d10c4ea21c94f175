"""What stand-ins are made of: a norm, an activation and a convolution as one call of the ops, where nobody looks between them."""

from typing import Any

from torch import Tensor, nn

from ..nn.conv2d import Conv2d, takes_norm
from ..nn.group_norm import GroupNorm
from ..ops import group_norm, upsample_conv2d
from .stand_in import bare

SWISH = ("SiLU", "Swish", "SiLU32")  # classes of x * sigmoid(x), torch's and those from before it had one


def with_silu(norm: nn.Module, activation: nn.Module) -> bool:
    """Whether these two may be one call: of classes that the op knows, with no hooks."""
    return isinstance(norm, GroupNorm) and is_swish(activation) and bare((norm, activation))


def fusible(norm: nn.Module, activation: nn.Module, conv: nn.Module, *between: nn.Module) -> bool:
    """Whether norm, SiLU and convolution may be one call; ``between``: modules that do nothing now, which it leaves out."""
    return with_silu(norm, activation) and isinstance(conv, nn.Conv2d) and bare((conv, *between))


def idle(module: nn.Module) -> bool:
    """Whether a module passes on what it is given."""
    return type(module) is nn.Identity or (type(module) is nn.Dropout and not (module.training and module.p > 0))


def is_swish(activation: Any) -> bool:
    return type(activation).__name__ in SWISH


def norm_silu(norm: Any, input: Tensor, **of_norm: Tensor) -> Tensor:
    """silu(norm(input)) in one pass; ``of_norm``: channel_bias, scale, shift [N, C]."""
    return group_norm(input, norm.num_groups, norm.weight, norm.bias, norm.eps, activation="silu", **of_norm)


def norm_silu_conv(
    norm: Any, conv: Any, input: Tensor, *, residual: Tensor | None = None, output_scale: float = 1.0, **of_norm: Tensor
) -> Tensor:
    """(conv(silu(norm(input))) + residual) * output_scale: in the convolution where its kernels take it, else beside it."""
    if isinstance(conv, Conv2d) and takes_norm(conv, norm, input):
        a, c = norm.affine_map(input, **of_norm)
        return conv(
            input, input_scale=a, input_shift=c, activation="silu", residual=residual, output_scale=output_scale
        )
    y = conv(norm_silu(norm, input, **of_norm))
    y = y if residual is None else residual + y
    return y if output_scale == 1.0 else y * output_scale


def upsampling(conv: Any) -> bool:
    """Whether nearest upsampling by two and this convolution may be one call."""
    return (
        isinstance(conv, Conv2d)
        and conv.kernel_size == (3, 3)
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding in ((1, 1), "same")
        and conv.groups == 1
        and bare((conv,))
    )


def upsample_conv(conv: Any, input: Tensor) -> Tensor:
    """conv(input upsampled by two), without the image between them."""
    return upsample_conv2d(input, conv.weight, conv.bias)


def linear(module: Any) -> bool:
    """Whether a module is torch's own linear, which a call may do without asking."""
    return type(module) is nn.Linear and bare((module,))
