"""Samplers in continuous time."""

from .sde import SDE, VE, VP, SubVP, perturb, score_from_denoiser, score_from_noise

__all__ = ["SDE", "VE", "VP", "SubVP", "perturb", "score_from_denoiser", "score_from_noise"]
