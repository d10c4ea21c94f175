"""`concat_elu` at the sizes of PixelCNN++, inference and training, beside the same in eager and compiled torch.

The plain function is what PixelCNN++ in PyTorch has. The floor is a clone of the input.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.ops import concat_elu

from ..cases import DTYPES, Case, Provider, Workload, compiled, random_tensor
from ..verify import Values

SHAPES = ((1, 160, 32, 32), (16, 160, 32, 32), (16, 160, 8, 8))
GROUP_OF = {"forward": "concatenated ELU", "backward": "concatenated ELU, forward and backward"}
UNITS = {"forward": 3, "backward": 7}  # of an input: x once, both halves, their gradients and that of x
FLOPS_PER_ELEMENT = 15

Function = Callable[[Tensor], Tensor]


def plain(x: Tensor) -> Tensor:
    return F.elu(torch.cat([x, -x], 1))


def cases(device: torch.device, full: bool) -> list[Case]:
    """2 modes x 3 shapes x 2 layouts x dtypes."""
    dtypes = ("bf16", "fp32", "fp16") if device.type == "cuda" else ("fp32", "bf16")
    return [
        Case("concat_elu", mode, shape, dtype, functools.partial(build, mode, shape, layout, dtype, device), group, layout=layout)
        for mode, group in GROUP_OF.items()
        for shape in SHAPES
        for layout in ("NCHW", "NHWC")
        for dtype in dtypes
    ]  # fmt: skip


def build(
    mode: str, shape: tuple[int, ...], layout: str, dtype: str, device: torch.device, allow_compile: bool
) -> Workload:
    grad = mode == "backward"
    x = random_tensor(shape, device, dtype, seed=0, layout=layout).requires_grad_(grad)
    grad_output = random_tensor((shape[0], 2 * shape[1], *shape[2:]), device, dtype, seed=9, layout=layout)

    functions: dict[str, Function] = {"eager": plain}
    notes: list[str] = []
    if function := compiled(plain, [x], allow_compile, notes, grad=grad):
        functions["compile"] = function
    functions["fastgen"] = concat_elu

    def prepare(function: Function, grad_output: Tensor) -> Callable[[Tensor], tuple[Tensor, ...]]:
        def forward_and_backward(x: Tensor) -> tuple[Tensor, ...]:
            output = function(x)
            return output, *torch.autograd.grad(output, x, grad_output)

        return forward_and_backward if grad else lambda x: (function(x),)

    def expected() -> tuple[Tensor, ...]:
        return prepare(plain, grad_output.double())(x.detach().double().requires_grad_(grad))

    providers = [
        Provider(name, functools.partial(prepare(f, grad_output), x), "fastgen" if name == "fastgen" else "baseline")
        for name, f in functions.items()
    ]
    providers.append(Provider("copy", x.detach().clone, "floor"))
    elements = math.prod(shape)
    return Workload(
        providers,
        (Values(expected, yardstick="eager"),),
        min_bytes=UNITS[mode] * elements * DTYPES[dtype].itemsize,
        flops=FLOPS_PER_ELEMENT * (2 if grad else 1) * elements,
        grad=grad,
        notes=notes,
    )
