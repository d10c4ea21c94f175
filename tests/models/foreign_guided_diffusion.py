"""The structure of guided-diffusion's U-Net: the names of its weights, and what it computes, in plain torch."""

import math

import torch
import torch.nn.functional as F
from torch import nn

GROUPS = 32


class ResBlock(nn.Module):
    def __init__(self, c, k, embedding, scale_shift=False, resample=None):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.ModuleDict({"0": nn.GroupNorm(GROUPS, c), "2": nn.Conv2d(c, k, 3, padding=1)})
        self.emb_layers = nn.ModuleDict({"1": nn.Linear(embedding, 2 * k if scale_shift else k)})
        self.out_layers = nn.ModuleDict({"0": nn.GroupNorm(GROUPS, k), "3": nn.Conv2d(k, k, 3, padding=1)})
        self.skip_connection = nn.Identity() if c == k else nn.Conv2d(c, k, 1)

    def forward(self, x, embedding, context):
        h = F.silu(self.in_layers["0"](x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.in_layers["2"](h)
        e = self.emb_layers["1"](F.silu(embedding))[:, :, None, None]
        if self.scale_shift:
            scale, shift = e.chunk(2, 1)
            h = self.out_layers["0"](h) * (1 + scale) + shift
        else:
            h = self.out_layers["0"](h + e)
        return self.skip_connection(x) + self.out_layers["3"](F.silu(h))


class AttentionBlock(nn.Module):
    """Rows of ``qkv``: of each head q, k and v, or in the new order q, k and v, each of all heads."""

    def __init__(self, c, heads, new_order=False):
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = nn.GroupNorm(GROUPS, c)
        self.qkv = nn.Conv1d(c, 3 * c, 1)
        self.proj_out = nn.Conv1d(c, c, 1)

    def forward(self, x, embedding, context):
        qkv = self.qkv(self.norm(x).flatten(2))
        if self.new_order:
            q, k, v = qkv.unflatten(1, (3, self.heads, -1)).unbind(1)
        else:
            q, k, v = qkv.unflatten(1, (self.heads, 3, -1)).unbind(2)
        weights = (q.mT @ k / math.sqrt(q.shape[2])).softmax(-1)
        return x + self.proj_out((v @ weights.mT).flatten(1, 2)).view_as(x)


class Downsample(nn.Module):
    def __init__(self, c, use_conv):
        super().__init__()
        self.op = nn.Conv2d(c, c, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)

    def forward(self, x, embedding, context):
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, c, use_conv):
        super().__init__()
        if use_conv:
            self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x, embedding, context):
        x = doubled(x)
        return self.conv(x) if hasattr(self, "conv") else x


class First(nn.Conv2d):
    def forward(self, x, embedding, context):
        return super().forward(x)


class UNetModel(nn.Module):
    """``attention(channels, level)`` makes what follows the residual blocks of the levels ``attended`` and of the middle, None."""

    def __init__(
        self, inputs, width, outputs, attention, *, mults=(1, 2), blocks=1, attended=(1,), label_emb=None,
        scale_shift=False, updown=False, conv_resample=True,
    ):  # fmt: skip
        super().__init__()
        self.width, e = width, 4 * width
        self.time_embed = nn.Sequential(nn.Linear(width, e), nn.SiLU(), nn.Linear(e, e))
        self.label_emb = label_emb
        halved = nn.AvgPool2d(2)

        def resblock(c, k, resample=None):
            return ResBlock(c, k, e, scale_shift, resample)

        def attending(c, level):
            return [attention(c, level)] if level in (None, *attended) else []

        widths = [int(m * width) for m in mults]
        c = widths[0]
        skips, self.input_blocks = [c], nn.ModuleList([nn.ModuleList([First(inputs, c, 3, padding=1)])])
        for level, k in enumerate(widths):
            for _ in range(blocks):
                self.input_blocks.append(nn.ModuleList([resblock(c, k), *attending(k, level)]))
                c = k
                skips.append(c)
            if level + 1 < len(widths):
                down = resblock(c, c, halved) if updown else Downsample(c, conv_resample)
                self.input_blocks.append(nn.ModuleList([down]))
                skips.append(c)
        self.middle_block = nn.ModuleList([resblock(c, c), *attending(c, None), resblock(c, c)])
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for i in range(blocks + 1):
                layers = [resblock(c + skips.pop(), widths[level]), *attending(widths[level], level)]
                c = widths[level]
                if level and i == blocks:
                    layers.append(resblock(c, c, doubled) if updown else Upsample(c, conv_resample))
                self.output_blocks.append(nn.ModuleList(layers))
        self.out = nn.Sequential(nn.GroupNorm(GROUPS, c), nn.SiLU(), nn.Conv2d(c, outputs, 3, padding=1))

    def forward(self, x, timesteps, context=None, y=None):
        frequencies = 10000.0 ** (-torch.arange(self.width // 2, dtype=x.dtype) / (self.width // 2))
        angles = timesteps[:, None].to(x.dtype) * frequencies
        embedding = self.time_embed(torch.cat([angles.cos(), angles.sin()], 1))
        if self.label_emb is not None:
            embedding = embedding + self.label_emb(y)

        def through(layers, h):
            for layer in layers:
                h = layer(h, embedding, context)
            return h

        skips = [x]
        for layers in self.input_blocks:
            skips.append(through(layers, skips[-1]))
        h = through(self.middle_block, skips[-1])
        for layers in self.output_blocks:
            h = through(layers, torch.cat([h, skips.pop()], 1))
        return self.out(h)


def doubled(x):
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)
