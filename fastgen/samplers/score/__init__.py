"""Score-based and other continuous-time samplers: SDEs, their reverse, the probability flow, Poisson flow, corruptions.

One file a family: `sde` says what the forward processes are, `reverse` and `probability_flow` sample, encode and measure
likelihoods with a score model, `poisson_flow` follows the field of charges, `corruption` and `discrete` undo noise, blur,
masks and categories alike. Where an update is linear in the model's outputs, it is a row of a table for
`fastgen.ops.sampler_step`, worked out beforehand.
"""

from .corruption import Blur, Corruption, GaussianNoise, Mask, cold_diffusion, sample_corruption
from .discrete import Discrete
from .poisson_flow import hemisphere_prior, poisson_field, poisson_flow, poisson_flow_loss, poisson_perturb
from .probability_flow import bits_per_dim, encode, log_likelihood, sample_ode
from .reverse import predictor_corrector, reverse_sde
from .sde import SDE, VE, VP, SubVP, perturb, score_from_denoiser, score_from_noise

__all__ = [
    "SDE",
    "VE",
    "VP",
    "Blur",
    "Corruption",
    "Discrete",
    "GaussianNoise",
    "Mask",
    "SubVP",
    "bits_per_dim",
    "cold_diffusion",
    "encode",
    "hemisphere_prior",
    "log_likelihood",
    "perturb",
    "poisson_field",
    "poisson_flow",
    "poisson_flow_loss",
    "poisson_perturb",
    "predictor_corrector",
    "reverse_sde",
    "sample_corruption",
    "sample_ode",
    "score_from_denoiser",
    "score_from_noise",
]
