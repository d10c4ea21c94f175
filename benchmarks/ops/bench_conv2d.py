"""A residual block's norm, SiLU, 3x3 convolution and residual add in one chain, beside the same in eager and compiled torch.

The baselines run in the layout of the case; eager also in the other one, since which is faster depends on the shape. The floor is
a matrix product of as many multiply-adds as the direct convolution has.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.ops import conv2d, group_norm_affine

from ..cases import Case, Provider, Workload, compiled, random_tensor
from ..verify import Values

GROUPS = 32
# [N, C, H, W], as many output channels: the levels of U-Nets of 128 to 1280 channels.
SHAPES = (
    (4, 128, 16, 16), (1, 128, 64, 64), (4, 128, 32, 32), (4, 256, 16, 16), (1, 256, 32, 32), (1, 320, 64, 64), (2, 640, 32, 32),
    (1, 640, 16, 16), (1, 1280, 16, 16),
)  # fmt: skip
LAYOUTS = ("NCHW", "NHWC")
BOUND = 2e-5  # of Winograd's algorithms, in fp32


def plain(x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return F.conv2d(F.silu(F.group_norm(x, GROUPS, gamma, beta)), weight, bias, padding=1) + residual


def fused(x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    a, c = group_norm_affine(x, GROUPS, gamma, beta)
    return conv2d(x, weight, bias, padding=1, input_scale=a, input_shift=c, activation="silu", residual=residual)


def cases(device: torch.device, full: bool) -> list[Case]:
    if device.type != "cpu":
        return []  # the library's convolution takes the call there
    listed = [(shape, layout, dtype) for dtype in ("fp32", "bf16") for shape in SHAPES for layout in LAYOUTS]
    return [
        Case(
            "conv2d", "chain", shape, dtype, functools.partial(build, shape, layout, dtype, device),
            f"GroupNorm + SiLU + conv3x3 + residual, {dtype}", layout=layout,
        )
        for shape, layout, dtype in listed
        if full or dtype == "fp32" or layout == "NHWC"
    ]  # fmt: skip


def build(
    shape: tuple[int, int, int, int], layout: str, dtype: str, device: torch.device, allow_compile: bool
) -> Workload:
    n, c, height, width = shape

    def make(seed: int, *size: int, deviation: float = 1.0, mean: float = 0.0) -> Tensor:
        return random_tensor(
            size, device, dtype, seed, layout=layout if len(size) == 4 else "NCHW", deviation=deviation, mean=mean
        )

    x, residual = make(0, *shape, mean=0.3, deviation=1.5), make(1, *shape)
    gamma, beta, bias = make(2, c, mean=1.0, deviation=0.2), make(3, c, deviation=0.2), make(4, c)
    weight = make(5, c, c, 3, 3, deviation=(9 * c) ** -0.5)
    inputs = (x, gamma, beta, weight, bias, residual)
    other = [t.contiguous(memory_format=OTHER[layout]) if t.dim() == 4 else t for t in inputs]
    notes: list[str] = []
    calls: dict[str, Callable[[], Tensor]] = {
        "eager": functools.partial(plain, *inputs),
        "eager, other layout": functools.partial(plain, *other),
    }
    if function := compiled(plain, inputs, allow_compile, notes):
        calls["compile"] = functools.partial(function, *inputs)
    calls["fastgen"] = functools.partial(fused, *inputs)
    providers = [
        Provider(name, functools.partial(as_outputs, call), "fastgen" if name == "fastgen" else "baseline")
        for name, call in calls.items()
    ]
    left, right = random_tensor((n * height * width, 9 * c), device, dtype, 6), weight.reshape(c, -1)
    providers.append(Provider("matrix product", functools.partial(torch.matmul, left, right.t()), "floor"))

    def expected() -> tuple[Tensor, ...]:
        return (plain(*(t.double() for t in inputs)),)

    judged = Values(expected, tolerance=BOUND) if dtype == "fp32" else Values(expected, yardstick="eager")
    size = x.element_size()
    return Workload(
        providers,
        (judged,),
        min_bytes=(3 * x.numel() + weight.numel()) * size,
        flops=2 * 9 * n * height * width * c * c,
        notes=notes,
    )


OTHER = {"NCHW": torch.channels_last, "NHWC": torch.contiguous_format}


def as_outputs(call: Callable[[], Tensor]) -> tuple[Tensor, ...]:
    return (call(),)
