"""`geglu` at the sizes of Stable Diffusion's feed-forwards, inference and training, beside the same in eager and compiled torch.

The floor is the linear's matrix product alone.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.ops import geglu

from ..cases import Case, Provider, Workload, compiled, random_tensor
from ..verify import Values

# (N, tokens, C), D = 4 C: the levels of an image of 512 x 512, alone and with guidance.
SHAPES = {
    "inference": ((1, 256, 1280), (2, 256, 1280), (1, 1024, 640), (2, 1024, 640), (1, 4096, 320), (2, 4096, 320)),
    "backward": ((1, 256, 1280), (1, 1024, 640), (1, 4096, 320)),
}
GROUP_OF = {"inference": "geglu with its linear", "backward": "geglu with its linear, forward and backward"}


def cases(device: torch.device, full: bool) -> list[Case]:
    """9 shapes and modes x dtypes, the smallest first."""
    dtypes = ("fp32", "bf16", "fp16") if device.type == "cuda" and full else ("fp32", "bf16")
    return [
        Case(
            "geglu",
            mode,
            shape,
            dtype,
            functools.partial(build, mode, shape, dtype, device),
            GROUP_OF[mode],
            layout="NLC",
        )
        for mode, shapes in SHAPES.items()
        for shape in shapes
        for dtype in dtypes
        if mode == "inference" or dtype == "fp32" or device.type == "cuda"
    ]


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    value, gate = F.linear(x, weight, bias).chunk(2, -1)
    return value * F.gelu(gate)


def build(mode: str, shape: tuple[int, ...], dtype: str, device: torch.device, allow_compile: bool) -> Workload:
    n, tokens, c = shape
    grad = mode == "backward"
    inputs = [
        random_tensor((n, tokens, c), device, dtype, seed=0),
        random_tensor((8 * c, c), device, dtype, seed=1, deviation=c**-0.5),
        random_tensor((8 * c,), device, dtype, seed=2),
    ]
    grad_output = random_tensor((n, tokens, 4 * c), device, dtype, seed=9)
    if grad:
        inputs = [t.requires_grad_() for t in inputs]

    functions: dict[str, Callable[..., Tensor]] = {"eager": plain}
    notes: list[str] = []
    if function := compiled(plain, inputs, allow_compile, notes, grad=grad):
        functions["compile"] = function
    functions["fastgen"] = geglu

    def prepare(
        function: Callable[..., Tensor], grad_output: Tensor = grad_output
    ) -> Callable[..., tuple[Tensor, ...]]:
        def forward_and_backward(*args: Tensor) -> tuple[Tensor, ...]:
            output = function(*args)
            return output, *torch.autograd.grad(output, args, grad_output)

        return forward_and_backward if grad else lambda *args: (function(*args),)

    def expected() -> tuple[Tensor, ...]:
        wide = [t.detach().double().requires_grad_(grad) for t in inputs]
        return prepare(plain, grad_output.double())(*wide)

    providers = [
        Provider(name, functools.partial(prepare(f), *inputs), "fastgen" if name == "fastgen" else "baseline")
        for name, f in functions.items()
    ]
    x, weight = inputs[0].detach().reshape(-1, c), inputs[1].detach()
    providers.append(Provider("matrix product", functools.partial(torch.matmul, x, weight.t()), "floor"))
    return Workload(
        providers,
        (Values(expected, yardstick="eager"),),
        min_bytes=(sum(t.nbytes for t in inputs) + grad_output.nbytes) * (2 if grad else 1),
        flops=(3 if grad else 1) * 2 * n * tokens * c * 8 * c,
        grad=grad,
        notes=notes,
    )
