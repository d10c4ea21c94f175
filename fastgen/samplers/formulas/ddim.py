"""DDIM (Song, Meng and Ermon 2021), its inversion, and what distilled models make of it: LCM and TCD."""

import math
from collections.abc import Sequence

from ..path import Path
from ..trace import Linear, Trace


def ddim_step(
    trace: Trace,
    x: Linear | None,
    point: tuple[float, float, float],
    end: tuple[float, float],
    *,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    always_draw: bool = False,
) -> Linear:
    r"""One step from (timestep, alpha, sigma) to the marginal (alpha', sigma'), on the way to the image or, inverted, to the noise.

    :math:`x' = \alpha' x_0 + \sqrt{\sigma'^2 - s^2}\,\hat\varepsilon + s\varepsilon` (Song et al. 2021, equations 12 and 16),
    with :math:`s = \eta\,(\sigma'/\sigma)\sqrt{1 - (\alpha/\alpha')^2}`.
    """
    (_, alpha, sigma), (alpha_next, sigma_next) = point, end
    x, x0 = trace.call(x, *point)
    if use_clipped_model_output:
        eps = (x - alpha * x0) / sigma
    else:
        eps = unclipped_epsilon(trace, x, alpha, sigma)
    std = eta * sigma_next / sigma * math.sqrt(max(1 - (alpha / alpha_next) ** 2, 0.0)) if eta > 0 else 0.0
    scale = trace.prediction.input_scale(*end) if trace.scale_inputs else 1.0
    trace.steps[-1].known = (alpha_next * scale, sigma_next * scale)
    following = alpha_next * x0 + math.sqrt(max(sigma_next**2 - std**2, 0.0)) * eps
    return following + std * trace.noise() if eta > 0 or always_draw else following


def unclipped_epsilon(trace: Trace, x: Linear, alpha: float, sigma: float) -> Linear:
    """The noise as the model itself predicts it, whatever its prediction of the clean sample is clipped to."""
    if trace.prediction.prediction_type == "epsilon":
        return trace.output
    if trace.prediction.prediction_type == "sample":
        return (x - alpha * trace.output) / sigma
    if trace.prediction.prediction_type == "flow_prediction":
        return x + (1 - sigma) * trace.output
    r = math.hypot(alpha, sigma)
    return (alpha * trace.output + sigma / r * x) / r


def lcm(trace: Trace, path: Path, *, timestep_scaling: float = 10.0, sigma_data: float = 0.5, start: int = 0) -> None:
    """Latent consistency models (Luo et al. 2023, section 4): denoise wholly, with the boundary condition of consistency
    models, then add the noise of the next level."""
    x = None
    for i in range(start, len(path)):
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


def tcd(trace: Trace, path: Path, between: Sequence[tuple[float, float]], *, eta: float = 0.3, start: int = 0) -> None:
    """Trajectory consistency distillation (Zheng et al. 2024, algorithm 4, its gamma is ``eta``): DDIM to the marginals
    (alpha, sigma) of ``between``, then noise up to the next level."""
    x = None
    for i in range(start, len(path)):
        x, x0 = trace.call(x, *path.point(i))
        alpha, sigma = between[i]
        x = alpha * x0 + sigma * unclipped_epsilon(trace, x, path.alphas[i], path.sigmas[i])
        if eta > 0 and i + 1 < len(path):
            ratio = path.alphas[i + 1] / alpha
            x = ratio * x + math.sqrt(max(1 - ratio**2, 0.0)) * trace.noise()
    trace.finish(x)
