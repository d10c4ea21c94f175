"""Normalizing flows: transforms with log-dets, layers over the fused ops, densities, and training in the memory of one layer."""

from .autoregressive_conditioner import Conditioner, ConditionerPlan, ContextLayer, MaskedLayer, NotPlannable
from .autoregressive_inverse import AffineMap, AutoregressiveMap, InverseReport, SplineMap, invert
from .base import ScaledNormal, StandardNormal
from .causal_transformer import CausalTransformerFlow, Guidance
from .conditioners import MLP, ConvNet, ConvResNet, ResidualMLP
from .coupling import AdditiveCoupling, AffineCoupling, AffineInjector, Coupling, SplineCoupling
from .dequantize import Center, Logit, dequantize
from .flow import Density, Flow, bits_per_dim
from .gauss_seidel_jacobi import GaussSeidelJacobi, Passes
from .glow_step import ActNorm, ActNormConv1x1, GlowStep
from .made import MADE
from .masked_autoregressive import AffineAutoregressive, MaskedAutoregressive, SplineAutoregressive
from .multi_scale import MultiScale, Split, Squeeze
from .permutation import Permutation, Reverse, Shift
from .reversible import Reversible, reversible
from .spline import Spline
from .transform import Compose, Context, Inverse, Transform

__all__ = [
    "MADE",
    "MLP",
    "ActNorm",
    "ActNormConv1x1",
    "AdditiveCoupling",
    "AffineAutoregressive",
    "AffineCoupling",
    "AffineInjector",
    "AffineMap",
    "AutoregressiveMap",
    "CausalTransformerFlow",
    "Center",
    "Compose",
    "Conditioner",
    "ConditionerPlan",
    "Context",
    "ContextLayer",
    "ConvNet",
    "ConvResNet",
    "Coupling",
    "Density",
    "Flow",
    "GaussSeidelJacobi",
    "GlowStep",
    "Guidance",
    "Inverse",
    "InverseReport",
    "Logit",
    "MaskedAutoregressive",
    "MaskedLayer",
    "MultiScale",
    "NotPlannable",
    "Passes",
    "Permutation",
    "ResidualMLP",
    "Reverse",
    "Reversible",
    "ScaledNormal",
    "Shift",
    "Spline",
    "SplineAutoregressive",
    "SplineCoupling",
    "SplineMap",
    "Split",
    "Squeeze",
    "StandardNormal",
    "Transform",
    "bits_per_dim",
    "dequantize",
    "invert",
    "reversible",
]
