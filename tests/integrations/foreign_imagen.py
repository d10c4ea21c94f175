"""Modules as imagen-pytorch writes them, in our words: of images, and of video where it has other ones."""

import torch
import torch.nn.functional as F
from torch import nn

from .foreign_lucidrains import (
    EPS,
    attended,
    exists,
    heads,
    layer_norm,
    of_frames,
    of_pixels,
    project,
    tokens,
    with_null,
)


class LayerNorm(nn.Module):
    """Of imagen-pytorch: over the last dimension, or the third last."""

    def __init__(self, feats, stable=False, dim=-1):
        super().__init__()
        self.stable, self.dim = stable, dim
        self.g = nn.Parameter(torch.ones(feats, *[1] * (-dim - 1)))

    def forward(self, x):
        if self.stable:
            x = x / x.amax(self.dim, keepdim=True)
        return layer_norm(x, self.dim, EPS.get(x.dtype, 1e-3)) * self.g.to(x.dtype)


class VideoLayerNorm(nn.Module):
    def __init__(self, dim, stable=False):
        super().__init__()
        self.stable = stable
        self.g = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return layer_norm(x, -1, EPS.get(x.dtype, 1e-3)) * self.g


class VideoChanLayerNorm(nn.Module):
    def __init__(self, dim, stable=False):
        super().__init__()
        self.stable = stable
        self.g = nn.Parameter(torch.ones(1, dim, 1, 1, 1))

    def forward(self, x):
        return layer_norm(x, 1, EPS.get(x.dtype, 1e-3)) * self.g


class ChanRMSNorm(nn.Module):
    """Of imagen-pytorch, for images or for video."""

    def __init__(self, dim, video=False):
        super().__init__()
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * (3 if video else 2)))

    def forward(self, x):
        return F.normalize(x, dim=1) * self.scale * self.gamma


class CausalConv3d(nn.Module):
    def __init__(self, dim, dim_out, kernel_size=3, temporal_kernel_size=None):
        super().__init__()
        self.kernel_size = kernel_size
        self.spatial_conv = nn.Conv2d(dim, dim_out, kernel_size, padding=kernel_size // 2)
        self.temporal_conv = (
            nn.Conv1d(dim_out, dim_out, temporal_kernel_size or kernel_size) if kernel_size > 1 else None
        )

    def forward(self, x, ignore_time=False):
        x = of_frames(self.spatial_conv, x)
        if x.dim() == 4 or ignore_time or self.temporal_conv is None:
            return x
        return of_pixels(lambda t: self.temporal_conv(F.pad(t, (self.kernel_size - 1, 0))), x)


class Block(nn.Module):
    """Of imagen-pytorch."""

    def __init__(self, dim, dim_out, norm=True):
        super().__init__()
        self.norm = ChanRMSNorm(dim) if norm else nn.Identity()
        self.activation, self.project = nn.SiLU(), nn.Conv2d(dim, dim_out, 3, padding=1)

    def forward(self, x, scale_shift=None):
        x = self.norm(x)
        if exists(scale_shift):
            x = x * (scale_shift[0] + 1) + scale_shift[1]
        return self.project(self.activation(x))


class VideoBlock(nn.Module):
    def __init__(self, dim, dim_out):
        super().__init__()
        self.norm, self.activation = ChanRMSNorm(dim, video=True), nn.SiLU()
        self.project = CausalConv3d(dim, dim_out)

    def forward(self, x, scale_shift=None, ignore_time=False):
        x = self.norm(x)
        if exists(scale_shift):
            x = x * (scale_shift[0] + 1) + scale_shift[1]
        return self.project(self.activation(x), ignore_time=ignore_time)


class CrossAttention(nn.Module):
    """Of imagen-pytorch."""

    def __init__(self, dim, context_dim, dim_head=8, n_heads=2, norm_context=False):
        super().__init__()
        self.scale, self.heads = 8, n_heads
        self.norm, self.norm_context = LayerNorm(dim), LayerNorm(context_dim) if norm_context else nn.Identity()
        self.null_kv = nn.Parameter(torch.randn(2, dim_head))
        self.to_q = nn.Linear(dim, dim_head * n_heads, bias=False)
        self.to_kv = nn.Linear(context_dim, 2 * dim_head * n_heads, bias=False)
        self.q_scale, self.k_scale = (nn.Parameter(torch.ones(dim_head)) for _ in range(2))
        self.to_out = nn.Sequential(nn.Linear(dim_head * n_heads, dim, bias=False), LayerNorm(dim))

    def projected(self, x, context):
        k, v = self.to_kv(self.norm_context(context)).chunk(2, dim=-1)
        k, v = with_null(self.null_kv, heads(k, self.heads), heads(v, self.heads))
        return heads(self.to_q(self.norm(x)), self.heads), k, v

    def forward(self, x, context, mask=None):
        q, k, v = self.projected(x, context)
        q, k = F.normalize(q, dim=-1) * self.q_scale, F.normalize(k, dim=-1) * self.k_scale
        return self.to_out(attended(q, k, v, self.scale, mask=mask))


class LinearCrossAttention(CrossAttention):
    def forward(self, x, context, mask=None):
        q, k, v = self.projected(x, context)
        context = k.softmax(2).transpose(2, 3) @ v
        return self.to_out((q.softmax(3) * self.scale @ context).transpose(1, 2).flatten(2))


class Attention(nn.Module):
    """Of imagen-pytorch."""

    def __init__(self, dim, dim_head=8, n_heads=2, context_dim=None):
        super().__init__()
        self.scale, self.heads, self.norm = 8, n_heads, LayerNorm(dim)
        self.null_kv = nn.Parameter(torch.randn(2, dim_head))
        self.to_q, self.to_kv = nn.Linear(dim, dim_head * n_heads, bias=False), nn.Linear(dim, 2 * dim_head, bias=False)
        self.q_scale, self.k_scale = (nn.Parameter(torch.ones(dim_head)) for _ in range(2))
        self.to_context = (
            nn.Sequential(nn.LayerNorm(context_dim), nn.Linear(context_dim, 2 * dim_head)) if context_dim else None
        )
        self.to_out = nn.Sequential(nn.Linear(dim_head * n_heads, dim, bias=False), LayerNorm(dim))

    def forward(self, x, context=None, mask=None, attn_bias=None):
        x = self.norm(x)
        q, (k, v) = heads(self.to_q(x), self.heads), (heads(t, 1) for t in self.to_kv(x).chunk(2, dim=-1))
        k, v = with_null(self.null_kv, k, v)
        if exists(context):
            of_context = (heads(t, 1) for t in self.to_context(context).chunk(2, dim=-1))
            k, v = (torch.cat(pair, 2) for pair in zip(of_context, (k, v), strict=True))
        q, k = F.normalize(q, dim=-1) * self.q_scale, F.normalize(k, dim=-1) * self.k_scale
        attn_bias = self.bias(x.shape[1], q.dtype) if attn_bias is None else self.with_null(attn_bias)
        return self.to_out(attended(q, k, v, self.scale, attn_bias, getattr(self, "causal", False), mask))

    def bias(self, n, dtype):
        return None

    def with_null(self, bias):
        return bias


class Positions(nn.Module):
    def __init__(self, n_heads):
        super().__init__()
        self.slope = nn.Parameter(torch.ones(n_heads))

    def forward(self, n, device=None, dtype=None):
        distance = torch.arange(n)[:, None] - torch.arange(n)
        return self.slope[:, None, None].to(dtype) * distance / n


class VideoAttention(Attention):
    def __init__(self, dim, dim_head=8, n_heads=2, context_dim=None, causal=False, rel_pos_bias=False):
        super().__init__(dim, dim_head, n_heads, context_dim)
        self.causal, self.rel_pos_bias = causal, Positions(n_heads) if rel_pos_bias else None
        self.null_attn_bias = nn.Parameter(torch.randn(n_heads))

    def bias(self, n, dtype):
        return self.with_null(self.rel_pos_bias(n, dtype=dtype)) if exists(self.rel_pos_bias) else None

    def with_null(self, bias):
        return torch.cat([self.null_attn_bias[:, None, None].expand(-1, bias.shape[1], 1), bias], dim=-1)


class LinearAttention(nn.Module):
    """Of imagen-pytorch."""

    def __init__(self, dim, dim_head=8, n_heads=2, dropout=0.0, context_dim=None):
        super().__init__()
        self.scale, self.heads, inner = dim_head**-0.5, n_heads, dim_head * n_heads
        self.norm, self.nonlin = LayerNorm(dim, dim=-3), nn.SiLU()
        self.to_q, self.to_k, self.to_v = (
            nn.Sequential(nn.Dropout(dropout), nn.Conv2d(dim, inner, 1), nn.Conv2d(inner, inner, 3, padding=1, groups=inner))
            for _ in range(3)
        )  # fmt: skip
        self.to_context = (
            nn.Sequential(nn.LayerNorm(context_dim), nn.Linear(context_dim, 2 * inner)) if context_dim else None
        )
        self.to_out = nn.Sequential(nn.Conv2d(inner, dim, 1, bias=False), LayerNorm(dim, dim=-3))

    def forward(self, fmap, context=None):
        fmap = self.norm(fmap)
        q, k, v = (heads(tokens(to(fmap)), self.heads) for to in (self.to_q, self.to_k, self.to_v))
        if exists(context):
            of_context = (heads(t, self.heads) for t in self.to_context(context).chunk(2, dim=-1))
            k, v = (torch.cat(pair, 2) for pair in zip((k, v), of_context, strict=True))
        y = q.softmax(3) * self.scale @ (k.softmax(2).transpose(2, 3) @ v)
        return self.to_out(self.nonlin(y.transpose(2, 3).flatten(1, 2).unflatten(2, fmap.shape[2:])))


imagen = project(
    LayerNorm=LayerNorm, ChanRMSNorm=ChanRMSNorm, Block=Block, CrossAttention=CrossAttention, Attention=Attention,
    LinearCrossAttention=LinearCrossAttention, LinearAttention=LinearAttention,
)  # fmt: skip


imagen_video = project(
    LayerNorm=VideoLayerNorm, ChanLayerNorm=VideoChanLayerNorm, Conv3d=CausalConv3d, Block=VideoBlock,
    Attention=VideoAttention,
)  # fmt: skip
