"""Modules as DALLE2-pytorch writes them, in our words: of its prior, and of its decoder."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .foreign_lucidrains import EPS, attended, exists, heads, layer_norm, project, spread, tokens, with_null


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


dalle2 = project(
    LayerNorm=PriorLayerNorm, ChanLayerNorm=DecoderChanLayerNorm, Block=DecoderBlock, ResnetBlock=DecoderResnetBlock,
    CrossAttention=DecoderCrossAttention, Attention=PriorAttention, LinearAttention=DecoderLinearAttention,
)  # fmt: skip
