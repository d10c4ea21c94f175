"""Self-attention over the positions of an image, as U-Nets and autoencoders have it between their residual blocks.

Ho et al. 2020 (one head); Dhariwal and Nichol 2021 (several); Rombach et al. 2022 (q, k and v apart).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import attention
from .group_norm import GroupNorm, PlainGroupNorm
from .resblock import zero_parameters


class SpatialAttention(nn.Module):
    r"""[N, C, H, W] -> the same: :math:`x + W_o\,\mathrm{softmax}(q k^T / \sqrt{d})\,v` with q, k, v linear in norm(x).

    Args:
        channels: C.
        num_heads: divides C; not used where ``num_head_channels`` is given.
        num_head_channels: d, the channels of one head; divides C.
        num_groups, eps: of the norm.
        zero_init: the output projection starts at zero, so that the block starts as the identity.
        norm: class or factory of the norm, called as :class:`fastgen.nn.GroupNorm`; beside :class:`fastgen.nn.PlainGroupNorm`
            the attention is torch's own too.

    The rows of ``qkv.weight`` are all of q, then all of k, then all of v, each ordered by head.

    Raises:
        ValueError: the heads do not divide the channels.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int = 1,
        num_head_channels: int | None = None,
        num_groups: int = 32,
        eps: float = 1e-5,
        zero_init: bool = True,
        norm: Callable[..., nn.Module] = GroupNorm,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.num_heads = heads_of("SpatialAttention", channels, num_heads, num_head_channels)
        self._plain = norm is PlainGroupNorm
        self.norm = norm(num_groups, channels, eps=eps)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        if zero_init:
            zero_parameters(self.proj)

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        y = self.norm(x).flatten(2)  # [N, C, S]
        if self._plain or y.stride(1) == 1 or not (is_bare(self.qkv) and is_bare(self.proj)):
            attended = self._of_tokens(y.transpose(1, 2)).transpose(1, 2)
        else:
            attended = self._of_channels(y)
        return x + attended.reshape(n, c, height, width)

    def _of_tokens(self, tokens: Tensor) -> Tensor:
        """[N, S, C] -> the same; no copy where the channels are innermost in memory."""
        qkv = self.qkv(tokens).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [N, heads, S, d], read where it lies
        attend = F.scaled_dot_product_attention if self._plain else attention
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))  # as the queries lie: no copy

    def _of_channels(self, y: Tensor) -> Tensor:
        """[N, C, S] -> the same, as contiguous images have it: no copy either, the products come transposed."""
        qkv = _transposed_linear(self.qkv, y).unflatten(1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(1, 0, 2, 4, 3)  # each [N, heads, S, d], in memory [N, heads, d, S]
        return _transposed_linear(self.proj, attention(q, k, v).transpose(2, 3).flatten(1, 2))

    def extra_repr(self) -> str:
        return f"{self.channels}, num_heads={self.num_heads}"


class SingleHeadAttention(nn.Module):
    r"""[N, C, H, W] -> the same: :math:`x + W_o\,\mathrm{softmax}(q k^T / \sqrt{C})\,v` with q, k, v linear in norm(x).

    Each is a layer of its own, as VQGAN and the autoencoder of latent diffusion have it, there as 1x1 convolutions.

    Args:
        channels: C.
        num_groups, eps: of the norm.
        norm: class or factory of the norm, called as :class:`fastgen.nn.GroupNorm`; beside
            :class:`fastgen.nn.PlainGroupNorm` the attention is torch's own too.
    """

    def __init__(
        self, channels: int, *, num_groups: int = 32, eps: float = 1e-6, norm: Callable[..., nn.Module] = GroupNorm
    ) -> None:
        super().__init__()
        self.channels = channels
        self._plain = norm is PlainGroupNorm
        self.norm = norm(num_groups, channels, eps=eps)
        self.q, self.k, self.v, self.proj_out = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x).flatten(2)  # [N, C, S]
        layers = (self.q, self.k, self.v, self.proj_out)
        by_tokens = self._plain or y.stride(1) == 1 or not all(map(is_bare, layers))
        linear = _linear_of_tokens if by_tokens else _transposed_linear
        q, k, v = (linear(layer, y).mT.unsqueeze(1) for layer in layers[:3])  # each [N, 1, S, C]
        attend = F.scaled_dot_product_attention if self._plain else attention
        attended = linear(self.proj_out, attend(q, k, v).squeeze(1).mT)  # as the queries lie: no copy
        return x + attended.unflatten(2, x.shape[2:])

    def extra_repr(self) -> str:
        return str(self.channels)


def heads_of(name: str, channels: int, num_heads: int, num_head_channels: int | None) -> int:
    """The number of heads of the module ``name``. Raises ValueError where they do not divide the channels."""
    if num_head_channels is not None:
        if num_head_channels < 1 or channels % num_head_channels:
            raise ValueError(
                f"{name}: num_head_channels must divide channels, got num_head_channels={num_head_channels} and "
                f"channels={channels}"
            )
        return channels // num_head_channels
    if num_heads < 1 or channels % num_heads:
        raise ValueError(f"{name}: num_heads must divide channels, got num_heads={num_heads} and channels={channels}")
    return num_heads


def is_bare(layer: nn.Module, cls: type[nn.Module] = nn.Linear) -> bool:
    """Whether its parameters say all that ``layer`` does: no subclass or stand-in, as adapters make, and no hook."""
    return type(layer) is cls and not (layer._forward_hooks or layer._forward_pre_hooks)


def _transposed_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """``layer`` over the channels of [N, C, S]."""
    return torch.baddbmm(layer.bias[:, None], layer.weight.expand(len(x), -1, -1), x)


def _linear_of_tokens(layer: nn.Module, x: Tensor) -> Tensor:
    """The same, by tokens [N, S, C]: no copy where the channels are innermost in memory."""
    return layer(x.mT).mT
