"""Flows of nflows, normflows, zuko and FrEIA, from their own constructors, as they are and after `fastgen.accelerate`.

The density of a batch, a step of training (density and gradients), and samples of the same noise.
"""

import copy
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastgen

from ..cases import Case, Provider, Workload, random_tensor
from ..verify import Values

SAMPLES = 5e-5  # float64 draws them from other noise: beside eager's, whose roundings layers and steep splines amplify as ours
GRADIENTS = 1e-3  # one unit of a ReLU that a rounding puts on the other side of zero moves a gradient by 4e-4
WHAT = ("log_prob", "train", "sample")


@dataclass(frozen=True)
class Flow:
    """A flow of a project: what builds it, and the shape of a batch."""

    project: str
    title: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


def mlp(inputs: int, outputs: int) -> nn.Module:
    """Its last layer is zeros, which `with_weights` fills: eight couplings at PyTorch's initialisation explode."""
    last = nn.Linear(64, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), last)


def nflows_spline() -> nn.Module:
    from nflows import distributions, flows, transforms
    from nflows.nn import nets

    def network(inputs: int, outputs: int) -> nn.Module:
        return nets.ResidualNet(inputs, outputs, hidden_features=64, num_blocks=1)

    masks = (torch.arange(64) % 2).float()
    layers = [
        transforms.PiecewiseRationalQuadraticCouplingTransform(
            2 * (masks if i % 2 else 1 - masks) - 1, network, num_bins=8, tails="linear", tail_bound=3.0
        )
        for i in range(4)
    ]
    return flows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([64]))


def nflows_real_nvp() -> nn.Module:
    from nflows.flows import SimpleRealNVP

    return SimpleRealNVP(64, hidden_features=64, num_layers=8, num_blocks_per_layer=1)


def nflows_maf() -> nn.Module:
    from nflows.flows import MaskedAutoregressiveFlow

    return MaskedAutoregressiveFlow(64, hidden_features=512, num_layers=1, num_blocks_per_layer=2)


def normflows_real_nvp() -> nn.Module:
    import normflows as nf

    layers: list[nn.Module] = []
    for _ in range(8):
        layers += [nf.flows.AffineCouplingBlock(nf.nets.MLP([32, 64, 64], init_zeros=True)), nf.flows.Permute(64)]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(64), layers)


def normflows_glow() -> nn.Module:
    import normflows as nf

    levels, bases = [], []
    for channels, shape in ((24, (24, 8, 8)), (12, (6, 16, 16))):
        levels.append([*(nf.flows.GlowBlock(channels, 32) for _ in range(4)), nf.flows.Squeeze()])
        bases.append(nf.distributions.DiagGaussian(shape))
    return nf.MultiscaleFlow(bases, levels, [nf.flows.Merge()], class_cond=False)


def zuko_flow(name: str, features: int, **options: Any) -> nn.Module:
    import zuko

    return getattr(zuko.flows, name)(features, **options)


def freia_sequence(name: str, **options: Any) -> nn.Module:
    from FrEIA import framework, modules

    made = framework.SequenceINN(64)
    for _ in range(8):
        made.append(getattr(modules, name), subnet_constructor=mlp, **options)
    return made


FLOWS = {
    "nflows_real_nvp": Flow("nflows", "nflows' SimpleRealNVP", nflows_real_nvp, (4096, 64)),
    "nflows_spline": Flow("nflows", "nflows' spline couplings", nflows_spline, (1024, 64)),
    "nflows_maf": Flow("nflows", "nflows' MaskedAutoregressiveFlow", nflows_maf, (256, 64)),
    "normflows_real_nvp": Flow("normflows", "normflows' RealNVP", normflows_real_nvp, (4096, 64)),
    "normflows_glow": Flow("normflows", "normflows' Glow", normflows_glow, (32, 3, 32, 32)),
    "zuko_real_nvp": Flow(
        "zuko", "zuko's RealNVP", functools.partial(zuko_flow, "RealNVP", 64, transforms=8, hidden_features=(64,)), (4096, 64)
    ),
    "zuko_maf": Flow(
        "zuko", "zuko's MAF", functools.partial(zuko_flow, "MAF", 64, transforms=1, hidden_features=(512, 512)), (256, 64)
    ),
    "zuko_nsf": Flow("zuko", "zuko's NSF", functools.partial(zuko_flow, "NSF", 16, transforms=2), (1024, 16)),
    "freia_glow": Flow("FrEIA", "FrEIA's GLOWCouplingBlock", functools.partial(freia_sequence, "GLOWCouplingBlock"), (4096, 64)),
    "freia_all_in_one": Flow(
        "FrEIA", "FrEIA's AllInOneBlock", functools.partial(freia_sequence, "AllInOneBlock", permute_soft=True), (4096, 64)
    ),
}  # fmt: skip


def cases(device: torch.device, full: bool) -> list[Case]:
    return [
        Case(
            "accelerate_flows", f"{mode}, {what}", flow.shape, "fp32", functools.partial(build, flow, what, device),
            f"{flow.title}, {what}",
        )
        for mode, flow in FLOWS.items() if importlib.util.find_spec(flow.project) is not None
        for what in WHAT
    ]  # fmt: skip


def with_weights(flow: Flow, x: Tensor) -> nn.Module:
    """The flow with random weights, past the initialisation by its first batch."""
    torch.manual_seed(0)
    made = flow.build().to(x.device)
    with torch.no_grad():
        density(flow, made, x)
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter += 0.01 * torch.randn_like(parameter)
    return made


def density(flow: Flow, model: Any, x: Tensor) -> Tensor:
    if flow.project == "FrEIA":
        z, log_det = model(x)
        return log_det - 0.5 * (z**2).sum(1)
    if flow.project == "zuko":
        return model().log_prob(x)
    return model.log_prob(x, None) if hasattr(model, "merges") else model.log_prob(x)


def train(flow: Flow, model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The density, and all gradients, summed over a row of each: a mask hides half of some."""
    with torch.enable_grad():
        log_prob = density(flow, model, x)
        parameters = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(log_prob.mean(), parameters, allow_unused=True)
    return log_prob.detach(), torch.cat([g.reshape(len(g), -1).sum(1) for g in grads if g is not None])


def sample(flow: Flow, model: Any, x: Tensor) -> Tensor:
    torch.manual_seed(1)
    if flow.project == "FrEIA":
        return model(torch.randn_like(x), rev=True)[0]
    drawn = model().sample((len(x),)) if flow.project == "zuko" else model.sample(len(x))
    return drawn[0] if isinstance(drawn, tuple) else drawn


def build(flow: Flow, what: str, device: torch.device, allow_compile: bool) -> Workload:
    x = random_tensor(flow.shape, device, "fp32", seed=3)
    plain = with_weights(flow, x)
    fused = fastgen.accelerate(copy.deepcopy(plain))
    function: Callable[..., Any] = {"log_prob": density, "train": train, "sample": sample}[what]

    def expected() -> tuple[Tensor, ...]:
        made = (
            function(flow, plain, x) if what == "sample" else function(flow, copy.deepcopy(plain).double(), x.double())
        )
        return tuple(t.double() for t in (made if isinstance(made, tuple) else (made,)))

    known = functools.cache(expected)
    if what == "sample":
        expectations = [Values(known, tolerance=SAMPLES)]
    else:
        expectations = [Values(lambda: known()[:1], yardstick="eager", of=lambda o: o[:1], terms=(x[0].numel(),))]
    if what == "train":
        expectations.append(Values(lambda: known()[1:], tolerance=GRADIENTS, of=lambda o: o[1:]))
    with FlopCounterMode(
        display=False
    ) as counter:  # not of gradients: it cannot follow a module that is called with a parameter
        (sample if what == "sample" else density)(flow, plain, x)
    providers = [
        Provider("eager", functools.partial(function, flow, plain, x)),
        Provider("fastgen", functools.partial(function, flow, fused, x), "fastgen"),
    ]
    weights = sum(p.nbytes for p in plain.parameters())
    return Workload(
        providers,
        tuple(expectations),
        weights + 2 * x.nbytes,
        counter.get_total_flops() * (3 if what == "train" else 1),
    )
