"""`group_norm` with SiLU, and with scale and shift, inference and training: U-Net shapes, eager and compiled torch beside it.

The plain functions are written as a user writes them. The floor is a clone of the input: one read and one write of the same size.
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.ops import group_norm

from ..cases import DTYPES, Case, Provider, Workload, compiled, random_tensor
from ..verify import Values

GROUPS = 32
SHAPES = ((4, 128, 32, 32), (4, 256, 16, 16), (2, 320, 64, 64), (8, 512, 32, 32), (1, 128, 256, 256))
LAYOUTS = ("NCHW", "NHWC")
MODES = ("silu", "scale_shift", "backward")
TWO_INPUTS = (
    (4, 384, 16, 16),
    (4, 384, 32, 32),
    (2, 960, 32, 32),
)  # of up-blocks: two thirds of the channels, and what is beside them
GROUP_OF = {
    "silu": "GroupNorm + SiLU",
    "scale_shift": "GroupNorm, scale and shift + SiLU",
    "backward": "GroupNorm + SiLU, forward and backward",
    "two_inputs": "concatenation, GroupNorm + SiLU",
}
GPU_SPOT_CHECKS = ((2, 320, 64, 64), (8, 512, 32, 32))  # fp32 and fp16 on a GPU, unless the run is full

# Nominal arithmetic per element: sums 3, normalise and affine 4, SiLU 4; modulation 3; backward three times the forward.
FLOPS_PER_ELEMENT = {"silu": 11, "scale_shift": 14, "backward": 44, "two_inputs": 11}
# Passes over memory at the least: forward reads x and writes y; backward reads x and dy and writes dx.
PASSES = {"silu": 2, "scale_shift": 2, "backward": 5, "two_inputs": 2}

Function = Callable[..., Tensor]


def plain_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight, bias))


def plain_scale_shift(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    y = F.group_norm(x, GROUPS, weight, bias)
    return F.silu(y * (1 + scale[:, :, None, None]) + shift[:, :, None, None])


def fused_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return group_norm(x, GROUPS, weight, bias, activation="silu")


def fused_scale_shift(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return group_norm(x, GROUPS, weight, bias, scale=scale, shift=shift, activation="silu")


def plain_two_inputs(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return plain_silu(torch.cat([x, skip], 1), weight, bias)


def fused_two_inputs(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return group_norm(x, GROUPS, weight, bias, skip=skip, activation="silu")


FUNCTIONS = {
    "silu": (plain_silu, fused_silu),
    "scale_shift": (plain_scale_shift, fused_scale_shift),
    "backward": (plain_silu, fused_silu),
    "two_inputs": (plain_two_inputs, fused_two_inputs),
}


def with_backward(function: Function, grad_output: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    """The output of ``function`` and its gradients in every argument."""

    def forward_and_backward(*inputs: Tensor) -> tuple[Tensor, ...]:
        output = function(*inputs)
        return output, *torch.autograd.grad(output, inputs, grad_output)

    return forward_and_backward


def cases(device: torch.device, full: bool) -> list[Case]:
    """5 shapes x 2 layouts x dtypes x 3 modes; two inputs in 3 shapes."""
    return [
        Case(
            "group_norm",
            mode,
            shape,
            dtype,
            functools.partial(build, mode, shape, layout, dtype, device),
            GROUP_OF[mode],
            layout=layout,
        )
        for mode, shapes in (*((mode, SHAPES) for mode in MODES), ("two_inputs", TWO_INPUTS))
        for shape in shapes
        for layout in LAYOUTS
        for dtype in _dtypes(device, full, shape)
    ]


def _dtypes(device: torch.device, full: bool, shape: tuple[int, ...]) -> tuple[str, ...]:
    if device.type != "cuda":
        return ("fp32", "bf16")
    return ("bf16", "fp32", "fp16") if full or shape in GPU_SPOT_CHECKS else ("bf16",)


def build(
    mode: str, shape: tuple[int, ...], layout: str, dtype: str, device: torch.device, allow_compile: bool
) -> Workload:
    grad = mode == "backward"
    plain, fused = FUNCTIONS[mode]
    inputs = make_inputs(mode, shape, layout, dtype, device)
    grad_output = random_tensor(shape, device, dtype, seed=9, layout=layout)
    if grad:
        inputs = [t.requires_grad_() for t in inputs]

    functions: dict[str, Function] = {"eager": plain}
    notes: list[str] = []
    if function := compiled(plain, inputs, allow_compile, notes, grad=grad):
        functions["compile"] = function
    functions["fastgen"] = fused

    def prepare(function: Function, grad_output: Tensor = grad_output) -> Callable[..., tuple[Tensor, ...]]:
        return with_backward(function, grad_output) if grad else lambda *args: (function(*args),)

    calls = {name: functools.partial(prepare(function), *inputs) for name, function in functions.items()}

    def expected() -> tuple[Tensor, ...]:
        wide = [t.detach().double().requires_grad_(grad) for t in inputs]
        with torch.set_grad_enabled(grad):
            return prepare(plain, grad_output.double())(*wide)

    providers = [Provider(name, call, "fastgen" if name == "fastgen" else "baseline") for name, call in calls.items()]
    whole = random_tensor(shape, device, dtype, seed=0, layout=layout)
    providers.append(Provider("copy", whole.clone, "floor"))
    elements = math.prod(shape)
    return Workload(
        providers,
        (Values(expected, yardstick="eager"),),
        min_bytes=PASSES[mode] * elements * DTYPES[dtype].itemsize,
        flops=FLOPS_PER_ELEMENT[mode] * elements,
        grad=grad,
        notes=notes,
    )


def make_inputs(mode: str, shape: Sequence[int], layout: str, dtype: str, device: torch.device) -> list[Tensor]:
    """x off centre, weight near 1, and, for the modulated mode, scale and shift [N, C]; two inputs have C channels together."""
    n, c = shape[:2]
    parts = [2 * c // 3, c - 2 * c // 3] if mode == "two_inputs" else [c]
    inputs = [
        *(
            random_tensor((n, part, *shape[2:]), device, dtype, seed=6 * i, layout=layout, mean=0.3, deviation=1.5)
            for i, part in enumerate(parts)
        ),
        random_tensor((c,), device, dtype, seed=1, mean=1.0, deviation=0.2),
        random_tensor((c,), device, dtype, seed=2, deviation=0.2),
    ]
    if mode == "scale_shift":
        inputs += [random_tensor((n, c), device, dtype, seed=3 + k, deviation=0.3) for k in range(2)]
    return inputs
