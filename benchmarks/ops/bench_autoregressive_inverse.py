"""`autoregressive_inverse`: samples of one masked autoregressive layer, beside nflows, zuko and flowjax with their own networks;
affine, and with rational-quadratic splines of eight bins.

nflows' network has two residual blocks, four products with 512 x 512 weights; zuko's has two hidden layers, flowjax's one, its
default. Where a loop over all features takes long, one pass at the solution is timed, and its time multiplied. The floor is one
forward of nflows' network by matrix products of whole weights.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastgen.flows import (
    MADE,
    AffineAutoregressive,
    AffineMap,
    AutoregressiveMap,
    Conditioner,
    ConditionerPlan,
    MaskedLayer,
    Spline,
    SplineAutoregressive,
    SplineMap,
    invert,
)
from fastgen.ops import ScaleFn

from ..cases import Case, Provider, Workload, random_tensor
from ..flowjax_peer import started
from ..verify import Values

BATCH, WIDTH = 256, 512
SIZES = {"nflows": (64, 784), "zuko": (64,), "flowjax": (64,), "nflows, splines": (64,), "zuko, splines": (64,)}
BINS = 8
AT_ONCE = 64  # features up to which all passes of a loop are timed


def cases(device: torch.device, full: bool) -> list[Case]:
    """A network of each library; nflows' also at the size of an MNIST image."""
    if device.type != "cpu":
        return []
    return [
        Case(
            "autoregressive_inverse", f"network of {name}", (BATCH, features), "fp32",
            functools.partial(BUILD[name], features), f"masked autoregressive inverse, network of {name}", layout="ND",
        )
        for name, sizes in SIZES.items()
        for features in sizes
    ]  # fmt: skip


def build_nflows(features: int, allow_compile: bool) -> Workload:
    from nflows.transforms.autoregressive import MaskedAffineAutoregressiveTransform

    theirs = randomised(MaskedAffineAutoregressiveTransform(features, WIDTH), 0.03)
    made = MADE(features, 2, hidden_features=WIDTH)
    missing = made.load_state_dict(theirs.autoregressive_net.state_dict(), strict=False).missing_keys
    assert not missing, missing
    ours = AffineAutoregressive(made, features, scale_fn=ScaleFn("softplus", eps=1e-3))
    y = random_tensor((BATCH, features), torch.device("cpu"), "fp32", seed=3)
    wide = AffineAutoregressive(randomised(MADE(features, 2, hidden_features=WIDTH), 0.03), features).double()
    wide.load_state_dict(ours.state_dict())
    wide.scale_fn = ours.scale_fn
    expected = functools.cache(lambda: wide.inverse(y.double()))
    x = ours.inverse(y)[0]

    def one_pass() -> tuple[Tensor, Tensor]:
        return theirs._elementwise_inverse(y, theirs.autoregressive_net(x))

    loop = Provider("nflows", functools.partial(theirs.inverse, y))
    if features > AT_ONCE:
        loop = Provider("nflows", one_pass, times=features)
    products = [
        random_tensor(tuple(w.shape), y.device, "fp32", 5 + i) for i, w in enumerate(made.parameters()) if w.dim() == 2
    ]

    def dense() -> Tensor:
        h = y
        for weight in products:
            h = torch.matmul(h, weight.t())
        return h

    providers = [
        loop,
        Provider("fastgen", functools.partial(ours.inverse, y), "fastgen"),
        Provider("matrix products", dense, "floor"),
    ]
    return _workload(providers, expected, y, [w for w in made.parameters() if w.dim() == 2])


def build_zuko(features: int, allow_compile: bool) -> Workload:
    from zuko.flows.autoregressive import MaskedAutoregressiveTransform

    theirs = randomised(MaskedAutoregressiveTransform(features, hidden_features=(WIDTH, WIDTH)), 0.03)
    linears = [layer for layer in theirs.hyper if hasattr(layer, "mask")]
    network = AutoregressiveMap(
        lambda x, _: theirs.hyper(x), _unused, _unused, ConditionerPlan(),
        AffineMap("soft_clip", bound=-torch.tensor(1e-3).log().item(), shift_first=True),
        lambda: conditioner([(r.weight, r.bias, r.mask) for r in linears], features),
    )  # fmt: skip
    y = random_tensor((BATCH, features), torch.device("cpu"), "fp32", seed=3)

    def loop() -> tuple[Tensor, Tensor]:
        transform = theirs()
        x = transform.inv(y)
        return x, -transform.log_abs_det_jacobian(x, y)

    def expected() -> tuple[Tensor, Tensor]:
        theirs.double()
        try:
            transform = theirs()
            x = transform.inv(y.double())
            return x, -transform.log_abs_det_jacobian(x, y.double())
        finally:
            theirs.float()

    providers = [
        Provider("zuko", loop),
        Provider("fastgen", lambda: invert(network, y)[:2], "fastgen"),
    ]
    return _workload(providers, functools.cache(expected), y, [r.weight for r in linears])


def build_flowjax(features: int, allow_compile: bool) -> Workload:
    notes: list[str] = []
    peer = started(allow_compile, notes)
    y = random_tensor((BATCH, features), torch.device("cpu"), "fp32", seed=3)
    if peer is not None:
        given = [tuple(torch.tensor(a) for a in layer) for layer in peer("maf", features, WIDTH, 1, y.numpy(), True)]
    else:
        net = randomised(MADE(features, 2, hidden_features=WIDTH, num_blocks=0), 0.05)
        given = [(r.weight.detach(), r.bias.detach(), r.mask) for r in (net.initial_layer, net.final_layer)]
    weight, bias, mask = given[-1]
    one = torch.tensor(1.0).expm1().log()  # softplus of it is 1
    given[-1] = (weight, bias + torch.tensor([0.0, one]).repeat(features), mask)

    def described(dtype: torch.dtype) -> AutoregressiveMap:
        layers = [(w.to(dtype), b.to(dtype), m) for w, b, m in given]
        plan, affine = ConditionerPlan(), AffineMap("softplus", shift_first=True)
        return AutoregressiveMap(_unused, _unused, _unused, plan, affine, lambda: conditioner(layers, features))

    network, wide = described(torch.float32), described(torch.float64)
    providers = [Provider("fastgen", lambda: invert(network, y)[:2], "fastgen")]
    if peer is not None:
        providers.insert(0, Provider("flowjax", lambda: tuple(map(torch.tensor, peer("run")))))
    workload = _workload(providers, lambda: invert(wide, y.double())[:2], y, [w for w, _, _ in given])
    workload.notes += notes
    return workload


def build_nflows_splines(features: int, allow_compile: bool) -> Workload:
    from nflows.transforms.autoregressive import MaskedPiecewiseRationalQuadraticAutoregressiveTransform as Theirs

    theirs = randomised(Theirs(features, WIDTH, num_bins=BINS, tails="linear", tail_bound=3.0), 0.05)
    known = hasattr(theirs.autoregressive_net, "hidden_features")  # by whose root nflows then divides
    spline = Spline(BINS, 3.0, scale=WIDTH**-0.5 if known else 1.0)

    def like_theirs() -> SplineAutoregressive:
        made = MADE(features, spline.num_parameters, hidden_features=WIDTH)
        missing = made.load_state_dict(theirs.autoregressive_net.state_dict(), strict=False).missing_keys
        assert not missing, missing
        return SplineAutoregressive(made, features, spline=spline)

    ours, wide = like_theirs(), like_theirs().double()
    y = random_tensor((BATCH, features), torch.device("cpu"), "fp32", seed=3)
    providers = [
        Provider("nflows", functools.partial(theirs.inverse, y)),
        Provider("fastgen", functools.partial(ours.inverse, y), "fastgen"),
    ]
    weights = [w for w in ours.parameters() if w.dim() == 2]
    return _workload(providers, functools.cache(lambda: invert(_loop(wide), y.double(), tolerance=0)[:2]), y, weights)


def build_zuko_splines(features: int, allow_compile: bool) -> Workload:
    from zuko.flows.autoregressive import MaskedAutoregressiveTransform
    from zuko.transforms import MonotonicRQSTransform

    shapes = ((BINS,), (BINS,), (BINS - 1,))
    options = {"univariate": MonotonicRQSTransform, "shapes": shapes, "hidden_features": (WIDTH, WIDTH)}
    theirs = randomised(MaskedAutoregressiveTransform(features, **options), 0.05)
    linears = [layer for layer in theirs.hyper if hasattr(layer, "mask")]
    given = [(r.weight, r.bias, r.mask) for r in linears]
    network = AutoregressiveMap(
        lambda x, _: theirs.hyper(x), _unused, _unused, ConditionerPlan(),
        SplineMap(BINS, bound=5.0, parametrization="zuko"), lambda: conditioner(given, features, 3 * BINS - 1),
    )  # fmt: skip
    y = random_tensor((BATCH, features), torch.device("cpu"), "fp32", seed=3)

    def loop(y: Tensor) -> tuple[Tensor, Tensor]:
        transform = theirs()
        x = transform.inv(y)
        return x, -transform.log_abs_det_jacobian(x, y)

    def expected() -> tuple[Tensor, Tensor]:
        theirs.double()
        try:
            return loop(y.double())
        finally:
            theirs.float()

    providers = [
        Provider("zuko", functools.partial(loop, y)),
        Provider("fastgen", lambda: invert(network, y)[:2], "fastgen"),
    ]
    return _workload(providers, functools.cache(expected), y, [r.weight for r in linears])


def _loop(layer: SplineAutoregressive) -> AutoregressiveMap:
    """All passes, each of the whole network."""
    return replace(layer.as_map(), describe=None)


BUILD: dict[str, Callable[[int, bool], Workload]] = {
    "nflows": build_nflows, "zuko": build_zuko, "flowjax": build_flowjax, "nflows, splines": build_nflows_splines,
    "zuko, splines": build_zuko_splines,
}  # fmt: skip


def conditioner(layers: list[tuple[Tensor, Tensor, Tensor]], features: int, per_feature: int = 2) -> Conditioner:
    """Masked linears one after the other with ReLU between them."""
    last = len(layers) - 1
    described = [MaskedLayer(w, b, m, "none" if i == last else "relu") for i, (w, b, m) in enumerate(layers)]
    return Conditioner(described, features, per_feature)


def randomised(module: Any, deviation: float) -> Any:
    """``module`` with normal random parameters: some begin as zeros."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, deviation, generator=generator)
    return module.eval()


def _unused(*args: Any) -> Any:
    raise AssertionError("the network has a plan, and its map is affine")


def _workload(providers: list[Provider], expected: Callable[[], Any], y: Tensor, weights: list[Tensor]) -> Workload:
    sizes = sum(w.numel() for w in weights)
    return Workload(
        providers,
        (Values(expected, tolerance=1e-5),),
        min_bytes=2 * y.nbytes + 2 * sizes,  # half of the weights
        flops=len(y) * sizes,
    )
