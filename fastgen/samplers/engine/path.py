"""`Path`: the noise levels a trajectory goes through, as the formulas of solvers see them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


def _unknown(sigma: float) -> float:
    return math.nan


@dataclass(frozen=True)
class Path:
    r"""Marginals :math:`x = \alpha_i x_0 + \sigma_i\varepsilon`, from noise to image, in float64 on the host.

    Attributes:
        timesteps: n, what the model is called with.
        alphas, sigmas: n + 1; the last is where the trajectory ends. alphas of 1 make it the sigma space of Karras et al.
        timestep_at: the timestep that belongs to another sigma, for solvers that look between two steps.
    """

    timesteps: Sequence[float]
    alphas: Sequence[float]
    sigmas: Sequence[float]
    timestep_at: Callable[[float], float] = _unknown

    def __post_init__(self) -> None:
        if not len(self.alphas) == len(self.sigmas) == len(self.timesteps) + 1:
            raise ValueError(
                f"a path of {len(self.timesteps)} timesteps has one more alphas and sigmas, got {len(self.alphas)} and "
                f"{len(self.sigmas)}"
            )

    def __len__(self) -> int:
        return len(self.timesteps)

    def log_snr(self, i: int) -> float:
        r"""Half the logarithm of the signal-to-noise ratio, :math:`\lambda_i = \log(\alpha_i / \sigma_i)`."""
        return log_ratio(self.alphas[i], self.sigmas[i])

    def point(self, i: int) -> tuple[float, float, float]:
        """(timestep, alpha, sigma) of step i, as `Trace.call` takes them."""
        return self.timesteps[i], self.alphas[i], self.sigmas[i]

    def end(self) -> tuple[float, float]:
        """(alpha, sigma) after the last step."""
        return self.alphas[-1], self.sigmas[-1]


def log_ratio(alpha: float, sigma: float) -> float:
    """log(alpha / sigma), infinite where one of them is 0."""
    if sigma == 0:
        return math.inf
    return math.log(alpha / sigma) if alpha > 0 else -math.inf
