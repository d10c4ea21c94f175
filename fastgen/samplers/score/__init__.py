"""Samplers in continuous time."""

from .reverse import predictor_corrector, reverse_sde
from .sde import SDE, VE, VP, SubVP, perturb, score_from_denoiser, score_from_noise

__all__ = [
    "SDE",
    "VE",
    "VP",
    "SubVP",
    "perturb",
    "predictor_corrector",
    "reverse_sde",
    "score_from_denoiser",
    "score_from_noise",
]
