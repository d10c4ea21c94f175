"""Arguments of `incremental` for its tests on every device: programs of small networks."""

from typing import Any

import torch
from torch import Tensor

from fastgen._schema import DRAWS
from fastgen.autoregressive.network import Network
from fastgen.autoregressive.program import Program, compile_network
from fastgen.ops import incremental, incremental_step

from ..autoregressive.networks import everything
from .families import OfTensors

LEVELS = 4
SHAPE = (3, 4)
NO_GRADIENT = True
OWN_DTYPE = (1, 2)  # log-probabilities and logits are of the arithmetic
NO_STORAGE_TYPE = {"incremental.incremental_kernel"}  # float32 or float64 beside weights that may be bfloat16
STORES_IN_A_LOOP = {"incremental.incremental_kernel"}  # what a pixel reads the pixel before has written


def image_of(
    network: Network, images: int, levels: int = LEVELS, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Tensor:
    first = network.nodes[0]
    shape = (images, first.channels, first.height, first.width)
    return torch.randint(0, levels, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tensors(program: Program) -> dict[str, Any]:
    """What the public op takes of a program."""
    names = ("program", "weights", "parameters", "constants")
    return {**{name: getattr(program, name) for name in names}, "channels": program.output_channels}


NETWORK = everything(*SHAPE, channels=4, levels=LEVELS)
PROGRAM = compile_network(NETWORK)


def example(dtype: torch.dtype) -> dict[str, Any]:
    image = image_of(NETWORK, 2, dtype=dtype)
    known = torch.zeros_like(image, dtype=torch.bool)
    known[:, :, 0] = True
    return {
        "image": image,
        **tensors(PROGRAM),
        "weights": PROGRAM.weights.to(dtype),
        "parameters": PROGRAM.parameters.to(dtype),
        "constants": [constant.to(dtype) for constant in PROGRAM.constants],
        "levels": torch.arange(LEVELS).to(dtype),
        "seeds": torch.tensor([1, -5]),
        "known": known,
        "count": LEVELS,
        "return_logits": True,
    }


def sample_arguments(
    network: Network,
    images: int = 2,
    dtype: torch.dtype = torch.float32,
    stored: torch.dtype | None = None,
    kind: str = "categorical",
    known: bool = False,
    per_color: bool = False,
    return_logits: bool = True,
    **options: Any,
) -> tuple[Any, ...]:
    """Of the raw op `incremental_sample`; ``options`` are columns of the draw, temperature and top_p."""
    program = compile_network(network, dtype=dtype, weights_dtype=stored, per_color=per_color)
    image = image_of(network, images, dtype=dtype)
    colors = image.shape[1]
    sizes = {
        "categorical": program.output_channels // colors,
        "bernoulli": 1,
        "logistic_mixture": program.output_channels // 3,
    }
    count = options.get("count", sizes[kind])
    draw = [
        DRAWS.index(kind),
        count,
        1,
        count,
        options.get("top_k", 0),
        options.get("levels", 0),
        options.get("step", 0),
    ]
    values = torch.linspace(-1, 1, max(count, 2), dtype=dtype)
    mask = torch.rand(image.shape, generator=torch.Generator().manual_seed(3)) < 0.4 if known else None
    return (
        image, mask, program.program, program.weights, program.parameters, list(program.constants), values,
        torch.arange(images) * 2**40 - 1, draw, options.get("temperature", 1.0), options.get("top_p", 1.0),
        program.output_channels, return_logits,
    )  # fmt: skip


def step_arguments(place: tuple[int, int, int] = (1, 1, 0), images: int = 2) -> tuple[Any, ...]:
    """Of the raw op `incremental_step`."""
    image, constants = image_of(NETWORK, images, dtype=torch.float32), list(PROGRAM.constants)
    tail = (*place, PROGRAM.output_channels)
    return (PROGRAM.new_state(images), image, PROGRAM.program, PROGRAM.weights, PROGRAM.parameters, constants, *tail)


UNSEEN = {"incremental_step": step_arguments}
REFUSED = [
    ("incremental_sample", {"temperature": -1.0}, "temperature"),
    ("incremental_sample", {"temperature": float("nan")}, "temperature"),
    ("incremental_sample", {"top_p": 0.0}, "top_p"),
    ("incremental_sample", {"channels": 3}, "channels"),
    ("incremental_sample", {"draw": [0] * 6}, "draw"),
    ("incremental_sample", {"draw": [3, 4, 1, 4, 0, 0, 0]}, "draw has kind 3"),
    ("incremental_sample", {"draw": [0, 0, 1, 4, 0, 0, 0]}, "draw has a count"),
    ("incremental_sample", {"draw": [0, 4, 2, 4, 0, 0, 0]}, "draw reads 7 logits"),
    ("incremental_sample", {"draw": [2, 4, 1, 4, 0, 1, 0]}, "draw has a count"),
    ("incremental_sample", {"draw": [2, 4, 1, 4, 0, 2, 0]}, "draw reads 12 logits"),
    ("incremental_step", {"row": 3}, "row, column and color"),
    ("incremental_step", {"column": -1}, "row, column and color"),
    ("incremental_step", {"color": 1}, "row, column and color"),
    ("incremental_step", {"channels": 3}, "channels"),
]


def harmless(op: str, name: str, how: str, arguments: dict[str, Any]) -> bool:
    """More weights, parameters or levels than are read, and a constant for each of both images."""
    if how == "dimension 0 too long":
        return name in ("weights", "parameters", "levels", "constants")
    return False


def unknown_to_fakes(op: str, name: str, how: str) -> bool:
    """The program says how large these are."""
    sizes = ("program", "weights", "parameters", "constants", "state", "image")
    return how.startswith("dimension") and name in sizes and (name, op) != ("image", "incremental_sample")


MAPPED = OfTensors(
    lambda seeds: incremental(torch.zeros(2, 1, *SHAPE), **tensors(PROGRAM), seeds=seeds, count=LEVELS)[:2],
    lambda k: [torch.tensor([k, -k])],
)


def _drawn(seeds: Tensor) -> tuple[Tensor, Tensor]:
    image = torch.zeros(seeds.shape[0], 1, *SHAPE)
    return incremental(image, **tensors(PROGRAM), seeds=seeds, count=LEVELS)[:2]


def _first_pixel(image: Tensor) -> Tensor:
    state = image.new_zeros(image.shape[0] * PROGRAM.state)
    return incremental_step(state, image, **tensors(PROGRAM), row=0, column=0)


EXPORTED = {
    "incremental": OfTensors(_drawn, lambda n: [torch.arange(n) * 2**40]),
    "incremental of one pixel": OfTensors(_first_pixel, lambda n: [torch.zeros(n, 1, *SHAPE)]),
}
