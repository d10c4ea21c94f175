"""The captured loop without a GPU: what it refuses, and how it captures; what it does with one is in tests/gpu."""

import contextlib

import numpy as np
import pytest
import torch

from fastgen.samplers import CapturedSampler, sample
from fastgen.samplers import graph as graph_module
from fastgen.samplers.graph import capture


def test_needs_cuda():
    with pytest.raises(ValueError, match="needs a CUDA device, got cpu"):
        CapturedSampler(lambda x, t: x, (2, 1, 4, 4), "ddim", steps=3)


@pytest.mark.parametrize("name", ["generator", "callback", "noise", "seeds", "mask"])
def test_refuses_what_a_graph_cannot_hold(name):
    with pytest.raises(ValueError, match=f"takes no .*{name}"):
        CapturedSampler(lambda x, t: x, (2, 1, 4, 4), "ddim", steps=3, **{name: None})


class Cuda:
    """As much of torch.cuda as a capture touches: which device and stream are current, and a graph that may fail at its end."""

    def __init__(self, monkeypatch, fails=False):
        self.device_index, self.stream_now, self.fails = 0, "the caller's", fails
        for name in ("device", "stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.Stream(self.stream_now))
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "stream_now", stream.name))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.Stream(f"own of {device}"))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "a graph")

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def device(self, device):
        before, self.device_index = self.device_index, device.index
        try:
            yield
        finally:
            self.device_index = before

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.stream_now = self.stream_now, stream.name
        try:
            yield
        finally:
            self.stream_now = before

    @contextlib.contextmanager
    def graph(self, graph, stream):
        before, self.stream_now = self.stream_now, stream.name
        try:
            yield
        finally:
            if self.fails:  # as torch: the stream is put back after this
                raise RuntimeError("capture_end failed")
            self.stream_now = before


DEVICE = torch.device("cuda", 1)


def test_capture_is_on_its_own_device_and_stream(monkeypatch):
    cuda, seen = Cuda(monkeypatch), []

    def work():
        seen.append((cuda.device_index, cuda.stream_now, torch.is_grad_enabled()))
        return torch.tensor(len(seen))

    graph, result = capture(work, DEVICE, warm_up=2)
    assert graph == "a graph" and result == 3
    assert seen == [(1, "own of cuda:1", False)] * 3
    assert (cuda.device_index, cuda.stream_now) == (0, "the caller's")


@pytest.mark.parametrize("where", ["the end of the capture", "the capture", "the warm-up"])
def test_the_callers_stream_is_back_where_a_capture_fails(where, monkeypatch):
    cuda, calls = Cuda(monkeypatch, fails=where == "the end of the capture"), []

    def work():
        calls.append(1)
        if where == "the warm-up" or (where == "the capture" and len(calls) == 2):
            raise RuntimeError("the model's own error")
        return torch.zeros(())

    message = "^the model's own error" if where == "the warm-up" else "could not be captured.*sample\\(\\) does without"
    with pytest.raises(RuntimeError, match=message):
        capture(work, DEVICE, warm_up=1)
    assert (cuda.device_index, cuda.stream_now) == (0, "the caller's")


@pytest.mark.parametrize("solver", ["ddpm", "dpmpp_2m"])
def test_what_is_captured_is_the_trajectory_of_sample(solver, monkeypatch):
    """A graph that runs its work again on replay, on the CPU: the same images as `sample`, which needs no graph."""

    class Replayed:
        def __init__(self, work, result):
            self.work, self.result = work, result

        def replay(self):
            self.result.copy_(self.work())

    def run_again(work, device, *, warm_up):
        result = work()
        return Replayed(work, result), result

    monkeypatch.setattr(graph_module, "capture", run_again)
    monkeypatch.setattr(graph_module, "_check_cuda", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())

    def model(x, t):
        return torch.tanh(x) * (1 + t.to(x.dtype).reshape(-1, 1, 1, 1) / 1000)

    captured = CapturedSampler(model, (3, 2, 4, 4), solver, steps=4, device="cpu")
    for seeds in ([1, 2, 3], np.arange(7, 10)):
        expected = sample(model, (3, 2, 4, 4), solver, steps=4, seeds=seeds, progress=False)
        assert torch.equal(captured(seeds), expected)
    with pytest.raises(ValueError, match="one a sample"):
        captured([1, 2])
