"""`CausalTransformerLayer`: causal self-attention and an MLP over a sequence, whole or by and by with kept keys and values.

The layer of GPT-2 (norm first), with the names of `ml-tarflow`: `attention.{norm,qkv,proj}`, `mlp.{norm,main.0,main.2}`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import attention
from .layer_norm import LayerNorm


class KeyValueCache:
    """Keys and values of the tokens so far, [N, heads, T, head_channels], in memory taken once.

    ``length`` tokens count; setting it lower forgets those behind. Where gradients are wanted keys and values are put together
    anew each time, since what autograd has kept must not be written over.

    Args:
        tokens: T, the most that there will be.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens, self.length = tokens, 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """[N, heads, S, head_channels] of the next S tokens -> views of all so far."""
        first, self.length = self.length, self.length + keys.shape[2]
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
            if self._keys is not None and self._values is not None:
                keys = torch.cat([self._keys[:, :, :first], keys], 2)
                values = torch.cat([self._values[:, :, :first], values], 2)
            self._keys, self._values = keys, values
            return keys, values
        if self._keys is None or self._values is None:
            shape = (*keys.shape[:2], self.tokens, keys.shape[3])
            self._keys, self._values = keys.new_empty(shape), values.new_empty(shape)
        self._keys[:, :, first : self.length] = keys
        self._values[:, :, first : self.length] = values
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]


class CausalSelfAttention(nn.Module):
    """Attention of each token over itself and those before it, of the normalised input.

    Args:
        channels: C.
        head_channels: of a head; divides C.
    """

    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        self.heads = channels // head_channels
        self.norm = LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None, query_scale: Tensor | None = None) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if query_scale is not None:
            query = query * query_scale
        mask = None
        if cache is not None:
            key, value = cache.append(key, value)
            new, all_of_them = query.shape[2], key.shape[2]
            if 1 < new < all_of_them:
                mask = torch.ones(new, all_of_them, dtype=torch.bool, device=x.device).tril(all_of_them - new)
        whole = query.shape[2] == key.shape[2]
        y = attention(query, key, value, mask, is_causal=whole)
        return self.proj(y.transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.norm = LayerNorm(channels)
        self.main = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """s + main(norm(s)) with s = x + residual."""
        normed, total = self.norm(x, residual=residual)
        return total + self.main(normed)


class CausalTransformerLayer(nn.Module):
    """[N, T, C] -> [N, T, C], of which token t depends on the tokens up to it.

    .. math:: h = x + \\mathrm{attention}(\\mathrm{norm}(x)), \\qquad y = h + \\mathrm{mlp}(\\mathrm{norm}(h))

    Args:
        channels: C.
        head_channels: of a head of the attention; divides C.
        expansion: the MLP has ``expansion * channels`` hidden units.

    Sources: Radford et al. 2019 (GPT-2); Zhai et al. 2024 (TarFlow).
    """

    def __init__(self, channels: int, head_channels: int = 64, expansion: int = 4) -> None:
        super().__init__()
        self.attention = CausalSelfAttention(channels, head_channels)
        self.mlp = _MLP(channels, expansion * channels)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None, query_scale: Tensor | None = None) -> Tensor:
        """``x`` is the whole sequence or, with a ``cache``, the tokens that follow those in it.

        Args:
            x: [N, S, C].
            cache: of this layer; the tokens of ``x`` are added to it.
            query_scale: broadcasts to [N, heads, S, head_channels]: one over a temperature of the attention.
        """
        return self.mlp(self.attention(x, cache, query_scale), x)

    def matrices(self) -> list[Any]:
        """Weights as :func:`fastgen.ops.causal_transformer_inverse` takes them."""
        return [self.attention.qkv.weight, self.attention.proj.weight, self.mlp.main[0].weight, self.mlp.main[2].weight]

    def vectors(self) -> list[Any]:
        """Parameters as :func:`fastgen.ops.causal_transformer_inverse` takes them."""
        attention, mlp = self.attention, self.mlp
        up, down = mlp.main[0], mlp.main[2]
        of_attention = [attention.norm.weight, attention.norm.bias, attention.qkv.bias, attention.proj.bias]
        return [*of_attention, mlp.norm.weight, mlp.norm.bias, up.bias, down.bias]
