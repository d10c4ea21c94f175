"""What the examples share: a model as it is, accelerated and restored, on the same input."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastgen


def random_weights(model: nn.Module) -> nn.Module:
    """``model`` in evaluation mode, random numbers where it begins with zeros: else what it adds is nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    return model.eval()


@torch.no_grad()
def compare(model: nn.Module, call: Callable[[Any], Tensor], calls: int = 3) -> None:
    """Print the report, the time of a call before and after `fastgen.accelerate`, the difference, and what `restore` does."""
    before, plain = _timed(model, call, calls)
    fastgen.accelerate(model)
    fastgen.report(model)
    _, first = _timed(model, call, 1)
    after, fast = _timed(model, call, calls)
    print(f"a call {1000 * plain:.0f} ms, accelerated {1000 * fast:.0f} ms: {plain / fast:.2f} times as fast")
    print(f"the first accelerated call {1000 * first:.0f} ms: it prepares the weights")
    print(f"difference: {(after - before).norm() / before.norm():.1e} of the norm of the output")
    fastgen.restore(model)
    print(f"restored: the same bits {torch.equal(call(model), before)}")


def _timed(model: nn.Module, call: Callable[[Any], Tensor], calls: int) -> tuple[Tensor, float]:
    if calls > 1:
        call(model)
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        output = call(model)
        times.append(time.perf_counter() - began)
    return output, sorted(times)[len(times) // 2]
