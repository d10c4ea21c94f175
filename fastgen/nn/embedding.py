"""Sinusoidal embedding of diffusion timesteps, and the small network after it.

Ho et al., "Denoising Diffusion Probabilistic Models", 2020, appendix B; frequencies as in Vaswani et al., 2017.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(
    timesteps: Tensor,
    dim: int,
    *,
    max_period: float = 10000.0,
    flip_sin_to_cos: bool = True,
    frequency_shift: float = 0.0,
) -> Tensor:
    r"""Embed each timestep t as :math:`(\cos t f_i, \sin t f_i)`, :math:`f_i = max\_period^{-i / (dim/2 - shift)}`.

    The defaults are the convention of improved-DDPM and guided-diffusion; the original DDPM has sines first and
    ``frequency_shift=1``. An odd ``dim`` ends in a zero.

    Args:
        timesteps: [N], integers or fractions.
        dim: of the result, at least 2.
        max_period: the longest period is 2 pi times this.
        flip_sin_to_cos: cosines before sines.
        frequency_shift: subtracted from dim/2 in the exponent.

    Returns:
        [N, dim] in float32 (float64 for float64 timesteps).

    Raises:
        ValueError: ``timesteps`` is not one-dimensional, or ``dim`` and ``frequency_shift`` leave no frequency.
    """
    if timesteps.dim() != 1:
        raise ValueError(f"timestep_embedding: timesteps must be [N], got shape {tuple(timesteps.shape)}")
    half = dim // 2
    if half - frequency_shift <= 0:
        raise ValueError(
            f"timestep_embedding: dim / 2 must exceed frequency_shift, got dim={dim} and "
            f"frequency_shift={frequency_shift}"
        )
    dtype = torch.float64 if timesteps.dtype == torch.float64 else torch.float32
    index = torch.arange(half, dtype=dtype, device=timesteps.device)
    angles = timesteps.to(dtype)[:, None] * torch.exp(index * (-math.log(max_period) / (half - frequency_shift)))
    pair = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return F.pad(torch.cat(pair, dim=1), (0, dim % 2))


class TimestepEmbedding(nn.Module):
    """Timesteps [N] -> sinusoids [N, dim] -> linear, SiLU, linear -> [N, out_dim] in the dtype of the weights.

    Args:
        dim: of the sinusoids.
        out_dim: of the result.
        flip_sin_to_cos, frequency_shift: see :func:`timestep_embedding`.
    """

    def __init__(self, dim: int, out_dim: int, *, flip_sin_to_cos: bool = True, frequency_shift: float = 0.0) -> None:
        super().__init__()
        self.dim = dim
        self.flip_sin_to_cos = flip_sin_to_cos
        self.frequency_shift = frequency_shift
        self.linear_1 = nn.Linear(dim, out_dim)
        self.linear_2 = nn.Linear(out_dim, out_dim)

    def forward(self, timesteps: Tensor) -> Tensor:
        sinusoids = timestep_embedding(
            timesteps, self.dim, flip_sin_to_cos=self.flip_sin_to_cos, frequency_shift=self.frequency_shift
        )
        return self.linear_2(F.silu(self.linear_1(sinusoids.to(self.linear_1.weight.dtype))))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, flip_sin_to_cos={self.flip_sin_to_cos}, frequency_shift={self.frequency_shift}"
