"""Sampling of image-autoregressive models (PixelCNNs and their like) at the cost of one pass over the image."""

from .capture import NotPlannable
from .plan import Plan, Steps, plan
from .sampling import sample

__all__ = ["NotPlannable", "Plan", "Steps", "plan", "sample"]
