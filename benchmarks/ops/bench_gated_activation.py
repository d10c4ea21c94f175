"""`gated_activation` at the sizes of Gated PixelCNN, PixelCNN++ and WaveNet, inference and training, beside eager and compiled.

Gated PixelCNN adds a number a channel (a class), WaveNet what stands beside each sample (features), PixelCNN++ nothing.
The plain functions are written as a user writes them. The floor is a clone of the input.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastgen.ops import gated_activation

from ..cases import DTYPES, Case, Provider, Workload, compiled, random_tensor
from ..verify import Values

# Model -> (shapes of the input, layouts, activation, its condition).
MODELS: dict[str, tuple[tuple[tuple[int, ...], ...], tuple[str, ...], str, str]] = {
    "gated_pixelcnn": (((1, 256, 28, 28), (16, 256, 28, 28)), ("NCHW", "NHWC"), "tanh", "channel"),
    "pixelcnn_pp": (((1, 320, 32, 32), (16, 320, 32, 32)), ("NCHW", "NHWC"), "identity", "none"),
    "wavenet": (((1, 128, 16000), (8, 128, 16000)), ("NCL",), "tanh", "position"),
}
NAME_OF = {
    "gated_pixelcnn": "gated tanh, a condition a channel",
    "pixelcnn_pp": "gated",
    "wavenet": "gated tanh, a condition a position",
}
GROUP_OF = {"forward": "{}", "backward": "{}, forward and backward"}
UNITS = {
    "forward": {"none": 3, "channel": 3, "position": 5},
    "backward": {"none": 8, "channel": 8, "position": 14},
}  # of an output
FLOPS_PER_ELEMENT = 25

Function = Callable[..., Tensor]


def plain(activation: str) -> Function:
    def function(x: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is not None:
            x = x + (condition[:, :, None, None] if condition.dim() < x.dim() else condition)
        a, b = x.chunk(2, 1)
        return (torch.tanh(a) if activation == "tanh" else a) * torch.sigmoid(b)

    return function


def cases(device: torch.device, full: bool) -> list[Case]:
    """2 modes x 10 shapes and layouts x dtypes."""
    dtypes = ("bf16", "fp32", "fp16") if device.type == "cuda" else ("fp32", "bf16")
    return [
        Case(
            "gated_activation",
            mode,
            shape,
            dtype,
            functools.partial(build, model, mode, shape, layout, dtype, device),
            group.format(NAME_OF[model]),
            layout=layout,
        )
        for mode, group in GROUP_OF.items()
        for model, (shapes, layouts, _, _) in MODELS.items()
        for shape in shapes
        for layout in layouts
        for dtype in dtypes
    ]


def build(
    model: str, mode: str, shape: tuple[int, ...], layout: str, dtype: str, device: torch.device, allow_compile: bool
) -> Workload:
    _, _, activation, kind = MODELS[model]
    grad = mode == "backward"
    inputs = [random_tensor(shape, device, dtype, seed=0, layout=layout, deviation=1.5)]
    if kind != "none":
        inputs.append(random_tensor(shape[:2] if kind == "channel" else shape, device, dtype, seed=1))
    if grad:
        inputs = [t.requires_grad_() for t in inputs]
    grad_output = random_tensor((shape[0], shape[1] // 2, *shape[2:]), device, dtype, seed=9, layout=layout)

    functions: dict[str, Function] = {"eager": plain(activation)}
    notes: list[str] = []
    if function := compiled(functions["eager"], inputs, allow_compile, notes, grad=grad):
        functions["compile"] = function
    functions["fastgen"] = functools.partial(gated_activation, activation=activation)

    def prepare(function: Function, grad_output: Tensor) -> Callable[..., tuple[Tensor, ...]]:
        def forward_and_backward(*args: Tensor) -> tuple[Tensor, ...]:
            output = function(*args)
            return output, *torch.autograd.grad(output, args, grad_output)

        return forward_and_backward if grad else lambda *args: (function(*args),)

    def expected() -> tuple[Tensor, ...]:
        wide = [t.detach().double().requires_grad_(grad) for t in inputs]
        return prepare(plain(activation), grad_output.double())(*wide)

    providers = [
        Provider(
            name, functools.partial(prepare(f, grad_output), *inputs), "fastgen" if name == "fastgen" else "baseline"
        )
        for name, f in functions.items()
    ]
    providers.append(Provider("copy", inputs[0].detach().clone, "floor"))
    elements = math.prod(shape) // 2
    terms = [1, 1, math.prod(shape[2:]) if kind == "channel" else 1][: 1 + len(inputs)]
    return Workload(
        providers,
        (Values(expected, yardstick="eager", terms=terms if grad else None),),
        min_bytes=UNITS[mode][kind] * elements * DTYPES[dtype].itemsize,
        flops=FLOPS_PER_ELEMENT * (3 if grad else 1) * elements,
        grad=grad,
        notes=notes,
    )
