"""Arguments of `sampler_step` for its tests, and the comparison with the reference."""

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen import _dispatch
from fastgen.ops import COLUMNS, sampler_step
from fastgen.reference import sampler_step as reference
from fastgen.reference._layout import output_strides

from .families import Call, OfTensors
from .numerics import (
    DTYPES,
    LAYOUTS,
    STRIDES,
    assert_bar,
    dtype_name,
    laid_out,
    place,
    poison_allocator,
    randn,
    strided,
)

TENSORS = ("sample", "model_output", "uncond", "noise", "variance", "mask", "known", "known_noise")
SHAPE = (2, 3, 5, 7)
STEP = 1
OPTIONS = {  # the optional arguments that make sense together
    "bare": (),
    "uncond": ("uncond",),
    "noise": ("noise",),
    "seeds": ("seeds",),
    "learned variance": ("noise", "variance"),
    "learned variance of seeds": ("seeds", "variance"),
    "inpainting": ("mask", "known"),
    "noised inpainting": ("mask", "known", "known_noise"),
    "history of 1": ("history 1",),
    "history of 2": ("history 2",),
    "history of 3": ("history 3",),
    "threshold": ("threshold",),
    "everything": ("uncond", "noise", "variance", "mask", "known", "known_noise", "threshold", "history 3"),
    "everything of seeds": ("uncond", "seeds", "variance", "mask", "known", "known_noise", "threshold", "history 2"),
}


def make_table(dtype: torch.dtype = torch.float64, history: int = 6, clip: float = 0.8, **columns: float) -> Tensor:
    """Three rows of coefficients of order one; another row than ``STEP`` gives another answer."""
    table = 0.4 + 0.5 * randn(3, len(COLUMNS) + history, seed=77).tanh()
    table[:, COLUMNS.index("clip_min")] = -clip
    table[:, COLUMNS.index("clip_max")] = clip
    table[:, COLUMNS.index("guidance_scale")] = 2.5
    for name, value in columns.items():
        table[:, COLUMNS.index(name)] = value
    return table.to(dtype)


def make(names, dtypes, layouts, shape=SHAPE) -> dict:
    """Arguments of `sampler_step` by keyword; ``dtypes`` and ``layouts`` are taken in turn, the sample first."""
    dtype, layout = itertools.cycle(dtypes), itertools.cycle(layouts)
    arguments = {}
    for i, name in enumerate(("sample", "model_output", *names)):
        if name == "seeds":
            arguments[name] = torch.tensor([2**40 + n if n % 2 else -n - 1 for n in range(shape[0])], dtype=torch.int64)
        elif name == "threshold":
            arguments[name] = place((1 + randn(2 * shape[0], seed=9).abs()).to(next(dtype)), "contiguous")[::2]
        elif name.startswith("history"):
            count = int(name.split()[1])
            arguments["history"] = [
                place(randn(*shape, seed=50 + k, dtype=next(dtype)), next(layout)) for k in range(count)
            ]
        else:
            value = randn(*shape, seed=i + 1)
            arguments[name] = place((value.sigmoid() if name == "mask" else value).to(next(dtype)), next(layout))
    return arguments


def raw(arguments: dict, table: Tensor, step: int, wanted: tuple) -> tuple:
    """The arguments in the order of the raw op; ``wanted`` ends them."""
    sample, model, uncond, noise, variance, mask, known, known_noise = (arguments.get(name) for name in TENSORS)
    history, seeds, threshold = list(arguments.get("history", ())), arguments.get("seeds"), arguments.get("threshold")
    inputs = (sample, model, table, step, uncond, history, noise, seeds, variance, mask, known, known_noise, threshold)
    return (*inputs, *wanted)


def by_reference(arguments: dict, table: Tensor, step: int, wide: bool) -> tuple[Tensor, ...]:
    """The reference on the same arguments, in float64 throughout where ``wide``; all three outputs."""
    if wide:
        arguments = {
            name: [h.double() for h in t] if name == "history" else t if name == "seeds" else t.double()
            for name, t in arguments.items()
        }
        table = table.double()
    return reference.sampler_step_fwd(*raw(arguments, table, step, (True, True)))


def check(arguments: dict, table: Tensor, step: int = STEP) -> None:
    sample = arguments["sample"]
    poison_allocator(sample.numel() * sample.element_size())
    actual = sampler_step(**arguments, table=table, step=step, return_prediction=True, return_corrected=True)
    beside, exact = by_reference(arguments, table, step, False), by_reference(arguments, table, step, True)
    # nothing is more exact than float64 to compare it with; a float32 row of coefficients may be lucky in plain torch. The
    # normals drawn in the kernel are themselves only good to a few units in the last place of float32
    slack = {torch.float64: 1e-14, torch.float32: 1.2e-7}.get(sample.dtype, 2e-7)
    if "seeds" in arguments:
        slack += 1e-6
    for a, b, e in zip(actual, beside, exact, strict=True):
        assert a.dtype == sample.dtype and list(a.stride()) == output_strides(sample)
        assert_bar(a, b, e, slack)
    alone = sampler_step(**arguments, table=table, step=step)
    assert isinstance(alone, Tensor) and torch.equal(alone, actual[0])


def example(dtype: torch.dtype) -> dict[str, Any]:
    arguments = make(OPTIONS["everything"], [dtype], ["contiguous"])
    return {**arguments, "table": make_table(), "step": STEP, "return_prediction": True, "return_corrected": True}


def examples() -> list[dict[str, Any]]:
    given = example(torch.float32)
    drawn = {**given, "noise": None, "seeds": torch.arange(SHAPE[0])}
    written = [{**named, "out": [torch.empty_like(given["sample"]) for _ in range(3)]} for named in (given, drawn)]
    return [drawn, *written]


def harmless(op: str, name: str, how: str, arguments: dict[str, Any]) -> bool:
    """A table may be longer than is read."""
    return name == "table" and (how.endswith("too long") or how == "dimension 0 too short")


TABLE = make_table()
REFUSED = [
    ("sampler_step_fwd", {"step": 3}, "step"),
    ("sampler_step_fwd", {"step": -1}, "step"),
    ("sampler_step_out", {"step": 2**40}, "step"),
    ("sampler_step_fwd", {"table": TABLE[:, :22]}, "table"),
    ("sampler_step_fwd", {"mask": None}, "mask"),
]


def mapped(x: Tensor, model: Tensor, h: Tensor, noise: Tensor, threshold: Tensor) -> Tensor:
    return sampler_step(x, model, TABLE, 1, history=[h, x], noise=noise, threshold=threshold)


def exported(x: Tensor, model: Tensor, h: Tensor, noise: Tensor, threshold: Tensor) -> Any:
    options = {"noise": noise, "threshold": threshold, "return_prediction": True}
    return sampler_step(x, model, TABLE, 1, history=[h], **options)


def images(count: int, *shape: int, seed: int = 0) -> list[Tensor]:
    return [randn(*shape, seed=seed + 10 * i, dtype=torch.float32) for i in range(count)]


MAPPED = OfTensors(mapped, lambda k: [*images(4, 2, 4, 5, 7, seed=k), 1 + randn(2, seed=k + 80).abs()])
EXPORTED = {
    "sampler_step": OfTensors(exported, lambda n: [*images(4, n, 4, 5, 7), 1 + randn(n).abs()]),
    "sampler_step of seeds": OfTensors(
        lambda x, model, seeds: sampler_step(x, model, TABLE, 1, seeds=seeds),
        lambda n: [*images(2, n, 4, 5, 7), torch.arange(n)],
    ),
}
TWICE = True
LONG_TABLE = make_table(torch.float32).repeat(3, 1)


def counted(step: int) -> Tensor:
    x = torch.ones(2, 3, 4, 4)
    return sampler_step(x, x, LONG_TABLE, step, seeds=torch.arange(2))


# Options of the Triton kernel, and which of the two further outputs are wanted.
KERNEL_OPTIONS = {
    "plain": ((), (False, False)),
    "guided, noise": (("uncond", "noise"), (False, False)),
    "history, seeds, variance, outputs": (("uncond", "seeds", "variance", "history 4"), (True, True)),
    "threshold": (("threshold",), (False, True)),
    "inpainting": (("seeds", "mask", "known", "known_noise"), (True, False)),
    "inpainting without noise": (("mask", "known"), (False, False)),
}

KERNEL_OPTIONS_OF_ALL_DTYPES = ("history, seeds, variance, outputs", "inpainting")


def step_arguments(names, wanted, dtype, layout, shape) -> tuple[Any, ...]:
    """Arguments of `sampler_step_fwd`: the sample in ``dtype`` and ``layout``, the others contiguous, in two dtypes."""
    arguments = make(names, [torch.float32, torch.float16], ["contiguous"], shape)
    arguments["sample"] = laid_out(arguments["sample"].to(dtype), layout)
    return raw(arguments, make_table(history=8), STEP, wanted)


def strided_arguments(kind: str) -> tuple[Any, ...]:
    sample, model, mask = (randn(2, 4, 5, 6, seed=k, dtype=torch.float32) for k in range(3))
    table = make_table(torch.float32).repeat_interleave(2, 1)[:, ::2]
    seeds = torch.tensor([5, 6])
    inputs = (model, table, STEP, None, [mask], None, seeds, None, mask, model, None, None, True, True)
    return (strided(sample, kind), *inputs)


def calls() -> Iterator[Call]:
    shapes = [(2, 3, 19, 21), (3, 4, 10, 11)]
    kinds = itertools.product(KERNEL_OPTIONS.items(), DTYPES, LAYOUTS, shapes)
    for (case, (names, wanted)), dtype, layout, shape in kinds:
        # what is loaded and what is computed are apart in the kernel: of the other dtypes the two cases that load and store most
        if dtype != torch.float32 and (case not in KERNEL_OPTIONS_OF_ALL_DTYPES or shape == shapes[0]):
            continue
        # normals are made in float32, so even a float64 sample carries their rounding
        tolerance = torch.float32 if dtype == torch.float64 and "seeds" in names else None
        arguments = partial(step_arguments, names, wanted, dtype, layout, shape)
        yield Call(f"{case} {shape} {layout} {dtype_name(dtype)}", "sampler_step_fwd", arguments, tolerance)
    for kind in STRIDES:
        yield Call(kind, "sampler_step_fwd", partial(strided_arguments, kind))
    x, row = torch.full((1, 1, 1, 1), 0.5), TABLE[:1].float()  # one step, and one of everything
    one = (x, x, row, 0, None, [], None, torch.tensor([3]), *[None] * 5, True, True)
    yield Call("one of everything", "sampler_step_fwd", lambda: one)


@pytest.mark.parametrize("shape", [(2, 3, 19, 21), (2, 4, 8, 16), (3, 7), (2,)])
def check_draws_the_normals_of_philox_normal(kernels, shape):
    """x = 0 + 1 * noise: the normals drawn inside a step, in either layout, have the bits of `philox_normal`."""
    table = torch.zeros(4, len(COLUMNS))
    table[:, COLUMNS.index("noise")] = 1
    seeds = torch.arange(shape[0]) - 1
    expected = kernels.philox_normal(seeds, shape, 3)
    for sample in (laid_out(torch.zeros(shape), layout) for layout in LAYOUTS):
        drawn = kernels.sampler_step_fwd(sample, sample, table, 3, None, [], None, seeds, *[None] * 5, False, False)[0]
        assert torch.equal(drawn, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def check_out(kernels, layout):
    """Into the sample itself, and into memory of other strides."""

    def written(sample: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        second = torch.zeros(*sample.shape[:-1], 2 * sample.shape[-1], device=sample.device)[..., ::2]
        third = torch.zeros_like(sample, memory_format=torch.contiguous_format)
        sample = sample.clone()
        _dispatch.Triton.kernel("sampler_step_out")(sample, *inputs, sample, second, third)
        return sample, second, third

    sample, model = (randn(2, 4, 9, 7, seed=k, dtype=torch.float32) for k in range(2))
    sample = laid_out(sample, layout)
    inputs = (model, make_table(torch.float32), STEP, None, [model], None, torch.tensor([5, 6]), *[None] * 5)
    expected = kernels.sampler_step_fwd(sample, *inputs, True, True)
    assert all(torch.equal(a, e) for a, e in zip(kernels.on_device(written)(sample, *inputs), expected, strict=True))


def check_nothing(kernels):
    empty, table = torch.zeros(2, 0, 3), torch.zeros(1, len(COLUMNS))
    arguments = (empty, table, 0, None, [], None, torch.zeros(2).long(), *[None] * 5, True, True)
    assert all(output.shape == (2, 0, 3) for output in kernels.sampler_step_fwd(empty, *arguments))


def check_reasons(kernels):
    x, byte = torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.uint8)

    def step(model, history):
        arguments = (x, model, x, 0, None, history, *[None] * 7, False, False)
        return _dispatch.Triton.reasons("sampler_step_fwd", *arguments)

    assert step(x, [x] * 9) == ["the kernel takes at most 8 history tensors, got 9"]
    assert step(x, [x] * 8) == []
    assert step(byte, []) == ["the kernels take float64, float32, bfloat16 and float16, not torch.uint8"]


def zeros(shape, dtype, layout="contiguous", full=True, table_dtype=torch.float32) -> tuple[Any, ...]:
    """Arguments without values: every operand with seeds, or the fewest with noise."""
    x, table = laid_out(torch.zeros(shape, dtype=dtype), layout), torch.zeros(2, len(COLUMNS) + 8, dtype=table_dtype)
    if not full:
        return (x, x, table, 0, None, [], x, *[None] * 6, False, False)
    seeds, threshold = torch.zeros(shape[0], dtype=torch.int64), torch.zeros(shape[0])
    return (x, x, table, 1, x, [x] * 4, None, seeds, x, x, x, x, threshold, True, True)


def gates(arch: int) -> Iterator[Call]:
    shape = (2, 4, 64, 64)
    for dtype in DTYPES:
        for layout in LAYOUTS:
            yield Call(f"step {layout} {dtype_name(dtype)}", "sampler_step_fwd", partial(zeros, shape, dtype, layout))
        yield Call(f"plain step {dtype_name(dtype)}", "sampler_step_fwd", partial(zeros, shape, dtype, full=False))
    odd = partial(zeros, (1, 3, 7, 5), torch.float32, "channels_last", table_dtype=torch.float64)
    for full in (True, False):
        yield Call("one step", "sampler_step_fwd", partial(zeros, (1, 1, 1, 1), torch.float32, full=full))
    yield Call("odd step, fp64 table", "sampler_step_fwd", odd)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def gpu_is_that_of_the_cpu(dtype, layout):
    arguments = make(OPTIONS["everything of seeds"], [dtype], [layout], (2, 3, 19, 21))
    on_gpu = {name: [h.cuda() for h in v] if name == "history" else v.cuda() for name, v in arguments.items()}
    cpu = sampler_step(**arguments, table=make_table(), step=STEP, return_prediction=True, return_corrected=True)
    table = make_table().cuda()
    gpu = sampler_step(**on_gpu, table=table, step=STEP, return_prediction=True, return_corrected=True)
    tolerance = {torch.float64: 1e-6, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for g, c in zip(gpu, cpu, strict=True):
        torch.testing.assert_close(g.cpu(), c, rtol=tolerance, atol=tolerance)
        assert g.stride() == c.stride()


def gpu_gradcheck():
    x, table = randn(2, 3, 4, 4).cuda().requires_grad_(), make_table(clip=math.inf).cuda()
    assert torch.autograd.gradcheck(lambda t: sampler_step(t, t * 2, table, 2, seeds=[1, 2]), (x,))
