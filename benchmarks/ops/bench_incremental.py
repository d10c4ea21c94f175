"""`incremental`: a PixelCNN's images drawn by the program of its network, beside one forward of the many that a naive loop makes.

The network is the "8 layers of 64 channels, 7x7" that PixelCNNs of 28x28 digits have. A naive loop evaluates it for every pixel:
`one forward` is a single one of those, measured, so what drawing by it takes is extrapolated: 784 times as long. The floor is the
arithmetic alone by the library's products: of rows for all columns together, of pixels one by one, weights in the cache.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.autoregressive.network import Convolution, Input, Network, Operand, Sum, Tap
from fastgen.autoregressive.program import Program, compile_network
from fastgen.ops import incremental

from ..cases import DTYPES, Case, Provider, Workload, random_tensor
from ..verify import Check, Outputs, Values

SIZE, CHANNELS, LAYERS, KERNEL, LEVELS = 28, 64, 8, 7, 256
RADIUS = KERNEL // 2
BATCHES = (1, 16)
TOLERANCE = 2e-4  # of a pixel's log-probability, about -5.5: fp32 sums through nine layers
PIXELS = SIZE * SIZE


def cases(device: torch.device, full: bool) -> list[Case]:
    return [
        Case(
            "incremental", "levels", (batch, 1, SIZE, SIZE), dtype, functools.partial(build, batch, dtype, device),
            f"PixelCNN, {LAYERS} layers of {CHANNELS} channels, batch {batch}; over one forward of {PIXELS}",
        )
        for batch in BATCHES
        for dtype in ("fp32", "bf16")  # of the weights
    ]  # fmt: skip


@dataclass(frozen=True)
class Layers:
    """Weights [O, I, 7, 7] that read pixels before (the first) or up to their own, then of the logits [256, 64, 1, 1]; biases."""

    weights: list[Tensor]
    biases: list[Tensor]

    def forward(self, image: Tensor) -> Tensor:
        """As a user writes it."""
        x = image
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = F.relu(F.conv2d(x, weight, bias, padding=RADIUS))
        return F.conv2d(x, self.weights[-1], self.biases[-1])

    def network(self) -> Network:
        nodes: list[Input | Convolution | Sum] = [Input(1, SIZE, SIZE)]
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            radius, outputs = weight.shape[-1] // 2, weight.shape[0]
            there = [
                (y, x) for y in range(2 * radius + 1) for x in range(2 * radius + 1) if bool(weight[:, :, y, x].any())
            ]
            taps = tuple(Tap(y - radius, x - radius) for y, x in there)
            packed = torch.stack([weight[:, :, y, x] for y, x in there], 1)  # [O, taps, I]
            source = Operand(len(nodes) - 1, nodes[-1].channels)
            nodes.append(Convolution(outputs, SIZE, SIZE, operand=source, taps=taps, weight=packed, bias=bias))
            if k < len(self.weights) - 1:
                whole = (Operand(len(nodes) - 1, outputs),)
                nodes.append(Sum(outputs, SIZE, SIZE, terms=whole, scales=(1.0,), activation="relu"))
        return Network(tuple(nodes), Operand(len(nodes) - 1, LEVELS))

    def double(self) -> "Layers":
        return Layers([w.double() for w in self.weights], [b.double() for b in self.biases])


def make_layers(device: torch.device, dtype: str) -> Layers:
    """Random ones, the weights rounded to ``dtype``."""
    before = (torch.arange(KERNEL**2) < KERNEL**2 // 2).view(KERNEL, KERNEL).to(device)
    up_to = (torch.arange(KERNEL**2) <= KERNEL**2 // 2).view(KERNEL, KERNEL).to(device)
    weights, biases = [], []
    for k in range(LAYERS):
        inputs, mask = (1, before) if k == 0 else (CHANNELS, up_to)
        deviation = (2 / (inputs * int(mask.sum()))) ** 0.5
        weights.append(
            random_tensor((CHANNELS, inputs, KERNEL, KERNEL), device, "fp32", seed=k, deviation=deviation) * mask
        )
        biases.append(random_tensor((CHANNELS,), device, "fp32", seed=50 + k, deviation=0.1))
    weights.append(random_tensor((LEVELS, CHANNELS, 1, 1), device, "fp32", seed=98, deviation=CHANNELS**-0.5))
    biases.append(random_tensor((LEVELS,), device, "fp32", seed=99, deviation=0.1))
    return Layers([w.to(DTYPES[dtype]).float() for w in weights], biases)


class OwnLogProbabilities:
    """The log-probabilities of what was drawn are what the whole network in float64 gives it; and not all pixels are alike."""

    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        self._forward = forward

    def judge(self, provider: str, outputs: Outputs, all_outputs: Mapping[str, Outputs]) -> Check:
        images, log_prob = outputs[:2]
        level = ((images + 1) / 2 * (LEVELS - 1)).round().long().clamp(0, LEVELS - 1)
        expected = torch.log_softmax(self._forward(images.double()), 1).gather(1, level)[:, 0]
        error = float((log_prob.double() - expected).abs().max())
        drawn = len(images.unique())
        reason = "" if error <= TOLERANCE and drawn > LEVELS // 4 else f"error {error:.2e}, {drawn} levels drawn"
        return Check(provider, not reason, error, TOLERANCE, reason)


def tensors(program: Program) -> dict[str, object]:
    names = ("program", "weights", "parameters", "constants")
    return {**{name: getattr(program, name) for name in names}, "channels": program.output_channels}


def build(batch: int, dtype: str, device: torch.device, allow_compile: bool) -> Workload:
    layers = make_layers(device, dtype)
    program = compile_network(layers.network(), weights_dtype=DTYPES[dtype])
    given = {name: _moved(value, device) for name, value in tensors(program).items()}
    seeds = torch.arange(batch, device=device)
    levels = torch.linspace(-1, 1, LEVELS, device=device)
    image = random_tensor((batch, 1, SIZE, SIZE), device, "fp32", seed=7)
    empty = torch.zeros_like(image)

    def draw() -> tuple[Tensor, Tensor]:
        return incremental(empty, **given, seeds=seeds, count=LEVELS, levels=levels)[:2]  # type: ignore[arg-type]

    one_forward = Values(lambda: (layers.double().forward(image.double()),), tolerance=TOLERANCE)
    providers = [
        Provider("one forward", lambda: (layers.forward(image),), expected=(one_forward,)),
        Provider("fastgen", draw, "fastgen"),
        Provider("products", functools.partial(products, *product_operands(batch, device)), "floor"),
    ]
    numbers = sum(int(w.count_nonzero()) for w in layers.weights)
    size = DTYPES[dtype].itemsize * numbers + 8 * image.numel()
    check = OwnLogProbabilities(layers.double().forward)
    note = f"one forward is measured; a naive loop makes {PIXELS} of them for an image, {PIXELS} times its time"
    return Workload(providers, (check,), min_bytes=size, flops=2 * numbers * PIXELS * batch, notes=[note])


def _moved(value: object, device: torch.device) -> object:
    if isinstance(value, tuple):
        return tuple(_moved(v, device) for v in value)
    return value.to(device) if isinstance(value, Tensor) else value


def product_operands(batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a row of a layer, 21 taps of 64 channels for all columns; of a pixel, four taps of all layers and those of the logits.

    In fp32 whatever the weights are: what a library makes of bf16 is no limit of the machine.
    """
    above, beside = RADIUS * KERNEL * CHANNELS, RADIUS + 1
    weights = LAYERS * beside * CHANNELS + LEVELS  # outputs of 64 inputs each
    shapes = ((batch * SIZE, above), (above, CHANNELS), (weights, CHANNELS), (CHANNELS, batch))
    row, row_weights, pixel_weights, pixel = (
        random_tensor(s, device, "fp32", seed=20 + k) for k, s in enumerate(shapes)
    )
    return row, row_weights, pixel_weights, pixel


def products(row: Tensor, row_weights: Tensor, pixel_weights: Tensor, pixel: Tensor) -> None:
    for _ in range(SIZE * LAYERS):
        torch.mm(row, row_weights)
    for _ in range(PIXELS):
        torch.mm(pixel_weights, pixel)
