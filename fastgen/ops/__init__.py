"""The differentiable ops: one function a family, each the public face of the raw ops in ``torch.ops.fastgen``."""

from .._schema import COLUMNS, VLB_COLUMNS
from .attention import attention
from .categorical_sample import categorical_sample
from .conv2d import conv2d, conv2d_memory_limit, conv2d_plan
from .diffusion_loss import diffusion_loss
from .geglu import geglu, geglu_plan
from .generator_normal import generator_normal
from .group_norm import group_norm
from .group_norm_affine import group_norm_affine
from .layer_norm import layer_norm
from .linear_attention import linear_attention
from .logistic_mixture import logistic_mixture, logistic_mixture_sample
from .philox_normal import philox_normal
from .q_sample import q_sample
from .rms_norm import rms_norm
from .sampler_step import sampler_step
from .upsample_conv2d import upsample_conv2d, upsample_conv2d_plan

__all__ = [
    "COLUMNS",
    "VLB_COLUMNS",
    "attention",
    "categorical_sample",
    "conv2d",
    "conv2d_memory_limit",
    "conv2d_plan",
    "diffusion_loss",
    "geglu",
    "geglu_plan",
    "generator_normal",
    "group_norm",
    "group_norm_affine",
    "layer_norm",
    "linear_attention",
    "logistic_mixture",
    "logistic_mixture_sample",
    "philox_normal",
    "q_sample",
    "rms_norm",
    "sampler_step",
    "upsample_conv2d",
    "upsample_conv2d_plan",
]
