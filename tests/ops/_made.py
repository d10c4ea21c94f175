"""Small masked networks for the tests of both families over them, and what they mean in plain torch."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.ops._masked_network import (
    INPUT,
    Layer,
    NetworkProgram,
    feature_levels,
    network_program,
    pack_units,
    pack_weights,
)
from fastgen.reference._program import activated

from .numerics import randn


@dataclass
class Network:
    """Layers with their weights, biases and what a context adds and multiplies by, [N, units] each, or None."""

    features: int
    per_feature: int
    layers: list[Layer]
    weights: list[Tensor]
    biases: list[Tensor | None]
    adds: list[Tensor | None] = field(default_factory=list)
    gates: list[Tensor | None] = field(default_factory=list)

    def outputs(self, x: Tensor) -> Tensor:
        """[N, features * per_feature] by whole layers, in the dtype of ``x``."""
        raw: list[Tensor] = []
        seen: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            source = x if layer.source == INPUT else seen[layer.source]
            bias = self.biases[i]
            value = F.linear(
                source, (self.weights[i] * layer.mask).to(x.dtype), None if bias is None else bias.to(x.dtype)
            )
            if self.adds[i] is not None:
                value = value + self.adds[i].to(x.dtype)
            if self.gates[i] is not None:
                value = value * self.gates[i].to(x.dtype)
            if layer.residual is not None:
                value = value + raw[layer.residual]
            raw.append(value)
            seen.append(activated(layer.activation, value))
        return seen[-1]

    def program(self, *, stepwise: bool) -> NetworkProgram:
        levels = feature_levels(self.layers, self.features, self.per_feature)
        return network_program(self.layers, self.features, self.per_feature, levels, stepwise=stepwise)

    def operands(self, program: NetworkProgram, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(program, weights, parameters, constants)."""
        constants = [
            part[:, units]
            for i, units in enumerate(program.units)
            for part in (self.adds[i], self.gates[i])
            if part is not None
        ]
        return (
            program.program,
            pack_weights(program, self.weights, dtype),
            pack_units(program, self.biases, dtype, torch.device("cpu")),
            torch.cat(constants, 1).to(dtype).contiguous() if constants else None,
        )


def made(
    features: int = 5,
    hidden: int = 12,
    blocks: int = 2,
    per_feature: int = 2,
    *,
    activation: str = "relu",
    samples: int = 0,
    order: list[int] | None = None,
    scale: float = 0.4,
    seed: int = 0,
) -> Network:
    """nflows' MADE with residual blocks; with ``samples`` a context of the first layer adds, of the second one multiplies.

    ``order``: the degree of each feature, from 1 on; equal ones are known together.
    """
    inputs = torch.tensor(order or range(1, features + 1))
    degrees = torch.arange(hidden) % max(int(inputs.max()) - 1, 1) + 1
    weights: list[Tensor] = []
    layers: list[Layer] = []

    def add(outs: Tensor, ins: Tensor, *, strict: bool = False, **options: object) -> None:
        mask = outs[:, None] > ins if strict else outs[:, None] >= ins
        number = len(layers)
        context = {"adds": samples > 0 and number == 0, "gates": samples > 0 and number == 1}
        layers.append(Layer(mask, **options, **context))  # type: ignore[arg-type]
        weights.append(scale * randn(*mask.shape, seed=seed + number))

    add(degrees, inputs, activation=activation if blocks else "none")
    for block in range(blocks):
        entry = len(layers) - 1
        add(degrees, degrees, source=entry, activation=activation)
        last = block == blocks - 1
        add(degrees, degrees, source=entry + 1, residual=entry, activation="none" if last else activation)
    add(inputs.repeat_interleave(per_feature), degrees, strict=True, source=len(layers) - 1)
    biases: list[Tensor | None] = [scale * randn(len(w), seed=seed + 50 + i) for i, w in enumerate(weights)]

    def of_context(wanted: str, first: int) -> list[Tensor | None]:
        sizes = enumerate(zip(weights, layers, strict=True))
        return [randn(samples, len(w), seed=first + i) if getattr(layer, wanted) else None for i, (w, layer) in sizes]

    beside = [of_context("adds", seed + 90), of_context("gates", seed + 90)]
    return Network(features, per_feature, layers, weights, biases, *beside)
