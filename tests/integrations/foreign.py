"""Modules as other projects write them, in our words: what stand-ins know them by are their names, attributes and arguments."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class GroupNorm32(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x.float(), self.num_groups, self.weight, self.bias, self.eps).to(x.dtype)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="nearest")


class ResBlock(nn.Module):
    """Of guided-diffusion."""

    def __init__(
        self, channels, emb_channels, out_channels=None, dropout=0.0, scale_shift=False, up=False, dims=2, ckpt=False
    ):
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d}[dims]
        out = out_channels or channels
        self.use_scale_shift_norm, self.updown, self.use_checkpoint = scale_shift, up, ckpt
        self.in_layers = nn.Sequential(GroupNorm32(4, channels), nn.SiLU(), conv(channels, out, 3, padding=1))
        self.h_upd, self.x_upd = (Twice(), Twice()) if up else (nn.Identity(), nn.Identity())
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out * (2 if scale_shift else 1)))
        self.out_layers = nn.Sequential(
            GroupNorm32(4, out), nn.SiLU(), nn.Dropout(dropout), conv(out, out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if out == channels else conv(channels, out, 1)

    def forward(self, x, emb):
        return checkpoint(self._forward, x, emb, use_reentrant=False) if self.use_checkpoint else self._forward(x, emb)

    def _forward(self, x, emb):
        norm, active, conv = self.in_layers
        h, x = conv(self.h_upd(active(norm(x)))), self.x_upd(x)
        e = self.emb_layers(emb).to(h.dtype)
        e = e.reshape(*e.shape, *[1] * (h.dim() - 2))
        norm, active, dropout, conv = self.out_layers
        if self.use_scale_shift_norm:
            scale, shift = e.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + e)
        return self.skip_connection(x) + conv(dropout(active(h)))


class QKVAttentionLegacy(nn.Module):
    def __init__(self, n_heads):
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv):
        n, width, length = qkv.shape
        q, k, v = qkv.reshape(n * self.n_heads, 3, width // 3 // self.n_heads, length).unbind(1)
        return _attended(q, k, v).reshape(n, -1, length)


class QKVAttention(nn.Module):
    def __init__(self, n_heads):
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv):
        n, _, length = qkv.shape
        q, k, v = (t.reshape(n * self.n_heads, -1, length) for t in qkv.chunk(3, dim=1))
        return _attended(q, k, v).reshape(n, -1, length)


def _attended(q, k, v):
    weight = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(q.shape[1]), dim=-1)
    return v @ weight.transpose(1, 2)


class ResnetBlock(nn.Module):
    """Of latent-diffusion's autoencoder."""

    def __init__(self, in_channels, out_channels, temb_channels=0, dropout=0.0, conv_shortcut=False):
        super().__init__()
        self.in_channels, self.out_channels, self.use_conv_shortcut = in_channels, out_channels, conv_shortcut
        self.norm1 = nn.GroupNorm(4, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if temb_channels:
            self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = nn.GroupNorm(4, out_channels, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels and conv_shortcut:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        elif in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, temb):
        h = self.conv1(F.silu(self.norm1(x)))
        if temb is not None:
            h = h + self.temb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        if self.in_channels != self.out_channels:
            x = self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x)
        return x + h


class AttnBlock(nn.Module):
    def __init__(self, in_channels):
        super().__init__()
        self.norm = nn.GroupNorm(4, in_channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(in_channels, in_channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2) for conv in (self.q, self.k, self.v))
        return x + self.proj_out(_attended(q, k, v).reshape(x.shape))


class CrossAttention(nn.Module):
    def __init__(self, query_dim, context_dim, heads=2, dim_head=8):
        super().__init__()
        inner = heads * dim_head
        self.scale, self.heads = dim_head**-0.5, heads
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim), nn.Dropout(0.0))

    def forward(self, x, context=None, mask=None):
        context = x if context is None else context
        n, length, _ = x.shape
        q, k, v = (to(of).reshape(n, -1, self.heads, to.out_features // self.heads).transpose(1, 2)
                   for to, of in ((self.to_q, x), (self.to_k, context), (self.to_v, context)))  # fmt: skip
        scores = q @ k.transpose(2, 3) * self.scale
        if mask is not None:
            scores = scores.masked_fill(~mask.reshape(n, 1, 1, -1), -torch.finfo(scores.dtype).max)
        return self.to_out((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, length, -1))


class Upsample(nn.Module):
    """Of guided-diffusion (``use_conv``) and of latent-diffusion (``with_conv``)."""

    def __init__(self, channels, use_conv=None, with_conv=None, dims=2):
        super().__init__()
        self.channels, self.dims = channels, dims
        if use_conv is None:
            self.with_conv = with_conv
        else:
            self.use_conv = use_conv
        if use_conv or with_conv:
            self.conv = {1: nn.Conv1d, 2: nn.Conv2d}[dims](channels, channels, 3, padding=1)

    def forward(self, x):
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x) if hasattr(self, "conv") else x


class GEGLU(nn.Module):
    def __init__(self, dim_in, dim_out):
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x):
        h, gate = self.proj(x).chunk(2, dim=-1)
        return h * F.gelu(gate)


class RMSNorm(nn.Module):
    """Of denoising-diffusion-pytorch."""

    def __init__(self, dim):
        super().__init__()
        self.scale = dim**0.5
        self.g = nn.Parameter(torch.ones(1, dim, 1, 1))

    def forward(self, x):
        return F.normalize(x, dim=1) * self.g * self.scale


class Block(nn.Module):
    """Of denoising-diffusion-pytorch."""

    def __init__(self, dim, dim_out, dropout=0.0):
        super().__init__()
        self.proj = nn.Conv2d(dim, dim_out, 3, padding=1)
        self.norm = RMSNorm(dim_out)
        self.act = nn.SiLU()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, scale_shift=None):
        x = self.norm(self.proj(x))
        if scale_shift is not None:
            scale, shift = scale_shift
            x = x * (scale + 1) + shift
        return self.dropout(self.act(x))


class Attend(nn.Module):
    """Of denoising-diffusion-pytorch."""

    def __init__(self, dropout=0.0, scale=None):
        super().__init__()
        self.dropout, self.scale, self.flash = dropout, scale, False

    def forward(self, q, k, v):
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        return F.dropout((q @ k.transpose(2, 3) * scale).softmax(-1), self.dropout, self.training) @ v


class LinearAttention(nn.Module):
    """Of denoising-diffusion-pytorch."""

    def __init__(self, dim, heads=2, dim_head=8, num_mem_kv=3):
        super().__init__()
        self.scale, self.heads = dim_head**-0.5, heads
        self.norm = RMSNorm(dim)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, dim_head, num_mem_kv))
        self.to_qkv = nn.Conv2d(dim, 3 * heads * dim_head, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(heads * dim_head, dim, 1), RMSNorm(dim))

    def forward(self, x):
        n, _, height, width = x.shape
        q, k, v = self.to_qkv(self.norm(x)).reshape(n, 3, self.heads, -1, height * width).unbind(1)
        k, v = (torch.cat([m.expand(n, -1, -1, -1), t], dim=-1) for m, t in zip(self.mem_kv, (k, v), strict=True))
        context = k.softmax(-1) @ v.transpose(2, 3)
        out = context.transpose(2, 3) @ (q.softmax(-2) * self.scale)
        return self.to_out(out.reshape(n, -1, height, width))
