"""The same flows here and in the libraries that people have them from, from the same parameters: nflows and normflows.

nflows' networks have our names for their weights. normflows' Glow has its levels from the latent to the data, and an actnorm and a
coupling of which ours are the inverse: the functions are equal, what their parameters mean is not, so that training differs by more
than rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import normflows
import torch
from nflows import transforms
from nflows.distributions import StandardNormal as NflowsNormal
from nflows.flows import Flow as NflowsFlow
from nflows.nn.nets import ResidualNet
from torch import Tensor, nn

from ...flows import (
    AffineCoupling,
    Compose,
    ConvNet,
    Flow,
    GlowStep,
    MultiScale,
    Permutation,
    Split,
    Squeeze,
    StandardNormal,
)
from ...models import MAF, NeuralSplineFlow


@dataclass(frozen=True)
class Side:
    """A model of one library, and what its functions are called."""

    library: str
    model: nn.Module
    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[[int], Tensor]


Pair = tuple[Side, Side]


def maf_pair(first: Tensor, config: dict[str, Any]) -> Pair:
    """A `MAF` whose scale is nflows' softplus, and nflows' own, of rows like ``first``."""
    model = MAF(first.shape[1], **config)
    layers: list[nn.Module] = []
    for i in range(config["num_transforms"]):
        layers += [transforms.ReversePermutation(first.shape[1])] if i else []
        layers += [
            transforms.MaskedAffineAutoregressiveTransform(
                first.shape[1], config["hidden_features"], num_blocks=config["num_blocks"]
            )
        ]
    return ours(model), _nflows(layers, model, "network", "autoregressive_net", first.shape[1])


def spline_pair(first: Tensor, config: dict[str, Any]) -> Pair:
    """A `NeuralSplineFlow` of couplings, and nflows' own."""
    features = first.shape[1]
    model = NeuralSplineFlow(features, **config)
    layers: list[nn.Module] = []
    for layer in model.transform.modules():
        if isinstance(layer, Permutation):
            layers.append(transforms.Permutation(layer.order.values))
    mask = [0] * (features // 2) + [1] * (features - features // 2)
    couplings = [
        transforms.PiecewiseRationalQuadraticCouplingTransform(
            mask,
            lambda inputs, outputs: ResidualNet(
                inputs, outputs, hidden_features=config["hidden_features"], num_blocks=config["num_blocks"]
            ),
            num_bins=config["num_bins"],
            tails="linear",
            tail_bound=config["bound"],
        )
        for _ in range(config["num_transforms"])
    ]
    stacked = [couplings[0]]
    for permutation, coupling in zip(layers, couplings[1:], strict=True):
        stacked += [permutation, coupling]
    return ours(model), _nflows(stacked, model, "conditioner", "transform_net", features)


def glow_pair(first: Tensor, config: dict[str, int]) -> Pair:
    """A Glow of images around 0 with normal priors, begun with the statistics of ``first``, and normflows'."""
    shape = (int(first.shape[1]), int(first.shape[2]), int(first.shape[3]))
    steps, hidden = config["num_steps"], config["hidden_channels"]
    levels: list[Compose] = []
    splits: list[Split] = []
    channels = shape[0]
    for level in range(config["num_levels"]):
        channels *= 4
        levels.append(Compose([Squeeze(), *(_step(channels, hidden) for _ in range(steps))]))
        if level < config["num_levels"] - 1:
            splits.append(Split(channels // 2, channels))
            channels //= 2
    flow = Flow(MultiScale(levels, splits, shape), StandardNormal((first[0].numel(),)))
    with torch.no_grad():
        flow.train().log_prob(first)
    peer: Any = _normflows_glow(shape, config)
    _copy_glow([list(level.transforms)[1:] for level in levels], peer)
    return ours(flow), Side("normflows", peer, lambda x: peer.log_prob(x, None), lambda n: peer.sample(n)[0])


def ours(model: Any) -> Side:
    """Either a model or a flow."""
    return Side("fastgen", model, model.log_prob, model.sample)


def _nflows(layers: list[nn.Module], model: nn.Module, ours: str, theirs: str, features: int) -> Side:
    """nflows' flow of ``layers``, whose networks, called ``theirs``, have the weights of those of ``model``, called ``ours``."""
    flow = NflowsFlow(transforms.CompositeTransform(layers), NflowsNormal([features]))
    sources = [getattr(layer, ours) for layer in model.modules() if hasattr(layer, ours)]
    targets = [getattr(layer, theirs) for layer in layers if hasattr(layer, theirs)]
    for source, target in zip(sources, targets, strict=True):
        own = target.state_dict()
        own.update({name: tensor for name, tensor in source.state_dict().items() if name in own})
        target.load_state_dict(own)
    return Side("nflows", flow, flow.log_prob, flow.sample)


def _step(channels: int, hidden: int) -> GlowStep:
    network = ConvNet(channels // 2, channels, hidden_channels=hidden)
    return GlowStep(channels, AffineCoupling(network, scale_fn="sigmoid", order="shift_scale"))


def _normflows_glow(shape: tuple[int, int, int], config: dict[str, int]) -> nn.Module:
    base, flows, merges, (channels, height, width) = [], [], [], shape
    for level in range(config["num_levels"]):
        channels, height, width = channels * 4, height // 2, width // 2
        blocks = [
            normflows.flows.GlowBlock(channels, config["hidden_channels"], use_lu=False)
            for _ in range(config["num_steps"])
        ]
        flows.append([*blocks, normflows.flows.Squeeze()])
        if level < config["num_levels"] - 1:
            merges.append(normflows.flows.Merge())
            channels //= 2
        base.append(normflows.distributions.DiagGaussian((channels, height, width), trainable=False))
    return normflows.MultiscaleFlow(base[::-1], flows[::-1], merges[::-1], class_cond=False)


@torch.no_grad()
def _copy_glow(levels: list[list[Any]], peer: Any) -> None:
    """Our parameters into normflows' model, whose levels and blocks stand from the latent to the data."""
    for steps, flows in zip(reversed(levels), peer.flows, strict=True):
        blocks = [flow for flow in flows if isinstance(flow, normflows.flows.GlowBlock)]
        for step, block in zip(steps, reversed(blocks), strict=True):
            linear, coupling = step.transforms
            their_coupling, their_matrix, actnorm = block.flows
            their_matrix.W.copy_(linear.weight)
            actnorm.s.copy_(-linear.log_scale.view_as(actnorm.s))
            actnorm.t.copy_((-linear.shift / linear.log_scale.exp()).view_as(actnorm.t))
            actnorm.data_dep_init_done.fill_(1.0)
            network, convolutions = coupling.conditioner, their_coupling.flows[1].param_map.net[::2]
            for ours, theirs in zip((network.first, network.middle, network.last), convolutions, strict=True):
                theirs.load_state_dict(ours.state_dict())
