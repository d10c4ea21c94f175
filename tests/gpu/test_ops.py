"""The op families on a CUDA device: what the CPU tests ask, asked of the GPU."""

import pytest
import torch

from fastgen import _dispatch
from fastgen._schema import PREDICTION_TYPES
from fastgen.ops import diffusion_loss, group_norm, philox_normal, q_sample, sampler_step
from fastgen.reference._layout import output_strides
from fastgen.samplers import DDIM, DDPM

from ..backends import requires_cuda
from ..ops import diffusion_loss_cases as loss_cases
from ..ops.group_norm_cases import SHAPES, gradients, plain
from ..ops.numerics import LAYOUTS, assert_bar, laid_out, randn
from ..ops.q_sample_cases import STEPS, TARGETS, results, tables, timesteps
from ..ops.q_sample_cases import plain as plain_noising

pytestmark = [pytest.mark.gpu, requires_cuda]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def cuda_parameters(shape, dtype) -> dict[str, torch.Tensor]:
    n, c = shape[:2]
    sizes = {"weight": (c,), "bias": (c,), "channel_bias": (n, c), "scale": (n, c), "shift": (n, c)}
    return {name: randn(*size, seed=i + 10, dtype=dtype).cuda() for i, (name, size) in enumerate(sizes.items())}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "groups"), [*SHAPES, ((1, 128, 256, 256), 32)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_group_norm_values_and_gradients(dtype, shape, groups, layout):
    x = laid_out((3 * randn(*shape) + 1).to(dtype), layout).cuda()
    params, grad = cuda_parameters(shape, dtype), randn(*shape, seed=3, dtype=dtype).cuda()
    actual = gradients(group_norm, x, groups, params, "silu", grad)
    beside = gradients(plain, x, groups, params, "silu", grad)
    wide = {name: p.double() for name, p in params.items()}
    exact = gradients(plain, x.double(), groups, wide, "silu", grad.double())
    for a, b, e in zip(actual, beside, exact, strict=True):
        assert_bar(a, b, e, 1e-12 if dtype == torch.float64 else 1e-6)
    assert list(actual[0].stride()) == output_strides(x)
    again = gradients(group_norm, x, groups, params, "silu", grad)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_group_norm_gradcheck_and_opcheck(layout):
    x = laid_out(randn(2, 6, 3, 2), layout).cuda().requires_grad_()
    params = cuda_parameters((2, 6, 3, 2), torch.float64)
    assert torch.autograd.gradcheck(lambda t: group_norm(t, 3, **params, activation="silu"), (x,), nondet_tol=0.0)
    assert torch.autograd.gradcheck(lambda t: torch.cat([group_norm(t, 3), t], 1)[:, 2:7], (x,))
    values = list(params.values())
    torch.library.opcheck(torch.ops.fastgen.group_norm_fwd.default, (x.detach(), 3, *values, 1e-5, 1))


def test_a_compiled_kernel_took_the_call():
    """A fallback to the reference would pass every test of values."""
    x = torch.randn(2, 8, 4, 4, device="cuda")
    reasons = _dispatch.cuda_reasons("group_norm_fwd", x, 4, None, None, None, None, None, 1e-5, 0)
    assert not all(reasons.values()), reasons


@pytest.mark.parametrize("shape", [(3, 1000), (2, 3, 65, 67), (1, 5), (4, 3, 64, 64)])
@pytest.mark.parametrize("step", [0, 7, -1])
def test_philox_is_the_same_on_every_device_and_backend(shape, step):
    seeds = torch.tensor([1, -5, 2**40 + 3, 9][: shape[0]])
    cpu = philox_normal(seeds, shape, step)
    for backend in _dispatch.CUDA_BACKENDS:
        if not backend.reasons("philox_normal", seeds.cuda(), list(shape), step):
            gpu = backend.kernel("philox_normal")(seeds.cuda(), list(shape), step)
            torch.testing.assert_close(gpu.cpu(), cpu, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sampler_step_is_that_of_the_cpu(dtype, layout):
    shape = (2, 3, 19, 21)
    plan = DDPM().plan(10)
    sample, model = laid_out(randn(*shape), layout).to(dtype), randn(*shape, seed=1).to(dtype)
    cpu = plan.to("cpu", dtype).step(model, 3, sample, uncond=model / 2, seeds=[4, 5])
    gpu = plan.to("cuda", dtype).step(
        model.cuda(), 3, sample.cuda(), uncond=model.cuda() / 2, seeds=torch.tensor([4, 5]).cuda()
    )
    tolerance = {torch.float64: 1e-6, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(gpu.cpu(), cpu, rtol=tolerance, atol=tolerance)
    assert gpu.stride() == cpu.stride()


def test_a_loop_without_synchronisation_and_in_a_graph():
    shape, seeds = (2, 3, 32, 32), torch.tensor([1, 2]).cuda()
    plan = DDIM(eta=1.0).plan(8).to("cuda")
    start, output = torch.randn(shape, device="cuda"), torch.randn(shape, device="cuda")

    def loop() -> torch.Tensor:
        x = start
        for i in range(len(plan)):
            x = plan.step(output, i, x, seeds=seeds)
        return x

    expected = loop()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loop()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loop()
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)


def test_sampler_step_gradient():
    x = randn(2, 3, 4, 4).cuda().requires_grad_()
    table = DDPM().plan(5).table.cuda()
    assert torch.autograd.gradcheck(lambda t: sampler_step(t, t * 2, table, 2, seeds=[1, 2]), (x,))


def test_autocast_takes_norms_to_float32():
    x = torch.randn(2, 8, 4, 4, device="cuda", dtype=torch.float16, requires_grad=True)
    grad = torch.randn(2, 8, 4, 4, device="cuda")
    with torch.autocast("cuda", dtype=torch.float16):
        y, beside = group_norm(x, 4), torch.nn.functional.group_norm(x, 4)
    assert y.dtype == beside.dtype == torch.float32
    torch.testing.assert_close(y, beside, rtol=1e-6, atol=1e-6)  # nothing was rounded to float16
    torch.testing.assert_close(*(torch.autograd.grad(t, x, grad)[0] for t in (y, beside)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_q_sample_values_and_noise(dtype, target, layout):
    shape = (3, 4, 33, 21)
    x0, noise = (laid_out(randn(*shape, seed=k), layout).to(dtype).cuda() for k in range(2))
    t, (alphas, sigmas) = timesteps(3).cuda(), (table.cuda() for table in tables())
    actual = results(q_sample, x0, t, alphas, sigmas, noise, target=target)
    beside = plain_noising(x0, t, alphas, sigmas, noise, target)
    exact = plain_noising(x0.double(), t, alphas, sigmas, noise.double(), target)
    for a, b, e in zip(actual, beside, exact, strict=True):
        assert list(a.stride()) == output_strides(x0)
        assert_bar(a, b, e, 1e-14 if dtype == torch.float64 else 2e-7)
    drawn = results(q_sample, x0, t, alphas, sigmas, seeds=[1, -2, 3], step=4, target=target)
    on_cpu = results(q_sample, x0.cpu(), t.cpu(), *tables(), seeds=[1, -2, 3], step=4, target=target)
    tolerance = {torch.float64: 1e-6, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for a, b in zip(drawn, on_cpu, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("target", TARGETS)
def test_q_sample_gradcheck(target):
    x0, noise = (randn(2, 3, 2, 2, seed=k).cuda().requires_grad_() for k in range(2))
    t, (alphas, sigmas) = timesteps(2).cuda(), (table.cuda() for table in tables())
    assert torch.autograd.gradcheck(lambda a, b: q_sample(a, t, alphas, sigmas, b, return_target=target), (x0, noise))


@pytest.mark.parametrize("bad", [-1, STEPS, 2**40])
def test_q_sample_of_a_timestep_out_of_range_is_nan_and_waits_for_nothing(bad):
    x0, t = randn(3, 4, 5).cuda(), timesteps(3)
    t[1] = bad
    t, (alphas, sigmas) = t.cuda(), (table.cuda() for table in tables())
    torch.cuda.set_sync_debug_mode("error")
    try:
        x_t = q_sample(x0, t, alphas, sigmas, x0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x_t[1].isnan().all() and x_t[::2].isfinite().all()


def loss_and_gradient(function, model):
    leaf = model.detach().requires_grad_()
    losses = function(leaf)
    return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_diffusion_loss_values_and_gradients(dtype, prediction, hybrid, layout):
    on_cpu = loss_cases.make((3, 4, 33, 21), [dtype], [layout], hybrid, prediction)
    t, named = loss_cases.timesteps(3), loss_cases.tables()
    weights, bound = named.pop("weights"), named.pop("vlb_table")
    options = {"weights": weights, "vlb_table": bound if hybrid else None}
    on_gpu = {name: None if value is None else value.cuda() for name, value in {**named, **options, "t": t}.items()}
    model, x0, noise = (v.cuda() for v in on_cpu)

    def fused(m):
        return diffusion_loss(m, x0, noise, **on_gpu, prediction_type=prediction, reduction="none")

    def exact(m):
        arguments = (m, *(v.double() for v in on_cpu[1:]), t, prediction)
        if hybrid:
            return loss_cases.plain_hybrid(*arguments, loss_cases.BETAS["linear"], 1.0, **named, weights=weights)
        return loss_cases.plain_simple(*arguments, **named, weights=weights)

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
def test_diffusion_loss_waits_for_nothing(hybrid):
    model, x0, noise = (v.cuda() for v in loss_cases.make((3, 4, 8, 8), [torch.float32], ["contiguous"], hybrid))
    named = {name: table.cuda() for name, table in loss_cases.tables().items() if hybrid or name != "vlb_table"}
    t, leaf = loss_cases.timesteps(3).cuda(), model.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        diffusion_loss(leaf, x0, noise, t, **named).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert leaf.grad.isfinite().all()


def test_compiled_kernels_took_the_training_ops():
    x, t, table = (
        torch.randn(2, 3, 4, device="cuda"),
        torch.zeros(2, device="cuda").long(),
        torch.ones(5, device="cuda"),
    )
    for op, arguments in (
        ("q_sample_fwd", (x, t, table, table, x, None, 0, -1)),
        ("diffusion_loss_fwd", (x, x, x, t, table, table, None, None, 0, 1.0)),
    ):
        reasons = _dispatch.cuda_reasons(op, *arguments)
        assert not all(reasons.values()), reasons
