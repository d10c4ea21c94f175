"""`incremental`: what it draws is what the whole network, evaluated anew for every pixel, and the same uniforms draw."""

import math

import pytest
import torch
from torch import Tensor

from fastgen import ops
from fastgen._schema import BUFFER_COLUMNS, DRAWS, PROGRAM_HEADER
from fastgen.autoregressive.network import Network
from fastgen.autoregressive.program import compile_network
from fastgen.ops import incremental, incremental_step
from fastgen.reference import _sampling
from fastgen.reference import incremental as reference
from fastgen.reference._program import read_program

from .. import fresh
from ..autoregressive.networks import ABOVE, BEFORE, Builder, everything, random_network, small
from .incremental_cases import (
    LEVELS,
    NETWORK,
    PROGRAM,
    SHAPE,
    example,
    image_of,
    sample_arguments,
    step_arguments,
    tensors,
)
from .numerics import assert_any_threads, assert_registered, poison_allocator

SEEDS = [3, 2**63 + 5, -7]
VALUES = torch.linspace(-1, 1, LEVELS, dtype=torch.float64)


def draw_naively(
    network: Network, image: Tensor, known: Tensor, options: dict, per_color: bool
) -> tuple[Tensor, Tensor]:
    """(Images, log-probabilities) by the whole network for every color or pixel, in float64."""
    images, colors, height, width = image.shape
    out, log_prob, seeds = torch.zeros_like(image), image.new_zeros(images, height, width), torch.tensor(
        [s - 2**64 if s >= 2**63 else s for s in SEEDS[:images]]
    )  # fmt: skip
    temperature, top_k, top_p = (
        options.get(name, default) for name, default in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0))
    )
    kind, count, step = options.get("distribution", "categorical"), options["count"], options.get("step", 0)
    for place in range(height * width):
        y, x = divmod(place, width)
        if kind == "logistic_mixture":
            logits = network.evaluate(out)[:, :, y, x]
            u = _sampling.uniforms(seeds, place * (colors + 1), step, colors + 1)
            drawn = _sampling.draw_logistic_mixture(logits, colors, options.get("rounded", 0), temperature, u)
            pixel = torch.where(known[:, :, y, x].all(1, keepdim=True), image[:, :, y, x], drawn)
            log_prob[:, y, x] = _sampling.log_prob_logistic_mixture(logits, pixel, options.get("rounded", 256))
            out[:, :, y, x] = pixel
            continue
        for c in range(colors):
            if per_color or c == 0:
                logits = network.evaluate(out)[:, :, y, x]
            of_color = logits[:, c * count : (c + 1) * count]
            if kind == "bernoulli":
                of_color = torch.stack([torch.zeros_like(logits[:, c]), logits[:, c]], 1)
            u = _sampling.uniforms(seeds, place * colors + c, step, 1)[:, 0]
            level = _sampling.draw_categorical(of_color, temperature, top_k, top_p, u)[0]
            given = image[:, c, y, x]
            level = torch.where(
                known[:, c, y, x], (VALUES[: of_color.shape[1]] - given[:, None]).abs().argmin(1), level
            )
            log_prob[:, y, x] += _sampling.log_prob_categorical(of_color, level)
            out[:, c, y, x] = torch.where(known[:, c, y, x], given, VALUES[level])
    return out, log_prob


DRAWN = {
    "levels": {"count": LEVELS},
    "cooler, step 7": {"count": LEVELS, "temperature": 0.6, "step": 7},
    "the likeliest": {"count": LEVELS, "temperature": 0.0},
    "hotter, top 2": {"count": LEVELS, "temperature": 1.7, "top_k": 2},
    "top half": {"count": LEVELS, "top_p": 0.5},
    "top 3 and top 0.7": {"count": LEVELS, "top_k": 3, "top_p": 0.7},
    "bernoulli": {"count": 1, "distribution": "bernoulli"},
    "mixture": {"count": 3, "distribution": "logistic_mixture"},
    "cooler mixture of 16 levels": {"count": 3, "distribution": "logistic_mixture", "temperature": 0.5, "rounded": 16},
}


@pytest.mark.isa
@pytest.mark.parametrize("colors", [1, 3])
@pytest.mark.parametrize("some_known", [False, True])
@pytest.mark.parametrize("case", DRAWN)
def test_samples_are_those_of_the_whole_network(case, some_known, colors):
    options, images = DRAWN[case], 1 if case == "levels" and colors == 1 else 2
    kind = options.get("distribution", "categorical")
    outputs = {"categorical": LEVELS * colors, "bernoulli": colors, "logistic_mixture": 3 * (3 if colors == 1 else 10)}[
        kind
    ]
    b = Builder(4, 5, colors, seed=len(case))
    hidden = b.sum(b.conv(b.image, 12, BEFORE), activation="elu")
    network = b.network(b.conv(hidden, outputs, [(0, -1), (0, 0)]))
    image = VALUES[image_of(network, images, seed=1).long()]
    known = torch.rand(image.shape, generator=torch.Generator().manual_seed(5)) < (0.4 if some_known else -1)
    known[:, :, 1:3] |= some_known
    expected = draw_naively(network, image, known, options, per_color=False)
    given = tensors(compile_network(network, dtype=torch.float64))
    actual = incremental(
        image, **given, seeds=SEEDS[:images], known=known if some_known else None, levels=VALUES, **options
    )
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=1e-9 if kind == "logistic_mixture" else 0)
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-9, atol=1e-9)
    assert torch.equal(actual[0][known], image[known]) or kind == "logistic_mixture"
    assert len(actual[0].unique()) > 1


@pytest.mark.isa
@pytest.mark.parametrize("seed", range(4))
def test_colors_in_turn_are_those_of_the_whole_network(seed):
    network = random_network(3, 4, 3, LEVELS, seed, per_color=True)
    image = torch.zeros(2, 3, 3, 4, dtype=torch.float64)
    expected = draw_naively(network, image, image.bool(), {"count": LEVELS}, per_color=True)
    given = tensors(compile_network(network, dtype=torch.float64, per_color=True))
    actual = incremental(image, **given, seeds=SEEDS[:2], levels=VALUES, count=LEVELS)
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kind", "colors", "outputs"), [(kind, c, o) for kind, c, o in (
    ("categorical", 3, 12), ("bernoulli", 2, 2), ("logistic_mixture", 1, 9), ("logistic_mixture", 3, 30))])  # fmt: skip
def test_the_engine_is_the_reference(kind, colors, outputs):
    network = small(3, 5, colors, levels=outputs // colors)
    for known in (False, True):
        count = {"categorical": 4, "bernoulli": 1, "logistic_mixture": 3}[kind]
        arguments = sample_arguments(network, 2, torch.float64, kind=kind, known=known, count=count, levels=8 * known)
        for a, e in zip(
            torch.ops.fastgen.incremental_sample(*arguments), reference.incremental_sample(*arguments), strict=True
        ):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@pytest.mark.isa
@pytest.mark.parametrize("per_color", [False, True])
def test_steps_are_the_logits_of_a_sample(per_color):
    network = random_network(4, 5, 3, LEVELS, 11, per_color) if per_color else everything(4, 5, 3, 6, LEVELS)
    program = compile_network(network, per_color=per_color)
    given = tensors(program)
    image = torch.zeros(2, 3, 4, 5)
    drawn, _, logits = incremental(image, **given, seeds=SEEDS[:2], count=LEVELS, return_logits=True)
    buffer = torch.full((2 * program.state + 64,), math.nan)
    state = buffer[32:-32].zero_()
    image = torch.full_like(drawn, math.nan)
    for place in range(20):
        y, x = divmod(place, 5)
        for c in range(3 if per_color else 1):
            found = incremental_step(state, image, **given, row=y, column=x, color=c)
            part = slice(c * LEVELS, (c + 1) * LEVELS) if per_color else slice(None)
            assert torch.equal(found[:, part], logits[:, part, y, x])
            image[:, c if per_color else slice(None), y, x] = drawn[:, c if per_color else slice(None), y, x]
    assert buffer[:32].isnan().all() and buffer[-32:].isnan().all() and not state.isnan().any()


WIDE = everything(5, 6, channels=40, levels=LEVELS)  # more work a pixel than one thread does alone


@pytest.mark.isa
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("images", [1, 3, 4, 13])
def test_any_threads_and_batches_give_the_same_bits(images, stored):
    dtype = torch.float64 if stored == torch.float64 else torch.float32
    given = tensors(compile_network(WIDE, dtype=dtype, weights_dtype=stored))
    seeds, image = list(range(images)), torch.zeros(images, 1, 5, 6, dtype=dtype)
    options = {"count": LEVELS, "return_logits": True}
    assert_any_threads(lambda: incremental(image, **given, seeds=seeds, **options))
    all_of_them = incremental(image, **given, seeds=seeds, **options)
    last = incremental(image[:1], **given, seeds=seeds[-1:], **options)
    assert all(torch.equal(one, many[-1:]) for one, many in zip(last, all_of_them, strict=True))


@pytest.mark.isa
def test_weights_of_bfloat16_are_those_numbers():
    stored = compile_network(WIDE, weights_dtype=torch.bfloat16)
    given = {**tensors(stored), "weights": stored.weights.float()}
    options = {"seeds": [1, 2], "count": LEVELS, "return_logits": True}
    image = torch.zeros(2, 1, 5, 6)
    for a, e in zip(
        incremental(image, **tensors(stored), **options), incremental(image, **given, **options), strict=True
    ):
        assert torch.equal(a, e)
    exact = WIDE.evaluate(incremental(image, **given, **options)[0].double())
    error = (incremental(image, **tensors(stored), **options)[2].double() - exact).abs().max() / exact.abs().max()
    assert 1e-5 < error < 5e-2  # rounded weights, and no more than that


def test_threads_end_together_where_nothing_makes_them_wait():
    """Logits of the rows above alone: no stage of a pixel lies between two draws. The same where a draw fails."""
    b = Builder(6, 40)
    x = b.sum(b.conv(b.image, 600, ABOVE), b.conv(b.conv(b.image, 300, [(-1, 0)]), 600, [(0, 0)]))
    idle = b.sum(b.conv(b.image, 3000, [(0, -1)]))  # enough work for threads, read by nobody behind it
    network = b.network(b.sum(b.part(x, 4), b.part(idle, 4), scales=(1.0, 0.0)))
    above = compile_network(b.network(x))
    for program in (above, compile_network(network)):
        options = {"seeds": [5], "count": 4, "return_logits": True}
        assert_any_threads(lambda p=program, o=options: incremental(torch.zeros(1, 1, 6, 40), **tensors(p), **o))


@pytest.mark.isa
@pytest.mark.parametrize("images", [1, 2, 5])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("distribution", DRAWS)
def test_logits_that_are_not_finite_are_an_error(distribution, threads, images):
    colors, outputs = (3, 30) if distribution == "logistic_mixture" else (1, 4)
    b = Builder(5, 6, colors)
    x = b.sum(b.conv(b.image, 300, BEFORE), b.conv(b.conv(b.image, 300, BEFORE), 300, [(0, 0)]), activation="relu")
    program = compile_network(b.network(b.conv(x, outputs, [(0, 0), (0, -1)])))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for value in (math.nan, math.inf):
            weights = program.weights.clone()
            weights[-100:] = value
            given = {**tensors(program), "weights": weights}
            options = {"count": 3 if distribution == "logistic_mixture" else 1, "distribution": distribution}
            with pytest.raises(
                ValueError, match=r"incremental: the logits of image \d at row \d, column \d are not finite"
            ):
                incremental(torch.zeros(images, colors, 5, 6), **given, seeds=list(range(images)), **options)
    finally:
        torch.set_num_threads(before)


@pytest.mark.isa
def test_a_pixel_of_nan_that_is_known_is_an_error_behind_it():
    image = torch.zeros(1, 1, *SHAPE)
    image[0, 0, 1, 1] = math.nan
    with pytest.raises(ValueError, match="image 0 at row 1, column 2 are not finite"):
        incremental(
            image, **tensors(compile_network(small(*SHAPE))), seeds=[1], count=4, known=torch.ones_like(image).bool()
        )


@pytest.mark.isa
@pytest.mark.isa
def test_levels_past_the_table_of_an_embedding_are_its_ends():
    b = Builder(*SHAPE, 1, seed=4)
    network = b.network(b.conv(b.embedding(b.image, LEVELS, 3), LEVELS, BEFORE))
    image = torch.tensor([-7.0, LEVELS, LEVELS - 0.4, 1e30, -0.4, 2.0], dtype=torch.float64).view(1, 1, *SHAPE)
    given = tensors(compile_network(network, dtype=torch.float64))
    known = torch.ones_like(image, dtype=torch.bool)
    logits = incremental(image, **given, seeds=[0], known=known, levels=VALUES, count=LEVELS, return_logits=True)[2]
    expected = network.evaluate(image.round().clamp(0, LEVELS - 1))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)


def test_nothing():
    given = example(torch.float32)
    given |= {"image": given["image"][:0], "seeds": [], "known": given["known"][:0]}
    drawn, log_prob, logits = incremental(**given)
    assert (drawn.shape, log_prob.shape, logits.shape) == ((0, 1, *SHAPE), (0, *SHAPE), (0, LEVELS, *SHAPE))
    given = tensors(PROGRAM)
    assert incremental_step(torch.zeros(0), drawn, **given, row=1, column=1).shape == (0, LEVELS)


@pytest.mark.isa
def test_every_number_is_written():
    arguments = sample_arguments(NETWORK, 3)
    for draw in ([0, LEVELS, 1, LEVELS, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0]):
        for result in (torch.ops.fastgen.incremental_sample, reference.incremental_sample):
            poison_allocator(3 * LEVELS * 12 * 4)
            outputs = result(*arguments[:8], draw, *arguments[9:])
            assert not any(output.isnan().any() for output in outputs)


@pytest.mark.isa
def test_every_logit_is_written_where_colors_have_turns():
    """Also those that are no color's, and where strides say nothing."""
    network = random_network(3, 4, 2, 5, 3, per_color=True)
    arguments = sample_arguments(network, 2, per_color=True, count=4)
    for strides in ((1, 4), (2, 1), (1, 0), (0, 0), (0, 3)):
        draw = [0, 4, *strides, 0, 0, 0]
        poison_allocator(2 * 10 * 12 * 4)
        actual = torch.ops.fastgen.incremental_sample(*arguments[:8], draw, *arguments[9:])
        expected = reference.incremental_sample(*arguments[:8], draw, *arguments[9:])
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.isa
def test_layouts_and_dtypes_of_the_image():
    given = tensors(compile_network(everything(*SHAPE, 3, 4, LEVELS), dtype=torch.float64))
    image = VALUES[image_of(everything(*SHAPE, 3), 2).long()]
    known = torch.rand(image.shape, generator=torch.Generator().manual_seed(5)) < 0.5
    options = {"seeds": [1, 2], "count": LEVELS, "levels": VALUES}
    expected = incremental(image, **given, known=known, **options)
    for other in (
        image.contiguous(memory_format=torch.channels_last),
        image.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        actual = incremental(other, **given, known=known.contiguous(memory_format=torch.channels_last), **options)
        assert all(torch.equal(a, e) for a, e in zip(actual[:2], expected[:2], strict=True))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        drawn, log_prob, logits = incremental(image.to(dtype), **given, **options)
        assert drawn.dtype == dtype and log_prob.dtype == torch.float64 and logits is None
        assert torch.equal(drawn, incremental(image, **given, **options)[0].to(dtype))


def test_an_image_depends_on_its_seed_alone():
    given = tensors(PROGRAM)
    image = torch.zeros(3, 1, *SHAPE)
    one, two = (incremental(image, **given, seeds=seeds, count=LEVELS)[0] for seeds in ([1, 2, 3], [3, 1, 2]))
    assert torch.equal(one[[2, 0, 1]], two) and not torch.equal(one[0], one[1])
    other = incremental(image, **given, seeds=[1, 2, 3], count=LEVELS, step=-1)[0]
    assert not torch.equal(one, other)


def test_levels_are_whole_numbers_where_not_given():
    drawn = incremental(**{**example(torch.float32), "known": None, "levels": None})[0]
    assert set(drawn.flatten().tolist()) <= set(map(float, range(LEVELS)))


def test_registration():
    torch_ops = torch.ops.fastgen
    for known in (False, True):
        assert_registered(torch_ops.incremental_sample.default, sample_arguments(small(2, 3), 2, known=known))
    assert_registered(torch_ops.incremental_step.default, step_arguments((0, 1, 0)))


WRONG = [
    ({"image": torch.zeros(1, *SHAPE)}, ValueError, "image must be .N, C, H, W., got shape"),
    ({"image": torch.zeros(2, 2, *SHAPE), "known": None}, ValueError, r"image must be \[N, "),
    ({"image": torch.zeros(2, 1, *SHAPE).requires_grad_()}, ValueError, "there is no gradient in image: detach it"),
    ({"parameters": PROGRAM.parameters.clone().requires_grad_()}, ValueError, "there is no gradient in parameters"),
    ({"weights": PROGRAM.weights[:, None]}, ValueError, "weights must have 1 dimension, got shape"),
    ({"weights": PROGRAM.weights[:-1]}, ValueError, "weights"),
    ({"parameters": PROGRAM.parameters[:-1]}, ValueError, "parameters"),
    ({"constants": PROGRAM.constants[0]}, TypeError, "constants must be a sequence of tensors"),
    ({"constants": PROGRAM.constants[:-1]}, ValueError, "constant = "),
    ({"constants": [c[:, :, :, :-1] for c in PROGRAM.constants]}, ValueError, r"constants\[0\] must be contiguous"),
    ({"program": PROGRAM.program.int()}, TypeError, "program must be an int64 tensor, got torch.int32"),
    ({"program": PROGRAM.program[None]}, ValueError, "program must be a vector"),
    ({"program": PROGRAM.program[:-1]}, ValueError, "program"),
    (
        {"program": torch.cat([PROGRAM.program, torch.zeros(1).long()])},
        ValueError,
        "program goes on after its last record",
    ),
    ({"channels": 3}, ValueError, "channels must be the program's 4, got 3"),
    ({"seeds": [1]}, ValueError, "seeds must be one per image"),
    ({"seeds": [1, 2.5]}, TypeError, "seeds must be integers"),
    ({"known": torch.zeros(2, 1, *SHAPE)}, TypeError, "known must be a bool tensor, got torch.float32"),
    ({"known": torch.zeros(1, 1, *SHAPE).bool()}, ValueError, "known must have the shape of image"),
    ({"levels": torch.zeros(3)}, ValueError, "levels must hold 4 values, got 3"),
    ({"count": 0}, ValueError, "count must be at least 1, got 0"),
    ({"count": 5, "levels": None}, ValueError, "draw reads 5 logits where the program has 4"),
    ({"level_stride": -1}, ValueError, "draw has a count, a stride"),
    ({"distribution": "normal"}, ValueError, "distribution must be one of .*, got 'normal'"),
    ({"distribution": "logistic_mixture", "levels": None}, ValueError, "draw reads 12 logits"),
    ({"temperature": -0.5}, ValueError, "temperature must be finite and not negative, got -0.5"),
    ({"temperature": math.inf}, ValueError, "temperature must be finite"),
    ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
    ({"top_p": 1.5}, ValueError, r"top_p must be in \(0, 1\], got 1.5"),
    ({"top_k": 2, "distribution": "bernoulli"}, ValueError, "top_k is for a categorical distribution"),
    ({"rounded": 1, "distribution": "logistic_mixture"}, ValueError, "rounded must be at least 2 levels, got 1"),
    ({"rounded": 8}, ValueError, "rounded is for a logistic_mixture distribution"),
    ({"step": 2**32}, ValueError, "step must be in"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG)
def test_errors(changes, error, message):
    with pytest.raises(error, match=f"^incremental: .*{message}"):
        incremental(**{**example(torch.float32), **changes})


def test_errors_of_a_step():
    given = tensors(PROGRAM)
    state, image, place = PROGRAM.new_state(2), torch.zeros(2, 1, *SHAPE), {"row": 0, "column": 0}
    with pytest.raises(
        ValueError, match=r"^incremental_step: row, column and color must lie in the image, got 3, 0, 0"
    ):
        incremental_step(state, image, **given, row=3, column=0)
    with pytest.raises(ValueError, match=r"^incremental_step: state must hold"):
        incremental_step(state[:-1], image, **given, **place)
    with pytest.raises(TypeError, match=r"^incremental_step: state and parameters must be float32 or float64"):
        incremental_step(state.double(), image, **given, **place)
    with pytest.raises(ValueError, match=r"^incremental_step: state must be contiguous"):
        incremental_step(torch.zeros(2 * len(state))[::2], image, **given, **place)


# Runs programs with numbers changed at random, in a process of its own: a crash is a status, not the end of the tests.
FUZZ = """
import random, sys, torch
from tests.autoregressive.networks import everything, random_network
from tests.ops.incremental_cases import sample_arguments

torch.set_num_threads(2)
choose, taken, refused = random.Random(int(sys.argv[1])), 0, 0
networks = [everything(3, 4, channels=3, levels=4)] + [random_network(3, 4, 2, 4, seed, seed % 2 == 1) for seed in range(7)]
calls = [sample_arguments(n, 2, per_color=k > 0 and k % 2 == 0) for k, n in enumerate(networks)]
ODD = [-1, 0, 1, 2, 3, 5, 16, 64, 2**31, 2**31 - 1, 2**40, 2**62, -(2**63), 2**63 - 1]
for trial in range(int(sys.argv[2])):
    arguments = list(choose.choice(calls))
    program = arguments[2].clone()
    for _ in range(choose.choice([1, 1, 1, 2, 3])):
        k = choose.randrange(len(program))
        near = int(program[k]) + choose.choice([-2, -1, 1, 2, 7])
        program[k] = max(-(2**63), min(2**63 - 1, choose.choice([near, near, choose.choice(ODD)])))
    if choose.random() < 0.05:
        program = program[: choose.randrange(len(program))]
    arguments[2] = program
    try:
        torch.ops.fastgen.incremental_sample(*arguments)
        taken += 1
    except RuntimeError as error:
        assert "incremental" in str(error), error
        refused += 1
print(taken, refused)
"""


@pytest.mark.isa
def test_no_program_crashes():
    taken, refused = map(int, fresh.run(FUZZ, "1", "600").stdout.split())
    assert taken > 60 and refused > 200


@pytest.mark.isa
@pytest.mark.parametrize("operand", [1, 2])
def test_keys_and_values_that_are_not_kept_are_refused(operand):
    """They would be read where later rows have been written over them."""
    arguments = list(sample_arguments(everything(3, 4, channels=3, levels=4), 2))
    program = arguments[2].clone()
    plan = read_program("", program, arguments[3].numel(), arguments[4].numel(), arguments[5], 2)
    attention = next(i for moment in plan.instructions.values() for i in moment if i.kind == "attention")
    buffer = attention.operands[operand].buffer
    program[len(PROGRAM_HEADER) + buffer * len(BUFFER_COLUMNS) + BUFFER_COLUMNS.index("rows")] = 2
    arguments[2] = program
    with pytest.raises(RuntimeError, match=r"program has an attention .* rows"):
        torch.ops.fastgen.incremental_sample(*arguments)


def test_exported_names():
    assert {"incremental", "incremental_step"} <= set(ops.__all__)
