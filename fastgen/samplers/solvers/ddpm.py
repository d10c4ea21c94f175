"""DDPM: the reverse process as a chain of Gaussians (Ho, Jain and Abbeel 2020; Nichol and Dhariwal 2021)."""

import math
from dataclasses import dataclass

from ..engine.path import Path
from ..engine.trace import Trace
from .base import DiscreteSolver

VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")

SMALLEST_VARIANCE = 1e-20  # the posterior variance of the last step is 0, and its logarithm is wanted


def ddpm(trace: Trace, path: Path, *, variance_type: str = "fixed_small") -> None:
    r"""The posterior mean :math:`\frac{\alpha'\beta}{\sigma^2}x_0 + \frac{a\sigma'^2}{\sigma^2}x` with
    :math:`a = \alpha/\alpha'`, :math:`\beta = 1 - a^2` (equation 7), and noise wherever the timestep is above 0."""
    x = None
    for i in range(len(path)):
        x, x0 = trace.call(x, *path.point(i))
        alpha_next, variance, variance_next = path.alphas[i + 1], path.sigmas[i] ** 2, path.sigmas[i + 1] ** 2
        a = path.alphas[i] / alpha_next
        beta = 1 - a**2
        x = alpha_next * beta / variance * x0 + a * variance_next / variance * x
        if path.timesteps[i] > 0:
            std, log_noise = _noise(variance_type, beta, max(variance_next / variance * beta, SMALLEST_VARIANCE))
            x = x + std * trace.noise(log_noise)
    trace.finish(x, *path.end())


def _noise(variance_type: str, beta: float, posterior: float) -> tuple[float, tuple[float, float] | None]:
    """The standard deviation, and how a learned variance scales it (Nichol and Dhariwal 2021, equation 15)."""
    if variance_type == "learned":
        return 1.0, (0.0, 0.5)
    if variance_type == "learned_range":
        low, high = math.log(posterior), math.log(beta)
        return 1.0, ((low + high) / 4, (high - low) / 4)
    return math.sqrt(posterior if "small" in variance_type else beta), None


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
