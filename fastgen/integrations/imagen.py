"""imagen-pytorch and DALLE2-pytorch: the norms, blocks and attention of their U-Nets, of images and of video, and of the prior.

Where both have a class of a name they differ in its attributes, by which each stand-in knows its own.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import attention, layer_norm, linear_attention, rms_norm
from .fusing import agrees, fusible, idle, is_swish, norm_silu, norm_silu_conv, with_silu
from .stand_in import StandIn, bare, mixin_of

IMAGEN, DALLE2 = "imagen-pytorch", "DALLE2-pytorch"
BOTH = f"{IMAGEN}, {DALLE2}"
ATTENTION = "attention without the matrix of weights"


class LayerNorm(StandIn):
    """Over the last dimension, or over the channels (``dim`` -3, and the class of that name), without bias. Its epsilon hangs on
    the dtype."""

    of, project, does = "LayerNorm", BOTH, "one pass over the input"
    takes, has = ("x",), ("g", "stable")

    @classmethod
    def concerns(cls, module: Any) -> bool:
        return isinstance(getattr(module, "g", None), Tensor)

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if module.stable:
            yield "divided by its largest element first"
        elif not agrees(cls, module, *sample_for(module.g)):
            yield "not the layer norm that is known"

    def forward(self: Any, x: Tensor) -> Tensor:
        g, channels = self.g.flatten(), self.g.ndim > 1
        if self.stable or x.shape[1 if channels else -1] != len(g) or (channels and x.dim() != rank(self.g)):
            return self.theirs(x)
        whole = x.dtype == torch.float32
        eps = (self.eps if whole else self.fp16_eps) if hasattr(self, "fp16_eps") else 1e-5 if whole else 1e-3
        if not hasattr(self, "dim"):  # else the output has the dtype of the input
            x = x.to(torch.promote_types(x.dtype, g.dtype))
        if not channels:
            return layer_norm(x, len(g), g, None, eps)  # type: ignore[return-value]
        return rms_norm(x - x.mean(1, keepdim=True), None, g, eps)  # of what is left without its mean


class ChanLayerNorm(LayerNorm):
    of = "ChanLayerNorm"


class ChanRMSNorm(StandIn):
    of, project, does = "ChanRMSNorm", IMAGEN, "one pass over the input"
    takes, has = ("x",), ("gamma", "scale")

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if not isinstance(module.gamma, Tensor) or not agrees(cls, module, *sample_for(module.gamma)):
            yield "not normalize(x) * gamma * sqrt(C)"

    def forward(self: Any, x: Tensor) -> Tensor:
        return over_channels(self, x) if x.dim() == rank(self.gamma) else self.theirs(x)


def rank(weight: Tensor) -> int:
    """The dimensions of an input with whose channels the weight, [C, 1, ...] or [1, C, 1, ...], is multiplied."""
    return weight.ndim + (weight.shape[0] == weight.numel())


def sample_for(weight: Tensor) -> tuple[int, ...]:
    """A shape that a norm with this weight takes: over the channels, or where it is [C] over the last dimension."""
    channels = weight.numel()
    return (3, 2, channels) if weight.ndim == 1 else (3, channels, *[2] * (rank(weight) - 2))


def over_channels(norm: Any, x: Tensor, **fused: Any) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, norm.gamma.dtype))
    return rms_norm(x, None, norm.gamma.flatten(), 0.0, min_norm=1e-12, **fused)


class Block(StandIn):
    """Norm, activation, convolution; of video the convolution takes ``ignore_time``."""

    of, project, does = "Block", IMAGEN, "norm, scale, shift and SiLU in one pass"
    takes, has = ("x", "scale_shift"), ("norm", "activation", "project")

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if type(module.norm).__name__ != "ChanRMSNorm" or not is_swish(module.activation):
            yield f"norm {type(module.norm).__name__}, activation {type(module.activation).__name__}"

    def forward(
        self: Any, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        of_norm = per_channel(scale_shift, x, x.shape[1])
        fused = mixin_of(self.norm) is ChanRMSNorm and is_swish(self.activation) and bare((self.norm, self.activation))
        if args or of_norm is None or not fused or x.dim() != rank(self.norm.gamma):
            return self.theirs(x, scale_shift, *args, **kwargs)
        return self.project(over_channels(self.norm, x, activation="silu", **of_norm), **kwargs)


def per_channel(scale_shift: tuple[Tensor, Tensor] | None, x: Tensor, channels: int) -> dict[str, Tensor] | None:
    """Scale and shift [N, C, 1, ...] as what the ops take, [N, C]; None where they are of another shape."""
    if scale_shift is None:
        return {}
    if any(t.shape != (len(x), channels, *[1] * (x.dim() - 2)) for t in scale_shift):
        return None
    scale, shift = (t.flatten(1) for t in scale_shift)
    return {"scale": scale, "shift": shift}


class NormedBlock(StandIn):
    """Convolution, GroupNorm, activation."""

    of, project, does = "Block", DALLE2, "GroupNorm, scale, shift and SiLU in one pass"
    takes, has = ("x", "scale_shift"), ("project", "norm", "act")

    @classmethod
    def concerns(cls, module: Any) -> bool:
        return isinstance(getattr(module, "norm", None), nn.GroupNorm)

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if not is_swish(module.act):
            yield f"activation {type(module.act).__name__}"

    def forward(self: Any, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        of_norm = per_channel(scale_shift, x, self.norm.num_channels)
        if of_norm is None or not with_silu(self.norm, self.act):
            return self.theirs(x, scale_shift)
        return norm_silu(self.norm, self.project(x), **of_norm)


class ResnetBlock(StandIn):
    """Two of these blocks, the norm of the first in the convolution of the second where nothing stands between them."""

    of, project, does = "ResnetBlock", DALLE2, "a norm, scale, shift and SiLU in the convolution after them"
    takes, has = ("x", "time_emb", "cond"), ("time_mlp", "cross_attn", "block1", "block2", "res_conv")

    @classmethod
    def concerns(cls, module: Any) -> bool:
        return isinstance(getattr(getattr(module, "block1", None), "norm", None), nn.GroupNorm)

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if module.cross_attn is not None:
            yield "attention between its blocks, which are accelerated one by one"

    def forward(self: Any, x: Tensor, time_emb: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
        first, second = self.block1, self.block2
        if (
            self.cross_attn is not None
            or not all(mixin_of(block) is NormedBlock and bare((block,)) for block in (first, second))
            or not fusible(first.norm, first.act, second.project)
            or not with_silu(second.norm, second.act)
        ):
            return self.theirs(x, time_emb, cond)
        of_norm = {}
        if self.time_mlp is not None and time_emb is not None:
            scale, shift = self.time_mlp(time_emb).chunk(2, dim=1)
            of_norm = {"scale": scale, "shift": shift}
        h = norm_silu_conv(first.norm, second.project, first.project(x), **of_norm)
        return norm_silu(second.norm, h) + self.res_conv(x)


class CrossAttention(StandIn):
    """By the cosine of queries and keys, each with a learned scale a feature."""

    of, project, does = "CrossAttention", IMAGEN, ATTENTION
    takes = ("x", "context", "mask")
    has: ClassVar[tuple[str, ...]] = (
        "heads", "scale", "norm", "norm_context", "null_kv", "to_q", "to_kv", "q_scale", "k_scale", "to_out",
    )  # fmt: skip

    @classmethod
    def concerns(cls, module: Any) -> bool:
        return hasattr(module, "null_kv")

    def forward(self: Any, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            return self.theirs(x, context, mask)
        q, k, v = projected(self, self.norm(x), self.norm_context(context), self.heads)
        k, v = after_null(self.null_kv, k, v)
        q, k = unit(q, self.q_scale), unit(k, self.k_scale)
        return self.to_out(attended(q, k, v, scale=self.scale / q.shape[3]))


class LinearCrossAttention(CrossAttention):
    of, does = "LinearCrossAttention", "both softmaxes and products in one pass over queries, keys and values"

    def forward(self: Any, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            return self.theirs(x, context, mask)
        q, k, v = projected(self, self.norm(x), self.norm_context(context), self.heads)
        q, k, v = (t.permute(0, 2, 3, 1) for t in (q, *after_null(self.null_kv, k, v)))  # [N, H, D, L]
        return self.to_out(linear_attention(q, k, v, scale=self.scale).permute(0, 3, 1, 2).flatten(2))


class CrossAttentionByCosine(CrossAttention):
    """By cosine or not, without these scales."""

    project = DALLE2
    has = ("heads", "scale", "norm", "norm_context", "null_kv", "to_q", "to_kv", "cosine_sim", "to_out")

    def forward(self: Any, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            return self.theirs(x, context, mask)
        q, k, v = projected(self, self.norm(x), self.norm_context(context), self.heads)
        k, v = after_null(self.null_kv, k, v)
        if not self.cosine_sim:
            return self.to_out(attended(q, k, v, scale=self.scale))
        return self.to_out(attended(unit(q), unit(k), v, scale=self.scale / q.shape[3]))


class Attention(StandIn):
    """Of all heads to one head of keys; of video with positions and causal."""

    of, project, does = "Attention", IMAGEN, ATTENTION
    takes = ("x", "context", "mask", "attn_bias")
    has = ("heads", "scale", "norm", "null_kv", "to_q", "to_kv", "q_scale", "k_scale", "to_context", "to_out")

    @classmethod
    def concerns(cls, module: Any) -> bool:
        return hasattr(module, "null_kv")

    def forward(
        self: Any,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        attn_bias: Tensor | None = None,
    ) -> Tensor:
        if mask is not None or (context is not None and self.to_context is None):
            return self.theirs(x, context, mask, attn_bias)
        x = self.norm(x)
        q, k, v = projected(self, x, x, 1)
        k, v = after_null(self.null_kv, k, v)
        if context is not None:
            of_context = (t.unsqueeze(2) for t in self.to_context(context).chunk(2, dim=-1))
            k, v = (torch.cat(pair, dim=1) for pair in zip(of_context, (k, v), strict=True))
        if attn_bias is None and getattr(self, "rel_pos_bias", None) is not None:
            attn_bias = self.rel_pos_bias(x.shape[1], device=x.device, dtype=q.dtype)
        if attn_bias is not None and hasattr(self, "null_attn_bias"):
            null = self.null_attn_bias[:, None, None].expand(-1, x.shape[1], -1)
            attn_bias = torch.cat([null, attn_bias], dim=-1)
        q, k = unit(q, self.q_scale), unit(k, self.k_scale)
        seen = visible(q, k, attn_bias) if getattr(self, "causal", False) else attn_bias
        return self.to_out(attended(q, k, v, seen, scale=self.scale / q.shape[3]))


class AttentionOfPrior(StandIn):
    """Of all heads to one head of keys, with positions by rotation or by a bias, causal or not."""

    of, project, does = "Attention", DALLE2, ATTENTION
    takes = ("x", "mask", "attn_bias")
    has = (
        "heads", "scale", "norm", "null_kv", "to_q", "to_kv", "cosine_sim", "causal", "rotary_emb", "dropout", "to_out",
    )  # fmt: skip

    @classmethod
    def concerns(cls, module: Any) -> bool:
        return hasattr(module, "null_kv")

    def forward(self: Any, x: Tensor, mask: Tensor | None = None, attn_bias: Tensor | None = None) -> Tensor:
        if mask is not None or not idle(self.dropout) or not bare((self.dropout,)):
            return self.theirs(x, mask, attn_bias)
        x = self.norm(x)
        q, k, v = projected(self, x, x, 1)
        if self.rotary_emb is not None:
            q, k = (self.rotary_emb.rotate_queries_or_keys(t.transpose(1, 2)).transpose(1, 2) for t in (q, k))
        k, v = after_null(self.null_kv, k, v)
        scale = self.scale**2  # they multiply the queries by it, and queries and keys by its root
        if self.cosine_sim:
            q, k, scale = unit(q), unit(k), self.scale / q.shape[3]
        seen = visible(q, k, attn_bias) if self.causal else attn_bias
        return self.to_out(attended(q, k, v, seen, scale=scale))


def projected(module: Any, x: Tensor, context: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of x [N, L, C], keys and values of the context, each [N, L, heads, D]."""
    k, v = module.to_kv(context).unflatten(2, (2, kv_heads, -1)).unbind(2)
    return module.to_q(x).unflatten(2, (module.heads, -1)), k, v


def after_null(null_kv: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [N, S, heads, D] after one that is learned, [2, D], the same for all heads."""
    k, v = (
        torch.cat([null.expand(len(t), 1, t.shape[2], -1), t], dim=1) for null, t in zip(null_kv, (k, v), strict=True)
    )
    return k, v


def unit(t: Tensor, weight: Tensor | None = None) -> Tensor:
    """normalize(t) * weight * sqrt(D) over the last dimension."""
    return rms_norm(t, t.shape[-1], weight, 0.0, min_norm=1e-12)


def visible(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """The mask of attention to what is not later, the last query with the last key, with a bias or without."""
    rows, keys = q.shape[1], k.shape[1]
    seen = torch.ones(rows, keys, dtype=torch.bool, device=q.device).tril(keys - rows)
    return seen if bias is None else bias.masked_fill(~seen, -torch.inf)


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float) -> Tensor:
    """[N, L, heads, D] each -> [N, L, heads * D]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return attention(q, k, v, mask, scale=scale).transpose(1, 2).flatten(2)


class LinearAttention(StandIn):
    of, project, does = "LinearAttention", IMAGEN, LinearCrossAttention.does
    takes = ("fmap", "context")
    has = ("heads", "scale", "norm", "nonlin", "to_q", "to_k", "to_v", "to_context", "to_out")

    def forward(self: Any, fmap: Tensor, context: Tensor | None = None) -> Tensor:
        if fmap.dim() != 4 or (context is not None and self.to_context is None):
            return self.theirs(fmap, context)
        fmap = self.norm(fmap)
        q, k, v = (to(fmap).flatten(2).unflatten(1, (self.heads, -1)) for to in (self.to_q, self.to_k, self.to_v))
        if context is not None:
            of_context = self.to_context(context).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 4, 1)
            k, v = (torch.cat(pair, dim=3) for pair in zip((k, v), of_context, strict=True))
        return self.to_out(self.nonlin(as_image(linear_attention(q, k, v, scale=self.scale), fmap)))


class LinearAttentionOfUnits(StandIn):
    """Its values are of length 1, keys and values divided by the root of their number."""

    of, project, does = "LinearAttention", DALLE2, LinearCrossAttention.does
    takes, has = ("fmap",), ("heads", "scale", "norm", "nonlin", "to_qkv", "to_out")

    def forward(self: Any, fmap: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(fmap)).flatten(2)
        q, k, v = qkv.unflatten(1, (3, self.heads, -1)).unbind(1)  # [N, H, D, L]
        y = linear_attention(q, k, F.normalize(v, dim=2), scale=self.scale / v.shape[3])
        return self.to_out(self.nonlin(as_image(y, fmap)))


def as_image(y: Tensor, fmap: Tensor) -> Tensor:
    """[N, H, D, L] -> [N, H * D, height, width]."""
    return y.flatten(1, 2).unflatten(2, fmap.shape[2:])


STAND_INS = (
    LayerNorm, ChanLayerNorm, ChanRMSNorm, Block, NormedBlock, ResnetBlock, CrossAttention, LinearCrossAttention,
    CrossAttentionByCosine, Attention, AttentionOfPrior, LinearAttention, LinearAttentionOfUnits,
)  # fmt: skip
