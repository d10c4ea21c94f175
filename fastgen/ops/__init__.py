"""The differentiable ops: one function a family, each the public face of the raw ops in ``torch.ops.fastgen``."""

from .group_norm import group_norm
from .philox_normal import philox_normal
from .q_sample import q_sample
from .sampler_step import COLUMNS, sampler_step

__all__ = ["COLUMNS", "group_norm", "philox_normal", "q_sample", "sampler_step"]
