"""Layers of nflows, normflows, zuko and FrEIA, from their own constructors, as the tests of their stand-ins call them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends import import_peer

nflows = import_peer("nflows.transforms")
of_nflows = import_peer("nflows.flows")
nets = import_peer("nflows.nn.nets")
normal = import_peer("nflows.distributions.normal")
normflows = import_peer("normflows")
zuko = import_peer("zuko")
freia = import_peer("FrEIA.modules")
framework = import_peer("FrEIA.framework")
flows = normflows.flows


class Layer(NamedTuple):
    """A layer, the shape of its input and of its context, and the classes of its stand-ins."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    stand_ins: tuple[str, ...]
    context: tuple[int, ...] | None = None
    inside: bool = False  # whether its input lies in [0, 1]


def mask(size: int, even: bool = True) -> Tensor:
    return torch.where(torch.arange(size) % 2 == int(even), 1.0, -1.0)


def resnet(inputs: int, outputs: int, context: int | None = None) -> nn.Module:
    return nets.ResidualNet(inputs, outputs, hidden_features=16, context_features=context)


def conv_resnet(inputs: int, outputs: int) -> nn.Module:
    return nets.ConvResidualNet(inputs, outputs, hidden_channels=8)


def mlp(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, outputs))


def conv(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, 8, 1), nn.Tanh(), nn.Conv2d(8, outputs, 1))


RQS = {"num_bins": 5, "tails": "linear", "tail_bound": 2.0}
SPLINE = "PiecewiseRationalQuadraticCouplingTransform"
OF_MADE = ("MADE", "MaskedLinear")

NFLOWS = {
    "affine": Layer(lambda: nflows.AffineCouplingTransform(mask(7), resnet), (5, 7), ("AffineCouplingTransform",)),
    "affine, with context": Layer(
        lambda: nflows.AffineCouplingTransform(mask(7), lambda i, o: resnet(i, o, 3)), (5, 7),
        ("AffineCouplingTransform",), (5, 3),
    ),
    "affine, images": Layer(
        lambda: nflows.AffineCouplingTransform(mask(6, False), conv_resnet), (3, 6, 4, 5), ("AffineCouplingTransform",)
    ),
    "additive": Layer(lambda: nflows.AdditiveCouplingTransform(mask(7), resnet), (5, 7), ("AdditiveCouplingTransform",)),
    "spline": Layer(lambda: getattr(nflows, SPLINE)(mask(7), resnet, **RQS), (5, 7), (SPLINE,)),
    "spline, unconditional": Layer(
        lambda: getattr(nflows, SPLINE)(mask(7), resnet, **RQS, apply_unconditional_transform=True), (5, 7),
        (SPLINE, "PiecewiseRationalQuadraticCDF"),
    ),
    "spline, images": Layer(lambda: getattr(nflows, SPLINE)(mask(6), conv_resnet, **RQS), (3, 6, 4, 5), (SPLINE,)),
    "spline, no tails": Layer(
        lambda: getattr(nflows, SPLINE)(mask(7), resnet, num_bins=5), (5, 7), (SPLINE,), inside=True
    ),
    "autoregressive": Layer(
        lambda: nflows.MaskedAffineAutoregressiveTransform(6, 20), (5, 6),
        ("MaskedAffineAutoregressiveTransform", *OF_MADE),
    ),
    "autoregressive, with context": Layer(
        lambda: nflows.MaskedAffineAutoregressiveTransform(6, 20, context_features=3, activation=torch.tanh), (5, 6),
        ("MaskedAffineAutoregressiveTransform", *OF_MADE), (5, 3),
    ),
    "autoregressive, no residuals": Layer(
        lambda: nflows.MaskedAffineAutoregressiveTransform(6, 20, use_residual_blocks=False, random_mask=True), (5, 6),
        ("MaskedAffineAutoregressiveTransform", *OF_MADE),
    ),
    "autoregressive spline": Layer(
        lambda: nflows.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(6, 20, **RQS), (5, 6),
        ("MaskedPiecewiseRationalQuadraticAutoregressiveTransform", *OF_MADE),
    ),
    "autoregressive spline, no tails": Layer(
        lambda: nflows.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(6, 20, num_bins=5), (5, 6),
        ("MaskedPiecewiseRationalQuadraticAutoregressiveTransform", *OF_MADE), inside=True,
    ),
    "actnorm": Layer(lambda: nflows.ActNorm(6), (5, 6), ("ActNorm",)),
    "actnorm, images": Layer(lambda: nflows.ActNorm(6), (5, 6, 3, 4), ("ActNorm",)),
    "1x1": Layer(lambda: nflows.OneByOneConvolution(6, identity_init=False), (5, 6, 3, 4), ("OneByOneConvolution",)),
    "squeeze": Layer(lambda: nflows.SqueezeTransform(), (5, 8, 4, 6), ("SqueezeTransform",)),
}  # fmt: skip

BLOCK = ("AffineCouplingBlock", "AffineCoupling")
COUPLED = ("PiecewiseRationalQuadraticCoupling", "PiecewiseRationalQuadraticCDF")
BOUNDS = (1.0, 2.0, 3.0, 1.5, 2.5, 3.5, 1.2)
NORMFLOWS = {
    "affine": Layer(lambda: flows.AffineCouplingBlock(mlp(3, 6)), (5, 6), BLOCK),
    "affine, sigmoid": Layer(
        lambda: flows.AffineCouplingBlock(conv(3, 6), scale_map="sigmoid", split_mode="channel_inv"), (5, 6, 3, 4), BLOCK
    ),
    "affine, multiplied": Layer(
        lambda: flows.AffineCouplingBlock(mlp(4, 6), scale_map="sigmoid_inv"), (5, 7), BLOCK
    ),
    "affine, checkerboard": Layer(
        lambda: flows.AffineCouplingBlock(conv(3, 6), split_mode="checkerboard"), (5, 3, 4, 6), ("AffineCoupling",)
    ),
    "masked": Layer(
        lambda: flows.MaskedAffineFlow(torch.tensor([1.0, 0, 1, 0, 0, 1, 1]), mlp(7, 7), mlp(7, 7)), (5, 7),
        ("MaskedAffineFlow",),
    ),
    "masked, integers": Layer(
        lambda: flows.MaskedAffineFlow(torch.tensor([1, 0, 1, 0, 0, 1, 1]), s=mlp(7, 7)), (5, 7), ("MaskedAffineFlow",)
    ),
    "autoregressive": Layer(
        lambda: flows.MaskedAffineAutoregressive(6, 20, context_features=3), (5, 6),
        ("MaskedAffineAutoregressive", *OF_MADE), (5, 3),
    ),
    "spline": Layer(lambda: flows.CoupledRationalQuadraticSpline(7, 2, 16), (5, 7), COUPLED),
    "spline, circular and not": Layer(
        lambda: flows.CircularCoupledRationalQuadraticSpline(
            7, 2, 16, ind_circ=[1, 2, 4], tail_bound=torch.tensor(BOUNDS)
        ), (5, 7), COUPLED,
    ),
    "autoregressive spline": Layer(
        lambda: flows.AutoregressiveRationalQuadraticSpline(6, 1, 20, num_context_channels=3, permute_mask=True), (5, 6),
        ("MaskedPiecewiseRationalQuadraticAutoregressive", *OF_MADE), (5, 3),
    ),
    "autoregressive spline, circular and not": Layer(
        lambda: flows.CircularAutoregressiveRationalQuadraticSpline(6, 1, 20, ind_circ=[1, 3]), (5, 6),
        ("MaskedPiecewiseRationalQuadraticAutoregressive", "MaskedLinear"),
    ),
    "constants": Layer(lambda: flows.AffineConstFlow((6,)), (5, 6), ("AffineConstFlow",)),
    "actnorm": Layer(lambda: flows.ActNorm((6, 1, 1)), (5, 6, 3, 4), ("ActNorm",)),
    "1x1": Layer(lambda: flows.Invertible1x1Conv(6), (5, 6, 3, 4), ("Invertible1x1Conv",)),
    "1x1 by LU": Layer(lambda: flows.Invertible1x1Conv(6, use_lu=True), (5, 6, 3, 4), ("Invertible1x1Conv",)),
    "permutation": Layer(lambda: flows.Permute(6), (5, 6, 3, 4), ("Permute",)),
    "squeeze": Layer(lambda: flows.Squeeze(), (5, 8, 4, 6), ("Squeeze",)),
    "Glow": Layer(lambda: flows.GlowBlock(6, 8), (5, 6, 4, 4), (*BLOCK, "ActNorm", "Invertible1x1Conv")),
}  # fmt: skip

AUTOREGRESSIVE, COUPLING = "MaskedAutoregressiveTransform", "GeneralCouplingTransform"
SHAPES = {"univariate": zuko.transforms.MonotonicRQSTransform, "shapes": ((4,), (4,), (3,))}
CIRCULAR = {**SHAPES, "univariate": zuko.flows.spline.CircularRQSTransform}
ZUKO = {
    "MAF": Layer(lambda: zuko.flows.MAF(5, 3), (7, 5), (AUTOREGRESSIVE, "MaskedLinear"), (7, 3)),
    "MAF, residual": Layer(
        lambda: zuko.flows.MAF(5, hidden_features=(32, 32), residual=True, randperm=True, activation=nn.ELU), (7, 5),
        (AUTOREGRESSIVE, "MaskedLinear"),
    ),
    "MAF in two passes": Layer(lambda: zuko.flows.MAF(5, passes=2), (7, 5), (AUTOREGRESSIVE, "MaskedLinear")),
    "NSF": Layer(lambda: zuko.flows.NSF(5, 3, bins=4), (7, 5), (AUTOREGRESSIVE, "MaskedLinear"), (3,)),
    "NCSF": Layer(lambda: zuko.flows.NCSF(5), (7, 5), (AUTOREGRESSIVE, "MaskedLinear")),
    "RealNVP": Layer(lambda: zuko.flows.RealNVP(5, 3, randmask=True), (2, 7, 5), (COUPLING,), (7, 3)),
    "NICE of splines": Layer(lambda: zuko.flows.NICE(5, **SHAPES), (5,), (COUPLING,)),
    "NICE of circular splines": Layer(lambda: zuko.flows.NICE(5, 3, **CIRCULAR), (7, 5), (COUPLING,), (7, 3)),
}  # fmt: skip


def of_freia(name: str, *shape: int, context: tuple[int, ...] | None = None, **options: Any) -> Layer:
    def make() -> nn.Module:
        net = (
            {}
            if name.startswith(("ActNorm", "IRevNet", "Permute"))
            else {"subnet_constructor": mlp if len(shape) == 1 else conv}
        )
        dims = {} if context is None else {"dims_c": [context]}
        return getattr(freia, name)([shape], **dims, **net, **options)

    return Layer(make, (5, *shape), (name,), None if context is None else (5, *context))


TWO_SIDED = ("GLOWCouplingBlock", "RNVPCouplingBlock", "GINCouplingBlock", "AffineCouplingOneSided")
FREIA = {
    **{f"{name}, {clamp}": of_freia(name, 7, clamp=1.7, clamp_activation=clamp)
       for name in TWO_SIDED for clamp in ("ATAN", "TANH", "SIGMOID")},
    **{f"{name}, images, with context": of_freia(name, 6, 4, 4, context=(2, 4, 4)) for name in TWO_SIDED},
    "ConditionalAffineTransform": of_freia("ConditionalAffineTransform", 7, context=(3,)),
    "AllInOneBlock": of_freia("AllInOneBlock", 7),
    "AllInOneBlock, images": of_freia("AllInOneBlock", 6, 4, 4, permute_soft=True),
    "AllInOneBlock, GIN": of_freia("AllInOneBlock", 6, 4, 4, gin_block=True),
    "AllInOneBlock, reflections": of_freia("AllInOneBlock", 7, learned_householder_permutation=2, affine_clamping=1.5),
    "AllInOneBlock, both ways": of_freia("AllInOneBlock", 7, reverse_permutation=True, global_affine_type="SIGMOID"),
    "ActNorm": of_freia("ActNorm", 6),
    "ActNorm, images": of_freia("ActNorm", 6, 4, 4),
    "PermuteRandom": of_freia("PermuteRandom", 7),
    "IRevNetDownsampling": of_freia("IRevNetDownsampling", 3, 4, 6),
    "IRevNetUpsampling": of_freia("IRevNetUpsampling", 12, 4, 6),
}  # fmt: skip

LAYERS: dict[str, Layer] = {
    f"{project}: {name}": layer
    for project, layers in (("nflows", NFLOWS), ("normflows", NORMFLOWS), ("zuko", ZUKO), ("FrEIA", FREIA))
    for name, layer in layers.items()
}


def built(layer: Layer, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The layer with weights that show, and past its data-dependent initialisation."""
    torch.manual_seed(0)
    module = layer.make().to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point() and parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
        if any("ActNorm" in name for name in layer.stand_ins):
            both_ways(module, randn(layer.shape, dtype), None)
    return module


def randn(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 1, inside: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand if inside else torch.randn)(shape, generator=generator, dtype=torch.float64).to(dtype)


def both_ways(module: Any, x: Tensor, context: Tensor | None) -> list[Tensor]:
    """Outputs and log-dets of x forward and backward, where it has another shape then of what was made of it."""
    given = () if context is None else (context,)
    if isinstance(module, zuko.lazy.LazyDistribution):
        made = module(*given)
        transform = made.transform
        return [*transform.call_and_ladj(x), *transform.inv.call_and_ladj(x), transform.inv(x), made.log_prob(x)]
    if isinstance(module, freia.InvertibleModule):
        conditions = ([context],) if context is not None else ()
        (y,), log_det = module([x], *conditions, rev=False)
        (back,), of_back = module([x if x.shape == y.shape else y], *conditions, rev=True)
        return [y, torch.as_tensor(log_det), back, torch.as_tensor(of_back)]
    y, log_det = module(x, *given)
    back, of_back = module.inverse(x if x.shape == y.shape else y, *given)
    return [y, torch.as_tensor(log_det), back, torch.as_tensor(of_back)]
