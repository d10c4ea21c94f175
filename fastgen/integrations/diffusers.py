"""diffusers: residual blocks and attention of its U-Nets, autoencoders and transformers."""

import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn.conv2d import gathering
from ..nn.transformer import image_of, tokens_of
from ..ops import attention, geglu
from .forwards import rewritten
from .fusing import (
    better_channels_last,
    fusible,
    idle,
    is_swish,
    layer_norms,
    linear,
    norm_silu,
    norm_silu_conv,
    normed_sum,
    projects,
    upsample_conv,
    upsampling,
)
from .pair import Pair, cats, parted, take_pairs, whole, with_pairs
from .stand_in import StandIn, arguments_of, bare, mixin_of


class ResnetBlock2D(StandIn):
    of, project = "ResnetBlock2D", "diffusers"
    does = "norms, SiLU, time embedding and residual in the convolutions"
    takes = ("input_tensor", "temb")
    has = (
        "norm1", "conv1", "time_emb_proj", "norm2", "dropout", "conv2", "nonlinearity", "upsample", "downsample", "conv_shortcut",
        "time_embedding_norm", "skip_time_act", "output_scale_factor",
    )  # fmt: skip

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if module.time_emb_proj is not None and module.time_embedding_norm not in ("default", "scale_shift"):
            yield f"time_embedding_norm {module.time_embedding_norm!r}"
        if not is_swish(module.nonlinearity):
            yield f"non_linearity {type(module.nonlinearity).__name__}"

    def forward(self: Any, input_tensor: Tensor | Pair, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        active = self.nonlinearity
        if (
            args
            or kwargs
            or not fusible(self.norm1, active, self.conv1)
            or not fusible(self.norm2, active, self.conv2, self.dropout)
            or not idle(self.dropout)
            or (self.time_emb_proj is None and temb is not None)
            or (self.time_embedding_norm == "scale_shift" and temb is None)
        ):
            return self.theirs(whole(input_tensor), temb, *args, **kwargs)
        resample = self.upsample or self.downsample
        x, skip = parted(input_tensor, self.norm1, None if resample else self.conv_shortcut)
        if resample is None:
            h = norm_silu_conv(self.norm1, self.conv1, x, skip=skip, gather_moments=True)
        else:
            h, x = self.conv1(resample(norm_silu(self.norm1, x)), **gathering(self.conv1)), resample(x)
        of_norm2 = {}
        if self.time_emb_proj is not None:
            e = self.time_emb_proj(temb if self.skip_time_act else active(temb))
            if self.time_embedding_norm == "default":
                of_norm2 = {"channel_bias": e}
            else:
                scale, shift = e.chunk(2, dim=1)
                of_norm2 = {"scale": scale, "shift": shift}
        if skip is not None:
            residual = self.conv_shortcut(x, skip=skip)
        else:
            residual = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return norm_silu_conv(
            self.norm2, self.conv2, h, residual=residual, output_scale=1 / self.output_scale_factor, gather_moments=True,
            **of_norm2,
        )  # fmt: skip


class UpBlock2D(StandIn):
    """Its own forward, of which a residual block gets both images of `torch.cat` as they lie."""

    of, project, does = "UpBlock2D", "diffusers", "skips read where they lie by the residual blocks"
    takes, has = ("hidden_states", "res_hidden_states_tuple"), ("resnets",)

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if not cats(type(module).forward):
            yield "its forward makes one image of two by something other than torch.cat"

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not take_pairs(self.resnets, ResnetBlock2D):
            return self.theirs(*args, **kwargs)
        return with_pairs(self.parent_class.forward)(self, *args, **kwargs)


class CrossAttnUpBlock2D(UpBlock2D):
    of = "CrossAttnUpBlock2D"


class AttnUpBlock2D(UpBlock2D):
    of = "AttnUpBlock2D"


class SimpleCrossAttnUpBlock2D(UpBlock2D):
    of = "SimpleCrossAttnUpBlock2D"


class ResnetUpsampleBlock2D(UpBlock2D):
    of = "ResnetUpsampleBlock2D"


class SkipUpBlock2D(UpBlock2D):
    of = "SkipUpBlock2D"


class AttnSkipUpBlock2D(UpBlock2D):
    of = "AttnSkipUpBlock2D"


class Upsample2D(StandIn):
    of, project, does = "Upsample2D", "diffusers", "upsampling and its convolution without the large image"
    takes = ("hidden_states", "output_size")
    has = ("channels", "use_conv", "use_conv_transpose", "norm", "interpolate", "name")

    @classmethod
    def concerns(cls, module: Any) -> bool:
        return bool(getattr(module, "use_conv", False))

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if module.use_conv_transpose or module.norm is not None or not module.interpolate:
            yield "a transposed convolution, a norm, or no interpolation"

    def forward(self: Any, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        conv = self.conv if self.name == "conv" else self.Conv2d_0
        doubled = output_size is None or tuple(output_size) == tuple(2 * n for n in hidden_states.shape[2:])
        if args or kwargs or not doubled or hidden_states.shape[1] != self.channels or not upsampling(conv):
            return self.theirs(hidden_states, output_size, *args, **kwargs)
        return upsample_conv(conv, hidden_states, gather_moments=True)


class GEGLU(StandIn):
    of, project, does = "GEGLU", "diffusers", "linear, GELU and product in one"
    takes, has = ("hidden_states",), ("proj",)

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not linear(self.proj):
            return self.theirs(hidden_states, *args, **kwargs)
        return geglu(hidden_states, self.proj.weight, self.proj.bias)


# Whose __call__ hands 4-D queries, keys and values to torch's attention.
PROCESSORS = ("AttnProcessor2_0", "FusedAttnProcessor2_0", "AttnAddedKVProcessor2_0")


class Attention(StandIn):
    of, project, does = "Attention", "diffusers", "attention that reads queries, keys and values where they lie"
    takes = ("hidden_states", "encoder_hidden_states", "attention_mask")
    has = ("processor",)

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if type(module.processor).__name__ not in PROCESSORS:
            yield f"processor {type(module.processor).__name__}"

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        processor: Any = type(self.processor)  # users set others
        if kwargs or processor.__name__ not in PROCESSORS:
            return self.theirs(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        call = call_with_attention(processor)
        return call(
            self.processor,
            self,
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=attention_mask,
        )


class BasicTransformerBlock(StandIn):
    of, project, does = "BasicTransformerBlock", "diffusers", "layer norms and the sums before them in one pass"
    takes = ("hidden_states", "attention_mask", "encoder_hidden_states", "encoder_attention_mask")
    has = (
        "norm_type", "norm1", "attn1", "norm2", "attn2", "norm3", "ff", "pos_embed", "only_cross_attention", "_chunk_size",
    )  # fmt: skip

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if module.norm_type != "layer_norm":
            yield f"norm_type {module.norm_type!r}"
        if module.attn2 is None or module.pos_embed is not None:
            yield "one attention alone, or embedded positions"

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        norms = (self.norm2, self.norm3)
        others = [*args, *kwargs.values()]  # a timestep, arguments of the attentions, classes
        if (
            hidden_states.dim() != 3
            or self._chunk_size is not None
            or any(other is not None for other in others)
            or not layer_norms(norms)
        ):
            return self.theirs(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, *args, **kwargs
            )
        x = hidden_states
        context = encoder_hidden_states if self.only_cross_attention else None
        y = self.attn1(self.norm1(x), encoder_hidden_states=context, attention_mask=attention_mask)
        y, x = normed_sum(self.norm2, y, x)
        y = self.attn2(y, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)
        y, x = normed_sum(self.norm3, y, x)
        return self.ff(y) + x


class Transformer2DModel(StandIn):
    """What goes into its blocks, and what comes out of them."""

    of, project, does = "Transformer2DModel", "diffusers", "images and tokens projected where they lie"
    method, takes = "_operate_on_continuous_inputs", ("hidden_states",)
    has = ("is_input_continuous", "norm", "proj_in", "proj_out", "use_linear_projection")

    @classmethod
    def concerns(cls, module: Any) -> bool:
        return bool(getattr(module, "is_input_continuous", False))

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        output = "_get_output_for_continuous_inputs"
        known = ("hidden_states", "residual", "batch_size", "height", "width", "inner_dim")
        if arguments_of(type(module), output) != known:
            yield f"{output} takes others than ({', '.join(known)})"

    def _operate_on_continuous_inputs(self: Any, hidden_states: Tensor) -> tuple[Tensor, int]:
        if not (projects(self.proj_in) and bare((self.norm,))):
            return self.theirs(hidden_states)
        linear, turned = self.use_linear_projection, hidden_states.stride(1) != 1
        tokens = tokens_of(self.norm, self.proj_in, hidden_states, linear=linear, turned=turned)
        return tokens, hidden_states.shape[1] if linear else tokens.shape[2]

    def _get_output_for_continuous_inputs(
        self: Any, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        if not projects(self.proj_out):
            return self.parent_class._get_output_for_continuous_inputs(
                self, hidden_states, residual, batch_size, height, width, inner_dim
            )
        linear, turned = self.use_linear_projection, residual.stride(1) != 1
        return image_of(self.proj_out, hidden_states, residual, linear=linear, turned=turned)


@functools.cache
def call_with_attention(processor: Any) -> Any:
    """``processor.__call__``, diffusers' own code, with our attention where it says torch's."""
    theirs = processor.__call__
    functional: Any = types.ModuleType("functional", "torch.nn.functional with our attention")
    vars(functional).update(vars(F), scaled_dot_product_attention=scaled_dot_product_attention)
    made = types.FunctionType(
        theirs.__code__,
        {**theirs.__globals__, "F": functional},
        theirs.__name__,
        theirs.__defaults__,
        theirs.__closure__,
    )
    made.__kwdefaults__ = theirs.__kwdefaults__
    return made


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **others: Any,
) -> Tensor:
    """torch's, by ours where that knows what is asked."""
    if dropout_p or others or query.dim() != 4:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **others)
    return attention(query, key, value, attn_mask, is_causal=is_causal, scale=scale)


class UNet2DModel(StandIn):
    """One layout from its first convolution to its last."""

    of, project, does = (
        "UNet2DModel",
        "diffusers",
        "channels-last from its first convolution to its last where that is faster",
    )
    takes, has = ("sample", "timestep"), ("conv_in", "conv_out")

    @classmethod
    def members(cls, parent: Any) -> dict[str, Any]:
        """Their forward, with its last norm, SiLU and convolution as one call where its source can be read."""
        made = rewritten(parent.forward)
        return {} if made is None else {"theirs": made.forward}

    def forward(self: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not better_channels_last(kind_of(self), self.conv_in, sample):
            return self.theirs(sample, *args, **kwargs)
        output = self.theirs(sample.contiguous(memory_format=torch.channels_last), *args, **kwargs)
        if isinstance(output, tuple):
            return (output[0].contiguous(), *output[1:])
        output.sample = output.sample.contiguous()
        return output


class UNet2DConditionModel(UNet2DModel):
    of = "UNet2DConditionModel"


def kind_of(module: Any) -> str:
    mixin = mixin_of(module)
    return "" if mixin is None else mixin.of


STAND_INS = (
    ResnetBlock2D, UpBlock2D, CrossAttnUpBlock2D, AttnUpBlock2D, SimpleCrossAttnUpBlock2D, ResnetUpsampleBlock2D, SkipUpBlock2D,
    AttnSkipUpBlock2D, Upsample2D, GEGLU, Attention, BasicTransformerBlock, Transformer2DModel, UNet2DModel, UNet2DConditionModel,
)  # fmt: skip
