"""Modules as k-diffusion writes them, in our words: of its U-Net, and of both versions of its transformer."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class AdaGN(nn.Module):
    def __init__(self, feats_in, c_out, num_groups, eps=1e-5, cond_key="cond"):
        super().__init__()
        self.num_groups, self.eps, self.cond_key = num_groups, eps, cond_key
        self.mapper = nn.Linear(feats_in, 2 * c_out)

    def forward(self, input, cond):
        scale, shift = (
            t.reshape(*t.shape, *[1] * (input.dim() - 2)) for t in self.mapper(cond[self.cond_key]).chunk(2, dim=-1)
        )
        return F.group_norm(input, self.num_groups, eps=self.eps) * (scale + 1) + shift


class ConditionedSequential(nn.Sequential):
    def forward(self, input, cond):
        for module in self:
            input = module(input, cond) if isinstance(module, AdaGN) else module(input)
        return input


class ConditionedResidualBlock(nn.Module):
    def __init__(self, *main, skip=None):
        super().__init__()
        self.main, self.skip = ConditionedSequential(*main), skip or nn.Identity()

    def forward(self, input, cond):
        return self.main(input, cond) + self.skip(input)


class ResConvBlock(ConditionedResidualBlock):
    def __init__(self, feats_in, c_in, c_out, dropout_rate=0.0, activation=nn.GELU):
        parts = []
        for i, o in ((c_in, c_out), (c_out, c_out)):
            conv, dropout = nn.Conv2d(i, o, 3, padding=1), nn.Dropout2d(dropout_rate, inplace=True)
            parts += [AdaGN(feats_in, i, 4), activation(), conv, dropout]
        super().__init__(*parts, skip=None if c_in == c_out else nn.Conv2d(c_in, c_out, 1, bias=False))


class Resample2d(nn.Module):
    def __init__(self, factor, kernel="linear", pad_mode="reflect"):
        super().__init__()
        taps = {"linear": [1, 3, 3, 1], "cubic": [-1.5, -4.5, 14.5, 55.5, 55.5, 14.5, -4.5, -1.5]}[kernel]
        taps = factor * torch.tensor(taps) / sum(taps)
        self.pad, self.pad_mode = len(taps) // 2 - 1, pad_mode
        self.register_buffer("kernel", torch.outer(taps, taps))

    def of_all(self, x):
        return torch.eye(x.shape[1], dtype=x.dtype)[:, :, None, None] * self.kernel.to(x)


class Downsample2d(Resample2d):
    def __init__(self, kernel="linear", pad_mode="reflect"):
        super().__init__(1, kernel, pad_mode)

    def forward(self, x):
        x = F.pad(x, 4 * [self.pad], self.pad_mode)
        return F.conv2d(x, self.of_all(x), stride=2)


class Upsample2d(Resample2d):
    def __init__(self, kernel="linear", pad_mode="reflect"):
        super().__init__(2, kernel, pad_mode)

    def forward(self, x):
        x = F.pad(x, 4 * [(self.pad + 1) // 2], self.pad_mode)
        return F.conv_transpose2d(x, self.of_all(x), stride=2, padding=2 * self.pad + 1)


class SelfAttention2d(nn.Module):
    def __init__(self, c_in, n_head, norm, dropout_rate=0.0):
        super().__init__()
        self.norm_in, self.n_head = norm(c_in), n_head
        self.qkv_proj, self.out_proj = nn.Conv2d(c_in, 3 * c_in, 1), nn.Conv2d(c_in, c_in, 1)
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, input, cond):
        qkv = self.qkv_proj(self.norm_in(input, cond)).flatten(2).chunk(3, dim=1)
        q, k, v = (t.unflatten(1, (self.n_head, -1)).transpose(2, 3) for t in qkv)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout.p)
        return input + self.out_proj(y.transpose(2, 3).reshape(input.shape))


class CrossAttention2d(nn.Module):
    def __init__(self, c_dec, c_enc, n_head, norm_dec, dropout_rate=0.0):
        super().__init__()
        self.cond_key, self.cond_key_padding = "cross", "cross_padding"
        self.norm_enc, self.norm_dec, self.n_head = nn.LayerNorm(c_enc), norm_dec(c_dec), n_head
        self.q_proj, self.kv_proj = nn.Conv2d(c_dec, c_dec, 1), nn.Linear(c_enc, 2 * c_dec)
        self.out_proj, self.dropout = nn.Conv2d(c_dec, c_dec, 1), nn.Dropout(dropout_rate)

    def forward(self, input, cond):
        q = self.q_proj(self.norm_dec(input, cond)).flatten(2).unflatten(1, (self.n_head, -1)).transpose(2, 3)
        k, v = self.kv_proj(self.norm_enc(cond[self.cond_key])).chunk(2, dim=2)
        k, v = (t.unflatten(2, (self.n_head, -1)).transpose(1, 2) for t in (k, v))
        mask = cond[self.cond_key_padding][:, None, None, :] * -10000
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=self.dropout.p)
        return input + self.out_proj(y.transpose(2, 3).reshape(input.shape))


def rms_norm(x, scale, eps):
    return x * (scale * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


class RMSNorm(nn.Module):
    def __init__(self, shape, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(shape))

    def forward(self, x):
        return rms_norm(x, self.scale, self.eps)


class Linear(nn.Linear):
    pass


class AdaRMSNorm(nn.Module):
    """Of v1, or of v2."""

    def __init__(self, features, cond_features, eps=1e-6, version=1):
        super().__init__()
        self.eps = eps
        self.linear = (nn.Linear if version == 1 else Linear)(cond_features, features, bias=False)

    def forward(self, x, cond):
        scale = self.linear(cond)
        return rms_norm(x, (scale if type(self.linear) is nn.Linear else scale[:, None, None, :]) + 1, self.eps)


class LinearGEGLU(nn.Linear):
    def __init__(self, in_features, out_features, bias=True):
        super().__init__(in_features, 2 * out_features, bias=bias)

    def forward(self, x):
        h, gate = F.linear(x, self.weight, self.bias).chunk(2, dim=-1)
        return h * F.gelu(gate)


class GEGLU(nn.Module):
    def forward(self, x):
        h, gate = x.chunk(2, dim=-1)
        return h * F.gelu(gate)


class FeedForwardBlock(nn.Module):
    """Of v1, or of v2."""

    def __init__(self, d_model, d_ff, cond_features, dropout=0.0, version=1):
        super().__init__()
        self.norm = AdaRMSNorm(d_model, cond_features, version=version)
        if version == 1:
            self.up_proj, self.act = nn.Linear(d_model, 2 * d_ff, bias=False), GEGLU()
        else:
            self.up_proj = LinearGEGLU(d_model, d_ff, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x, cond):
        h = self.up_proj(self.norm(x, cond))
        if hasattr(self, "act"):
            h = self.act(h)
        return self.down_proj(self.dropout(h)) + x


class QKNorm(nn.Module):
    def __init__(self, n_heads):
        super().__init__()
        self.scale = nn.Parameter(torch.full((n_heads,), math.log(10.0)))

    def forward(self, x):
        return rms_norm(x, torch.exp(0.5 * self.scale)[:, None, None] / x.shape[-1] ** 0.25, 1e-6)


class Rotation(nn.Module):
    def forward(self, x, pos):
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * pos.cos() - b * pos.sin(), b * pos.cos() + a * pos.sin()), dim=-1)


class SelfAttentionBlock(nn.Module):
    """Of v1."""

    def __init__(self, d_model, d_head, dropout=0.0):
        super().__init__()
        self.d_head, self.n_heads = d_head, d_model // d_head
        self.norm = AdaRMSNorm(d_model, d_model)
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=False)
        self.qk_norm, self.pos_emb, self.dropout = QKNorm(self.n_heads), Rotation(), nn.Dropout(dropout)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x, pos, attn_mask, cond):
        q, k, v = (
            t.unflatten(2, (self.n_heads, -1)).transpose(1, 2)
            for t in self.qkv_proj(self.norm(x, cond)).chunk(3, dim=-1)
        )
        q, k = (self.pos_emb(self.qk_norm(t), pos) for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask)
        return self.out_proj(self.dropout(y.transpose(1, 2).flatten(2))) + x
