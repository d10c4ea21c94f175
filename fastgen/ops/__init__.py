"""The differentiable ops: one function a family, each the public face of the raw ops in ``torch.ops.fastgen``."""

from .._schema import COLUMNS, VLB_COLUMNS
from .diffusion_loss import diffusion_loss
from .generator_normal import generator_normal
from .group_norm import group_norm
from .philox_normal import philox_normal
from .q_sample import q_sample
from .sampler_step import sampler_step

__all__ = [
    "COLUMNS",
    "VLB_COLUMNS",
    "diffusion_loss",
    "generator_normal",
    "group_norm",
    "philox_normal",
    "q_sample",
    "sampler_step",
]
