"""denoising-diffusion-pytorch: both of its attentions."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..ops import attention, linear_attention
from .stand_in import StandIn

PROJECT = "denoising-diffusion-pytorch"


class Attend(StandIn):
    of, project, does = "Attend", PROJECT, "attention without the matrix of weights"
    takes, has = ("q", "k", "v"), ("dropout", "scale", "flash")

    def forward(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.dim() != 4 or (self.training and self.dropout > 0) or (self.flash and self.scale is not None):
            return self.theirs(q, k, v)
        return attention(q, k, v, scale=self.scale)


class LinearAttention(StandIn):
    of, project, does = (
        "LinearAttention",
        PROJECT,
        "both softmaxes and products in one pass over queries, keys and values",
    )
    takes, has = ("x",), ("heads", "scale", "norm", "mem_kv", "to_qkv", "to_out")

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if getattr(module.mem_kv, "ndim", 0) != 4:
            yield "mem_kv is not [2, heads, dim_head, num_mem_kv]"

    def forward(self: Any, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(x)).flatten(2)
        q, k, v = qkv.unflatten(1, (3, self.heads, -1)).unbind(1)
        y = linear_attention(q, k, v, *self.mem_kv, scale=self.scale)
        return self.to_out(y.flatten(1, 2).unflatten(2, x.shape[2:]))


STAND_INS = (Attend, LinearAttention)
