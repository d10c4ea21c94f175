"""`DDPM`: ancestral sampling of a denoising diffusion model. Ho, Jain and Abbeel 2020; Nichol and Dhariwal 2021."""

import math
from dataclasses import dataclass

from .formulas.ddpm import ddpm
from .path import Path
from .solver import DiscreteSolver
from .trace import Trace

VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")


@dataclass(frozen=True, kw_only=True, eq=False)
class DDPM(DiscreteSolver):
    r"""The reverse process as a chain of Gaussians (Ho et al. 2020, equations 6 and 7):

    .. math::
        x_{t-1} = \frac{\sqrt{\bar\alpha_{t-1}}\,\beta_t}{1-\bar\alpha_t}\hat x_0
        + \frac{\sqrt{\alpha_t}\,(1-\bar\alpha_{t-1})}{1-\bar\alpha_t} x_t + \sigma_t \varepsilon

    with t - 1 the next timestep of the trajectory and :math:`\alpha_t = \bar\alpha_t / \bar\alpha_{t-1}`.

    Args:
        variance_type: of :math:`\sigma_t^2`. ``"fixed_small"``: the posterior's,
            :math:`\tilde\beta_t = \frac{1-\bar\alpha_{t-1}}{1-\bar\alpha_t}\beta_t`; ``"fixed_large"``: :math:`\beta_t`; the
            ``_log`` forms are the same numbers. ``"learned"``: the model's second half of channels is
            :math:`\log\sigma_t^2`, as in the code of the paper (diffusers' scheduler takes it for the variance itself);
            ``"learned_range"``: it interpolates, from -1 to 1, between :math:`\log\tilde\beta_t` and
            :math:`\log\beta_t` (Nichol and Dhariwal 2021, equation 15).

    The other arguments are those of :class:`DiscreteSolver`.
    """

    variance_type: str = "fixed_small"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variance_type not in VARIANCE_TYPES:
            raise ValueError(f"variance_type must be one of {VARIANCE_TYPES}, got {self.variance_type!r}")

    def learns_variance(self) -> bool:
        return self.variance_type.startswith("learned")

    def follow(self, trace: Trace, steps: int) -> None:
        timesteps, bars = self.trajectory(steps), [*self.alpha_bars(), 1.0]
        levels = [bars[t] for t in [*timesteps, -1]]
        path = Path(timesteps, [math.sqrt(bar) for bar in levels], [math.sqrt(1 - bar) for bar in levels])
        ddpm(trace, path, variance_type=self.variance_type)
