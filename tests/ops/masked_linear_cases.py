"""Arguments of `masked_linear` for its tests on every device, and what a user writes without it."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.ops import masked_linear

from ._made import made
from .families import Call, OfTensors
from .numerics import DTYPES, assert_bar, dtype_name, randn

# (samples, inputs, outputs): rows and columns that fill vectors, tiles and tasks, and that do not.
SHAPES = [(4, 6, 7), (1, 1, 1), (17, 33, 50), (48, 64, 64), (100, 31, 18), (3, 200, 5)]
MASKS = ("degrees", "strict", "random", "nothing", "everything")


def mask_of(kind: str, outputs: int, inputs: int) -> Tensor:
    """[outputs, inputs] of one of MASKS."""
    if kind in ("nothing", "everything"):
        return torch.full((outputs, inputs), kind == "everything")
    if kind == "random":
        return torch.rand(outputs, inputs, generator=torch.Generator().manual_seed(1)) < 0.4
    ins, outs = (torch.arange(n) % max(inputs - 1, 1) + 1 for n in (inputs, outputs))
    return outs[:, None] > ins if kind == "strict" else outs[:, None] >= ins


def plain(input: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
    """As nflows has it."""
    return F.linear(input, weight * mask, bias)


def gradients(function, grad: Tensor, mask: Tensor, *tensors: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(*leaves, mask)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def operands(samples: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    sizes = ((samples, inputs), (outputs, inputs), (outputs,))
    x, w, b = (randn(*size, seed=i).to(dtype) for i, size in enumerate(sizes))
    return x, w, b


def example(dtype: torch.dtype) -> dict[str, Any]:
    x, weight, bias = operands(5, 6, 7, dtype)
    return {"input": x, "weight": weight, "bias": bias, "mask": mask_of("degrees", 7, 6)}


def network(samples: int, dtype: torch.dtype, **options: Any) -> tuple[Any, ...]:
    """Arguments of `masked_linear_network`."""
    net = made(samples=samples if options.pop("context", True) else 0, **options)
    program = net.program(stepwise=False)
    x = randn(samples, net.features, seed=7).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (x, *net.operands(program, wide), net.features * net.per_feature)


def weight_bwd(samples: int, inputs: int, outputs: int, dtype: torch.dtype, kind: str = "degrees") -> tuple[Any, ...]:
    """Arguments of `masked_linear_weight_bwd`, the rows and columns in the order they have."""
    mask = mask_of(kind, outputs, inputs)
    known = (mask * torch.arange(1, inputs + 1)).amax(1)
    x, grad = operands(samples, inputs, outputs, dtype)[0], randn(samples, outputs, seed=3).to(dtype)
    return grad, x, mask, torch.arange(outputs), torch.arange(inputs), known


def forward(samples: int, inputs: int, outputs: int, dtype: torch.dtype, kind: str = "degrees") -> tuple[Any, ...]:
    return (*operands(samples, inputs, outputs, dtype), mask_of(kind, outputs, inputs))


def backward(samples: int, inputs: int, outputs: int, dtype: torch.dtype, kind: str = "degrees") -> tuple[Any, ...]:
    x, w, _, mask = forward(samples, inputs, outputs, dtype, kind)
    return randn(samples, outputs, seed=3).to(dtype), x, w, mask, True, True


def pack(dtype: torch.dtype = torch.float32, outputs: int = 7, inputs: int = 6) -> tuple[Any, ...]:
    """Arguments of `masked_linear_pack`: places of all numbers in any order, and of none."""
    places = torch.randperm(outputs * inputs, generator=torch.Generator().manual_seed(2)) - 1
    tasks = torch.tensor([[0, 10**6], [inputs, 3], [10**9, 0], [inputs, outputs - 4], [1, inputs]])
    return operands(1, inputs, outputs, dtype)[1], places.to(torch.int32), tasks, 4


UNSEEN = {
    "masked_linear_pack": pack,
    "masked_linear_network": partial(network, 4, torch.float32),
    "masked_linear_weight_bwd": partial(weight_bwd, 4, 6, 7, torch.float32),
}
REFUSED = [
    ("masked_linear_pack", {"gather": torch.arange(1, 43, dtype=torch.int32)}, "gather must be"),
    ("masked_linear_pack", {"gather": torch.arange(1, 43, dtype=torch.int32).flip(0)}, "gather must be"),
    ("masked_linear_pack", {"gather": torch.arange(-2, 40, dtype=torch.int32)}, "gather must be"),
    ("masked_linear_pack", {"tasks": torch.tensor([[6, 8]])}, "tasks must be"),
    ("masked_linear_pack", {"tasks": torch.tensor([[-6, -7]])}, "tasks must"),
    ("masked_linear_pack", {"block": 0}, "block must be"),
    ("masked_linear_network", {"outputs": 3}, "outputs must be"),
    ("masked_linear_network", {"constants": None}, "constants must be"),
    ("masked_linear_network", {"program": torch.zeros(3, dtype=torch.int64)}, "program ends"),
    ("masked_linear_network", {"program": torch.tensor([0, 0, 0, 0, 0, 0, 0, -1])}, "program has"),
]


def harmless(op: str, name: str, how: str, arguments: dict[str, Any]) -> bool:
    """Any number of samples goes, and there may be more weights than are read."""
    if op == "masked_linear_fwd":
        return name == "input" and how.startswith("dimension 0")
    if op == "masked_linear_pack":  # which numbers are read is a matter of their places
        return (name == "weight" and how.startswith("dimension")) or (name == "gather" and how == "integers")
    if op == "masked_linear_network":
        return name in ("weights", "parameters") and how == "dimension 0 too long"
    return False


def unknown_to_fakes(op: str, name: str, how: str) -> bool:
    """The program says how large these are, and the tasks how many places there are."""
    if op == "masked_linear_pack":
        return how.startswith("dimension 0") and name in ("gather", "tasks")
    sizes = ("program", "weights", "parameters", "constants", "input")
    return op == "masked_linear_network" and how.startswith("dimension") and name in sizes


MASK, WEIGHT = mask_of("degrees", 7, 6), operands(4, 6, 7, torch.float32)[1]
MAPPED = OfTensors(
    lambda x, w, b: masked_linear(x, w, b, mask=MASK), lambda k: [t + k for t in operands(4, 6, 7, torch.float32)]
)
EXPORTED = {"masked_linear": OfTensors(lambda x: masked_linear(x, WEIGHT, mask=MASK), lambda n: [randn(n, 6).float()])}


def calls() -> Iterator[Call]:
    for kind in MASKS:
        yield Call(f"{kind} fp32", "masked_linear_fwd", partial(forward, 17, 33, 50, torch.float32, kind))
        yield Call(f"{kind} fp32", "masked_linear_bwd", partial(backward, 17, 33, 50, torch.float32, kind))
    for dtype in DTYPES:
        name = dtype_name(dtype)
        yield Call(name, "masked_linear_fwd", partial(forward, 4, 6, 7, dtype))
        yield Call(name, "masked_linear_bwd", partial(backward, 4, 6, 7, dtype))
        yield Call(name, "masked_linear_weight_bwd", partial(weight_bwd, 9, 6, 7, dtype))
        yield Call(name, "masked_linear_network", partial(network, 5, dtype))
        yield Call(name, "masked_linear_pack", partial(pack, dtype, 50, 33))
    yield Call("40 samples fp32", "masked_linear_network", partial(network, 40, torch.float32, context=False))
    yield Call("elu fp32", "masked_linear_network", partial(network, 3, torch.float32, activation="elu"))


def gates(arch: int) -> Iterator[Call]:
    for dtype in DTYPES:
        yield Call(dtype_name(dtype), "masked_linear_fwd", partial(forward, 256, 512, 512, dtype))
        yield Call(dtype_name(dtype), "masked_linear_pack", partial(pack, dtype, 512, 512))
        if arch == 90 or dtype == torch.bfloat16:
            yield Call(dtype_name(dtype), "masked_linear_network", partial(network, 64, dtype, hidden=64))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def gpu_values_and_gradients(dtype, shape):
    x, w, b = (t.cuda() for t in operands(*shape, dtype))
    mask, grad = mask_of("degrees", shape[2], shape[1]).cuda(), randn(shape[0], shape[2], seed=3).to(dtype).cuda()
    actual = gradients(lambda x, w, b, m: masked_linear(x, w, b, mask=m), grad, mask, x, w, b)
    beside = gradients(plain, grad, mask, x, w, b)
    exact = gradients(plain, grad.double(), mask, x.double(), w.double(), b.double())
    for a, p, e in zip(actual, beside, exact, strict=True):
        assert_bar(a, p, e, 1e-12 if dtype == torch.float64 else 1e-6)
