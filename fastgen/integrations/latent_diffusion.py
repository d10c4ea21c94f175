"""latent-diffusion, stable-diffusion and sgm of CompVis and Stability: the autoencoder's blocks and cross-attention.

Their U-Net's residual blocks are those of guided-diffusion.
"""

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.group_norm import GroupNorm
from ..ops import attention, geglu
from .fusing import idle, linear, norm_silu_conv, upsample_conv, upsampling
from .stand_in import StandIn, bare

PROJECT = "latent-diffusion"


class ResnetBlock(StandIn):
    of, project, does = "ResnetBlock", PROJECT, "norms, swish and residual in the convolutions"
    takes = ("x", "temb")
    has = ("norm1", "conv1", "norm2", "dropout", "conv2", "in_channels", "out_channels", "use_conv_shortcut")

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if not isinstance(module.conv1, nn.Conv2d):
            yield f"a convolution of class {type(module.conv1).__name__}"

    def forward(self: Any, x: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        parts = (self.norm1, self.conv1, self.norm2, self.dropout, self.conv2)
        if (
            args
            or kwargs
            or not (isinstance(self.norm1, GroupNorm) and isinstance(self.norm2, GroupNorm))
            or not (bare(parts) and idle(self.dropout))
        ):
            return self.theirs(x, temb, *args, **kwargs)
        h = norm_silu_conv(self.norm1, self.conv1, x)
        of_norm2 = {} if temb is None else {"channel_bias": self.temb_proj(F.silu(temb))}
        if self.in_channels != self.out_channels:
            x = self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x)
        return norm_silu_conv(self.norm2, self.conv2, h, residual=x, **of_norm2)


class Upsample(StandIn):
    of, project, does = "Upsample", PROJECT, "upsampling and its convolution without the large image"
    takes, has = ("x",), ("with_conv",)

    @classmethod
    def concerns(cls, module: Any) -> bool:
        return bool(getattr(module, "with_conv", False))

    def forward(self: Any, x: Tensor) -> Tensor:
        return upsample_conv(self.conv, x) if upsampling(self.conv) else self.theirs(x)


class AttnBlock(StandIn):
    of, project, does = "AttnBlock", PROJECT, "attention without the matrix of weights"
    takes, has = ("x",), ("norm", "q", "k", "v", "proj_out")

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            return self.theirs(x, *args, **kwargs)
        h = self.norm(x)
        q, k, v = (
            each(h).flatten(2).transpose(1, 2).unsqueeze(1) for each in (self.q, self.k, self.v)
        )  # [N, 1, H * W, C]
        attended = attention(q, k, v).squeeze(1).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(attended)


class GEGLU(StandIn):
    of, project, does = "GEGLU", PROJECT, "linear, GELU and product in one"
    takes, has = ("x",), ("proj",)

    def forward(self: Any, x: Tensor) -> Tensor:
        return geglu(x, self.proj.weight, self.proj.bias) if linear(self.proj) else self.theirs(x)


class CrossAttention(StandIn):
    of, project, does = "CrossAttention", PROJECT, "attention that reads queries, keys and values where they lie"
    takes, has = ("x", "context", "mask"), ("heads", "scale", "to_q", "to_k", "to_v", "to_out")

    def forward(
        self: Any, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if mask is not None or args or any(value not in (None, 0) for value in kwargs.values()):
            return self.theirs(x, context, mask, *args, **kwargs)  # a row that sees nothing is a mean there, zero here
        context = x if context is None else context
        q, k, v = (
            t.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2))


STAND_INS = (ResnetBlock, Upsample, AttnBlock, GEGLU, CrossAttention)
