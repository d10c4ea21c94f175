"""`q_sample`: values for every target, dtype and layout, noise from seeds, timesteps, gradients, memory, errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgen._schema import PREDICTION_TYPES
from fastgen.ops import philox_normal, q_sample
from fastgen.reference._layout import output_strides

from ..backends import requires_cpu
from .numerics import (
    DTYPES,
    PLACES,
    assert_any_threads,
    assert_bar,
    assert_fake,
    assert_registered,
    place,
    poison_allocator,
    randn,
)
from .q_sample_cases import STEPS, TARGETS, make, plain, results, tables, timesteps

SHAPE = (3, 4, 5, 7)


def check(x0: Tensor, noise: Tensor, target: str | None, table_dtype: torch.dtype = torch.float64) -> None:
    t, (alphas, sigmas) = timesteps(x0.shape[0]), tables(table_dtype)
    poison_allocator(x0.numel() * x0.element_size())
    actual = results(q_sample, x0, t, alphas, sigmas, noise, target=target)
    beside = plain(x0, t, alphas, sigmas, noise, target)
    exact = plain(x0.double(), t, alphas.double(), sigmas.double(), noise.double(), target)
    # nothing is more exact than float64 to compare it with; a float32 sum may be lucky in plain torch
    slack = {torch.float64: 1e-14, torch.float32: 1.2e-7}.get(x0.dtype, 2e-7)
    for a, b, e in zip(actual, beside, exact, strict=True):
        assert a.dtype == x0.dtype and list(a.stride()) == output_strides(x0)
        assert_bar(a, b, e, slack)
    again = results(q_sample, x0, t, alphas, sigmas, noise, target=target)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


@pytest.mark.isa
@pytest.mark.parametrize("layout", PLACES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(dtype, table_dtype, target, layout):
    check(*make(SHAPE, [dtype], [layout]), target, table_dtype)


@pytest.mark.isa
@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES if a != b])
@pytest.mark.parametrize("target", TARGETS)
def test_mixed_dtypes_and_layouts(dtypes, target):
    for layouts in (("contiguous", "channels_last"), ("channels_last", "strided"), ("strided", "contiguous")):
        check(*make(SHAPE, dtypes, layouts), target)


@pytest.mark.isa
@pytest.mark.parametrize("layout", PLACES)
@pytest.mark.parametrize("shape", [(3,), (1, 1), (2, 17), (5, 3, 9), (2, 3, 2, 3, 4), (1, 4, 65, 33), (2, 4099)])
def test_shapes(shape, layout):
    for dtype in (torch.float32, torch.bfloat16):
        check(*make(shape, [dtype], [layout]), "v_prediction")


@pytest.mark.isa
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=5).map(tuple),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    layouts=st.tuples(st.sampled_from(PLACES), st.sampled_from(PLACES)),
    target=st.sampled_from(TARGETS),
)
def test_anything(shape, dtypes, layouts, target):
    check(*make(shape, dtypes, layouts), target)


@pytest.mark.isa
@pytest.mark.parametrize("layout", PLACES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", [SHAPE, (2, 6, 33, 31), (4, 13), (1, 2, 5), (2,), (2, 2050)])
def test_seeds_are_philox_normal_bit_for_bit(shape, target, layout):
    x0, _ = make(shape, [torch.float32], [layout])
    t, seeds = timesteps(shape[0]), [2**63 + 7, -3, 0, 2**33][: shape[0]]
    for step in (0, 3, -1, 2**32 - 1):
        noise = philox_normal(seeds, shape, step)
        drawn = results(q_sample, x0, t, *tables(), seeds=seeds, step=step, target=target)
        for given_noise in (noise, place(noise, layout)):
            beside = results(q_sample, x0, t, *tables(), given_noise, target=target)
            assert all(torch.equal(a, b) for a, b in zip(drawn, beside, strict=True))


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_seeds_with_every_dtype(dtype):
    for layout in PLACES:
        x0, _ = make(SHAPE, [dtype], [layout])
        t, seeds = timesteps(3), torch.tensor([5, -6, 7])
        drawn = results(q_sample, x0, t, *tables(), seeds=seeds, step=2, target="flow_prediction")
        noise = philox_normal(seeds, SHAPE, 2)
        exact = plain(x0.double(), t, *tables(), noise.double(), "flow_prediction")
        beside = plain(x0, t, *tables(), noise, "flow_prediction")
        for a, b, e in zip(drawn, beside, exact, strict=True):
            assert_bar(a, b, e, 2e-7)


@pytest.mark.isa
def test_samples_do_not_depend_on_their_batch():
    x0, t, seeds = randn(4, 3, 9, 11).float(), timesteps(4), torch.tensor([11, -(2**40), -5, 7])
    whole = results(q_sample, x0, t, *tables(), seeds=seeds, target="v_prediction")
    for n in range(4):
        own = slice(n, n + 1)
        one = results(q_sample, x0[own], t[own], *tables(), seeds=seeds[own], target="v_prediction")
        assert all(torch.equal(a[0], b[n]) for a, b in zip(one, whole, strict=True))


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("target", "ignored"), [("epsilon", "x0"), ("sample", "noise")])
def test_a_target_takes_nothing_of_what_it_does_not_name(target, ignored, dtype):
    x0, noise = make(SHAPE, [dtype], ["contiguous"])
    (x0 if ignored == "x0" else noise)[1, 2, 3] = math.nan
    x_t, second = q_sample(x0, timesteps(3), *tables(), noise, return_target=target)
    assert x_t[1, 2, 3].isnan().all() and x_t.isnan().sum() == SHAPE[-1]
    assert torch.equal(second, noise if target == "epsilon" else x0)


@pytest.mark.isa
@pytest.mark.parametrize("bad", [-1, STEPS, 2**40, -(2**63)])
def test_a_timestep_out_of_range_raises(bad):
    x0, noise = make(SHAPE, [torch.float32], ["contiguous"])
    t = timesteps(3)
    t[1] = bad
    message = rf"q_sample: t must be in \[0, {STEPS}\), got t\[1\] = {bad}"
    with pytest.raises(RuntimeError, match=message):
        q_sample(x0, t, *tables(), noise)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastgen.q_sample_bwd(x0, None, t, *tables(), -1, True, True)


@pytest.mark.isa
def test_strided_timesteps_tables_and_seeds():
    x0, noise = make(SHAPE, [torch.float32], ["contiguous"])
    t, (alphas, sigmas), seeds = timesteps(3), tables(), torch.tensor([3, 4, 5])

    def every_second(v):
        return torch.stack([v, torch.full_like(v, 10**6)], 1)[:, 0]

    strided = every_second(t), every_second(alphas), every_second(sigmas)
    assert torch.equal(q_sample(x0, *strided, noise), q_sample(x0, t, alphas, sigmas, noise))
    drawn = q_sample(x0, *strided, seeds=every_second(seeds))
    assert torch.equal(drawn, q_sample(x0, t, alphas, sigmas, seeds=seeds))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", [(0,), (0, 3, 4, 4), (2, 3, 0, 4), (2, 0), (0, 0)])
def test_nothing(shape, target):
    x0, t = torch.zeros(shape), timesteps(shape[0])
    for options in ({"noise": torch.zeros(shape)}, {"seeds": torch.zeros(shape[0]).long()}):
        assert all(r.shape == shape for r in results(q_sample, x0, t, *tables(), target=target, **options))
    leaf = x0.clone().requires_grad_()
    sum(r.sum() for r in results(q_sample, leaf, t, *tables(), x0, target=target)).backward()
    assert leaf.grad.shape == shape


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("layout", PLACES)
def test_bits_do_not_depend_on_threads(layout):
    x0, noise = make((3, 4, 100, 101), [torch.float32], [layout])
    t = timesteps(3)
    assert_any_threads(
        lambda: [
            *q_sample(x0, t, *tables(), noise, return_target="v_prediction"),
            *q_sample(x0, t, *tables(), seeds=[1, 2, 3], return_target="v_prediction"),
            *torch.ops.fastgen.q_sample_bwd(x0, noise, t, *tables(), 2, True, True),
        ]
    )


def both(x0: Tensor, noise: Tensor, target: str | None, **options) -> Tensor | tuple[Tensor, ...]:
    return q_sample(x0, timesteps(x0.shape[0]), *tables(), noise, return_target=target, **options)


@pytest.mark.isa
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("target", TARGETS)
def test_gradcheck(target, layout):
    x0, noise = (v.clone().requires_grad_() for v in make((2, 2, 1, 2), [torch.float64], [layout]))
    function = lambda a, b: both(a, b, target)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x0, noise))
    assert torch.autograd.gradgradcheck(function, (x0, noise))
    assert torch.autograd.gradcheck(lambda a: both(a, noise.detach(), target), (x0,))
    assert torch.autograd.gradcheck(lambda b: both(x0.detach(), b, target), (noise,))
    seeded = lambda a: q_sample(a, timesteps(2), *tables(), seeds=[1, 2], return_target=target)  # noqa: E731
    assert torch.autograd.gradcheck(seeded, (x0,))


@pytest.mark.parametrize("target", ["epsilon", "sample", "v_prediction", "flow_prediction"])
def test_gradcheck_through_other_strides(target):
    """Gradients that arrive expanded, sliced or in another layout than the input, and one of two outputs alone."""
    x0, noise = (v.clone().requires_grad_() for v in make((2, 3, 2, 2), [torch.float64], ["contiguous"]))
    last = lambda v: v.contiguous(memory_format=torch.channels_last)  # noqa: E731
    for function in (
        lambda a, b: torch.cat([*both(a, b, target), a], 1)[:, 1:8],
        lambda a, b: torch.cat(both(last(a), b, target), 1).sum((2, 3)),
        lambda a, b: [v.sum() for v in both(a, last(b), target)],
        lambda a, b: last(both(a, b, target)[0]) * both(a, b, target)[1].transpose(2, 3),
        lambda a, b: both(a, b, target)[0],
        lambda a, b: both(a, b, target)[1],
        lambda a, b: both(a[:, :1].expand(-1, 3, -1, -1), b[:1].expand(2, -1, -1, -1), target),
    ):
        assert torch.autograd.gradcheck(function, (x0, noise))


@pytest.mark.isa
@pytest.mark.parametrize("noise_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_dtype_of_their_tensor(dtype, noise_dtype):
    x0, noise = (v.clone().requires_grad_() for v in make(SHAPE, [dtype, noise_dtype], ["contiguous"]))
    sum((r.double() * (k + 1)).sum() for k, r in enumerate(both(x0, noise, "v_prediction"))).backward()
    assert x0.grad.dtype == dtype and noise.grad.dtype == noise_dtype
    alpha, sigma = (table[timesteps(3)].reshape(3, 1, 1, 1).expand(SHAPE) for table in tables())
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(
        min(dtype, noise_dtype, key=lambda d: -torch.finfo(d).eps), 1e-6
    )
    torch.testing.assert_close(x0.grad.double(), alpha - 2 * sigma, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(noise.grad.double(), sigma + 2 * alpha, rtol=tolerance, atol=tolerance)


def test_no_gradient_is_made_where_none_is_asked():
    x0, noise = make(SHAPE, [torch.float32], ["contiguous"])
    x0.requires_grad_()
    assert both(x0, noise, None).requires_grad
    with torch.no_grad():
        assert not both(x0, noise, None).requires_grad


@pytest.mark.parametrize("target", range(-1, len(PREDICTION_TYPES)))
@pytest.mark.parametrize("layout", PLACES)
def test_fakes(layout, target):
    """And opcheck for one target: what it asks does not hang on that."""
    x0, noise = make(SHAPE, [torch.float32, torch.bfloat16], [layout])
    t, seeds = timesteps(3), torch.tensor([1, 2, 3])
    forward, backward = torch.ops.fastgen.q_sample_fwd, torch.ops.fastgen.q_sample_bwd
    calls = [
        (forward, (x0, t, *tables(), noise, None, 0, target)),
        (forward, (x0, t, *tables(), None, seeds, 4, target)),
        (backward, (x0, None, t, *tables(), target, True, False)),
        (backward, (None if target >= 0 else x0, noise if target >= 0 else None, t, *tables(), target, True, True)),
    ]
    for op, arguments in calls:
        (assert_registered if target == 2 else assert_fake)(op.default, arguments)


def test_under_the_compiler():
    x0, noise = (v.clone().requires_grad_() for v in make(SHAPE, [torch.float32], ["contiguous"]))
    t, (alphas, sigmas) = timesteps(3), tables()

    def function(a, b):
        return q_sample(a, t, alphas, sigmas, b, return_target="v_prediction")

    compiled, eager = torch.compile(function, backend="aot_eager", fullgraph=True), function(x0, noise)
    outputs = compiled(x0, noise)
    assert all(torch.equal(a, b) for a, b in zip(outputs, eager, strict=True))
    weights = randn(*SHAPE, seed=8).float()
    wanted = torch.autograd.grad(eager[0].mul(weights).sum() + eager[1].sum(), (x0, noise))
    found = torch.autograd.grad(outputs[0].mul(weights).sum() + outputs[1].sum(), (x0, noise))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


X = (2, 3)


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (TypeError, "x0 must be a floating-point tensor, got torch.int64", {"x0": torch.zeros(X).long()}),
        (TypeError, "x0 must be a floating-point tensor, got list", {"x0": [1.0]}),
        (ValueError, r"x0 must be \[N, \*\], got a scalar", {"x0": torch.tensor(1.0)}),
        (TypeError, "t must be an int64 tensor, got torch.int32", {"t": torch.zeros(2, dtype=torch.int32)}),
        (TypeError, "t must be an int64 tensor, got int", {"t": 3}),
        (ValueError, r"t must be one per sample \(2\), got shape \(3,\)", {"t": torch.zeros(3).long()}),
        (ValueError, "t must be one per sample", {"t": torch.zeros(2, 1).long()}),
        (ValueError, r"t must be on the device of x0 \(cpu\), got meta", {"t": torch.zeros(2, device="meta").long()}),
        (TypeError, "alphas must be a float32 or float64 tensor, got torch.float16", {"alphas": torch.ones(4).half()}),
        (ValueError, r"alphas must be \[T\] with T >= 1, got shape \(0,\)", {"alphas": torch.ones(0)}),
        (ValueError, r"alphas must be \[T\] with T >= 1, got shape \(4, 1\)", {"alphas": torch.ones(4, 1)}),
        (ValueError, "alphas must be on the device", {"alphas": torch.ones(4, device="meta")}),
        (ValueError, r"sigmas must be \[T\] with T = 4, the length of alphas, got", {"sigmas": torch.ones(3)}),
        (TypeError, "sigmas must be a float32 or float64 tensor, got list", {"sigmas": [1.0] * 4}),
        (ValueError, "give either noise or seeds", {"noise": None}),
        (ValueError, "give either noise or seeds", {"seeds": [1, 2]}),
        (ValueError, r"noise must have the shape of x0 \(2, 3\), got shape \(3,\)", {"noise": torch.zeros(3)}),
        (TypeError, "noise must be a floating-point tensor, got torch.int64", {"noise": torch.zeros(X).long()}),
        (ValueError, "seeds must be one per sample, got 3", {"noise": None, "seeds": [1, 2, 3]}),
        (TypeError, "seeds must be integers", {"noise": None, "seeds": [1, 2.5]}),
        (ValueError, r"step must be in \[-2\^31, 2\^32\), got 4294967296", {"noise": None, "seeds": [1, 2], "step": 2**32}),
        (ValueError, r"return_target must be one of \('epsilon', .*got 'eps'", {"return_target": "eps"}),
    ],
)  # fmt: skip
def test_errors(error, message, changes):
    arguments = {"x0": torch.zeros(X), "t": torch.zeros(2).long(), "alphas": torch.ones(4), "sigmas": torch.ones(4)}
    with pytest.raises(error, match=f"q_sample: {message}"):
        q_sample(**{**arguments, "noise": torch.zeros(X), **changes})
