"""Samplers in continuous time."""

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
    "log_likelihood",
    "perturb",
    "predictor_corrector",
    "reverse_sde",
    "sample_ode",
    "score_from_denoiser",
    "score_from_noise",
]
