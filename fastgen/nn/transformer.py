"""The transformer of text-conditioned U-Nets: attention to the image and to a context, and a gated feed-forward.

Vaswani et al. 2017; Shazeer 2020 (GEGLU); Rombach et al. 2022, whose names the parameters have, and diffusers'.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import attention
from .attention import heads_of, is_bare
from .conv2d import Conv2d, conv_beside, normed_conv
from .geglu import GEGLU
from .group_norm import GroupNorm, PlainGroupNorm
from .layer_norm import LayerNorm
from .resblock import zero_parameters


class CrossAttention(nn.Module):
    r"""[N, L, C] and a context [N, S, D] -> [N, L, C]: :math:`W_o\,\mathrm{softmax}(q k^T / \sqrt{d})\,v` with q linear
    in the former, k and v in the latter. Without a context it is self-attention.

    Args:
        dim: C.
        context_dim: D; C if None.
        num_heads: divides C.
        dropout: rate, of the result.
        plain: attention by torch's own function.

    Raises:
        ValueError: the heads do not divide the channels.
    """

    def __init__(
        self, dim: int, context_dim: int | None = None, *, num_heads: int = 8, dropout: float = 0.0, plain: bool = False
    ) -> None:
        super().__init__()
        self.num_heads = heads_of("CrossAttention", dim, num_heads, None)
        self._plain = plain
        context_dim = dim if context_dim is None else context_dim
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        projected = (self.to_q(x), self.to_k(context), self.to_v(context))
        q, k, v = (t.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in projected)  # each [N, heads, L, d]
        attend = F.scaled_dot_product_attention if self._plain else attention
        return self.to_out(attend(q, k, v).transpose(1, 2).flatten(2))  # as the queries lie: no copy

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


class FeedForward(nn.Module):
    """[*, C] -> the same: :class:`fastgen.nn.GEGLU`, dropout, linear.

    Args:
        dim: C.
        mult: the channels in between are ``mult`` times those.
        dropout: rate.
        plain: the gate by torch's own functions.
    """

    def __init__(self, dim: int, mult: int = 4, *, dropout: float = 0.0, plain: bool = False) -> None:
        super().__init__()
        gate = (_PlainGEGLU if plain else GEGLU)(dim, mult * dim)
        self.net = nn.Sequential(gate, nn.Dropout(dropout), nn.Linear(mult * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    r"""[N, L, C] -> the same:

    .. math::
        x &\mathrel{+}= attn_1(norm_1(x)) \\
        x &\mathrel{+}= attn_2(norm_2(x), context) \\
        x &\mathrel{+}= ff(norm_3(x))

    Args:
        dim: C.
        context_dim: of the context; None for attention to x itself once more.
        num_heads: of both attentions.
        dropout: rate, of each branch.
        plain: everything by torch's own functions: it is what tests compare with.

    Raises:
        ValueError: the heads do not divide the channels.
    """

    def __init__(
        self, dim: int, context_dim: int | None = None, *, num_heads: int = 8, dropout: float = 0.0, plain: bool = False
    ) -> None:
        super().__init__()
        norm = nn.LayerNorm if plain else LayerNorm
        self.attn1 = CrossAttention(dim, num_heads=num_heads, dropout=dropout, plain=plain)
        self.ff = FeedForward(dim, dropout=dropout, plain=plain)
        self.attn2 = CrossAttention(dim, context_dim, num_heads=num_heads, dropout=dropout, plain=plain)
        self.norm1, self.norm2, self.norm3 = norm(dim), norm(dim), norm(dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``x`` [N, L, C], ``context`` [N, S, context_dim]."""
        y, x = added_and_normed(self.norm2, self.attn1(self.norm1(x)), x)
        y, x = added_and_normed(self.norm3, self.attn2(y, context), x)
        return x + self.ff(y)


class SpatialTransformer(nn.Module):
    """[N, C, H, W] -> the same: norm, projection, transformer blocks over the positions, projection, the input added.

    Args:
        channels: C.
        num_heads: divides C; not used where ``num_head_channels`` is given.
        num_head_channels: the channels of one head; divides C.
        depth: blocks.
        context_dim: of the context that the second attention of a block is to; None where it is to the image once more.
        use_linear: the projections are linear layers, as from Stable Diffusion 2 on, not 1x1 convolutions, which compute
            the same.
        num_groups, eps: of the norm.
        norm: its class or factory, called as :class:`fastgen.nn.GroupNorm`; beside :class:`fastgen.nn.PlainGroupNorm`
            everything is torch's own.

    The last projection starts at zero, so that the block starts as the identity. The layout of the input is kept; the
    tokens are [N, H W, C] in memory, as a channels-last image is already.

    Raises:
        ValueError: the heads do not divide the channels.
    """

    takes: ClassVar = ("context",)  # beside x, of a stage of layers

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int = 8,
        num_head_channels: int | None = None,
        depth: int = 1,
        context_dim: int | None = None,
        use_linear: bool = False,
        num_groups: int = 32,
        eps: float = 1e-6,
        norm: Callable[..., nn.Module] = GroupNorm,
    ) -> None:
        super().__init__()
        num_heads = heads_of("SpatialTransformer", channels, num_heads, num_head_channels)
        self.channels = channels
        self.use_linear = use_linear
        self._plain = norm is PlainGroupNorm
        projection = nn.Linear if use_linear else lambda c, k: conv_beside(norm)(c, k, 1)
        self.norm = norm(num_groups, channels, eps=eps)
        self.proj_in = projection(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, context_dim, num_heads=num_heads, plain=self._plain) for _ in range(depth)
        )
        self.proj_out = projection(channels, channels)
        zero_parameters(self.proj_out)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``x`` [N, C, H, W], ``context`` [N, S, context_dim]."""
        cls = nn.Linear if self.use_linear else Conv2d
        bare = is_bare(self.proj_in, cls) and is_bare(self.proj_out, cls)
        turned = x.stride(1) != 1 and bare and not self._plain
        tokens = tokens_of(self.norm, self.proj_in, x, linear=self.use_linear, turned=turned)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return image_of(self.proj_out, tokens, x, linear=self.use_linear, turned=turned)

    def extra_repr(self) -> str:
        return f"{self.channels}, use_linear={self.use_linear}"


def tokens_of(norm: nn.Module, projection: Any, x: Tensor, *, linear: bool, turned: bool) -> Tensor:
    """``projection`` of norm(x), ``linear`` or a 1x1 convolution: [N, C, H, W] -> [N, S, K].

    A view where the channels are innermost in memory. ``turned``: they are not, and the projection, which must be nothing but its
    parameters and have a bias, turns the image as it reads it.
    """
    if turned:
        y = norm(x).flatten(2)  # [N, C, S]
        return torch.baddbmm(projection.bias, y.mT, projection.weight.flatten(1).mT.expand(len(y), -1, -1))
    if linear:
        return projection(norm(x).flatten(2).mT)
    return normed_conv(norm, projection, x).flatten(2).mT


def image_of(projection: Any, tokens: Tensor, x: Tensor, *, linear: bool, turned: bool) -> Tensor:
    """``x`` [N, C, H, W] and ``projection`` of ``tokens`` [N, S, K] as an image; the others as in :func:`tokens_of`."""
    if turned:
        weight = projection.weight.flatten(1)
        y = torch.baddbmm(projection.bias[:, None], weight.expand(len(x), -1, -1), tokens.mT)  # [N, C, S]
        return x + y.unflatten(2, x.shape[2:])
    if linear:
        return x + projection(tokens).mT.unflatten(2, x.shape[2:])
    image = tokens.mT.unflatten(2, x.shape[2:])
    if isinstance(projection, Conv2d):
        return projection(image, residual=x)
    return x + projection(image)


class _PlainGEGLU(GEGLU):
    """The arithmetic of :class:`GEGLU` by torch's own functions."""

    def forward(self, input: Tensor) -> Tensor:
        value, gate = self.proj(input).chunk(2, dim=-1)
        return value * F.gelu(gate, approximate=self.approximate)


def added_and_normed(norm: nn.Module, branch: Tensor, x: Tensor) -> Any:
    """(norm(x + branch), x + branch)."""
    if isinstance(norm, LayerNorm):
        return norm(branch, residual=x)
    total = x + branch
    return norm(total), total
