"""`rms_norm` at the sizes of denoising-diffusion-pytorch's U-Net and of transformers, inference and training, beside torch.

Over the channels of images in both layouts, alone (before attention) and with scale, shift and SiLU (its blocks); over the last
dimension as torch has it; eager and compiled. The plain functions are written as a user writes them. The floor is a clone of
the input.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.ops import rms_norm

from ..cases import DTYPES, Case, Provider, Workload, compiled, random_tensor
from ..verify import Values

IMAGES = ((4, 64, 64, 64), (16, 128, 32, 32), (16, 256, 16, 16), (16, 512, 8, 8))
TOKENS = ((2, 4096, 320), (2, 512, 1536), (4, 8, 1024, 64))
GROUP_OF = {
    "channels": "RMSNorm over channels",
    "block": "RMSNorm over channels, scale and shift + SiLU",
    "tokens": "RMSNorm over the last dimension",
    "channels_backward": "RMSNorm over channels, forward and backward",
    "block_backward": "RMSNorm over channels, scale and shift + SiLU, forward and backward",
    "tokens_backward": "RMSNorm over the last dimension, forward and backward",
}
FLOPS_PER_ELEMENT = {"channels": 5, "block": 12, "tokens": 5}

Function = Callable[..., Tensor]


def plain_channels(x: Tensor, g: Tensor) -> Tensor:
    return F.normalize(x, dim=1) * g * x.shape[1] ** 0.5


def plain_block(x: Tensor, g: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    y = plain_channels(x, g)
    return F.silu(y * (scale[:, :, None, None] + 1) + shift[:, :, None, None])


def plain_tokens(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight)


def fused_channels(x: Tensor, g: Tensor) -> Tensor:
    return rms_norm(x, None, g, 0.0, min_norm=1e-12)


def fused_block(x: Tensor, g: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return rms_norm(x, None, g, 0.0, min_norm=1e-12, scale=scale, shift=shift, activation="silu")


def fused_tokens(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, x.shape[-1], weight)


FUNCTIONS: dict[str, tuple[Function, Function]] = {
    "channels": (plain_channels, fused_channels),
    "block": (plain_block, fused_block),
    "tokens": (plain_tokens, fused_tokens),
}


def cases(device: torch.device, full: bool) -> list[Case]:
    """6 modes x 4 shapes of images in 2 layouts, or 3 of tokens, x dtypes."""
    dtypes = ("bf16", "fp32", "fp16") if device.type == "cuda" else ("fp32", "bf16")
    return [
        Case("rms_norm", mode, shape, dtype, functools.partial(build, mode, shape, layout, dtype, device), group, layout=layout)
        for mode, group in GROUP_OF.items()
        for shape in (TOKENS if mode.startswith("tokens") else IMAGES)
        for layout in (("NLC",) if mode.startswith("tokens") else ("NCHW", "NHWC"))
        for dtype in dtypes
    ]  # fmt: skip


def build(
    mode: str, shape: tuple[int, ...], layout: str, dtype: str, device: torch.device, allow_compile: bool
) -> Workload:
    kind, _, grad = mode.partition("_")
    plain, fused = FUNCTIONS[kind]
    inputs = make_inputs(kind, shape, layout, dtype, device)
    x = inputs[0]
    if grad:
        inputs = [t.requires_grad_() for t in inputs]
    grad_output = random_tensor(shape, device, dtype, seed=9, layout=layout)

    functions = {"eager": plain}
    notes: list[str] = []
    if function := compiled(plain, inputs, allow_compile, notes, grad=bool(grad)):
        functions["compile"] = function
    functions["fastgen"] = fused

    def prepare(function: Function, grad_output: Tensor) -> Callable[..., tuple[Tensor, ...]]:
        def forward_and_backward(*args: Tensor) -> tuple[Tensor, ...]:
            output = function(*args)
            return output, *torch.autograd.grad(output, args, grad_output)

        return forward_and_backward if grad else lambda *args: (function(*args),)

    def expected() -> tuple[Tensor, ...]:
        wide = [t.detach().double().requires_grad_(bool(grad)) for t in inputs]
        return prepare(plain, grad_output.double())(*wide)

    providers = [
        Provider(
            name, functools.partial(prepare(f, grad_output), *inputs), "fastgen" if name == "fastgen" else "baseline"
        )
        for name, f in functions.items()
    ]
    providers.append(Provider("copy", x.detach().clone, "floor"))
    elements = math.prod(shape)
    slices = elements // shape[-1 if kind == "tokens" else 1]
    terms = [1, 1, slices, *[slices // shape[0]] * (len(inputs) - 2)]  # summed for the output and each gradient
    return Workload(
        providers,
        (Values(expected, yardstick="eager", terms=terms if grad else None),),
        min_bytes=(5 if grad else 2) * elements * DTYPES[dtype].itemsize,
        flops=FLOPS_PER_ELEMENT[kind] * (4 if grad else 1) * elements,
        grad=bool(grad),
        notes=notes,
    )


def make_inputs(kind: str, shape: tuple[int, ...], layout: str, dtype: str, device: torch.device) -> list[Tensor]:
    """x off centre, weight near 1 and, for a block, scale and shift [N, C]."""
    x = random_tensor(shape, device, dtype, seed=0, layout=layout, mean=0.3, deviation=1.5)
    size = (shape[-1],) if kind == "tokens" else (1, shape[1], 1, 1)
    inputs = [x, random_tensor(size, device, dtype, seed=1, mean=1.0, deviation=0.2)]
    if kind == "block":
        inputs += [random_tensor(shape[:2], device, dtype, seed=2 + k, deviation=0.3) for k in range(2)]
    return inputs
