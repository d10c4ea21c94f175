"""Somebody's normalizing flow before and after `fastgen.accelerate`: the same densities and samples, times, and the report.

`--project` is nflows, normflows, zuko or FrEIA, which must be installed; its own constructors make the flow, with random weights.
"""

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastgen


def of_nflows(features: int) -> nn.Module:
    from nflows.flows import MaskedAutoregressiveFlow

    return MaskedAutoregressiveFlow(features, hidden_features=256, num_layers=3, num_blocks_per_layer=1)


def of_normflows(features: int) -> nn.Module:
    import normflows as nf

    layers = [nf.flows.AutoregressiveRationalQuadraticSpline(features, 1, 128, init_identity=False) for _ in range(3)]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(features), [nf.flows.Reverse(each) for each in layers])


def of_zuko(features: int) -> nn.Module:
    import zuko

    return zuko.flows.NSF(features, transforms=3, hidden_features=(256, 256))


def of_freia(features: int) -> nn.Module:
    from FrEIA import framework, modules

    def network(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, outputs))

    made = framework.SequenceINN(features)
    for _ in range(6):
        made.append(modules.GLOWCouplingBlock, subnet_constructor=network)
        made.append(modules.PermuteRandom)
    return made


PROJECTS: dict[str, Callable[[int], nn.Module]] = {
    "nflows": of_nflows, "normflows": of_normflows, "zuko": of_zuko, "FrEIA": of_freia,
}  # fmt: skip


def density(project: str, flow: Any, x: Tensor) -> Tensor:
    if project == "FrEIA":
        z, log_det = flow(x)
        return log_det - 0.5 * (z**2).sum(1)
    return (flow() if project == "zuko" else flow).log_prob(x)  # type: ignore[no-any-return]


def samples(project: str, flow: Any, x: Tensor) -> Tensor:
    torch.manual_seed(1)
    if project == "FrEIA":
        return flow(torch.randn_like(x), rev=True)[0]  # type: ignore[no-any-return]
    drawn = flow().sample((len(x),)) if project == "zuko" else flow.sample(len(x))
    return drawn[0] if isinstance(drawn, tuple) else drawn


def timed(function: Callable[..., Tensor], *args: Any) -> tuple[Tensor, float]:
    with torch.no_grad():
        function(*args)
        began = time.perf_counter()
        made = function(*args)
    return made, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--project", choices=PROJECTS, default="nflows")
    parser.add_argument("--features", type=int, default=32)
    parser.add_argument("--samples", type=int, default=256)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    flow = PROJECTS[arguments.project](arguments.features)
    x = torch.randn(arguments.samples, arguments.features)
    fast = fastgen.accelerate(copy.deepcopy(flow))
    fastgen.report(fast)
    for name, function in (("log_prob", density), ("sample", samples)):
        before, plain = timed(function, arguments.project, flow, x)
        after, ours = timed(function, arguments.project, fast, x)
        difference = (after - before).abs().max() / before.abs().max()
        print(f"{name}: theirs {1e3 * plain:.1f} ms, accelerated {1e3 * ours:.1f} ms; they differ by {difference:.1e}")


if __name__ == "__main__":
    main()
