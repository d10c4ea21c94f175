"""Nearest upsampling by two and the 3x3 convolution after it, as on a U-Net's way up, beside the same in eager and compiled torch.

The baselines run in the layout of the case; eager also in the other one. The floor is a matrix product of as many multiply-adds as
the convolution of the large image has.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.ops import upsample_conv2d

from ..cases import Case, Provider, Workload, compiled, random_tensor
from ..verify import Values

# [N, C, H, W] of the small image, as many output channels: the ways up of U-Nets of 128 to 1280 channels, and of a decoder.
SHAPES = (
    (4, 256, 4, 4), (4, 256, 8, 8), (4, 256, 16, 16), (1, 1280, 8, 8), (2, 640, 16, 16), (1, 320, 32, 32), (1, 128, 64, 64),
)  # fmt: skip
LAYOUTS = ("NCHW", "NHWC")
BOUND = 2e-5  # of Winograd's algorithms, in fp32


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def cases(device: torch.device, full: bool) -> list[Case]:
    if device.type != "cpu":
        return []  # the library's convolution takes the call there
    listed = [(shape, layout, dtype) for dtype in ("fp32", "bf16") for shape in SHAPES for layout in LAYOUTS]
    return [
        Case(
            "upsample_conv2d", "nearest", shape, dtype, functools.partial(build, shape, layout, dtype, device),
            f"nearest upsampling + conv3x3, {dtype}", layout=layout,
        )
        for shape, layout, dtype in listed
        if full or dtype == "fp32"
    ]  # fmt: skip


def build(
    shape: tuple[int, int, int, int], layout: str, dtype: str, device: torch.device, allow_compile: bool
) -> Workload:
    n, c, height, width = shape
    make = functools.partial(random_tensor, device=device, dtype=dtype)
    x, bias = make(shape, seed=0, layout=layout), make((c,), seed=1)
    weight = make((c, c, 3, 3), seed=2, layout=layout, deviation=(9 * c) ** -0.5)
    inputs, other = (x, weight, bias), torch.contiguous_format if layout == "NHWC" else torch.channels_last
    notes: list[str] = []
    calls: dict[str, Callable[[], Tensor]] = {
        "eager": functools.partial(plain, *inputs),
        "eager, other layout": functools.partial(
            plain, x.contiguous(memory_format=other), weight.contiguous(memory_format=other), bias
        ),
    }
    if function := compiled(plain, inputs, allow_compile, notes):
        calls["compile"] = functools.partial(function, *inputs)
    calls["fastgen"] = functools.partial(upsample_conv2d, *inputs)
    providers = [
        Provider(name, functools.partial(as_outputs, call), "fastgen" if name == "fastgen" else "baseline")
        for name, call in calls.items()
    ]
    left = random_tensor((4 * n * height * width, 9 * c), device, dtype, 6)
    providers.append(
        Provider("matrix product", functools.partial(torch.matmul, left, weight.reshape(c, -1).t()), "floor")
    )

    def expected() -> tuple[Tensor, ...]:
        return (plain(*(t.double() for t in inputs)),)

    judged = Values(expected, tolerance=BOUND) if dtype == "fp32" else Values(expected, yardstick="eager")
    return Workload(
        providers,
        (judged,),
        min_bytes=(5 * x.numel() + weight.numel()) * x.element_size(),
        flops=2 * 9 * 4 * n * height * width * c * c,
        notes=notes,
    )


def as_outputs(call: Callable[[], Tensor]) -> tuple[Tensor, ...]:
    return (call(),)
