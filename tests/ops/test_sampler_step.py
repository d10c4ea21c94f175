"""`sampler_step`: every input, layout and dtype against the reference in float64; gradients; errors."""

import math

import pytest
import torch
from torch import Tensor

from fastgen.ops import COLUMNS, philox_normal, sampler_step
from fastgen.reference import sampler_step as reference
from fastgen.reference._layout import output_strides

from .numerics import DTYPES, HALF_ULP, LAYOUTS, guarded, laid_out, randn

SHAPE = (3, 3, 19, 23)
CASES = {
    "least": {},
    "guidance": {"uncond": 1},
    "noise": {"noise": 1},
    "seeds": {"seeds": 1},
    "learned variance": {"noise": 1, "variance": 1},
    "learned variance, seeds": {"seeds": 1, "variance": 1, "return_prediction": True},
    "history of one": {"history": 1},
    "history of three": {"history": 3, "uncond": 1, "return_prediction": True},
    "inpainting": {"mask": 1, "known": 1},
    "noised inpainting": {"mask": 1, "known": 1, "known_noise": 1, "seeds": 1},
    "everything": {
        "uncond": 1,
        "history": 4,
        "seeds": 1,
        "variance": 1,
        "mask": 1,
        "known": 1,
        "known_noise": 1,
        "return_prediction": True,
    },
}


def make_table(history: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    table = randn(5, len(COLUMNS) + history, seed=42)
    table[:, COLUMNS.index("clip_min")], table[:, COLUMNS.index("clip_max")] = -1.0, 1.0
    return table.to(dtype)


def arguments(case: str, dtype: torch.dtype, others: torch.dtype, layout: str) -> tuple[Tensor, Tensor, dict]:
    options = CASES[case]
    sample = guarded(laid_out(randn(*SHAPE, seed=1).to(dtype), layout))
    kwargs: dict = {"return_prediction": options.get("return_prediction", False)}
    for i, name in enumerate(("uncond", "noise", "variance", "mask", "known", "known_noise")):
        if options.get(name):
            kwargs[name] = guarded(randn(*SHAPE, seed=i + 2).to(others))
    if options.get("history"):
        kwargs["history"] = [
            guarded(laid_out(randn(*SHAPE, seed=20 + k), layout).to(others)) for k in range(options["history"])
        ]
    if options.get("seeds"):
        kwargs["seeds"] = torch.tensor([9, -4, 2**50])
    return sample, guarded(randn(*SHAPE, seed=9).to(others)), kwargs


def exactly(sample: Tensor, model: Tensor, table: Tensor, step: int, **kwargs) -> tuple[Tensor, Tensor]:
    names = ("noise", "seeds", "variance", "mask", "known", "known_noise")
    rest = [kwargs.get(name) for name in names]
    return reference.sampler_step_fwd(
        sample.double(), model, table, step, kwargs.get("uncond"), kwargs.get("history", []), *rest,
        kwargs.get("return_prediction", False),
    )  # fmt: skip


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_values(case, dtype, layout):
    for others in {dtype, torch.float32, torch.bfloat16}:
        sample, model, kwargs = arguments(case, dtype, others, layout)
        table = make_table()
        results = sampler_step(sample, model, table, 3, **kwargs)
        exact = exactly(sample, model, table, 3, **kwargs)
        results = results if isinstance(results, tuple) else (results,)
        for actual, wanted in zip(results, exact, strict=False):
            # one rounding of the output and, on the way there, some of the arithmetic; normals are made in float32
            arithmetic = 2.0**-21 if dtype != torch.float64 or "seeds" in kwargs else 2.0**-50
            error = (actual.double() - wanted).abs().max() / wanted.abs().max()
            assert error <= HALF_ULP[dtype] + arithmetic, f"{others}: {error:.2e}"
            assert actual.dtype == dtype and list(actual.stride()) == output_strides(sample)


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 3, 5, 7), (4, 1), (1, 1500, 2, 3), (2, 4, 70, 33), (3, 2, 9)])
def test_seeds_are_the_noise_of_philox_normal(shape, layout):
    sample, seeds, table = laid_out(randn(*shape, dtype=torch.float32), layout), torch.arange(shape[0]), make_table()
    drawn = sampler_step(sample, sample, table, 2, seeds=seeds)
    given = sampler_step(sample, sample, table, 2, noise=laid_out(philox_normal(seeds, shape, 2), layout))
    assert torch.equal(drawn, given)
    one = sampler_step(sample[1:2], sample[1:2], table, 2, seeds=seeds[1:2]) if shape[0] > 1 else drawn
    assert torch.equal(one, drawn[1:2] if shape[0] > 1 else drawn)


@pytest.mark.isa
def test_bits_do_not_depend_on_threads():
    sample, before, results = randn(4, 3, 64, 64, dtype=torch.float32), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(sampler_step(sample, sample * 2, make_table(), 1, seeds=[1, 2, 3, 4], uncond=sample))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_clip_and_nan(dtype):
    table = torch.zeros(1, len(COLUMNS), dtype=dtype)
    row = {"prediction": 1.0, "prediction_model": 1.0, "clip_min": -0.5, "clip_max": 0.25}
    for name, value in row.items():
        table[0, COLUMNS.index(name)] = value
    model = torch.tensor([[-3.0, -0.5, 0.1, 0.25, 7.0, 1e30, -1e30, math.nan]])
    out = sampler_step(torch.zeros_like(model), model, table, 0)
    assert out[0, :7].tolist() == pytest.approx([-0.5, -0.5, 0.1, 0.25, 0.25, 0.25, -0.5]) and out[0, 7].isnan()


def test_strided_operands_and_broadcast_masks():
    big, table = randn(2, 8, 6, 10, dtype=torch.float32), make_table()
    sample, model, uncond = big[:, :3, :, ::2], big[:, 3:6, :, 1::2], big[:, 5:8, :, ::2]
    mask, known = torch.rand(1, 1, 6, 5), torch.rand(2, 1, 1, 1)
    out = sampler_step(sample, model, table, 0, uncond=uncond, mask=mask, known=known)
    whole = {"mask": mask.expand_as(sample), "known": known.expand_as(sample)}
    exact = exactly(sample, model, table, 0, uncond=uncond, **whole)[0]
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def test_table_in_float32_and_as_a_view():
    sample, table = randn(2, 3, 4, dtype=torch.float32), make_table()
    expected = sampler_step(sample, sample, table, 1)
    torch.testing.assert_close(sampler_step(sample, sample, table.float(), 1), expected, rtol=1e-5, atol=1e-6)
    view = torch.stack([table, table], dim=-1)[..., 0]
    assert torch.equal(sampler_step(sample, sample, view, 1), expected)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing(shape):
    x = torch.zeros(shape)
    out, second = sampler_step(x, x, make_table(), 0, seeds=torch.arange(shape[0]), return_prediction=True)
    assert out.shape == shape and second.shape == shape


def differentiable(sample, model, uncond, noise, variance, mask, known, known_noise, h0, h1):
    table = make_table()
    table[:, COLUMNS.index("clip_min")], table[:, COLUMNS.index("clip_max")] = -9.0, 9.0
    return sampler_step(
        sample, model, table, 2, uncond=uncond, history=[h0, h1], noise=noise, variance=variance, mask=mask, known=known,
        known_noise=known_noise, return_prediction=True,
    )  # fmt: skip


def test_gradcheck_and_gradgradcheck():
    tensors = [randn(2, 3, 2, seed=k).requires_grad_() for k in range(10)]
    assert torch.autograd.gradcheck(differentiable, tensors)
    assert torch.autograd.gradgradcheck(differentiable, tensors)


def test_gradient_through_the_clip_and_seeds():
    x, table = randn(2, 3, 4, seed=1).requires_grad_(), make_table()
    assert torch.autograd.gradcheck(lambda t: sampler_step(t, 3 * t, table, 1, seeds=[1, 2]), (x,))
    assert torch.autograd.gradcheck(lambda t: torch.cat([sampler_step(t, t, table, 1), t], 1)[:, 1:5], (x,))
    expected = torch.autograd.grad(sampler_step(x, 3 * x, table, 1).sum(), x)[0]
    torch.testing.assert_close(torch.func.grad(lambda t: sampler_step(t, 3 * t, table, 1).sum())(x.detach()), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_and_strides(layout):
    x = laid_out(randn(2, 3, 4, 5, dtype=torch.float32), layout)
    rest = (None, [x], None, torch.tensor([1, 2]), None, None, None, None)
    for second in (True, False):
        call = (x, x, make_table(), 1, *rest, second)
        torch.library.opcheck(torch.ops.fastgen.sampler_step_fwd.default, call)
        real = torch.ops.fastgen.sampler_step_fwd(*call)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            lift = mode.from_tensor
            fake = torch.ops.fastgen.sampler_step_fwd(lift(x), lift(x), lift(make_table()), 1, *rest, second)
        assert [(t.shape, t.stride()) for t in real] == [(t.shape, t.stride()) for t in fake]


@pytest.mark.parametrize(
    ("error", "message", "kwargs"),
    [
        (
            ValueError,
            r"uncond must have the shape of sample \(2, 3\), got shape \(2, 4\)",
            {"uncond": torch.zeros(2, 4)},
        ),
        (ValueError, r"history\[1\] must have the shape", {"history": [torch.zeros(2, 3), torch.zeros(3)]}),
        (ValueError, "noise or seeds, not both", {"noise": torch.zeros(2, 3), "seeds": [1, 2]}),
        (ValueError, "seeds must be one per sample, got 3", {"seeds": [1, 2, 3]}),
        (ValueError, "variance scales the noise", {"variance": torch.zeros(2, 3)}),
        (ValueError, "mask and known come together", {"mask": torch.zeros(2, 3)}),
        (ValueError, "known_noise comes with mask", {"known_noise": torch.zeros(2, 3)}),
        (ValueError, "mask must broadcast", {"mask": torch.zeros(5), "known": torch.zeros(2, 3)}),
        (TypeError, "noise must be a floating-point tensor, got torch.int64", {"noise": torch.zeros(2, 3).long()}),
        (TypeError, "seeds must be integers", {"seeds": ["a", "b"]}),
    ],
)
def test_errors(error, message, kwargs):
    with pytest.raises(error, match=message):
        sampler_step(torch.zeros(2, 3), torch.zeros(2, 3), make_table(), 0, **kwargs)


def test_errors_of_sample_table_and_step():
    x, table = torch.zeros(2, 3), make_table(0)
    with pytest.raises(IndexError, match=r"step must be in \[0, 5\), got 5"):
        sampler_step(x, x, table, 5)
    with pytest.raises(IndexError, match="got -1"):
        sampler_step(x, x, table, -1)
    with pytest.raises(ValueError, match=r"table must be \[steps, >= 16 \+ 1 of the history\]"):
        sampler_step(x, x, table, 0, history=[x])
    with pytest.raises(TypeError, match="table must be"):
        sampler_step(x, x, table.half(), 0)
    with pytest.raises(TypeError, match=r"sample must be a floating-point tensor, got torch\.int64"):
        sampler_step(x.long(), x, table, 0)
    with pytest.raises(ValueError, match="on the device of sample"):
        sampler_step(x, x.to("meta"), table, 0)
