"""Guidance: what is done to the model's output before the sampler sees it. Give any of these to `fastgen.samplers.sample`."""

from .auto import AutoGuidance
from .base import Call, Guidance, Model
from .classifier import ClassifierGuidance
from .classifier_free import ClassifierFreeGuidance, rescaled
from .projected import PerpNegGuidance, ProjectedGuidance, ZeroStarGuidance

__all__ = [
    "AutoGuidance",
    "Call",
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "Guidance",
    "Model",
    "PerpNegGuidance",
    "ProjectedGuidance",
    "ZeroStarGuidance",
    "rescaled",
]
