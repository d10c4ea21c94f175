"""Arguments of `geglu` for its tests on every device, and what a user writes without it."""

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen._schema import GELU_APPROXIMATIONS
from fastgen.ops import geglu

from .families import Call, OfTensors
from .numerics import DTYPES, assert_bar, dtype_name, guarded, randn

# (M, C, D): one row and several blocks of them, features that fill panels and do not, channels past a block of the product.
SHAPES = [(1, 1, 1), (5, 7, 3), (3, 320, 16), (33, 64, 80), (130, 300, 37), (270, 20, 100), (9, 1280, 17)]


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """The same by torch, in the dtype of ``x``, as diffusers writes it."""
    value, gate = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)).chunk(2, -1)
    return value * F.gelu(gate, approximate=approximate)


def tensors(shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """Input, weight and bias of a shape as in SHAPES."""
    m, c, d = shape
    return [
        guarded(t.to(dtype))
        for t in (randn(m, c, seed=1), randn(2 * d, c, seed=2) / c**0.5, randn(2 * d, seed=3) + 0.5)
    ]


def example(dtype: torch.dtype) -> dict[str, Any]:
    x, weight, bias = tensors((5, 6, 3), dtype)
    return {"input": x, "weight": weight, "bias": bias}


def forward_arguments(dtype: torch.dtype = torch.float32, shape=(5, 6, 3), approximate: int = 0) -> tuple:
    return *tensors(shape, dtype), approximate


def packed_arguments(dtype: torch.dtype = torch.float32, shape=(5, 6, 3), approximate: int = 0) -> tuple:
    x, weight, bias = tensors(shape, dtype)
    return x, torch.ops.fastgen.geglu_pack(weight), shape[2], bias, approximate


def direct_arguments(dtype: torch.dtype = torch.bfloat16, shape=(5, 6, 3), approximate: int = 0) -> tuple:
    x, weight, bias = tensors(shape, dtype)
    return x, torch.ops.fastgen.geglu_direct_pack(weight), shape[2], bias, approximate


UNSEEN = {
    "geglu_fwd": forward_arguments,
    "geglu_chunked": forward_arguments,
    "geglu_pack": lambda: (randn(6, 5, dtype=torch.float32),),
    "geglu_packed": packed_arguments,
    "geglu_direct_pack": lambda: (randn(6, 5, dtype=torch.float32),),
    "geglu_direct": direct_arguments,
}
REFUSED = [
    *(
        (op, {"approximate": 2}, "approximate")
        for op in ("geglu_fwd", "geglu_chunked", "geglu_packed", "geglu_direct", "geglu_gate")
    ),
    ("geglu_gate_bwd", {"approximate": -1}, "approximate"),
    ("geglu_gate_bwd", {"grad_output": torch.zeros(5, 3).double()}, "grad_output must be"),
    ("geglu_chunked", {"weight": torch.zeros(6, 6).double()}, "weight must .*the dtype of input"),
    ("geglu_chunked", {"bias": torch.zeros(6).double()}, "bias must .*the dtype of input"),
    ("geglu_packed", {"input": torch.zeros(5, 6).double()}, "input must be float32, bfloat16 or float16"),
    ("geglu_packed", {"features": 17}, "for"),
    ("geglu_packed", {"features": 0}, "for"),
    ("geglu_direct", {"input": torch.zeros(5, 6)}, "input must be bfloat16"),
    ("geglu_direct", {"features": 17, "bias": None}, "packed must"),
    ("geglu_direct", {"features": 0, "bias": None}, "packed must"),
]


def harmless(op: str, name: str, how: str, arguments: dict[str, Any]) -> bool:
    """There may be any number of rows; a weight may have any number of channels; one tensor alone may be on any device."""
    rows = name in ("input", "projected") and op != "geglu_gate_bwd" and how.startswith("dimension 0")
    if op in ("geglu_pack", "geglu_direct_pack"):
        return (
            how == "the meta device"
            or (how.startswith("dimension 1") and "empty" not in how)
            or how == "dimension 0 too long"
        )
    if op == "geglu_direct" and name == "input":  # as many blocks of channels: what pads a tile is zero in both factors
        return rows or how in ("dimension 1 of one", "dimension 1 too short", "dimension 1 too long")
    if op == "geglu_gate":
        return rows or how in ("the meta device", "dimension 1 too long")
    return rows


def whole_numbers(*shape: int, seed: int) -> Tensor:
    return randn(*shape, seed=seed).mul(2).round().float()


# Gates far from 0, where GELU is the gate or 0: every sum of the product and of its gradients is exact, in whatever order.
MAPPED = OfTensors(
    lambda x, weight, bias: geglu(x, weight, bias),
    lambda k: [
        64 * whole_numbers(4, 5, seed=k), whole_numbers(6, 5, seed=50 + k), 64 * whole_numbers(6, seed=70 + k) + 32
    ],
)  # fmt: skip
_WEIGHT = randn(6, 5, dtype=torch.float32)
EXPORTED = {"geglu": OfTensors(lambda x: geglu(x, _WEIGHT.clone()), lambda n: [randn(n, 5, dtype=torch.float32)])}


def gate_arguments(m: int, d: int, dtype: torch.dtype, approximate: int, grad: bool = False) -> tuple:
    projected = randn(m, 2 * d, seed=5, dtype=dtype) * 2
    return (*((randn(m, d, seed=6, dtype=dtype),) if grad else ()), projected, approximate)


def calls() -> Iterator[Call]:
    for dtype, (approximate, name) in itertools.product(DTYPES, enumerate(GELU_APPROXIMATIONS)):
        for m, d in ((3, 40), (2, 1030)):
            arguments = (m, d, dtype, approximate)
            yield Call(f"{name} {m}x{d} {dtype_name(dtype)}", "geglu_gate", partial(gate_arguments, *arguments))
            yield Call(
                f"{name} {m}x{d} {dtype_name(dtype)}", "geglu_gate_bwd", partial(gate_arguments, *arguments, grad=True)
            )
    yield Call("fp32", "geglu_fwd", partial(forward_arguments, torch.float32, (7, 24, 10)))
    yield Call("fp64 tanh", "geglu_fwd", partial(forward_arguments, torch.float64, (7, 24, 10), 1))


@pytest.mark.parametrize("approximate", range(len(GELU_APPROXIMATIONS)))
def check_ends(kernels, approximate):
    """Values far out, infinite and not a number, of h and of the gate."""
    x = torch.tensor([0.0, 1.0, -3.0, 1e3, -1e3, 1e20, -1e20, math.inf, -math.inf, math.nan])
    projected = torch.cartesian_prod(x, x).reshape(-1, 2)
    value, gate = projected.unbind(-1)
    expected = (value * F.gelu(gate.double(), approximate=GELU_APPROXIMATIONS[approximate])).float()
    torch.testing.assert_close(
        kernels.geglu_gate(projected, approximate), expected[:, None], rtol=1e-5, atol=1e-30, equal_nan=True
    )


def gates(arch: int) -> Iterator[Call]:
    """SD's widest layer in every dtype; odd sizes, and tanh, in one."""
    half = torch.bfloat16

    def zeros(m, d, dtype, approximate=0, grad=False):
        projected = torch.zeros(m, 2 * d, dtype=dtype)
        return (*((torch.zeros(m, d, dtype=dtype),) if grad else ()), projected, approximate)

    cases = [(f"contiguous {dtype_name(dtype)}", (256, 5120, dtype)) for dtype in DTYPES]
    cases += [("odd bf16", (77, 333, half)), ("contiguous tanh bf16", (256, 5120, half, 1))] if arch == 90 else []
    for name, arguments in cases:
        yield Call(name, "geglu_gate", partial(zeros, *arguments))
        yield Call(name, "geglu_gate_bwd", partial(zeros, *arguments, grad=True))


@pytest.mark.parametrize("approximate", GELU_APPROXIMATIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def gpu_values(dtype, shape, approximate):
    arguments = [t.cuda() for t in tensors(shape, dtype)]
    exact = plain(*(t.double() for t in arguments), approximate=approximate)
    beside = plain(*arguments, approximate=approximate)
    slack = {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, 1e-3)
    assert_bar(geglu(*arguments, approximate=approximate), beside, exact, slack)


def gpu_gradcheck():
    arguments = [t.cuda().requires_grad_() for t in tensors((3, 4, 5), torch.float64)]
    for approximate in GELU_APPROXIMATIONS:
        assert torch.autograd.gradcheck(lambda *t, kind=approximate: geglu(*t, approximate=kind), arguments)
