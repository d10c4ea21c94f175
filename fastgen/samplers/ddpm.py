"""`DDPM`: ancestral sampling of a denoising diffusion model. Ho, Jain and Abbeel 2020; Nichol and Dhariwal 2021."""

import math
from dataclasses import dataclass

from .solver import Plan, Solver
from .table import coefficient_table, to_sample

VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")

_SMALLEST_VARIANCE = 1e-20  # the posterior variance of the last step is 0, and its logarithm is wanted


@dataclass(frozen=True, kw_only=True, eq=False)
class DDPM(Solver):
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

    The other arguments are those of :class:`Solver`.
    """

    variance_type: str = "fixed_small"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variance_type not in VARIANCE_TYPES:
            raise ValueError(f"variance_type must be one of {VARIANCE_TYPES}, got {self.variance_type!r}")

    def plan(self, steps: int, *, guidance_scale: float = 1.0) -> Plan:
        timesteps, alpha_bars = self.trajectory(steps), self.alpha_bars()
        rows = []
        for t, following in zip(timesteps, [*timesteps[1:], -1], strict=True):
            a_t = alpha_bars[t]
            a_next = alpha_bars[following] if following >= 0 else 1.0
            alpha = a_t / a_next
            rows.append(
                {
                    **to_sample(self.prediction_type, a_t),
                    **self.clipping(),
                    **self._noise(a_t, a_next),
                    "guidance_scale": guidance_scale,
                    "sample": math.sqrt(alpha) * (1 - a_next) / (1 - a_t),
                    "prediction": math.sqrt(a_next) * (1 - alpha) / (1 - a_t),
                    "output_prediction": 1.0,
                    "known": math.sqrt(a_next),
                    "known_noise": math.sqrt(1 - a_next),
                }
            )
        draws_noise = [t > 0 for t in timesteps]
        return Plan(timesteps, coefficient_table(rows), draws_noise, self.variance_type.startswith("learned"))

    def _noise(self, a_t: float, a_next: float) -> dict[str, float]:
        beta = 1 - a_t / a_next
        posterior = max((1 - a_next) / (1 - a_t) * beta, _SMALLEST_VARIANCE)
        if self.variance_type == "learned":
            return {"noise": 1.0, "log_noise_slope": 0.5}
        if self.variance_type == "learned_range":
            low, high = math.log(posterior), math.log(beta)
            return {"noise": 1.0, "log_noise": (low + high) / 4, "log_noise_slope": (high - low) / 4}
        return {"noise": math.sqrt(posterior if "small" in self.variance_type else beta)}
