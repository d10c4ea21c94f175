"""`actnorm` with its log-determinant at the sizes of a Glow and of a table, density and training, beside nflows, normflows, and
eager and compiled torch as Glow's ports write it.

The floor is a clone of the input.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastgen.ops import actnorm

from ..cases import DTYPES, Case, Provider, Workload, compiled, random_tensor
from ..verify import Values

# (shape, layouts)
SHAPES = (((64, 12, 32, 32), ("NCHW", "NHWC")), ((64, 48, 8, 8), ("NCHW", "NHWC")), ((65536, 64), ("NC",)))
GROUP_OF = {
    "forward": "actnorm with its log-determinant",
    "backward": "actnorm with its log-determinant, forward and backward",
}
UNITS = {
    "forward": 2,
    "backward": 5,
}  # of the input: read and written; its gradient written, that of the output and the input read
FLOPS_PER_ELEMENT = 2

Function = Callable[..., tuple[Tensor, Tensor]]


def plain(x: Tensor, log_scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    s, t = (p.reshape(-1, *[1] * (x.dim() - 2)) for p in (log_scale, shift))
    log_det = math.prod(x.shape[2:]) * log_scale.sum()
    return x * torch.exp(s) + t, log_det.expand(x.shape[0])


def peers(x: Tensor, log_scale: Tensor, shift: Tensor, notes: list[str]) -> dict[str, Function]:
    """The layers of nflows and normflows with these parameters."""
    found: dict[str, Function] = {}
    try:
        from nflows.transforms import ActNorm

        layer = ActNorm(x.shape[1]).to(x).eval()
        layer.log_scale, layer.shift = (torch.nn.Parameter(p) for p in (log_scale, shift))
        found["nflows"] = _of_parameters(layer, ("log_scale", "shift"), layer.forward)
    except ImportError:
        notes.append("nflows is not installed")
    try:
        from normflows.flows import ActNorm as Affine

        ones = [1] * (x.dim() - 2)
        flow = Affine((x.shape[1], *ones)).to(x)
        flow.data_dep_init_done.fill_(1.0)
        flow.s, flow.t = (torch.nn.Parameter(p.reshape(1, -1, *ones)) for p in (log_scale, shift))
        found["normflows"] = _of_parameters(flow, ("s", "t"), flow.forward)
    except ImportError:
        notes.append("normflows is not installed")
    return found


def _of_parameters(layer: torch.nn.Module, names: tuple[str, str], forward: Function) -> Function:
    """``layer`` as a function of its input and its parameters, by replacing them."""

    def function(x: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        for name, value in zip(names, values, strict=True):
            like = layer._parameters[name]
            layer._parameters[name] = value if like is None else value.reshape(like.shape)  # type: ignore[assignment]
        y, log_det = forward(x)
        return y, log_det.expand(x.shape[0])

    return function


def cases(device: torch.device, full: bool) -> list[Case]:
    """2 modes x 5 shapes and layouts x dtypes."""
    dtypes = ("bf16", "fp32", "fp16") if device.type == "cuda" else ("fp32", "bf16")
    return [
        Case("actnorm", mode, shape, dtype, functools.partial(build, mode, shape, layout, dtype, device), group, layout=layout)
        for mode, group in GROUP_OF.items()
        for shape, layouts in SHAPES
        for layout in layouts
        for dtype in dtypes
    ]  # fmt: skip


def build(
    mode: str, shape: tuple[int, ...], layout: str, dtype: str, device: torch.device, allow_compile: bool
) -> Workload:
    grad = mode == "backward"
    inputs = [random_tensor(shape, device, dtype, seed=0, layout=layout)]
    inputs += [random_tensor(shape[1:2], device, dtype, seed=i, deviation=0.3) for i in (1, 2)]
    inputs = [t.requires_grad_(grad) for t in inputs]
    grad_output = random_tensor(shape, device, dtype, seed=9, layout=layout)
    notes: list[str] = []
    functions: dict[str, Function] = {"eager": plain}
    if dtype == "fp32":
        functions |= peers(*(t.detach() for t in inputs), notes)
    if function := compiled(plain, inputs, allow_compile, notes, grad=grad):
        functions["compile"] = function
    functions["fastgen"] = functools.partial(actnorm, log_scale=True)

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
    terms = [1, 1, elements // shape[1], elements // shape[1]] if grad else [1, elements // shape[0]]
    return Workload(
        providers,
        (Values(expected, yardstick="eager", terms=terms),),
        min_bytes=UNITS[mode] * elements * DTYPES[dtype].itemsize,
        flops=FLOPS_PER_ELEMENT * (3 if grad else 1) * elements,
        grad=grad,
        notes=notes,
    )
