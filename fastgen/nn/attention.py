"""Multi-head self-attention over the positions of an image, as U-Nets have it between their residual blocks.

Ho et al. 2020 (one head); Dhariwal and Nichol 2021 (several).
"""

from collections.abc import Callable

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
        if num_head_channels is not None:
            if num_head_channels < 1 or channels % num_head_channels:
                raise ValueError(
                    f"SpatialAttention: num_head_channels must divide channels, got "
                    f"num_head_channels={num_head_channels} and channels={channels}"
                )
            num_heads = channels // num_head_channels
        if num_heads < 1 or channels % num_heads:
            raise ValueError(
                f"SpatialAttention: num_heads must divide channels, got num_heads={num_heads} and channels={channels}"
            )
        self.channels = channels
        self.num_heads = num_heads
        self._plain = norm is PlainGroupNorm
        self.norm = norm(num_groups, channels, eps=eps)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        if zero_init:
            zero_parameters(self.proj)

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [N, S, C]; no copy for channels-last input
        qkv = self.qkv(tokens).reshape(n, height * width, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [N, heads, S, d], read where it lies
        attend = F.scaled_dot_product_attention if self._plain else attention
        attended = attend(q, k, v).transpose(1, 2).flatten(2)  # [N, S, C], as the queries lie: no copy
        return x + self.proj(attended).transpose(1, 2).reshape(n, c, height, width)

    def extra_repr(self) -> str:
        return f"{self.channels}, num_heads={self.num_heads}"
