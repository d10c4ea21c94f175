"""The differentiable ops: one function a family, each the public face of the raw ops in ``torch.ops.fastgen``."""

from .._schema import COLUMNS, MASK_TYPES, VLB_COLUMNS
from .actnorm import actnorm, actnorm_statistics
from .affine_coupling import ScaleFn, additive_coupling, affine_coupling
from .attention import attention
from .autoregressive_inverse import (
    autoregressive_inverse,
    autoregressive_inverse_advance,
    autoregressive_inverse_spline,
    autoregressive_inverse_state,
)
from .categorical_sample import categorical_sample
from .causal_transformer_inverse import causal_transformer_inverse
from .concat_elu import concat_elu
from .conv2d import conv2d, conv2d_memory_limit, conv2d_plan
from .diffusion_loss import diffusion_loss
from .gated_activation import gated_activation
from .gaussian_log_prob import gaussian_log_prob
from .geglu import geglu, geglu_plan
from .generator_normal import generator_normal
from .group_norm import group_norm
from .group_norm_affine import group_norm_affine
from .incremental import incremental, incremental_step
from .invertible_conv1x1 import invertible_conv1x1, invertible_conv1x1_log_det
from .layer_norm import layer_norm
from .linear_attention import linear_attention
from .logistic_mixture import logistic_mixture, logistic_mixture_sample
from .masked_conv2d import masked_conv2d, masked_conv2d_mask, masked_conv2d_plan
from .masked_linear import masked_linear, masked_linear_fits, masked_linear_network, masked_linear_network_fits
from .philox_normal import philox_normal
from .q_sample import q_sample
from .rational_quadratic_spline import rational_quadratic_spline
from .rms_norm import rms_norm
from .sampler_step import sampler_step
from .squeeze import squeeze
from .upsample_conv2d import upsample_conv2d, upsample_conv2d_plan

__all__ = [
    "COLUMNS",
    "MASK_TYPES",
    "VLB_COLUMNS",
    "ScaleFn",
    "actnorm",
    "actnorm_statistics",
    "additive_coupling",
    "affine_coupling",
    "attention",
    "autoregressive_inverse",
    "autoregressive_inverse_advance",
    "autoregressive_inverse_spline",
    "autoregressive_inverse_state",
    "categorical_sample",
    "causal_transformer_inverse",
    "concat_elu",
    "conv2d",
    "conv2d_memory_limit",
    "conv2d_plan",
    "diffusion_loss",
    "gated_activation",
    "gaussian_log_prob",
    "geglu",
    "geglu_plan",
    "generator_normal",
    "group_norm",
    "group_norm_affine",
    "incremental",
    "incremental_step",
    "invertible_conv1x1",
    "invertible_conv1x1_log_det",
    "layer_norm",
    "linear_attention",
    "logistic_mixture",
    "logistic_mixture_sample",
    "masked_conv2d",
    "masked_conv2d_mask",
    "masked_conv2d_plan",
    "masked_linear",
    "masked_linear_fits",
    "masked_linear_network",
    "masked_linear_network_fits",
    "philox_normal",
    "q_sample",
    "rational_quadratic_spline",
    "rms_norm",
    "sampler_step",
    "squeeze",
    "upsample_conv2d",
    "upsample_conv2d_plan",
]
