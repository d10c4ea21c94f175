"""`StandardNormal`, `ScaledNormal`: the distribution of the latent."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops import gaussian_log_prob, philox_normal
from .transform import log_det_dtype


class StandardNormal(nn.Module):
    """Independent normals of mean 0 and variance 1.

    Args:
        shape: of one sample.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def log_prob(self, z: Tensor) -> Tensor:
        """log N(z; 0, I) in nats: [N, *shape] -> [N], float32, or float64 for float64."""
        if tuple(z.shape[1:]) != self.shape:
            raise ValueError(f"StandardNormal: z must be [N, {', '.join(map(str, self.shape))}], got {tuple(z.shape)}")
        return gaussian_log_prob(z)

    def sample(self, seeds: Tensor, temperature: float = 1.0, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, *shape] of deviation ``temperature`` on the device of ``seeds`` [N]: each depends on its own seed alone."""
        normals = philox_normal(seeds, (len(seeds), *self.shape), dtype=dtype)
        return normals if temperature == 1 else normals * temperature

    def extra_repr(self) -> str:
        return f"shape={self.shape}"


class ScaledNormal(StandardNormal):
    """Independent normals of mean 0 whose variances are kept: a buffer of ones to begin with, which :meth:`update` moves.

    For transforms that keep volumes, Zhai et al. 2024 (TarFlow).
    """

    variance: Tensor

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__(shape)
        self.register_buffer("variance", torch.ones(self.shape))

    def log_prob(self, z: Tensor) -> Tensor:
        """log N(z; 0, variance) in nats: [N, *shape] -> [N]."""
        variance = self.variance.to(log_det_dtype(z))
        return super().log_prob(z.to(variance.dtype) * variance.rsqrt()) - 0.5 * variance.log().sum()

    def sample(self, seeds: Tensor, temperature: float = 1.0, *, dtype: torch.dtype = torch.float32) -> Tensor:
        return super().sample(seeds, temperature, dtype=dtype) * self.variance.sqrt().to(dtype)

    @torch.no_grad()
    def update(self, z: Tensor, rate: float = 0.1) -> None:
        """Move the variances by ``rate`` towards those of a batch of latents [N, *shape]."""
        self.variance.lerp_(z.detach().square().mean(0).to(self.variance.dtype), rate)
