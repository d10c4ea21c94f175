"""`diffusion_loss`: the squared error and the hybrid loss against their formulas in float64, memory, errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgen._schema import PREDICTION_TYPES
from fastgen.ops import diffusion_loss, q_sample
from fastgen.reference._layout import output_strides
from fastgen.samplers import alphas_cumprod, linear_betas, noising_tables, vlb_table

from ..backends import import_peer, requires_cpu
from .diffusion_loss_cases import (
    BETAS,
    STEPS,
    discretized_gaussian_log_likelihood,
    make,
    noising,
    plain_bound,
    plain_hybrid,
    plain_simple,
    tables,
    timesteps,
)
from .numerics import (
    DTYPES,
    PLACES,
    assert_any_threads,
    assert_bar,
    assert_fake,
    assert_registered,
    poison_allocator,
    randn,
)

SHAPE = (3, 4, 5, 7)
LAMBDA = 0.6


def gradient(function, model_output: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The losses [N] of ``function`` and their gradient, of a leaf in the layout of ``model_output``."""
    leaf = model_output.detach().requires_grad_()
    losses = function(leaf)
    return losses.detach(), torch.autograd.grad(losses, leaf, grad.to(losses.dtype))[0]


def check(
    model: Tensor,
    x0: Tensor,
    noise: Tensor,
    prediction: str,
    hybrid: bool,
    weighted=True,
    table_dtype=torch.float64,
    betas="linear",
) -> None:
    n = x0.shape[0]
    t, named, wide = timesteps(n), tables(table_dtype, betas), tables(torch.float64, betas)
    if not hybrid:
        named.pop("vlb_table"), wide.pop("vlb_table")
    if not weighted:
        named.pop("weights"), wide.pop("weights")
    options = {"prediction_type": prediction, "vlb_weight": LAMBDA, "reduction": "none"}
    grad = 1 + randn(n, seed=9).abs()

    def plain(model_output: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
        plain_named = {name: table for name, table in wide.items() if name != "vlb_table"}
        if hybrid:
            return plain_hybrid(model_output, x0, noise, t, prediction, BETAS[betas], LAMBDA, **plain_named)
        return plain_simple(model_output, x0, noise, t, prediction, **plain_named)

    poison_allocator(model.numel() * model.element_size())
    fused = lambda m: diffusion_loss(m, x0, noise, t, **named, **options)  # noqa: E731
    losses, in_model = gradient(fused, model, grad)
    assert torch.equal(losses, fused(model))
    assert losses.dtype == (torch.float64 if model.dtype == torch.float64 else torch.float32) and losses.shape == (n,)
    assert in_model.dtype == model.dtype and list(in_model.stride()) == output_strides(model)
    again = gradient(fused, model, grad)
    assert torch.equal(again[0], losses) and torch.equal(again[1], in_model)
    # in half precision the bound as it is written is NaN (1e-12 is zero there): users take it to float32
    widen = hybrid and model.dtype in (torch.bfloat16, torch.float16)
    beside = gradient(lambda m: plain(m.float() if widen else m, x0, noise), model, grad)
    exact = gradient(lambda m: plain(m, x0.double(), noise.double()), model.double(), grad)
    # nothing is more exact than float64 to compare it with; a sum in float32, and a table in it, may be lucky in plain torch
    slack = {torch.float64: 2e-12 if hybrid else 1e-14, torch.float32: 2e-7}.get(model.dtype, 1e-6)
    if table_dtype == torch.float32:
        slack = max(slack, 2e-6)
    assert_bar(losses, beside[0], exact[0], slack)
    for half in (slice(None, x0.shape[1]), slice(x0.shape[1], None)) if hybrid else (slice(None),):
        at = (slice(None), half) if model.dim() > 1 else half
        scale = exact[1][at].abs().max().clamp_min(1e-30) if exact[1][at].numel() else 1.0
        assert_bar(
            in_model[at].double() / scale, beside[1][at] / scale, exact[1][at] / scale, slack + _rounding(model.dtype)
        )


def _rounding(dtype: torch.dtype) -> float:
    """Half a unit in the last place of 1, for gradients that were scaled to 1 in float64."""
    return {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}.get(dtype, 0.0)


@pytest.mark.isa
@pytest.mark.parametrize("layout", PLACES)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_simple(dtype, prediction, weighted, layout):
    check(*make(SHAPE, [dtype], [layout], False, prediction), prediction, False, weighted)


@pytest.mark.isa
@pytest.mark.parametrize("layout", PLACES)
@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_hybrid(dtype, prediction, betas, layout):
    check(*make(SHAPE, [dtype], [layout], True, prediction), prediction, True, betas == "linear", betas=betas)


@pytest.mark.isa
@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_tables_in_float32(prediction, hybrid):
    check(
        *make(SHAPE, [torch.float32], ["contiguous"], hybrid, prediction), prediction, hybrid, table_dtype=torch.float32
    )


@pytest.mark.isa
@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("dtypes", [(a, b, c) for a in DTYPES for b, c in (DTYPES[:2], DTYPES[1:3], DTYPES[2:])])
def test_mixed_dtypes_and_layouts(dtypes, hybrid):
    for layouts in (
        ("contiguous", "channels_last", "strided"),
        ("channels_last", "strided"),
        ("strided", "contiguous"),
    ):
        check(*make(SHAPE, dtypes, layouts, hybrid, "v_prediction"), "v_prediction", hybrid)


@pytest.mark.isa
@pytest.mark.parametrize("layout", PLACES)
@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize(
    "shape", [(2, 1), (5, 3, 9), (2, 3, 2, 3, 4), (2, 4, 65, 33), (2, 1, 41, 3), (1, 1030, 2, 2), (3, 2, 1, 1)]
)
def test_shapes(shape, hybrid, layout):
    for dtype in (torch.float32, torch.bfloat16):
        check(*make(shape, [dtype], [layout], hybrid), "epsilon", hybrid)


@pytest.mark.isa
def test_samples_that_are_numbers():
    check(*make((5,), [torch.float32], ["contiguous"]), "epsilon", False)


@pytest.mark.isa
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=5).map(tuple),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    layouts=st.tuples(*[st.sampled_from(PLACES)] * 3),
    prediction=st.sampled_from(PREDICTION_TYPES),
    hybrid=st.booleans(),
)
def test_anything(shape, dtypes, layouts, prediction, hybrid):
    check(*make(shape, dtypes, layouts, hybrid, prediction), prediction, hybrid)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(reduction, dtype):
    model, x0, noise = make(SHAPE, [dtype], ["contiguous"])
    t, named = timesteps(3), noising(tables())
    each = diffusion_loss(model, x0, noise, t, **named, reduction="none")
    expected = {"mean": each.mean(), "sum": each.sum(), "none": each}[reduction]
    assert torch.equal(diffusion_loss(model, x0, noise, t, **named, reduction=reduction), expected)
    if reduction == "mean":
        torch.testing.assert_close(each.mean(), torch.nn.functional.mse_loss(model, noise), rtol=1e-6, atol=0.0)
        assert torch.equal(diffusion_loss(model, x0, noise, t, **named), expected)


@pytest.mark.isa
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_the_target_is_that_of_q_sample(prediction):
    _, x0, noise = make(SHAPE, [torch.float64], ["contiguous"])
    t, named = timesteps(3), noising(tables())
    target = q_sample(x0, t, **named, noise=noise, return_target=prediction)[1]
    loss = diffusion_loss(target, x0, noise, t, **named, prediction_type=prediction, reduction="none")
    assert (loss < 1e-30).all()


@pytest.mark.isa
@pytest.mark.parametrize("at_zero", [False, True])
def test_the_bound_alone(at_zero):
    """A huge lambda leaves nothing of the squared error, and a lambda of zero nothing of the bound."""
    model, x0, noise = make(SHAPE, [torch.float64], ["contiguous"], True)
    t, named = torch.zeros(3).long() if at_zero else torch.tensor([1, 9, STEPS - 1]), tables()
    exact = plain_bound(model, x0, noise, t, "epsilon", BETAS["linear"])
    loss = diffusion_loss(model, x0, noise, t, **named, vlb_weight=1e15, reduction="none") / 1e15
    torch.testing.assert_close(loss, exact, rtol=1e-11, atol=1e-13)
    loss = diffusion_loss(model, x0, noise, t, **named, vlb_weight=0.0, reduction="none")
    simple = diffusion_loss(model[:, :4], x0, noise, t, **noising(named), weights=named["weights"], reduction="none")
    torch.testing.assert_close(loss, simple, rtol=1e-14, atol=0.0)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_likelihood_where_it_is_cut_off(dtype):
    """Predictions from perfect to hopeless, over dark, grey and white: the probability ends at 1e-12, and its gradient at zero."""
    betas = linear_betas(1000)
    named = dict(zip(("alphas", "sigmas"), noising_tables(alphas_cumprod(betas)), strict=True))
    x0 = torch.tensor([-1.0, -0.9991, -0.9989, -0.4, 0.0, 0.7, 0.9989, 0.9991, 1.0], dtype=dtype).repeat(41)
    error = torch.linspace(-12, 12, 41, dtype=dtype).repeat_interleave(9)
    x0, v = x0.reshape(1, 1, -1), torch.linspace(-1.2, 1.2, x0.numel(), dtype=dtype).reshape(1, 1, -1)
    noise, t = torch.zeros_like(x0), torch.zeros(1).long()
    leaf = torch.cat([error.reshape(1, 1, -1), v], 1).requires_grad_()
    loss = diffusion_loss(leaf, x0, noise, t, **named, vlb_table=vlb_table(alphas_cumprod(betas)), reduction="sum")
    in_v = torch.autograd.grad(loss, leaf)[0][0, 1]
    wide = leaf.detach().double().requires_grad_()
    exact = plain_hybrid(wide, x0.double(), noise.double(), t, "epsilon", betas, 1.0, **named)
    expected = torch.autograd.grad(exact.sum(), wide)[0][0, 1]
    torch.testing.assert_close(loss.double(), exact[0], rtol=1e-9 if dtype == torch.float64 else 1e-6, atol=0.0)
    assert (expected == 0).sum() > 50 and (expected != 0).sum() > 50
    assert (in_v[expected == 0].abs() < 1e-12).all()  # a likelihood that was not cut off there would leave 1e-2
    # the restatement loses digits in the difference of its cdfs, and in the tails that it takes from 1
    torch.testing.assert_close(in_v.double(), expected, rtol=1e-3 if dtype == torch.float64 else 2e-3, atol=1e-7)


@pytest.mark.isa
def test_the_tails_of_the_likelihood_do_not_cancel():
    """Against 60 digits: in float64 the difference of the cdfs as it is written has lost half of its digits out there."""
    mpmath = import_peer("mpmath")
    mpmath.mp.dps = 60
    betas = linear_betas(1000)
    bar = alphas_cumprod(betas)
    named, table = dict(zip(("alphas", "sigmas"), noising_tables(bar), strict=True)), vlb_table(bar)
    x0 = torch.tensor([0.3, -0.2, 0.5, 1.0, -1.0, 1.0]).double().reshape(1, 1, -1)
    error = torch.tensor([2.0, -2.5, 3.0, 2.5, -3.0, 3.0]).double().reshape(1, 1, -1)
    model, t = torch.cat([error, 0.3 * x0], 1), torch.zeros(1).long()
    loss = diffusion_loss(model, x0, 0 * x0, t, **named, vlb_table=table, reduction="sum") - error.square().mean()

    def probability(x, r, v):
        sigma_over_alpha = mpmath.mpf(named["sigmas"][0].item()) / mpmath.mpf(named["alphas"][0].item())
        mean, inverse, span = (mpmath.mpf(value) for value in table[0].tolist())
        inverse *= mpmath.exp(-span * (mpmath.mpf(v) + 1) / 4)

        def cdf(side):
            p = inverse * (mean * sigma_over_alpha * mpmath.mpf(r) + side / mpmath.mpf(255))
            return (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (p + mpmath.mpf("0.044715") * p**3))) / 2

        return cdf(1) if x < -0.999 else 1 - cdf(-1) if x > 0.999 else cdf(1) - cdf(-1)

    values = zip(x0.flatten().tolist(), error.flatten().tolist(), model[0, 1].tolist(), strict=True)
    bits = [-mpmath.log(max(probability(*value), mpmath.mpf("1e-12")), 2) for value in values]
    assert max(bits) < 39.8  # none is cut off
    assert abs(loss.item() - float(sum(bits) / len(bits))) < 1e-12 * loss.item()


@pytest.mark.isa
@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_target_does_not_name_is_not_read(dtype, hybrid):
    for prediction, ignored in (("epsilon", 1), ("sample", 2)):
        arguments = list(make(SHAPE, [dtype], ["contiguous"], hybrid, prediction))
        arguments[ignored] = torch.full_like(arguments[ignored], math.nan)
        t = torch.tensor([3, 4, 5])  # not 0, where the likelihood reads x0
        leaf = arguments[0].clone().requires_grad_()
        named = tables() if hybrid else noising(tables())
        loss = diffusion_loss(leaf, *arguments[1:], t, **named, prediction_type=prediction)
        loss.backward()
        assert loss.isfinite() and leaf.grad.isfinite().all()


@pytest.mark.isa
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("name", "hybrid"), [("model", False), ("noise", False), ("model", True), ("noise", True), ("v", True)]
)
def test_not_finite(name, hybrid, value):
    """A NaN or an infinity makes its own sample's loss NaN or infinite, wherever in a vector it stands, and no other's."""
    for i in range(67):
        model, x0, noise = make((3, 1, 67), [torch.float32], ["contiguous"], hybrid)
        where = {"model": model[:, 0], "v": model[:, -1], "noise": noise[:, 0]}[name]
        where[2, i] = value
        named = tables() if hybrid else noising(tables())
        losses = diffusion_loss(model, x0, noise, timesteps(3), **named, reduction="none")
        assert not losses[2].isfinite()
        assert losses[:2].isfinite().all()
        if math.isnan(value):
            assert losses[2].isnan()


@pytest.mark.isa
@pytest.mark.parametrize("bad", [-1, STEPS, 2**40, -(2**63)])
@pytest.mark.parametrize("hybrid", [False, True])
def test_a_timestep_out_of_range_raises(hybrid, bad):
    model, x0, noise = make(SHAPE, [torch.float32], ["contiguous"], hybrid)
    t, named = timesteps(3), tables() if hybrid else noising(tables())
    t[1] = bad
    message = rf"diffusion_loss: t must be in \[0, {STEPS}\), got t\[1\] = {bad}"
    with pytest.raises(RuntimeError, match=message):
        diffusion_loss(model, x0, noise, t, **named)
    with pytest.raises(RuntimeError, match=message):
        raw = (named["alphas"], named["sigmas"], None, named.get("vlb_table"), 0, 1.0)
        torch.ops.fastgen.diffusion_loss_bwd(torch.ones(3), model, x0, noise, t, *raw)


@pytest.mark.isa
def test_strided_timesteps_and_tables():
    model, x0, noise = make(SHAPE, [torch.float32], ["contiguous"], True)

    def every_second(v):
        return torch.stack([v, torch.full_like(v, 10**6)], 1)[:, 0]

    named = tables()
    strided = {name: every_second(table) for name, table in named.items()}
    strided["vlb_table"] = named["vlb_table"].T.contiguous().T
    strided["alphas"] = every_second(named["alphas"])
    expected = diffusion_loss(model, x0, noise, timesteps(3), **named, reduction="none")
    actual = diffusion_loss(model, x0, noise, every_second(timesteps(3)), **strided, reduction="none")
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0, 4), (2, 0), (0, 0)])
def test_nothing(shape, hybrid):
    """No samples: no losses. Samples of nothing: NaN, the mean of nothing, as in torch."""
    model, x0, noise = make(shape, [torch.float32], ["contiguous"], hybrid)
    leaf, named = model.clone().requires_grad_(), tables() if hybrid else noising(tables())
    losses = diffusion_loss(leaf, x0, noise, timesteps(shape[0]), **named, reduction="none")
    assert losses.shape == shape[:1] and losses.isnan().all()
    losses.sum().backward()
    assert leaf.grad.shape == model.shape


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("layout", PLACES)
@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads(dtype, hybrid, layout):
    model, x0, noise = make((3, 4, 100, 101), [dtype], [layout], hybrid)
    t, named = timesteps(3), tables() if hybrid else noising(tables())
    function = lambda m: diffusion_loss(m, x0, noise, t, **named, reduction="none")  # noqa: E731
    assert_any_threads(lambda: gradient(function, model, torch.ones(3)))


@pytest.mark.parametrize("prediction", range(len(PREDICTION_TYPES)))
@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("layout", PLACES)
def test_fakes(layout, hybrid, prediction):
    """And opcheck for one prediction: what it asks does not hang on that."""
    model, x0, noise = make(SHAPE, [torch.bfloat16, torch.float32], [layout], hybrid)
    named = tables()
    arguments = (
        model, x0, noise, timesteps(3), named["alphas"], named["sigmas"], named["weights"] if hybrid else None,
        named["vlb_table"] if hybrid else None, prediction, 0.5,
    )  # fmt: skip
    for op, inputs in (
        (torch.ops.fastgen.diffusion_loss_fwd, arguments),
        (torch.ops.fastgen.diffusion_loss_bwd, (torch.ones(()).expand(3), *arguments)),
    ):
        (assert_registered if prediction == 2 else assert_fake)(op.default, inputs)


def test_the_restatement_decodes_a_distribution():
    """The discretised likelihood that the tests compare with sums to one over the 256 levels."""
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    total = discretized_gaussian_log_likelihood(levels, torch.tensor(0.2), torch.tensor(-2.0)).exp().sum()
    assert abs(total - 1) < 1e-9


X = (2, 3, 4)
WANTS = torch.zeros(X, requires_grad=True)


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (
            TypeError,
            "model_output must be a floating-point tensor, got torch.int64",
            {"model_output": torch.zeros(X).long()},
        ),
        (ValueError, r"model_output must be \[N, \*\], got a scalar", {"model_output": torch.tensor(1.0)}),
        (TypeError, "x0 must be a floating-point tensor, got NoneType", {"x0": None}),
        (ValueError, r"x0 must have the shape of model_output \(2, 3, 4\), got shape \(3,\)", {"x0": torch.zeros(3)}),
        (ValueError, "x0 must be on the device of model_output", {"x0": torch.zeros(X, device="meta")}),
        (ValueError, "noise must have the shape of x0", {"noise": torch.zeros(2, 3)}),
        (TypeError, "noise must be a floating-point tensor, got torch.int32", {"noise": torch.zeros(X).int()}),
        (TypeError, "t must be an int64 tensor, got torch.float32", {"t": torch.zeros(2)}),
        (ValueError, r"t must be one per sample \(2\), got shape \(1,\)", {"t": torch.zeros(1).long()}),
        (TypeError, "alphas must be a float32 or float64 tensor, got float", {"alphas": 1.0}),
        (ValueError, r"sigmas must be \[T\] with T = 5, the length of alphas", {"sigmas": torch.ones(6)}),
        (ValueError, r"weights must be \[T\] with T = 5, the length of alphas", {"weights": torch.ones(5, 1)}),
        (ValueError, "weights must be on the device", {"weights": torch.ones(5, device="meta")}),
        (ValueError, "prediction_type must be one of .* got 'x0'", {"prediction_type": "x0"}),
        (ValueError, r"reduction must be one of \('mean', 'sum', 'none'\), got None", {"reduction": None}),
        (ValueError, r"with a vlb_table model_output must be \[N, 2C, \*\] for x0", {"vlb_table": torch.ones(5, 3)}),
        (
            ValueError,
            r"vlb_table must be \[T, 3\] with T = 5, the length of alphas, got shape \(5, 2\)",
            {"vlb_table": torch.ones(5, 2), "model_output": torch.zeros(2, 6, 4)},
        ),
        (
            TypeError,
            "vlb_table must be a float32 or float64 tensor, got torch.float16",
            {"vlb_table": torch.ones(5, 3).half(), "model_output": torch.zeros(2, 6, 4)},
        ),
        (
            ValueError,
            "vlb_table must be on the device",
            {"vlb_table": torch.ones(5, 3, device="meta"), "model_output": torch.zeros(2, 6, 4)},
        ),
        (ValueError, "there is no gradient in x0: detach it", {"x0": WANTS}),
        (ValueError, "there is no gradient in noise: detach it", {"noise": WANTS}),
        (ValueError, "there is no gradient in alphas: detach it", {"alphas": torch.ones(5, requires_grad=True)}),
    ],
)
def test_errors(error, message, changes):
    arguments = {name: torch.zeros(X) for name in ("model_output", "x0", "noise")}
    arguments |= {"t": torch.zeros(2).long(), "alphas": torch.ones(5), "sigmas": torch.ones(5)}
    with pytest.raises(error, match=f"diffusion_loss: {message}"):
        diffusion_loss(**{**arguments, **changes})
