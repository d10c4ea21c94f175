"""Arguments of `categorical_sample` for its tests, and how near a draw is to a step of the sum that decides it."""

import importlib
import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen import _dispatch
from fastgen.ops import categorical_sample
from fastgen.reference import categorical_sample as reference
from fastgen.reference._sampling import uniforms

from .families import Call, OfTensors
from .numerics import DTYPES, LAYOUTS, STRIDES, dtype_name, laid_out, randn, strided

NO_GRADIENT = True  # a draw has none
NEAR = 1e-6  # of the total: nearer to a step of the sum than this two kernels may draw different levels

# temperature, top_k (0: all), top_p (1: all)
OPTIONS = {
    "plain": (1.0, 0, 1.0),
    "temperature": (0.7, 0, 1.0),
    "greedy": (0.0, 0, 1.0),
    "top_k": (1.0, 5, 1.0),
    "top_k of one": (1.3, 1, 1.0),
    "top_p": (1.3, 0, 0.8),
    "top_p of nearly nothing": (1.0, 0, 1e-9),
    "top_k and top_p": (0.9, 7, 0.5),
}


def seeds_of(n: int) -> Tensor:
    return torch.tensor([(k + 1) * (-1) ** k * 2**33 + 5 * k for k in range(n)], dtype=torch.int64)


def margin(
    logits: Tensor, seeds: Tensor, element: int, step: int, temperature: float, top_k: int, top_p: float
) -> Tensor:
    """How far, as a share of the total, the nearest step of the sum lies from what decides a draw: [N, *], in float64.

    Steps of the sum that is inverted, of the sums that `top_p` looks at, and for the first largest of equal logits none at all.
    """
    shape = (logits.shape[0], *logits.shape[2:])
    rows = logits.double().movedim(1, -1).reshape(shape[0], math.prod(shape[1:]), logits.shape[1])  # [N, P, K]
    if temperature == 0:
        return torch.full(shape, math.inf, dtype=torch.float64)
    order = torch.argsort(rows, dim=-1, descending=True, stable=True)
    weights = torch.softmax(rows.gather(-1, order) / temperature, -1)
    found = torch.full(rows.shape[:2], math.inf, dtype=torch.float64)
    if 0 < top_k < rows.shape[-1]:
        weights[..., top_k:] = 0
    if top_p < 1:
        sums = weights.cumsum(-1) / weights.sum(-1, keepdim=True)
        found = (sums - top_p).abs().amin(-1)
        kept = (sums - weights / weights.sum(-1, keepdim=True)) < top_p
        kept[..., 0] = True
        weights = weights * kept
    ordered = torch.zeros_like(weights).scatter(-1, order, weights)
    sums = ordered.cumsum(-1) / ordered.sum(-1, keepdim=True)
    u = uniforms(seeds, element, step, rows.shape[1]).double()[..., None]
    return torch.minimum(found, (sums - u).abs().amin(-1)).reshape(shape)


def assert_drawn(actual: Tensor, logits: Tensor, seeds: Tensor, element: int, step: int, options: tuple) -> None:
    """The levels of the reference in float64, but for draws within NEAR of a step."""
    expected = reference.categorical_sample(logits.double(), seeds, element, step, *options, False)[0]
    assert actual.shape == expected.shape and actual.dtype == torch.int64
    differs = actual != expected
    assert not differs.any() or (margin(logits, seeds, element, step, *options)[differs] < NEAR).all()


def forward(shape, dtype, layout, option, kind=None) -> tuple[Any, ...]:
    logits = (3 * randn(*shape, seed=1)).to(dtype)
    logits = laid_out(logits, layout) if kind is None else strided(logits, kind)
    return (logits, seeds_of(shape[0]), 3, 2, *OPTIONS[option], True)


def example(dtype: torch.dtype) -> dict[str, Any]:
    options = {"top_k": 4, "top_p": 0.9, "return_log_prob": True}
    return {"logits": randn(2, 6, 3, 5, dtype=dtype), "seeds": torch.tensor([1, -5]), **options}


REFUSED = [
    ("categorical_sample", {"element": -1}, "element must not be negative"),
    ("categorical_sample", {"temperature": -1.0}, "temperature must be finite and not negative"),
    ("categorical_sample", {"temperature": math.nan}, "temperature"),
    ("categorical_sample", {"temperature": math.inf}, "temperature"),
    ("categorical_sample", {"top_k": -1}, "top_k must not be negative"),
    ("categorical_sample", {"top_p": 0.0}, "top_p must be in"),
    ("categorical_sample", {"top_p": 1.5}, "top_p must be in"),
    ("categorical_sample", {"top_p": math.nan}, "top_p must be in"),
]


def harmless(op: str, name: str, how: str, arguments: dict[str, Any]) -> bool:
    """There may be any number of levels but none, and of positions."""
    return name == "logits" and how[:11] in ("dimension 1", "dimension 2", "dimension 3") and how != "dimension 1 empty"


MAPPED = OfTensors(
    lambda seeds, logits: categorical_sample(logits, seeds=seeds, step=4, top_k=5, return_log_prob=True),
    lambda k: [torch.tensor([k, -k]), randn(2, 7, 3, 5, seed=k, dtype=torch.float32)],
)
EXPORTED = {
    "categorical_sample": OfTensors(
        lambda seeds, logits: categorical_sample(logits, seeds=seeds, top_p=0.9, return_log_prob=True),
        lambda n: [torch.arange(n) * 2**40, randn(n, 7, 3, 5, dtype=torch.float32)],
    )
}


def counted(step: int) -> Tensor:
    return categorical_sample(torch.linspace(-1, 2, 42).reshape(2, 7, 3), seeds=torch.arange(2), step=step)


def calls() -> Iterator[Call]:
    op = "categorical_sample"
    for dtype, layout in itertools.product(DTYPES, LAYOUTS):
        name = f"{layout} {dtype_name(dtype)}"
        yield Call(name, op, partial(forward, (2, 17, 5, 3), dtype, layout, "top_k and top_p"), least=1.0)
    for option in OPTIONS:
        yield Call(option, op, partial(forward, (2, 33, 7), torch.float32, "contiguous", option), least=1.0)
    for shape in ((2, 1), (3, 2, 5), (2, 256), (1, 1030, 2), (1, 5, 2, 3, 2)):
        yield Call(f"{shape}", op, partial(forward, shape, torch.float32, "channels_last", "top_p"), least=1.0)
    for kind in STRIDES:
        yield Call(kind, op, partial(forward, (2, 6, 5, 4), torch.float32, None, "plain", kind), least=1.0)


def check_ties(kernels):
    """Of equal logits the first are kept, -0 and 0 among them, and the sums of `top_p` count them one by one."""
    for values, options in (
        ([0.0, -0.0, 0.0, -1.0, 0.0, -0.0], (1.0, 3, 1.0)),
        ([1.0, 1.0, 1.0, 1.0, 0.0, 1.0], (1.0, 0, 0.5)),
        ([-math.inf, 2.0, -math.inf, 2.0, 2.0], (1.0, 4, 0.6)),
    ):
        logits, seeds = torch.tensor(values)[None, :, None].expand(2, len(values), 64), torch.arange(2)
        drawn, _ = kernels.categorical_sample(logits, seeds, 0, 0, *options, False)
        assert_drawn(drawn, logits, seeds, 0, 0, options)
        assert drawn.max() <= 3 and len(drawn.unique()) >= 2


@pytest.mark.parametrize("option", ["plain", "greedy", "top_k and top_p"])
def check_not_finite(kernels, option):
    """-1 and NaN where the largest is not finite, and nothing else is touched."""
    logits = randn(6, 40, dtype=torch.float32)
    logits[0, 31], logits[1, 7], logits[2], logits[3, :39] = math.nan, math.inf, -math.inf, -math.inf
    drawn, log_probs = kernels.categorical_sample(logits, torch.arange(6), 0, 0, *OPTIONS[option], True)
    assert drawn[:4].tolist() == [-1, -1, -1, 39] and log_probs[:3].isnan().all() and log_probs[3] == 0
    assert_drawn(drawn, logits, torch.arange(6), 0, 0, OPTIONS[option])


@pytest.mark.parametrize("step", [0, 7, -1, 2**31 + 5])
@pytest.mark.parametrize("element", [0, 3, 2**34 - 8, 2**40 + 5])
def check_uniforms(kernels, element, step):
    """The bits of the reference, over the ends of the words of counter and key."""
    kernel = importlib.import_module("tests.kernels.uniform")
    seeds = torch.tensor([0, 1, -5, 2**40 + 3, -(2**63), 2**63 - 1])
    drawn = kernels.on_device(kernel.uniforms)(seeds, element, step)
    assert torch.equal(drawn, uniforms(seeds, element, step, kernel.BLOCK))


def check_nothing(kernels):
    drawn, log_probs = kernels.categorical_sample(torch.zeros(2, 3, 0), torch.zeros(2).long(), 0, 0, 1.0, 0, 1.0, True)
    assert drawn.shape == (2, 0) and log_probs.shape == (2, 0)


def check_reasons(kernels):
    reasons, seeds = _dispatch.Triton.reasons, torch.zeros(1).long()
    rest = (0, 0, 1.0, 0, 1.0, False)
    assert reasons("categorical_sample", torch.zeros(1, 4096), seeds, *rest) == []
    assert reasons("categorical_sample", torch.zeros(1, 4097), seeds, *rest) == [
        "at most 4096 levels fit the registers of a program, got 4097"
    ]
    assert reasons("categorical_sample", torch.zeros(1, 2), torch.zeros(1), *rest) == [
        "seeds must be int64, got torch.float32"
    ]


def gates(arch: int) -> Iterator[Call]:
    def zeros(shape, dtype, layout, option, score=True):
        return (laid_out(torch.zeros(shape, dtype=dtype), layout), seeds_of(shape[0]), 0, 1, *OPTIONS[option], score)

    op = "categorical_sample"
    for dtype, layout in itertools.product(DTYPES, LAYOUTS):
        name = f"levels {'first' if layout == 'contiguous' else 'last'} {dtype_name(dtype)}"
        yield Call(name, op, partial(zeros, (2, 256, 64, 64), dtype, layout, "top_k and top_p"))
    for option in OPTIONS:
        yield Call(f"levels, {option}", op, partial(zeros, (2, 256), torch.float32, "contiguous", option, False))
    yield Call("4096 levels", op, partial(zeros, (2, 4096), torch.float32, "contiguous", "top_k and top_p"))
    yield Call("one level", op, partial(zeros, (1, 1), torch.float32, "contiguous", "plain"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def gpu_the_same_draws(dtype, option, layout):
    arguments = forward((3, 256, 9, 11), dtype, layout, option)
    logits, seeds, element, step, temperature, top_k, top_p, _ = arguments
    drawn, log_probs = categorical_sample(
        logits.cuda(), seeds=seeds.cuda(), element=element, step=step, temperature=temperature, top_k=top_k or None,
        top_p=top_p, return_log_prob=True,
    )  # fmt: skip
    assert_drawn(drawn.cpu(), logits, seeds, element, step, (temperature, top_k, top_p))
    levels = drawn.cpu()[:, None]
    exact = torch.log_softmax(logits.double(), 1).gather(1, levels)[:, 0]
    torch.testing.assert_close(log_probs.cpu().double(), exact, rtol=1e-5, atol=1e-5)
