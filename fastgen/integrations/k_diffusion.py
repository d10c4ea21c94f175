"""k-diffusion: residual blocks, adaptive norm, attention and resampling of its U-Net, and the norms, GEGLU and attention of its
transformers, v1 and v2."""

import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.conv2d import Conv2d
from ..ops import attention, geglu, group_norm, rms_norm
from .fusing import agrees, idle, linear
from .stand_in import StandIn, bare, mixin_of

PROJECT = "k-diffusion"


class AdaGN(StandIn):
    of, project, does = "AdaGN", PROJECT, "norm, scale and shift in one pass"
    takes, has = ("input", "cond"), ("num_groups", "eps", "cond_key", "mapper")

    def forward(self: Any, input: Tensor, cond: dict[str, Tensor]) -> Tensor:
        condition = cond[self.cond_key]
        if condition.shape[:-1] != input.shape[:1] or not 2 <= input.dim() <= 5:
            return self.theirs(input, cond)
        scale, shift = self.mapper(condition).chunk(2, dim=-1)
        return group_norm(input, self.num_groups, eps=self.eps, scale=scale, shift=shift)


class ConditionedResidualBlock(StandIn):
    """AdaGN, GELU and convolution, twice: GELU in the norm's own memory, the sum in the last convolution."""

    of, project, does = "ConditionedResidualBlock", PROJECT, "GELU without a copy, the residual in the convolution"
    takes, has = ("input", "cond"), ("main", "skip")

    @classmethod
    def concerns(cls, module: Any) -> bool:
        return len(getattr(module, "main", ())) == 8 and type(module.main[0]).__name__ == "AdaGN"

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if [type(each).__name__ for each in module.main] != 2 * ["AdaGN", "GELU", "Conv2d", "Dropout2d"]:
            yield "layers in another order than norm, GELU, convolution, dropout"
        elif type(module.skip) is not nn.Identity and not isinstance(module.skip, nn.Conv2d):
            yield f"a skip connection of class {type(module.skip).__name__}"

    def forward(self: Any, input: Tensor, cond: dict[str, Tensor]) -> Tensor:
        parts = tuple(self.main)
        if len(parts) != 8 or not bare((self.main, *parts)):
            return self.theirs(input, cond)
        norm1, gelu1, conv1, dropout1, norm2, gelu2, conv2, dropout2 = parts
        if (
            any(mixin_of(norm) is not AdaGN for norm in (norm1, norm2))
            or any(type(gelu) is not nn.GELU for gelu in (gelu1, gelu2))
            or not all(isinstance(conv, nn.Conv2d) for conv in (conv1, conv2))
            or not all(passes(dropout) for dropout in (dropout1, dropout2))
            or not (type(self.skip) is nn.Identity or isinstance(self.skip, nn.Conv2d))
        ):
            return self.theirs(input, cond)
        h = conv1(activated(gelu1, norm1(input, cond)))
        h = activated(gelu2, norm2(h, cond))
        skip = self.skip(input)
        return conv2(h, residual=skip) if is_op(conv2) else conv2(h) + skip


def passes(dropout: Any) -> bool:
    """Whether a dropout of whole channels, or a module in its place, passes on what it is given."""
    return idle(dropout) or (type(dropout) is nn.Dropout2d and not (dropout.training and dropout.p > 0))


def is_op(conv: Any) -> bool:
    return isinstance(conv, Conv2d) and type(conv).forward is Conv2d.forward


def activated(gelu: Any, fresh: Tensor) -> Tensor:
    """GELU of what nobody else has, in its place where no gradient needs it."""
    if fresh.requires_grad or torch.compiler.is_compiling():
        return F.gelu(fresh, approximate=gelu.approximate)
    return torch.ops.aten.gelu_.default(fresh, approximate=gelu.approximate)


class Downsample2d(StandIn):
    """Their weight [C, C, k, k] is the kernel on the diagonal and 0 elsewhere."""

    of, project, does = (
        "Downsample2d",
        PROJECT,
        "each channel by its kernel, without those between channels, which are 0",
    )
    takes, has = ("x",), ("pad", "pad_mode", "kernel")

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if module.kernel.dim() != 2 or not agrees(cls, module, 2, 3, 8, 6):
            yield "not a kernel [k, k] for each channel"

    def forward(self: Any, x: Tensor) -> Tensor:
        if x.dim() != 4:
            return self.theirs(x)
        x = F.pad(x, (self.pad,) * 4, self.pad_mode)
        return F.conv2d(x, of_channels(self.kernel, x), stride=2, groups=x.shape[1])


class Upsample2d(Downsample2d):
    of = "Upsample2d"

    def forward(self: Any, x: Tensor) -> Tensor:
        if x.dim() != 4:
            return self.theirs(x)
        x = F.pad(x, ((self.pad + 1) // 2,) * 4, self.pad_mode)
        weight, padding = of_channels(self.kernel, x), 2 * self.pad + 1
        return F.conv_transpose2d(x, weight, stride=2, padding=padding, groups=x.shape[1])


def of_channels(kernel: Tensor, x: Tensor) -> Tensor:
    """[C, 1, k, k] for ``x`` [N, C, H, W]."""
    return kernel.to(x).expand(x.shape[1], 1, -1, -1)


class SelfAttention2d(StandIn):
    of, project, does = "SelfAttention2d", PROJECT, "attention that reads queries, keys and values where they lie"
    takes, has = ("input", "cond"), ("norm_in", "n_head", "qkv_proj", "out_proj", "dropout")

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        yield from drops(module)

    def forward(self: Any, input: Tensor, cond: dict[str, Tensor]) -> Tensor:
        if self.dropout.p:
            return self.theirs(input, cond)
        qkv = self.qkv_proj(self.norm_in(input, cond)).flatten(2)
        q, k, v = qkv.unflatten(1, (3, self.n_head, -1)).transpose(3, 4).unbind(1)  # [N, H, L, E]
        return input + self.out_proj(of_image(attention(q, k, v), input))


class CrossAttention2d(StandIn):
    of, project, does = "CrossAttention2d", PROJECT, "attention that reads queries, keys and values where they lie"
    takes = ("input", "cond")
    has = (
        "cond_key", "cond_key_padding", "norm_enc", "norm_dec", "n_head", "q_proj", "kv_proj", "out_proj", "dropout",
    )  # fmt: skip

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        yield from drops(module)

    def forward(self: Any, input: Tensor, cond: dict[str, Tensor]) -> Tensor:
        padding = cond[self.cond_key_padding]
        if self.dropout.p or padding.dtype != input.dtype:
            return self.theirs(input, cond)
        q = self.q_proj(self.norm_dec(input, cond)).flatten(2).unflatten(1, (self.n_head, -1)).transpose(2, 3)
        kv = self.kv_proj(self.norm_enc(cond[self.cond_key]))
        k, v = kv.unflatten(2, (2, self.n_head, -1)).transpose(1, 3).unbind(2)
        y = attention(q, k, v, padding[:, None, None, :] * -10000)
        return input + self.out_proj(of_image(y, input))


def drops(module: Any) -> Iterator[str]:
    """Its dropout is part of attention, and not of training alone."""
    if module.dropout.p:
        yield f"dropout {module.dropout.p}, of evaluation too"


def of_image(y: Tensor, input: Tensor) -> Tensor:
    """[N, H, L, E] -> the shape of ``input``, [N, H * E, height, width]."""
    return y.transpose(2, 3).reshape(input.shape)


class RMSNorm(StandIn):
    of, project, does = "RMSNorm", PROJECT, "one pass over the input"
    takes, has = ("x",), ("eps", "scale")

    @classmethod
    def concerns(cls, module: Any) -> bool:
        return isinstance(getattr(module, "scale", None), nn.Parameter)

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if module.scale.ndim != 1 or not agrees(cls, module, 3, 2, len(module.scale)):
            yield "not the root mean square of the last dimension with a scale [C]"

    def forward(self: Any, x: Tensor) -> Tensor:
        if x.shape[-1:] != self.scale.shape:
            return self.theirs(x)
        return rms_norm(x, x.shape[-1], self.scale, self.eps)


class AdaRMSNorm(StandIn):
    """Of v1, for tokens [N, L, C] under a condition [N, 1, F]; of v2, whose linear is one of its own, [N, H, W, C] under [N, F]."""

    of, project, does = "AdaRMSNorm", PROJECT, "norm and scale in one pass"
    takes, has = ("x", "cond"), ("eps", "linear")

    def forward(self: Any, x: Tensor, cond: Tensor) -> Tensor:
        n, v1 = len(x), type(self.linear) is nn.Linear
        if x.dim() != (3 if v1 else 4) or cond.shape[:-1] != ((n, 1) if v1 else (n,)):
            return self.theirs(x, cond)
        return rms_norm(x, x.shape[-1], None, self.eps, scale=self.linear(cond).reshape(n, -1))


class LinearGEGLU(StandIn):
    of, project, does = "LinearGEGLU", PROJECT, "linear, GELU and product in one"
    takes, has = ("x",), ("weight", "bias")

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if not isinstance(module, nn.Linear) or not agrees(cls, module, 3, module.weight.shape[1]):
            yield "not the first half of a linear times GELU of the second"

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.theirs(x) if counted(self) else geglu(x, self.weight, self.bias)


def counted(module: Any) -> bool:
    """Whether the project's counter of operations is at work, which its own layers report to."""
    flops = getattr(sys.modules.get(type(module).__module__), "flops", None)
    return getattr(getattr(flops, "state", None), "flop_counter", None) is not None


class FeedForwardBlock(StandIn):
    """Of v1; that of v2 has a :class:`LinearGEGLU`."""

    of, project, does = "FeedForwardBlock", PROJECT, "linear, GELU and product in one"
    takes, has = ("x", "cond"), ("norm", "up_proj", "act", "dropout", "down_proj")

    @classmethod
    def concerns(cls, module: Any) -> bool:
        return type(getattr(module, "act", None)).__name__ == "GEGLU"

    def forward(self: Any, x: Tensor, cond: Tensor) -> Tensor:
        if not FeedForwardBlock.concerns(self) or not linear(self.up_proj) or not bare((self.act,)):
            return self.theirs(x, cond)
        y = geglu(self.norm(x, cond), self.up_proj.weight, self.up_proj.bias)
        return self.down_proj(self.dropout(y)) + x


class SelfAttentionBlock(StandIn):
    """Of v1; what surrounds the attention of v2 is functions of its own."""

    of, project, does = "SelfAttentionBlock", PROJECT, "attention that reads values where they lie"
    takes = ("x", "pos", "attn_mask", "cond")
    has = ("d_head", "n_heads", "norm", "qkv_proj", "qk_norm", "pos_emb", "dropout", "out_proj")

    @classmethod
    def concerns(cls, module: Any) -> bool:
        return hasattr(module, "qk_norm")

    def forward(self: Any, x: Tensor, pos: Tensor, attn_mask: Tensor | None, cond: Tensor) -> Tensor:
        qkv = self.qkv_proj(self.norm(x, cond)).unflatten(2, (3, -1, self.d_head))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [N, H, L, E]
        q, k = (self.pos_emb(self.qk_norm(t), pos) for t in (q, k))
        y = attention(q, k, v, attn_mask)
        return self.out_proj(self.dropout(y.transpose(1, 2).flatten(2))) + x


STAND_INS = (
    AdaGN, ConditionedResidualBlock, Downsample2d, Upsample2d, SelfAttention2d, CrossAttention2d, RMSNorm, AdaRMSNorm,
    LinearGEGLU, FeedForwardBlock, SelfAttentionBlock,
)  # fmt: skip
