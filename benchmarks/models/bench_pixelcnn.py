"""Whole images by `fastgen.autoregressive.sample`, as a user calls it, beside the naive loop: a pass of the network for each pixel.

Of the naive loop one pass is timed, in plain torch at the same batch and in float32, and multiplied by the pixels: it is
extrapolated, and named so. The floor is what the engine's own plan has to do: products of rows at the rate of the library's, and
the weights that every pixel reads, through a product with a pixel's numbers; attention and all else is left out of it.
"""

import copy
import functools
import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastgen.autoregressive import plan, sample
from fastgen.autoregressive.causality import Availability, availability, distances, resolutions
from fastgen.autoregressive.network import Convolution, Network
from fastgen.models import AutoregressiveModel, GatedPixelCNN, PixelCNN, PixelCNNPlusPlus, PixelSNAIL

from ..cases import AS_USED, DTYPES, FIRST, Case, Provider, Workload, random_tensor
from ..targets import NAIVE
from ..verify import Check, Outputs, Values
from .plain_pixelcnn import plain_torch

# pytorch-generative's size; Salimans et al. 2017 on CIFAR-10; 28 x 28 digits; PixelSNAIL in small; that of `digits-pixelcnn`.
CONFIGS: dict[str, tuple[type[AutoregressiveModel], dict[str, Any], tuple[int, ...]]] = {
    "gated": (
        GatedPixelCNN,
        {"channels": 128, "dilations": [1] * 10, "input_kernel_size": 7, "factorized": True, "head_channels": 32,
         "distribution": "bernoulli", "levels": 2, "unit_range": True},
        (1, 28, 28),
    ),
    "plus_plus": (PixelCNNPlusPlus, {"channels": 160, "num_resnet": 5, "mixtures": 10}, (3, 32, 32)),
    "pixel_cnn": (
        PixelCNN, {"channels": 64, "num_blocks": 7, "block": "plain", "kernel_size": 7, "head_channels": None}, (1, 28, 28)
    ),
    "snail": (PixelSNAIL, {"channels": 32, "num_blocks": 2}, (1, 28, 28)),
    "digits": (GatedPixelCNN, {"channels": 24, "dilations": [1, 2, 1, 2, 1], "levels": 17}, (1, 8, 8)),
}  # fmt: skip
TITLES = {
    "gated": "Gated PixelCNN, 10 layers of 128 channels, 28x28",
    "plus_plus": "PixelCNN++, 160 channels, 5 blocks a stage, 32x32",
    "pixel_cnn": "PixelCNN, 8 layers of 64 channels, 7x7, 28x28",
    "snail": "PixelSNAIL, 2 blocks of 32 channels, 28x28",
    "digits": "Gated PixelCNN, 5 layers of 24 channels, 8x8",
}
BATCHES = {"gated": (1, 16), "pixel_cnn": (1, 16), "digits": (16,)}
# Of a pixel's log-probability, by the full network in float64 with weights as they are kept, relative to the largest.
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-3}
NORMED = 2e-2  # of weights in bf16 that are normalised first, and rounded then
FORWARD = 1e-4  # of a pass in fp32, relative to the largest logit
SHARE = 16  # of the pixels, for one the floor reads the weights where that takes long: the rest is extrapolated too
LONG = 2e9  # weights read
BLOCK, WIDE = 512, 256  # of the floor's products, of rows and of a pixel


def cases(device: torch.device, full: bool) -> list[Case]:
    if device.type != "cpu":
        return []

    def case(mode: str, how: str, batch: int, dtype: str) -> Case:
        shape = (batch, *CONFIGS[mode][2])
        whole = functools.partial(build, CONFIGS[mode][:2], how, shape, dtype)
        return Case("pixelcnn", mode, shape, dtype, whole, f"{TITLES[mode]}, batch {batch}", how)

    return [
        *(case(mode, AS_USED, batch, dtype) for mode in CONFIGS for batch in BATCHES.get(mode, (1,)) for dtype in TOLERANCE),
        *(case(mode, FIRST, 1, "fp32") for mode in CONFIGS),
    ]  # fmt: skip


class OwnLogProbabilities:
    """The log-probabilities of what was drawn are those of the full network in float64, and not all of it is the same level."""

    def __init__(self, model: AutoregressiveModel, dtype: str) -> None:
        self.model, self.tolerance = copy.deepcopy(model).double(), TOLERANCE[dtype]
        if dtype == "bf16" and model.distribution == "logistic_mixture":
            self.tolerance = NORMED
        elif dtype == "bf16":
            for parameter in self.model.parameters():
                if parameter.dim() == 4:
                    parameter.data.copy_(parameter.data.bfloat16())

    def judge(self, provider: str, outputs: Outputs, all_outputs: Mapping[str, Outputs]) -> Check:
        images, log_prob = outputs
        known = {"prefix": images.double(), "method": "jacobi"}  # nothing is drawn: one pass, for the log-probabilities
        _, expected = sample(self.model, images.shape, return_log_prob=True, **known)
        error = float((log_prob.double() - expected).abs().max() / expected.abs().max())
        if not error <= self.tolerance:
            return Check(provider, False, error, self.tolerance, f"log-probabilities are off by {error:.2e}")
        if len(images.unique()) < 2:
            return Check(provider, False, error, self.tolerance, "all pixels are the same")
        return Check(provider, True, error, self.tolerance)


class SamePixels:
    """A small model of the same class draws, by the cached engine, what it draws by a pass for each pixel in plain torch."""

    def __init__(self, kind: type[AutoregressiveModel], config: dict[str, Any], colors: int) -> None:
        small = {
            "dilations": [1, 2],
            "channels": 8,
            "num_resnet": 1,
            "num_blocks": 2,
            "mixtures": 2,
            "head_channels": 8,
        }
        kept = {key: value for key, value in small.items() if config.get(key) is not None}
        torch.manual_seed(1)
        self.model = kind(**{**config, **kept}).double().eval()
        self.shape = (2, colors, 8, 8)

    def judge(self, provider: str, outputs: Outputs, all_outputs: Mapping[str, Outputs]) -> Check:
        ours = sample(self.model, self.shape, seeds=[1, 2], method="cached")
        with plain_torch():
            theirs = sample(self.model, self.shape, seeds=[1, 2], method="naive")
        different = int((ours != theirs).sum())
        return Check(provider, not different, float(different), 0.0, f"{different} pixels differ" if different else "")


def build(
    config: tuple[type[AutoregressiveModel], dict[str, Any]],
    how: str,
    shape: tuple[int, ...],
    dtype: str,
    allow_compile: bool,
) -> Workload:
    kind, options = config
    torch.manual_seed(0)
    model = telling(kind(in_channels=shape[1], **options).eval(), shape)
    seeds = list(range(shape[0]))
    kept = None if dtype == "fp32" else DTYPES[dtype]
    image = random_tensor(shape, torch.device("cpu"), "fp32", seed=3).clamp(-1, 1)

    def draw() -> tuple[Tensor, Tensor]:
        if how == FIRST:
            forget(model)
        return sample(model, shape, seeds=seeds, weights_dtype=kept, return_log_prob=True)

    def one_pass() -> Tensor:
        with plain_torch(), torch.no_grad():
            return model(image)

    def logits() -> tuple[Tensor]:
        with torch.no_grad():
            return (copy.deepcopy(model).double()(image.double()),)

    pixels = shape[2] * shape[3]
    made = plan(model, shape, weights_dtype=kept)
    row_work, pixel_weights = counted(made.captured.network)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    return Workload(
        [
            Provider("fastgen", draw, "fastgen", (OwnLogProbabilities(model, dtype), SamePixels(kind, options, shape[1]))),
            Provider(NAIVE, one_pass, expected=(Values(logits, tolerance=FORWARD),), times=pixels),
            *floors(row_work * shape[0], pixel_weights, pixels, shape[0], dtype),
        ],
        (),
        min_bytes=DTYPES[dtype].itemsize * numbers + 4 * image.numel(),
        flops=2 * made.work * shape[0],
    )  # fmt: skip


def telling(model: AutoregressiveModel, shape: tuple[int, ...]) -> AutoregressiveModel:
    """With logits of deviation 2 around 0: where all are alike, as at the beginning, what is drawn is as likely or certain."""
    if model.distribution == "logistic_mixture":
        return model
    with torch.no_grad():
        logits = model(random_tensor((1, *shape[1:]), torch.device("cpu"), "fp32", seed=5).clamp(-1, 1))
        model.get_parameter("out.bias").sub_(logits.mean())
        for parameter in model.get_submodule("out").parameters():
            parameter *= 2 / logits.std()
    return model


def forget(model: torch.nn.Module) -> None:
    """As if the model had not been sampled from in this process."""
    importlib.import_module("fastgen.autoregressive.plan")._PLANS.pop(model, None)


def counted(network: Network) -> tuple[int, int]:
    """(Multiply-adds of an image that can be done for whole rows, weights that a pixel reads on the average)."""
    kinds, pixels = availability(network), resolutions(network)
    rows = reads = 0.0
    for i, node in enumerate(network.nodes):
        if not isinstance(node, Convolution) or kinds[i] == Availability.CONSTANT:
            continue
        each = node.weight.numel() / len(node.taps) / node.upscale**2  # at a position of the output
        for _, distance in distances(network, i, pixels):
            if kinds[i] == Availability.ROW or distance.dy < 0:
                rows += each * node.height * node.width
            else:
                reads += each * node.height * node.width / (network.nodes[0].height * network.nodes[0].width)
    return round(rows), round(reads)


def floors(row_work: int, pixel_weights: int, pixels: int, batch: int, dtype: str) -> list[Provider]:
    """Products of rows in fp32, and as many bytes as the weights of a pixel have, in fp32 too."""
    device = torch.device("cpu")
    parts = SHARE if pixel_weights * pixels > LONG and pixels % SHARE == 0 else 1
    count = max(1, round(row_work / BLOCK**2))  # rows of a product with BLOCK x BLOCK weights
    row = random_tensor((min(count, 4 * BLOCK), BLOCK), device, "fp32", seed=11)
    block = random_tensor((BLOCK, BLOCK), device, "fp32", seed=12)
    outputs = max(1, pixel_weights * DTYPES[dtype].itemsize // 4 // WIDE)
    weights, pixel = (random_tensor(s, device, "fp32", seed=13) for s in ((outputs, WIDE), (WIDE, batch)))
    result, sums = torch.empty_like(row), torch.empty(outputs, batch)

    def row_products() -> None:
        whole, rest = divmod(count, len(row))
        for _ in range(whole):
            torch.mm(row, block, out=result)
        if rest:
            torch.mm(row[:rest], block, out=result[:rest])

    def pixel_products() -> None:
        for _ in range(pixels // parts):
            if batch == 1:
                torch.mv(weights, pixel[:, 0], out=sums[:, 0])
            else:
                torch.mm(weights, pixel, out=sums)

    return [
        Provider("row products", row_products, "floor"),
        Provider("pixel weights", pixel_products, "floor", times=parts),
    ]
