"""TarFlow's samples by `fastgen.models.TarFlow`, as a user calls it, beside the published algorithm with its own cache.

Sizes are those of ml-tarflow's MNIST notebook, and ImageNet's 64x64 model scaled down. The floor is the products of all tokens by
the library's, weights in the order in which they are read: what attention, norms and the rest take is left out of it.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastgen.flows import CausalTransformerFlow
from fastgen.models import TarFlow

from ..cases import Case, Provider, Workload, random_tensor
from ..verify import Values
from .plain_tarflow import PlainTarFlow

CONFIGS: dict[str, dict[str, Any]] = {
    "mnist": {
        "in_channels": 1, "image_size": 28, "patch_size": 4, "channels": 128, "num_blocks": 4, "layers_per_block": 4,
        "num_classes": 10,
    },
    "small64": {
        "in_channels": 3, "image_size": 64, "patch_size": 4, "channels": 256, "num_blocks": 4, "layers_per_block": 2,
    },
}  # fmt: skip
TITLES = {
    "mnist": "TarFlow of ml-tarflow's MNIST notebook: 4 blocks of 4 layers of 128 channels, 28x28, patches of 4",
    "small64": "TarFlow, 4 blocks of 2 layers of 256 channels, 64x64, patches of 4",
}
BATCHES = {"mnist": (1, 16, 100), "small64": (1, 16)}
TOLERANCE = 1e-4  # of a pixel of size 4: fp32 sums through the layers of all blocks, token after token
PUBLISHED = "ml-tarflow"


def cases(device: torch.device, full: bool) -> list[Case]:
    if device.type != "cpu":
        return []
    return [
        Case(
            "tarflow", mode, (batch, *shape_of(mode)), "fp32", functools.partial(build, CONFIGS[mode], batch),
            f"{TITLES[mode]}, batch {batch}",
        )
        for mode, batches in BATCHES.items()
        for batch in batches
    ]  # fmt: skip


def shape_of(mode: str) -> tuple[int, int, int]:
    config = CONFIGS[mode]
    return config["in_channels"], config["image_size"], config["image_size"]


def build(config: dict[str, Any], batch: int, allow_compile: bool) -> Workload:
    torch.manual_seed(0)
    model = TarFlow(**config).eval()
    with torch.no_grad():  # a new model is the identity, whatever its layers say
        for block in model.blocks:
            block.proj_out.weight.normal_(std=0.01)
    plain = PlainTarFlow(**config).eval()
    plain.load_state_dict(published_names(model.state_dict()))
    exact = PlainTarFlow(**config).double().eval()
    exact.load_state_dict(plain.state_dict())
    tokens, features = model.base.shape
    noise = random_tensor((batch, tokens, features), torch.device("cpu"), "fp32", seed=3)
    labels = None if model.num_classes is None else torch.arange(batch) % model.num_classes

    def in_float64() -> tuple[Tensor]:
        with wide_floats(), torch.no_grad():
            return (exact.reverse(noise.double(), labels),)

    weights = sum(matrix.numel() for block in model.blocks for matrix in block.tensors()[0])
    return Workload(
        [
            Provider(PUBLISHED, lambda: plain.reverse(noise, labels)),
            Provider("fastgen", lambda: model.inverse(noise, labels)[0], "fastgen"),
            Provider("products", products(model.blocks, batch, tokens), "floor"),
        ],
        (Values(in_float64, tolerance=TOLERANCE),),
        min_bytes=4 * (weights * (tokens - 1) + 2 * noise.numel()),
        flops=2 * weights * (tokens - 1) * batch,
    )


def published_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {name: name.replace("transform.transforms", "blocks") for name in state} | {"base.variance": "var"}
    return {names[name]: tensor for name, tensor in state.items()}


@contextmanager
def wide_floats() -> Iterator[None]:
    """``float()`` gives float64: the published norms are told to be in float32."""
    narrow = Tensor.float
    Tensor.float = Tensor.double  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Tensor.float = narrow  # type: ignore[method-assign]


def products(blocks: Sequence[CausalTransformerFlow], batch: int, tokens: int) -> Callable[[], None]:
    """The matrices of every token of every block, by rows of as many images."""
    matrices = [block.tensors()[0] for block in blocks]
    inputs = {m.shape[1]: torch.randn(batch, m.shape[1]) for block in matrices for m in block}
    outputs = {m.shape[0]: torch.empty(batch, m.shape[0]) for block in matrices for m in block}

    def call() -> None:
        for block in matrices:
            for _ in range(tokens - 1):
                for m in block:
                    torch.mm(inputs[m.shape[1]], m.t(), out=outputs[m.shape[0]])

    return call
