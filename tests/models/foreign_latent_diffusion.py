"""The structure of the transformers in the U-Nets of latent-diffusion, Stable Diffusion and sgm: the names of their weights, and
what they compute, in plain torch. The rest of those U-Nets is guided-diffusion's."""

import math

import torch
import torch.nn.functional as F
from torch import nn

GROUPS = 32


class Attention(nn.Module):
    def __init__(self, c, of, heads):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(d, c, bias=False) for d in (c, of, of))
        self.to_out = nn.Sequential(nn.Linear(c, c), nn.Dropout(0.0))

    def forward(self, x, of):
        heads = []
        parts = (self.to_q(x), self.to_k(of), self.to_v(of))
        for q, k, v in zip(*(part.chunk(self.heads, 2) for part in parts), strict=True):
            heads.append((q @ k.mT / math.sqrt(q.shape[2])).softmax(-1) @ v)
        return self.to_out(torch.cat(heads, 2))


class Gate(nn.Module):
    def __init__(self, c, k):
        super().__init__()
        self.proj = nn.Linear(c, 2 * k)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.net = nn.Sequential(Gate(c, 4 * c), nn.Dropout(0.0), nn.Linear(4 * c, c))

    def forward(self, x):
        return self.net(x)


class Block(nn.Module):
    def __init__(self, c, context, heads):
        super().__init__()
        self.attn1, self.attn2, self.ff = Attention(c, c, heads), Attention(c, context, heads), FeedForward(c)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(c) for _ in range(3))

    def forward(self, x, context):
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, c, context, heads, depth=1, linear=False):
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(GROUPS, c, eps=1e-6)
        self.proj_in, self.proj_out = (nn.Linear(c, c) if linear else nn.Conv2d(c, c, 1) for _ in range(2))
        self.transformer_blocks = nn.ModuleList(Block(c, context, heads) for _ in range(depth))

    def forward(self, x, embedding, context):
        h = self.norm(x)
        h = self.proj_in(h.movedim(1, 3)) if self.linear else self.proj_in(h).movedim(1, 3)  # [N, H, W, C]
        tokens = h.flatten(1, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        h = tokens.unflatten(1, x.shape[2:])
        return x + (self.proj_out(h).movedim(3, 1) if self.linear else self.proj_out(h.movedim(3, 1)))


def vector_embedding(adm, embedding):
    """sgm's ``label_emb`` of vectors."""
    return nn.Sequential(nn.Sequential(nn.Linear(adm, embedding), nn.SiLU(), nn.Linear(embedding, embedding)))
