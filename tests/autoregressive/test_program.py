"""The compiler: whatever the network, its program's logits are those of the whole image, and each place is computed once."""

import pytest
import torch
from torch import Tensor

from fastgen._schema import BUFFER_COLUMNS, MOMENTS, PROGRAM_HEADER, RECORD_HEADER
from fastgen.autoregressive.network import ACTIVATIONS, Network
from fastgen.autoregressive.program import Program, compile_network
from fastgen.ops import incremental
from fastgen.reference import incremental as reference

from ..ops.incremental_cases import LEVELS, image_of, tensors
from .networks import ABOVE, BEFORE, UP_TO, Builder, everything, random_network, whole_rows

BOUND = {torch.float64: 1e-11, torch.float32: 1e-5}


def logits_of(program: Program, image: Tensor) -> Tensor:
    """Of a whole image that is known."""
    image = image.to(program.parameters.dtype)
    known = torch.ones_like(image, dtype=torch.bool)
    seeds = range(image.shape[0])
    options = {"level_stride": 0, "color_stride": 0, "count": 1, "levels": image.new_zeros(1)}
    return incremental(image, **tensors(program), seeds=list(seeds), known=known, return_logits=True, **options)[2]


def check(network: Network, images: int = 2, dtype: torch.dtype = torch.float64, per_color: bool = False) -> Program:
    program = compile_network(network, dtype=dtype, per_color=per_color)
    image = image_of(network, images)
    expected = network.evaluate(image)
    actual = logits_of(program, image) if not per_color else logits_in_turn(program, image)
    error = float((actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1))
    assert error <= BOUND[dtype], f"{error:.1e}"
    return program


def logits_in_turn(program: Program, image: Tensor) -> Tensor:
    """Of a network that reads the colors of a pixel before the one at hand: its levels lie color after color."""
    known, count = torch.ones_like(image, dtype=torch.bool), program.output_channels // image.shape[1]
    seeds = list(range(image.shape[0]))
    return incremental(image, **tensors(program), seeds=seeds, known=known, count=count, return_logits=True)[2]


SIZES = [(1, 1), (1, 9), (7, 1), (5, 7), (8, 8), (13, 6)]


@pytest.mark.isa
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("size", SIZES)
def test_every_kind_of_node(size, dtype):
    check(everything(*size, images=2), 2, dtype)
    check(everything(*size, colors=3, channels=7), 1, dtype)


@pytest.mark.isa
@pytest.mark.parametrize("size", SIZES)
def test_layers_of_whole_rows(size):
    program = check(whole_rows(*size), 2)
    check(whole_rows(*size, colors=3), 1, torch.float32)
    assert moments(program)["behind"] == 5, (
        "two joined, their convolution and gate, a sum with what lies above, its convolution"
    )


def test_a_large_image():
    check(everything(64, 40, channels=4), 1)
    check(everything(33, 47, channels=4), 2, torch.float32)


@pytest.mark.parametrize("seed", range(24))
def test_random_networks(seed):
    """By the engine, and those of an eighth by the reference, which takes a hundred times as long."""
    size, colors, images = SIZES[seed % len(SIZES)], 1 + seed % 3, 1 + seed % 4
    per_color = seed % 2 == 1
    network = random_network(*size, colors, LEVELS, seed, per_color)
    program = check(network, images, per_color=per_color)
    if seed % 8 == 0:
        image, given = image_of(network, images), tensors(program)
        channels, given["constants"] = given.pop("channels"), list(given["constants"])
        draw = [0, LEVELS, 1, LEVELS, 0, 0, 0]
        arguments = (
            *given.values(),
            torch.arange(LEVELS).double(),
            torch.arange(images),
            draw,
            1.0,
            1.0,
            channels,
            True,
        )
        logits = reference.incremental_sample(image, torch.ones_like(image, dtype=torch.bool), *arguments)[2]
        torch.testing.assert_close(logits, network.evaluate(image), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", BOUND)
def test_every_activation(activation, dtype):
    b = Builder(3, 5)
    x = b.sum(b.conv(b.image, 19, BEFORE), scales=(0.5,))
    of_each = (
        b.sum(x, activation=activation),
        b.product(x, x, activation, activation),
        b.concat(x, activation=activation),
    )
    check(b.network(b.concat(*of_each)), dtype=dtype)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("strict", [True, False])
def test_attention(strict, heads):
    b = Builder(4, 5)
    x = b.conv(b.image, 6, BEFORE)
    query, key, value = (b.conv(x, size, [(0, 0)]) for size in (6, 6, 9))
    attended = b.attention(query, key, value, heads, strict)
    check(b.network(b.conv(attended, 4, [(0, 0)])))
    fixed = b.attention(query, b.constant(6, 1, 1, 1), b.part(b.constant(12, 1, 4, 5), 9, 2), heads, strict)
    check(b.network(fixed))


@pytest.mark.parametrize("shift", [(-1, 0), (0, -1), (-1, 2), (-2, -3), (-9, 0), (0, -9)])
def test_shifted_operands(shift):
    dy, dx = shift
    b = Builder(5, 6)
    x = b.conv(b.image, 6, BEFORE)
    moved = b.part(x, 4, 1, dy, dx)
    check(b.network(b.conv(moved, 4, [(-1, 0), (0, 0)])))
    check(b.network(b.sum(moved, b.part(x, 4), scales=(2.0, 1.0))))
    check(b.network(b.product(moved, b.part(x, 4, 2))))
    check(b.network(b.concat(moved, b.part(b.constant(3, 1, 5, 6), 2, 1, dy, dx))))
    check(b.network(moved))


@pytest.mark.parametrize("factor", [2, 3])
def test_strides_and_upscaling(factor):
    for height, width in ((6, 6), (5, 7), (1, 4)):
        b = Builder(height, width)
        x = b.conv(b.image, 6, BEFORE)
        size = (-(-height // factor), -(-width // factor))
        down = b.sum(b.conv(x, 5, UP_TO[1:2] + UP_TO[3:], size=size, stride=factor), activation="elu")
        phases = [(0, 0, (y, x)) for y in range(factor) for x in range(factor)]
        up = b.conv(b.norm(down), 6, [*phases, (-1, 0, (0, 1)), (0, -1, (1, 0))], size=(height, width), upscale=factor)
        check(b.network(b.sum(up, x, activation="tanh")))


def test_a_constant_for_each_image():
    b = Builder(4, 5)
    b.network(b.image)
    x = b.sum(b.conv(b.image, 6, BEFORE), b.constant(6, 3, 1, 1), b.constant(6, 3, 4, 5), b.constant(6, 1, 1, 5))
    check(b.network(x), images=3)


def records(program: Program) -> list[dict[str, int]]:
    """The RECORD_HEADER of each instruction."""
    numbers = program.program.tolist()
    header = dict(zip(PROGRAM_HEADER, numbers, strict=False))
    at, found = len(PROGRAM_HEADER) + len(BUFFER_COLUMNS) * header["buffers"], []
    for _ in range(header["instructions"]):
        found.append(dict(zip(RECORD_HEADER, numbers[at:], strict=False)))
        at += found[-1]["length"]
    assert at == len(numbers)
    return found


def moments(program: Program) -> dict[str, int]:
    """Moment -> how many instructions it has."""
    found = [MOMENTS[record["moment"]] for record in records(program)]
    return {moment: found.count(moment) for moment in MOMENTS}


def test_what_reads_the_rows_above_is_computed_once_a_row():
    b = Builder(4, 5)
    x = b.conv(b.sum(b.conv(b.image, 6, ABOVE), activation="relu"), 4, [(-1, -1), (0, 0), (0, 1)])
    assert moments(check(b.network(x))) == {"row": 2, "pixel": 0, "after": 0, "behind": 0}


def test_taps_above_and_beside_are_two_instructions_and_a_sum_is_one():
    b = Builder(4, 5)
    x = b.sum(b.conv(b.image, 6, BEFORE), b.conv(b.image, 6, ABOVE), activation="relu")
    assert moments(check(b.network(x))) == {"row": 1, "pixel": 1, "after": 0, "behind": 0}


def test_what_reads_the_pixel_itself_comes_after_it_and_what_nobody_reads_not_at_all():
    b = Builder(4, 5)
    doubled = b.concat(b.image, b.image, scales=(2.0, -1.0))
    b.conv(doubled, 300, UP_TO)
    program = check(b.network(b.conv(doubled, 4, BEFORE)))
    assert moments(program) == {"row": 1, "pixel": 1, "after": 1, "behind": 0}
    assert len(program.weights) == 16 * 2 * len(BEFORE)


def test_rows_of_state_are_those_that_are_read():
    b = Builder(16, 4)
    x = b.conv(b.image, 6, [(-3, 0), (0, -1)])
    program = check(b.network(x))
    first = dict(zip(BUFFER_COLUMNS, program.program.tolist()[len(PROGRAM_HEADER) :], strict=False))
    assert (first["rows"], first["left"], first["right"]) == (4, 1, 0)


def test_stages_follow_what_is_read():
    b = Builder(4, 5)
    x = b.sum(b.conv(b.image, 6, [(0, -1)]), activation="relu")
    y = b.sum(b.conv(x, 6, [(0, 0)]), activation="relu")
    program = check(b.network(b.concat(y, b.conv(x, 4, [(0, -1)]))))
    assert [record["stage"] for record in records(program) if MOMENTS[record["moment"]] == "pixel"] == [0, 1, 1, 2]


def test_dtypes():
    network = everything(3, 4)
    for dtype, stored in ((torch.float64, None), (torch.float32, None), (torch.float32, torch.bfloat16)):
        program = compile_network(network, dtype=dtype, weights_dtype=stored)
        assert program.weights.dtype == (stored or dtype) and program.new_state(2).dtype == dtype
        assert all(t.dtype == dtype for t in (program.parameters, *program.constants))
        assert program.new_state(2).shape == (2 * program.state,)
