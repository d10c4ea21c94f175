"""k-diffusion's samplers by their own names and signatures, each step one kernel.

``model(x, sigma, **extra_args)`` predicts the clean sample from x = x0 + sigma eps, [N, *], and sigma [N]; ``sigmas`` [steps + 1]
go down to 0, or not quite. ``callback`` is called after each step's first call of the model with a dict of ``x``, ``i``, ``sigma``,
``sigma_hat`` and ``denoised``. k-diffusion need not be installed. The differences, all on purpose: ``BrownianTreeNoiseSampler`` is
fastgen's own tree (torchsde is not needed; other numbers for the same seed, and more steps follow the same path), and samplers draw
no noise where they use none, so that torch's generator is left alone.
"""

from .adaptive import PIDStepSizeController, sample_dpm_adaptive
from .running import BrownianTreeNoiseSampler, default_noise_sampler
from .samplers import (
    sample_dpm_2,
    sample_dpm_2_ancestral,
    sample_dpm_fast,
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_dpmpp_2s_ancestral,
    sample_dpmpp_3m_sde,
    sample_dpmpp_sde,
    sample_euler,
    sample_euler_ancestral,
    sample_heun,
    sample_lms,
)
from .sigmas import (
    append_zero,
    get_ancestral_step,
    get_sigmas_exponential,
    get_sigmas_karras,
    get_sigmas_polyexponential,
    get_sigmas_vp,
    to_d,
)

__all__ = [
    "BrownianTreeNoiseSampler",
    "PIDStepSizeController",
    "append_zero",
    "default_noise_sampler",
    "get_ancestral_step",
    "get_sigmas_exponential",
    "get_sigmas_karras",
    "get_sigmas_polyexponential",
    "get_sigmas_vp",
    "sample_dpm_2",
    "sample_dpm_2_ancestral",
    "sample_dpm_adaptive",
    "sample_dpm_fast",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_2s_ancestral",
    "sample_dpmpp_3m_sde",
    "sample_dpmpp_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "sample_lms",
    "to_d",
]
