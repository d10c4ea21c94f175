"""latent-diffusion, stable-diffusion and sgm of CompVis and Stability: the autoencoder's blocks, the U-Net's transformers.

Their U-Net's residual blocks are those of guided-diffusion.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.group_norm import GroupNorm
from ..nn.transformer import image_of, tokens_of
from ..ops import attention, geglu
from .fusing import (
    idle,
    layer_norms,
    linear,
    norm_silu_conv,
    normed_sum,
    projects,
    upsample_conv,
    upsampling,
)
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
        h = norm_silu_conv(self.norm1, self.conv1, x, gather_moments=True)
        of_norm2 = {} if temb is None else {"channel_bias": self.temb_proj(F.silu(temb))}
        if self.in_channels != self.out_channels:
            x = self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x)
        return norm_silu_conv(self.norm2, self.conv2, h, residual=x, gather_moments=True, **of_norm2)


class Upsample(StandIn):
    of, project, does = "Upsample", PROJECT, "upsampling and its convolution without the large image"
    takes, has = ("x",), ("with_conv",)

    @classmethod
    def concerns(cls, module: Any) -> bool:
        return bool(getattr(module, "with_conv", False))

    def forward(self: Any, x: Tensor) -> Tensor:
        return upsample_conv(self.conv, x, gather_moments=True) if upsampling(self.conv) else self.theirs(x)


class AttnBlock(StandIn):
    of, project, does = "AttnBlock", PROJECT, "attention without the matrix of weights"
    takes = ("x",)
    has: ClassVar[tuple[str, ...]] = ("norm", "q", "k", "v", "proj_out")

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            return self.theirs(x, *args, **kwargs)
        h = self.norm(x)
        q, k, v = (
            each(h).flatten(2).transpose(1, 2).unsqueeze(1) for each in (self.q, self.k, self.v)
        )  # [N, 1, H * W, C]
        attended = attention(q, k, v).squeeze(1).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(attended)


class SpatialSelfAttention(AttnBlock):
    """The same in the file of the transformers."""

    of = "SpatialSelfAttention"


class MemoryEfficientAttnBlock(AttnBlock):
    """The same by xformers, which has nothing for the CPU."""

    of = "MemoryEfficientAttnBlock"
    has = (*AttnBlock.has, "attention_op")

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(x, *args, **kwargs) if self.attention_op is None else self.theirs(x, *args, **kwargs)


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
        if mask is not None or given(*args, *kwargs.values()):
            return self.theirs(x, context, mask, *args, **kwargs)  # a row that sees nothing is a mean there, zero here
        return attended(self, x, context, self.scale)


class MemoryEfficientCrossAttention(StandIn):
    """By xformers, which has nothing for the CPU."""

    of, project, does = "MemoryEfficientCrossAttention", PROJECT, CrossAttention.does
    takes, has = ("x", "context", "mask"), ("heads", "dim_head", "to_q", "to_k", "to_v", "to_out", "attention_op")

    def forward(
        self: Any, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if mask is not None or self.attention_op is not None or given(*args, *kwargs.values()):
            return self.theirs(x, context, mask, *args, **kwargs)
        return attended(self, x, context, self.dim_head**-0.5)


def given(*others: Any) -> bool:
    """Whether any of these arguments, a later version's, asks for something: is neither None nor the number 0."""
    return any(other is not None and not (isinstance(other, int) and other == 0) for other in others)


def attended(module: Any, x: Tensor, context: Tensor | None, scale: float) -> Tensor:
    """[N, L, C], by the projections of ``module``."""
    context = x if context is None else context
    q, k, v = (
        t.unflatten(2, (module.heads, -1)).transpose(1, 2)
        for t in (module.to_q(x), module.to_k(context), module.to_v(context))
    )
    return module.to_out(attention(q, k, v, scale=scale).transpose(1, 2).flatten(2))


class BasicTransformerBlock(StandIn):
    """Its ``forward`` checkpoints this, or does not."""

    of, project, does = "BasicTransformerBlock", PROJECT, "layer norms and the sums before them in one pass"
    method, takes = "_forward", ("x", "context")
    has = ("attn1", "attn2", "ff", "norm1", "norm2", "norm3", "checkpoint")

    def _forward(self: Any, x: Tensor, context: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        if x.dim() != 3 or given(*args, *kwargs.values()) or not layer_norms((self.norm2, self.norm3)):
            return self.theirs(x, context, *args, **kwargs)
        first = {"context": context} if getattr(self, "disable_self_attn", False) else {}
        y, x = normed_sum(self.norm2, self.attn1(self.norm1(x), **first), x)
        y, x = normed_sum(self.norm3, self.attn2(y, context=context), x)
        return self.ff(y) + x


class BasicTransformerSingleLayerBlock(StandIn):
    of, project, does = "BasicTransformerSingleLayerBlock", PROJECT, BasicTransformerBlock.does
    method, takes = "_forward", ("x", "context")
    has = ("attn1", "ff", "norm1", "norm2", "checkpoint")

    def _forward(self: Any, x: Tensor, context: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        if x.dim() != 3 or given(*args, *kwargs.values()) or not layer_norms((self.norm2,)):
            return self.theirs(x, context, *args, **kwargs)
        y, x = normed_sum(self.norm2, self.attn1(self.norm1(x), context=context), x)
        return self.ff(y) + x


class SpatialTransformer(StandIn):
    """Its projections are 1x1 convolutions, or linear layers where ``use_linear`` says so; a context is one for all of its
    blocks, or a list with one for each."""

    of, project, does = "SpatialTransformer", PROJECT, "images and tokens projected where they lie"
    takes, has = ("x", "context"), ("norm", "proj_in", "transformer_blocks", "proj_out")

    def forward(self: Any, x: Tensor, context: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        by_linear = getattr(self, "use_linear", False)
        contexts = context if isinstance(context, list) else [context]
        if (
            args
            or kwargs
            or x.dim() != 4
            or not all(projects(p) and isinstance(p, nn.Linear) == by_linear for p in (self.proj_in, self.proj_out))
            or not bare((self.norm, self.transformer_blocks))
            or (len(contexts) != 1 and len(contexts) < len(self.transformer_blocks))
            or (x.is_cuda and casts(self.parent_class))
        ):
            return self.theirs(x, context, *args, **kwargs)
        turned = x.stride(1) != 1
        tokens = tokens_of(self.norm, self.proj_in, x, linear=by_linear, turned=turned)
        for i, block in enumerate(self.transformer_blocks):
            tokens = block(tokens, context=contexts[i % len(contexts)])
        return image_of(self.proj_out, tokens, x, linear=by_linear, turned=turned)


def casts(kind: Any) -> bool:
    """Whether a class's forward turns autocast on, as some copies of the project do, on a GPU."""
    return "autocast" in kind.forward.__code__.co_names


STAND_INS = (
    ResnetBlock, Upsample, AttnBlock, SpatialSelfAttention, MemoryEfficientAttnBlock, GEGLU, CrossAttention,
    MemoryEfficientCrossAttention, BasicTransformerBlock, BasicTransformerSingleLayerBlock, SpatialTransformer,
)  # fmt: skip
