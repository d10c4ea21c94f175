"""Arguments of `diffusion_loss` for its tests, and the same losses as their papers and guided-diffusion write them."""

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
from fastgen._schema import PREDICTION_TYPES
from fastgen.ops import diffusion_loss
from fastgen.reference import diffusion_loss as reference
from fastgen.reference._layout import output_strides
from fastgen.samplers import alphas_cumprod, linear_betas, noising_tables, squared_cosine_betas, vlb_table

from .families import Call, OfTensors
from .numerics import DTYPES, LAYOUTS, STRIDES, dtype_name, laid_out, place, randn, strided, widened

STEPS = 20
BETAS = {"linear": linear_betas(STEPS, 1e-3, 0.3), "cosine": squared_cosine_betas(STEPS)}


def tables(dtype: torch.dtype = torch.float64, betas: str = "linear") -> dict[str, Tensor]:
    """Alphas and sigmas [T] of a variance-preserving process, weights [T] and the table of the bound [T, 3]."""
    bar = alphas_cumprod(BETAS[betas])
    alphas, sigmas = noising_tables(bar)
    weights = 0.3 + randn(STEPS, seed=80).sigmoid()
    named = {"alphas": alphas, "sigmas": sigmas, "weights": weights, "vlb_table": vlb_table(bar)}
    return {name: table.to(dtype) for name, table in named.items()}


def timesteps(n: int) -> Tensor:
    """The second sample stands at t = 0, where the bound is a likelihood."""
    return torch.tensor([(7 * k + 13) % STEPS for k in range(n)], dtype=torch.int64)


def make(
    shape, dtypes, layouts, hybrid: bool = False, prediction_type: str = "epsilon"
) -> tuple[Tensor, Tensor, Tensor]:
    """(model_output, x0, noise): images in [-1, 1], some of them at the ends, and a model that errs a little."""
    dtype, layout = itertools.cycle(dtypes), itertools.cycle(layouts)
    x0, noise = (1.3 * randn(*shape, seed=2)).clamp(-1, 1), randn(*shape, seed=3)
    target = target_of(x0, noise, timesteps(shape[0]), prediction_type, **noising(tables()))
    model = target + (0.02 if prediction_type == "sample" else 0.1) * randn(*shape, seed=4)
    if hybrid:
        model = torch.cat([model, randn(*shape, seed=5).tanh()], 1)
    model, x0, noise = (place(v.to(next(dtype)), next(layout)) for v in (model, x0, noise))
    return model, x0, noise


def noising(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: named[name] for name in ("alphas", "sigmas")}


def target_of(x0: Tensor, noise: Tensor, t: Tensor, prediction_type: str, alphas: Tensor, sigmas: Tensor) -> Tensor:
    alpha, sigma = broadcast(alphas, t, x0), broadcast(sigmas, t, x0)
    return {
        "epsilon": lambda: noise,
        "sample": lambda: x0,
        "v_prediction": lambda: alpha * noise - sigma * x0,
        "flow_prediction": lambda: noise - x0,
    }[prediction_type]()


def broadcast(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    return table[t].to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def mean_flat(v: Tensor) -> Tensor:
    return v.reshape(v.shape[0], -1).mean(1)


def plain_simple(
    model_output: Tensor, x0: Tensor, noise: Tensor, t: Tensor, prediction_type: str, alphas, sigmas, weights=None
) -> Tensor:
    """As a user writes it: [N], in the dtype of ``model_output``."""
    x0, noise = x0.to(model_output.dtype), noise.to(model_output.dtype)
    target = target_of(x0, noise, t, prediction_type, alphas, sigmas)
    losses = mean_flat((model_output - target) ** 2)
    return losses if weights is None else losses * weights[t].to(losses.dtype)


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    return 0.5 * (-1.0 + logvar2 - logvar1 + torch.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * torch.exp(-logvar2))


def standard_normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    centered, inv_stdv = x - means, torch.exp(-log_scales)
    cdf_plus = standard_normal_cdf(inv_stdv * (centered + 1.0 / 255.0))
    cdf_min = standard_normal_cdf(inv_stdv * (centered - 1.0 / 255.0))
    return torch.where(
        x < -0.999,
        cdf_plus.clamp(min=1e-12).log(),
        torch.where(x > 0.999, (1.0 - cdf_min).clamp(min=1e-12).log(), (cdf_plus - cdf_min).clamp(min=1e-12).log()),
    )


def plain_bound(
    model_output: Tensor, x0: Tensor, noise: Tensor, t: Tensor, prediction_type: str, betas: Tensor
) -> Tensor:
    """guided-diffusion's `_vb_terms_bpd` of `learned_range` [N], bits per dimension, its mean detached; from betas, float64."""
    dtype = model_output.dtype
    x0, noise = x0.to(dtype), noise.to(dtype)
    bar = torch.cumprod(1.0 - betas, 0)
    bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    variance = betas * (1.0 - bar_prev) / (1.0 - bar)
    log_variance_clipped = torch.cat([variance[1:2], variance[1:]]).log()
    coef1, coef2 = betas * bar_prev.sqrt() / (1.0 - bar), (1.0 - bar_prev) * (1.0 - betas).sqrt() / (1.0 - bar)

    def at(table: Tensor) -> Tensor:
        return broadcast(table, t, x0)

    x_t = at(bar.sqrt()) * x0 + at((1 - bar).sqrt()) * noise
    prediction, v = model_output.chunk(2, 1)
    prediction = prediction.detach()
    alpha, sigma = at(bar.sqrt()), at((1 - bar).sqrt())
    predicted_x0 = {
        "epsilon": lambda: at((1.0 / bar).sqrt()) * x_t - at((1.0 / bar - 1).sqrt()) * prediction,
        "sample": lambda: prediction,
        "v_prediction": lambda: alpha * x_t - sigma * prediction,
        "flow_prediction": lambda: (x_t - sigma * prediction) / (alpha + sigma),
    }[prediction_type]()
    min_log, max_log = at(log_variance_clipped), at(betas.log())
    fraction = (v + 1) / 2
    log_variance = fraction * max_log + (1 - fraction) * min_log
    mean = at(coef1) * predicted_x0 + at(coef2) * x_t
    true_mean = at(coef1) * x0 + at(coef2) * x_t
    kl = mean_flat(normal_kl(true_mean, min_log, mean, log_variance)) / math.log(2.0)
    nll = -discretized_gaussian_log_likelihood(x0, mean, 0.5 * log_variance)
    return torch.where(t == 0, mean_flat(nll) / math.log(2.0), kl)


def plain_hybrid(
    model_output, x0, noise, t, prediction_type, betas, vlb_weight, alphas, sigmas, weights=None
) -> Tensor:
    simple = plain_simple(model_output.chunk(2, 1)[0], x0, noise, t, prediction_type, alphas, sigmas, weights)
    return simple + vlb_weight * plain_bound(model_output, x0, noise, t, prediction_type, betas)


def example(dtype: torch.dtype) -> dict[str, Any]:
    model, x0, noise = make((3, 4, 5, 7), [dtype], ["contiguous"])
    named = {"model_output": model, "x0": x0, "noise": noise, "t": timesteps(3), **noising(tables())}
    return {**named, "prediction_type": "v_prediction"}


def examples() -> list[dict[str, Any]]:
    hybrid = {"model_output": randn(3, 8, 5, 7, dtype=torch.float32), **tables(torch.float32)}
    return [{**example(torch.float32), **hybrid}]


OWN_DTYPE = (0,)
REFUSED = [
    ("diffusion_loss_fwd", {"prediction": 4}, "prediction"),
    ("diffusion_loss_bwd", {"prediction": -1}, "prediction"),
]


def pictures(n: int, seed: int) -> list[Tensor]:
    """A model's output with its variances, x0 and noise."""
    channels = ((8, 0), (4, 20), (4, 40))
    return [randn(n, c, 5, 7, seed=seed + more, dtype=torch.float32).tanh() for c, more in channels]


BOUND = tables(torch.float32)
MAPPED = OfTensors(
    lambda model, x0, noise, t: diffusion_loss(model, x0, noise, t, **BOUND, vlb_weight=0.5),
    lambda k: [*pictures(2, k), torch.tensor([k, 0])],
)
EXPORTED = {
    "diffusion_loss": OfTensors(
        lambda model, x0, noise, t: diffusion_loss(model, x0, noise, t, **BOUND),
        lambda n: [*pictures(n, 0), torch.arange(n) % 7],
    )
}
NO_STORAGE_TYPE = {"diffusion_loss.diffusion_loss_finish_kernel"}  # it merges partial sums


def forward(shape, dtype, layout, hybrid, prediction, kind=None) -> tuple[Any, ...]:
    """Arguments of `diffusion_loss_fwd` whose bound is well conditioned, so that float32 can be held to a tolerance."""
    model, x0, noise = (
        v.clone() for v in make(shape, [torch.float64], ["contiguous"], hybrid, PREDICTION_TYPES[prediction])
    )
    model, x0, noise = model.to(dtype), x0.to(dtype), noise.to(torch.float32)
    if kind is None:
        model, x0 = laid_out(model, layout), laid_out(x0, layout)
    else:
        model, x0, noise = (strided(v, kind) for v in (model, x0, noise))
    alphas, sigmas = (0.4 + randn(STEPS, seed=90 + k).sigmoid() for k in range(2))
    weights, table = 0.5 + randn(STEPS, seed=6).sigmoid(), randn(STEPS, 3, seed=5).sigmoid()
    table[:, 1] = 20.0
    options = (weights, table) if hybrid else (None, None)
    return (model, x0, noise, timesteps(shape[0]), alphas, sigmas, *options, prediction, 0.7)


def backward(shape, dtype, *args, **options) -> tuple[Any, ...]:
    grad = torch.linspace(0.5, 2, shape[0]).to(torch.promote_types(dtype, torch.float32))
    return (grad, *forward(shape, dtype, *args, **options))


def calls() -> Iterator[Call]:
    def both(name, shape, dtype, layout, hybrid, prediction, kind=None):
        args = (shape, dtype, layout, hybrid, prediction, kind)
        name, cut = f"{'hybrid ' * hybrid}{name}", shape[1] if hybrid else None
        yield Call(name, "diffusion_loss_fwd", partial(forward, *args))
        yield Call(name, "diffusion_loss_bwd", partial(backward, *args), least=0.0, cut=cut)

    for hybrid in (False, True):
        for dtype, (prediction, target), layout in itertools.product(DTYPES, enumerate(PREDICTION_TYPES), LAYOUTS):
            if dtype != torch.float32 and target != "v_prediction":  # each dtype loads and stores in one place
                continue
            name = f"{target} {layout} {dtype_name(dtype)}"
            yield from both(name, (2, 3, 19, 21), dtype, layout, hybrid, prediction)
        for shape in ((3, 5), (2, 1, 9), (2, 4, 8, 32), (1, 1030, 2, 2), (2, 2, 1, 1), (1, 2, 3, 4, 5)):
            for layout in LAYOUTS:
                yield from both(f"{shape} {layout}", shape, torch.float32, layout, hybrid, 2)
        for kind in STRIDES:
            yield from both(kind, (2, 4, 5, 6), torch.float32, None, hybrid, 2, kind)
    x, t, table, row = (
        torch.full((1, 1, 1, 1), 0.5),
        torch.tensor([0]),
        torch.tensor([0.7]),
        torch.tensor([[0.3, 2, 0.5]]),
    )
    one = (torch.cat([0.8 * x, 0.2 * x], 1), x, x, t, table, table, table, row)  # one step, and one of everything
    yield Call("one of everything", "diffusion_loss_fwd", lambda: (*one, 0, 1.0))
    yield Call("one of everything", "diffusion_loss_bwd", lambda: (torch.ones(1), *one, 2, 1.0), cut=1)


def check_many_partial_sums(kernels):
    """More sums a sample than the second kernel reads at once."""
    arguments = forward((2, 3, 64, 71), torch.float32, "contiguous", False, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("fastgen.kernels.diffusion_loss"), "FINISH_BLOCK", 4)
        losses = kernels.diffusion_loss_fwd(*arguments)
    expected = reference.diffusion_loss_fwd(*widened(arguments))
    torch.testing.assert_close(losses.double(), expected, rtol=4e-6, atol=0.0)


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("prediction", range(len(PREDICTION_TYPES)))
@pytest.mark.parametrize("bad", [-1, STEPS, 2**40, -(2**60)])
def check_a_timestep_out_of_range_is_nan(kernels, bad, prediction, hybrid):
    arguments = forward((3, 2, 5), torch.float32, "contiguous", hybrid, prediction)
    arguments[3][1] = bad
    losses, gradient = kernels.diffusion_loss_fwd(*arguments), kernels.diffusion_loss_bwd(torch.ones(3), *arguments)
    for result in (losses, gradient):
        assert result[1].isnan().all() and result[0].isfinite().all() and result[2].isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("n", [0, 1])
def check_not_finite(kernels, n, half, value):
    """Also where the likelihood is clamped, at t = 0: a minimum that swallowed NaN would hide a broken model."""
    arguments = forward((3, 2, 5, 3), torch.float32, "contiguous", True, 0)
    arguments[0][n, 2 * half, 3, 1] = value
    losses = kernels.diffusion_loss_fwd(*arguments)
    if n == 0 or math.isnan(value):
        assert not losses[n].isfinite()
    assert losses[[k for k in range(3) if k != n]].isfinite().all()


def check_nothing(kernels):
    for shape, hybrid in (((2, 3, 0), False), ((0, 3, 4), True)):
        x0, t, table = torch.zeros(shape), torch.zeros(shape[0]).long(), torch.zeros(STEPS)
        model = torch.zeros(shape[0], 2 * shape[1], *shape[2:]) if hybrid else x0
        arguments = (model, x0, x0, t, table, table, None, torch.zeros(STEPS, 3) if hybrid else None, 0, 1.0)
        losses = kernels.diffusion_loss_fwd(*arguments)
        assert losses.shape == shape[:1] and losses.isnan().all()
        assert kernels.diffusion_loss_bwd(losses, *arguments).shape == model.shape


def check_reasons(kernels):
    reasons = _dispatch.Triton.reasons
    x, byte, t = torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.uint8), torch.zeros(1).long()
    dtype = ["the kernels take float64, float32, bfloat16 and float16, not torch.uint8"]
    assert reasons("diffusion_loss_fwd", x, x, x, t, x, x, None, None, 0, 1.0) == []
    assert reasons("diffusion_loss_bwd", byte, x, x, x, t, x, x, None, None, 0, 1.0) == dtype
    assert reasons("diffusion_loss_fwd", x, x, x, t, x, x, byte, None, 0, 1.0) == dtype


def zeros(shape, dtype, layout, hybrid, prediction, table_dtype, grad=False) -> tuple[Any, ...]:
    """Arguments of the forward or the backward without values."""
    n, c, *spatial = shape
    x, model = (laid_out(torch.zeros(n, k, *spatial, dtype=dtype), layout) for k in (c, (1 + hybrid) * c))
    table, t = torch.zeros(1000, dtype=table_dtype), torch.zeros(n, dtype=torch.int64)
    options = (table, torch.zeros(1000, 3, dtype=table_dtype)) if hybrid else (None, None)
    arguments = (model, x, x, t, table, table, *options, prediction, 0.001)
    return (torch.zeros(n, dtype=torch.promote_types(dtype, torch.float32)), *arguments) if grad else arguments


def gates(arch: int) -> Iterator[Call]:
    def both(name, *args):
        yield Call(name, "diffusion_loss_fwd", partial(zeros, *args))
        yield Call(name, "diffusion_loss_bwd", partial(zeros, *args, grad=True))

    for dtype, layout, hybrid in itertools.product(DTYPES, LAYOUTS, (False, True)):
        prediction, wide = 2 if layout == "channels_last" else 0, torch.promote_types(dtype, torch.float32)
        name = f"{'hybrid ' * hybrid}loss {layout} {dtype_name(dtype)}"
        yield from both(name, (2, 4, 64, 64), dtype, layout, hybrid, prediction, wide)
    for prediction, hybrid in itertools.product(range(len(PREDICTION_TYPES)), (False, True)):
        yield from both("one loss", (1, 1, 1, 1), torch.float32, "contiguous", hybrid, prediction, torch.float32)
    yield from both("odd loss, fp64 table", (1, 3, 7, 5), torch.float32, "channels_last", True, 3, torch.float64)


def loss_and_gradient(function, model):
    leaf = model.detach().requires_grad_()
    losses = function(leaf)
    return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def gpu_values_and_gradients(dtype, prediction, hybrid, layout):
    on_cpu = make((3, 4, 33, 21), [dtype], [layout], hybrid, prediction)
    t, named = timesteps(3), tables()
    weights, bound = named.pop("weights"), named.pop("vlb_table")
    options = {"weights": weights, "vlb_table": bound if hybrid else None}
    on_gpu = {name: None if value is None else value.cuda() for name, value in {**named, **options, "t": t}.items()}
    model, x0, noise = (v.cuda() for v in on_cpu)

    def fused(m):
        return diffusion_loss(m, x0, noise, **on_gpu, prediction_type=prediction, reduction="none")

    def exact(m):
        arguments = (m, *(v.double() for v in on_cpu[1:]), t, prediction)
        if hybrid:
            return plain_hybrid(*arguments, BETAS["linear"], 1.0, **named, weights=weights)
        return plain_simple(*arguments, **named, weights=weights)

    losses, gradient = loss_and_gradient(fused, model)
    expected, expected_gradient = loss_and_gradient(exact, on_cpu[0].double())
    wide = dtype == torch.float64
    # divided differences of a likelihood that float32 knows to a few parts in a million
    torch.testing.assert_close(losses.cpu().double(), expected, rtol=1e-9 if wide else 2e-5, atol=1e-12)
    for half in (slice(None, 4), slice(4, None)) if hybrid else (slice(None),):
        scale = expected_gradient[:, half].abs().max()
        error = (gradient.cpu().double() - expected_gradient)[:, half].abs().max()
        floor = 2.0**-25 if dtype == torch.float16 else 0.0
        assert error <= {torch.float64: 1e-9, torch.float32: 2e-5}.get(dtype, 1e-2) * scale + floor
    assert list(gradient.stride()) == output_strides(model)
    again = loss_and_gradient(fused, model)
    assert torch.equal(losses, again[0]) and torch.equal(gradient, again[1])


@pytest.mark.parametrize("hybrid", [False, True])
def gpu_waits_for_nothing(hybrid):
    model, x0, noise = (v.cuda() for v in make((3, 4, 8, 8), [torch.float32], ["contiguous"], hybrid))
    named = {name: table.cuda() for name, table in tables().items() if hybrid or name != "vlb_table"}
    t, leaf = timesteps(3).cuda(), model.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        diffusion_loss(leaf, x0, noise, t, **named).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert leaf.grad.isfinite().all()
