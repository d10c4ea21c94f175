"""DDPM: the reverse process as a chain of Gaussians (Ho, Jain and Abbeel 2020; Nichol and Dhariwal 2021), and RePaint on it."""

import math
from collections.abc import Callable, Sequence

from ..path import Path
from ..trace import Trace
from .ddim import ddim_step

SMALLEST_VARIANCE = 1e-20  # the posterior variance of the last step is 0, and its logarithm is wanted


def ddpm(trace: Trace, path: Path, *, variance_type: str = "fixed_small", start: int = 0) -> None:
    r"""The posterior mean :math:`\frac{\alpha'\beta}{\sigma^2}x_0 + \frac{a\sigma'^2}{\sigma^2}x` with
    :math:`a = \alpha/\alpha'`, :math:`\beta = 1 - a^2` (equation 7), and noise wherever the timestep is above 0."""
    x = None
    for i in range(start, len(path)):
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


def repaint(
    trace: Trace,
    timesteps: Sequence[int],
    marginal: Callable[[int], tuple[float, float]],
    stride: int,
    *,
    eta: float = 1.0,
) -> None:
    """RePaint (Lugmayr et al. 2022, algorithm 1): steps of DDIM with ``eta``, and noise put back where the timesteps go up."""
    x, previous = None, timesteps[0]
    for t in timesteps:
        if t > previous:  # x stands at previous - stride, and goes up to t - stride = previous
            low, high = marginal(previous - stride), marginal(previous)
            x = trace.renoise(x, previous, *low)
            ratio = high[0] / low[0]
            x = ratio * x + math.sqrt(1 - ratio**2) * trace.noise()
        else:
            x = ddim_step(trace, x, (t, *marginal(t)), marginal(t - stride), eta=eta)
        previous = t
    trace.finish(x)
