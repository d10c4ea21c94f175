"""Arguments of `incremental` for its tests on every device: programs of small networks."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgen import _dispatch
from fastgen._schema import DRAWS
from fastgen.autoregressive.network import Network
from fastgen.autoregressive.program import Program, compile_network
from fastgen.ops import incremental, incremental_step

from ..autoregressive.networks import everything, random_network, small, whole_rows
from .families import Call, OfTensors
from .numerics import dtype_name

LEVELS = 4
SHAPE = (2, 3)
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


NETWORK = small(*SHAPE, levels=LEVELS, constant=True)
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


def calls() -> Iterator[Call]:
    """Small, since the interpreter takes a tenth of a second for a pixel; logits of size 1, of which some are near 0."""
    two, three_colors = small(2, 2), small(1, 2, 3, levels=2)
    mixture = small(1, 2, 3, levels=10)
    made = {
        "two layers fp32": partial(sample_arguments, two, 2, known=True),
        "colors fp64": partial(sample_arguments, three_colors, 1, torch.float64, temperature=0.7, step=5),
        "the likeliest": partial(sample_arguments, two, 1, temperature=0.0, return_logits=False),
        "top 2 and top half": partial(sample_arguments, two, 1, top_k=2, top_p=0.5),
        "bernoulli": partial(sample_arguments, three_colors, 1, kind="bernoulli"),
        "mixture": partial(sample_arguments, mixture, 1, kind="logistic_mixture", count=3),
        "mixture of 16 levels, known": partial(
            sample_arguments, mixture, 1, kind="logistic_mixture", count=3, levels=16, known=True
        ),
        "mixture of one color": partial(
            sample_arguments, small(1, 2, 1, levels=9), 1, kind="logistic_mixture", count=3
        ),
        "colors in turn, bf16 weights": partial(
            sample_arguments,
            random_network(1, 2, 2, 2, 5, per_color=True),
            1,
            stored=torch.bfloat16,
            per_color=True,
            count=2,
        ),
        "rows that are whole": partial(sample_arguments, whole_rows(3, 2, channels=2), 1),
        "every kind of node": partial(sample_arguments, everything(2, 2, channels=3, levels=3), 1),
    }
    for name, make in made.items():
        yield Call(name, "incremental_sample", make, least=1.0)


def check_steps_are_the_logits_of_a_sample(kernels):
    """The state lies on the device: all pixels at once."""

    def steps(state: Tensor, image: Tensor, *rest: Any) -> Tensor:
        function = _dispatch.Triton.kernel("incremental_step")
        return torch.stack([function(state, image, *rest, y, x, 0, 4) for y in range(2) for x in range(2)], 2)

    program = compile_network(small(2, 2))
    image = image_of(small(2, 2), 2, dtype=torch.float32)
    found = kernels.on_device(steps)(
        program.new_state(2), image, program.program, program.weights, program.parameters, list(program.constants)
    )
    torch.testing.assert_close(
        found.double().unflatten(2, (2, 2)), small(2, 2).evaluate(image.double()), rtol=0, atol=4e-6
    )


def check_logits_that_are_not_finite_make_nan(kernels):
    """From the pixel on that cannot be drawn; what lies before it stays."""
    arguments = list(sample_arguments(small(1, 3), 2, return_logits=False))
    arguments[3] = arguments[3].clone()
    arguments[3][-16 * 12 :] = float("inf")  # of the last layer: inf times a hidden 0 is NaN
    drawn, log_prob, _ = kernels.incremental_sample(*arguments)
    assert drawn[:, 0, 0].isnan().any(1).all() and log_prob.isnan().any(2).all()


def check_reasons(kernels):
    arguments = list(sample_arguments(small(1, 2, levels=1025), 1))
    assert _dispatch.Triton.reasons("incremental_sample", *arguments) == [
        "up to 1024 levels or components fit the registers of a program, got 1025"
    ]
    mixture = sample_arguments(small(1, 2, levels=9), 1, kind="logistic_mixture", count=3)
    assert _dispatch.Triton.reasons("incremental_sample", *mixture) == []
    arguments[8] = [0, 1024, 1, 1024, 0, 0, 0]
    assert _dispatch.Triton.reasons("incremental_sample", *arguments) == []


def check_nothing(kernels):
    drawn, log_prob, logits = kernels.incremental_sample(*sample_arguments(small(2, 3), 0))
    assert (drawn.shape, log_prob.shape, logits.shape) == ((0, 1, 2, 3), (0, 2, 3), (0, LEVELS, 2, 3))


REGISTERS = {"incremental.incremental_kernel": 255}  # 8 warps, one program a multiprocessor
SHARED_BYTES = {"incremental.incremental_kernel": 64 * 1024}
# Beside all else the draw of a mixture leaves two addresses outside, and in fp64 what calls of divisions keep, once a pixel. For
# sm_80 in bf16 ptxas takes half the registers instead, so that two programs find room.
STACK = {"incremental.incremental_kernel": {"fp32": 16, "bf16": 288, "fp64": 512}}


def gates(arch: int) -> Iterator[Call]:
    """One kernel for everything, half a minute's compilation each time: what differs little is left to slow tests."""
    network = everything(8, 8, channels=32, levels=64)
    for name, stored in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        yield Call(f"levels {name}", "incremental_sample", partial(sample_arguments, network, 2, torch.float32, stored))
    if arch != 90:
        whole = partial(sample_arguments, network, 2, torch.float64, torch.float64)
        yield Call("levels fp64", "incremental_sample", whole)
        few = partial(sample_arguments, network, 2, top_k=5, known=True, return_logits=False)
        yield Call("the likeliest levels fp32", "incremental_sample", few)
    for colors, dtype, stored in (
        (3, torch.float32, torch.float32),
        (3, torch.float32, torch.bfloat16),
        (1, torch.float32, None),
        (3, torch.float64, None),
    ):
        if arch == 90 and (colors, stored) != (3, torch.float32):
            continue
        mixture = partial(sample_arguments, small(1, 2, colors, levels=9 if colors == 1 else 10), 1, dtype, stored)
        name = f"mixture of {colors} {dtype_name(stored or dtype)}"
        yield Call(name, "incremental_sample", partial(mixture, kind="logistic_mixture", count=3))
    yield Call("a step fp32", "incremental_step", step_arguments)
