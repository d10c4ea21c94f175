"""Small layers of every kind, with weights that show, and inputs that fit them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastgen.flows import (
    MADE,
    ActNorm,
    ActNormConv1x1,
    AdditiveCoupling,
    AffineAutoregressive,
    AffineCoupling,
    AffineInjector,
    Center,
    Compose,
    ConvNet,
    ConvResNet,
    GlowStep,
    Inverse,
    Logit,
    MultiScale,
    Permutation,
    ResidualMLP,
    Reverse,
    Shift,
    Spline,
    SplineAutoregressive,
    SplineCoupling,
    Split,
    Squeeze,
    Transform,
)
from fastgen.flows.conditioners import MLP
from fastgen.models.glow import SplitPrior, TopPrior

VECTOR, IMAGE = (6,), (4, 4, 4)


class Layer(NamedTuple):
    make: Callable[[], Transform]
    shape: tuple[int, ...]
    context: tuple[int, ...] | str | None = None  # of one sample, or "labels"
    unit: bool = False  # whether the input is in (0, 1)


def _spline(**settings: object) -> Spline:
    return Spline(5, scale=0.5, **settings)


LAYERS = {
    "Permutation": Layer(lambda: Permutation([2, 0, 1, 5, 4, 3]), VECTOR),
    "Permutation of an image": Layer(lambda: Permutation.random(4, seed=3), IMAGE),
    "Reverse": Layer(Reverse, VECTOR),
    "Shift": Layer(lambda: Shift(2), VECTOR),
    "Center": Layer(Center, VECTOR),
    "Logit": Layer(Logit, VECTOR, unit=True),
    "ActNorm": Layer(lambda: ActNorm(6, initialize=False), VECTOR),
    "ActNorm of an image": Layer(lambda: ActNorm(4, initialize=False), IMAGE),
    "ActNormConv1x1": Layer(lambda: ActNormConv1x1(4, initialize=False), IMAGE),
    "ActNormConv1x1, plu": Layer(lambda: ActNormConv1x1(4, initialize=False, parametrization="plu"), IMAGE),
    "ActNormConv1x1, plu, of a vector": Layer(
        lambda: ActNormConv1x1(6, initialize=False, parametrization="plu"), VECTOR
    ),
    "ActNormConv1x1 of a vector": Layer(lambda: ActNormConv1x1(6, initialize=False), VECTOR),
    "Squeeze": Layer(lambda: Compose([Squeeze(), Inverse(Squeeze(order="checkerboard"))]), IMAGE),
    "AdditiveCoupling": Layer(lambda: AdditiveCoupling(MLP(3, 3, hidden_features=8, num_layers=2)), VECTOR),
    "AffineCoupling, exp": Layer(lambda: AffineCoupling(ResidualMLP(3, 6, hidden_features=8)), VECTOR),
    "AffineCoupling, learned tanh": Layer(
        lambda: AffineCoupling(
            ResidualMLP(2, 4, hidden_features=8), mask="first_half", scale_fn="tanh", scale_channels=2
        ),
        (4,),
    ),
    "AffineCoupling, odd": Layer(
        lambda: AffineCoupling(ResidualMLP(2, 6, hidden_features=8), scale_fn="sigmoid", layout="interleaved"), (5,)
    ),
    "AffineCoupling, listed": Layer(
        lambda: AffineCoupling(
            ResidualMLP(4, 4, hidden_features=8), mask=[1, 4], channels=6, order="shift_scale", layout="shift_first"
        ),
        VECTOR,
    ),
    "AffineCoupling, context": Layer(
        lambda: AffineCoupling(ResidualMLP(3, 6, hidden_features=8, context_features=2)), VECTOR, (2,)
    ),
    "AffineCoupling, image": Layer(lambda: AffineCoupling(ConvNet(2, 4, hidden_channels=6)), IMAGE),
    "AffineCoupling, labels": Layer(
        lambda: AffineCoupling(ConvNet(2, 4, hidden_channels=6, num_classes=3)), IMAGE, "labels"
    ),
    "AffineCoupling, checkerboard": Layer(
        lambda: AffineCoupling(ConvResNet(4, 8, hidden_channels=6, num_blocks=1), mask="checkerboard", scale_fn="tanh"),
        IMAGE,
    ),
    "AdditiveCoupling, checkerboard": Layer(
        lambda: AdditiveCoupling(ConvResNet(4, 4, hidden_channels=6, num_blocks=1), mask="checkerboard_inverse"), IMAGE
    ),
    "SplineCoupling": Layer(
        lambda: SplineCoupling(ResidualMLP(3, 3 * 14, hidden_features=8), 6, spline=_spline()), VECTOR
    ),
    "SplineCoupling, image": Layer(
        lambda: SplineCoupling(
            ConvNet(2, 2 * 15, hidden_channels=6), 4, mask="first_half", spline=_spline(tails="circular")
        ),
        IMAGE,
    ),
    "AffineInjector": Layer(lambda: AffineInjector(ConvNet(2, 8, hidden_channels=6)), IMAGE, (2, 4, 4)),
    "AffineAutoregressive": Layer(lambda: AffineAutoregressive(MADE(6, 2, hidden_features=12), 6), VECTOR),
    "AffineAutoregressive, context": Layer(
        lambda: AffineAutoregressive(
            MADE(4, 2, hidden_features=12, num_blocks=1, context_features=2), 4, scale_fn="softplus"
        ),
        (4,),
        (2,),
    ),
    "Inverse": Layer(lambda: Inverse(AffineAutoregressive(MADE(4, 2, hidden_features=12, num_blocks=1), 4)), (4,)),
    "SplineAutoregressive": Layer(
        lambda: SplineAutoregressive(MADE(4, 14, hidden_features=12, num_blocks=1), 4, spline=_spline()), (4,)
    ),
    "GlowStep": Layer(lambda: GlowStep(4, AffineCoupling(ConvNet(2, 4, hidden_channels=6), scale_fn="sigmoid")), IMAGE),
    "GlowStep, plu": Layer(
        lambda: GlowStep(
            4, AffineCoupling(ConvNet(2, 4, hidden_channels=6), scale_fn="sigmoid"), parametrization="plu"
        ),
        IMAGE,
    ),
    "GlowStep, injector": Layer(
        lambda: GlowStep(
            4,
            AdditiveCoupling(ConvNet(2, 2, hidden_channels=6, context_channels=2)),
            AffineInjector(ConvNet(2, 8, hidden_channels=6)),
        ),
        IMAGE,
        (2, 4, 4),
    ),
    "MultiScale": Layer(
        lambda: MultiScale(
            [Compose([Squeeze(), ActNormConv1x1(4)]), Compose([Squeeze(), ActNormConv1x1(8)])],
            [Split(2, 4, SplitPrior(2, 2)), Split(0, 8, TopPrior(8, None))],
            (1, 4, 4),
        ),
        (1, 4, 4),
    ),
    "MultiScale without priors": Layer(
        lambda: MultiScale(
            [Compose([Squeeze(), ActNormConv1x1(4)]), Compose([Squeeze(), ActNormConv1x1(8)])], [Split(2, 4)], (1, 4, 4)
        ),
        (1, 4, 4),
    ),
}


def make(name: str, dtype: torch.dtype = torch.float64, n: int = 3) -> tuple[Transform, Tensor, Tensor | None]:
    """(the layer called ``name`` with weights that show, an input, a context)."""
    layer = LAYERS[name]
    generator = torch.Generator().manual_seed(7)
    transform = shown(layer.make(), generator).to(dtype).eval()
    x = torch.randn(n, *layer.shape, generator=generator, dtype=torch.float64)
    x = (x.sigmoid() if layer.unit else x).to(dtype)
    if layer.context is None:
        return transform, x, None
    if layer.context == "labels":
        return transform, x, torch.arange(n) % 3
    return transform, x, torch.randn(n, *layer.context, generator=generator, dtype=torch.float64).to(dtype)


def shown(transform: torch.nn.Module, generator: torch.Generator | None = None, size: float = 0.5) -> torch.nn.Module:
    """``transform`` with noise on its weights: nothing is the identity or zero, and nothing explodes."""
    with torch.no_grad():
        for parameter in transform.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * size / max(parameter[0].numel(), 4) ** 0.5)
    return transform
