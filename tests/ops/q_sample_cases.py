"""Arguments of `q_sample` for its tests, and what a user writes without it."""

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen import _dispatch
from fastgen._schema import PREDICTION_TYPES
from fastgen.ops import q_sample
from fastgen.reference._layout import output_strides

from .families import Call, OfTensors
from .numerics import DTYPES, LAYOUTS, STRIDES, assert_bar, dtype_name, laid_out, place, randn, strided

STEPS = 11
TARGETS = (None, *PREDICTION_TYPES)


def tables(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Alphas and sigmas [T], not of a variance-preserving process, so that one cannot stand for the other."""
    return tuple((0.3 + randn(STEPS, seed=70 + k).sigmoid()).to(dtype) for k in range(2))


def timesteps(n: int) -> Tensor:
    return torch.tensor([(7 * k + 3) % STEPS for k in range(n)], dtype=torch.int64)


def make(shape: tuple[int, ...], dtypes, layouts) -> tuple[Tensor, Tensor]:
    """(x0, noise); ``dtypes`` and ``layouts`` are taken in turn."""
    dtype, layout = itertools.cycle(dtypes), itertools.cycle(layouts)
    x0, noise = (place(randn(*shape, seed=k + 1).to(next(dtype)), next(layout)) for k in range(2))
    return x0, noise


def plain(x0: Tensor, t: Tensor, alphas: Tensor, sigmas: Tensor, noise: Tensor, target: str | None) -> list[Tensor]:
    """As a user writes it, in the dtype of ``x0``: x_t, and the target where one is named."""
    shape = (-1, *[1] * (x0.dim() - 1))
    alpha, sigma = alphas[t].to(x0.dtype).reshape(shape), sigmas[t].to(x0.dtype).reshape(shape)
    noise = noise.to(x0.dtype)
    targets = {
        "epsilon": lambda: noise,
        "sample": lambda: x0,
        "v_prediction": lambda: alpha * noise - sigma * x0,
        "flow_prediction": lambda: noise - x0,
    }
    return [alpha * x0 + sigma * noise, *([] if target is None else [targets[target]()])]


def results(function, *args, target: str | None, **options) -> list[Tensor]:
    output = function(*args, return_target=target, **options)
    return [output] if target is None else list(output)


def example(dtype: torch.dtype) -> dict[str, Any]:
    x0, noise = make((3, 4, 5, 7), [dtype], ["contiguous"])
    alphas, sigmas = tables()
    named = {"x0": x0, "noise": noise, "t": timesteps(3), "alphas": alphas, "sigmas": sigmas}
    return {**named, "return_target": "v_prediction"}


def examples() -> list[dict[str, Any]]:
    return [{**example(torch.float32), "noise": None, "seeds": torch.arange(3)}]


def harmless(op: str, name: str, how: str, arguments: dict[str, Any]) -> bool:
    """Where noise is drawn, a sample may be of any size."""
    sizes = ("dimension 1", "dimension 2", "dimension 3", "a dimension less")
    return op == "q_sample_fwd" and name == "x0" and arguments["noise"] is None and how.startswith(sizes)


REFUSED = [
    ("q_sample_fwd", {"noise": None, "seeds": None}, "noise or seeds"),
    ("q_sample_fwd", {"target": 4}, "target"),
    ("q_sample_fwd", {"target": -2}, "target"),
    ("q_sample_bwd", {"target": 4}, "target"),
    ("q_sample_bwd", {"grad": None, "grad_target": None}, "grad"),
]
TABLES = tables()
MAPPED = OfTensors(
    lambda x, noise, t: q_sample(x, t, *TABLES, noise, return_target="v_prediction"),
    lambda k: [*(randn(2, 4, 5, 7, seed=k + i, dtype=torch.float32) for i in (0, 30)), torch.tensor([k, k + 4])],
)
EXPORTED = {
    "q_sample": OfTensors(
        lambda x, noise, t: q_sample(x, t, *TABLES, noise, return_target="sample"),
        lambda n: [*(randn(n, 4, 5, 7, seed=i, dtype=torch.float32) for i in range(2)), torch.arange(n) % 7],
    ),
    "q_sample of seeds": OfTensors(
        lambda x, seeds, t: q_sample(x, t, *TABLES, seeds=seeds),
        lambda n: [randn(n, 4, 5, 7, dtype=torch.float32), torch.arange(n), torch.arange(n) % 7],
    ),
}
TWICE = True


def counted(step: int) -> Tensor:
    x = torch.ones(2, 3, 4, 4)
    return q_sample(x, torch.tensor([1, 2]), *TABLES, seeds=torch.arange(2), step=step)


def forward(shape, dtype, target, layout, drawn) -> tuple[Any, ...]:
    """Arguments of `q_sample_fwd`: noise drawn, or given in half precision; tables in either dtype."""
    x0 = laid_out(randn(*shape, seed=1, dtype=dtype), layout)
    noise, seeds = randn(*shape, seed=2, dtype=torch.float16), torch.arange(3, 3 + shape[0])
    table = tables(torch.float32 if layout == "contiguous" else torch.float64)
    return (x0, timesteps(shape[0]), *table, None if drawn else noise, seeds if drawn else None, 3, target)


def backward(dtype, target, layout, given) -> tuple[Any, ...]:
    """Arguments of `q_sample_bwd`, for the gradients of both outputs or of one."""
    grads = [laid_out(randn(2, 3, 19, 21, seed=1, dtype=dtype), layout), randn(2, 3, 19, 21, seed=2, dtype=dtype)]
    grads = [grad if given in ("both", name) else None for grad, name in zip(grads, ("grad", "target"), strict=True)]
    return (*grads, timesteps(2), *tables(), target, True, PREDICTION_TYPES[target] != "sample")


def strided_arguments(kind: str) -> tuple[Any, ...]:
    x0, noise = (strided(randn(2, 4, 5, 6, seed=k, dtype=torch.float32), kind) for k in range(2))
    table = [v.repeat_interleave(2)[::2] for v in tables()]
    return (x0, timesteps(4)[::2], *table, noise, None, 0, PREDICTION_TYPES.index("v_prediction"))


def calls() -> Iterator[Call]:
    targets = {-1: "no target", **dict(enumerate(PREDICTION_TYPES))}
    # each dtype loads and stores in one place: all targets in one dtype, and the fullest in all
    kinds = [(d, k) for d in DTYPES for k in targets if d == torch.float32 or targets[k] == "v_prediction"]
    for (dtype, target), layout, drawn in itertools.product(kinds, LAYOUTS, (False, True)):
        if drawn and dtype == torch.float32 and targets[target] not in ("no target", "v_prediction"):
            continue  # where the noise comes from is one place too, and the interpreter is slow at drawing
        # normals are made in float32, so even a float64 sample carries their rounding
        tolerance = torch.float32 if dtype == torch.float64 and drawn else None
        for shape in ((2, 3, 19, 21), (3, 5)):
            name = f"{targets[target]} {'drawn ' * drawn}{shape} {layout} {dtype_name(dtype)}"
            yield Call(name, "q_sample_fwd", partial(forward, shape, dtype, target, layout, drawn), tolerance)
    for (dtype, target), layout in itertools.product(kinds, LAYOUTS):
        for given in ("both", "grad", "target") if target >= 0 else ():
            name = f"{targets[target]} {given} {layout} {dtype_name(dtype)}"
            yield Call(name, "q_sample_bwd", partial(backward, dtype, target, layout, given))
    for kind in STRIDES:
        yield Call(kind, "q_sample_fwd", partial(strided_arguments, kind))
    x, t, table = (
        torch.full((1, 1, 1, 1), 0.5),
        torch.tensor([0]),
        torch.tensor([0.7]),
    )  # one step, and one of everything
    yield Call("one of everything", "q_sample_fwd", lambda: (x, t, table, table, None, torch.tensor([3]), 1, 0))
    yield Call("one of everything", "q_sample_bwd", lambda: (x, x, t, table, table, 2, True, True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 19, 21), (2, 4, 8, 16), (2, 700)])
def check_draws_the_normals_of_the_cpu_kernel(kernels, shape, layout):
    """x_t = 0 * x0 + 1 * noise, against `philox_normal`."""
    x0, seeds = laid_out(randn(*shape, dtype=torch.float32), layout), torch.tensor([5, -(2**40)])
    drawn = kernels.q_sample_fwd(x0, timesteps(2), torch.zeros(STEPS), torch.ones(STEPS), None, seeds, 7, 0)
    expected = torch.ops.fastgen.philox_normal(seeds, shape, 7)
    for normals in drawn:
        torch.testing.assert_close(normals, expected, rtol=6e-7, atol=1e-9, check_stride=False)


@pytest.mark.parametrize("bad", [-1, STEPS, 2**40, -(2**62)])
def check_a_timestep_out_of_range_is_nan(kernels, bad):
    """Nothing is read past a table (an address so far off would fault), and no other sample is touched."""
    x0, t = randn(3, 4, 5, dtype=torch.float32), timesteps(3)
    t[1] = bad
    found = kernels.q_sample_fwd(x0, t, *tables(), x0, None, 0, 2)
    found += kernels.q_sample_bwd(x0, x0, t, *tables(), 2, True, True)
    for result in found:
        assert result[1].isnan().all() and result[0].isfinite().all() and result[2].isfinite().all()


def check_nothing(kernels):
    empty, seeds = torch.zeros(2, 0, 3), torch.zeros(2).long()
    for result in kernels.q_sample_fwd(empty, seeds, *tables(), None, seeds, 0, 2):
        assert result.shape == (2, 0, 3)
    assert kernels.q_sample_bwd(empty, None, seeds, *tables(), -1, True, False)[0].shape == (2, 0, 3)


def check_reasons(kernels):
    reasons = _dispatch.Triton.reasons
    x, byte, t = torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.uint8), torch.zeros(1).long()
    dtype = ["the kernels take float64, float32, bfloat16 and float16, not torch.uint8"]
    assert reasons("q_sample_fwd", x, t, x, x, None, t, 0, -1) == []
    assert reasons("q_sample_fwd", x, t, x, x, byte, None, 0, -1) == dtype
    assert reasons("q_sample_bwd", None, x, t, x, x, 2, True, True) == []
    assert reasons("q_sample_bwd", byte, None, t, x, x, 2, True, True) == dtype


def zeros(shape, dtype, layout, target, drawn, table_dtype) -> tuple[Any, ...]:
    x, t = laid_out(torch.zeros(shape, dtype=dtype), layout), torch.zeros(shape[0], dtype=torch.int64)
    table = (torch.zeros(1000, dtype=table_dtype),) * 2
    return (x, t, *table, *((None, t, 5) if drawn else (x, None, 0)), target)


def zeros_bwd(*args) -> tuple[Any, ...]:
    x, t, *table, _, _, _, target = zeros(*args)
    return (x, x if target >= 0 else None, t, *table, target, True, True)


def gates(arch: int) -> Iterator[Call]:
    def each(name, *args):
        for target in (-1, PREDICTION_TYPES.index("v_prediction")):
            for drawn in (True, False):
                yield Call(name, "q_sample_fwd", partial(zeros, *args[:3], target, drawn, args[3]))
            yield Call(name, "q_sample_bwd", partial(zeros_bwd, *args[:3], target, False, args[3]))

    for dtype, layout in itertools.product(DTYPES, LAYOUTS):
        wide = torch.promote_types(dtype, torch.float32)
        yield from each(f"noising {layout} {dtype_name(dtype)}", (2, 4, 64, 64), dtype, layout, wide)
    yield from each("one noising", (1, 1, 1, 1), torch.float32, "contiguous", torch.float32)
    yield from each("odd noising, fp64 table", (1, 3, 7, 5), torch.float32, "channels_last", torch.float64)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def gpu_values_and_noise(dtype, target, layout):
    shape = (3, 4, 33, 21)
    x0, noise = (laid_out(randn(*shape, seed=k), layout).to(dtype).cuda() for k in range(2))
    t, (alphas, sigmas) = timesteps(3).cuda(), (table.cuda() for table in tables())
    actual = results(q_sample, x0, t, alphas, sigmas, noise, target=target)
    beside = plain(x0, t, alphas, sigmas, noise, target)
    exact = plain(x0.double(), t, alphas, sigmas, noise.double(), target)
    for a, b, e in zip(actual, beside, exact, strict=True):
        assert list(a.stride()) == output_strides(x0)
        assert_bar(a, b, e, 1e-14 if dtype == torch.float64 else 2e-7)
    drawn = results(q_sample, x0, t, alphas, sigmas, seeds=[1, -2, 3], step=4, target=target)
    on_cpu = results(q_sample, x0.cpu(), t.cpu(), *tables(), seeds=[1, -2, 3], step=4, target=target)
    tolerance = {torch.float64: 1e-6, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for a, b in zip(drawn, on_cpu, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("target", TARGETS)
def gpu_gradcheck(target):
    x0, noise = (randn(2, 3, 2, 2, seed=k).cuda().requires_grad_() for k in range(2))
    t, (alphas, sigmas) = timesteps(2).cuda(), (table.cuda() for table in tables())
    assert torch.autograd.gradcheck(lambda a, b: q_sample(a, t, alphas, sigmas, b, return_target=target), (x0, noise))


@pytest.mark.parametrize("bad", [-1, STEPS, 2**40])
def gpu_a_timestep_out_of_range_is_nan_and_waits_for_nothing(bad):
    x0, t = randn(3, 4, 5).cuda(), timesteps(3)
    t[1] = bad
    t, (alphas, sigmas) = t.cuda(), (table.cuda() for table in tables())
    torch.cuda.set_sync_debug_mode("error")
    try:
        x_t = q_sample(x0, t, alphas, sigmas, x0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x_t[1].isnan().all() and x_t[::2].isfinite().all()
