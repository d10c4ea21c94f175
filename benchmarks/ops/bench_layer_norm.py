"""`layer_norm` at the sizes of Stable Diffusion's and DiT's blocks, inference and training: eager and compiled torch beside it.

Alone; with the residual add before it, as a pre-norm block has it; with gate, residual, scale and shift, as DiT has it. The floor
is one read and one write of each tensor of the input's size: clones.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.ops import layer_norm

from ..cases import DTYPES, Case, Provider, Workload, compiled, random_tensor
from ..verify import Values

SHAPES = ((2, 4096, 320), (2, 1024, 640), (2, 256, 1280), (8, 256, 1152), (1, 77, 768))
GROUP_OF = {
    "norm": "LayerNorm alone",
    "residual": "residual add + LayerNorm",
    "adaln": "gate, residual add + LayerNorm + scale and shift",
    "norm_backward": "LayerNorm alone, forward and backward",
    "residual_backward": "residual add + LayerNorm, forward and backward",
    "adaln_backward": "gate, residual add + LayerNorm + scale and shift, forward and backward",
}
# Tensors of the input's size that are read or written at the least; the backward reads gradients and the sum, and writes.
PASSES = {"norm": 2, "residual": 4, "adaln": 4, "norm_backward": 5, "residual_backward": 8, "adaln_backward": 10}
FLOPS_PER_ELEMENT = {"norm": 8, "residual": 9, "adaln": 12}

Function = Callable[..., tuple[Tensor, ...]]


def plain_norm(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return (F.layer_norm(x, x.shape[-1:], weight, bias),)


def plain_residual(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    total = x + residual
    return F.layer_norm(total, x.shape[-1:], weight, bias), total


def plain_adaln(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
    total = residual + gate[:, None] * x
    return F.layer_norm(total, x.shape[-1:]) * (1 + scale[:, None]) + shift[:, None], total


def fused_norm(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return (layer_norm(x, x.shape[-1], weight, bias),)


def fused_residual(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return layer_norm(x, x.shape[-1], weight, bias, residual=residual)


def fused_adaln(x: Tensor, residual: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
    return layer_norm(x, x.shape[-1], residual=residual, gate=gate, scale=scale, shift=shift)


FUNCTIONS: dict[str, tuple[Function, Function]] = {
    "norm": (plain_norm, fused_norm),
    "residual": (plain_residual, fused_residual),
    "adaln": (plain_adaln, fused_adaln),
}


def cases(device: torch.device, full: bool) -> list[Case]:
    """6 modes x 5 shapes x dtypes."""
    dtypes = ("bf16", "fp32", "fp16") if device.type == "cuda" else ("fp32", "bf16")
    return [
        Case(
            "layer_norm", mode, shape, dtype, functools.partial(build, mode, shape, dtype, device), group, layout="NLC"
        )
        for mode, group in GROUP_OF.items()
        for shape in SHAPES
        for dtype in dtypes
    ]


def build(mode: str, shape: tuple[int, ...], dtype: str, device: torch.device, allow_compile: bool) -> Workload:
    kind, _, grad = mode.partition("_")
    plain, fused = FUNCTIONS[kind]
    inputs = make_inputs(kind, shape, dtype, device)
    if grad:
        inputs = [t.requires_grad_() for t in inputs]
    outputs = 1 if kind == "norm" else 2
    grads = [random_tensor(shape, device, dtype, seed=20 + k) for k in range(outputs)]

    functions = {"eager": plain}
    notes: list[str] = []
    if function := compiled(plain, inputs, allow_compile, notes, grad=bool(grad)):
        functions["compile"] = function
    functions["fastgen"] = fused

    def prepare(function: Function, given: list[Tensor]) -> Function:
        def forward_and_backward(*args: Tensor) -> tuple[Tensor, ...]:
            results = function(*args)
            return *results, *torch.autograd.grad(results, args, given)

        return forward_and_backward if grad else function

    def expected() -> tuple[Tensor, ...]:
        wide = [t.detach().double().requires_grad_(bool(grad)) for t in inputs]
        return prepare(plain, [g.double() for g in grads])(*wide)

    providers = [
        Provider(name, functools.partial(prepare(f, grads), *inputs), "fastgen" if name == "fastgen" else "baseline")
        for name, f in functions.items()
    ]
    copies = [t.detach() for t in inputs if t.shape == shape]
    providers.append(Provider("copy", lambda: [t.clone() for t in copies], "floor"))
    elements = math.prod(shape)
    rows = elements // shape[-1]
    # what is summed for each gradient of a small tensor: the rows of all samples, or of one
    terms = [1] * outputs + [1 if t.shape == shape else rows if t.dim() == 1 else shape[1] for t in inputs]
    return Workload(
        providers,
        (Values(expected, yardstick="eager", terms=terms if grad else None),),
        min_bytes=PASSES[mode] * elements * DTYPES[dtype].itemsize,
        flops=FLOPS_PER_ELEMENT[kind] * (4 if grad else 1) * elements,
        grad=bool(grad),
        notes=notes,
    )


def make_inputs(kind: str, shape: tuple[int, ...], dtype: str, device: torch.device) -> list[Tensor]:
    """x off centre, and what the kind takes beside it."""
    n, c = shape[0], shape[-1]
    x = random_tensor(shape, device, dtype, seed=0, mean=0.3, deviation=1.5)
    weight = random_tensor((c,), device, dtype, seed=1, mean=1.0, deviation=0.2)
    bias = random_tensor((c,), device, dtype, seed=2, deviation=0.2)
    residual = random_tensor(shape, device, dtype, seed=3)
    per_sample = [random_tensor((n, c), device, dtype, seed=4 + k, deviation=0.3) for k in range(3)]
    return {
        "norm": [x, weight, bias],
        "residual": [x, residual, weight, bias],
        "adaln": [x, residual, *per_sample],
    }[kind]
