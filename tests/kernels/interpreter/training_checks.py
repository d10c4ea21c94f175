"""Values of the Triton kernels of the training ops against the reference in float64: by the interpreter, and on a GPU."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from fastgen.reference import diffusion_loss as loss_reference
from fastgen.reference import q_sample as q_reference
from fastgen.reference._layout import output_strides
from tests.kernels.interpreter.checks import (
    DEVICE,
    TOLERANCE,
    channels_last,
    close,
    guarded,
    guarded_outputs,
    moved,
    on_device,
    strided,
)

modules = {name: importlib.import_module(f"fastgen.kernels.{name}") for name in ("q_sample", "diffusion_loss")}
kernels = SimpleNamespace(
    q_sample_fwd=on_device(modules["q_sample"].q_sample_fwd),
    q_sample_bwd=on_device(modules["q_sample"].q_sample_bwd),
    diffusion_loss_fwd=on_device(modules["diffusion_loss"].diffusion_loss_fwd),
    diffusion_loss_bwd=on_device(modules["diffusion_loss"].diffusion_loss_bwd),
)
STEPS = 9
LAYOUTS = ("contiguous", "channels_last")


def draw(shape, seed, dtype=torch.float32, layout="contiguous"):
    value = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return guarded(channels_last(value) if layout == "channels_last" and len(shape) > 2 else value)


def tables(dtype=torch.float64):
    return [guarded((0.4 + draw((STEPS,), 90 + k).sigmoid()).to(dtype)) for k in range(2)]


def timesteps(n):
    return torch.tensor([(5 * k + 2) % STEPS for k in range(n)])


def same_layout(actual, like):
    assert all(list(a.stride()) == output_strides(like) for a in actual if a.numel())


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", range(-1, 4))
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_q_sample(dtype, target, layout, drawn):
    for shape in ((2, 3, 19, 21), (3, 5)):
        x0, t = draw(shape, 1, dtype, layout), timesteps(shape[0])
        noise, seeds = (None, torch.arange(3, 3 + shape[0])) if drawn else (draw(shape, 2, torch.float16), None)
        table = tables(torch.float32 if layout == "contiguous" else torch.float64)
        with guarded_outputs():
            actual = kernels.q_sample_fwd(x0, t, *table, noise, seeds, 3, target)
        expected = q_reference.q_sample_fwd(x0.double(), t, *table, noise, seeds, 3, target)
        again = kernels.q_sample_fwd(x0, t, *table, noise, seeds, 3, target)
        # normals are made in float32, so even a float64 sample carries their rounding
        tolerance = torch.float32 if dtype == torch.float64 and drawn else dtype
        for a, e, b in zip(actual, expected, again, strict=True):
            assert a.dtype == dtype and a.shape == e.shape and torch.equal(a, b)
            if e.numel():
                close(a, e, tolerance)
        same_layout(actual, x0)


@pytest.mark.parametrize("given", ["both", "grad", "target"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", range(4))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_q_sample_backward(dtype, target, layout, given):
    shape = (2, 3, 19, 21)
    grad = None if given == "target" else draw(shape, 1, dtype, layout)
    grad_target = None if given == "grad" else draw(shape, 2, dtype)
    like = grad if grad is not None else grad_target
    arguments = (timesteps(2), *tables(), target, True, target != 1)
    with guarded_outputs():
        actual = kernels.q_sample_bwd(grad, grad_target, *arguments)
    wide = [None if g is None else g.double() for g in (grad, grad_target)]
    for a, e in zip(actual, q_reference.q_sample_bwd(*wide, *arguments), strict=True):
        assert a.dtype == dtype and a.shape == e.shape
        if e.numel():
            close(a, e, dtype)
    same_layout(actual, like)


@pytest.mark.parametrize("kind", ["transposed", "sliced", "expanded", "channels"])
def test_q_sample_strides(kind):
    x0, noise = (strided(torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(k)))[kind] for k in range(2))
    t, table = timesteps(4)[::2], [v.repeat_interleave(2)[::2] for v in tables()]
    actual = kernels.q_sample_fwd(x0, t, *table, noise, None, 0, 2)
    expected = q_reference.q_sample_fwd(x0.double(), t, *table, noise.double(), None, 0, 2)
    for a, e in zip(actual, expected, strict=True):
        close(a, e, torch.float32)
    same_layout(actual, x0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 19, 21), (2, 4, 8, 16), (2, 700)])
def test_q_sample_draws_the_normals_of_the_cpu_kernel(shape, layout):
    """x_t = 0 * x0 + 1 * noise, against `philox_normal`."""
    x0, seeds = draw(shape, 1, layout=layout), torch.tensor([5, -(2**40)])
    drawn = kernels.q_sample_fwd(x0, timesteps(2), torch.zeros(STEPS), torch.ones(STEPS), None, seeds, 7, 0)
    expected = torch.ops.fastgen.philox_normal(seeds, shape, 7)
    for normals in drawn:
        torch.testing.assert_close(normals, expected, rtol=6e-7, atol=1e-9, check_stride=False)


@pytest.mark.parametrize("bad", [-1, STEPS, 2**40, -(2**62)])
def test_q_sample_of_a_timestep_out_of_range_is_nan(bad):
    """Nothing is read past a table (an address so far off would fault), and no other sample is touched."""
    x0, t = draw((3, 4, 5), 1), timesteps(3)
    t[1] = bad
    results = kernels.q_sample_fwd(x0, t, *tables(), x0, None, 0, 2)
    results += kernels.q_sample_bwd(x0, x0, t, *tables(), 2, True, True)
    for result in results:
        assert result[1].isnan().all() and result[0].isfinite().all() and result[2].isfinite().all()


def test_q_sample_nothing():
    empty, seeds = torch.zeros(2, 0, 3), torch.zeros(2).long()
    for result in kernels.q_sample_fwd(empty, seeds, *tables(), None, seeds, 0, 2):
        assert result.shape == (2, 0, 3)
    assert kernels.q_sample_bwd(empty, None, seeds, *tables(), -1, True, False)[0].shape == (2, 0, 3)


def loss_case(shape, dtype, layout, hybrid, prediction, kind=None):
    """Arguments of the forward: a model that errs by a tenth; the second sample stands at t = 0."""
    x0 = (1.3 * draw(shape, 1, torch.float64)).clamp(-1, 1)
    noise, t = draw(shape, 2, torch.float64), torch.tensor([(4 * k + 5) % STEPS for k in range(shape[0])])
    target = q_reference.q_sample_fwd(x0, t, *tables(), noise, None, 0, prediction)[1]
    model = target + 0.1 * draw(shape, 3, torch.float64)
    if hybrid:
        model = torch.cat([model, draw(shape, 4, torch.float64).tanh()], 1)
    table = torch.rand(STEPS, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    table[:, 1] = 20.0
    model, x0, noise = model.to(dtype), x0.to(dtype), noise.to(torch.float32)
    if kind is not None:
        model, x0, noise = strided(model)[kind], strided(x0)[kind], strided(noise)[kind]
    elif layout == "channels_last":
        model, x0 = guarded(channels_last(model)), guarded(channels_last(x0))
    weights = 0.5 + draw((STEPS,), 6, torch.float64).sigmoid()
    return (model, x0, noise, t, *tables(), weights if hybrid else None, table if hybrid else None, prediction, 0.7)


def widened(arguments):
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]


def loss_agrees(arguments):
    model, x0 = arguments[:2]
    grad = torch.linspace(0.5, 2, x0.shape[0]).to(torch.float64 if model.dtype == torch.float64 else torch.float32)
    with guarded_outputs():
        losses = kernels.diffusion_loss_fwd(*arguments)
    with guarded_outputs():
        gradient = kernels.diffusion_loss_bwd(grad, *arguments)
    expected = loss_reference.diffusion_loss_fwd(*widened(arguments))
    expected_gradient = loss_reference.diffusion_loss_bwd(grad.double(), *widened(arguments))
    sums = torch.float64 if model.dtype == torch.float64 else torch.float32
    assert losses.dtype == sums and gradient.dtype == model.dtype
    close(losses, expected, sums)
    for half in (slice(None, x0.shape[1]), slice(x0.shape[1], None)) if arguments[7] is not None else (slice(None),):
        scale = expected_gradient[:, half].abs().max()
        floor = 2.0**-25 if model.dtype == torch.float16 else 0.0  # half of its least number
        error = (gradient[:, half].double() - expected_gradient[:, half]).abs().max()
        assert error <= TOLERANCE[model.dtype] * scale + floor, f"{error / scale:.2e}"
    same_layout([gradient], model)
    assert torch.equal(losses, kernels.diffusion_loss_fwd(*arguments))
    assert torch.equal(gradient, kernels.diffusion_loss_bwd(grad, *arguments))


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prediction", range(4))
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_diffusion_loss(dtype, prediction, layout, hybrid):
    loss_agrees(loss_case((2, 3, 19, 21), dtype, layout, hybrid, prediction))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("shape", [(3, 5), (2, 1, 9), (2, 4, 8, 32), (1, 1030, 2, 2), (2, 2, 1, 1), (1, 2, 3, 4, 5)])
def test_diffusion_loss_shapes(shape, hybrid, layout):
    loss_agrees(loss_case(shape, torch.float32, layout, hybrid, 2))


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("kind", ["transposed", "sliced", "expanded", "channels"])
def test_diffusion_loss_strides(kind, hybrid):
    loss_agrees(loss_case((2, 4, 5, 6), torch.float32, None, hybrid, 2, kind))


def test_diffusion_loss_of_many_partial_sums():
    """More sums a sample than the second kernel reads at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modules["diffusion_loss"], "FINISH_BLOCK", 4)
        loss_agrees(loss_case((2, 3, 64, 71), torch.float32, "contiguous", False, 0))


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("prediction", range(4))
@pytest.mark.parametrize("bad", [-1, STEPS, 2**40, -(2**60)])
def test_diffusion_loss_of_a_timestep_out_of_range_is_nan(bad, prediction, hybrid):
    arguments = list(loss_case((3, 2, 5), torch.float32, "contiguous", hybrid, prediction))
    arguments[3][1] = bad
    losses, gradient = (
        kernels.diffusion_loss_fwd(*arguments),
        kernels.diffusion_loss_bwd(torch.ones(3), *arguments),
    )
    for result in (losses, gradient):
        assert result[1].isnan().all() and result[0].isfinite().all() and result[2].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("n", [0, 1])
def test_diffusion_loss_not_finite(n, half, value):
    """Also where the likelihood is clamped: a minimum that swallowed NaN would hide a broken model."""
    arguments = loss_case((3, 2, 5, 3), torch.float32, "contiguous", True, 0)
    arguments[0][n, 2 * half, 3, 1] = value
    losses = kernels.diffusion_loss_fwd(*arguments)
    if n == 0 or value != value:
        assert not losses[n].isfinite()
    others = [k for k in range(3) if k != n]
    assert losses[others].isfinite().all()


def test_diffusion_loss_nothing():
    for shape, hybrid in (((2, 3, 0), False), ((0, 3, 4), True)):
        x0, t = torch.zeros(shape), torch.zeros(shape[0]).long()
        model = torch.zeros(shape[0], 2 * shape[1], *shape[2:]) if hybrid else x0
        arguments = (model, x0, x0, t, *tables(), None, torch.zeros(STEPS, 3) if hybrid else None, 0, 1.0)
        losses = kernels.diffusion_loss_fwd(*arguments)
        assert losses.shape == shape[:1] and losses.isnan().all()
        assert kernels.diffusion_loss_bwd(losses, *arguments).shape == model.shape


def test_reasons_of_the_training_ops():
    x, byte, t = torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.uint8), torch.zeros(1).long()
    dtype = ["the kernels take float64, float32, bfloat16 and float16, not torch.uint8"]
    q_sample = modules["q_sample"].reasons
    assert q_sample("q_sample_fwd", x, t, x, x, None, t, 0, -1) == []
    assert q_sample("q_sample_fwd", x, t, x, x, byte, None, 0, -1) == dtype
    assert q_sample("q_sample_bwd", None, x, t, x, x, 2, True, True) == []
    assert q_sample("q_sample_bwd", byte, None, t, x, x, 2, True, True) == dtype
    loss = modules["diffusion_loss"].reasons
    assert loss("diffusion_loss_fwd", x, x, x, t, x, x, None, None, 0, 1.0) == []
    assert loss("diffusion_loss_bwd", byte, x, x, x, t, x, x, None, None, 0, 1.0) == dtype
    assert loss("diffusion_loss_fwd", x, x, x, t, x, x, byte, None, 0, 1.0) == dtype


def test_the_device_is_the_one_under_test():
    assert moved(torch.zeros(1), DEVICE).device.type == DEVICE
