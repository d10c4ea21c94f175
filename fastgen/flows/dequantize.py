"""Integers of an image as numbers of a density and back: uniform dequantisation, and the logit of RealNVP."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import philox_normal
from .transform import Context, Transform, log_det_dtype

DEQUANTIZATION_STEP = -3  # of the seeds' streams: not that of the latent


def dequantize(
    images: Tensor,
    levels: int = 256,
    *,
    seeds: Tensor | Sequence[int] | None = None,
    step: int = DEQUANTIZATION_STEP,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(k + u) / levels in [0, 1) for integers k and u uniform in [0, 1).

    Args:
        images: [N, *], integers 0 to ``levels`` - 1 in any dtype.
        levels: values that a number can take.
        seeds: [N]: the noise of an image depends on its seed alone; None draws by torch's generator.
        step: another number of the same seed gives other noise: the epoch, say.
        dtype: of the result.

    Source: Theis et al. 2016 (A note on the evaluation of generative models).
    """
    if seeds is None:
        noise = torch.rand(images.shape, dtype=torch.float32, device=images.device)
    else:  # the normal's distribution function of a normal is uniform
        normals = philox_normal(seeds, images.shape, step, device=images.device)
        noise = torch.special.ndtr(normals)
    noise = noise.clamp_(max=1 - 2.0**-16)  # (levels - 1 + u) / levels stays below 1 in float32
    return ((images.to(torch.float32) + noise) / levels).to(dtype)


class Logit(Transform):
    r"""logit(:math:`\alpha + (1 - 2\alpha) x`) of x in [0, 1], number by number.

    Source: Papamakarios et al. 2017 (Masked autoregressive flow for density estimation), section 4.3; RealNVP has 0.05 for alpha.
    """

    def __init__(self, alpha: float = 0.05) -> None:
        super().__init__()
        if not 0 <= alpha < 0.5:
            raise ValueError(f"Logit: alpha must be in [0, 0.5), got {alpha}")
        self.alpha = alpha

    def forward(self, input: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        output = torch.logit(self.alpha + (1 - 2 * self.alpha) * input)
        return output, self._log_det(output)

    def inverse(self, input: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        return (torch.sigmoid(input) - self.alpha) / (1 - 2 * self.alpha), -self._log_det(input)

    def _log_det(self, logits: Tensor) -> Tensor:
        """log (1 - 2 alpha) - log p (1 - p) with p the sigmoid of ``logits``."""
        y = logits.flatten(1).to(log_det_dtype(logits))
        return (F.softplus(y) + F.softplus(-y)).sum(1) + math.log(1 - 2 * self.alpha) * y.shape[1]

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


class Center(Transform):
    """x - 0.5: images in [0, 1] around 0, as Glow has them."""

    def forward(self, input: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        return input - 0.5, torch.zeros(input.shape[0], dtype=log_det_dtype(input), device=input.device)

    def inverse(self, input: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        return input + 0.5, torch.zeros(input.shape[0], dtype=log_det_dtype(input), device=input.device)
