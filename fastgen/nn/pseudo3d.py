"""Video by the layers of images: a 2D convolution and one over frames, attention within a frame and along the frames.

Singer et al., "Make-A-Video", 2022; Ho et al., "Video Diffusion Models", 2022. Names of parameters as in make-a-video-pytorch. A
video [N, C, F, H, W] with its channels innermost is never copied to another order: frames, pixels and heads are views of it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import attention, rms_norm
from .conv2d import Conv2d
from .resblock import zero_parameters


class TemporalConv(nn.Conv1d):
    """A convolution along the frames of each pixel, which starts as the identity; an image is returned as it came.

    [N, channels, F, H, W] -> the same, channels innermost in memory.

    Args:
        channels: of input and output.
        kernel_size: odd.

    Raises:
        ValueError: the kernel size is even.
    """

    def __init__(self, channels: int, kernel_size: int = 3) -> None:
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"TemporalConv: kernel_size must be odd, got {kernel_size}")
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2)
        zero_parameters(self)
        nn.init.dirac_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        if not _is_video("TemporalConv", x):
            return x
        columns = _channels_innermost(x).flatten(3)  # [N, C, F, H W]: a 2D one, with a kernel of one column
        y = F.conv2d(columns, self.weight[..., None], self.bias, padding=(self.kernel_size[0] // 2, 0))
        return y.unflatten(3, x.shape[3:])


class PseudoConv3d(nn.Module):
    r"""A 2D convolution of each frame, then a 1D convolution along the frames of each pixel.

    [N, dim, F, H, W] -> [N, dim_out, F, H, W], channels innermost in memory, for which a video that lies otherwise is copied once.
    An image [N, dim, H, W] goes through the 2D convolution alone.

    Args:
        dim: channels of the input.
        dim_out: of the output; ``dim`` if None.
        kernel_size: of the 2D convolution, odd. With 1 there is no convolution along the frames.
        temporal_kernel_size: of the 1D convolution, odd; ``kernel_size`` if None. It starts as the identity.

    Raises:
        ValueError: a kernel size is even.
    """

    def __init__(
        self, dim: int, dim_out: int | None = None, kernel_size: int = 3, *, temporal_kernel_size: int | None = None
    ) -> None:
        super().__init__()
        dim_out = dim if dim_out is None else dim_out
        temporal_kernel_size = kernel_size if temporal_kernel_size is None else temporal_kernel_size
        for name, size in (("kernel_size", kernel_size), ("temporal_kernel_size", temporal_kernel_size)):
            if size < 1 or size % 2 == 0:
                raise ValueError(f"PseudoConv3d: {name} must be odd, got {size}")
        self.spatial_conv = Conv2d(dim, dim_out, kernel_size, padding=kernel_size // 2)
        self.temporal_conv = TemporalConv(dim_out, temporal_kernel_size) if kernel_size > 1 else None

    def forward(self, x: Tensor, enable_time: bool = True) -> Tensor:
        """``x`` [N, C, F, H, W] or [N, C, H, W]; without ``enable_time`` the frames stay apart."""
        if not _is_video("PseudoConv3d", x):
            return self.spatial_conv(x)
        n, _, frames = x.shape[:3]
        y = self.spatial_conv(_channels_innermost(x).transpose(1, 2).flatten(0, 1))  # [N F, K, H, W]
        y = _channels_innermost(y.unflatten(0, (n, frames)).transpose(1, 2))
        return self.temporal_conv(y) if enable_time and self.temporal_conv is not None else y


class _RMSNorm(nn.Module):
    """normalize(x) gamma sqrt(C) over the last dimension, in which the channels are."""

    def __init__(self, channels: int, plain: bool) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))
        self._plain = plain

    def forward(self, x: Tensor) -> Tensor:
        if self._plain:
            return F.normalize(x, dim=-1) * (self.gamma * x.shape[-1] ** 0.5)
        return rms_norm(x, x.shape[-1], self.gamma, 0.0, min_norm=1e-12)


class _VideoAttention(nn.Module):
    """What the two attentions over a video share: the projections of its tokens, and the sum with the input."""

    def __init__(self, dim: int, *, dim_head: int = 64, heads: int = 8, plain: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self._attend = F.scaled_dot_product_attention if plain else attention
        self.norm = _RMSNorm(dim, plain)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        zero_parameters(self.to_out)

    def _projections(self, tokens: Tensor) -> list[Tensor]:
        """q, k and v of tokens [..., C], each [..., heads, d] and dense, so that pixels and heads are one dimension of each."""
        tokens = self.norm(tokens)
        weights = (self.to_q.weight, *self.to_kv.weight.chunk(2))
        return [F.linear(tokens, weight).unflatten(-1, (self.heads, -1)) for weight in weights]

    def _added(self, tokens: Tensor, attended: Tensor) -> Tensor:
        """``tokens`` [N, ..., C] and W_o of ``attended``, whose elements lie as [N, ..., heads, d]: [N, C, ...]."""
        return (tokens + self.to_out(attended.reshape(*tokens.shape[:-1], -1))).movedim(-1, 1)

    def extra_repr(self) -> str:
        return f"{self.to_q.in_features}, dim_head={self.to_q.out_features // self.heads}, heads={self.heads}"


class FrameAttention(_VideoAttention):
    r"""Attention of the pixels of a frame to each other, added to them: :math:`x + W_o\,\mathrm{softmax}(q k^T / \sqrt{d})\,v`.

    [N, dim, F, H, W] or [N, dim, H, W] -> the same, channels innermost in memory; q, k and v are linear in the RMS norm of x over
    its channels.

    Args:
        dim: channels.
        dim_head: d, channels of a head.
        heads: their number.
        plain: in torch's own functions alone.

    The projection W_o starts at zero, so that the block starts as the identity.
    """

    def forward(self, x: Tensor) -> Tensor:
        _is_video("FrameAttention", x)
        tokens = _channels_innermost(x).movedim(1, -1)  # [N, (F,) H, W, C], dense
        # of a frame [H W, heads, d] each: [N F, heads, H W, d]
        q, k, v = (t.flatten(-4, -3).flatten(0, -4).transpose(1, 2) for t in self._projections(tokens))
        return self._added(tokens, self._attend(q, k, v).transpose(1, 2))


class TemporalAttention(_VideoAttention):
    """As :class:`FrameAttention`, of a pixel to itself in all frames; an image is returned as it came.

    Args:
        dim, dim_head, heads, plain: as there.
        causal: a frame looks at those before it alone, and at itself.
    """

    def __init__(
        self, dim: int, *, dim_head: int = 64, heads: int = 8, causal: bool = False, plain: bool = False
    ) -> None:
        super().__init__(dim, dim_head=dim_head, heads=heads, plain=plain)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        if not _is_video("TemporalAttention", x):
            return x
        tokens = _channels_innermost(x).movedim(1, -1)  # [N, F, H, W, C], dense
        # Pixels and their heads lie one after the other: together they are the heads, [N, H W heads, F, d].
        q, k, v = (t.flatten(2, 4).transpose(1, 2) for t in self._projections(tokens))
        return self._added(tokens, self._attend(q, k, v, is_causal=self.causal).transpose(1, 2))

    def extra_repr(self) -> str:
        return super().extra_repr() + f", causal={self.causal}"


class SpatioTemporalAttention(nn.Module):
    """:class:`FrameAttention`, then :class:`TemporalAttention`: attention factorised over space and time.

    Args:
        dim, dim_head, heads: as in :class:`FrameAttention`.
        causal: as in :class:`TemporalAttention`.
    """

    def __init__(self, dim: int, *, dim_head: int = 64, heads: int = 8, causal: bool = False) -> None:
        super().__init__()
        self.spatial_attn = FrameAttention(dim, dim_head=dim_head, heads=heads)
        self.temporal_attn = TemporalAttention(dim, dim_head=dim_head, heads=heads, causal=causal)

    def forward(self, x: Tensor, enable_time: bool = True) -> Tensor:
        """``x`` [N, C, F, H, W] or [N, C, H, W]; without ``enable_time`` the frames stay apart."""
        x = self.spatial_attn(x)
        return self.temporal_attn(x) if enable_time else x


def _is_video(module: str, x: Tensor) -> bool:
    if x.dim() not in (4, 5):
        raise ValueError(f"{module}: x must be [N, C, F, H, W] or [N, C, H, W], got shape {tuple(x.shape)}")
    return x.dim() == 5


def _channels_innermost(x: Tensor) -> Tensor:
    """``x`` itself where its memory is [N, (F,) H, W, C], else a copy that is."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)
