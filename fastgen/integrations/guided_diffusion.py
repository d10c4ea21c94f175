"""guided-diffusion and what is built as it is: improved-diffusion, and the U-Nets of latent-diffusion and sgm."""

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .. import nn as fused
from ..nn.conv2d import gathering
from ..ops import attention, group_norm
from .fusing import fusible, idle, norm_silu, norm_silu_conv, upsample_conv, upsampling
from .pair import Pair, cats, parted, take_pairs, whole, with_pairs
from .stand_in import StandIn, bare

PROJECT = "guided-diffusion"


class GroupNorm32(StandIn, fused.GroupNorm):
    of, project, does = "GroupNorm32", PROJECT, "one pass over the input, statistics in float32"
    takes = ("x",)
    activation = None

    def forward(self: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class ResBlock(StandIn):
    of, project = "ResBlock", PROJECT
    does = "norms, SiLU, time embedding and residual in the convolutions"
    method, takes = "_forward", ("x", "emb")
    has = ("in_layers", "emb_layers", "out_layers", "skip_connection", "use_scale_shift_norm", "updown")

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        classes = [type(m) for m in (*module.in_layers, *module.out_layers)]
        if [issubclass(c, nn.GroupNorm) for c in classes] != [True, False, False, True, False, False, False]:
            yield "layers in another order than norm, SiLU, (dropout,) convolution"
        elif not (issubclass(classes[2], nn.Conv2d) and issubclass(classes[6], nn.Conv2d)):
            yield f"a convolution of class {classes[2].__name__}"
        if getattr(module, "exchange_temb_dims", False) or getattr(module, "skip_t_emb", False):
            yield "an embedding for every frame, or none"

    def _forward(self: Any, x: Tensor | Pair, emb: Tensor) -> Tensor:
        norm1, active1, conv1 = self.in_layers
        norm2, active2, dropout, conv2 = self.out_layers
        if not (
            fusible(norm1, active1, conv1, self.in_layers)
            and fusible(norm2, active2, conv2, dropout, self.out_layers)
            and idle(dropout)
        ):
            return self.theirs(whole(x), emb)
        x, skip = parted(x, norm1, None if self.updown else self.skip_connection)
        if self.updown:
            h, x = conv1(self.h_upd(norm_silu(norm1, x)), **gathering(conv1)), self.x_upd(x)
        else:
            h = norm_silu_conv(norm1, conv1, x, skip=skip, gather_moments=True)
        e = self.emb_layers(emb).type(h.dtype)
        if self.use_scale_shift_norm:
            scale, shift = e.chunk(2, dim=1)
            of_norm2 = {"scale": scale, "shift": shift}
        else:
            of_norm2 = {"channel_bias": e}
        residual = self.skip_connection(x) if skip is None else self.skip_connection(x, skip=skip)
        return norm_silu_conv(norm2, conv2, h, residual=residual, gather_moments=True, **of_norm2)


class UNetModel(StandIn):
    """Its own forward, of which the residual blocks on the way up get both images of `torch.cat` as they lie."""

    of, project, does = "UNetModel", PROJECT, "skips read where they lie by the residual blocks on the way up"
    takes, has = ("x", "timesteps"), ("input_blocks", "middle_block", "output_blocks")

    @classmethod
    def concerns(cls, module: Any) -> bool:
        return getattr(module, "dims", 2) == 2

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if not cats(type(module).forward):
            yield "its forward makes one image of two by something other than torch.cat"

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        stages = tuple(self.output_blocks)
        if not (
            all(isinstance(stage, nn.Sequential) and len(stage) for stage in stages)
            and bare(stages)
            and take_pairs((stage[0] for stage in stages), ResBlock)
        ):
            return self.theirs(*args, **kwargs)
        return with_pairs(self.parent_class.forward)(self, *args, **kwargs)


class Upsample(StandIn):
    of, project, does = "Upsample", PROJECT, "upsampling and its convolution without the large image"
    takes, has = ("x",), ("channels", "use_conv", "dims")

    @classmethod
    def concerns(cls, module: Any) -> bool:
        return bool(getattr(module, "use_conv", False))

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if module.dims != 2:
            yield f"{module.dims} dimensions"
        if getattr(module, "third_up", False):
            yield "upsampling of a third dimension"

    def forward(self: Any, x: Tensor) -> Tensor:
        if x.shape[1] != self.channels or not upsampling(self.conv):
            return self.theirs(x)
        return upsample_conv(self.conv, x, gather_moments=True)


class QKVAttentionLegacy(StandIn):
    """[N, H * 3 * E, L]: the heads outside, each with its queries, keys and values."""

    of, project, does = "QKVAttentionLegacy", PROJECT, "attention without the matrix of weights"
    takes, has = ("qkv",), ("n_heads",)

    def forward(self: Any, qkv: Tensor) -> Tensor:
        n, width, length = qkv.shape
        if width % (3 * self.n_heads):
            return self.theirs(qkv)  # which says what is wrong
        return _attended(*qkv.reshape(n, self.n_heads, 3, -1, length).unbind(2))


class QKVAttention(StandIn):
    """[N, 3 * H * E, L]: all queries, all keys, all values, each by head."""

    of, project, does = "QKVAttention", PROJECT, "attention without the matrix of weights"
    takes, has = ("qkv",), ("n_heads",)

    def forward(self: Any, qkv: Tensor) -> Tensor:
        n, width, length = qkv.shape
        if width % (3 * self.n_heads):
            return self.theirs(qkv)
        return _attended(*qkv.reshape(n, 3, self.n_heads, -1, length).unbind(1))


def _attended(*qkv: Tensor) -> Tensor:
    """[N, H, E, L] each -> [N, H * E, L]."""
    q, k, v = (t.transpose(2, 3) for t in qkv)
    return attention(q, k, v, scale=1 / math.sqrt(q.shape[3])).transpose(2, 3).flatten(1, 2)


STAND_INS = (GroupNorm32, ResBlock, UNetModel, Upsample, QKVAttentionLegacy, QKVAttention)
