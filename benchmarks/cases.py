"""What a benchmark case is: an op family, a mode, a shape, a layout and a dtype, and the providers that compete on it.

A `bench_*.py` file offers `cases(device, full) -> list[Case]`; a case builds its tensors only when its turn comes.
"""

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from .verify import Check

MODULES = (
    "benchmarks.ops.bench_dispatch",
    "benchmarks.ops.bench_philox_normal",
    "benchmarks.ops.bench_sampler_step",
    "benchmarks.ops.bench_q_sample",
    "benchmarks.ops.bench_diffusion_loss",
    "benchmarks.samplers.bench_schedulers",
    "benchmarks.samplers.bench_k_diffusion",
    "benchmarks.ops.bench_group_norm",
    "benchmarks.models.bench_unet",
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Role = Literal["fastgen", "baseline", "floor"]


@dataclass(frozen=True)
class Provider:
    """One competitor. ``call`` is what a round times; a floor is a limit of the machine, not a competitor."""

    name: str
    call: Callable[[], Any]
    role: Role = "baseline"


@dataclass
class Workload:
    """A case with its tensors in memory.

    ``providers`` are called in this order in every round. ``check`` compares outputs (see `verify.py`) and runs before timing.
    ``min_bytes`` is the least traffic the mathematics allows (each input read once, each output written once), ``flops`` a
    nominal count, both for one call. ``notes`` says what could not be measured and why.
    """

    providers: list[Provider]
    check: Callable[[], list[Check]]
    min_bytes: int
    flops: int
    grad: bool = False
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """The name of a measurement and how to set it up. ``build(allow_compile)`` makes the tensors and the providers."""

    family: str
    mode: str
    shape: tuple[int, ...]
    dtype: str
    build: Callable[[bool], Workload] = field(compare=False)
    layout: str = "NCHW"
    clock: Literal["device", "host"] = "device"  # host: what one call costs the Python thread, on any device

    @property
    def shape_text(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def id(self) -> str:
        return f"{self.family}/{self.mode}/{self.shape_text}/{self.layout}/{self.dtype}"


def collect(device: torch.device, full: bool, pattern: str | None = None) -> tuple[list[Case], list[str]]:
    """All cases of :data:`MODULES` whose id matches ``pattern``, and a line for each module that cannot run here."""
    found: list[Case] = []
    notes: list[str] = []
    for name in MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            notes.append(f"{name} is left out: {error}")
            continue
        found += module.cases(device, full)
    if pattern is not None:
        found = [case for case in found if re.search(pattern, case.id)]
    return found, notes


def random_tensor(
    shape: Sequence[int],
    device: torch.device,
    dtype: str,
    seed: int,
    *,
    layout: str = "NCHW",
    mean: float = 0.0,
    deviation: float = 1.0,
) -> Tensor:
    """Normal random data, never zeros; the same for the same seed, on every device."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(tuple(shape), generator=generator) * deviation + mean
    tensor = tensor.to(device=device, dtype=DTYPES[dtype])
    return tensor.contiguous(memory_format=torch.channels_last) if layout == "NHWC" else tensor


def compiled(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: bool) -> Callable[..., Tensor]:
    """``torch.compile`` in its default mode, compiled now and for exactly these inputs, the backward too if ``grad``.

    Raises:
        Exception: whatever the compiler raises; it never falls back to eager silently.
    """
    torch._dynamo.reset()  # else many shapes of one function hit the recompilation limit
    result = torch.compile(function, dynamic=False, fullgraph=True)
    with torch.set_grad_enabled(grad):
        output = result(*inputs)
        if grad:
            torch.autograd.grad(output, inputs, torch.ones_like(output))
    return result
