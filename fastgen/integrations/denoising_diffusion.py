"""denoising-diffusion-pytorch: its norm over channels, the block around that, and both attentions."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..ops import attention, linear_attention, rms_norm
from .fusing import idle, is_swish
from .stand_in import StandIn, bare

PROJECT = "denoising-diffusion-pytorch"


class RMSNorm(StandIn):
    of, project, does = "RMSNorm", PROJECT, "one pass over the input"
    takes, has = ("x",), ("g", "scale")

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if module.g.ndim != 4 or abs(module.scale - module.g.numel() ** 0.5) > 1e-6:
            yield "g is not [1, C, 1, 1], or the scale not the root of C"

    def forward(self: Any, x: Tensor) -> Tensor:
        return over_channels(self, x)


class Block(StandIn):
    of, project, does = "Block", PROJECT, "norm, scale, shift and SiLU in one pass"
    takes, has = ("x", "scale_shift"), ("proj", "norm", "act", "dropout")

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if type(module.norm).__name__ != "RMSNorm" or not is_swish(module.act):
            yield f"norm {type(module.norm).__name__}, activation {type(module.act).__name__}"

    def forward(self: Any, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        if (
            not isinstance(self.norm, RMSNorm)
            or not bare((self.norm, self.act, self.dropout))
            or not is_swish(self.act)
        ):
            return self.theirs(x, scale_shift)
        scale, shift = (None, None) if scale_shift is None else (t.flatten(1) for t in scale_shift)  # [N, C, 1, 1]
        y = over_channels(self.norm, self.proj(x), scale=scale, shift=shift, activation="silu")
        return y if idle(self.dropout) else self.dropout(y)


def over_channels(norm: Any, x: Tensor, **fused: Any) -> Tensor:
    return rms_norm(x, None, norm.g, 0.0, min_norm=1e-12, **fused)


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


STAND_INS = (RMSNorm, Block, Attend, LinearAttention)
