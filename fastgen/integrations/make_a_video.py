"""make-a-video-pytorch: its norm, block, attention and pseudo-3D convolution, and that of imagen-pytorch's U-Net for video."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import attention, rms_norm
from .fusing import agrees, is_swish
from .imagen import IMAGEN, over_channels, per_channel, visible
from .stand_in import StandIn, bare, mixin_of

PROJECT = "make-a-video-pytorch"


class RMSNorm(StandIn):
    """Over ``dim``, channels or the last one, whatever the rank."""

    of, project, does = "RMSNorm", PROJECT, "one pass over the input"
    takes, has = ("x",), ("gamma", "dim")

    @classmethod
    def concerns(cls, module: Any) -> bool:
        return isinstance(getattr(module, "gamma", None), Tensor) and hasattr(module, "dim")

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        sample = {1: (3, module.gamma.numel(), 2), -1: (3, 2, module.gamma.numel())}
        if module.dim not in sample or not agrees(cls, module, *sample[module.dim]):
            yield "not normalize(x) * gamma * sqrt(C) over channels or the last dimension"

    def forward(self: Any, x: Tensor) -> Tensor:
        if self.dim == 1:
            return over_channels(self, x)
        if self.dim != -1:
            return self.theirs(x)
        x = x.to(torch.promote_types(x.dtype, self.gamma.dtype))
        return rms_norm(x, x.shape[-1], self.gamma, 0.0, min_norm=1e-12)


class Block(StandIn):
    of, project, does = "Block", PROJECT, "norm, scale, shift and SiLU in one pass"
    takes, has = ("x", "scale_shift", "enable_time"), ("project", "norm", "act")

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if type(module.norm).__name__ != "RMSNorm" or not is_swish(module.act):
            yield f"norm {type(module.norm).__name__}, activation {type(module.act).__name__}"

    def forward(
        self: Any, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None, enable_time: bool = False
    ) -> Tensor:
        norm, act = self.norm, self.act
        if mixin_of(norm) is not RMSNorm or norm.dim != 1 or not is_swish(act) or not bare((norm, act)):
            return self.theirs(x, scale_shift, enable_time)
        of_norm = per_channel(scale_shift, x, norm.gamma.numel())
        if of_norm is None:
            return self.theirs(x, scale_shift, enable_time)
        return over_channels(norm, self.project(x, enable_time=enable_time), activation="silu", **of_norm)


class Attend(StandIn):
    of, project, does = "Attend", PROJECT, "attention without the matrix of weights"
    takes, has = ("q", "k", "v", "bias"), ("dropout", "attn_dropout", "causal", "flash")

    def forward(self: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        if (
            (self.training and self.dropout > 0)
            or (self.flash and bias is not None)
            or (self.causal and q.shape[2] != k.shape[2])
            or not bare((self.attn_dropout,))
        ):
            return self.theirs(q, k, v, bias)
        if self.causal and bias is not None:
            return attention(q, k, v, visible(q.transpose(1, 2), k.transpose(1, 2), bias))
        return attention(q, k, v, bias, is_causal=self.causal)


class PseudoConv3d(StandIn):
    of, project, does = "PseudoConv3d", PROJECT, "frames and pixels convolved where they lie, with channels innermost"
    takes, has = ("x", "enable_time"), ("spatial_conv", "temporal_conv")

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        conv = module.temporal_conv
        if conv is not None and not is_plain(conv):
            yield f"a convolution along the frames of class {type(conv).__name__}, or not of stride 1"

    def forward(self: Any, x: Tensor, enable_time: bool = True) -> Tensor:
        conv = self.temporal_conv
        if x.dim() != 5 or (conv is not None and not is_plain(conv)):
            return self.theirs(x, enable_time)
        y = of_each_frame(self.spatial_conv, x)
        return along_frames(conv, y, conv.padding[0]) if enable_time and conv is not None else y


class CausalConv3d(StandIn):
    """A frame looks at those before it, which are padded by as many as the kernel in space has pixels but one."""

    of, project, does = "Conv3d", IMAGEN, PseudoConv3d.does
    takes, has = ("x", "ignore_time"), ("spatial_conv", "temporal_conv", "kernel_size")

    @classmethod
    def concerns(cls, module: Any) -> bool:
        return hasattr(module, "temporal_conv")

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        yield from PseudoConv3d.reasons(module)
        if not isinstance(module.kernel_size, int) or (
            module.temporal_conv is not None and module.temporal_conv.padding != (0,)
        ):
            yield f"kernel_size {module.kernel_size}, or a padding of its own along the frames"

    def forward(self: Any, x: Tensor, ignore_time: bool = False) -> Tensor:
        conv = self.temporal_conv
        if x.dim() != 5 or (conv is not None and not is_plain(conv)):
            return self.theirs(x, ignore_time)
        y = of_each_frame(self.spatial_conv, x)
        if ignore_time or conv is None:
            return y
        return along_frames(conv, F.pad(innermost(y), (0, 0, 0, 0, self.kernel_size - 1, 0)), 0)


def is_plain(conv: Any) -> bool:
    """Whether a convolution along the frames is torch's own, pads with zeros and steps by one, and nobody looks at its calls."""
    return (
        type(conv) is nn.Conv1d
        and conv.stride == conv.dilation == (1,)
        and not isinstance(conv.padding, str)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and bare((conv,))
    )


def innermost(x: Tensor) -> Tensor:
    """``x`` itself where its channels are innermost in memory, else a copy that is so."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def of_each_frame(conv: nn.Module, x: Tensor) -> Tensor:
    """[N, C, F, H, W] -> [N, K, F, H, W], an image a frame."""
    frames = conv(innermost(x).transpose(1, 2).flatten(0, 1))
    return frames.unflatten(0, (len(x), -1)).transpose(1, 2)


def along_frames(conv: nn.Conv1d, x: Tensor, padding: int) -> Tensor:
    """A 1D convolution of each pixel, as one with a kernel of one column over an image [F, H * W]."""
    y = F.conv2d(innermost(x).flatten(3), conv.weight[..., None], conv.bias, padding=(padding, 0))
    return y.unflatten(3, x.shape[3:])


STAND_INS = (RMSNorm, Block, Attend, PseudoConv3d, CausalConv3d)
