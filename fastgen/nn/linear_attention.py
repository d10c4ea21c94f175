"""`LinearAttention`: the attention of denoising-diffusion-pytorch's U-Nets at their large resolutions, on the fused op."""

import torch
from torch import Tensor, nn

from ..ops import linear_attention
from .conv2d import Conv2d
from .rms_norm import ChannelRMSNorm


class LinearAttention(nn.Module):
    """[N, C, H, W] -> the same, with the state dict of denoising-diffusion-pytorch's class of this name.

    Args:
        dim: C.
        heads: how many.
        dim_head: D, the channels of one.
        num_mem_kv: M, learned keys and values beside those of the image.
    """

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 32, num_mem_kv: int = 4) -> None:
        super().__init__()
        self.heads, self.dim_head = heads, dim_head
        self.norm = ChannelRMSNorm(dim)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, dim_head, num_mem_kv))
        self.to_qkv = Conv2d(dim, 3 * heads * dim_head, 1, bias=False)
        self.to_out = nn.Sequential(Conv2d(heads * dim_head, dim, 1), ChannelRMSNorm(dim))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(x)).flatten(2)  # [N, 3 heads D, S]; read where it lies, channels-last too
        query, key, value = qkv.unflatten(1, (3, self.heads, self.dim_head)).unbind(1)
        y = linear_attention(query, key, value, *self.mem_kv)
        return self.to_out(y.flatten(1, 2).unflatten(2, x.shape[2:]))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, dim_head={self.dim_head}"
