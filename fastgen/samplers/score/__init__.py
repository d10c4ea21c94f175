"""Samplers in continuous time."""

from .poisson_flow import hemisphere_prior, poisson_field, poisson_flow, poisson_flow_loss, poisson_perturb
from .probability_flow import bits_per_dim, encode, log_likelihood, sample_ode
from .reverse import predictor_corrector, reverse_sde
from .sde import SDE, VE, VP, SubVP, perturb, score_from_denoiser, score_from_noise

__all__ = [
    "SDE",
    "VE",
    "VP",
    "SubVP",
    "bits_per_dim",
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
    "sample_ode",
    "score_from_denoiser",
    "score_from_noise",
]
