"""Samplers on the GPU: the CPU's images for the same seeds, and the whole loop in one CUDA graph."""

import pytest
import torch

from fastgen.samplers import DDIM, SOLVERS, CapturedSampler, sample

from ..backends import requires_cuda

pytestmark = [pytest.mark.gpu, requires_cuda]
SHAPE = (3, 4, 16, 16)


def model(x, t):
    return torch.tanh(x) * (1 + t.to(x.dtype).reshape(-1, 1, 1, 1) / 1000)


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_same_images_as_on_the_cpu(name):
    kwargs = {"steps": 6, "seeds": [1, 2, 3], "progress": False}
    cpu = sample(model, SHAPE, name, **kwargs)
    gpu = sample(model, SHAPE, name, device="cuda", **kwargs).cpu()
    assert (cpu - gpu).abs().max() <= 1e-3 * cpu.abs().max().clamp_min(1)


@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m", "heun", "unipc", "flow_euler"])
def test_captured(name):
    captured = CapturedSampler(model, SHAPE, name, steps=8, device="cuda")
    for seeds in ([1, 2, 3], [7, 8, 9]):
        expected = sample(model, SHAPE, name, steps=8, seeds=seeds, device="cuda", progress=False)
        torch.testing.assert_close(captured(seeds), expected, rtol=1e-5, atol=1e-5)


def test_steps_of_a_plan_without_synchronisation_and_in_a_graph():
    seeds = torch.tensor([1, 2]).cuda()
    plan = DDIM(eta=1.0).plan(8).to("cuda")
    start, output = (torch.randn(2, 3, 32, 32, device="cuda") for _ in range(2))

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


def test_a_model_that_waits_is_refused():
    def waits(x, t):
        return x * float(x.mean().item())

    with pytest.raises(RuntimeError, match="could not be captured"):
        CapturedSampler(waits, SHAPE, "ddim", steps=3, device="cuda")
