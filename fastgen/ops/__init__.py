"""The differentiable ops: one function a family, each the public face of the raw ops in ``torch.ops.fastgen``."""

from .._schema import COLUMNS, MASK_TYPES, VLB_COLUMNS
from .attention import attention
from .categorical_sample import categorical_sample
from .concat_elu import concat_elu
from .conv2d import conv2d, conv2d_memory_limit, conv2d_plan
from .diffusion_loss import diffusion_loss
from .gated_activation import gated_activation
from .geglu import geglu, geglu_plan
from .generator_normal import generator_normal
from .group_norm import group_norm
from .group_norm_affine import group_norm_affine
from .incremental import incremental, incremental_step
from .layer_norm import layer_norm
from .linear_attention import linear_attention
from .logistic_mixture import logistic_mixture, logistic_mixture_sample
from .masked_conv2d import masked_conv2d, masked_conv2d_mask, masked_conv2d_plan
from .philox_normal import philox_normal
from .q_sample import q_sample
from .rms_norm import rms_norm
from .sampler_step import sampler_step
from .upsample_conv2d import upsample_conv2d, upsample_conv2d_plan

__all__ = [
    "COLUMNS",
    "MASK_TYPES",
    "VLB_COLUMNS",
    "attention",
    "categorical_sample",
    "concat_elu",
    "conv2d",
    "conv2d_memory_limit",
    "conv2d_plan",
    "diffusion_loss",
    "gated_activation",
    "geglu",
    "geglu_plan",
    "generator_normal",
    "group_norm",
    "group_norm_affine",
    "incremental",
    "incremental_step",
    "layer_norm",
    "linear_attention",
    "logistic_mixture",
    "logistic_mixture_sample",
    "masked_conv2d",
    "masked_conv2d_mask",
    "masked_conv2d_plan",
    "philox_normal",
    "q_sample",
    "rms_norm",
    "sampler_step",
    "upsample_conv2d",
    "upsample_conv2d_plan",
]
