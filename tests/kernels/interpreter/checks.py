"""Values of the Triton kernels against the reference in float64: run by the interpreter, and on a GPU by `tests/gpu`."""

import contextlib
import importlib
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from torch import Tensor

import fastgen  # noqa: F401  (makes fastgen.kernels importable)
from fastgen.reference import group_norm as gn_reference
from fastgen.reference import philox_normal as philox_reference
from fastgen.reference import sampler_step as step_reference
from fastgen.reference._layout import output_strides

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("there is no CUDA device, and TRITON_INTERPRET=1 is not set", allow_module_level=True)


def moved(value: Any, device: str) -> Any:
    """Tensors in ``value`` with all the memory around them, strides and offset on ``device``."""
    if isinstance(value, (tuple, list)):
        return type(value)(moved(v, device) for v in value)
    if not isinstance(value, Tensor) or value.device.type == device:
        return value
    storage = value.untyped_storage()  # through zeros: `guarded_outputs` has another idea of empty
    copy = torch.zeros(storage.nbytes(), dtype=torch.uint8, device=device)
    copy.copy_(torch.zeros(0, dtype=torch.uint8, device=value.device).set_(storage))
    whole = torch.zeros(0, dtype=value.dtype, device=device)
    return whole.set_(copy.untyped_storage(), value.storage_offset(), value.shape, value.stride())


def on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of CPU tensors, computed on the device under test."""
    return lambda *args: moved(function(*moved(args, DEVICE)), "cpu")


def written(sample: torch.Tensor, *inputs: Any) -> tuple[torch.Tensor, ...]:
    """What `sampler_step_out` writes into the sample itself, and into memory of two other layouts."""
    second = torch.zeros(*sample.shape[:-1], 2 * sample.shape[-1], device=sample.device)[..., ::2]
    third = torch.zeros_like(sample, memory_format=torch.contiguous_format)
    sample = sample.clone()
    modules["sampler_step"].sampler_step_out(sample, *inputs, sample, second, third)
    return sample, second, third


modules = {
    name: importlib.import_module(f"fastgen.kernels.{name}") for name in ("group_norm", "philox_normal", "sampler_step")
}
kernels = SimpleNamespace(
    group_norm=on_device(modules["group_norm"].group_norm),
    group_norm_fwd=on_device(modules["group_norm"].group_norm_fwd),
    group_norm_bwd=on_device(modules["group_norm"].group_norm_bwd),
    philox_normal=on_device(modules["philox_normal"].philox_normal),
    sampler_step_fwd=on_device(modules["sampler_step"].sampler_step_fwd),
    sampler_step_out=on_device(lambda *args: written(*args)),
)

# Largest error, relative to the largest value: a few roundings of the arithmetic, then one of the output.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SHAPES = [
    ((2, 8, 4, 4), 4),
    ((1, 6, 50, 70), 3),
    ((2, 24, 5), 2),
    ((1, 4, 2, 3, 5), 2),
    ((3, 16), 4),
    ((1, 130, 40, 33), 2),
]


def guarded(t: Tensor) -> Tensor:
    """The same values and strides inside a larger buffer of NaN: what reads past the ends reads NaN."""
    size = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1
    buffer = torch.full((size + 4096,), float("nan"), dtype=t.dtype)
    inside = torch.as_strided(buffer, t.shape, t.stride(), 2048)
    return inside.copy_(t)


def channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


@contextlib.contextmanager
def guarded_outputs():
    """Memory allocated inside lies between NaNs, is full of them, and the NaNs around it must survive."""
    allocated, plain = [], (torch.empty, torch.empty_strided)

    def empty_strided(size, stride, *, dtype=None, device=None):
        extent = sum((n - 1) * s for n, s in zip(size, stride, strict=True)) + 1 if math.prod(size) else 0
        buffer = torch.full((extent + 256,), float("nan"), dtype=dtype or torch.get_default_dtype(), device=device)
        allocated.append((buffer, extent))
        return torch.as_strided(buffer, size, stride, 128)

    def empty(size, *, dtype=None, device=None):
        like = plain[0](size, dtype=dtype, device="meta")
        return empty_strided(like.shape, like.stride(), dtype=dtype, device=device)

    with (
        mock.patch.object(torch, "empty", empty),
        mock.patch.object(torch, "empty_strided", empty_strided),
        mock.patch.object(
            torch, "empty_like", lambda t: empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
        ),
    ):
        yield
    assert allocated
    for buffer, extent in allocated:
        assert buffer[:128].isnan().all() and buffer[128 + extent :].isnan().all(), "a store went past the ends"


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, least: float = 1e-2) -> None:
    """``least``: what the error is at least relative to; 1, the size of the terms, for sums that cancel."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected).abs().max() / expected.abs().max().clamp_min(least)
    assert error <= TOLERANCE[dtype], f"{error:.2e}"


def group_norm_case(shape, dtype, layout, full):
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    x, grad = (2 * draw(*shape) + 3).to(dtype), draw(*shape).to(dtype)
    if layout == "channels_last" and len(shape) > 2:
        x = channels_last(x)
    n, c = shape[:2]
    params = [draw(c), draw(c), *([draw(n, c), draw(n, c), draw(n, c)] if full else [None] * 3)]
    low = dtype if dtype == torch.float64 else torch.float32
    return guarded(x), guarded(grad), [None if p is None else guarded(p.to(low)) for p in params]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_group_norm(shape, groups, dtype, layout):
    if dtype != torch.float32 and shape[1] == 130:
        pytest.skip("the large case in float32 only: the interpreter is slow")
    full = layout == "contiguous"
    x, grad, params = group_norm_case(shape, dtype, layout, full)
    wide = [None if p is None else p.double() for p in params]
    with guarded_outputs():
        forward = kernels.group_norm_fwd(x, groups, *params, 1e-5, int(full))
    expected = gn_reference.group_norm_fwd(x.double(), groups, *wide, 1e-5, int(full))
    with guarded_outputs():
        backward = kernels.group_norm_bwd(grad, x, *forward[1:], groups, *params, int(full))
    expected_bwd = gn_reference.group_norm_bwd(grad.double(), x.double(), *expected[1:], groups, *wide, int(full))
    close(forward[0], expected[0], dtype)
    for actual, wanted in zip(forward[1:], expected[1:], strict=True):
        close(actual, wanted, torch.float64 if dtype == torch.float64 else torch.float32)
    close(backward[0], expected_bwd[0], dtype)
    for actual, wanted in zip(backward[1:], expected_bwd[1:], strict=True):
        close(actual, wanted, torch.float64 if dtype == torch.float64 else torch.float32)
    assert forward[0].dtype == dtype and list(forward[0].stride()) == output_strides(x)
    assert list(backward[0].stride()) == output_strides(x)
    again = kernels.group_norm_fwd(x, groups, *params, 1e-5, int(full))
    again_bwd = kernels.group_norm_bwd(grad, x, *forward[1:], groups, *params, int(full))
    assert all(torch.equal(a, b) for a, b in zip((*forward, *backward), (*again, *again_bwd), strict=True))
    assert torch.equal(kernels.group_norm(x, groups, *params, 1e-5, int(full)), forward[0])


def strided(x: Tensor) -> dict[str, Tensor]:
    """``x`` [N, C, H, W] in memory that is neither contiguous nor channels-last."""
    n, c, h, w = x.shape
    transposed = x.transpose(2, 3).contiguous().transpose(2, 3)
    every_second = torch.full((n, c, h, 2 * w), float("nan"), dtype=x.dtype)
    every_second[..., ::2] = x
    expanded = x[:1, :, :, :1].expand(x.shape)
    channel_slice = torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, :c]
    return {"transposed": transposed, "sliced": every_second[..., ::2], "expanded": expanded, "channels": channel_slice}


@pytest.mark.parametrize("kind", ["transposed", "sliced", "expanded", "channels"])
def test_group_norm_strides(kind):
    """Input, gradient and parameters that are slices of something else."""
    x, grad, params = group_norm_case((2, 8, 5, 6), torch.float32, "contiguous", True)
    x, grad = strided(x)[kind], strided(grad)[kind]
    scale, shift = torch.cat([params[3], params[4]], 1).chunk(2, 1)
    params = [params[0].repeat_interleave(2)[::2], params[1], params[2].t().contiguous().t(), scale, shift]
    wide = [p.double() for p in params]
    forward = kernels.group_norm_fwd(x, 4, *params, 1e-5, 1)
    expected = gn_reference.group_norm_fwd(x.double(), 4, *wide, 1e-5, 1)
    backward = kernels.group_norm_bwd(grad, x, *forward[1:], 4, *params, 1)
    expected_bwd = gn_reference.group_norm_bwd(grad.double(), x.double(), *expected[1:], 4, *wide, 1)
    for actual, wanted in zip((*forward, *backward), (*expected, *expected_bwd), strict=True):
        close(actual, wanted, torch.float32)
    assert list(forward[0].stride()) == list(backward[0].stride()) == output_strides(x)


@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 6), 6), ((3, 4, 1, 1), 4), ((1, 1), 1), ((1, 5, 3), 5), ((70, 3), 1)]
)
def test_group_norm_tiny_groups(shape, groups):
    """One element a group: the output is the bias, the input has no gradient. And other small ones."""
    x, grad, params = group_norm_case(shape, torch.float32, "contiguous", True)
    wide = [p.double() for p in params]
    forward = kernels.group_norm_fwd(x, groups, *params, 1e-5, 1)
    expected = gn_reference.group_norm_fwd(x.double(), groups, *wide, 1e-5, 1)
    close(forward[0], expected[0], torch.float32)
    backward = kernels.group_norm_bwd(grad, x, *forward[1:], groups, *params, 1)
    expected_bwd = gn_reference.group_norm_bwd(grad.double(), x.double(), *expected[1:], groups, *wide, 1)
    for actual, wanted in zip(backward[1:], expected_bwd[1:], strict=True):
        close(actual, wanted, torch.float32, least=1.0)
    if math.prod(shape) == shape[0] * groups:
        assert not backward[0].any()


@pytest.mark.parametrize("shape", [(2, 4, 6, 5), (1, 4, 70, 90)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_group_norm_not_finite(value, shape):
    """A NaN or an infinity makes its whole group NaN, as in torch, and no other."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x[0, 1, 2, 3] = value
    y = kernels.group_norm_fwd(x, 2, None, None, None, None, None, 1e-5, 1)[0]
    assert y[0, :2].isnan().all() and y[0, 2:].isfinite().all() and y[1:].isfinite().all()


def test_group_norm_both_plans_agree():
    """The one-program path and the split path are two ways to one result."""
    x, grad, params = group_norm_case((2, 8, 9, 5), torch.float32, "contiguous", True)
    whole = kernels.group_norm_fwd(x, 4, *params, 1e-5, 1)
    whole += kernels.group_norm_bwd(grad, x, *whole[1:], 4, *params, 1)
    with mock.patch.object(importlib.import_module("fastgen.kernels._group_norm_plan"), "WHOLE_NUMBERS", 0):
        split = kernels.group_norm_fwd(x, 4, *params, 1e-5, 1)
        split += kernels.group_norm_bwd(grad, x, *split[1:], 4, *params, 1)
    for a, b in zip(whole, split, strict=True):
        torch.testing.assert_close(a, b, rtol=4e-6, atol=4e-6)
    assert any(not torch.equal(a, b) for a, b in zip(whole, split, strict=True)), "the same path was taken twice"


def test_group_norm_centred_variance():
    """Mean 1e4 and deviation 1: E[x^2] - E[x]^2 would lose every digit."""
    x = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(1)) + 1e4
    y, _, rstd = kernels.group_norm_fwd(x, 2, None, None, None, None, None, 1e-5, 0)
    expected = gn_reference.group_norm_fwd(x.double(), 2, None, None, None, None, None, 1e-5, 0)
    assert (rstd.double() / expected[2] - 1).abs().max() < 1e-5
    assert (y.double() - expected[0]).abs().max() < 5e-3  # an ulp of 1e4 is 1e-3


def test_group_norm_nothing():
    y, mean, _ = kernels.group_norm_fwd(torch.zeros(2, 4, 0), 2, None, None, None, None, None, 1e-5, 0)
    assert y.shape == (2, 4, 0) and mean.isnan().all()
    y, mean, _ = kernels.group_norm_fwd(torch.zeros(0, 4, 3), 2, None, None, None, None, None, 1e-5, 0)
    assert y.shape == (0, 4, 3) and mean.shape == (0, 2)
    for shape in ((2, 4, 0), (0, 4, 3)):
        x, statistics = torch.zeros(shape), torch.zeros(shape[0], 2)
        grads = kernels.group_norm_bwd(x, x, statistics, statistics, 2, *[None] * 5, 0)
        assert [g.shape for g in grads] == [shape, (4,), (4,), *[(shape[0], 4)] * 3]
        assert not any(g.any() for g in grads)


@pytest.mark.parametrize(
    ("seeds", "shape", "step"),
    [([1, -5, 2**40 + 3], (3, 1000), 3), ([7], (1, 3, 5, 7), -1), ([7, 9], (2, 1), 2**32 - 1), ([3], (1, 2049), 0)],
)
def test_philox_normal(seeds, shape, step):
    seeds = torch.tensor(seeds)
    actual, expected = (f(seeds, shape, step) for f in (kernels.philox_normal, philox_reference.philox_normal))
    error = (actual.double() - expected.double()).abs() / expected.double().abs().clamp_min(1e-3)
    assert error.max() <= 5e-7
    assert torch.equal(torch.ops.fastgen.philox_normal(seeds, shape, step)[0, :1].sign(), actual[0, :1].sign())


def test_philox_normal_equals_the_cpu_kernel():
    seeds = torch.arange(4)
    cpu = torch.ops.fastgen.philox_normal(seeds, (4, 3, 33), 5)
    torch.testing.assert_close(kernels.philox_normal(seeds, (4, 3, 33), 5), cpu, rtol=6e-7, atol=1e-9)


@pytest.mark.parametrize("shape", [(2, 3, 19, 21), (2, 4, 8, 16), (3, 7), (2,)])
def test_normals_do_not_depend_on_the_kernel(shape):
    """x = 0 + 1 * noise: the normals drawn inside a step, in either layout, have the bits of `philox_normal`."""
    table = torch.zeros(4, 19)
    table[:, 3] = 1
    seeds = torch.arange(shape[0]) - 1
    expected = kernels.philox_normal(seeds, shape, 3)
    for sample in (torch.zeros(shape), channels_last(torch.zeros(shape)) if len(shape) > 2 else torch.zeros(shape)):
        arguments = (sample, table, 3, None, [], None, seeds, *[None] * 5, False, False)
        with guarded_outputs():
            drawn = kernels.sampler_step_fwd(sample, *arguments)[0]
        assert torch.equal(drawn, expected)


def test_sampler_step_nothing():
    empty, table = torch.zeros(2, 0, 3), torch.zeros(1, 19)
    arguments = (empty, table, 0, None, [], None, torch.zeros(2).long(), *[None] * 5, True, True)
    outputs = kernels.sampler_step_fwd(empty, *arguments)
    assert all(output.shape == (2, 0, 3) for output in outputs)
    assert kernels.philox_normal(torch.zeros(0).long(), (0, 5), 1).shape == (0, 5)


@pytest.mark.parametrize("kind", ["transposed", "sliced", "expanded", "channels"])
def test_sampler_step_strides(kind):
    generator = torch.Generator().manual_seed(3)
    sample, model, mask = (torch.randn(2, 4, 5, 6, generator=generator) for _ in range(3))
    table = torch.randn(2, 46, generator=generator)[:, ::2]
    table[:, 6], table[:, 7] = -2.0, float("inf")
    arguments = (model, table, 1, None, [mask], None, torch.tensor([5, 6]), None, mask, model, None, None, True, True)
    actual = kernels.sampler_step_fwd(strided(sample)[kind], *arguments)
    expected = step_reference.sampler_step_fwd(strided(sample)[kind].double(), *arguments)
    for a, e in zip(actual, expected, strict=True):
        close(a, e, torch.float32)
    assert list(actual[0].stride()) == output_strides(strided(sample)[kind])


STEP_CASES = {
    "plain": {},
    "guided, noise": {"uncond": 1, "noise": 1},
    "history, seeds, variance, outputs": {
        "uncond": 1,
        "history": 4,
        "seeds": 1,
        "variance": 1,
        "second": 1,
        "third": 1,
    },
    "threshold": {"threshold": 1, "third": 1},
    "inpainting": {"seeds": 1, "mask": 1, "known": 1, "known_noise": 1, "second": 1},
    "inpainting without noise": {"mask": 1, "known": 1},
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", STEP_CASES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 3, 19, 21), (3, 4, 10, 11)])
def test_sampler_step(case, dtype, layout, shape):
    options = STEP_CASES[case]
    generator = torch.Generator().manual_seed(2)

    def draw(like=torch.float32):
        return guarded(torch.randn(shape, generator=generator).to(like))

    sample = draw(dtype)
    if layout == "channels_last":
        sample = guarded(channels_last(sample))
    table = torch.randn(5, 27, generator=generator, dtype=torch.float64)
    table[:, 6], table[:, 7] = -1.0, 1.0
    optional = {
        name: draw() if options.get(name) else None
        for name in ("uncond", "noise", "variance", "mask", "known", "known_noise")
    }
    history = [draw(torch.float16) for _ in range(options.get("history", 0))]
    arguments = (
        draw(), table, 3, optional["uncond"], history, optional["noise"],
        torch.arange(5, 5 + shape[0]) if options.get("seeds") else None, optional["variance"], optional["mask"],
        optional["known"], optional["known_noise"],
        torch.linspace(0.5, 2, shape[0]) if options.get("threshold") else None,
        bool(options.get("second")), bool(options.get("third")),
    )  # fmt: skip
    with guarded_outputs():
        actual = kernels.sampler_step_fwd(sample, *arguments)
    expected = step_reference.sampler_step_fwd(sample.double(), *arguments)
    again = kernels.sampler_step_fwd(sample, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))
    # normals are made in float32, so even a float64 sample carries their rounding
    tolerance = torch.float32 if dtype == torch.float64 and options.get("seeds") else dtype
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        if e.numel():
            close(a, e, tolerance)
            assert list(a.stride()) == output_strides(sample)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sampler_step_out(layout):
    """Into the sample itself, and into memory of other strides."""
    generator = torch.Generator().manual_seed(4)
    sample, model = (torch.randn(2, 4, 9, 7, generator=generator) for _ in range(2))
    sample = channels_last(sample) if layout == "channels_last" else sample
    table = torch.randn(2, 21, generator=generator)
    table[:, 6], table[:, 7] = -1.0, 1.0
    inputs = (model, table, 1, None, [model], None, torch.tensor([5, 6]), *[None] * 5)
    expected = kernels.sampler_step_fwd(sample, *inputs, True, True)
    assert all(torch.equal(a, e) for a, e in zip(kernels.sampler_step_out(sample, *inputs), expected, strict=True))


def test_reasons_are_sentences():
    x, byte = torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.uint8)

    def step(model, history):
        arguments = (x, model, x, 0, None, history, *[None] * 7, False, False)
        return modules["sampler_step"].reasons("sampler_step_fwd", *arguments)

    assert step(x, [x] * 9) == ["the kernel takes at most 8 history tensors, got 9"]
    assert step(x, [x] * 8) == []
    dtype = ["the kernels take float64, float32, bfloat16 and float16, not torch.uint8"]
    assert step(byte, []) == dtype
    assert modules["group_norm"].reasons("group_norm", x, 1, byte, None, None, None, None, 1e-5, 0) == dtype
    assert modules["group_norm"].reasons("group_norm_bwd", x, x, x, x, 1, None, None, None, None, None, 0) == []
    seeds = torch.zeros(1).long()
    assert modules["philox_normal"].reasons("philox_normal", seeds, (2**31, 2), 0)
    assert modules["philox_normal"].reasons("philox_normal", seeds, (70000, 2), 0) == []
    assert modules["philox_normal"].reasons("philox_normal", x, (1, 2), 0) == ["seeds must be int64, got torch.float32"]
