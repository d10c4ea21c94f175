"""`affine_coupling` beside the coupling layers of nflows, normflows and FrEIA, on vectors and images, inference and training.

A conditioner that returns a fixed tensor stands in the peers' own layers, whose masks and layouts fastgen takes as they are: nflows
transforms every second channel, normflows and FrEIA the second half. Formulas are also compiled. The floor is a clone of the input.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.ops import ScaleFn, affine_coupling
from tests import peers

from ..cases import DTYPES, Case, Provider, Workload, compiled, random_tensor
from ..verify import Values

SHAPES: dict[tuple[int, ...], str] = {(65536, 64): "NC", (64, 12, 32, 32): "NCHW"}
NAME_OF = {"nflows": "sigmoid, every second channel", "normflows": "exp, interleaved, half", "FrEIA": "atan, half"}
GROUP_OF = {"forward": "{}, with log-determinant", "backward": "{}, forward and backward"}
UNITS = {"forward": 3, "backward": 7}  # tensors of the size of the input that must move
FLOPS_PER_ELEMENT = 40

Function = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Fixed(nn.Module):
    """A conditioner that costs nothing."""

    def __init__(self, parameters: Tensor) -> None:
        super().__init__()
        self.said = parameters

    def forward(self, *_: Any) -> Tensor:
        return self.said


def cases(device: torch.device, full: bool) -> list[Case]:
    """2 modes x 3 peers x 2 shapes."""
    for name in NAME_OF:
        peers.load(name)
    return [
        Case(
            "affine_coupling", f"{peer}_{mode}", shape, "fp32", functools.partial(build, peer, mode, shape, device),
            group.format(NAME_OF[peer]), layout=layout,
        )
        for mode, group in GROUP_OF.items()
        for peer in NAME_OF
        for shape, layout in SHAPES.items()
    ]  # fmt: skip


def nflows(x: Tensor, parameters: Tensor) -> tuple[Function, Function, Function]:
    """(its layer, its formula, fastgen) of an input and what the conditioner said."""
    coupling = peers.load("nflows.transforms.coupling")
    layer = coupling.AffineCouplingTransform(torch.arange(x.shape[1]) % 2, lambda *_: Fixed(parameters)).to(x.device)
    kept, chosen, half = layer.identity_features, layer.transform_features, x.shape[1] // 2

    def formula(x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.sigmoid(parameters[:, half:] + 2) + 1e-3
        output = torch.empty_like(x)
        output[:, kept] = x[:, kept]
        output[:, chosen] = x[:, chosen] * scale + parameters[:, :half]
        return output, torch.log(scale).flatten(1).sum(1)

    fn = ScaleFn("sigmoid", offset=2, eps=1e-3)
    return (
        lambda x, _: layer(x),
        formula,
        functools.partial(affine_coupling, scale_fn=fn, layout="shift_first", mask=chosen),
    )


def normflows(x: Tensor, parameters: Tensor) -> tuple[Function, Function, Function]:
    coupling = peers.load("normflows.flows.affine.coupling")
    layer = coupling.AffineCouplingBlock(Fixed(parameters))

    def formula(x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x.chunk(2, 1)
        raw = parameters[:, 1::2]
        return torch.cat([first, second * torch.exp(raw) + parameters[:, 0::2]], 1), raw.flatten(1).sum(1)

    return (
        lambda x, _: layer(x),
        formula,
        functools.partial(affine_coupling, layout="interleaved", mask="second_half"),
    )


def freia(x: Tensor, parameters: Tensor) -> tuple[Function, Function, Function]:
    layers = peers.load("FrEIA.modules.coupling_layers")
    layer = layers.AffineCouplingOneSided([tuple(x.shape[1:])], subnet_constructor=lambda *_: Fixed(parameters))

    def of_layer(x: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        (output,), log_det = layer((x,))
        return output, log_det

    def formula(x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x.chunk(2, 1)
        raw, shift = parameters.chunk(2, 1)
        log = 2.0 * (0.636 * torch.atan(raw))
        return torch.cat([first, torch.exp(log) * second + shift], 1), log.flatten(1).sum(1)

    return of_layer, formula, functools.partial(affine_coupling, scale_fn=ScaleFn("atan", bound=2), mask="second_half")


LAYERS = {"nflows": nflows, "normflows": normflows, "FrEIA": freia}


def build(peer: str, mode: str, shape: tuple[int, ...], device: torch.device, allow_compile: bool) -> Workload:
    grad = mode == "backward"
    inputs = [random_tensor(shape, device, "fp32", seed=seed).requires_grad_(grad) for seed in (0, 1)]
    grads = (
        random_tensor(shape, device, "fp32", seed=8),
        random_tensor(shape[:1], device, "fp32", seed=9),
    )
    of_layer, formula, ours = LAYERS[peer](*inputs)
    functions: dict[str, Function] = {peer: of_layer}
    notes: list[str] = []
    if function := compiled(formula, inputs, allow_compile, notes, grad=grad):
        functions["compile"] = function
    functions["fastgen"] = ours

    def prepare(function: Function, grads: tuple[Tensor, ...]) -> Callable[..., tuple[Tensor, ...]]:
        def forward_and_backward(*args: Tensor) -> tuple[Tensor, ...]:
            results = function(*args)
            return *results, *torch.autograd.grad(results, args, grads)

        return forward_and_backward if grad else function

    def expected() -> tuple[Tensor, ...]:
        wide = [t.detach().double().requires_grad_(grad) for t in inputs]
        return prepare(formula, tuple(g.double() for g in grads))(*wide)

    providers = [
        Provider(name, functools.partial(prepare(f, grads), *inputs), "fastgen" if name == "fastgen" else "baseline")
        for name, f in functions.items()
    ]
    providers.append(Provider("copy", inputs[0].detach().clone, "floor"))
    elements, summed = math.prod(shape), math.prod(shape[1:]) // 2
    return Workload(
        providers,
        (Values(expected, yardstick=peer, terms=[1, summed, 1, 1][: 4 if grad else 2]),),
        min_bytes=UNITS[mode] * elements * DTYPES["fp32"].itemsize,
        flops=FLOPS_PER_ELEMENT * (3 if grad else 1) * elements // 2,
        grad=grad,
        notes=notes,
    )
