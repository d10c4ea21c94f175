"""LCM: latent consistency models (Luo et al. 2023)."""

import math
from dataclasses import dataclass

from ..engine.path import Path
from ..engine.trace import Trace
from ..schedules import check_steps
from .base import DiscreteSolver


def lcm(trace: Trace, path: Path, *, timestep_scaling: float = 10.0, sigma_data: float = 0.5) -> None:
    """Latent consistency models (Luo et al. 2023, section 4): denoise wholly, with the boundary condition of consistency
    models, then add the noise of the next level."""
    x = None
    for i in range(len(path)):
        x, x0 = trace.call(x, *path.point(i))
        c_skip, c_out = lcm_boundary(path.timesteps[i], timestep_scaling, sigma_data)
        denoised = c_out * x0 + c_skip * x
        x = denoised
        if i + 1 < len(path):
            x = path.alphas[i + 1] * denoised + path.sigmas[i + 1] * trace.noise()
    trace.finish(x)


def lcm_boundary(timestep: float, timestep_scaling: float, sigma_data: float = 0.5) -> tuple[float, float]:
    """(c_skip, c_out), which make the model the identity at timestep 0."""
    scaled = timestep * timestep_scaling
    return sigma_data**2 / (scaled**2 + sigma_data**2), scaled / math.hypot(scaled, sigma_data)


@dataclass(frozen=True, kw_only=True, eq=False)
class LCM(DiscreteSolver):
    """Latent consistency models (Luo et al. 2023), distilled on ``original_steps`` timesteps; not clipped."""

    clip_sample: bool = False
    original_steps: int = 50
    timestep_scaling: float = 10.0

    def path(self, steps: int) -> Path:
        """``steps`` of the timesteps of the distillation, evenly chosen."""
        check_steps(steps, most=self.original_steps)
        stride = self.num_train_timesteps // self.original_steps
        origin = [stride * (i + 1) - 1 for i in reversed(range(self.original_steps))]
        times = [origin[i * self.original_steps // steps] for i in range(steps)]
        levels = [self.marginal(t) for t in [*times, -1]]
        return Path(times, [a for a, _ in levels], [s for _, s in levels])

    def follow(self, trace: Trace, steps: int) -> None:
        lcm(trace, self.path(steps), timestep_scaling=self.timestep_scaling)
