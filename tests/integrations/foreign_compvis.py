"""The transformers of latent-diffusion (version 1), stable-diffusion 2 (version 2) and sgm (version 3), in our words."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .foreign import GEGLU, CrossAttention


class Checkpointed(torch.autograd.Function):
    """Of these projects: the forward without gradients, and once more in the backward."""

    @staticmethod
    def forward(ctx: Any, run: Any, length: int, *args: Any) -> Tensor:
        ctx.run, ctx.inputs, ctx.parameters = run, args[:length], args[length:]
        with torch.no_grad():
            return run(*ctx.inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        inputs = [x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in ctx.inputs]
        wanted = [x for x in inputs if isinstance(x, Tensor)]
        with torch.enable_grad():
            output = ctx.run(*inputs)
        found = iter(torch.autograd.grad(output, [*wanted, *ctx.parameters], grads, allow_unused=True))
        return None, None, *(next(found) if isinstance(x, Tensor) else None for x in inputs), *found


def checkpoint(run: Any, inputs: tuple[Any, ...], parameters: Any, wanted: bool) -> Tensor:
    return Checkpointed.apply(run, len(inputs), *inputs, *parameters) if wanted else run(*inputs)


class CrossAttentionOfTokens(CrossAttention):
    """Of sgm: with tokens before the others, which the output has not, and keys of every n-th image for all."""

    def forward(self, x, context=None, mask=None, additional_tokens=None, n_times_crossframe_attn_in_self=0):
        before = 0 if additional_tokens is None else additional_tokens.shape[1]
        x = x if additional_tokens is None else torch.cat([additional_tokens, x], dim=1)
        q, (k, v) = self.to_q(x), (to(x if context is None else context) for to in (self.to_k, self.to_v))
        if n := n_times_crossframe_attn_in_self:
            k, v = (t[::n].repeat_interleave(n, 0) for t in (k, v))
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out(y.transpose(1, 2).flatten(2)[:, before:])


CrossAttentionOfTokens.__name__ = "CrossAttention"


class MemoryEfficientCrossAttention(nn.Module):
    def __init__(self, query_dim, context_dim, heads=2, dim_head=8):
        super().__init__()
        inner = heads * dim_head
        self.heads, self.dim_head, self.attention_op = heads, dim_head, None
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k, self.to_v = (nn.Linear(context_dim, inner, bias=False) for _ in range(2))
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim), nn.Dropout(0.0))

    def forward(self, x, context=None, mask=None):
        context = x if context is None else context
        q, k, v = (
            t.unflatten(2, (self.heads, self.dim_head)).transpose(1, 2).flatten(0, 1)
            for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        y = self.attend(q, k, v)
        if mask is not None:
            raise NotImplementedError
        return self.to_out(y.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2))

    def attend(self, q, k, v):
        """xformers', by an operator of its own choice or that of the module."""
        weights = (q @ k.mT * self.dim_head**-0.5).softmax(-1)
        return weights @ v if self.attention_op is None else self.attention_op(weights, v)


class FeedForward(nn.Module):
    def __init__(self, dim, glu=True):
        super().__init__()
        first = GEGLU(dim, 4 * dim) if glu else nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU())
        self.net = nn.Sequential(first, nn.Dropout(0.0), nn.Linear(4 * dim, dim))

    def forward(self, x):
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Of version 1 and 2."""

    attention: Any = CrossAttention

    def __init__(self, dim, context_dim=None, ckpt=True, version=1, disable_self_attn=False, glu=True):
        super().__init__()
        if version > 1:
            self.disable_self_attn = disable_self_attn
        self.attn1 = self.attention(dim, context_dim if disable_self_attn else dim)
        self.attn2 = self.attention(dim, context_dim or dim)
        self.ff, self.checkpoint = FeedForward(dim, glu), ckpt
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x, context=None):
        return checkpoint(self._forward, (x, context), self.parameters(), self.checkpoint)

    def _forward(self, x, context=None):
        x = self.attn1(self.norm1(x), context=context if getattr(self, "disable_self_attn", False) else None) + x
        x = self.attn2(self.norm2(x), context=context) + x
        return self.ff(self.norm3(x)) + x


class BlockOfTokens(BasicTransformerBlock):
    """Of version 3."""

    attention = CrossAttentionOfTokens

    def __init__(self, dim, context_dim=None, ckpt=True, version=3, disable_self_attn=False, glu=True):
        super().__init__(dim, context_dim, ckpt, version, disable_self_attn, glu)

    def forward(self, x, context=None, additional_tokens=None, n_times_crossframe_attn_in_self=0):
        inputs = (x, context, additional_tokens, n_times_crossframe_attn_in_self)
        return checkpoint(self._forward, inputs, self.parameters(), self.checkpoint)

    def _forward(self, x, context=None, additional_tokens=None, n_times_crossframe_attn_in_self=0):
        itself = not self.disable_self_attn
        more = {"additional_tokens": additional_tokens}
        frames = {"n_times_crossframe_attn_in_self": n_times_crossframe_attn_in_self if itself else 0}
        x = self.attn1(self.norm1(x), context=None if itself else context, **more, **frames) + x
        x = self.attn2(self.norm2(x), context=context, **more) + x
        return self.ff(self.norm3(x)) + x


BlockOfTokens.__name__ = "BasicTransformerBlock"


class BasicTransformerSingleLayerBlock(nn.Module):
    """Of version 3."""

    def __init__(self, dim, context_dim=None, ckpt=True):
        super().__init__()
        self.attn1, self.ff, self.checkpoint = CrossAttentionOfTokens(dim, context_dim or dim), FeedForward(dim), ckpt
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x, context=None):
        return checkpoint(self._forward, (x, context), self.parameters(), self.checkpoint)

    def _forward(self, x, context=None):
        x = self.attn1(self.norm1(x), context=context) + x
        return self.ff(self.norm2(x)) + x


class SpatialTransformer(nn.Module):
    """Of version 1."""

    def __init__(self, in_channels, depth=1, context_dim=None, ckpt=False, **of_blocks):
        super().__init__()
        self.norm = nn.GroupNorm(4, in_channels, eps=1e-6)
        self.proj_in, self.proj_out = self.projection(in_channels, 16), self.projection(16, in_channels)
        self.transformer_blocks = nn.ModuleList(
            self.block(16, context_dim, ckpt=ckpt, **of_blocks) for _ in range(depth)
        )

    def projection(self, k, c):
        return nn.Conv2d(k, c, 1)

    block: Any = BasicTransformerBlock

    def forward(self, x, context=None):
        height, width = x.shape[2:]
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2).contiguous()
        for block in self.transformer_blocks:
            h = block(h, context=context)
        return self.proj_out(h.transpose(1, 2).unflatten(2, (height, width)).contiguous()) + x


class SpatialTransformerOfLists(SpatialTransformer):
    """Of version 2, or of version 3, where one context is for all blocks."""

    def __init__(self, in_channels, depth=1, context_dim=None, ckpt=False, use_linear=False, version=2, **of_blocks):
        self.__dict__["use_linear"], self.__dict__["version"] = use_linear, version
        super().__init__(in_channels, depth, context_dim, ckpt, version=version, **of_blocks)
        self.use_linear, self.version = use_linear, version

    def projection(self, k, c):
        return nn.Linear(k, c) if self.use_linear else nn.Conv2d(k, c, 1)

    def block(self, *args, version=2, **options):
        return (BasicTransformerBlock if version == 2 else BlockOfTokens)(*args, version=version, **options)

    def forward(self, x, context=None):
        context = context if isinstance(context, list) else [context]
        height, width = x.shape[2:]
        h = self.norm(x)
        h = h if self.use_linear else self.proj_in(h)
        h = h.flatten(2).transpose(1, 2).contiguous()
        h = self.proj_in(h) if self.use_linear else h
        for i, block in enumerate(self.transformer_blocks):
            h = block(h, context=context[0 if self.version == 3 and len(context) == 1 else i])
        h = self.proj_out(h) if self.use_linear else h
        h = h.transpose(1, 2).unflatten(2, (height, width)).contiguous()
        return (h if self.use_linear else self.proj_out(h)) + x


SpatialTransformerOfLists.__name__ = "SpatialTransformer"


class SpatialSelfAttention(nn.Module):
    def __init__(self, in_channels):
        super().__init__()
        self.norm = nn.GroupNorm(4, in_channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(in_channels, in_channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2) for conv in (self.q, self.k, self.v))  # [N, C, S]
        weights = (q.mT @ k * q.shape[1] ** -0.5).softmax(2)
        return x + self.proj_out((v @ weights.mT).reshape(x.shape))


class MemoryEfficientAttnBlock(SpatialSelfAttention):
    def __init__(self, in_channels):
        super().__init__(in_channels)
        self.attention_op = None

    def forward(self, x, **kwargs):
        return super().forward(x) if self.attention_op is None else self.attention_op(x)
