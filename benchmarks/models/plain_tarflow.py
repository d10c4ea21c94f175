"""TarFlow's way back from the latent as ml-tarflow publishes it, in plain torch: what a user of that project runs.

Module by module, a token at a time; keys and values are kept in lists, and put together for every token and layer. Names of weights
are those of ml-tarflow, so that a state dict loads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.heads = channels // head_channels
        self.scale = head_channels**-0.5
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        n, length, channels = x.shape
        x = self.norm(x.float()).type(x.dtype)
        q, k, v = self.qkv(x).reshape(n, length, 3 * self.heads, -1).transpose(1, 2).chunk(3, dim=1)
        self.keys.append(k)
        self.values.append(v)
        k, v = torch.cat(self.keys, dim=2), torch.cat(self.values, dim=2)
        x = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj(x.transpose(1, 2).reshape(n, length, channels))


class MLP(nn.Module):
    def __init__(self, channels: int, expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.main = nn.Sequential(
            nn.Linear(channels, expansion * channels), nn.GELU(), nn.Linear(expansion * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.main(self.norm(x.float()).type(x.dtype))


class Layer(nn.Module):
    def __init__(self, channels: int, head_channels: int, expansion: int) -> None:
        super().__init__()
        self.attention = Attention(channels, head_channels)
        self.mlp = MLP(channels, expansion)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class Block(nn.Module):
    def __init__(
        self, features: int, tokens: int, channels: int, layers: int, classes: int | None, reverse: bool
    ) -> None:
        super().__init__()
        self.proj_in = nn.Linear(features, channels)
        self.pos_embed = nn.Parameter(torch.zeros(tokens, channels))
        self.class_embed = None if classes is None else nn.Parameter(torch.zeros(classes, 1, channels))
        self.attn_blocks = nn.ModuleList([Layer(channels, 64, 4) for _ in range(layers)])
        self.proj_out = nn.Linear(channels, 2 * features)
        self.turned = reverse

    def reverse(self, x: Tensor, labels: Tensor | None) -> Tensor:
        x = x.flip(1) if self.turned else x.clone()
        position = self.pos_embed.flip(0) if self.turned else self.pos_embed
        for layer in self.attn_blocks:
            layer.attention.keys, layer.attention.values = [], []  # type: ignore[union-attr, assignment]
        for i in range(x.shape[1] - 1):
            h = self.proj_in(x[:, i : i + 1]) + position[i : i + 1]
            if self.class_embed is not None:
                h = h + (self.class_embed.mean(dim=0) if labels is None else self.class_embed[labels])
            for layer in self.attn_blocks:
                h = layer(h)
            a, b = self.proj_out(h).chunk(2, dim=-1)
            x[:, i + 1] = x[:, i + 1] * a[:, 0].float().exp().type(a.dtype) + b[:, 0]
        for layer in self.attn_blocks:
            layer.attention.keys, layer.attention.values = [], []  # type: ignore[union-attr, assignment]
        return x.flip(1) if self.turned else x


class PlainTarFlow(nn.Module):
    """``reverse`` alone, of the size that the arguments of :class:`fastgen.models.TarFlow` say."""

    def __init__(
        self, in_channels: int, image_size: int, patch_size: int, channels: int, *, num_blocks: int, layers_per_block: int,
        num_classes: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        features, tokens = in_channels * patch_size**2, (image_size // patch_size) ** 2
        self.image_size, self.patch_size = image_size, patch_size
        self.blocks = nn.ModuleList(
            [Block(features, tokens, channels, layers_per_block, num_classes, i % 2 == 1) for i in range(num_blocks)]
        )
        self.register_buffer("var", torch.ones(tokens, features))

    def reverse(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        """Images of normal noise [N, T, D]."""
        x = noise * self.var.sqrt()  # type: ignore[operator]
        for block in reversed(self.blocks):  # type: ignore[call-overload]
            x = block.reverse(x, labels)
        return F.fold(x.transpose(1, 2), (self.image_size, self.image_size), self.patch_size, stride=self.patch_size)
