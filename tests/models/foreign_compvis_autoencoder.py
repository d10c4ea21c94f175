"""The structure of latent-diffusion's autoencoder: the names of its weights, and what it computes, in plain torch."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

GROUPS = 32


def norm(c):
    return nn.GroupNorm(GROUPS, c, eps=1e-6)


def conv(c, k):
    return nn.Conv2d(c, k, 3, padding=1)


class Block(nn.Module):
    def __init__(self, c, k):
        super().__init__()
        self.norm1, self.conv1, self.norm2, self.conv2 = norm(c), conv(c, k), norm(k), conv(k, k)
        if c != k:
            self.nin_shortcut = nn.Conv2d(c, k, 1)

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm = norm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (part(y).flatten(2) for part in (self.q, self.k, self.v))
        weights = (q.mT @ k / math.sqrt(x.shape[1])).softmax(-1)
        return x + self.proj_out((v @ weights.mT).view_as(x))


class Down(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        n, c, height, width = x.shape
        padded = x.new_zeros(n, c, height + 1, width + 1)
        padded[:, :, :height, :width] = x
        return self.conv(padded)


class Up(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = conv(c, c)

    def forward(self, x):
        return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


class Level(nn.Module):
    def __init__(self, c, k, blocks, attended, **resample):
        super().__init__()
        self.block = nn.ModuleList([Block(c if i == 0 else k, k) for i in range(blocks)])
        self.attn = nn.ModuleList([Attention(k) for _ in range(blocks if attended else 0)])
        for name, module in resample.items():
            self.add_module(name, module)

    def forward(self, x):
        for i, block in enumerate(self.block):
            x = block(x)
            x = self.attn[i](x) if self.attn else x
        for name in ("downsample", "upsample"):
            x = getattr(self, name, nn.Identity())(x)
        return x


class Middle(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = Block(c, c), Attention(c), Block(c, c)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, inputs, outputs, ch, mults, blocks, attended):
        super().__init__()
        self.conv_in = conv(inputs, ch)
        widths = [ch, *(ch * mult for mult in mults)]
        self.down = nn.ModuleList()
        for i, (c, k) in enumerate(pairwise(widths)):
            resample = {"downsample": Down(k)} if i + 1 < len(mults) else {}
            self.down.append(Level(c, k, blocks, i in attended, **resample))
        self.mid = Middle(widths[-1])
        self.norm_out, self.conv_out = norm(widths[-1]), conv(widths[-1], outputs)

    def forward(self, x):
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    def __init__(self, inputs, outputs, ch, mults, blocks, attended):
        super().__init__()
        widths = [ch * mult for mult in mults]
        self.conv_in = conv(inputs, widths[-1])
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for i, k in enumerate(widths):
            c = widths[min(i + 1, len(widths) - 1)]
            self.up.append(Level(c, k, blocks + 1, i in attended, **({"upsample": Up(k)} if i else {})))
        self.norm_out, self.conv_out = norm(widths[0]), conv(widths[0], outputs)

    def forward(self, z):
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class AutoencoderKL(nn.Module):
    """With ``logvar`` of a loss, as its checkpoints have; ``attended``: the numbers of the levels with attention."""

    def __init__(self, inputs=3, outputs=3, z=4, embed_dim=4, ch=32, mults=(1, 2), blocks=1, attended=()):
        super().__init__()
        sizes = (ch, mults, blocks, attended)
        self.encoder = Encoder(inputs, 2 * z, *sizes)
        self.decoder = Decoder(z, outputs, *sizes)
        self.loss = nn.ParameterDict({"logvar": torch.zeros(())})
        self.quant_conv = nn.Conv2d(2 * z, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z, 1)

    def moments(self, x):
        return self.quant_conv(self.encoder(x))

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z))
