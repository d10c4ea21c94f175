"""`invertible_conv1x1` after an actnorm, with both log-determinants, at the levels of a Glow, density and training, beside
normflows' two layers, and eager and compiled torch as Glow's ports write it (``conv2d`` with a kernel of one pixel, ``slogdet``).

The floor is a clone of the input.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.ops import invertible_conv1x1, invertible_conv1x1_log_det

from ..cases import DTYPES, Case, Provider, Workload, compiled, random_tensor
from ..verify import Values

SHAPES = ((64, 12, 32, 32), (64, 24, 16, 16), (64, 48, 8, 8), (64, 96, 4, 4))
GROUP_OF = {
    "forward": "actnorm and 1x1 convolution with their log-determinant",
    "backward": "actnorm and 1x1 convolution with their log-determinant, forward and backward",
}
UNITS = {"forward": 2, "backward": 5}  # of the input

Function = Callable[..., tuple[Tensor, Tensor]]


def plain(x: Tensor, weight: Tensor, log_scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    z = x * torch.exp(log_scale)[:, None, None] + shift[:, None, None]
    wide = weight.double() if weight.dtype == torch.float64 else weight.float()
    log_det = x.shape[2] * x.shape[3] * (torch.slogdet(wide)[1] + log_scale.sum())
    return F.conv2d(z, weight[:, :, None, None]), log_det.expand(x.shape[0])


def fused(x: Tensor, weight: Tensor, log_scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    log_det = invertible_conv1x1_log_det(x, weight, log_scale, log_scale=True)
    return invertible_conv1x1(x, weight, log_scale, shift, log_scale=True), log_det


def of_normflows() -> Function:
    """The layers of normflows, whose 1x1 convolution goes to the latents by its inverse."""
    from normflows.flows import ActNorm, Invertible1x1Conv

    def function(x: Tensor, weight: Tensor, log_scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        c = x.shape[1]
        if c not in layers:
            layers[c] = ActNorm((c, 1, 1)).to(x), Invertible1x1Conv(c).to(x)
            layers[c][0].data_dep_init_done.fill_(1.0)
        norm, conv = layers[c]
        norm._parameters["s"], norm._parameters["t"] = log_scale.reshape(1, c, 1, 1), shift.reshape(1, c, 1, 1)
        conv._parameters["W"] = weight
        z, of_norm = norm(x)
        y, of_conv = conv.inverse(z)
        return y, (of_norm + of_conv).expand(x.shape[0])

    layers: dict[int, tuple[torch.nn.Module, torch.nn.Module]] = {}
    return function


def cases(device: torch.device, full: bool) -> list[Case]:
    """2 modes x 4 shapes x 2 layouts x dtypes."""
    dtypes = ("bf16", "fp32", "fp16") if device.type == "cuda" else ("fp32", "bf16")
    return [
        Case(
            "invertible_conv1x1",
            mode,
            shape,
            dtype,
            functools.partial(build, mode, shape, layout, dtype, device),
            group,
            layout=layout,
        )
        for mode, group in GROUP_OF.items()
        for shape in SHAPES
        for layout in ("NCHW", "NHWC")
        for dtype in dtypes
    ]


def build(
    mode: str, shape: tuple[int, ...], layout: str, dtype: str, device: torch.device, allow_compile: bool
) -> Workload:
    grad, c = mode == "backward", shape[1]
    x = random_tensor(shape, device, dtype, seed=0, layout=layout)
    weight = torch.linalg.qr(random_tensor((c, c), device, "fp32", seed=3))[0].to(x.dtype)
    inputs = [x, weight, *(random_tensor((c,), device, dtype, seed=i, deviation=0.3) for i in (1, 2))]
    inputs = [t.requires_grad_(grad) for t in inputs]
    grad_output = random_tensor(shape, device, dtype, seed=9, layout=layout)
    notes: list[str] = []
    functions: dict[str, Function] = {"eager": plain}
    if dtype == "fp32":
        try:
            functions["normflows"] = of_normflows()
        except ImportError:
            notes.append("normflows is not installed")
    if function := compiled(plain, inputs, allow_compile, notes, grad=grad):
        functions["compile"] = function
    functions["fastgen"] = fused

    def prepare(function: Function, grad_output: Tensor) -> Callable[..., tuple[Tensor, ...]]:
        def forward_and_backward(*args: Tensor) -> tuple[Tensor, ...]:
            y, log_det = function(*args)
            return y, *torch.autograd.grad([y, log_det], args, [grad_output, torch.ones_like(log_det)])

        return forward_and_backward if grad else function

    def expected() -> tuple[Tensor, ...]:
        return prepare(plain, grad_output.double())(*(t.detach().double().requires_grad_(grad) for t in inputs))

    providers = [
        Provider(
            name, functools.partial(prepare(f, grad_output), *inputs), "fastgen" if name == "fastgen" else "baseline"
        )
        for name, f in functions.items()
    ]
    providers.append(Provider("copy", inputs[0].detach().clone, "floor"))
    elements = math.prod(shape)
    terms = [1, 1, *[elements // c] * 3] if grad else [1, elements // shape[0]]
    return Workload(
        providers,
        (Values(expected, yardstick="eager", terms=terms),),
        min_bytes=UNITS[mode] * elements * DTYPES[dtype].itemsize,
        flops=2 * c * (3 if grad else 1) * elements,
        grad=grad,
        notes=notes,
    )
