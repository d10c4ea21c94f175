"""Modules as imagen-pytorch, DALLE2-pytorch and make-a-video-pytorch write them, in our words. Where two of them have a class of a
name, each project's stands in a namespace of its own."""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

EPS = {torch.float32: 1e-5}  # of layer norms, in other dtypes 1e-3


def exists(value):
    return value is not None


def layer_norm(x, dim, eps):
    return (x - x.mean(dim, keepdim=True)) * (x.var(dim, unbiased=False, keepdim=True) + eps).rsqrt()


def spread(t, x):
    """[N, C] over the positions of x."""
    return t.reshape(*t.shape, *[1] * (x.dim() - 2))


def tokens(x):
    return x.flatten(2).transpose(1, 2)


def heads(t, n):
    return t.unflatten(2, (n, -1)).transpose(1, 2)


def attended(q, k, v, scale, bias=None, causal=False, mask=None, dropout=None):
    scores = q @ k.transpose(2, 3) * scale
    if exists(bias):
        scores = scores + bias
    if exists(mask):
        scores = scores.masked_fill(~F.pad(mask, (1, 0), value=True)[:, None, None, :], -torch.finfo(scores.dtype).max)
    if causal:
        i, j = scores.shape[2:]
        scores = scores.masked_fill(torch.ones(i, j).triu(j - i + 1).bool(), -torch.finfo(scores.dtype).max)
    weights = scores.softmax(-1)
    return ((dropout(weights) if exists(dropout) else weights) @ v).transpose(1, 2).flatten(2)


def with_null(null_kv, k, v):
    return (torch.cat([null.expand(*t.shape[:2], 1, -1), t], 2) for null, t in zip(null_kv, (k, v), strict=True))


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


class PriorLayerNorm(nn.Module):
    def __init__(self, dim, eps=1e-5, fp16_eps=1e-3, stable=False):
        super().__init__()
        self.eps, self.fp16_eps, self.stable = eps, fp16_eps, stable
        self.g = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return layer_norm(x, -1, self.eps if x.dtype in EPS else self.fp16_eps) * self.g


class DecoderChanLayerNorm(nn.Module):
    def __init__(self, dim, eps=1e-5, fp16_eps=1e-3, stable=False):
        super().__init__()
        self.eps, self.fp16_eps, self.stable = eps, fp16_eps, stable
        self.g = nn.Parameter(torch.ones(1, dim, 1, 1))

    def forward(self, x):
        return layer_norm(x, 1, self.eps if x.dtype in EPS else self.fp16_eps) * self.g


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


def of_frames(conv, x):
    if x.dim() == 4:
        return conv(x)
    return conv(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)


def of_pixels(conv, x):
    n, _, _, h, w = x.shape
    return conv(x.permute(0, 3, 4, 1, 2).flatten(0, 2)).unflatten(0, (n, h, w)).permute(0, 3, 4, 1, 2)


class PseudoConv3d(nn.Module):
    """Of make-a-video-pytorch."""

    def __init__(self, dim, dim_out, kernel_size=3, temporal_kernel_size=None, stride=1):
        super().__init__()
        along = temporal_kernel_size or kernel_size
        self.spatial_conv = nn.Conv2d(dim, dim_out, kernel_size, padding=kernel_size // 2)
        self.temporal_conv = nn.Conv1d(dim_out, dim_out, along, stride, padding=along // 2) if kernel_size > 1 else None

    def forward(self, x, enable_time=True):
        x = of_frames(self.spatial_conv, x)
        return of_pixels(self.temporal_conv, x) if x.dim() == 5 and enable_time and self.temporal_conv else x


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


class DecoderBlock(nn.Module):
    def __init__(self, dim, dim_out, groups=4, activation=nn.SiLU):
        super().__init__()
        self.project, self.norm = nn.Conv2d(dim, dim_out, 3, padding=1), nn.GroupNorm(groups, dim_out)
        self.act = activation()

    def forward(self, x, scale_shift=None):
        x = self.norm(self.project(x))
        if exists(scale_shift):
            x = x * (scale_shift[0] + 1) + scale_shift[1]
        return self.act(x)


class DecoderResnetBlock(nn.Module):
    def __init__(self, dim, dim_out, cond_dim=None, time_cond_dim=None):
        super().__init__()
        self.time_mlp = nn.Sequential(nn.SiLU(), nn.Linear(time_cond_dim, 2 * dim_out)) if time_cond_dim else None
        self.cross_attn = DecoderCrossAttention(dim_out, cond_dim, 8, 2) if cond_dim else None
        self.block1, self.block2 = dalle2.Block(dim, dim_out), dalle2.Block(dim_out, dim_out)
        self.res_conv = nn.Conv2d(dim, dim_out, 1) if dim != dim_out else nn.Identity()

    def forward(self, x, time_emb=None, cond=None):
        of_norm = None
        if exists(self.time_mlp) and exists(time_emb):
            of_norm = spread(self.time_mlp(time_emb), x).chunk(2, dim=1)
        h = self.block1(x, scale_shift=of_norm)
        if exists(self.cross_attn):
            h = (self.cross_attn(tokens(h), context=cond) + tokens(h)).transpose(1, 2).reshape(h.shape)
        return self.block2(h) + self.res_conv(x)


class VideoRMSNorm(nn.Module):
    def __init__(self, chan, dim=1):
        super().__init__()
        self.dim = dim
        self.gamma = nn.Parameter(torch.ones(chan))

    def forward(self, x):
        ones = x.dim() - 1 - self.dim if self.dim >= 0 else -self.dim - 1
        return F.normalize(x, dim=self.dim) * x.shape[self.dim] ** 0.5 * self.gamma.reshape(-1, *[1] * ones)


class MakeAVideoBlock(nn.Module):
    def __init__(self, dim, dim_out):
        super().__init__()
        self.project, self.norm, self.act = PseudoConv3d(dim, dim_out), make_a_video.RMSNorm(dim_out), nn.SiLU()

    def forward(self, x, scale_shift=None, enable_time=False):
        x = self.norm(self.project(x, enable_time=enable_time))
        if exists(scale_shift):
            x = x * (scale_shift[0] + 1) + scale_shift[1]
        return self.act(x)


class Attend(nn.Module):
    """Of make-a-video-pytorch."""

    def __init__(self, dropout=0.0, flash=False, causal=False):
        super().__init__()
        self.dropout, self.attn_dropout, self.causal, self.flash = dropout, nn.Dropout(dropout), causal, flash

    def forward(self, q, k, v, bias=None):
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
        if exists(bias):
            scores = scores + bias
        if self.causal:
            i, j = scores.shape[2:]
            scores = scores.masked_fill(torch.ones(i, j).triu(j - i + 1).bool(), -torch.finfo(scores.dtype).max)
        return self.attn_dropout(scores.softmax(-1)) @ v


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


class DecoderCrossAttention(nn.Module):
    def __init__(self, dim, context_dim, dim_head=8, n_heads=2, cosine_sim=False):
        super().__init__()
        self.cosine_sim, self.scale, self.heads = cosine_sim, 16 if cosine_sim else dim_head**-0.5, n_heads
        self.norm, self.norm_context, self.dropout = dalle2.LayerNorm(dim), nn.Identity(), nn.Dropout(0.0)
        self.null_kv = nn.Parameter(torch.randn(2, dim_head))
        self.to_q = nn.Linear(dim, dim_head * n_heads, bias=False)
        self.to_kv = nn.Linear(context_dim, 2 * dim_head * n_heads, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim_head * n_heads, dim, bias=False), dalle2.LayerNorm(dim))

    def forward(self, x, context, mask=None):
        k, v = self.to_kv(self.norm_context(context)).chunk(2, dim=-1)
        k, v = with_null(self.null_kv, heads(k, self.heads), heads(v, self.heads))
        q = heads(self.to_q(self.norm(x)), self.heads)
        if self.cosine_sim:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return self.to_out(attended(q, k, v, self.scale, mask=mask))


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


class Rotary(nn.Module):
    def rotate_queries_or_keys(self, t):
        angle = torch.arange(t.shape[-2], dtype=t.dtype)[:, None] / 10
        a, b = t.chunk(2, dim=-1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


class PriorAttention(nn.Module):
    def __init__(self, dim, dim_head=8, n_heads=2, dropout=0.0, causal=False, rotary_emb=None, cosine_sim=True):
        super().__init__()
        self.scale, self.cosine_sim, self.heads, self.causal = 16 if cosine_sim else 0.6, cosine_sim, n_heads, causal
        self.norm, self.dropout, self.rotary_emb = dalle2.LayerNorm(dim), nn.Dropout(dropout), rotary_emb
        self.null_kv = nn.Parameter(torch.randn(2, dim_head))
        self.to_q, self.to_kv = nn.Linear(dim, dim_head * n_heads, bias=False), nn.Linear(dim, 2 * dim_head, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim_head * n_heads, dim, bias=False), dalle2.LayerNorm(dim))

    def forward(self, x, mask=None, attn_bias=None):
        x = self.norm(x)
        q, (k, v) = heads(self.to_q(x), self.heads) * self.scale, self.to_kv(x).chunk(2, dim=-1)
        if exists(self.rotary_emb):
            q, k = map(self.rotary_emb.rotate_queries_or_keys, (q, k))
        k, v = with_null(self.null_kv, heads(k, 1), heads(v, 1))
        if self.cosine_sim:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        q, k = q * math.sqrt(self.scale), k * math.sqrt(self.scale)
        return self.to_out(attended(q, k, v, 1.0, attn_bias, self.causal, mask, self.dropout))


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


class DecoderLinearAttention(nn.Module):
    def __init__(self, dim, dim_head=8, n_heads=2):
        super().__init__()
        self.scale, self.heads, inner = dim_head**-0.5, n_heads, dim_head * n_heads
        self.norm, self.nonlin = dalle2.ChanLayerNorm(dim), nn.GELU()
        self.to_qkv = nn.Conv2d(dim, 3 * inner, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(inner, dim, 1, bias=False), dalle2.ChanLayerNorm(dim))

    def forward(self, fmap):
        q, k, v = (heads(tokens(t), self.heads) for t in self.to_qkv(self.norm(fmap)).chunk(3, dim=1))
        k, v = k.softmax(2) / math.sqrt(k.shape[2]), F.normalize(v, dim=-1) / math.sqrt(k.shape[2])
        y = q.softmax(3) * self.scale @ (k.transpose(2, 3) @ v)
        return self.to_out(self.nonlin(y.transpose(2, 3).flatten(1, 2).unflatten(2, fmap.shape[2:])))


def project(**classes):
    """Classes under the names that they have in a project."""
    for name, kind in classes.items():
        kind.__name__ = name
    return SimpleNamespace(**classes)


imagen = project(
    LayerNorm=LayerNorm, ChanRMSNorm=ChanRMSNorm, Block=Block, CrossAttention=CrossAttention, Attention=Attention,
    LinearCrossAttention=LinearCrossAttention, LinearAttention=LinearAttention,
)  # fmt: skip
imagen_video = project(
    LayerNorm=VideoLayerNorm, ChanLayerNorm=VideoChanLayerNorm, Conv3d=CausalConv3d, Block=VideoBlock,
    Attention=VideoAttention,
)  # fmt: skip
dalle2 = project(
    LayerNorm=PriorLayerNorm, ChanLayerNorm=DecoderChanLayerNorm, Block=DecoderBlock, ResnetBlock=DecoderResnetBlock,
    CrossAttention=DecoderCrossAttention, Attention=PriorAttention, LinearAttention=DecoderLinearAttention,
)  # fmt: skip
make_a_video = project(RMSNorm=VideoRMSNorm, Block=MakeAVideoBlock, Attend=Attend, PseudoConv3d=PseudoConv3d)
